"""Conformance suites that third parties inherit; importing a suite needs pytest and hypothesis."""

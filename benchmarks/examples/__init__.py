"""Worked examples: provable training of networks for real problems."""

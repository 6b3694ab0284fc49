"""Measurements: each ``fig_*.py`` runs one, writes JSON, and draws it from the JSON alone."""

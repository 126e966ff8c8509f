"""Notebooks run headless: single runs, sweeps and reports."""

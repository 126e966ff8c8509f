"""Sliders over a reward tensor."""

"""Reward models behind one interface."""

"""The online run."""

"""The reward tensor: made, opened, saved and checked; the authors' published values."""

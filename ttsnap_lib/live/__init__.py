"""The live search: one prompt, one budget, one best image."""

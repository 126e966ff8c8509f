"""One module for each command of the command line; heavy imports stay inside the functions they serve."""

MODULES = ("demo", "run", "optimize", "search", "generate", "score", "finetune", "published")
"""In the order in which `ttsnap --help` shows them."""

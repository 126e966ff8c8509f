"""The command line, a module for each group of commands; heavy imports stay inside the functions they serve."""

MODULES = ("notebooks", "optimize", "search", "models", "finetune")
"""In the order in which `ttsnap --help` shows them."""

"""The command line, a module for each group of commands; heavy imports stay inside the functions they serve."""

COMMANDS = {
    "notebooks": ("demo", "run", "sweep", "report"),
    "optimize": ("optimize", "compare"),
    "search": ("search", "cost"),
    "models": ("generate", "verify", "score", "import", "import-published", "import-trajectories", "export"),
    "finetune": ("finetune", "import-checkpoints"),
}
"""The commands of each module, in the order in which `ttsnap --help` shows the modules."""

"""The command line, a module for commands that share much; heavy imports stay inside the functions they serve."""

COMMANDS = {
    "notebooks": ("demo", "run", "sweep", "report"),
    "runs": ("runs",),
    "interactive": ("explore", "lab"),
    "optimize": ("optimize", "compare"),
    "search": ("search", "cost"),
    "models": ("generate", "verify", "score", "import", "import-published", "import-trajectories", "export"),
    "finetune": ("finetune", "import-checkpoints"),
}
"""The commands of each module."""

GROUPS = {
    "Try": ("demo", "explore", "search", "lab"),
    "Plan": ("run", "optimize", "compare", "cost", "sweep", "report", "runs"),
    "Make": ("generate", "score", "finetune"),
    "Files": ("verify", "import", "import-published", "import-trajectories", "import-checkpoints", "export"),
}
"""How `ttsnap --help` shows the commands."""

EXAMPLES = {
    "demo": "ttsnap demo",
    "explore": "ttsnap explore -p tensor pocket-sdxl",
    "search": 'ttsnap search "a small red ring on a white background" --adapters pocket --candidates 8 --out best',
    "lab": "ttsnap lab",
    "run": "ttsnap run simulate -p tensor pocket-sdxl",
    "optimize": "ttsnap optimize pocket-flux --budgets 2:10 --trials 300 --out schedule.yaml",
    "compare": "ttsnap compare a.yaml b.yaml --tensor pocket-flux",
    "cost": "ttsnap cost --model pocket-flux --reward pocket-clip --out cost.json",
    "sweep": "ttsnap sweep grid.yaml --workers 2",
    "report": "ttsnap report data_cache/sweeps/grid",
    "runs": "ttsnap runs list",
    "generate": "ttsnap generate --model pocket-sdxl --prompts pocket:evaluation:2 --images 8 --out trajectories",
    "score": "ttsnap score trajectories --reward pocket-clip --out rewards.zarr",
    "finetune": "ttsnap finetune --config pocket-sdxl --out naft",
    "verify": "ttsnap verify trajectories --repair",
    "import": "ttsnap import scores.npy --reward mine --out mine.zarr",
    "import-published": "ttsnap import-published values --model flux --prompts validation.json --out flux.zarr",
    "import-trajectories": "ttsnap import-trajectories pictures --model black-forest-labs/FLUX.1-dev --prompts train.json",
    "import-checkpoints": "ttsnap import-checkpoints checkpoints --reward image_reward --out naft",
    "export": "ttsnap export rewards.zarr --out values",
}
"""An example for the help of each command."""

"""Training on Lightning: `attnres-train` (see `train/cli/commands.py`)."""

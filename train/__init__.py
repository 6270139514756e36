"""Training on Lightning: `attnres-train` (see `train/cli/fit.py`)."""

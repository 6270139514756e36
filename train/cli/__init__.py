"""The command line of training: arguments in, a run directory or a table out."""

from train.cli.fit import main

__all__ = ["main"]

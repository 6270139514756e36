"""The command line of training: a command and its options in, a run directory or a table out."""

from train.cli.commands import main

__all__ = ["main"]

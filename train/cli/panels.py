"""`attnres-train panels`: lay out a W&B workspace for runs of attnres.

    attnres-train panels ENTITY/PROJECT
    attnres-train panels --dry_run          # the layout as a table; needs no account

W&B's package for workspaces is an extra: pip install 'attnres[wandb]'.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import wandb

from probe.command_line import OneLineParser, UsageError
from train.loggers.wandb_panels import PACKAGE, build_workspace, layout_table


def panels(args: Sequence[str]) -> int:
    parser = OneLineParser(prog="attnres-train panels", description="Lay out a W&B workspace for runs of attnres.")
    parser.add_argument("project", nargs="?", metavar="ENTITY/PROJECT", help="where the workspace is made")
    parser.add_argument("--dry_run", action="store_true", help="print the layout and make nothing")
    arguments = parser.parse_args(args)
    if arguments.dry_run:
        print(layout_table())
        return 0
    entity, _, project = (arguments.project or "").partition("/")
    if not entity or not project or "/" in project:
        raise UsageError(f"the project is to be given as ENTITY/PROJECT, got '{arguments.project or ''}'")
    if find_spec(PACKAGE) is None:
        raise UsageError("W&B's package for workspaces is not installed: pip install 'attnres[wandb]'")
    if not wandb.api.api_key:
        raise UsageError("a workspace is made in a W&B account: run `wandb login` first")
    try:
        print(build_workspace(entity, project).save().url)
    except (wandb.Error, OSError, ValueError) as error:
        raise UsageError(f"W&B has not made the workspace: {error}") from None
    return 0

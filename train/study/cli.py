"""`attnres-train study`: several conditions and seeds, one after another, and one table.

    attnres-train study --config configs/study.yaml --dir runs/study

The same command goes on where it was stopped: finished runs are left as they are, a run that was killed goes on from
its last checkpoint, a failed one is tried again. Several such commands may work in one folder and share the runs.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import yaml

from probe.command_line import OneLineParser, UsageError
from train.study import runs as study_runs
from train.study import table as study_table
from train.study.description import Study, StudyRun, load_study, sweep
from train.study.identity import check_directory, claim_directory


def study(args: Sequence[str]) -> int:
    """The command: returns 1 if a run failed. Raises UsageError for bad input."""
    arguments = build_parser().parse_args(args)
    try:
        description = load_study(arguments.config)
        if arguments.sweep:
            print(yaml.safe_dump(sweep(description), sort_keys=False), end="")
            return 0
        chosen = _choose(description, arguments)
        if arguments.dry_run:
            for command in [command for run in chosen for command in study_runs.all_commands(run)]:
                print(shlex.join(command))
            return 0
        if arguments.table:
            check_directory(description, arguments.dir)
        else:
            for name in ("attnres-train", "attnres-probe"):
                study_runs.program(name)
            claim_directory(description, arguments.dir)
    except ValueError as error:  # of YAML's reader, too
        raise UsageError(str(error)) from None
    failed = {} if arguments.table else _run_all(chosen)
    _report(description, arguments.dir, failed)
    return 1 if failed else 0


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog="attnres-train study",
        description="Train and probe every condition of a study with every seed, one run after another, each as by "
        "attnres-train fit and attnres-probe, and collect one table. The same command goes on where it was stopped. "
        "Several may share a folder. Exit status: 1 if a run failed.",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="the study; see configs/study.yaml")
    parser.add_argument(
        "--dir", type=Path, help="folder for the runs, study.parquet, study_seeds.parquet and both .csv"
    )
    parser.add_argument("--condition", nargs="+", metavar="NAME", help="only these conditions (default: all)")
    parser.add_argument("--seed", nargs="+", type=int, metavar="N", help="only these seeds (default: all)")
    parser.add_argument("--table", action="store_true", help="run nothing, collect the table of what there is")
    parser.add_argument("--dry_run", action="store_true", help="run nothing, print the commands that are left to run")
    parser.add_argument("--sweep", action="store_true", help="run nothing, print the study as a W&B sweep file")
    return parser


def _choose(study: Study, arguments: argparse.Namespace) -> list[StudyRun]:
    if arguments.dir is None:
        raise ValueError("--dir is required: give the folder of the study, e.g. --dir runs/study")
    conditions, seeds = arguments.condition or study.options, arguments.seed or study.seeds
    for option, wanted, known in (("condition", conditions, study.options), ("seed", seeds, study.seeds)):
        if absent := [item for item in wanted if item not in known]:
            raise ValueError(f"--{option} {absent[0]} is not in '{study.file}', which has {', '.join(map(str, known))}")
    return [run for run in study.runs(arguments.dir) if run.condition in conditions and run.seed in seeds]


def _run_all(runs: Sequence[StudyRun]) -> dict[str, str]:
    """The failures, by run. A signal stops the run in progress and then the study."""
    failed = {}
    for number, run in enumerate(runs, start=1):
        label = f"[{number}/{len(runs)}] {run.name}"
        found = study_runs.run_all(run, label)
        print(f"{label}: {found}", flush=True)
        if found not in (study_runs.FINISHED, study_runs.BUSY):
            failed[run.name] = found
    return failed


def _report(study: Study, directory: Path, failed: dict[str, str]) -> None:
    """Write and print the tables of the whole study, whichever part of it was run."""
    runs = list(study.runs(directory))
    rows = study_table.runs_table(runs, {run.name: failed.get(run.name) or study_runs.status(run) for run in runs})
    seeds = study_table.over_seeds(rows)
    written = study_table.write_tables(directory, rows, seeds)
    print(f"\n{study_table.format_runs(rows)}\n\n{study_table.format_seeds(rows, seeds)}\n\nwritten:")
    print("\n".join(f"  {path}" for path in written))

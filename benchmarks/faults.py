"""Faults of every kind in every command: what came of them (docs/faults.md).

    OMP_NUM_THREADS=1 python -m benchmarks.faults --output benchmarks/results/faults.json      # make test-faults

Exit status 1 if anything was lost, altered, silent or left over. What was wrong, and its folder, is printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import add
from tests.faults.suite import NAMES, outcomes, table, tally
from tests.faults.trial import Bench


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="the record (JSON); its other kinds stay")
    parser.add_argument("--kinds", nargs="+", choices=NAMES, default=NAMES, metavar="KIND", help=", ".join(NAMES))
    parser.add_argument("--count", type=int, default=-1, help="faults of each kind and command; default: the long run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    bench, all_counts = Bench(folder), {}
    try:
        for name in args.kinds:
            if name == "a small file system" and os.geteuid() != 0:
                print(f"{name}: left out, mounting needs the rights of root", flush=True)
                continue
            started, found = time.monotonic(), []
            for outcome in outcomes(bench, name, args.seed, args.count):
                found.append(outcome)
                fault = outcome.fault
                print(f"{name} | {fault.command} | {fault.what} | {outcome.status} | {outcome.line[:120]}", flush=True)
                for what in outcome.wrong:
                    print(f"    WRONG {what[:500]} ({folder})", flush=True)
                if args.output is not None:  # after each: a run that is stopped has recorded what it has done
                    add(args.output, name, tally(found), time.monotonic() - started, seed=args.seed)
            all_counts |= tally(found)
    finally:
        bench.close()
    print(table(all_counts))
    return int(any(row["wrong"] for row in all_counts.values()))


if __name__ == "__main__":
    sys.exit(main())

"""How many hostile inputs of each kind were taken, refused, and neither: a traceback, a hang, a wrong answer.

    .venv/bin/python -m benchmarks.fuzz --output benchmarks/results/fuzz.json
    .venv/bin/python -m benchmarks.fuzz --kinds tables,studies --seed 1 --scale 0.1

The kinds, and what must hold of each input, are in tests/fuzz. An input that breaks it is printed whole.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis.errors import HypothesisWarning

from attnres.versions import code_version
from benchmarks import record
from tests.fuzz.kind import Kind
from tests.fuzz.kinds import KINDS
from tests.fuzz.run import fuzz
from tests.fuzz.world import World

CHUNK = 1000
"""Inputs of one seed: hypothesis holds all of them in memory."""
ROW = "{:<28} {:>8} {:>9} {:>8} {:>7}"


def draw(world: World, kind: Kind, count: int, seed: int) -> Counter[str]:
    """What became of `count` inputs, at least, of a kind."""
    found: Counter[str] = Counter(accepted=0, refused=0, broken=0)
    for number in range(2 * -(-count // CHUNK)):  # hypothesis draws none twice, and may stop early
        left = count - found.total()
        if left <= 0:
            break
        try:
            found += fuzz(world, kind, min(left, CHUNK), 1000 * seed + number)
        except Exception as error:
            found["broken"] += 1
            print(f"{kind.name}, seed {1000 * seed + number}: {error}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--kinds", help="only kinds with one of these, separated by commas, in their names")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of inputs")
    arguments = parser.parse_args()
    warnings.simplefilter("error")  # as in the tests: a warning is more than one line
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")
    warnings.simplefilter("ignore", HypothesisWarning)
    print(ROW.format("kind", "inputs", "accepted", "refused", "broken"))
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        wanted = arguments.kinds.split(",") if arguments.kinds else [""]
        for kind in (kind for kind in KINDS if any(name in kind.name for name in wanted)):
            started = time.perf_counter()
            found = draw(world, kind, round(kind.recorded * arguments.scale), arguments.seed)
            total += found
            print(ROW.format(kind.name, found.total(), *(found[name] for name in ("accepted", "refused", "broken"))))
            results = {"inputs": found.total()} | {name: found[name] for name in ("accepted", "refused", "broken")}
            seconds = time.perf_counter() - started
            settings = {"seed": arguments.seed, "hypothesis": hypothesis.__version__, "code": code_version()["commit"]}
            if arguments.output is not None:
                record.add(arguments.output, kind.name, results, seconds, **settings)
    print(ROW.format("all", total.total(), *(total[name] for name in ("accepted", "refused", "broken"))))


if __name__ == "__main__":
    main()

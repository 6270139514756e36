"""Which reads the answers of `Hops` rest on, by number of hops: masks, keep-only, and a trace of each fact on the way.

    attnres-train study --config configs/hops_study.yaml --dir runs/hops
    python -m benchmarks.hops runs/hops/*-seed? --output benchmarks/results/hops.json

Of every number k of hops, on the split probe:

1. accuracy, and of models with depth routing the strength of masking and of keeping each family at each read;
2. for each fact j of the k on the way to the answer: the fact's value is changed, and a trace says at which places
   and layers the answer comes back, where a single activation is restored.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from attnres import AttnResForCausalLM
from attnres.tasks import Hops
from attnres.tasks.hops import HopsBatch
from benchmarks.record import add
from probe import ProbeSettings, measure
from probe.analysis.inference import Inference
from probe.examples.flip import recall_accuracy
from probe.examples.tasks import TokenTask
from probe.files.checkpoints import load_model
from probe.trace import Flips, trace
from probe.trace.sites import OUTPUT, SOURCE, STREAM
from probe.vocabulary import FINAL, MARGIN, layer_scope

SEQUENCES, SEED = 64, 0
SHOWN = 0.01
"""The least strength, either way, that is recorded; of keeping alone, all are."""
KINDS = ("mask_renormalise", "keep_only")
MASKS = ["sublayer", "scope", "family", "kind", "mass", "strength", "strength_low", "strength_high"]
SITES = ["direction", "site", "read", "layer", "sublayer", "source", "family", "position"]


def on_the_way(batch: HopsBatch, changed: Tensor) -> Tensor:
    """(batch, queries) which fact on the way of each query is the `changed` one, (batch,): 1 for the first; 0: none."""
    fact_of = batch.keys.argsort(1)  # entities of a context are all of its keys
    ordered = batch.keys.sort(1).values
    at, found = batch.asked, torch.zeros_like(batch.asked)
    for hop in range(int(batch.hops.max())):
        fact = fact_of.gather(1, torch.searchsorted(ordered, at.contiguous()))
        is_it = (fact == changed[:, None]) & (hop < batch.hops) & (found == 0)
        found = torch.where(is_it, hop + 1, found)
        at = batch.values.gather(1, fact)
    return found


def flips_of(task: Hops, hops: int, fact: int) -> tuple[Flips, dict[str, Tensor]]:
    """Contexts in which the value of the `fact`-th fact on the way of a query of so many `hops` is another, which gives
    another answer, and the places: the value, all other facts, all queries before the one that is looked at, and it."""
    batch: HopsBatch = task.batch("probe", range(SEQUENCES))
    rng, chosen = np.random.default_rng(SEED), {}
    for flip in task.flips(batch, SEED):
        changed: Any = flip.changed
        differs = changed.answers != batch.answers
        way = on_the_way(batch, (changed.values != batch.values).long().argmax(1))
        for row in range(len(batch)):
            fits = (differs & (way == fact) & (batch.hops == hops))[row].nonzero().flatten().tolist()
            if fits and row not in chosen:
                chosen[row] = (changed.input_ids[row], changed.answers[row], int(rng.choice(fits)))
    rows = torch.tensor(sorted(chosen))
    ids, answers, query = zip(*(chosen[row] for row in rows.tolist()), strict=True)
    query = torch.tensor(query)
    position = batch.query_positions[query]
    corrupted = torch.stack(ids)
    flipped = torch.stack(answers).gather(1, query[:, None])[:, 0]
    flips = Flips(batch.input_ids[rows], corrupted, position, batch.answers[rows, query], flipped)
    where, value = torch.arange(corrupted.shape[1]), flips.differs.long().argmax(1)
    facts = where < 2 * task.num_facts
    return flips, {
        "value": value,
        "other facts": facts & (where != value[:, None]),
        "other queries": ~facts & (where < position[:, None] - 1),
        "query": (where == position[:, None]) | (where == position[:, None] - 1),
    }


def masks(model: AttnResForCausalLM, task: Hops, group: str) -> dict[str, Any]:
    """Necessity and sufficiency of each family at each read, and the accuracy that they are measured at."""
    scopes = [layer_scope(layer) for layer in range(model.config.num_hidden_layers)]
    scopes += [FINAL] if model.model.sites[-1].sublayer == FINAL else []
    settings = ProbeSettings(
        kinds=KINDS,
        sublayers=("self_attn", "mlp"),
        scopes=tuple(scopes),
        positions=("all",),
        seed=SEED,
        num_resamples=1000,
    )
    effects = measure(model, TokenTask(task, group).examples(SEQUENCES), settings).effects
    rows = effects[(effects["metric"] == MARGIN) & effects["applicable"]]
    shown = rows[(rows["kind"] == "keep_only") | (rows["strength"].abs() >= SHOWN)]
    return {"margin": float(rows["margin"].iloc[0]), "masks": _records(shown, [*MASKS, "p_matters"])}


def traced(model: Any, task: Hops, hops: int, fact: int) -> dict[str, Any]:
    """Shares of the answer that come back, and are lost, at each site and place, where one fact is changed."""
    flips, places = flips_of(task, hops, fact)
    kinds = [STREAM, OUTPUT, SOURCE] if isinstance(model, AttnResForCausalLM) else [STREAM, OUTPUT]
    found = trace(model, flips, kinds, positions=places)
    table = found.table(Inference(num_resamples=1000, seed=SEED))
    clean, corrupted = (float(margin.mean()) for margin in (found.clean, found.corrupted))
    columns = [*SITES, "strength", "strength_low", "strength_high", "p_adjusted"]
    shown = table[table["strength"].abs() >= SHOWN]
    about = {"hops": hops, "fact": fact, "sequences": len(flips), "clean": clean, "corrupted": corrupted}
    return about | {"rows": _records(shown, columns)}


def _records(rows: pd.DataFrame, columns: list[str]) -> list[dict[str, Any]]:
    return [
        {str(name): round(x, 4) if isinstance(x, float) else x for name, x in row.items() if x == x}
        for row in rows[columns].to_dict("records")
    ]


def studied(run: Path) -> dict[str, Any]:
    """Of one run."""
    found = load_model(str(run))
    model, task = found.model, found.task
    if not isinstance(task, Hops):
        raise SystemExit(f"{run} was not trained on hops")
    by_hops = []
    for group, hops in zip(task.groups, range(task.min_hops, task.max_hops + 1), strict=True):
        about: dict[str, Any] = {"hops": hops}
        about["accuracy"] = recall_accuracy(model, TokenTask(task, group).examples(SEQUENCES))
        if isinstance(model, AttnResForCausalLM):
            about |= masks(model, task, group)
        by_hops.append(about | {"facts": [traced(model, task, hops, fact) for fact in range(1, hops + 1)]})
        print(f"{run.name}, {group}: done", flush=True)
    layers = model.config.num_hidden_layers
    about = {"run": run.name, "condition": found.condition, "seed": found.seed, "step": found.step, "layers": layers}
    return about | {"by_hops": by_hops}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="the record (JSON), a part for each run; parts of others stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for run in args.runs:
        started = time.monotonic()
        add(args.output, run.name, studied(run), time.monotonic() - started, sequences=SEQUENCES, seed=SEED)


if __name__ == "__main__":
    main()

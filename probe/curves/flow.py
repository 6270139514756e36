"""Curves of flow: how much of an answer comes back through single sites of the model, by causal trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch

from attnres import AttnResForCausalLM
from attnres.tasks import Task
from probe.analysis import stats
from probe.analysis.curves import Quantity
from probe.analysis.flips import ALL
from probe.analysis.inference import Inference
from probe.curves.kind import VALUES, Contexts, CurveKind
from probe.trace import Flips, TraceResult, plan, trace
from probe.trace.of_tasks import flips_of_task
from probe.trace.sites import DENOISE, OUTPUT, SOURCE, STREAM
from probe.vocabulary import FAMILY_TITLES, FINAL, SUBLAYER_TITLES

FEWEST = 8
"""Contexts of a group without which it has no curve of its own."""
GAP, MLP, FINAL_NORM = "gap", "mlp", "final norm"
SITES = {
    "stream_value": (STREAM, "value"),
    "stream_query": (STREAM, "query"),
    "attention_query": (OUTPUT, "query"),
    "source_query": (SOURCE, "query"),
}
"""Quantity -> kind of site, and where in the sequence it is patched."""


class Trace(CurveKind):
    """The trace: the share of the answer that comes back where a site of the clean run is put into the corrupted one.

    What `attnres-probe trace` says of a checkpoint, of the running stream before attention and before the final norm,
    of the outputs of attention, and of single sources of depth. Where the gap between the two runs is not clear of
    zero, there are no shares of it yet.
    """

    name: ClassVar[str] = "trace"
    title: ClassVar[str] = "trace"
    quantities: ClassVar[Mapping[str, Quantity]] = {
        GAP: Quantity("margin moved by the change", threshold=0.0, unit="nats", by_value=False),
        "stream_value": Quantity("stream at value, before"),
        "stream_query": Quantity("stream at query, before"),
        "attention_query": Quantity("attention at query, of"),
        "source_query": Quantity("source at query, of"),
    }

    def check(self, task: Task) -> None:
        if not task.num_flips:
            raise ValueError("a trace needs a value that is not in the context, and this task has none left")

    def forward_passes(self, model: Any, contexts: Contexts) -> float:
        flips, jobs = _jobs(model, contexts)
        return sum(plan(model, flips, *job).forward_passes for job in jobs)

    def measure(self, model: Any, contexts: Contexts) -> pd.DataFrame:
        flips, jobs = _jobs(model, contexts)
        found, sites, tables = [trace(model, flips, *job) for job in jobs], _sites(model), []
        for group, rows in _groups(contexts, flips):
            parts = [_taken(result, rows) for result in found]
            own = [_gap(parts[0], contexts.how), *(_shares(part, sites, contexts.how) for part in parts)]
            tables += [table.assign(group=group) for table in own]
        return pd.concat(tables, ignore_index=True)[VALUES]


def _sites(model: Any) -> dict[str, tuple[str, str]]:
    """Those of `SITES` that the model has."""
    routed = isinstance(model, AttnResForCausalLM)
    return {name: site for name, site in SITES.items() if routed or site[0] != SOURCE}


def _jobs(model: Any, contexts: Contexts) -> tuple[Flips, list[tuple[list[str], list[str], dict[str, Any]]]]:
    """What to trace: kinds of sites, direction and place of each trace. No site is patched where it is not shown."""
    flips, places = flips_of_task(contexts.task, contexts.count, contexts.how.seed)
    kinds = {at: [kind for kind, where in _sites(model).values() if where == at] for at in ("value", "query")}
    return flips, [(chosen, [DENOISE], {at: places[at]}) for at, chosen in kinds.items()]


def _groups(contexts: Contexts, flips: Flips) -> Iterator[tuple[str, np.ndarray]]:
    """All contexts, and those whose query is of a group that is told apart: their numbers."""
    yield ALL, np.arange(len(flips))
    batch = contexts.batch.to("cpu")
    query = (batch.query_positions == flips.position[:, None]).long().argmax(1)
    names = np.array(contexts.task.groups)[batch.groups[torch.arange(len(flips)), query].numpy()]
    for group in contexts.groups:
        if len(rows := (names == group).nonzero()[0]) >= FEWEST:
            yield group, rows


def _taken(found: TraceResult, rows: np.ndarray) -> TraceResult:
    """The result of these contexts alone."""
    of_contexts = ("clean_logits", "corrupted_logits", "logit_sizes")
    taken = {name: getattr(found, name)[rows] for name in of_contexts}
    return replace(found, logits=found.logits[:, :, :, rows], clusters=np.arange(len(rows)), **taken)


def _gap(found: TraceResult, how: Inference) -> pd.DataFrame:
    """The gap between the clean and the corrupted margin, in nats."""
    gap = (found.clean - found.corrupted)[:, None]
    bootstrap = stats.bootstrap_t(gap, np.ones(len(gap)), *how.resampling)
    (low,), (high,) = bootstrap.interval()
    about = {"quantity": GAP, "place": "", "value": float(gap.mean()), "low": low, "high": high}
    return pd.DataFrame([about | {"n_queries": len(gap), "n_sequences": len(gap)}])


def _shares(found: TraceResult, sites: dict[str, tuple[str, str]], how: Inference) -> pd.DataFrame:
    """The shares of the gap that come back."""
    table = found.table(how)
    table = table[(table["site"] == SOURCE) | (table["sublayer"] != MLP)]
    names = {site: name for name, site in sites.items()}
    quantity = [names[site] for site in table[["site", "position"]].itertuples(index=False, name=None)]
    columns = {"value": "strength", "low": "strength_low", "high": "strength_high"}
    shown = {name: table[column] for name, column in columns.items()}
    places = [_place(row) for row in table.to_dict("records")]
    counts = {name: len(found.clusters) for name in ("n_queries", "n_sequences")}
    return table.assign(quantity=quantity, place=places, **shown, **counts)


def _place(row: dict[Any, Any]) -> str:
    if row["site"] != SOURCE:
        return FINAL_NORM if row["sublayer"] == FINAL else f"layer {row['layer']:.0f}"
    layer = "" if row["sublayer"] == FINAL else f"layer {row['layer']:.0f} "
    read = f"{layer}{SUBLAYER_TITLES[row['sublayer']]}"
    return f"{read}, {FAMILY_TITLES[row['family']]} ({row['source']:.0f})"

"""The tables of docs/hops.md, made of the recorded study (`benchmarks.hops`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.motif_tables import line

RECORD = Path(__file__).parent / "results" / "hops.json"
MODELS = ("vanilla", "cumulative", "block_sum", "frozen")
CARRIES, LOOKUP = 0.05, 0.1
"""Shares of the answer: from which an attention, or a source, counts, and from which it is named in a table."""


def runs() -> list[dict[str, Any]]:
    """By model and seed."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = [part["results"] for part in record.values()]
    return sorted(rows, key=lambda row: (MODELS.index(row["condition"]), row["seed"]))


def facts(run: dict[str, Any]) -> Iterator[tuple[int, int, pd.DataFrame]]:
    """Hops, fact on the way, and what comes back at each site."""
    for part in run["by_hops"]:
        for fact in part["facts"]:
            rows = pd.DataFrame(fact["rows"]).reindex(columns=[*fact["rows"][0], "source", "family", "layer"]).T
            rows = rows[~rows.index.duplicated()].T.infer_objects()
            yield part["hops"], fact["fact"], rows[rows["direction"] == "denoise"]


def writes_answer(rows: pd.DataFrame) -> pd.DataFrame:
    """Attention outputs at the query, in the order of layers."""
    at_query = (rows["site"] == "output") & (rows["sublayer"] == "self_attn") & (rows["position"] == "query")
    return rows[at_query].sort_values("layer")


def lookups() -> list[str]:
    """By model, hops and fact: the layers whose attention brings the fact to the query."""
    found = []
    for run in runs():
        cells = {}
        for hops, fact, rows in facts(run):
            named = writes_answer(rows).query("strength >= @LOOKUP")
            cells[hops, fact] = ", ".join(
                f"{int(row.layer)} ({row.strength:.0%})".replace("%", " %") for row in named.itertuples()
            )
        for hops in sorted({hops for hops, _ in cells}):
            accuracy = next(part["accuracy"] for part in run["by_hops"] if part["hops"] == hops)
            ways = [cells.get((hops, fact)) for fact in (1, 2, 3)]
            shown = ("" if way is None else way or "none" for way in ways)
            found.append(line(run["condition"], str(run["seed"]), str(hops), f"{accuracy:.3f}", *shown))
    return found


def reads() -> list[str]:
    """By model and hops: reads that matter by masks and by keep-only, and attentions that carry by the trace."""
    found = []
    for run in runs():
        carry: dict[int, set[int]] = {}
        for hops, _, rows in facts(run):
            at = writes_answer(rows).query("strength >= @CARRIES")["layer"]
            carry.setdefault(hops, set()).update(int(layer) for layer in at)
        for part in run["by_hops"]:
            by_masks: tuple[str, ...] = ("—",) * 4
            if "masks" in part:
                by_masks = tuple(_by_masks(pd.DataFrame(part["masks"])))
            layers = sorted(carry[part["hops"]])
            traced = f"{len(layers)}: {', '.join(map(str, layers))}"
            found.append(line(run["condition"], str(run["seed"]), str(part["hops"]), *by_masks, traced))
    return found


def _by_masks(rows: pd.DataFrame) -> Iterator[str]:
    """Numbers of reads of attention, of MLPs and of the final norm that a mask harms, and of those that no family by
    itself is enough for."""
    masked = rows[(rows["kind"] == "mask_renormalise") & (rows["p_matters"] < 0.05) & (rows["strength"] > 0)]
    for sublayer in ("self_attn", "mlp", "final"):
        scopes = masked[masked["sublayer"] == sublayer]["scope"].unique()
        layers = sorted(scope.removeprefix("layer:") for scope in scopes)
        if sublayer == "final":
            yield "yes" if layers else "—"
        else:
            yield f"{len(layers)}: {', '.join(layers)}" if layers else "0"
    kept = rows[rows["kind"] == "keep_only"]
    least = kept.groupby(["sublayer", "scope"])["strength_high"].min()
    short = [(sublayer, scope.removeprefix("layer:")) for (sublayer, scope), high in least.items() if high >= CARRIES]
    names = [
        scope if scope == sublayer else f"{'attention' if sublayer == 'self_attn' else sublayer} {scope}"
        for sublayer, scope in short
    ]
    yield ", ".join(names) or "none"


def routes() -> list[str]:
    """By model with depth routing, hops and fact: the sources of depth that carry the answer, in the order of reads."""
    found = []
    for run in runs():
        for hops, fact, rows in facts(run):
            named = rows[(rows["site"] == "source") & (rows["strength"] >= 0.3)].sort_values("read")
            if run["condition"] == "vanilla":
                continue
            way = [_route(row) for row in named.to_dict("records")]
            found.append(line(run["condition"], str(run["seed"]), str(hops), str(fact), "; ".join(way) or "none alone"))
    return found


def _route(row: dict[str, Any]) -> str:
    read = {"self_attn": "attention", "mlp": "MLP", "final": "final read"}[row["sublayer"]]
    place = read if row["sublayer"] == "final" else f"{read} {int(row['layer'])}"
    return f"{place} of {row['family']} {int(row['source'])} at the {row['position']} ({100 * row['strength']:.0f} %)"


HOPS_TABLES = (lookups, routes, reads)

"""What strengths are found where a mechanism was planted, and where there is none: what tau and epsilon rest on.

    OMP_NUM_THREADS=1 python -m benchmarks.thresholds --output benchmarks/results/thresholds.json

No trained model is looked at. *Planted* (tests/support/planted.py): weights set by hand, so that some routes are needed
and all others are not; as they are, and with noise on every weight ("dirt"), as much as leaves the task solved: then no
route is quite without effect. *Untrained*: random weights, random pseudo-queries or the recency schedule alone. Each
is probed as `attnres-probe run` does: mask and renormalise, regions and the whole depth, all positions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.sites import REGIONS, SUBLAYERS
from attnres.tasks import MQAR
from benchmarks.record import add
from probe.ablation.engine import Engine
from probe.ablation.grid import Kind, build_grid
from probe.ablation.interventions import MaskRenormalise
from probe.analysis import effects
from probe.analysis.inference import Inference
from probe.analysis.motifs import Reader
from probe.examples.examples import Examples
from probe.vocabulary import LEVEL, by_region, primary_rows
from tests.support import planted

SOLVERS: dict[str, Callable[[], planted.Planted]] = {
    "embedding_to_early_mlp": planted.embedding_to_early_mlp,
    "older_to_late_attention": planted.older_to_late_attention,
    "mass_without_role": planted.mass_without_role,
    "redundant_pair": planted.redundant_pair,
}
DIRT = (0.0, 0.001)
"""Standard deviation of what is added to every weight; those that are not zero are of the order of one."""


def soil(model: AttnResForCausalLM, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def untrained(source: str, queries: float, seed: int) -> planted.Planted:
    """Random weights of standard deviation 0.05; pseudo-queries of `queries`, or none and a recency bias of 3."""
    shape: dict[str, Any] = {"vocab_size": 40, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.05}
    torch.manual_seed(seed)
    bias = 0.0 if queries else 3.0
    config = AttnResConfig(
        **shape, attnres_source=source, attnres_num_blocks=3, attnres_recency_bias_init=bias, max_position_embeddings=64
    )
    model = AttnResForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "res_proj" in name:
            parameter.copy_(queries * torch.randn(parameter.shape))
    return planted.Planted(model, frozenset(), MQAR(num_pairs=8, vocab_size=40, seed=seed))


def models() -> Iterator[tuple[str, float, int, planted.Planted]]:
    """(name, dirt, seed, model) of all that is probed."""
    for name, build in SOLVERS.items():
        for size in DIRT:
            for seed in range(2 if size else 1):
                found = build()
                soil(found.model, size, seed)
                yield name, size, seed, found
    for seed in range(4):
        yield "zero_mean", 0.0, seed, planted.zero_mean(seed)
    for source in ("cumulative", "block_sum"):
        for what, queries in (("random queries", 0.5), ("no queries", 0.0)):
            for seed in range(2):
                yield f"untrained, {source}, {what}", 0.0, seed, untrained(source, queries, seed)


def probe(found: planted.Planted, num_sequences: int, how: Inference) -> tuple[Reader, float]:
    """The primary rows, and clean accuracy."""
    cells = build_grid(found.model.model.sites, Kind(MaskRenormalise), sublayers=SUBLAYERS, scopes=(*REGIONS, "all"))
    examples = Examples.from_batch(found.task.batch("probe", range(num_sequences)))
    result = Engine(found.model, cells, ("all",)).run(examples)
    source = found.model.config.attnres_source
    info = effects.RunInfo(
        "planted", source, 0, 0, "data", found.task.num_pairs, floor=effects.rounding_floor(result, torch.float32)
    )
    return Reader(*effects.build_tables(result, info, how), how), effects.clean_means(result)["accuracy"]


def describe(name: str, dirt: float, seed: int, found: planted.Planted, args: argparse.Namespace) -> dict[str, Any]:
    how = Inference()
    reader, accuracy = probe(found, args.num_sequences, how)
    rows = by_region(primary_rows(reader.effects))
    rows = rows[rows["applicable"]]
    sites = pd.MultiIndex.from_frame(rows[["family", "sublayer", "scope"]])
    is_planted = np.array([site in found.sites for site in sites], dtype=bool)
    others, motifs = rows[~is_planted], reader.motifs()
    row = {"model": name, "dirt": dirt, "seed": seed, "accuracy": accuracy, "margin": float(rows["margin"].iloc[0])}
    row |= {"no_strength": str(rows["no_strength"].iloc[0]), "planted_sites": int(is_planted.sum())}
    row["motifs_are_the_planted_sites"] = {(m["family"], m["sublayer"], m["scope"]) for m in motifs} == found.sites
    row |= {"other_sites": len(others), "others_of_rounding": int(others["below_floor"].sum())}
    row["others_significant"] = int((others["p_adjusted"] <= LEVEL).sum())
    if not row["no_strength"]:
        row["planted_strengths"] = rows.loc[is_planted, "strength"].tolist()
        row["other_strengths"] = others["strength"].tolist()
        row["others_equivalent_to_zero"] = int((others["p_equivalent"] <= LEVEL).sum())
        row["largest_detectable"] = float(others["detectable"].max())
    return row


def _line(row: dict[str, Any]) -> str:
    text = f"{row['model']}, dirt {row['dirt']}, seed {row['seed']}: accuracy {row['accuracy']:.3f}"
    text += f", margin {row['margin']:.2f}, motifs {'as planted' if row['motifs_are_the_planted_sites'] else 'WRONG'}"
    if row["no_strength"]:
        return f"{text}; no strength: {row['no_strength']}"
    planted_at = ", ".join(f"{strength:.1%}" for strength in row["planted_strengths"])
    others = row["other_strengths"]
    return f"{text}; planted {planted_at or 'nowhere'}; elsewhere {min(others):.1%} to {max(others):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_sequences", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    started, rows = time.perf_counter(), []
    for case in models():
        rows.append(describe(*case, args))
        print(_line(rows[-1]), flush=True)
    settings = {"num_sequences": args.num_sequences, "torch": torch.__version__}
    add(args.output, "strengths", rows, time.perf_counter() - started, **settings)


if __name__ == "__main__":
    main()

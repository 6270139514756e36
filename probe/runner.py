"""One probe of one model: examples, sweep, flip test, tables and summary. Callback and command line both call this."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attnres import FAMILIES, AttnResForCausalLM
from attnres.tasks import MQAR, RecallBatch
from probe import results
from probe.engine import Engine, ProbeResult
from probe.families import ALL_SUBLAYERS, POSITIONS, Cell, build_grid, check_names
from probe.flip import flip_test
from probe.interventions import MIN_REMAINING, MaskRenormalise
from probe.motifs import dissociation, motifs
from probe.results import RunInfo


@dataclass(frozen=True)
class ProbeSettings:
    """What to ablate, and on how much data.

    Args:
        num_sequences: sequences of the `probe` split, at the task's full K; each is one cluster.
        families, sublayers, scopes: the grid; scopes `None` means thirds, all, every layer and the final read.
        positions: "all" (primary) and / or "query".
        with_aliases: families alone (False) and / or with the sources that are the same tensor (True).
        batch_size: sequences per forward pass.
        num_resamples: bootstrap resamples and sign flips.
        seed: of the resamples and flips, and of the flip test's changes.

    Raises:
        ValueError: a name that does not exist, or a number that is not positive.
    """

    num_sequences: int = 256
    families: Sequence[str] = FAMILIES
    sublayers: Sequence[str] = ALL_SUBLAYERS
    scopes: Sequence[str] | None = None
    positions: Sequence[str] = POSITIONS
    with_aliases: Sequence[bool] = (False,)
    batch_size: int = 64
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("family", self.families, FAMILIES)
        check_names("sublayer", self.sublayers, ALL_SUBLAYERS)
        check_names("positions", self.positions, POSITIONS)
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for name in ("num_sequences", "batch_size", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not (self.families and self.sublayers and self.positions and self.with_aliases):
            raise ValueError("families, sublayers, positions and with_aliases must each name at least one")

    def grid(self, model: AttnResForCausalLM) -> tuple[Cell, ...]:
        """The cells of this probe on `model`. Raises ValueError for a scope that it does not have."""
        return build_grid(model.model.sites, self.families, self.sublayers, self.scopes, self.with_aliases)


@dataclass(frozen=True)
class Probe:
    """A finished probe."""

    effects: pd.DataFrame
    summary: dict[str, Any]
    accuracy: float
    seconds: float


def probe_model(
    model: AttnResForCausalLM,
    task: MQAR,
    settings: ProbeSettings,
    directory: Path,
    *,
    run: str,
    condition: str,
    seed: int,
    step: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Probe `model` (in eval mode) and write effects, clusters and summary into `directory`.

    Raises:
        ValueError: the model's vocabulary is not the task's, or a scope does not exist in this model.
    """
    check_task(task, model.config.vocab_size)
    started = time.perf_counter()
    cells = settings.grid(model)
    examples = task.batch("probe", range(settings.num_sequences))
    engine = Engine(model, cells, settings.positions, settings.batch_size, on_progress)
    result = engine.run(examples)
    info = RunInfo(run, condition, seed, step, data_id(examples), task.num_pairs)
    effects, clusters = results.build_tables(result, info, settings.num_resamples, settings.seed)
    flip = None
    if task.num_values > task.num_pairs:  # else there is no new value to change one to
        flip = asdict(flip_test(model, task, examples, min(4, task.num_pairs), settings.seed, settings.batch_size))
    results.write_tables(directory, effects, clusters)
    seconds = time.perf_counter() - started
    summary = {
        **asdict(info),
        "model": describe_model(model),
        "clean": {
            **results.clean_means(result),
            "chance_accuracy": task.chance_accuracy,
            "plateau_accuracy": task.plateau_accuracy,
            "task_learned": results.task_learned(result, task.num_pairs),
        },
        "flip": flip,
        "motifs": motifs(effects, task.num_pairs),
        "dissociation": dissociation(effects, task.num_pairs),
        "probe": {**_describe_probe(result, settings), "seconds": seconds},
        "versions": results.package_versions(),
    }
    results.write_summary(directory, summary)
    return Probe(effects, summary, summary["clean"]["accuracy"], seconds)


def check_task(task: MQAR, vocab_size: int | None = None) -> None:
    """Raise a ValueError if no probe can be made on `task` (with a model of this vocabulary)."""
    if task.num_pairs < 2:
        raise ValueError("probing needs num_pairs of at least 2: with one there is no distractor, and ln K is zero")
    if vocab_size is not None and vocab_size < task.vocab_size:
        raise ValueError(f"the model's vocabulary ({vocab_size}) is smaller than the task's ({task.vocab_size})")


def data_id(examples: RecallBatch) -> str:
    """Hash of the probe data: equal where two probes can be compared query by query."""
    return hashlib.sha256(examples.input_ids.cpu().numpy().tobytes()).hexdigest()[:12]


def describe_model(model: AttnResForCausalLM) -> dict[str, Any]:
    config = model.config
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    routing = ("attnres_source", "attnres_mode", "attnres_num_blocks", "attnres_routing", "layers_per_block")
    return {
        **{key: getattr(config, key) for key in (*keys, *routing)},
        "num_reads": len(model.model.sites),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _describe_probe(result: ProbeResult, settings: ProbeSettings) -> dict[str, Any]:
    return {
        "kind": MaskRenormalise.kind,
        "min_remaining": MIN_REMAINING,
        "n_sequences": len(result.counts),
        "n_queries": int(result.counts.sum()),
        "n_ablations": len(result.effects),
        "forward_passes": result.forward_passes,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
    }

"""One probe of one model: `measure` works in memory, `probe_model` takes a task's examples and writes the results."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnres import FAMILIES, AttnResForCausalLM
from attnres.inputs import check_memory
from attnres.tasks import Task
from attnres.versions import code_version, package_versions
from probe.ablation.engine import Engine, Plan, ProbeResult, Store
from probe.ablation.grid import Cell, Kind, all_scopes, baselines, build_grid
from probe.ablation.interventions import MIN_REMAINING, Ablation
from probe.analysis.coalitions import coalition_cells, coalition_table
from probe.analysis.effects import (
    RunInfo,
    build_tables,
    describe_clean,
    geometry_table,
    integrated_agreement,
    rounding_floor,
)
from probe.analysis.inference import Inference
from probe.analysis.motifs import Reader, read_motifs
from probe.examples.examples import Examples
from probe.examples.tasks import ProbeTask, as_probe_task
from probe.files import tables as storage
from probe.files.layout import PARTS
from probe.files.parts import Parts
from probe.settings import ProbeSettings
from probe.vocabulary import METRICS, check_names

UNKNOWN = -1
MOST_HOURS = 10_000
"""A sweep that would take longer is refused."""
FLOPS = {"cpu": 1e11}
"""A second, as a rule of thumb; of other devices 1e13."""
ROW_BYTES = 64
"""The least that a row of `clusters` takes while it is made."""
Progress = Callable[[int, int], None]
"""Called with (done, total) ablations."""


@dataclass(frozen=True)
class Effects:
    """What a probe measured, as tables (docs/probes.md has every column).

    Attributes:
        effects: a row per (sublayer, scope, family, kind, positions, with_aliases, metric): mass and dose, the effect
            with its interval and p-values, and what they rest on.
        clusters: a row per row of `effects` and sequence: summed effect, queries, mass.
        geometry: a row per read: entropy, effective numbers of sources, cosines between families.
        coalitions: Shapley values and interactions; empty where no coalition was asked for.
        summary: what `summary.json` holds: clean metrics, motifs, dissociation, cost, versions.
    """

    effects: pd.DataFrame
    clusters: pd.DataFrame
    geometry: pd.DataFrame
    coalitions: pd.DataFrame
    summary: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Of the clean model, on the examples."""
        return self.summary["clean"]["accuracy"]

    @property
    def seconds(self) -> float:
        return self.summary["probe"]["seconds"]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """By name, those that have rows."""
        found = {name: getattr(self, name) for name in ("effects", "clusters", "geometry", "coalitions")}
        return {name: table for name, table in found.items() if not table.empty}


def measure(
    model: AttnResForCausalLM,
    examples: Examples,
    settings: ProbeSettings | None = None,
    *,
    run: str = "model",
    condition: str | None = None,
    seed: int = UNKNOWN,
    step: int = UNKNOWN,
    store: Store | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Ablate the routing of `model` on `examples`, all in memory: no directory, no files, no Lightning.

    Args:
        model: an AttnRes model in eval mode; it is neither changed nor moved.
        examples: sequences with answers and their distractors, `Examples.collate` makes them of tensors. Settings
            that choose examples (`num_sequences`, `flip`) are not used. Sequences of one cluster are one in all
            statistics: `sequence` in the tables numbers clusters.
        run, condition, seed, step: of the model, for the columns of that name; `condition` is by default the kind of
            its sources.
        store: keeps finished batches (`probe.files.parts`).

    Raises:
        ValueError: a scope or kind does not exist in this model, a sequence does not fit it or has no partner that a
            kind needs, a context has fewer than two values, or weights, outputs or effects are not finite.
    """
    started = time.perf_counter()
    settings = ProbeSettings() if settings is None else settings
    check_finite(model)
    engine = _engine(model, examples, settings, on_progress)
    result = engine.run(examples, store).clustered(examples.clusters.cpu().numpy())
    condition_name: str = model.config.attnres_source if condition is None else condition
    about = (run, condition_name, seed, step, examples.data_id(), examples.num_values)
    info = RunInfo(*about, mean_bias(model), rounding_floor(result, model.dtype))
    how = inference(settings)
    effects, clusters = build_tables(result, info, how)
    summary = asdict(info) | {
        "model": describe_model(model),
        "clean": describe_clean(result, info) | {"plateau_accuracy": examples.plateau_accuracy},
        "flip": None,
        **read_motifs(effects, clusters, how),
        "dissociation": Reader(effects, clusters, how).dissociation(),
        "integrated": integrated_agreement(effects),
        "probe": _describe_sweep(result, settings) | {"seconds": time.perf_counter() - started},
        "versions": package_versions(),
        "code": code_version(),
        "schema_version": storage.SCHEMA_VERSION,
    }
    return Effects(effects, clusters, geometry_table(result, info), coalition_table(result, info, how), summary)


def inference(settings: ProbeSettings) -> Inference:
    return Inference(settings.matters, settings.equivalent, settings.num_resamples, settings.seed)


def probe_model(
    model: AttnResForCausalLM,
    task: Task | ProbeTask,
    settings: ProbeSettings,
    directory: Path,
    *,
    run: str,
    condition: str,
    seed: int,
    step: int,
    resumable: bool = False,
    finish: Callable[[], Mapping[str, Any]] | None = None,
    on_progress: Progress | None = None,
) -> Effects:
    """Measure `model` on the examples of `task`, run the flip test, and write tables and summary into `directory`.

    The summary is that of the last step in the tables: a probe of an earlier one adds its rows alone.

    Args:
        resumable: keep finished batches in `directory` until all is written, so that a killed probe goes on with them.
        finish: called when all is measured; what it returns is put into the summary.

    Raises:
        ValueError: as `measure`; and if the model's vocabulary or positions are too few for the task, a tokenizer does
            not keep answers apart, or `directory` holds a part of another probe.
    """
    started = time.perf_counter()
    task = as_probe_task(task)
    examples = check_probe(model, task, settings)
    store = _store(model, examples, settings, directory, run, step) if resumable else None
    about = {"run": run, "condition": condition, "seed": seed, "step": step}
    found = measure(model, examples, settings, **about, store=store, on_progress=on_progress)
    flip = task.flip_test(model, len(examples), settings.seed, settings.batch_size) if settings.flip else None
    summary = found.summary | {"task": task.describe(examples), "flip": None if flip is None else asdict(flip)}
    summary["clean"] = found.summary["clean"] | {"chance_accuracy": task.chance_accuracy}
    summary["probe"] = found.summary["probe"] | {"seconds": time.perf_counter() - started}
    summary |= {} if finish is None else finish()
    storage.write_results(directory, found.tables, summary)
    if store is not None:
        store.remove()
    return replace(found, summary=summary)


def check_probe(model: AttnResForCausalLM, task: Task | ProbeTask, settings: ProbeSettings) -> Examples:
    """The examples that `probe_model` takes. Raises ValueError where it would, without running the model."""
    task = as_probe_task(task)
    count = task.count(settings.num_sequences)
    task.check_sizes(model.config)
    check_finite(model)
    sample = task.examples(min(count, 2))
    task.check(model.config, [sample])
    _check_size(model, sample, count, settings)
    examples = task.examples(count)
    task.check(model.config, [examples, *(task.flipped(count, settings.seed) if settings.flip else ())])
    _engine(model, examples, settings)
    return examples


def plan_probe(model: AttnResForCausalLM, task: Task | ProbeTask, settings: ProbeSettings) -> Plan:
    """What `probe_model` will cost, a flip test included. Raises as it does; the model is not run."""
    examples = check_probe(model, task, settings)
    plan = _engine(model, examples, settings).plan(examples)
    flips = as_probe_task(task).num_flips if settings.flip else 0
    flips += bool(flips)  # the run before the changes
    return Plan(plan.forward_passes + flips, plan.readouts + flips)


def sweep_share(
    rank: int,
    world_size: int,
    model: AttnResForCausalLM,
    task: Task | ProbeTask,
    settings: ProbeSettings,
    directory: Path,
    *,
    run: str,
    step: int,
    on_progress: Progress | None = None,
) -> None:
    """Run the share of process `rank` in a probe's batches and leave it in `directory`, for a resumable `probe_model`.

    All `world_size` processes must see one file system. Raises as `probe_model` does.
    """
    examples = check_probe(model, task, settings)
    engine = _engine(model, examples, settings, on_progress)
    store = _store(model, examples, settings, directory, run, step)
    engine.run_batches(examples, range(engine.num_batches(examples))[rank::world_size], store)


def grid(model: AttnResForCausalLM, settings: ProbeSettings) -> tuple[Cell, ...]:
    """The cells of a probe of `model`, and of what kinds with a `baseline` are read against.

    Estimates are of every scope: more of them cost nothing. Where both modes are asked for, kinds that have
    no estimate are run exactly alone.

    Raises:
        ValueError: it has no such scope, a kind means nothing on it, or has no estimate where nothing else
            is asked for.
    """
    sites = model.model.sites
    check_names("scope", settings.coalitions, all_scopes(sites))
    aliases = (False, True) if settings.with_aliases else (False,)
    cells: list[Cell] = []
    for intervention in (Ablation.known[name] for name in settings.kinds):
        intervention.check(model.config.attnres_source)
        labels = [name for name in intervention.labels if name in settings.families or name not in FAMILIES]
        if settings.exact:
            cells += build_grid(sites, Kind(intervention), labels, settings.sublayers, settings.scopes, aliases)
        if settings.integrated and (intervention.can_be_estimated or not settings.exact):
            cells += build_grid(sites, Kind(intervention, True), labels, settings.sublayers, None, aliases)
    cells += baselines(cells)
    if settings.coalitions:
        cells += coalition_cells(sites, settings.sublayers, settings.coalitions)
    if not cells:
        where = f"{', '.join(settings.sublayers)} in {', '.join(settings.scopes or ('any scope',))}"
        raise ValueError(f"nothing to probe: a model of {model.config.num_hidden_layers} layers has no read of {where}")
    return tuple(cells)


def _engine(
    model: AttnResForCausalLM, examples: Examples, settings: ProbeSettings, on_progress: Progress | None = None
) -> Engine:
    """Raises ValueError for all that can go wrong with the sweep, before the model is run."""
    if examples.num_values < 2:
        raise ValueError("probing needs num_pairs of at least 2: with one there is no distractor, and ln K is zero")
    examples.check_fits(model.config)
    sizes = (settings.batch_size, settings.tokens_per_pass, settings.seed)
    engine = Engine(model, grid(model, settings), settings.positions, *sizes, on_progress)
    if "partner" in engine.needs:
        examples.partners(settings.seed)
    return engine


def check_finite(model: torch.nn.Module) -> None:
    """Raise a ValueError that names a parameter with values that are not finite, if the model has any."""
    found = [(name, value) for name, value in model.named_parameters() if not value.is_meta and not _is_finite(value)]
    if found:
        name, value = found[0]
        count, others = int((~value.isfinite()).sum()), len(found) - 1
        more = f", and so do {others} more parameters" if others else ""
        raise ValueError(
            f"{count:,} of the {value.numel():,} values of the model's {name} are NaN or infinite{more}: nothing can "
            "be measured; take an earlier checkpoint"
        )


def _is_finite(value: torch.Tensor) -> bool:
    return bool(value.isfinite().all())


def _check_size(model: AttnResForCausalLM, sample: Examples, count: int, settings: ProbeSettings) -> None:
    """Raise a ValueError for a sweep of `count` sequences like `sample` that can never end here, or does not fit.

    Both are the least it takes: what is kept of all sequences at once, and the sweep at a rule of thumb's speed.
    """
    engine = _engine(model, sample, settings)
    seq, values = sample.input_ids.shape[1], sample.candidates.shape[1:].numel()
    rows = len(engine.cells) * len(settings.positions) * len(METRICS)
    kept = 17 * seq + 8 * values + ROW_BYTES * rows + 8 * settings.num_resamples  # bytes of each sequence
    passes = engine.plan(sample).forward_passes
    flops = 2 * sum(value.numel() for value in model.parameters()) * seq * passes * count
    hours = flops / FLOPS.get(model.device.type, 1e13) / 3600
    what = (
        f"a probe of {count:,} sequences of {seq:,} tokens ({rows:,} rows each, {settings.num_resamples:,} resamples)"
    )
    hint = "make num_sequences, scopes, kinds or num_resamples smaller"
    check_memory(f"{what}, about {hours:,.1f} hours,", kept * count, hint)
    if hours > MOST_HOURS:
        raise ValueError(f"{what} would take about {hours:,.0f} hours, {MOST_HOURS:,} are allowed: {hint}")


def _store(
    model: AttnResForCausalLM, examples: Examples, settings: ProbeSettings, directory: Path, run: str, step: int
) -> Parts:
    """What must be the same for a sweep to go on: weights, data, settings and the code's versions."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    about = {"run": run, "step": step, "model": digest.hexdigest()[:16], "data": examples.data_id()}
    identity = about | asdict(settings) | {"versions": package_versions()}
    return Parts(directory / PARTS, identity, grid(model, settings), model.model.sites)


def mean_bias(model: AttnResForCausalLM) -> float:
    """Mean recency bias of the model's reads; 0 where they have none."""
    biases = [value for name, value in model.routing_parameters().items() if name.endswith("_res_bias")]
    return float(torch.stack([bias.detach().float() for bias in biases]).mean()) if biases else 0.0


def describe_model(model: AttnResForCausalLM) -> dict[str, Any]:
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    routing = ("attnres_source", "attnres_mode", "attnres_num_blocks", "attnres_routing", "layers_per_block")
    return {key: getattr(model.config, key) for key in (*keys, *routing)} | {
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_reads": len(model.model.sites),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _describe_sweep(result: ProbeResult, settings: ProbeSettings) -> dict[str, Any]:
    return {
        "kinds": list(settings.kinds),
        "min_remaining": MIN_REMAINING,
        "n_sequences": len(result.counts),
        "n_queries": int(result.counts.sum()),
        "n_ablations": len(result.effects),
        "forward_passes": result.forward_passes,
        "forward_passes_saved": result.forward_passes_saved,
        "sweep_seconds": result.seconds,
        "matters": settings.matters,
        "equivalent": settings.equivalent,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
    }

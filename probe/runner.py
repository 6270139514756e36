"""One probe of one model: examples, sweep, flip test, tables and summary. Callback and command line both call this."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy.stats import spearmanr

from attnres import FAMILIES, AttnResForCausalLM
from attnres.versions import code_version, package_versions
from probe.ablation.engine import Engine, Plan, ProbeResult
from probe.ablation.grid import ALL_SUBLAYERS, FIRST_ORDER, POSITIONS, Cell, all_scopes, build_grid, check_names
from probe.ablation.interventions import MIN_REMAINING, Ablation
from probe.analysis import effects as results
from probe.analysis.coalitions import coalition_cells, coalition_table
from probe.analysis.effects import RunInfo
from probe.analysis.motifs import Reader
from probe.examples.inputs import ProbeInputs
from probe.examples.prompts import TextPrompts
from probe.examples.tasks import ProbeTask, flip_inputs, flip_result, num_flips, probe_inputs
from probe.files import tables as storage
from probe.files.parts import Parts

PARTS = "parts"
"""Folder of an unfinished sweep, in the folder of its results."""


@dataclass(frozen=True)
class ProbeSettings:
    """What to ablate, how, and on how much data.

    Args:
        num_sequences: sequences of the `probe` split, at the task's full K; each is one cluster.
        kinds: interventions, by `kind` (see `probe.ablation.interventions`).
        families, sublayers, scopes: the grid; scopes `None` means thirds, all, every layer and the final read.
            Families are for kinds that act on one; the others act on all four.
        positions: "all" (primary) and / or "query".
        with_aliases: families alone (False) and / or with the sources that are the same tensor (True).
        exact: run the exact sweep.
        first_order: also estimate the same grid to first order (`probe.ablation.first_order`).
        first_order_scopes: scopes of these estimates, if others than `scopes`: more of them cost nothing.
        coalitions: scopes at which every subset of the families is masked (`probe.analysis.coalitions`).
        flip: run the flip test too.
        batch_size: sequences per clean run.
        tokens_per_pass: most tokens of one ablated forward pass; `None` for a default by device (`Engine`).
        num_resamples: bootstrap resamples and sign flips.
        seed: of the resamples and flips, of partners and draws, and of the flip test's changes.

    Raises:
        ValueError: a name that does not exist, or a number that is not positive.
    """

    num_sequences: int = 256
    kinds: Sequence[str] = ("mask_renormalise",)
    families: Sequence[str] = FAMILIES
    sublayers: Sequence[str] = ALL_SUBLAYERS
    scopes: Sequence[str] | None = None
    positions: Sequence[str] = POSITIONS
    with_aliases: Sequence[bool] = (False,)
    exact: bool = True
    first_order: bool = False
    first_order_scopes: Sequence[str] | None = None
    coalitions: Sequence[str] = ()
    flip: bool = True
    batch_size: int = 64
    tokens_per_pass: int | None = None
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("kind", self.kinds, [kind for kind, cls in Ablation.known.items() if cls.labels])
        check_names("family", self.families, FAMILIES)
        check_names("sublayer", self.sublayers, ALL_SUBLAYERS)
        check_names("positions", self.positions, POSITIONS)
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        for name in ("num_sequences", "batch_size", "tokens_per_pass", "num_resamples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("kinds", "families", "sublayers", "positions", "with_aliases"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one")
        if self.num_sequences < 2 and any(Ablation.known[kind].needs == "partner" for kind in self.kinds):
            raise ValueError(
                "num_sequences must be at least 2 for kinds that take another example's content or weights"
            )
        if not (self.exact or self.first_order):
            raise ValueError("one of exact and first_order must be true")

    def grid(self, model: AttnResForCausalLM) -> tuple[Cell, ...]:
        """The cells of this probe on `model`.

        Raises:
            ValueError: it has no such scope, or a kind means nothing on it.
        """
        sites = model.model.sites
        check_names("scope", self.coalitions, all_scopes(sites))
        linear = self.scopes if self.first_order_scopes is None else self.first_order_scopes
        scopes_of = {"": self.scopes} if self.exact else {}
        scopes_of |= {FIRST_ORDER: linear} if self.first_order else {}
        cells: list[Cell] = []
        for kind in self.kinds:
            cls = Ablation.known[kind]
            cls.check(model.config.attnres_source)
            families = [name for name in cls.labels if name in self.families or name not in FAMILIES]
            for suffix, scopes in scopes_of.items():
                cells += build_grid(sites, kind + suffix, families, self.sublayers, scopes, self.with_aliases)
        if self.coalitions:
            cells += coalition_cells(sites, self.sublayers, self.coalitions)
        if not cells:
            where = f"{', '.join(self.sublayers)} in {', '.join(self.scopes or ('any scope',))}"
            raise ValueError(
                f"nothing to probe: a model of {model.config.num_hidden_layers} layers has no read of {where}"
            )
        return tuple(cells)


@dataclass(frozen=True)
class Probe:
    """A finished probe."""

    effects: pd.DataFrame
    summary: dict[str, Any]
    accuracy: float
    seconds: float


def probe_model(
    model: AttnResForCausalLM,
    task: ProbeTask,
    settings: ProbeSettings,
    directory: Path,
    *,
    run: str,
    condition: str,
    seed: int,
    step: int,
    resumable: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Probe:
    """Probe `model` (in eval mode) and write tables and summary into `directory`.

    Args:
        resumable: keep finished batches in `directory` until all is written, so that a killed probe goes on with them.

    Raises:
        ValueError: the model's vocabulary or positions are too few for the task, a scope or kind does not exist in
            this model, a tokenizer does not keep answers apart, a sequence has no partner that a kind needs, or
            `directory` holds a part of another probe.
    """
    started = time.perf_counter()
    inputs, engine = _prepare(model, task, settings, on_progress)
    store = _store(engine, inputs, settings, directory, run, step) if resumable else None
    result = engine.run(inputs, store)
    info = RunInfo(run, condition, seed, step, inputs.data_id(), task.num_pairs, mean_bias(model))
    tables = build_all_tables(result, info, settings)
    reader = Reader(tables["effects"], tables["clusters"], task.num_pairs, settings.num_resamples, settings.seed)
    summary = {
        **asdict(info),
        "model": describe_model(model),
        "task": describe_task(task, inputs),
        "clean": {
            **results.clean_means(result),
            "chance_accuracy": task.chance_accuracy,
            "plateau_accuracy": task.plateau_accuracy,
            "task_learned": results.task_learned(result, task.num_pairs),
        },
        "flip": _flip(model, task, settings) if settings.flip else None,
        "motifs": reader.motifs(),
        "dissociation": reader.dissociation(),
        "first_order": first_order_agreement(tables["effects"]),
        "probe": _describe_probe(result, settings),
        "versions": package_versions(),
        "code": code_version(),
    }
    storage.write_tables(directory, tables)
    seconds = time.perf_counter() - started
    summary["probe"]["seconds"] = seconds
    storage.write_summary(directory, summary)
    if store is not None:
        store.remove()
    return Probe(tables["effects"], summary, summary["clean"]["accuracy"], seconds)


def check_probe(model: AttnResForCausalLM, task: ProbeTask, settings: ProbeSettings) -> None:
    """Raise a ValueError where `probe_model` would for this model and task, without running the model."""
    _prepare(model, task, settings)


def plan_probe(model: AttnResForCausalLM, task: ProbeTask, settings: ProbeSettings) -> Plan:
    """What `probe_model` will cost, a flip test included. Raises as `probe_model`; the model is not run."""
    inputs, engine = _prepare(model, task, settings)
    plan = engine.plan(inputs)
    flips = num_flips(task) if settings.flip else 0
    return Plan(plan.forward_passes + flips, plan.readouts + flips)


def sweep_share(
    rank: int,
    world_size: int,
    model: AttnResForCausalLM,
    task: ProbeTask,
    settings: ProbeSettings,
    directory: Path,
    *,
    run: str,
    step: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run the share of process `rank` in a probe's batches and leave it in `directory`, for a resumable `probe_model`.

    All `world_size` processes must see one file system. Raises as `probe_model` does.
    """
    inputs, engine = _prepare(model, task, settings, on_progress)
    store = _store(engine, inputs, settings, directory, run, step)
    engine.run_batches(inputs, range(engine.num_batches(inputs))[rank::world_size], store)


def _prepare(
    model: AttnResForCausalLM,
    task: ProbeTask,
    settings: ProbeSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[ProbeInputs, Engine]:
    """All that can go wrong with the sweep or the flip test does so here, before the model is run."""
    check_task(task, model.config.vocab_size)
    inputs = probe_inputs(task, settings.num_sequences)
    flipped = flip_inputs(task, settings.num_sequences, settings.seed) if settings.flip else ()
    longest = max(part.input_ids.shape[1] for part in (inputs, *flipped))
    most = model.config.max_position_embeddings
    if longest > most:
        raise ValueError(
            f"the task's longest sequence has {longest} tokens, the model is made for {most} "
            "(max_position_embeddings): make num_pairs or distance smaller"
        )
    sizes = (settings.batch_size, settings.tokens_per_pass, settings.seed)
    engine = Engine(model, settings.grid(model), settings.positions, *sizes, on_progress)
    if any(Ablation.known[kind].needs == "partner" for kind in settings.kinds):
        inputs.partners(settings.seed)
    return inputs, engine


def _store(engine: Engine, inputs: ProbeInputs, settings: ProbeSettings, directory: Path, run: str, step: int) -> Parts:
    identity = sweep_identity(engine.model, inputs, settings, run, step)
    return Parts(directory / PARTS, identity, engine.cells, engine.sites)


def build_all_tables(result: ProbeResult, info: RunInfo, settings: ProbeSettings) -> dict[str, pd.DataFrame]:
    """The tables of a probe by name (`probe.files.tables.TABLES`)."""
    effects, clusters = results.build_tables(result, info, settings.num_resamples, settings.seed)
    tables = {"effects": effects, "clusters": clusters, "geometry": results.geometry_table(result, info)}
    coalitions = coalition_table(result, info, settings.num_resamples, settings.seed)
    return tables if coalitions.empty else {**tables, "coalitions": coalitions}


def first_order_agreement(effects: pd.DataFrame) -> list[dict[str, Any]]:
    """How well first-order effects agree with the exact ones, over the cells that have both; empty without them.

    By kind, positions, metric and grid: Spearman's rank correlation, and the number of cells it rests on.
    """
    keys = ["sublayer", "scope", "family", "positions", "with_aliases", "metric"]
    is_first_order = effects["kind"].str.endswith(FIRST_ORDER)
    linear = effects[is_first_order].assign(kind=lambda rows: rows["kind"].str.removesuffix(FIRST_ORDER))
    both = linear.merge(effects[~is_first_order], on=[*keys, "kind"], suffixes=("_linear", "_exact"))
    both = both[both["applicable_linear"] & both["applicable_exact"]]
    both = both.assign(grid=["layers" if scope.startswith("layer:") else "regions" for scope in both["scope"]])
    found = []
    for names, rows in both.groupby(["kind", "positions", "metric", "grid"], sort=False):
        pair = (rows["effect_linear"].to_numpy(), rows["effect_exact"].to_numpy())
        varied = all(len(set(values)) > 1 for values in pair)
        correlation = float(spearmanr(*pair)[0]) if varied else math.nan  # type: ignore[arg-type]
        keys_of = dict(zip(("kind", "positions", "metric", "grid"), names, strict=True))  # type: ignore[call-overload]
        found.append({**keys_of, "spearman": correlation, "n_cells": len(rows)})
    return found


def check_task(task: ProbeTask, vocab_size: int | None = None) -> None:
    """Raise a ValueError if no probe can be made on `task` (with a model of this vocabulary)."""
    if task.num_pairs < 2:
        raise ValueError("probing needs num_pairs of at least 2: with one there is no distractor, and ln K is zero")
    if vocab_size is not None and vocab_size < task.vocab_size:
        whose = f"that of the tokenizer of {task.source}" if isinstance(task, TextPrompts) else "the task's"
        raise ValueError(f"the model's vocabulary ({vocab_size}) is smaller than {whose} ({task.vocab_size})")


def describe_task(task: ProbeTask, inputs: ProbeInputs) -> dict[str, Any]:
    """Its settings; of text, also the tokenizer and what it makes of the prompts."""
    if not isinstance(task, TextPrompts):
        return task.to_dict()
    per_answer = inputs.queries.sum() / inputs.starts.sum()
    lengths = {"mean_prompt_tokens": float(inputs.lengths.double().mean()), "mean_answer_tokens": float(per_answer)}
    return {**task.to_dict(), "tokenizer": task.source, **lengths}


def mean_bias(model: AttnResForCausalLM) -> float:
    """Mean recency bias of the model's reads."""
    biases = [value for name, value in model.routing_parameters().items() if name.endswith("_res_bias")]
    return float(torch.stack([bias.detach().float() for bias in biases]).mean())


def sweep_identity(
    model: AttnResForCausalLM, inputs: ProbeInputs, settings: ProbeSettings, run: str, step: int
) -> dict[str, Any]:
    """What must be the same for a sweep to go on: weights, data, settings and the code's versions."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    about = {"run": run, "step": step, "model": digest.hexdigest()[:16], "data": inputs.data_id()}
    return {**about, **asdict(settings), "versions": package_versions()}


def describe_model(model: AttnResForCausalLM) -> dict[str, Any]:
    config = model.config
    keys = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    routing = ("attnres_source", "attnres_mode", "attnres_num_blocks", "attnres_routing", "layers_per_block")
    return {
        **{key: getattr(config, key) for key in (*keys, *routing)},
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_reads": len(model.model.sites),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _flip(model: AttnResForCausalLM, task: ProbeTask, settings: ProbeSettings) -> dict[str, Any] | None:
    result = flip_result(task, model, settings.num_sequences, settings.seed, settings.batch_size)
    return None if result is None else asdict(result)


def _describe_probe(result: ProbeResult, settings: ProbeSettings) -> dict[str, Any]:
    return {
        "kinds": list(settings.kinds),
        "min_remaining": MIN_REMAINING,
        "n_sequences": len(result.counts),
        "n_queries": int(result.counts.sum()),
        "n_ablations": len(result.effects),
        "forward_passes": result.forward_passes,
        "forward_passes_saved": result.forward_passes_saved,
        "sweep_seconds": result.seconds,
        "num_resamples": settings.num_resamples,
        "seed": settings.seed,
    }

"""When motifs emerge: onset and half-rise of every (family, sublayer, region), from the tables of a run's probes.

All of it rests on exact effects (`probe.analysis.motifs.primary_rows`): first-order points are a curve of their own.
Intervals come from one cluster bootstrap, whose resamples of sequences are the same at every step and for every curve.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from attnres import REGIONS, SUBLAYERS
from attnres.sites import regions_of
from probe.analysis import onsets, stats
from probe.analysis.motifs import Cell, Reader, motif_name, primary_rows, resampled_criterion
from probe.files import tables as storage
from probe.files.layout import find_training
from probe.files.runs import read_summary, training_curves
from probe.vocabulary import WIDE_SCOPES

STUDY_MOTIFS = {
    "embedding -> early mlp": ("mlp", "embedding", "early"),
    "current -> early attention": ("self_attn", "current", "early"),
    "current -> early mlp": ("mlp", "current", "early"),
    "older -> late attention": ("self_attn", "older", "late"),
}
"""The study's three motifs (arXiv:2606.13168; `current` has one in each sublayer): (sublayer, family, region)."""
LAGS = {"mass_effect": ("mass_half", "effect_half"), "effect_accuracy": ("effect_half", "accuracy_half")}
LAGS |= {f"{name}_accuracy": (name, "accuracy_half") for name in ("onset", "first_held")}
LAGS |= {"mass_accuracy": ("mass_half", "accuracy_half")}
"""Name -> how much later the first of the two times is than the second."""


@dataclass(frozen=True)
class Emergence:
    """When the motifs of one run emerged.

    Attributes:
        table: a row per (sublayer, family, region) that could be ablated, see `find_emergence`.
        curves: a row per step, sublayer, scope and family: `effect` with `ci_low` and `ci_high` (nats), `mass` with
            `mass_low` and `mass_high`, `applicable`, and whether the motif's criterion `holds` at that step.
        accuracy: a row per step: `accuracy` on the probe split with `low` and `high`, `pairs` in training.
        left_out: steps that take no part: probed on other sequences than the last one, or not in all regions.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    accuracy: pd.DataFrame
    left_out: tuple[int, ...] = ()

    @property
    def shown(self) -> pd.DataFrame:
        """The rows of `table` to speak of: the study's motifs, and any other that held at some probe."""
        return self.table[(self.table["motif"] != "") | (self.table["status"] != "never")]

    def to_dict(self) -> dict[str, Any]:
        """For `summary.json`."""
        half = [f"accuracy_half{end}" for end in ("", "_low", "_high")]
        motifs = self.shown.drop(columns=["run", "condition", "seed", *half]).to_dict("records")
        return {
            "steps": [int(step) for step in self.accuracy["step"]],
            "left_out": list(self.left_out),
            **{name: float(self.table[name].iloc[0]) for name in half},
            "motifs": motifs,
        }


def load_emergence(directory: Path, num_resamples: int = 2000, seed: int = 0) -> Emergence | None:
    """Emergence in a run directory that was probed while it trained, or in its folder of results.

    None with fewer than two probes of all regions.

    Raises:
        ValueError: tables that cannot be read or are incomplete, with what is wrong.
    """
    folder = find_training(directory)
    if folder is None:
        return None
    effects = storage.read_effects(folder)
    steps = set(primary_rows(effects)["step"])
    if len(steps) < 2:
        return None
    clusters = storage.read_clusters(folder)
    if lost := sorted(steps - set(primary_rows(clusters)["step"])):
        raise ValueError(f"{folder} is incomplete: clusters.parquet lacks step {lost[0]} of effects.parquet")
    curves, summary = training_curves(directory), read_summary(folder)
    pairs = None if curves is None else curves["pairs"].dropna()
    regions = regions_of(summary["model"]["num_hidden_layers"])
    return find_emergence(effects, clusters, int(summary["num_pairs"]), pairs, num_resamples, seed, regions)


def find_emergence(
    effects: pd.DataFrame,
    clusters: pd.DataFrame,
    num_pairs: int,
    pairs: pd.Series | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    regions: Collection[str] = REGIONS,
) -> Emergence | None:
    """Find when motifs emerge in the tables of one run, probed at several steps.

    A motif is of one region as against all others, so only steps at which all were probed take part. None where they
    are fewer than two, or have no (sublayer, family, region) in common that could be ablated.

    The rows of `table`, all times being probed steps and NaN "never":

    - `motif`: the study's name, or ""; `status`: "emerged" (it has an onset), "transient" (it held at some probe, not
      to the end), "never".
    - `onset`: the first probe from which the motif holds (`Reader.motifs`) at every later one, at least
      two of them. `onset_low`, `onset_high`: 95 % percentile interval over the resamples that have one, in each of
      which the same criterion is applied to the resampled effects, with the critical values of the sample;
      `p_onset`: the share of resamples that do.
    - `first_held` (with `_low` and `_high`, as the onset's), `last_held`, `n_held` of `n_probes`: where it holds.
    - `pairs`, `accuracy`: at the onset, or at `first_held`; `effect_half_pairs`, `mass_half_pairs`,
      `accuracy_half_pairs`: pairs at the half-rises.
    - `effect_half`, `mass_half`, `accuracy_half` (each with `_low` and `_high`): the half-rise (`onsets.half_rise`);
      NaN where the 95 % interval of the whole change, `effect_change` or `mass_change`, includes zero.
    - `lag_mass_effect`, `lag_effect_accuracy`, `lag_mass_accuracy`, `lag_onset_accuracy`, `lag_first_held_accuracy`
      (each with `_low` and `_high`): how much later the first is than the second (`onsets.lag`).

    Args:
        effects, clusters: the tables of the probes.
        num_pairs: K.
        pairs: pairs in training by step, where logged.
        regions: those that the model has.
    """
    rows = primary_rows(effects)
    if rows.empty:
        return None
    run = rows["run"].iloc[-1]
    rows = rows[(rows["run"] == run) & rows["scope"].isin(WIDE_SCOPES)]
    probed = rows[rows["sublayer"].isin(SUBLAYERS)].groupby("step")["scope"].agg(set)
    whole = {step for step, scopes in probed.items() if scopes >= set(regions)}
    if not whole:
        return None
    data_id = rows.loc[rows["step"] == max(whole), "data_id"].iloc[0]
    taken = set(rows.loc[rows["data_id"] == data_id, "step"]) & whole
    if len(taken) < 2:
        return None
    left_out = tuple(sorted(int(step) for step in set(rows["step"]) - taken))
    rows = rows[rows["step"].isin(taken)]
    clusters = clusters[(clusters["run"] == run) & clusters["step"].isin(taken)]
    finder = _Finder(rows, clusters, num_pairs, pairs, num_resamples, seed)
    return finder.find(left_out) if finder.cells else None


@dataclass
class _Finder:
    """`find_emergence`, in steps. S probes, C cells (sublayer, family, region), R resamples, n sequences."""

    effects: pd.DataFrame
    clusters: pd.DataFrame
    num_pairs: int
    pairs: pd.Series | None
    num_resamples: int
    seed: int

    def __post_init__(self) -> None:
        self.steps = np.sort(self.effects["step"].unique())
        self.by_step = dict(list(self.effects.groupby("step")))
        of_cells = primary_rows(self.clusters)
        self.clusters_by_step = dict(list(of_cells.groupby("step")))
        places = self.effects[["sublayer", "family", "scope"]].itertuples(index=False, name=None)
        acts = dict.fromkeys(place for place, is_so in zip(places, self.effects["applicable"], strict=True) if is_so)
        self.grid = [(str(sublayer), str(family), str(scope)) for sublayer, family, scope in acts]
        probed = self.effects.groupby(["sublayer", "family", "scope"])["step"].nunique()
        self.grid = [cell for cell in self.grid if probed[cell] == len(self.steps)]  # a last probe may be of more
        self.cells = [cell for cell in self.grid if cell[0] in SUBLAYERS and cell[2] in REGIONS]
        self.counts = of_cells.groupby("sequence")["n_queries"].first().to_numpy()
        keys = ["step", "sublayer", "family", "scope"]
        self.wide = of_cells.pivot(index="sequence", columns=keys, values=["summed_effect", "mass"])

    @property
    def weights(self) -> np.ndarray:
        """(R, n) how often each sequence is drawn: the one bootstrap of all intervals."""
        return stats.resample_weights(len(self.counts), self.num_resamples, self.seed)

    def by_sequence(self, column: str, cell: Cell) -> np.ndarray:
        """(n, S) `column` of a cell's clusters."""
        return np.stack([self.wide[(column, step, *cell)].to_numpy(float) for step in self.steps], axis=1)

    @cached_property
    def answered(self) -> np.ndarray | None:
        """(n, S) right answers of each sequence; None where accuracy was not probed."""
        rows = primary_rows(self.clusters, metric="accuracy").drop_duplicates(["step", "sequence"])
        if rows.empty:
            return None
        return rows.pivot(index="sequence", columns="step", values="summed_clean")[self.steps].to_numpy(float)

    def find(self, left_out: tuple[int, ...]) -> Emergence:
        holds, resampled = self._holds(), self._resampled_holds()
        accuracy_half = (math.nan, np.full(self.num_resamples, np.nan))
        if self.answered is not None:
            accuracy_half = self._half(self.answered, self.counts)
        rows = []
        for i, cell in enumerate(self.cells):
            effects, masses = self.by_sequence("summed_effect", cell), self.by_sequence("mass", cell)
            times = {
                "onset": tuple(onsets.first_lasting(each[..., i]) for each in (holds, resampled)),
                "first_held": tuple(onsets.first(each[..., i]) for each in (holds, resampled)),
                "effect_half": self._half(effects, self.counts),
                "mass_half": self._half(masses, np.ones(len(self.counts))),
                "accuracy_half": accuracy_half,
            }
            changes = {
                "effect_change": float(onsets.change(effects.sum(0) / self.counts.sum())),
                "mass_change": float(onsets.change(masses.mean(0))),
            }
            rows.append({**self._about(cell), **self._held(holds[:, i], times), **self._times(times), **changes})
        return Emergence(pd.DataFrame(rows), self._curves(holds), self._accuracy(), left_out)

    def _holds(self) -> np.ndarray:
        """(S, C) whether the causal probe finds the motif at a step."""
        found = np.zeros((len(self.steps), len(self.cells)), dtype=bool)
        for number, step in enumerate(self.steps):
            tables = (self.by_step[step], self.clusters_by_step[step])
            for motif in Reader(*tables, self.num_pairs, self.num_resamples, self.seed).motifs():
                cell = (motif["sublayer"], motif["family"], motif["region"])
                if cell in self.cells:  # not one that other steps do not have
                    found[number, self.cells.index(cell)] = True
        return found

    def _resampled_holds(self) -> np.ndarray:
        """(R, S, C) the same criterion on resampled effects, with the critical values of the sample."""
        sums = np.stack([self.by_sequence("summed_effect", cell) for cell in self.grid], axis=-1)  # (n, S, grid)
        chosen = [self.grid.index(cell) for cell in self.cells]
        found = np.zeros((self.num_resamples, len(self.steps), len(self.cells)), dtype=bool)
        for number, step in enumerate(self.steps):
            rows = self.by_step[step].set_index(["sublayer", "family", "scope"])["n_reads"]
            n_reads = rows.reindex(self.grid).to_numpy(float)
            about = (sums[:, number], self.counts, self.grid, n_reads, self.num_pairs)
            found[:, number] = resampled_criterion(*about, self.weights, self.num_resamples, self.seed)[:, chosen]
        return found

    def _half(self, sums: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        """Half-rise of the mean of `sums` (n, S), and of each resample: float and (R,); NaN if there is no change."""
        means = self._resample(sums, counts)
        low, high = onsets.percentiles(onsets.change(means), onsets.change(means))
        if not (low > 0 or high < 0):
            return math.nan, np.full(self.num_resamples, np.nan)
        return float(onsets.half_rise(sums.sum(0) / counts.sum())), onsets.half_rise(means)

    def _resample(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """(R, S) resampled means of `sums` (n, S)."""
        return (self.weights @ sums) / (self.weights @ counts)[:, None]

    def _about(self, cell: Cell) -> dict[str, Any]:
        name = motif_name(*cell)
        first = self.effects.iloc[0]
        about = {"run": first["run"], "condition": first["condition"], "seed": int(first["seed"])}
        return {
            **about,
            **dict(zip(("sublayer", "family", "region"), cell, strict=True)),
            "motif": name if name in STUDY_MOTIFS else "",
        }

    def _held(self, holds: np.ndarray, times: Mapping[str, tuple[Any, np.ndarray]]) -> dict[str, Any]:
        onset, resampled = times["onset"]
        start = onset if not math.isnan(onset) else times["first_held"][0]
        accuracy = math.nan
        if self.answered is not None and holds.any():
            accuracy = float(self.answered[:, int(start)].sum() / self.counts.sum())
        return {
            "status": "never" if not holds.any() else "transient" if math.isnan(onset) else "emerged",
            "p_onset": float((~np.isnan(resampled)).mean()),
            "last_held": float(self.steps[holds][-1]) if holds.any() else math.nan,
            "n_held": int(holds.sum()),
            "n_probes": len(self.steps),
            "pairs": pairs_at(self.pairs, onsets.at_step(start, self.steps)),
            "accuracy": accuracy,
            **{
                f"{name}_pairs": pairs_at(self.pairs, onsets.at_step(times[name][0], self.steps))
                for name in ("effect_half", "mass_half", "accuracy_half")
            },
        }

    def _times(self, times: Mapping[str, tuple[Any, np.ndarray]]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for name, (time, resampled) in times.items():
            low, high = onsets.interval(resampled, self.steps) if not math.isnan(time) else (math.nan, math.nan)
            numbers |= {name: onsets.at_step(time, self.steps), f"{name}_low": low, f"{name}_high": high}
        for name, (later, earlier) in LAGS.items():
            known = not (math.isnan(times[later][0]) or math.isnan(times[earlier][0]))
            lag = onsets.lag(times[later][1], times[earlier][1], self.steps) if known else (math.nan, math.nan)
            numbers |= {f"lag_{name}": numbers[later] - numbers[earlier]}
            numbers |= dict(zip((f"lag_{name}_low", f"lag_{name}_high"), lag, strict=True))
        return numbers

    def _curves(self, holds: np.ndarray) -> pd.DataFrame:
        columns = ["step", "sublayer", "family", "scope", "effect", "ci_low", "ci_high", "mass", "applicable"]
        curves = self.effects[columns].reset_index(drop=True)
        keys = ["step", "sublayer", "family", "scope"]
        found = {(step, *cell) for s, step in enumerate(self.steps) for c, cell in enumerate(self.cells) if holds[s, c]}
        places = list(curves[keys].itertuples(index=False, name=None))
        masses = self._resample(self.wide["mass"][places].to_numpy(float), np.ones(len(self.counts)))
        low, high = onsets.percentiles(masses, masses)
        return curves.assign(mass_low=low, mass_high=high, holds=[place in found for place in places])

    def _accuracy(self) -> pd.DataFrame:
        mean = low = high = np.full(len(self.steps), np.nan)
        if self.answered is not None:
            mean, resampled = self.answered.sum(0) / self.counts.sum(), self._resample(self.answered, self.counts)
            low, high = onsets.percentiles(resampled, resampled)
        numbers = {"step": self.steps, "accuracy": mean, "low": low, "high": high}
        return pd.DataFrame(numbers).assign(pairs=[pairs_at(self.pairs, float(step)) for step in self.steps])


def pairs_at(pairs: pd.Series | None, step: float) -> float:
    """Pairs in training at a step: the last that were logged by then, or before that the first; pairs grow.

    Args:
        pairs: by step; None or empty where nothing was logged, then NaN.
    """
    if pairs is None or pairs.empty or math.isnan(step):
        return math.nan
    until = pairs[pairs.index <= step]
    return float(until.iloc[-1] if len(until) else pairs.iloc[0])


def after_accuracy(row: Mapping[Any, Any]) -> tuple[str, float, float]:
    """What of a row of `table` is set against accuracy's half-rise, and how much later it is: an interval, in steps.

    The onset; where there is none, the first probe at which the motif held; where it never did, the effect's half-rise.
    """
    name = {"emerged": "onset", "transient": "first_held", "never": "effect"}[row["status"]]
    return name.replace("_", " "), row[f"lag_{name}_accuracy_low"], row[f"lag_{name}_accuracy_high"]


SPREAD = ("median", "smallest", "largest")


def over_seeds(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The `table`s of the seeds of one experiment: median, smallest and largest of each time.

    A row per condition, sublayer, family and region that held at some probe of some seed or is the study's: `n_seeds`,
    `n_emerged`, `n_transient`, and `{onset, effect_half, mass_half, accuracy_half}_{median, smallest, largest}` over
    the seeds that have one.
    """
    rows = []
    keys = ["condition", "sublayer", "family", "region", "motif"]
    spreads = [f"{name}_{what}" for name in ("onset", "effect_half", "mass_half", "accuracy_half") for what in SPREAD]
    for place, runs in pd.concat(tables).groupby(keys, sort=False):
        if not runs["motif"].iloc[0] and (runs["status"] == "never").all():
            continue
        row: dict[str, Any] = dict(zip(keys, place, strict=True))  # type: ignore[call-overload]
        row |= {"n_seeds": len(runs)}
        row |= {f"n_{status}": int((runs["status"] == status).sum()) for status in ("emerged", "transient")}
        for name in ("onset", "effect_half", "mass_half", "accuracy_half"):
            times = runs[name].dropna()
            row |= {f"{name}_median": times.median(), f"{name}_smallest": times.min(), f"{name}_largest": times.max()}
        rows.append(row)
    return pd.DataFrame(rows, columns=[*keys, "n_seeds", "n_emerged", "n_transient", *spreads])

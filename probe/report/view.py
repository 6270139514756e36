"""What is shown of probed runs, once for figures, page and images: tables in, cells to draw out.

`view_cells` makes them from a table of effects; a `Scale` says where a value is drawn and how it is written.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from attnres.text import printable
from probe import vocabulary as words
from probe.files.runs import ProbedRun

IN_TRAINING, AT_THE_END = "in training", "final"
"""The stages at which a run is probed."""
NOT_APPLICABLE, BELOW_FLOOR, NOT_PROBED = "not applicable", "below the floor", "not probed"
NO_STRENGTH = "no strength"
"""Statuses of cells; the last begins one."""
KEPT = [
    *("run", "step", *words.ROUTE, "kind", "metric", "clean", "mass", "aliased_mass", "mass_uniform", "dose"),
    *("detectable", "p_adjusted", "p_matters", "p_equivalent", "task_learned"),
    *("n_reads", "n_unaliased_reads", "n_sequences", "n_queries"),
]
VALUE = ["value", "low", "high"]
HARM = ["harm", "harm_low", "harm_high"]


class _Words(string.Formatter):
    """Writes a number that is none, NaN or a summary's null, as a dash."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return "—" if value is None or value != value else super().format_field(value, format_spec)


fill = _Words().format
"""As `str.format`, for numbers that may be none."""


@dataclass(frozen=True)
class Scale:
    """The values of a metric: strengths on the margins, else harm in the metric's own unit. Positive is worse.

    Positions, of colours too, are `arcsinh(value / width)`, 1 at `limit`: one per cent and twenty can both be seen.
    They are the same for all runs and steps, so that pictures can be compared.

    Args:
        matters, equivalent: tau and epsilon; for strengths alone.
    """

    metric: str = words.PRIMARY_METRIC
    matters: float = words.MATTERS
    equivalent: float = words.EQUIVALENT

    @property
    def is_strength(self) -> bool:
        return self.metric in words.MARGINS

    @property
    def is_share(self) -> bool:
        """Whether values are written as per cents."""
        return self.is_strength or self.metric == "accuracy"

    @property
    def title(self) -> str:
        name = words.METRIC_TITLES[self.metric]
        if self.is_strength:
            return f"strength (% of the clean {name})"
        return "fall of accuracy (points)" if self.is_share else f"rise of {name} (nats)"

    @property
    def short_title(self) -> str:
        return f"{self.word} (%)" if self.is_strength else self.title

    @property
    def word(self) -> str:
        """What a value is called."""
        return "strength" if self.is_strength else self.title.split(" (")[0]

    @property
    def width(self) -> float:
        return 0.01

    @property
    def limit(self) -> float:
        return 1.0 if self.is_share else 10.0

    def position(self, values: Any) -> Any:
        return np.arcsinh(np.asarray(values, dtype=float) / self.width) / np.arcsinh(self.limit / self.width)

    def at(self, positions: Any) -> Any:
        """The values at these positions."""
        return self.width * np.sinh(np.asarray(positions, dtype=float) * np.arcsinh(self.limit / self.width))

    def span(self, values: Iterable[float], headroom: float = 0.0) -> tuple[float, float]:
        """The ends of an axis that holds the finite ones of `values`, zero and what matters, `headroom` a share of it.

        It ends at four times `limit`, whatever the values.
        """
        most = [0.0, -0.02 * self.limit, 2 * self.matters * self.limit, *values]
        ends = [self.position(np.clip(end, -4 * self.limit, 4 * self.limit)) for end in finite_range(most)]
        room = 0.05 * (ends[1] - ends[0])
        low, high = ends[0] - room, ends[1] + room
        return float(self.at(low)), float(self.at(high + (high - low) * headroom / (1 - headroom)))

    def ticks(self, low: float = -math.inf, high: float = math.inf) -> list[float]:
        """Where an axis from `low` to `high`, or a colour bar, is marked."""
        sizes = (0.01, 0.05, 0.2, 0.8) if self.is_share else (0.01, 0.1, 1.0, 10.0)
        marks = [0.0, *sizes, *(-size for size in sizes), *([4.0, -4.0] if self.is_share else [])]
        return sorted(mark for mark in marks if low <= mark <= high)

    def tick_text(self, value: float) -> str:
        return f"{100 * value if self.is_share else value:g}".replace("-", "−")

    def text(self, value: float) -> str:
        """A number without its unit, in at most four characters and a sign; empty for NaN."""
        if math.isnan(value):
            return ""
        number = 100 * value if self.is_share else value
        digits = (1 if abs(number) < 99.95 else 0) if self.is_share else (2 if abs(number) < 9.995 else 1)
        return f"{number:z.{digits}f}".replace("-", "−")

    def interval(self, value: float, low: float, high: float) -> str:
        """A number with its interval and unit."""
        unit = " %" if self.is_strength else " points" if self.is_share else " nats"
        ends = [self.text(end) if math.isfinite(end) else "∞" if end > 0 else "−∞" for end in (low, high)]
        return f"{self.text(value)}{unit} [{', '.join(ends)}]"


def view_cells(effects: pd.DataFrame, metric: str = words.PRIMARY_METRIC) -> pd.DataFrame:
    """The primary intervention's cells, exact and estimated: the columns `KEPT` and

    - `harm`, `harm_low`, `harm_high`: in the metric's own unit, positive where the model is worse off.
    - `value`, `low`, `high`: what is drawn: the strength on the margins, else the harm. NaN where there is none.
    - `status`: why a cell is not like others: "not applicable", "no strength: " and the reason, "below the floor"
      (which has a value: zero but for rounding), or "".
    - `matters`: whether it is a finding: harm above tau of the margin, and for other metrics, harm above zero
      (adjusted for the grid).
    - `aliased`: whether all of its reads are, so that masking has no effect by construction.
    """
    rows = pd.concat([words.primary_rows(effects, metric, kind) for kind in (words.MASK, words.MASK_INTEGRATED)])
    harm = words.harm_sign(metric) * rows[["effect", "ci_low", "ci_high"]].to_numpy(float)
    harm[:, 1:] = np.sort(harm[:, 1:], axis=1)
    is_strength = metric in words.MARGINS
    values = rows[["strength", "strength_low", "strength_high"]].to_numpy(float) if is_strength else harm
    applicable = rows["applicable"].to_numpy(bool)
    lacks = is_strength & (rows["no_strength"] != "").to_numpy(bool)
    kinds = [~applicable, lacks, rows["below_floor"].to_numpy(bool)]
    reasons = [NOT_APPLICABLE, (f"{NO_STRENGTH}: " + rows["no_strength"]).to_numpy(), BELOW_FLOOR]
    above, p_value = harm[:, 0] > 0, rows["p_matters" if is_strength else "p_adjusted"]
    return rows[KEPT].assign(
        **dict(zip(HARM, harm.T, strict=True)),
        **dict(zip(VALUE, np.where(applicable[:, None], values, np.nan).T, strict=True)),
        status=np.select(kinds, reasons, ""),
        matters=above & (p_value <= words.LEVEL).to_numpy(bool),
        aliased=applicable & (rows["n_unaliased_reads"] == 0).to_numpy(bool),
    )


COLORS = {"mass": "Purples", "value": "RdBu_r"}
"""Matplotlib's names of the colours of heat maps."""


@dataclass(frozen=True)
class HeatMap:
    """Places (sublayer, scope), from the top, by families. `cells` has a row for each place and family, in order."""

    unit: str
    integrated: bool
    places: list[tuple[str, str]]
    cells: pd.DataFrame

    def table(self, column: str) -> np.ndarray:
        """(places, families) of a column."""
        return self.cells[column].to_numpy().reshape(len(self.places), len(words.FAMILIES))

    @property
    def titles(self) -> list[str]:
        return [place_title(*place) for place in self.places]


def place_title(sublayer: str, scope: str) -> str:
    """As in "attention early"."""
    return words.scope_title(scope) if scope == words.FINAL else f"{words.SUBLAYER_TITLES[sublayer]} {_short(scope)}"


def _short(scope: str) -> str:
    return str(words.layer_of(scope)) if words.is_layer(scope) else scope


def heat_maps(cells: pd.DataFrame) -> list[HeatMap]:
    """Of the cells of one probe: by region, and by layer, what of it was probed; each exact where it can be."""
    known = words.present(cells["sublayer"], words.READ_SUBLAYERS) or words.present(cells["sublayer"], [words.BOTH])
    cells = cells[cells["sublayer"].isin(known)]
    found = []
    for unit, rows in (("region", words.wide(cells)), ("layer", words.by_layer(cells))):
        if len(rows := exact_if_any(rows)):
            scopes = words.sort_scopes(rows["scope"])
            probed = set(rows[["sublayer", "scope"]].itertuples(index=False, name=None))
            places = [(sublayer, scope) for sublayer in known for scope in scopes if (sublayer, scope) in probed]
            wanted = pd.MultiIndex.from_tuples([(*place, f) for place in places for f in words.FAMILIES])
            whole = rows.set_index(words.ROUTE).reindex(wanted.set_names(words.ROUTE)).reset_index()
            whole["status"] = whole["status"].fillna(NOT_PROBED)
            whole["hover"] = whole["hover"].fillna(NOT_PROBED) if "hover" in whole else ""
            whole = whole.assign(**{name: whole[name].eq(True) for name in ("matters", "aliased")})
            found.append(HeatMap(unit, bool((rows["kind"] != words.MASK).all()), places, whole))
    return found


def exact_if_any(rows: pd.DataFrame) -> pd.DataFrame:
    """The exact rows, or where there are none the estimates: never both."""
    exact = rows[rows["kind"] == words.MASK]
    return rows if exact.empty else exact


@dataclass(frozen=True)
class Probe:
    """One probe of a run."""

    step: int
    stage: str
    cells: pd.DataFrame

    @property
    def when(self) -> str:
        """Which probe it is, in words."""
        step = "a step that is not known" if self.step < 0 else f"step {self.step}"
        return f"{step}, {'final probe' if self.stage == AT_THE_END else 'probe in training'}"


@dataclass(frozen=True)
class View:
    """What is shown of a run on one metric. `name`: of the run, as no other one is called."""

    run: ProbedRun
    name: str = ""
    metric: str = words.PRIMARY_METRIC

    @cached_property
    def scale(self) -> Scale:
        return Scale(self.metric, *(self.run.summary["probe"][name] for name in ("matters", "equivalent")))

    @cached_property
    def cells(self) -> pd.DataFrame:
        """`view_cells` of all its probes, and the `stage` of each."""
        parts = [view_cells(rows, self.metric).assign(stage=stage) for stage, rows in by_stage(self.run).items()]
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def probes(self) -> list[Probe]:
        """By step. Where a step was probed at both stages, the final probe, which rests on more sequences."""
        found = {
            int(step): Probe(int(step), stage, rows)  # type: ignore[arg-type]
            for stage in (IN_TRAINING, AT_THE_END)
            for step, rows in self.cells[self.cells["stage"] == stage].groupby("step")
        }
        return [found[step] for step in sorted(found)]

    def at(self, step: int) -> Probe:
        """The latest probe at or before `step`, or the first where all are later."""
        return next((probe for probe in reversed(self.probes) if probe.step <= step), self.probes[0])

    @cached_property
    def curves(self) -> pd.DataFrame:
        """Cells of wide scopes at the steps probed in training, all of one kind: exact where two steps have them.

        Steps that cannot be compared are left out. `of_final`: the harm as a share of the last step's margin, which
        exists where there is no strength; NaN for other metrics, and where that margin is not positive.
        """
        rows = words.wide(self.cells[self.cells["stage"] == IN_TRAINING])
        rows = rows[rows["sublayer"].isin(words.READ_SUBLAYERS)]
        exact = rows[rows["kind"] == words.MASK]
        if self.run.emergence is not None:
            exact = exact[exact["step"].isin(self.run.emergence.accuracy["step"])]
        estimates = rows[rows["kind"] != words.MASK]
        rows = (exact if exact["step"].nunique() > 1 or estimates.empty else estimates).sort_values("step")
        final = rows["clean"].iloc[-1] if len(rows) and self.scale.is_strength else math.nan
        return rows.assign(of_final=rows["harm"] / final if final > 0 else math.nan)

    @property
    def is_saturated(self) -> bool:
        """Whether values hardly move until an ablation costs the whole margin."""
        return not self.scale.is_strength and bool(self.run.summary["clean"]["saturated"])

    @cached_property
    def accuracy(self) -> pd.DataFrame:
        """Clean `accuracy` by stage and step, with `low` and `high` where sequences were kept."""
        tables = [rows[rows["metric"] == "accuracy"].assign(stage=stage) for stage, rows in by_stage(self.run).items()]
        found = pd.concat(tables).groupby(["stage", "step"], sort=False)["clean"].first().to_frame("accuracy")
        if self.run.emergence is None:
            return found.assign(low=math.nan, high=math.nan)
        ends = self.run.emergence.accuracy[["step", "low", "high"]].assign(stage=IN_TRAINING)
        return found.join(ends.set_index(["stage", "step"]))

    def logged(self, name: str) -> pd.Series:
        """While training, by step: "accuracy" on the validation split, or "size". Empty if it was not logged."""
        return pd.Series(dtype=float) if self.run.curves is None else self.run.curves[name].dropna()


def by_stage(run: ProbedRun) -> dict[str, pd.DataFrame]:
    """Effects by stage. A table of one step alone is a final probe: those in training begin with step 0."""
    effects = run.training_effects
    if effects is None or effects["step"].nunique() == 1:
        return {AT_THE_END: run.effects}
    is_all = run.training == run.results
    return {IN_TRAINING: effects} if is_all else {IN_TRAINING: effects, AT_THE_END: run.effects}


def names_of(runs: Sequence[ProbedRun]) -> list[str]:
    """A name for each run: its folder, condition and seed; and its path where others are called so."""
    names = [printable(f"{run.directory.resolve().name} ({run.condition}, seed {run.seed})") for run in runs]
    return [
        name if names.count(name) == 1 else f"{name}, {printable(str(run.directory))}"
        for name, run in zip(names, runs, strict=True)
    ]


def finite_range(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest of those that are finite."""
    finite = [value for value in values if np.isfinite(value)]
    return min(finite), max(finite)

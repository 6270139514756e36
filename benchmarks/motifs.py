"""Are the study's motifs there? Five seeds of the demo's models, at the end and at matched accuracy.

    attnres-train study --config configs/motifs.yaml --dir runs/motifs
    python -m benchmarks.motifs runs/motifs

1. Find the step of each model's trail whose accuracy is nearest to the study's 54 %, on sequences of the split
   `placement`, which no probe uses.
2. Probe that step and the last one: masks, keep only, their controls, coalitions, and where sources share content the
   increments. Called again, it goes on where it was.
3. Record each route's strength at both, when motifs emerged, and the claims; over seeds, means with 95 % intervals.

docs/motifs.md has the tables (`python -m benchmarks.tables`). With `--config configs/additive.yaml` and
`--output benchmarks/results/additive.json` it is the study of docs/additive.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from attnres.tasks import MQAR
from benchmarks.record import add
from probe.ablation.necessity import Zero
from probe.ablation.sufficiency import Silence
from probe.analysis import stats
from probe.analysis.roles import Roles
from probe.cli import main as attnres_probe
from probe.examples.examples import Examples
from probe.examples.flip import recall_accuracy
from probe.files.checkpoints import load_model
from probe.files.layout import FINAL_PROBE, PROBE, SUMMARY, TRAIL
from probe.files.runs import ProbedRun, load_run
from probe.files.trail import Trail
from probe.runner import measure
from probe.settings import ProbeSettings
from probe.vocabulary import ALL, BOTH, MARGIN, MASK, SUBLAYER_TITLES, Route, by_region, primary_rows, routes_of
from train.study.description import StudyRun, load_study

CONFIG = Path("configs/motifs.yaml")
RECORD = Path(__file__).parent / "results" / "motifs.json"
MATCHED_ACCURACY = 0.54
"""Of the study's model (arXiv:2606.13168)."""
NUM_SEQUENCES = 64
KINDS = ("mask_renormalise", "matched_mass", "keep_only", "keep_random")
OTHER_KINDS = {"cumulative": ("increment",), "delta_block": ("silence", "zero")}
"""By `attnres_source`. Where routes are added to the stream, `silence` takes all of them away and `zero` one, without
giving its weight to the others."""
OPTIONS = ["--coalitions", "[all]", "--sublayers", "[self_attn,mlp]", "--scopes", "[early,middle,late,all]"]
OPTIONS += ["--num_sequences", str(NUM_SEQUENCES)]
NUM_BLOCKS = "4"
"""Of the wrapper around a vanilla model: the demo's."""


@dataclass(frozen=True)
class Model:
    """One run of the study, and where its probes go."""

    run: StudyRun

    @property
    def final(self) -> Path:
        """A run directory, which has the probes of its training, too."""
        return self.run.probed

    @property
    def matched(self) -> Path:
        return self.run.directory.with_name(f"{self.run.name}-matched")

    @cached_property
    def matched_step(self) -> int:
        """The step of the trail whose accuracy is nearest to `MATCHED_ACCURACY`; of several, the earliest."""
        trail = Trail(self.run.directory)
        return min(trail.steps, key=lambda step: abs(accuracy_of(trail, step) - MATCHED_ACCURACY))

    def probe(self) -> None:
        """Whatever of the two probes has not ended."""
        last = self.final / PROBE if self.run.is_vanilla else self.final / PROBE / FINAL_PROBE
        if not (last / SUMMARY).exists():
            self._probe(self.run.directory, self.final if self.run.is_vanilla else last)
        if not any(self.matched.rglob(SUMMARY)):
            self._probe(self.run.directory / TRAIL / f"step_{self.matched_step}", self.matched)

    def _probe(self, checkpoint: Path, output: Path) -> None:
        if self.run.is_vanilla:
            attnres_probe(["baseline", str(checkpoint), "--num_blocks", NUM_BLOCKS, *_options(output, KINDS)])
            return
        source = load_model(str(checkpoint)).model.config.attnres_source
        attnres_probe(["run", str(checkpoint), *_options(output, (*KINDS, *OTHER_KINDS.get(source, ())))])


def _options(output: Path, kinds: Iterable[str]) -> list[str]:
    return ["--output", str(output), "--kinds", f"[{','.join(kinds)}]", *OPTIONS]


def accuracy_of(trail: Trail, step: int) -> float:
    """Of all K pairs, on the first sequences of the split `placement`."""
    found = trail.load(step)
    assert isinstance(found.task, MQAR)
    examples = Examples.from_batch(found.task.batch("placement", range(NUM_SEQUENCES)))
    return recall_accuracy(found.model, examples, NUM_SEQUENCES)


def without_routing(run: StudyRun) -> dict[str, Any]:
    """What is left of an additive model at its last step when nothing is added at any read; {} of other models."""
    found = load_model(str(run.directory))
    model: Any = found.model
    assert isinstance(found.task, MQAR)
    if not model.config.is_additive:
        return {}
    examples = Examples.from_batch(found.task.batch("probe", range(NUM_SEQUENCES)))
    settings = ProbeSettings(kinds=(Silence.kind,), sublayers=(BOTH,), scopes=(ALL,), positions=("all",))
    rows = measure(model, examples, settings).effects.set_index("metric")
    margin, accuracy = rows.loc[MARGIN], rows.loc["accuracy"]
    strength = {name: margin[name] for name in ("strength", "strength_low", "strength_high")}
    return {"without_routing": strength | {"accuracy": accuracy["clean"] + accuracy["effect"]}}


def describe(probed: ProbedRun) -> dict[str, Any]:
    """What the probe of one step found."""
    clean, motifs = probed.summary["clean"], {Route.of(motif) for motif in probed.summary["motifs"]}
    columns = ["strength", "strength_low", "strength_high", "mass", "p_adjusted", "p_matters"]

    def by_route(kind: str) -> dict[str, dict[str, Any]]:
        rows = by_region(primary_rows(probed.effects, kind=kind))
        return {
            str(route): {name: row[name] for name in columns}
            for route, row in zip(routes_of(rows), rows.to_dict("records"), strict=True)
            if row["applicable"]
        }

    silenced = primary_rows(probed.effects, kind=Silence.kind)
    roles = Roles(probed.effects, probed.clusters, probed.coalitions, probed.summary).families()
    return {
        "step": probed.summary["step"],
        "accuracy": clean["accuracy"],
        "margin": clean["logit_diff"],
        "routes": {name: row | {"motif": name in map(str, motifs)} for name, row in by_route(MASK).items()},
        "zero": by_route(Zero.kind),
        "silence": {
            f"{row['scope']} {SUBLAYER_TITLES[row['sublayer']]}": {name: row[name] for name in columns}
            for row in silenced.to_dict("records")
        },
        "dissociation": {
            sublayer: {
                **{name: about[name] for name in ("heaviest", "most_harmful", "dissociated")},
                "mass": about["mass"],
                "strength": about["strength"],
            }
            for sublayer, about in probed.summary["dissociation"].items()
        },
        "mass_without_role": [
            {**asdict(role.route), "mass": role.mass, "has_none": role.has_none, "failed": role.failed}
            | {"not_tested": role.missing}
            for role in roles
        ],
        "verdicts": {claim.claim: claim.verdict for claim in probed.claims},
    }


def describe_emergence(probed: ProbedRun) -> dict[str, Any]:
    """When routes became motifs while the model trained, and their largest strength."""
    if probed.emergence is None:
        return {}
    columns = ["status", "onset", "onset_low", "onset_high", "last_held", "n_held", "n_probes", "peak", "peak_step"]
    found = {}
    for row in probed.emergence.table.to_dict("records"):
        curve = probed.emergence.curves
        curve = curve[[Route.of(other) == Route.of(row) for other in curve.to_dict("records")]].set_index("step")
        at_peak = curve["strength"].get(row["peak_step"], np.nan)
        found[str(Route.of(row))] = {name: row[name] for name in columns} | {"strength_at_peak": at_peak}
    half = float(probed.emergence.table["accuracy_half"].iloc[0])
    return {"accuracy_half": half, "routes": found}


def over_seeds(seeds: list[dict[str, Any]], when: str) -> dict[str, Any]:
    """By route: the mean strength over seeds with its t interval, and in how many seeds the route is a motif.

    A route that some seed cannot mask, or has no strength of, is left out.
    """
    names = [name for name in seeds[0][when]["routes"] if all(name in seed[when]["routes"] for seed in seeds)]
    strengths = np.array([[seed[when]["routes"][name]["strength"] for name in names] for seed in seeds], dtype=float)
    mean, low, high, p_value = stats.across_seeds(strengths)
    adjusted = stats.holm(p_value)
    return {
        name: {"mean": mean[i], "low": low[i], "high": high[i], "p_adjusted": adjusted[i], "n_seeds": len(seeds)}
        | {"n_motif": sum(seed[when]["routes"][name]["motif"] for seed in seeds)}
        for i, name in enumerate(names)
        if np.isfinite(mean[i])
    }


def collect(models: list[Model]) -> dict[str, Any]:
    conditions: dict[str, Any] = {}
    for model in models:
        final, matched = load_run(model.final), load_run(model.matched)
        found = {"seed": model.run.seed, "final": describe(final), "matched": describe(matched)}
        name = "wrapped" if model.run.is_vanilla else model.run.condition
        seeds = conditions.setdefault(name, {"seeds": []})["seeds"]
        if not model.run.is_vanilla:
            found |= {"emergence": describe_emergence(final), **without_routing(model.run)}
        seeds.append(found)
    for about in conditions.values():
        about["over_seeds"] = {when: over_seeds(about["seeds"], when) for when in ("final", "matched")}
    return conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="Of the study.")
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--output", type=Path, default=RECORD)
    options, started = parser.parse_args(), time.perf_counter()
    models = [Model(run) for run in load_study(options.config).runs(options.directory)]
    for model in models:
        model.probe()
    code = load_run(models[0].final).summary["code"]["commit"]
    about = {"config": str(options.config), "options": OPTIONS, "matched_accuracy": MATCHED_ACCURACY, "code": code}
    add(options.output, "motifs", rounded(collect(models)), time.perf_counter() - started, **about)


def rounded(value: Any) -> Any:
    """Plain numbers of six digits, and None for those that are not there."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


if __name__ == "__main__":
    main()

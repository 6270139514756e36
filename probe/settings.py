"""The settings of a probe, once: command-line options, YAML keys and arguments in Python are made from these classes.

This file imports nothing heavy, so that `--help` is quick; names are checked when a settings object is made.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

MIN_SEQUENCES, MIN_QUERIES = 64, 1024
MOST_RESAMPLES = 100_000
FEWEST_CONTEXTS = 8
"""Of a curve."""
CURVE_NAMES = ("flip", "trace", "heads")
"""Kinds of curves that can be asked for."""
NAMED = ("kinds", "families", "sublayers", "scopes", "positions", "coalitions")
"""The settings that are lists of names."""


@dataclass(frozen=True)
class ProbeSettings:
    """What to ablate, how, and on how much data.

    Args:
        num_sequences: Sequences of the probe split, at the task's full K; each is one cluster. null for the fewest
            that a probe in training may have: 64, and 1,024 queries; of prompts, null for all that there are.
        kinds: Interventions: mask_renormalise, zero, mean, resample, uniform, increment, patch_weights, matched_mass,
            keep_only, keep_random, silence, rescue, or module.Class for one of your own.
        families: Source families to ablate: embedding, current, prev_completed, older. Kinds that act on several
            families at once are not restricted by it.
        sublayers: Reads to ablate: those of self_attn, of mlp, and both together.
        scopes: Where exact ablations act: early, middle, late, all, layer:0 and so on, final. null for every one.
        positions: Where in the sequence to act: at all positions, and at query positions only.
        with_aliases: Also ablate each family together with the sources that are the same tensor.
        mode: exact ablations, estimates of their effects by integrated gradients (cheaper where layers are many, in
            every scope), or both. keep_only, keep_random, silence and rescue have exact ones only.
        coalitions: Scopes at which every subset of the families is masked, for Shapley values and interactions.
        flip: Also run the flip test. In training: after the last step only.
        batch_size: Sequences per clean run.
        tokens_per_pass: Most tokens of one ablated forward pass, which bounds memory. null for a default by device.
        matters: tau, the share of the clean margin from which a cell matters.
        equivalent: epsilon, the share of the clean margin within which a cell is equivalent to zero.
        num_resamples: Bootstrap resamples and sign flips, at most 100,000.
        seed: Of resamples, flips, partners, draws and the flip test's changes.

    Raises:
        ValueError: a name that does not exist or is there twice, or a number that is out of range.
    """

    num_sequences: int | None = 256
    kinds: tuple[str, ...] = ("mask_renormalise",)
    families: tuple[str, ...] = ("embedding", "current", "prev_completed", "older")
    sublayers: tuple[str, ...] = ("self_attn", "mlp", "both")
    scopes: tuple[str, ...] | None = None
    positions: tuple[str, ...] = ("all", "query")
    with_aliases: bool = False
    mode: Literal["exact", "integrated", "both"] = "exact"
    coalitions: tuple[str, ...] = ()
    flip: bool = True
    batch_size: int = 64
    tokens_per_pass: int | None = None
    matters: float = 0.05
    equivalent: float = 0.01
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        from attnres.inputs import LARGEST_INTEGER, check_number, first_repeated
        from probe.ablation.interventions import find_kind
        from probe.vocabulary import ABLATED_SUBLAYERS, FAMILIES, POSITIONS, check_names

        for name in NAMED:
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))  # frozen, and lists are welcome
            if not value and name != "coalitions" and (name, value) != ("scopes", None):
                raise ValueError(f"{name} must name at least one")
        kinds = tuple(find_kind(name) for name in self.kinds)
        object.__setattr__(self, "kinds", tuple(kind.kind for kind in kinds))
        for name in NAMED:
            if repeated := first_repeated(getattr(self, name) or ()):
                raise ValueError(f"{name} names '{repeated}' twice: name it once")
        check_names("family", self.families, FAMILIES)
        check_names("sublayer", self.sublayers, ABLATED_SUBLAYERS)
        check_names("positions", self.positions, POSITIONS)
        check_names("mode", [self.mode], ("exact", "integrated", "both"))
        check_resampling(self.num_resamples, self.seed)
        for name in ("num_sequences", "batch_size", "tokens_per_pass"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, 1, LARGEST_INTEGER)
        if not 0 < self.equivalent < self.matters < 1:
            raise ValueError(f"0 < equivalent < matters < 1 must hold, got {self.equivalent} and {self.matters}")
        if self.num_sequences == 1 and any(kind.needs == "partner" for kind in kinds):
            raise ValueError(
                "num_sequences must be at least 2 for kinds that take another example's content or weights"
            )

    @property
    def exact(self) -> bool:
        """Whether the exact sweep is run."""
        return self.mode != "integrated"

    @property
    def integrated(self) -> bool:
        """Whether effects are estimated by integrated gradients."""
        return self.mode != "exact"


@dataclass(frozen=True)
class TrainingProbeSettings(ProbeSettings):
    """When a model in training is probed, and how.

    Step 0 and the last step are always probed. The last probe is exact whatever the mode, and of all scopes.

    Args:
        num_sequences: Sequences per probe; null for the fewest allowed: 64, and 1,024 queries. All probes are of the
            same sequences, so that they can be paired.
        scopes: Where exact ablations act; null for early, middle, late, all, and the final read where there is one.
        enabled: Probe at all.
        every_n_steps: Steps between evenly spaced probes; 0 for none.
        log_spaced: Also probe at steps 1, 2, 4, 8 and so on.
        at_steps: Also probe at these steps.
        accuracy_jump: Also probe when validation accuracy has risen by this much since the last probe; 0 for never.
        trail_probes: Steps of the trail, if there is one, that are probed in all by the end of training: where most
            happens. 0 for none after training.
        stop_when_settled: End training when the task is learned and the motifs, at least one, stay the same.
        settled_probes: For how many probes in a row they must stay the same.
        curves: Kinds of curves that are measured when training has ended, on as many steps of the trail: flip, trace,
            heads.
            Vanilla models have them, too.
    """

    num_sequences: int | None = None
    sublayers: tuple[str, ...] = ("self_attn", "mlp")
    positions: tuple[str, ...] = ("all",)
    enabled: bool = True
    every_n_steps: int = 50
    log_spaced: bool = True
    at_steps: tuple[int, ...] | None = None
    accuracy_jump: float = 0.1
    trail_probes: int = 24
    stop_when_settled: bool = False
    settled_probes: int = 5
    curves: tuple[str, ...] = ("flip",)

    def __post_init__(self) -> None:
        from attnres.inputs import LARGEST_INTEGER, check_number

        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"probe: {error}") from error
        object.__setattr__(self, "at_steps", tuple(self.at_steps or ()))
        object.__setattr__(self, "curves", check_curves("probe.curves", self.curves))
        for name, least in (("every_n_steps", 0), ("trail_probes", 0), ("settled_probes", 1)):
            check_number(f"probe.{name}", getattr(self, name), least, LARGEST_INTEGER)
        check_number("probe.accuracy_jump", self.accuracy_jump, 0, 1)
        for step in self.at_steps or ():
            check_number("probe.at_steps", step, 0, LARGEST_INTEGER)
        if self.num_sequences is not None and self.num_sequences < MIN_SEQUENCES:
            raise ValueError(f"probe.num_sequences must be at least {MIN_SEQUENCES}, got {self.num_sequences}")
        if self.stop_when_settled and not self.finds_motifs:
            raise ValueError(
                "probe.stop_when_settled waits for motifs, which need exact ablations of early, middle and late at all "
                "positions: see probe.mode, probe.kinds, probe.scopes, probe.positions and probe.sublayers"
            )

    @property
    def of_curves(self) -> CurveSettings:
        """The curves that are measured on the trail."""
        how = {name: getattr(self, name) for name in ("batch_size", "num_resamples", "seed")}
        return CurveSettings(self.curves, max(self.trail_probes, 1), **how)

    @property
    def finds_motifs(self) -> bool:
        """Whether probes with these settings can find motifs."""
        has_regions = self.scopes is None or {"early", "middle", "late"} <= set(self.scopes)
        has_sublayers = not {"self_attn", "mlp"}.isdisjoint(self.sublayers)
        masks = "mask_renormalise" in self.kinds and "all" in self.positions
        return self.exact and masks and has_regions and has_sublayers


@dataclass(frozen=True)
class CurveSettings:
    """What curves of behaviour and flow are measured through training, and on what.

    Args:
        kinds: Kinds of curves: flip (whether the output follows a changed value), trace (by which sites it does), heads
            (what each is worth). Accuracy is measured beside any.
        num_steps: Steps of the trail to have been measured in all, where most happens.
        num_sequences: Contexts of the probe split.
        batch_size: Contexts of a forward pass.
        num_resamples: Bootstrap resamples.
        seed: Of changes and resamples.

    Raises:
        ValueError: a name that does not exist or is there twice, or a number that is out of range.
    """

    kinds: tuple[str, ...] = ("flip", "trace")
    num_steps: int = 24
    num_sequences: int = MIN_SEQUENCES
    batch_size: int = 64
    num_resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        from attnres.inputs import LARGEST_INTEGER, check_number

        object.__setattr__(self, "kinds", check_curves("kinds", self.kinds))
        for name, least in (("num_steps", 1), ("num_sequences", FEWEST_CONTEXTS), ("batch_size", 1)):
            check_number(name, getattr(self, name), least, LARGEST_INTEGER)
        check_resampling(self.num_resamples, self.seed)


def check_curves(name: str, kinds: Iterable[str]) -> tuple[str, ...]:
    """`kinds` of curves, which the setting `name` holds, as a tuple.

    Raises:
        ValueError: one does not exist, or is there twice.
    """
    from attnres.inputs import first_repeated
    from probe.vocabulary import check_names

    kinds = tuple(kinds)
    check_names(f"{name}: the kind of curve", kinds, CURVE_NAMES)
    if repeated := first_repeated(kinds):
        raise ValueError(f"{name} names '{repeated}' twice: name it once")
    return kinds


@dataclass(frozen=True)
class TrailSettings:
    """Of which steps a run in training keeps the weights, so that any of them can be probed later.

    Args:
        every_n_steps: Steps between those whose weights are kept, step 0 and the last one among them; 0 for no trail.
        until_step: The last step, besides the very last one, that is kept; null for all steps.

    Raises:
        ValueError: a number that is out of range.
    """

    every_n_steps: int = 0
    until_step: int | None = None

    def __post_init__(self) -> None:
        from attnres.inputs import LARGEST_INTEGER, check_number

        for name in ("every_n_steps", "until_step"):
            check_number(f"trail.{name}", getattr(self, name) or 0, 0, LARGEST_INTEGER)

    def names(self, step: int, max_steps: int) -> bool:
        """Whether the weights after `step` of `max_steps` steps are kept."""
        if not self.every_n_steps:
            return False
        is_late = self.until_step is not None and step > self.until_step
        return step == max_steps or (step % self.every_n_steps == 0 and not is_late)

    def steps(self, max_steps: int) -> list[int]:
        """All that `names` names, in order."""
        if not self.every_n_steps:
            return []
        last = max_steps if self.until_step is None else min(self.until_step, max_steps)
        return sorted({*range(0, last + 1, self.every_n_steps), max_steps})


def check_resampling(num_resamples: int, seed: int) -> None:
    """Raise a ValueError for numbers that no bootstrap can be made of."""
    from attnres.inputs import LARGEST_INTEGER, check_number

    check_number(
        "num_resamples", num_resamples, 1, MOST_RESAMPLES, "that tells p-values apart down to a hundred-thousandth"
    )
    check_number("seed", seed, 0, LARGEST_INTEGER)


def fewest_sequences(num_queries: int) -> int:
    """The fewest sequences of so many queries that a probe in training may have."""
    return max(MIN_SEQUENCES, math.ceil(MIN_QUERIES / num_queries))

"""Interventions on a read (`attnres.Intervention`), one small class for each kind.

`probe.ablation.necessity` asks what a model loses without a family, `probe.ablation.sufficiency` what one does alone.

Your own is a subclass of `Ablation` with a `kind` and the method `ablated`. Defining the class makes its kind known:

    class Halve(Ablation):
        kind = "halve"

        def ablated(self, read):
            members = self.members(read)
            weights = torch.where(members, read.routing_weights / 2, read.routing_weights)
            return read._replace(routing_weights=weights), everywhere(read)

Settings name it by its kind, or, where nothing has imported it yet, by its place: `kinds: [my_module.Halve]`.
"""

from __future__ import annotations

import importlib
import os
import sys
from inspect import isabstract

from probe.ablation.base import MIN_REMAINING, Ablation, Context, Together, everywhere, source_mask
from probe.ablation.necessity import (
    Coalition,
    Increment,
    MaskRenormalise,
    MatchedMass,
    Mean,
    PatchWeights,
    Resample,
    Uniform,
    Zero,
)
from probe.ablation.sufficiency import KeepOnly, KeepRandom, Rescue, Silence
from probe.vocabulary import check_names

__all__ = [
    "MIN_REMAINING",
    "Ablation",
    "Coalition",
    "Context",
    "Increment",
    "KeepOnly",
    "KeepRandom",
    "MaskRenormalise",
    "MatchedMass",
    "Mean",
    "PatchWeights",
    "Resample",
    "Rescue",
    "Silence",
    "Together",
    "Uniform",
    "Zero",
    "everywhere",
    "find_kind",
    "grid_kinds",
    "source_mask",
]


def grid_kinds() -> tuple[str, ...]:
    """The kinds that a grid can be made of, your own among them."""
    return tuple(kind for kind, cls in Ablation.known.items() if not cls.is_game)


def find_kind(name: str) -> type[Ablation]:
    """The class of a kind: its `kind`, or the place of a class of your own, as in my_module.Halve.

    Raises:
        ValueError: there is no such kind, or no such class there.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        check_names("kind", [name], grid_kinds())
        return Ablation.known[name]
    if os.getcwd() not in sys.path:  # a console script does not look beside itself
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # importing runs a module of the user's, which may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"kind '{name}' cannot be imported ({reason}): give module.Class") from error
    if not (isinstance(found, type) and issubclass(found, Ablation) and "kind" in vars(found)):
        raise ValueError(f"kind '{name}' must be a subclass of probe.Ablation with a `kind` of its own")
    if isabstract(found):
        raise ValueError(f"kind '{name}' must define {', '.join(sorted(found.__abstractmethods__))}")
    return found

"""What a trace runs on: pairs of sequences, clean and with the addressed value flipped, and the answer of each.

clean_ids       k1 v1 k2 v2 k1 k2        position 4, answer v1
corrupted_ids   k1 w  k2 v2 k1 k2        position 4, flipped_answer w
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Positions = Sequence[int] | Mapping[str, Any] | None
"""Where to patch. `None`: every position by itself. Numbers: these, each by itself. By name: a position, (sequences,)
positions, or a (sequences, seq) bool mask of positions that are patched together."""


@dataclass(frozen=True)
class Flips:
    """Pairs of sequences that differ by a flip. Padding comes after `position`, where a causal model never sees it.

    Everything is kept on the CPU; a trace moves what it runs.

    Args:
        clean_ids, corrupted_ids: (sequences, seq) token ids.
        position: (sequences,) where the answer is asked for; one number for all.
        answer, flipped_answer: (sequences,) the right answer before and after the flip.
        clusters: (sequences,) the cluster that each belongs to, numbered from 0 without a gap, which is the unit of
            all statistics; `None`: each is one of its own.

    Raises:
        ValueError: shapes or positions do not fit, or a flip changes nothing.
    """

    clean_ids: Tensor
    corrupted_ids: Tensor
    position: Tensor
    answer: Tensor
    flipped_answer: Tensor
    clusters: Tensor | None = None

    def __post_init__(self) -> None:
        clean, corrupted = self.clean_ids, self.corrupted_ids
        for name, ids in (("clean_ids", clean), ("corrupted_ids", corrupted)):
            if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.dtype != torch.long:
                raise ValueError(f"{name} must be an int64 tensor (sequences, seq), not empty")
        if clean.shape != corrupted.shape:
            raise ValueError(f"clean_ids are {tuple(clean.shape)}, corrupted_ids {tuple(corrupted.shape)}")
        object.__setattr__(self, "clean_ids", clean.cpu())
        object.__setattr__(self, "corrupted_ids", corrupted.cpu())
        for name in ("position", "answer", "flipped_answer"):
            object.__setattr__(self, name, per_sequence(name, getattr(self, name), len(clean)))
        if self.clusters is None:
            object.__setattr__(self, "clusters", torch.arange(len(clean)))
        else:
            object.__setattr__(self, "clusters", per_sequence("clusters", self.clusters, len(clean)))
        self._check_values()

    def _check_values(self) -> None:
        length = self.clean_ids.shape[1]
        for number, position in enumerate(self.position.tolist()):
            if not 0 <= position < length:
                raise ValueError(f"sequence {number}: position {position} is out of range, there are {length} tokens")
        for number, (answer, flipped) in enumerate(
            zip(self.answer.tolist(), self.flipped_answer.tolist(), strict=True)
        ):
            if answer == flipped:
                raise ValueError(
                    f"sequence {number}: the flip changes nothing, its answer is {answer} before and after"
                )
        unchanged = (~self.differs.any(1)).nonzero().flatten().tolist()
        if unchanged:
            where = f"up to position {int(self.position[unchanged[0]])}"
            raise ValueError(f"sequence {unchanged[0]}: the flip changes nothing, its tokens {where} are the same")
        assert self.clusters is not None
        present = self.clusters.unique()
        if not torch.equal(present, torch.arange(len(present))):
            raise ValueError("clusters must be numbered from 0 without a gap")

    def __len__(self) -> int:
        return len(self.clean_ids)

    @property
    def differs(self) -> Tensor:
        """(sequences, seq) bool: where the flip has changed a token that the answer can depend on."""
        return (self.clean_ids != self.corrupted_ids) & self.asked_after

    @property
    def asked_after(self) -> Tensor:
        """(sequences, seq) bool: positions up to that where the answer is asked for."""
        return torch.arange(self.clean_ids.shape[1]) <= self.position[:, None]

    def cut(self) -> Flips:
        """Without what no answer can depend on: the positions after the last that asks."""
        length = int(self.position.max()) + 1
        return replace(self, clean_ids=self.clean_ids[:, :length], corrupted_ids=self.corrupted_ids[:, :length])

    def take(self, rows: slice) -> Flips:
        """These sequences, each a cluster of its own."""
        held = (self.clean_ids, self.corrupted_ids, self.position, self.answer, self.flipped_answer)
        return Flips(*(tensor[rows] for tensor in held))

    def check_fits(self, config: Any) -> None:
        """Raise a ValueError if a model of this configuration cannot be run on them."""
        largest = max(int(t.max()) for t in (self.clean_ids, self.corrupted_ids, self.answer, self.flipped_answer))
        smallest = min(int(t.min()) for t in (self.clean_ids, self.corrupted_ids, self.answer, self.flipped_answer))
        if smallest < 0 or largest >= config.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"there is the token id {wrong}, the model's vocabulary is {config.vocab_size}")
        if (length := self.clean_ids.shape[1]) > (most := config.max_position_embeddings):
            raise ValueError(f"there are {length} tokens, the model is made for {most} (max_position_embeddings)")


def per_sequence(name: str, value: Any, count: int) -> Tensor:
    """`value`, one number or `count` of them, as (count,) int64 on the CPU. Raises ValueError of anything else."""
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a number, or one for each sequence, got {type(value).__name__}") from error
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool or found.dim() > 1:
        raise ValueError(f"{name} must be a number, or one for each sequence, got {found.dtype} {tuple(found.shape)}")
    if found.dim() == 1 and len(found) != count:
        raise ValueError(f"{name} has {len(found)} numbers, there are {count} sequences")
    return found.to("cpu", torch.long).expand(count)


def masks_of(positions: Positions, flips: Flips) -> dict[str | int, Tensor]:
    """The positions of each patch by name, (sequences, seq) bool, for flips that are `cut`.

    Positions that are given as numbers may come after some sequences' answer, where by causality they change nothing.

    Raises:
        ValueError: a position is out of range, or given twice, or there are none.
    """
    count, length = flips.clean_ids.shape
    if positions is None:
        positions = range(length)
    named = positions.items() if isinstance(positions, Mapping) else [(int(p), p) for p in positions]
    masks: dict[str | int, Tensor] = {}
    for name, value in named:
        if name in masks:
            raise ValueError(f"position {name} is there twice")
        masks[name] = _as_mask(f"positions '{name}'" if isinstance(name, str) else "positions", value, count, length)
    if not masks:
        raise ValueError("positions must name at least one")
    return masks


def _as_mask(name: str, value: Any, count: int, length: int) -> Tensor:
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        if value.dim() != 2 or len(value) != count or value.shape[1] < length:
            raise ValueError(f"{name} is a mask {tuple(value.shape)}, there are ({count}, {length}) tokens to patch")
        return value[:, :length].cpu()
    at = per_sequence(name, value, count)
    wrong = [x for x in at.tolist() if not 0 <= x < length]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]} is out of range, the last that an answer can depend on is {length - 1}")
    return torch.arange(length) == at[:, None]

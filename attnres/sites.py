"""Where a model reads: a description of every depth-wise read, shared by model, probes and plots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from attnres.configuration_attnres import AttnResConfig

Sublayer = Literal["self_attn", "mlp", "final"]
Family = Literal["embedding", "current", "prev_completed", "older"]

SUBLAYERS: tuple[Sublayer, ...] = ("self_attn", "mlp")
FAMILIES: tuple[Family, ...] = ("embedding", "current", "prev_completed", "older")
REGIONS = ("early", "middle", "late")


@dataclass(frozen=True)
class ReadSite:
    """One read.

    Attributes:
        index: position among the model's reads, in the order in which they happen.
        layer_idx: the layer it belongs to, or `None` for the final read of block_sum.
        sublayer: "self_attn", "mlp" or "final".
        num_layers: layers of the model.
        num_completed: number of completed sources that it sees, the embedding included. With delta_block sources the
            very first read sees none.
        has_current: whether the running stream is its last source.
        current_is_alias: whether `current` equals the newest completed source, because no sublayer has written since
            that block was closed (cumulative sources only).
        is_additive: whether what is routed is added to the running stream, which is then no source (delta_block).
    """

    index: int
    layer_idx: int | None
    sublayer: Sublayer
    num_layers: int
    num_completed: int
    has_current: bool
    current_is_alias: bool
    is_additive: bool = False

    @property
    def num_sources(self) -> int:
        return self.num_completed + self.has_current

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """The family of each source, in source order: embedding, completed blocks, current."""
        num_blocks = self.num_completed - 1
        blocks: tuple[Family, ...] = ("older",) * (num_blocks - 1) + ("prev_completed",) * (num_blocks > 0)
        embedding: tuple[Family, ...] = ("embedding",) * (self.num_completed > 0)
        return (*embedding, *blocks, *(("current",) if self.has_current else ()))

    @property
    def aliased_sources(self) -> tuple[int, ...]:
        """Indices of the two sources that are the same tensor, if any."""
        return (self.num_completed - 1, self.num_completed) if self.current_is_alias else ()

    @property
    def region(self) -> str:
        """The third of the layers it lies in (`3 * layer_idx // num_layers`), or "final" for the final read."""
        return "final" if self.layer_idx is None else _region(self.layer_idx, self.num_layers)


def _region(layer_idx: int, num_layers: int) -> str:
    return REGIONS[3 * layer_idx // num_layers]


def regions_of(num_layers: int) -> tuple[str, ...]:
    """The regions of a model of `num_layers` layers. One of fewer than three layers lacks some."""
    return tuple(dict.fromkeys(_region(layer_idx, num_layers) for layer_idx in range(num_layers)))


def read_sites(config: AttnResConfig) -> tuple[ReadSite, ...]:
    """All reads of a model of this configuration, in order: layer 0 self_attn, layer 0 mlp, layer 1 …, [final]."""
    cumulative, additive = config.attnres_source == "cumulative", config.is_additive
    num_layers = config.num_hidden_layers
    sites: list[ReadSite] = []
    num_completed, at_block_start = 1, True
    for layer_idx in range(num_layers):
        for sublayer in SUBLAYERS:
            # An additive read that opens a block does not see the block before it; in full mode, the first read alone.
            hidden = additive and at_block_start and (config.attnres_mode == "block" or not sites)
            sites.append(
                ReadSite(
                    index=len(sites),
                    layer_idx=layer_idx,
                    sublayer=sublayer,
                    num_layers=num_layers,
                    num_completed=num_completed - hidden,
                    has_current=cumulative or not (additive or at_block_start),
                    current_is_alias=cumulative and at_block_start,
                    is_additive=additive,
                )
            )
            at_block_start = config.closes_block(layer_idx, sublayer)
            num_completed += at_block_start
    if config.attnres_source == "block_sum":
        sites.append(
            ReadSite(
                index=len(sites),
                layer_idx=None,
                sublayer="final",
                num_layers=num_layers,
                num_completed=num_completed,
                has_current=False,
                current_is_alias=False,
            )
        )
    return tuple(sites)

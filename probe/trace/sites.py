"""Where a trace patches: sites of a model's depth, and what is known of a patch before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3ForCausalLM

from attnres import AttnResForCausalLM
from attnres.sites import SUBLAYERS
from probe.trace.flips import Flips
from probe.vocabulary import FINAL, check_names

STREAM, OUTPUT, INPUT, SOURCE, EDGE = "stream", "output", "input", "source", "edge"
SITE_KINDS = (STREAM, OUTPUT, INPUT, SOURCE, EDGE)
"""The running stream that a read finds (written by the sublayer before it, and not yet closed as a block); what a
sublayer writes; what a read hands to its sublayer, and to it alone; one source of depth as one read sees it; keys and
values of a layer as one head at the position that asks sees them, and nothing else does."""
DEPTH_KINDS = SITE_KINDS[:-1]
"""What a trace patches if it is not told what: edges are of a layer's heads, several times as many."""
DENOISE, NOISE = "denoise", "noise"
DIRECTIONS = (DENOISE, NOISE)
"""One site of the corrupted run as in the clean one, and one site of the clean run as in the corrupted one."""


@dataclass(frozen=True)
class Site:
    """One site of a model.

    Attributes:
        kind: of `SITE_KINDS`.
        read: index of the read that finds it, or whose sublayer writes it; `2 * num_layers` is the one before the
            final norm, which a model with cumulative sources has as a stream only.
        layer: of that read; `None` for the final one.
        sublayer: "self_attn", "mlp" or "final".
        source: index of the source, for `SOURCE` alone.
        family: of the source.
        aliased: whether another source of the read is the same tensor, and is patched only `with_aliases`.
        head: of an `EDGE`, which attention head sees it; `None` for all of the layer together.
        window: of an `EDGE`, how many positions its layer sees, the asking one included; `None` for all before.
    """

    kind: str
    read: int
    layer: int | None
    sublayer: str
    source: int | None = None
    family: str | None = None
    aliased: bool = False
    head: int | None = None
    window: int | None = None

    def __str__(self) -> str:
        """As in "source 2 (older) of layer 5 self_attn"."""
        place = FINAL if self.layer is None else f"layer {self.layer} {self.sublayer}"
        if self.head is not None:
            place += f" head {self.head}"
        return f"{self.kind} of {place}" if self.source is None else f"source {self.source} ({self.family}) of {place}"


def trace_sites(model: Any, kinds: Sequence[str] | None = None) -> tuple[Site, ...]:
    """All sites of these kinds, by default of those of `DEPTH_KINDS` that the model has, in the order of `SITE_KINDS`
    and then of reads.

    Raises:
        ValueError: this is no Qwen3 model with or without depth routing, a kind does not exist, or is not this model's.
    """
    routed = isinstance(model, AttnResForCausalLM)
    if not routed and not isinstance(model, Qwen3ForCausalLM):
        raise ValueError(f"a trace needs an AttnResForCausalLM or a Qwen3ForCausalLM, got {type(model).__name__}")
    if kinds is None:
        kinds = [kind for kind in DEPTH_KINDS if routed or kind != SOURCE]
    check_names("kind of site", kinds, SITE_KINDS)
    if not kinds:
        raise ValueError(f"name at least one kind of site: {', '.join(SITE_KINDS)}")
    if SOURCE in kinds and not routed:
        raise ValueError(f"a {type(model).__name__} has no sources of depth: trace its stream, output and input")
    last = 2 * model.config.num_hidden_layers

    def site(kind: str, read: int, *source: Any) -> Site:
        layer = None if read == last else read // 2
        return Site(kind, read, layer, FINAL if read == last else SUBLAYERS[read % 2], *source)

    num_reads = len(model.sites) if routed else last
    found = [site(STREAM, read) for read in range(last + 1)]
    found += [site(OUTPUT, read) for read in range(last)]
    found += [site(INPUT, read) for read in range(num_reads)]
    if routed:
        for at in model.sites:
            for source, family in enumerate(at.families):
                found.append(site(SOURCE, at.index, source, family, source in at.aliased_sources))
    attention: list[Any] = [layer.self_attn for layer in model.model.layers]
    for layer, window in enumerate(each.sliding_window for each in attention):
        for head in (None, *range(model.config.num_attention_heads)):
            found.append(Site(EDGE, 2 * layer, layer, SUBLAYERS[0], head=head, window=window))
    return tuple(each for each in found if each.kind in kinds)


def live_positions(site: Site, num_layers: int, flips: Flips) -> Tensor:
    """(sequences, seq) bool: where the clean and the corrupted run can differ at a site, and the answer depend on it.

    Before the first changed token a causal model's runs are the same. The embedding, and all that has seen nothing
    else, differs at the changed tokens alone. After the last attention only the position that asks matters.
    """
    differs, length = flips.differs, flips.clean_ids.shape[1]
    at_answer = torch.arange(length) == flips.position[:, None]
    if (site.read == 0 and site.kind != OUTPUT) or site.source == 0:
        live = differs
    else:
        live = (differs.cumsum(1) > 0) & flips.asked_after
    if site.window is not None:
        live = live & (flips.position[:, None] - torch.arange(length) < site.window)
    past_attention = 2 * num_layers - 1
    if site.read + (site.kind == OUTPUT) >= past_attention:
        live = live & at_answer
    return live


def is_cut(site: Site, num_layers: int, routed: bool, final_read: bool) -> bool:
    """Whether nothing of the run that is patched goes past this site: patched wherever it differs, it is the other run.

    Args:
        routed: whether completed sources go past the stream.
        final_read: whether there is a read before the final norm.
    """
    last = 2 * num_layers
    if site.kind == STREAM:
        return site.read == 0 or not routed or (site.read == last and not final_read)
    return site.kind == INPUT and site.read == last

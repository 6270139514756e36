"""Checkpoint formats of the codes that share `model_type: qwen3_attnres`: told apart, read as they are, written back.

Which code wrote a `config.json` follows from its fields (docs/attnres.md lists what each code reads of the others):

| format | has | has not |
|---|---|---|
| `attnres`, this package | `attnres_source` | `attnres_use_null_source` |
| `open_attnres`, open-attention-residuals | `attnres_recency_bias_init` | `attnres_source`, `attnres_use_null_source` |
| `delta`, Delta Attention Residuals | `attnres_use_null_source` | `attnres_recency_bias_init`, `attnres_source` |

`attnres_mode` does not mean the same in any two of them. Tensors then have to be those of the format (`check_missing`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

ATTNRES, OPEN_ATTNRES, DELTA = FORMATS = ("attnres", "open_attnres", "delta")
DELTA_MODES = {
    "block": ("block_sum", "block"),
    "full": ("block_sum", "full"),
    "delta_block": ("delta_block", "block"),
    "delta": ("delta_block", "full"),
}
"""`attnres_mode` of the Delta code -> our `attnres_source` and `attnres_mode`."""
OTHER_DELTA_MODES = {
    "delta_v": "it routes values by a read of their own",
    "delta_block_v": "it never takes a source: without a null source it is a vanilla Qwen3",
    "block_v": "its read of values is never used: it is mode block with tensors to spare",
    "full_v": "it routes cumulative states, with values by a read of their own",
    "delta_replace": "it replaces the stream by sublayer outputs and the stream itself",
    "full_additive": "it adds cumulative states to the stream",
    "first_layer": "it reads one fixed source and the stream",
    "pre_gated": "it gates its sources",
    "delta_centered_reset": "it is another name for mode full",
}
"""What keeps a mode that the Delta code knows from being read here."""
GATES = ("sigmoid_scalar", "sigmoid_vector", "learnable_alpha")
OURS_ALONE = ("attnres_source", "attnres_routing")
CLASSES = {"AttnResForCausalLM": "Qwen3AttnResForCausalLM", "AttnResModel": "Qwen3AttnResModel"}
"""What the other two codes call our classes."""
_writing: ContextVar[str] = ContextVar("format that a configuration is written in", default=ATTNRES)


def read_fields(fields: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The fields of a `config.json` in our own meaning, and the format that it is in.

    Raises:
        ValueError: fields of two codes, or a variant that is not supported; the message names it.
    """
    fields = dict(fields)
    if "attnres_use_null_source" not in fields:
        if "attnres_source" not in fields:
            return fields, OPEN_ATTNRES
        fields["attnres_num_blocks"] = _read_num_blocks(fields)
        return fields, ATTNRES
    if ours := [key for key in OURS_ALONE if key in fields]:
        raise ValueError(
            f"attnres_use_null_source is a field of Delta Attention Residuals, {ours[0]} one of attnres: a config.json "
            "has one or the other, as attnres_mode does not mean the same in both"
        )
    if "attnres_recency_bias_init" in fields:
        raise ValueError(
            "attnres_use_null_source beside attnres_recency_bias_init is a configuration of open-attention-residuals' "
            "second file (Attention-Residuals/), whose blocks are neither snapshots nor sums: it is not supported"
        )
    return _read_delta(fields), DELTA


def _read_delta(fields: dict[str, Any]) -> dict[str, Any]:
    null, gate = fields.pop("attnres_use_null_source"), fields.get("attnres_gate_type", "bias")
    mode = fields.get("attnres_mode", "block")
    right = f"choose from {', '.join(DELTA_MODES)}"
    if not isinstance(mode, str) or mode not in DELTA_MODES:
        why = OTHER_DELTA_MODES.get(str(mode), "that code runs an unknown mode as full without its final read")
        raise ValueError(f"attnres_mode '{mode}' of Delta Attention Residuals is not supported ({why}); {right}")
    if null is not False:
        raise ValueError(
            f"attnres_use_null_source {null} of Delta Attention Residuals (attnres_mode '{mode}') is not supported: "
            "only false is, without a null source"
        )
    if gate != "bias":
        what = "gate" if gate in GATES else "unknown gate"
        raise ValueError(
            f"attnres_gate_type '{gate}' of Delta Attention Residuals (attnres_mode '{mode}') is not supported: the "
            f"{what} must be 'bias', which there is no gate"
        )
    fields["attnres_source"], fields["attnres_mode"] = DELTA_MODES[mode]
    layers, blocks = fields.get("num_hidden_layers"), fields.get("attnres_num_blocks")
    if isinstance(layers, int) and isinstance(blocks, int) and blocks > layers >= 1:
        fields["attnres_num_blocks"] = layers  # there, more blocks than layers are blocks of one layer
    return fields


def hint_at_mode(mode: Any) -> str:
    """For the message about a mode that our own format has not: what it is called here, if the Delta code has it."""
    if not isinstance(mode, str) or mode not in DELTA_MODES:
        return ""
    source, ours = DELTA_MODES[mode]
    return (
        f" (Delta Attention Residuals' '{mode}' is attnres_source '{source}' with attnres_mode '{ours}'; its own "
        "config.json has attnres_use_null_source)"
    )


def _read_num_blocks(fields: Mapping[str, Any]) -> Any:
    """The number in "4 (block_sum)"; see `written_fields`."""
    number = fields.get("attnres_num_blocks", 8)
    if not isinstance(number, str):
        return number
    if found := re.fullmatch(rf"(\d{{1,9}}) \({re.escape(str(fields['attnres_source']))}\)", number):
        return int(found[1])
    raise ValueError(
        f"attnres_num_blocks must be a number, or a number and the attnres_source in brackets, got '{number}' with "
        f"attnres_source '{fields['attnres_source']}'"
    )


def check_missing(format: str, name: str, missing: list[str], biases: list[str]) -> list[str]:
    """The tensors that a checkpoint lacks, of those that its format has.

    Args:
        name: of the checkpoint.
        missing: tensors of the model that the checkpoint has not.
        biases: names of the model's recency biases.

    Raises:
        ValueError: it holds recency biases, which its format has not.
    """
    if format != DELTA:
        return missing
    if held := sorted(set(biases) - set(missing)):
        raise ValueError(
            f"{name}: its config.json is of Delta Attention Residuals (attnres_use_null_source), whose models have no "
            f"recency biases, but it holds {len(held)}, as {held[0]}: give it the config.json that it was saved with"
        )
    return [tensor for tensor in missing if tensor not in biases]


@contextmanager
def writing(format: str) -> Iterator[None]:
    """Configurations are written in `format` inside."""
    token = _writing.set(format)
    try:
        yield
    finally:
        _writing.reset(token)


def written_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` holds of a configuration's fields, in the format that is being written.

    In our own format the number of blocks is a number only where sources are cumulative. The classes of the other two
    codes know no `attnres_source` and would read other sources silently wrong; "4 (block_sum)" is no number to them,
    and they refuse it.
    """
    fields, format = dict(fields), _writing.get()
    if format == ATTNRES:
        if fields["attnres_source"] != "cumulative":
            fields["attnres_num_blocks"] = f"{fields['attnres_num_blocks']} ({fields['attnres_source']})"
        return fields
    source, mode = fields.pop("attnres_source"), fields["attnres_mode"]
    del fields["attnres_routing"]
    if fields.get("architectures"):
        fields["architectures"] = [CLASSES.get(name, name) for name in fields["architectures"]]
    if format == DELTA:
        del fields["attnres_recency_bias_init"]
        fields["attnres_mode"] = {ours: theirs for theirs, ours in DELTA_MODES.items()}[source, mode]
        fields["attnres_use_null_source"] = False
    return fields


def check_writable(config: Any, format: str) -> None:
    """Raise a ValueError if `format` does not exist or cannot hold a model of this configuration."""
    if format not in FORMATS:
        raise ValueError(f"format '{format}' does not exist; choose from {', '.join(FORMATS)}")
    held = {ATTNRES: None, OPEN_ATTNRES: ("cumulative",), DELTA: ("block_sum", "delta_block")}[format]
    if held is None:
        return
    if config.attnres_source not in held:
        raise ValueError(
            f"format '{format}' cannot hold attnres_source '{config.attnres_source}', only {' or '.join(held)}"
        )
    if config.attnres_routing != "learned":
        raise ValueError(
            f"format '{format}' cannot hold attnres_routing '{config.attnres_routing}': set model.config."
            "attnres_routing = 'learned' first, or leave format out"
        )


def written_state(state: Mapping[str, Tensor], format: str) -> dict[str, Tensor]:
    """The tensors of a state dict that `format` has.

    Raises:
        ValueError: it cannot hold one.
    """
    if format != DELTA:
        return dict(state)
    biases = {name: value for name, value in state.items() if name.endswith("_res_bias")}
    if wrong := [name for name, value in biases.items() if bool(torch.any(value != 0))]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"format 'delta' has no recency biases, and {wrong[0]}{more} of this model is not zero "
            f"({float(biases[wrong[0]]):g}): leave format out"
        )
    return {name: value for name, value in state.items() if name not in biases}


__all__ = [
    "FORMATS",
    "check_missing",
    "check_writable",
    "hint_at_mode",
    "read_fields",
    "writing",
    "written_fields",
    "written_state",
]

"""Loading that refuses a checkpoint whose tensors are not those of its configuration's model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from attnres import formats

NUM_NAMED = 24  # nobody reads a line that lists 200 tensors
LOGGER = logging.getLogger("transformers.modeling_utils")


def load_whole(load: Any, *args: Any, ignore_mismatched_sizes: bool = False, **kwargs: Any) -> tuple[Any, dict]:
    """Call `load`, a `from_pretrained`, and raise an error where transformers would initialise tensors.

    Returns:
        The model and transformers' loading info.

    Raises:
        ValueError: tensors are missing, unexpected, or (unless `ignore_mismatched_sizes`) of another shape. The
            message names them in one line and hints at the likely cause. Biases that the checkpoint's format has not
            are zero, and not missing.
    """
    with _report_held_back(ignore_mismatched_sizes):
        model, info = load(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    biases = [name for name, _ in model.named_parameters() if name.endswith("_res_bias")]
    read_format = getattr(model.config, "_read_format", formats.ATTNRES)
    missing = formats.check_missing(read_format, model.config.name_or_path, list(info["missing_keys"]), biases)
    info["missing_keys"] = set(missing)
    mismatched = [] if ignore_mismatched_sizes else info["mismatched_keys"]
    _check(model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched))
    if hasattr(model.config, "_read_format"):
        model.config._read_format = formats.ATTNRES  # the model that is there now has all that our own format has
    return model, info


def _check(model: PreTrainedModel, missing: list[str], unexpected: list[str], mismatched: list[tuple]) -> None:
    shapes = [f"{name} {list(held)} for {list(needed)}" for name, held, needed in mismatched]
    found = (("missing", missing), ("unexpected", unexpected), ("misshapen", shapes))
    wrong = [_named(kind, names) for kind, names in found if names]
    if wrong:
        config = model.config
        raise ValueError(
            f"{config.name_or_path or 'checkpoint'}: {'; '.join(wrong)}{_hint(model, missing, unexpected)}"
        )


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {', '.join(names[:NUM_NAMED])}{more}"


def _hint(model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> str:
    routing = {name for name, _ in model.named_parameters() if "layers." in name and "_res_" in name}
    biases = {name for name in routing if name.endswith("_res_bias")}
    if biases and routing.intersection(missing) == biases:
        return (
            ". A checkpoint of Delta Attention Residuals has no recency biases: its config.json says so by "
            "attnres_use_null_source, with attnres_mode in that code's meaning"
        )
    source = getattr(model.config, "attnres_source", None)
    if source == "cumulative" and any("final_res_" in name for name in unexpected):
        return (
            ". A final read over cumulative sources is a variant that is not supported: attnres_source 'cumulative' "
            "has none, and a checkpoint with 'block_sum' sources must say so in its config.json"
        )
    if routing and routing - biases <= set(missing):
        return ". It has no routing at all; attnres.wrap_qwen3 makes an AttnRes model from a vanilla Qwen3"
    return ""


@contextmanager
def _report_held_back(ignore_mismatched_sizes: bool) -> Iterator[None]:
    """Hold back transformers' report of "newly initialized" tensors: `load_whole` raises instead."""

    def is_true(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_error = "MISSING" in message or "UNEXPECTED" in message or not ignore_mismatched_sizes
        return "LOAD REPORT" not in message or not is_error

    LOGGER.addFilter(is_true)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_true)


__all__ = ["load_whole"]

"""What `from_pretrained` refuses: a checkpoint whose tensors are not those of the model its configuration names."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from attnres.configuration_attnres import AttnResConfig

NUM_NAMED = 24  # a line that lists 200 tensors is not read
LOGGER = logging.getLogger("transformers.modeling_utils")


def _is_no_error(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return "LOAD REPORT" not in message or not ("MISSING" in message or "UNEXPECTED" in message)


@contextmanager
def report_is_an_error() -> Iterator[None]:
    """Holds back transformers' report of missing and unexpected tensors: `check_tensors` raises instead."""
    LOGGER.addFilter(_is_no_error)
    try:
        yield
    finally:
        LOGGER.removeFilter(_is_no_error)


def check_tensors(config: AttnResConfig, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Compare the tensors of a checkpoint with the model's; transformers would initialise the missing ones anew.

    Args:
        config: of the model.
        missing: names of parameters that the checkpoint lacks.
        unexpected: names of tensors that the model does not have.

    Raises:
        ValueError: there are such tensors. One line that names them, and what may have been meant.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing and not unexpected:
        return
    wrong = [_named(kind, names) for kind, names in (("missing", missing), ("unexpected", unexpected)) if names]
    raise ValueError(f"{config.name_or_path or 'checkpoint'}: {'; '.join(wrong)}{_hint(config, missing, unexpected)}")


def _named(kind: str, names: list[str]) -> str:
    more = f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else ""
    return f"{len(names)} {kind} tensor{'s' * (len(names) > 1)}: {', '.join(names[:NUM_NAMED])}{more}"


def _hint(config: AttnResConfig, missing: list[str], unexpected: list[str]) -> str:
    if config.attnres_source == "cumulative" and any("final_res_" in name for name in unexpected):
        return (
            ". A final read over cumulative sources is a variant that is not supported: attnres_source 'cumulative' "
            "has none, and a checkpoint with 'block_sum' sources must say so in its config.json"
        )
    num_routing = sum("layers." in name and "_res_" in name for name in missing)
    if num_routing == 6 * config.num_hidden_layers:
        return ". It has no routing at all; of a vanilla Qwen3, attnres.wrap_qwen3 makes an AttnRes model"
    return ""


__all__ = ["check_tensors", "report_is_an_error"]

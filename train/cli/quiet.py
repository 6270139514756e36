"""Messages of Lightning and torch that are known to be harmless here, each by its text. All others get through."""

from __future__ import annotations

import logging
import re
import warnings

from transformers.utils.logging import disable_progress_bar

HARMLESS_WARNINGS = (
    r".*your dataloader is not resumable",  # ours starts at the step (train/recall/data.py)
    r".*isinstance\(treespec, LeafSpec\)",  # lightning 2.6 against torch 2.13
    # Validation does without the saver of checkpoints and the probes.
    r".*callbacks used to create the checkpoint.*callbacks: \[(\"ModelCheckpoint\{[^\"]*\}\"|'ProbeCallback'|, )*\]",
    r"(?s).*(``instantiate_classes`` was deprecated|only one JsonargparseDeprecationWarning)",  # lightning 2.6
)
HARMLESS_LOG_RECORDS = re.compile(
    r"Seed set to|GPU available|TPU available|litlogger|litmodels|was configured so validation will run after"
)
LOGGERS = (
    "lightning.fabric.utilities.seed",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not HARMLESS_LOG_RECORDS.search(record.getMessage())


def silence_known_messages() -> None:
    for message in HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_worth_saying)
    disable_progress_bar()  # one shard is written; its bar is noise in a log

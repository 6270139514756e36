"""What fuzzed commands are given: small finished runs, of which each input names a part or damages a copy."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import probe.cli
import train.cli
from attnres import AttnResForCausalLM
from attnres.files import MANIFEST
from attnres.tasks import MQAR, TextRecall
from probe.commands import silence
from probe.files.checkpoints import load_model
from tests.conftest import SMALL_SHAPE, randomize_, small_config
from tests.support import tokenizers
from tests.support.paths import CONFIGS

TASK = MQAR(num_pairs=4, vocab_size=16)
TRAIN = (
    *(
        "--data.task.num_pairs",
        "4",
        "--data.task.vocab_size",
        "16",
        "--data.num_validation_examples",
        "8",
        "--data.batch_size",
    ),
    *("4", "--model.hidden_size", "16", "--model.intermediate_size", "16", "--model.head_dim", "4"),
    *("--model.num_hidden_layers", "4", "--model.attnres_num_blocks", "4", "--probe.num_resamples", "20"),
    *("--trainer.max_steps", "3", "--trainer.val_check_interval", "1", "--trainer.log_every_n_steps", "1"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
)
"""Options after a configuration of `configs/` that make training take seconds."""
PROBE = ("--num_sequences", "8", "--num_resamples", "20", "--device", "cpu")


class World:
    """Folders in `root`, made when the world is.

    Attributes:
        run: trained, with checkpoints, a trail, probes in training and a final one.
        vanilla: an exported vanilla model, to be wrapped.
        words: an exported AttnRes model with a tokenizer and a task in words.
    """

    def __init__(self, root: Path) -> None:
        silence()
        self.root = root
        self.run, self.vanilla, self.words = (root / name for name in ("run", "vanilla", "words"))
        environment = {"WANDB_MODE": "disabled"}
        with patch.dict(os.environ, environment), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            train.cli.main(["fit", "--config", str(CONFIGS / "demo.yaml"), "--run_dir", str(self.run), *TRAIN])
            final = ["--output", str(self.run / "probe" / "final"), "--coalitions", "[all]", "--flip", "false"]
            probe.cli.main(["run", str(self.run), *final, *PROBE])
        torch.manual_seed(0)
        vanilla = Qwen3ForCausalLM(Qwen3Config(**SMALL_SHAPE)).eval()
        randomize_(vanilla)
        words = AttnResForCausalLM(small_config(vocab_size=700, max_position_embeddings=256)).eval()
        tokenizers.make("qwen").save_pretrained(self.words / "hf")
        for folder, model, task in ((self.vanilla, vanilla, TASK), (self.words, words, TextRecall(num_pairs=2))):
            model.save_pretrained(folder / "hf")
            (folder / "hf" / "task.json").write_text(json.dumps(task.to_dict()))
            (folder / "hf" / "attnres_run.json").write_text(json.dumps({"condition": "x", "seed": 3, "step": 40}))

    @cached_property
    def model(self) -> AttnResForCausalLM:
        """The run's."""
        return load_model(str(self.run)).model  # type: ignore[return-value]

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """An empty folder, which is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix="scratch-") as name:
            yield Path(name)

    @contextmanager
    def copy_of(self, *parts: str, manifests: bool = False) -> Iterator[Path]:
        """A run directory with these files and folders of the run.

        Args:
            manifests: whether those of its folders are copied, so that damage is found by digests.
        """
        with self.scratch() as folder:
            for part in parts:
                source, target = self.run / part, folder / part
                target.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, target, ignore=None if manifests else shutil.ignore_patterns(MANIFEST))
                    continue
                shutil.copy(source, target)
                if manifests and (beside := source.with_name(MANIFEST)).exists():
                    shutil.copy(beside, target.parent)
            yield folder


__all__ = ["PROBE", "TASK", "TRAIN", "World"]

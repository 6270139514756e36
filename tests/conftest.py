"""Seeds, hypothesis profiles and small models for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the network; one that asks for it should fail at once
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background job; commands would leave it so
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR
from tests.support.browser import browser  # noqa: F401 (a fixture)

SOURCES = ("cumulative", "block_sum", "delta_block")
MODES = ("block", "full")
BOTH = pytest.mark.parametrize(("source", "mode"), [(source, mode) for source in SOURCES for mode in MODES])

EVERYTHING = os.environ.get("ATTNRES_ALL") == "1"  # `make test-all`: a skipped test is a failure

# Reproducible by default; `pytest --hypothesis-profile=explore` looks for new counterexamples.
settings.register_profile("reproducible", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=300)
settings.load_profile("reproducible")

# Well above the usual 0.02, so that a wrong term shows in the logits, and small enough that a forward through seven
# random layers keeps float32 rounding below 1e-5.
SMALL_SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def small_config(**fields) -> AttnResConfig:
    return AttnResConfig(**(SMALL_SHAPE | {"attnres_num_blocks": 2} | fields))


def with_bias(source: str, bias: float) -> dict[str, Any]:
    """Fields of a model with an initial recency bias, if these sources can have one."""
    return {"attnres_source": source, "attnres_recency_bias_init": 0.0 if source == "delta_block" else bias}


def randomize_(model: torch.nn.Module) -> None:
    """Move every gain, query and bias away from its initial value, so that no term of a read is invisible.

    Embeddings of unit size keep the gradients through the norms of the first reads well-conditioned in float32.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.copy_(torch.randn_like(parameter))
            elif "_res_proj" in name:
                parameter.copy_(0.5 * torch.randn_like(parameter))
            elif "_res_bias" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))


def _fail_if_skipped(report):
    if EVERYTHING and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"ATTNRES_ALL=1 allows no skips, but: {report.longrepr[2]}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _fail_if_skipped((yield))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def quiet_wandb(monkeypatch) -> None:
    """W&B starts a process per run; only the tests about it need that."""
    monkeypatch.setenv("WANDB_MODE", "disabled")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., AttnResForCausalLM]:
    """A small model in eval mode with random routing; `randomize=False` leaves it as it is initialised."""

    def make(seed: int = 0, randomize: bool = True, **fields) -> AttnResForCausalLM:
        torch.manual_seed(seed)
        model = AttnResForCausalLM(small_config(**fields)).eval()
        if randomize:
            randomize_(model)
        return model

    return make


@pytest.fixture(scope="session")
def make_vanilla() -> Callable[..., Qwen3ForCausalLM]:
    """A small vanilla Qwen3 in eval mode."""

    def make(seed: int = 0, **fields) -> Qwen3ForCausalLM:
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**(SMALL_SHAPE | fields))).eval()
        randomize_(model)
        return model

    return make


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Random (batch, seq) token ids for a model."""

    def make(model: PreTrainedModel, batch: int = 2, seq: int = 7, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(int(model.config.vocab_size), (batch, seq), generator=generator)

    return make


@pytest.fixture
def make_hub(tmp_path) -> Callable[[PreTrainedModel, str], dict[str, str]]:
    """Put a model into a hub cache of its own, under any id; returns the environment of a process that uses it."""

    def make(model: PreTrainedModel, hub_id: str) -> dict[str, str]:
        cache = tmp_path / "hub"
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        revision = "0" * 40
        model.save_pretrained(repository / "snapshots" / revision)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(revision)
        return {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

    return make


class TrainedModels:
    """Tiny models trained for a moment on `task`, one for each source; made when first asked for."""

    task = MQAR(num_pairs=3, vocab_size=24)

    def __init__(self) -> None:
        self._models: dict[str, AttnResForCausalLM] = {}

    def __call__(self, source: str = "cumulative") -> AttnResForCausalLM:
        if source not in self._models:
            self._models[source] = self._train(source)
        return self._models[source]

    def _train(self, source: str) -> AttnResForCausalLM:
        torch.manual_seed(1)
        config = small_config(vocab_size=24, hidden_size=32, intermediate_size=48, head_dim=16, attnres_source=source)
        model = AttnResForCausalLM(config)
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(300):
            pairs = 1 if step < 60 else 2 if step < 140 else 3
            batch = self.task.batch("train", range(64 * step, 64 * (step + 1)), pairs)
            logits = model(batch.input_ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()


@pytest.fixture(scope="session")
def trained_model() -> TrainedModels:
    return TrainedModels()

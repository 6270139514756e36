"""What a training step and a decoding step launch and move, counted: operators, bytes and FLOPs, beside vanilla Qwen3.

    python -m benchmarks.counts --output benchmarks/results/counts.json

Counts do not depend on the machine: tensors are fake (torch's FakeTensorMode), nothing is computed. An operator is an
aten operator that is no view; its bytes are those of the tensors that it takes and gives, as if nothing stayed in a
cache; FLOPs are torch's. `stacked` is a read as peers write it: sources are stacked, normalised and summed by einsum,
anew at each read.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, routing
from benchmarks.record import add

SHAPES: dict[str, dict[str, int]] = {  # with the tokens that a step has; the last is Qwen3-0.6B's
    "8x64": {"layers": 8, "hidden": 64, "mlp": 128, "heads": 4, "kv_heads": 4, "head_dim": 16, "vocab": 256}
    | {"blocks": 4, "batch": 64, "length": 48},
    "12x512": {"layers": 12, "hidden": 512, "mlp": 1536, "heads": 8, "kv_heads": 4, "head_dim": 64, "vocab": 4096}
    | {"blocks": 4, "batch": 2, "length": 256},
    "28x1024": {"layers": 28, "hidden": 1024, "mlp": 3072, "heads": 16, "kv_heads": 8, "head_dim": 128}
    | {"vocab": 151_936, "blocks": 8, "batch": 1, "length": 256},
}
MODELS = ("vanilla", "cumulative", "block_sum", "stacked")
CONTEXT = 256
"""Tokens before the one that is decoded."""


class OperatorCounter(TorchDispatchMode):
    """Counts what is launched while it is active.

    Attributes:
        operators: calls by name, views left out.
        bytes: of the tensors that these take and give.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outcome = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not _is_view(func):
            self.operators[func.overloadpacket.__name__] += 1
            tensors = [x for x in tree_leaves((args, kwargs, outcome)) if isinstance(x, Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return outcome


def _is_view(func: Any) -> bool:
    """Whether an operator gives another look at its input, or nothing new at all."""
    returned = [value.alias_info for value in func._schema.returns]
    return bool(returned) and all(alias is not None and not alias.is_write for alias in returned)


def make_model(name: str, shape: dict[str, int]) -> Any:
    """In the fake mode that is active; `stacked` is a cumulative one whose reads are `stacked_read`."""
    sizes: dict[str, Any] = {
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
    }
    sizes |= {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"]}
    sizes |= {"head_dim": shape["head_dim"], "vocab_size": shape["vocab"], "tie_word_embeddings": True}
    if name == "vanilla":
        return Qwen3ForCausalLM(Qwen3Config(**sizes))
    source = "cumulative" if name == "stacked" else name
    return AttnResForCausalLM(AttnResConfig(**sizes, attnres_num_blocks=shape["blocks"], attnres_source=source))


def stacked_read(router: Any, state: Any, intervention: Any = None) -> tuple[Tensor, Tensor, Any]:
    """As `routing.read` in value; written as peers do."""
    site = router.sites[state.read_index]
    sources = [*state.completed, *([state.current] if site.has_current else [])]
    values = torch.stack(sources)  # (n, B, T, H)
    wide = values.float()
    keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + router.eps)
    logits = torch.einsum("h,nbth->nbt", router.queries[site.index].float(), keys)
    if (bias := router.biases[site.index]) is not None and site.has_current:
        logits = torch.cat((logits[:-1], logits[-1:] + bias.float()))
    weights = logits.softmax(0)
    mixed = torch.einsum("nbt,nbth->bth", weights.to(values.dtype), values)
    return mixed, weights.movedim(0, -1), state._replace(read_index=site.index + 1)


@contextmanager
def reads_of(name: str) -> Iterator[None]:
    """The model's own reads, or those of peers; these compute no logits of a block when it is completed."""
    if name != "stacked":
        yield
        return

    def close_block(router: Any, state: Any, output: Tensor) -> Any:
        completed, current = (*state.completed, state.current), state.current if router.source == "cumulative" else None
        return routing.DepthState(completed, (), current, state.read_index)

    with mock.patch.object(routing, "read", stacked_read), mock.patch.object(routing, "close_block", close_block):
        yield


def training_step(model: Any, shape: dict[str, int], autocast: bool) -> Callable[[], None]:
    """Forward and backward; the optimiser's work is a matter of parameters alone."""
    ids = torch.zeros((shape["batch"], shape["length"]), dtype=torch.long)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten()).backward()

    return step


def decoding_step(model: Any, shape: dict[str, int], autocast: bool) -> Callable[[], None]:
    """One token after `CONTEXT` others, of one sequence."""
    cache, ids = DynamicCache(config=model.config), torch.zeros((1, CONTEXT), dtype=torch.long)
    model.eval()
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)

    def step() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            model(ids[:, :1], past_key_values=cache, use_cache=True)

    return step


STEPS = {"training": training_step, "decoding": decoding_step}


def least_bytes(name: str, shape: dict[str, int]) -> int:
    """Bytes that a training step's reads cannot do without where each is run by itself, in float32.

    Forward, a read takes its sources once and gives one tensor; backward it takes the gradient of that and its sources,
    and gives a gradient of each. Logits need no further look at a source.
    """
    with FakeTensorMode():
        sites = make_model(name, shape).model.sites
    tensors = sum((len(site.families) + 1) + (2 * len(site.families) + 1) for site in sites)
    return 4 * tensors * shape["batch"] * shape["length"] * shape["hidden"]


def counted(name: str, shape: dict[str, int], kind: str, autocast: bool = False) -> dict[str, Any]:
    """Operators, bytes and FLOPs of one step of a model."""
    with FakeTensorMode(allow_non_fake_inputs=True), reads_of(name):
        step = STEPS[kind](make_model(name, shape), shape, autocast)
        operators, flops = OperatorCounter(), FlopCounterMode(display=False)
        with flops, operators:
            step()
    by_name = dict(operators.operators.most_common())
    about = {"model": name, "step": kind, "autocast": autocast, "operators": sum(by_name.values())}
    return about | {"bytes": operators.bytes, "flops": flops.get_total_flops(), "by_name": by_name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for name in args.shapes:
        started = time.monotonic()
        cases = [("training", False), ("training", True), ("decoding", False)]
        rows = [counted(model, SHAPES[name], *case) for case in cases for model in MODELS]
        for row in rows:
            if row["step"] == "training" and not row["autocast"] and row["model"] in ("cumulative", "block_sum"):
                row["least_bytes"] = least_bytes(row["model"], SHAPES[name])
        add(args.output, name, rows, time.monotonic() - started, **SHAPES[name], torch=torch.__version__)


if __name__ == "__main__":
    main()

"""Peak memory of a training step by part, from running the step on tensors that have a shape and no content.

The real module, loss and optimiser run under torch's `FakeTensorMode`; what is counted is how many bytes of tensors
are alive after each operation. So the numbers stay right when the model changes, and a large model takes seconds. Not
counted: what a kernel takes for itself while it runs, and what an allocator loses to fragmentation.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnres.tasks import RecallBatch, sequence_length
from train.recall.module import RetrievalModule

PARTS = ("parameters", "gradients", "moments", "activations", "weight_casts", "logits", "temporary")


@dataclass(frozen=True)
class Workload:
    """What one device does in a step.

    Args:
        batch_size: sequences per batch.
        num_pairs: K; a sequence has 3 K tokens and K queries.
        noise_tokens: tokens that a sequence has besides.
        accumulate: batches per step.
        dtype: of the parameters.
        autocast: of matrix products in mixed precision; `None` for that of the parameters.
        clip: whether the gradient's norm is clipped.
    """

    batch_size: int
    num_pairs: int
    noise_tokens: int = 0
    accumulate: int = 1
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    clip: bool = True

    @property
    def seq(self) -> int:
        """Tokens of a sequence."""
        return sequence_length(self.num_pairs, self.noise_tokens)

    def precision(self, device_type: str) -> AbstractContextManager:
        """What forward passes run under."""
        return nullcontext() if self.autocast is None else torch.autocast(device_type, self.autocast)


@dataclass(frozen=True)
class SimulatedStep:
    """A step that was run without content.

    Attributes:
        memory: bytes alive at its peak, by part (`PARTS`).
        operations: that made or changed a tensor.
    """

    memory: dict[str, int]
    operations: int


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by part, and keeps the counts of the peak.

    A tensor's part is `phase` while it is made, unless it is known for something else.

    Args:
        logits_shape: (queries of a batch, vocabulary); tensors of this size are logits, or their gradients.
    """

    def __init__(self, logits_shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits_shape = logits_shape
        self.phase = "parameters"
        self.operations = 0
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, int]] = {}  # by storage: its part and bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        values = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        new = [value for value in values if value.untyped_storage()._cdata not in self._parts]
        self.operations += bool(new) or func._schema.is_mutable
        for value in new:
            self.assign([value], self._part(func, args, value))
        if self.now.total() >= self.peak.total():
            self.peak = self.now.copy()
        return output

    def assign(self, values: Iterable[Any], part: str) -> None:
        """Count `values` (those that are tensors) as `part` from now on."""
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata in self._parts:
                    self._drop(storage._cdata)
                else:
                    weakref.finalize(storage, self._drop, storage._cdata)
                self._parts[storage._cdata] = (part, storage.nbytes())
                self.now[part] += storage.nbytes()

    def _drop(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self.now[part] -= size

    def _part(self, func: Any, args: tuple, value: Tensor) -> str:
        if value.shape[-1:] == self.logits_shape[1:] and value.numel() == math.prod(self.logits_shape):
            return "logits"
        is_cast = func is torch.ops.aten._to_copy.default
        if is_cast and self._parts.get(args[0].untyped_storage()._cdata, ("", 0))[0] == "parameters":
            return "weight_casts"
        return self.phase


def simulate_step(module: RetrievalModule, workload: Workload, foreach: bool = False) -> SimulatedStep:
    """A training step, with the optimiser's moments as they are from the second one on.

    Args:
        module: on any device, "meta" too; it is not changed.
        foreach: whether the optimiser updates all parameters at once, as on a GPU: faster, with larger temporaries.
    """
    module = copy.deepcopy(module)  # also leaves torch.compile out, which changes little of what is kept
    queries = workload.batch_size * workload.num_pairs
    memory = LiveMemory((queries, module.model.config.vocab_size))
    with FakeTensorMode(), memory:
        _make_fake(module, workload.dtype)
        for parameter in (parameter for parameter in module.parameters() if parameter.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: memory.assign([p.grad], "gradients"))
        optimizer = module.build_optimizer(foreach=foreach)
        batch = _fake_batch(workload)
        for _ in range(2):  # moments are made in the first step; its gradients live until the second's forward is done
            memory.operations = 0
            training_step(module, optimizer, batch, workload, memory)
            memory.assign(tree_leaves([list(state.values()) for state in optimizer.state.values()]), "moments")
    return SimulatedStep({part: memory.peak[part] for part in PARTS}, memory.operations)


def training_step(
    module: RetrievalModule,
    optimizer: torch.optim.Optimizer,
    batch: RecallBatch,
    workload: Workload,
    memory: LiveMemory | None = None,
) -> None:
    """One optimiser step in Lightning's order, which clears gradients only after the first forward pass."""
    for number in range(workload.accumulate):
        _enter(memory, "activations")
        with workload.precision(batch.keys.device.type):
            loss, _ = module.answer(batch)
        _enter(memory, "temporary")
        if number == 0:
            optimizer.zero_grad()
        (loss / workload.accumulate).backward()
    if workload.clip:
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def _enter(memory: LiveMemory | None, phase: str) -> None:
    if memory is not None:
        memory.phase = phase


def _fake_batch(workload: Workload) -> RecallBatch:
    sizes = (workload.num_pairs,) * 3 + (workload.noise_tokens,) * 2 * bool(workload.noise_tokens)
    return RecallBatch(*(torch.zeros(workload.batch_size, size, dtype=torch.long) for size in sizes))


def _make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace all tensors by new ones on the CPU, floating ones of `dtype`; shared ones stay shared."""
    fakes: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Any:
        if id(value) not in fakes:
            empty = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
            is_parameter = isinstance(value, nn.Parameter)
            fakes[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
        return fakes[id(value)]

    originals = [list(child.parameters()) + list(child.buffers()) for child in module.modules()]  # so that ids last
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = fake(value)
    del originals


__all__ = ["PARTS", "LiveMemory", "SimulatedStep", "Workload", "simulate_step", "training_step"]

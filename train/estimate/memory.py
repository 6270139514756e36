"""Peak memory of a training step by part, from running the step on tensors that have a shape and no content.

The real module, loss and optimiser run under torch's `FakeTensorMode`; after each operation, the bytes of all tensors
that are alive are added up. So the numbers stay right when the model changes, and a large model takes seconds. Not
counted: what a kernel takes for itself while it runs, and what an allocator loses to fragmentation.

(torch's `MemTracker` finds the same peaks within 3 %, but it looks at every module after every operation, which takes
minutes for 28 layers. It refuses accumulated batches, and counts AdamW's temporaries as its moments.)
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnres.tasks import TaskBatch
from train.recall.module import RetrievalModule

PARTS = ("parameters", "gradients", "moments", "activations", "logits", "temporary")


@dataclass(frozen=True)
class Workload:
    """What one device does in a step."""

    batch_size: int
    seq: int  # tokens of a sequence
    queries: int  # of a sequence
    accumulate: int = 1  # batches
    dtype: torch.dtype = torch.float32  # of parameters
    autocast: torch.dtype | None = None  # of matrix products in mixed precision
    clip: bool = True  # the gradient's norm


@dataclass(frozen=True)
class EmptyBatch(TaskBatch):
    """Of the right shape. Where its queries are, and what is asked, costs nothing.

    Attributes:
        ids: (batch, seq).
        asked: (queries,) positions.
    """

    ids: Tensor
    asked: Tensor

    @property
    def input_ids(self) -> Tensor:
        return self.ids

    @property
    def labels(self) -> Tensor:
        return torch.zeros_like(self.ids)

    @property
    def candidates(self) -> Tensor:
        return self.labels[:, self.asked]

    @property
    def size(self) -> int:
        return len(self.asked)

    @property
    def query_positions(self) -> Tensor:
        return self.asked


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, by part, and keeps the counts of the peak.

    Attributes:
        phase: the part that new tensors belong to.
        operations: how many made or changed a tensor.
        peak: bytes by part, when they were most in all.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "parameters"
        self.operations = 0
        self.peak: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._parts: dict[int, tuple[str, int]] = {}  # by storage: its part and bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        values = [value for value in tree_leaves(output) if isinstance(value, Tensor)]
        new = [value for value in values if value.untyped_storage()._cdata not in self._parts]
        self.operations += bool(new) or func._schema.is_mutable
        self.assign(new, self.phase)
        if self._now.total() >= self.peak.total():
            self.peak = self._now.copy()
        return output

    def assign(self, values: Iterable[Tensor], part: str) -> None:
        """Count `values` as `part` from now on."""
        for storage in (value.untyped_storage() for value in values):
            if storage._cdata in self._parts:
                self._drop(storage._cdata)
            else:
                weakref.finalize(storage, self._drop, storage._cdata)
            self._parts[storage._cdata] = (part, storage.nbytes())
            self._now[part] += storage.nbytes()

    def _drop(self, key: int) -> None:
        part, size = self._parts.pop(key)
        self._now[part] -= size


def simulate_step(module: RetrievalModule, workload: Workload, foreach: bool = False) -> tuple[dict[str, int], int]:
    """Run a training step without content, with the optimiser's moments in place.

    Args:
        module: on any device, "meta" too; it is not changed.
        foreach: whether the optimiser updates all parameters at once, as on a GPU: faster, with larger temporaries.

    Returns:
        Bytes alive at the peak of the step, by part (`PARTS`), and the number of operations that make or change a
        tensor.
    """

    def step() -> None:
        for number in range(workload.accumulate):
            memory.phase = "activations"
            with nullcontext() if workload.autocast is None else torch.autocast("cpu", workload.autocast):
                loss, _ = module.answer(batch)
            memory.phase = "temporary"
            if number == 0:  # as Lightning does, after the first forward pass
                optimizer.zero_grad()
            (loss / workload.accumulate).backward()
        if workload.clip:
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()

    memory, fake = LiveMemory(), FakeTensorMode()
    with fake, memory:
        fakes = _fake_tensors(module, workload.dtype)
    module = copy.deepcopy(module, fakes)  # it takes the fakes in place of what it would copy; nothing is compiled
    with fake, memory:
        for parameter in (parameter for parameter in module.parameters() if parameter.requires_grad):
            parameter.register_post_accumulate_grad_hook(lambda p: memory.assign([p.grad], "gradients"))
        head = module.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda *_: setattr(memory, "phase", "logits"))  # type: ignore[union-attr]
        optimizer = module.build_optimizer(foreach=foreach)
        ids = torch.zeros(workload.batch_size, workload.seq, dtype=torch.long)
        batch = EmptyBatch(ids, torch.arange(workload.seq - workload.queries, workload.seq))
        for _ in range(2):  # the first step makes the moments; its gradients live until the second's forward is done
            memory.operations = 0
            step()
            states = tree_leaves([list(state.values()) for state in optimizer.state.values()])
            memory.assign((state for state in states if isinstance(state, Tensor)), "moments")
    return {part: memory.peak[part] for part in PARTS}, memory.operations


def _fake_tensors(module: nn.Module, dtype: torch.dtype) -> dict[int, Any]:
    """For the id of each parameter and buffer, a new one on the CPU; floating ones are of `dtype`."""
    fakes: dict[int, Any] = {}
    for value in (*module.parameters(), *module.buffers()):
        empty = torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
        fakes[id(value)] = nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
    return fakes

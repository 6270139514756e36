"""FSDP2: parameters, gradients and optimiser states divided over devices, through Lightning's `ModelParallelStrategy`.

Each attention and MLP module is a unit, gathered when it runs. Everything else belongs to the root unit, as a forward
call prepares the routing of all reads before the first layer runs (`AttnResModel.router`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from transformers import PreTrainedModel

from probe.files.checkpoints import read_lightning

FSDP2 = "fsdp2"
"""Name of the strategy, for `trainer.strategy`."""


class FSDP2Strategy(ModelParallelStrategy):
    """Data parallelism over all devices. Checkpoints are one file, the same as those of a single device."""

    strategy_name = FSDP2

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Lightning numbers an optimiser's parameters by their order in the model, the optimiser by its groups. These two
    # methods use the optimiser's numbers, so that a run can resume with another strategy.

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of all devices, numbered as the optimiser does; empty on all devices but the first."""
        assert self.model is not None
        plain = getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state: Any = get_optimizer_state_dict(self.model, plain, options=options)
        numbers = {name: number for number, name in enumerate(_names(self.model, plain))}
        return {
            "state": {numbers[name]: values for name, values in state.get("state", {}).items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in group["params"]]}
                for group in state.get("param_groups", [])
            ],
        }

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every device reads the file and keeps its part."""
        assert self.model is not None
        checkpoint = read_lightning(Path(checkpoint_path))
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=options)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            names = _names(self.model, optimizer)
            groups = [{**g, "params": [names[number] for number in g["params"]]} for g in state["param_groups"]]
            named = {"state": {names[number]: v for number, v in state["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
            for own, group in zip(optimizer.param_groups, state["param_groups"], strict=True):
                own.update({key: value for key, value in group.items() if key != "params"})  # tuples became lists
        return checkpoint


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The names of an optimiser's parameters, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def divides(strategy: Any) -> bool:
    """Whether `trainer.strategy`, a name or an object, divides parameters over devices."""
    return strategy == FSDP2 or isinstance(strategy, FSDP2Strategy)


if FSDP2 not in StrategyRegistry:
    StrategyRegistry.register(FSDP2, FSDP2Strategy, description="parameters divided over all devices")


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Divide `model` in place over the devices of the one-dimensional `mesh`; it must be the same on all of them.

    Scalars (recency biases) cannot be divided. Every device keeps them, and their gradients are averaged.
    """
    for layer in model.model.layers:
        for sublayer in (layer.self_attn, layer.mlp):
            fully_shard(sublayer, mesh=mesh)
    scalars = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:  # averaging what earlier backward passes have averaged changes nothing
            dist.all_reduce(parameter.grad, group=mesh.get_group())
            parameter.grad /= mesh.size()

    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)

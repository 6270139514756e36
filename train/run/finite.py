"""Training stops with the first number that is not finite, before it reaches the weights or a file.

Each step's losses and gradient norm are looked at before the optimiser's step; the norm is the one that clips. Weights
are looked at before they are written: to a checkpoint, to the trail, and at the end. So every checkpoint is finite.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnres.sharded import whole
from probe.failures import CannotGoOn
from probe.files.layout import CHECKPOINTS, LAST_CHECKPOINT

ADVICE = "a lower model.learning_rate, or more model.warmup_steps, may help"


class NotFinite(CannotGoOn):
    """A loss, gradient or weight is not finite."""


def check_step(trainer: Trainer, module: LightningModule, losses: Tensor, norm: Tensor) -> None:
    """Raise `NotFinite`, on all processes together, if the step that is about to be made is not finite.

    Args:
        losses: (batches,) of the step, of this process.
        norm: of the gradient of all parameters. Half precision's scaler lets it overflow now and then, and skips the
            step itself.
    """
    is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    numbers = losses if is_scaled else torch.cat((losses, norm.to(losses).reshape(1)))
    is_finite = bool(numbers.isfinite().all())
    if trainer.world_size > 1:  # gradients are those of all, a loss is not
        is_finite = trainer.strategy.reduce_boolean_decision(is_finite, all=True)
    if is_finite:
        return
    what = _describe(module.model) or "no gradient by itself, but their norm"  # type: ignore[arg-type]
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    examples = data.examples_of_step(trainer.global_step)
    raise NotFinite(
        f"step {trainer.global_step} is not finite (loss {float(losses.mean()):.4g}): {what}; its batch is examples "
        f"{examples[0]} to {examples[-1]} of the split train; {_last_checkpoint(trainer)}; {ADVICE}"
    )


def check_validation(trainer: Trainer, model: nn.Module, loss: Tensor) -> None:
    """Raise `NotFinite` if the validation loss of a training is not: its weights are no good, finite or not."""
    if not loss.isfinite():
        found = _first_not_finite(model.named_parameters())
        what = f"the weight {found} is the first that is not finite" if found else "weights are finite, but too large"
        raise NotFinite(
            f"the validation loss after step {trainer.global_step} is {float(loss)}: {what}; "
            f"{_last_checkpoint(trainer)}; {ADVICE}"
        )


def check_weights(trainer: Trainer, model: nn.Module) -> None:
    """Raise `NotFinite` for weights that must not be written. To be called by all processes."""
    if bool(total_norm(model.parameters()).isfinite()):
        return
    if found := _first_not_finite((name, parameter) for name, parameter in model.named_parameters()):
        raise NotFinite(
            f"after step {trainer.global_step} the weight {found} is not finite; {_last_checkpoint(trainer)}; {ADVICE}"
        )


def _describe(model: nn.Module) -> str | None:
    """The first weight that is not finite, or else the first such gradient, by name."""
    if found := _first_not_finite(model.named_parameters()):
        return f"the weight {found} is the first that is not"
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    found = _first_not_finite(gradients)
    return f"the gradient of {found} is the first that is not" if found else None


def _first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    for name, tensor in tensors:
        values = whole(tensor.detach())
        if count := int((~values.isfinite()).sum()):
            return f"{name} ({count} of {values.numel()} values)"
    return None


def _last_checkpoint(trainer: Trainer) -> str:
    path = Path(trainer.default_root_dir) / CHECKPOINTS / LAST_CHECKPOINT
    try:
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except FileNotFoundError:
        return "no checkpoint was written before"
    except (OSError, RuntimeError, KeyError, UnpicklingError):
        return f"the last checkpoint is {path}"
    return f"the last finite checkpoint is {path}, of step {step}"


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """`torch.nn.utils.get_total_norm`, which does not take a mix of divided and whole tensors."""
    tensors = list(tensors)
    kinds = [[tensor for tensor in tensors if isinstance(tensor, DTensor) == divided] for divided in (True, False)]
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_to_norm(parameters: Iterable[nn.Parameter], largest: float, total: Tensor) -> None:
    """`torch.nn.utils.clip_grads_with_norm_`, which does not take a mix of divided and whole gradients."""
    parameters = list(parameters)
    for divided in (True, False):
        if kind := [parameter for parameter in parameters if isinstance(parameter, DTensor) == divided]:
            nn.utils.clip_grads_with_norm_(kind, largest, total)

"""The LightningModule: a Block AttnRes or vanilla Qwen3, trained to answer recall queries."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, get_scheduler

from attnres import AttnResConfig, AttnResForCausalLM, read_sites
from attnres.inputs import check_memory
from attnres.sharded import is_divided
from attnres.tasks import MQAR, Task, TaskBatch
from train.recall.flops import forward_flops
from train.recall.metrics import GroupAccuracy, RoutingEntropy
from train.recall.optim import RoutingLearningRates, parameter_groups, routing_gradient_norms
from train.run.finite import check_step, check_validation, clip_to_norm, total_norm
from train.run.sharding import shard

MIN_LEARNING_RATE_RATIO = 0.1
SHAPE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


class RetrievalModule(LightningModule):
    """A Qwen3 model, with Block Attention Residuals or without, and its optimiser.

    Model options have Hugging Face's names and meanings; those that start with `attnres_` are not used by `vanilla`.

    Args:
        architecture: `attnres` (Block Attention Residuals Qwen3) or `vanilla` (transformers' Qwen3).
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        num_hidden_layers: Number of layers, each of an attention and an MLP sublayer.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads; divides num_attention_heads.
        head_dim: Width of a head, even.
        tie_word_embeddings: Use the input embeddings as output head.
        attnres_num_blocks: Number of blocks the layers are divided into.
        attnres_source: What a completed block is: `cumulative` (a snapshot of the stream), `block_sum`, or
            `delta_block` (the stream less the source before; what is routed is added to the stream).
        attnres_mode: `block`, or `full`: every sublayer closes a block of its own.
        attnres_routing: `learned`, or `frozen`: routing parameters stay as they are at the start.
        attnres_recency_bias_init: Initial logit added to the current stream at every read.
        embedding_init_std: Standard deviation of the initial input embeddings; null for Hugging Face's 0.02.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay. Not applied to gains, biases, pseudo-queries, key gains.
        betas: AdamW's decay rates of the two moments.
        warmup_steps: Steps of linear warm-up; then a cosine to 10 % of the peak at trainer.max_steps.
        routing_learning_rates: Peak learning rates of queries, key gains and biases of their own.
        gradient_checkpointing: Compute the layers again in the backward pass instead of keeping what they computed.
        compile: Compile the model with torch.compile.
        task: What is learned: sets vocab_size, and max_position_embeddings to the tokens of its longest example.
        seed: Recorded in checkpoints and exports; seeding is the caller's.

    Raises:
        ValueError: a size or rate that is not positive, heads that do not divide, or an unsupported `attnres_` value.
    """

    def __init__(
        self,
        architecture: Literal["attnres", "vanilla"] = "attnres",
        hidden_size: int = 64,
        intermediate_size: int = 128,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 4,
        head_dim: int = 16,
        tie_word_embeddings: bool = False,
        attnres_num_blocks: int = 4,
        attnres_source: Literal["cumulative", "block_sum", "delta_block"] = "cumulative",
        attnres_mode: Literal["block", "full"] = "block",
        attnres_routing: Literal["learned", "frozen"] = "learned",
        attnres_recency_bias_init: float = 0.0,
        embedding_init_std: float | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        routing_learning_rates: RoutingLearningRates = RoutingLearningRates(),  # noqa: B008 (frozen)
        gradient_checkpointing: bool = False,
        compile: bool = False,
        task: Task = MQAR(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        options = dict(locals())  # first of all, while it is the options by name and nothing else
        super().__init__()
        options["vocab_size"] = task.vocab_size
        _check(options)
        _check_memory(options)
        self.model = _build_model(options)
        if embedding_init_std is not None:
            nn.init.normal_(self.model.get_input_embeddings().weight, std=embedding_init_std)  # type: ignore[arg-type]
        if gradient_checkpointing:  # newer releases of transformers have renamed it
            getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)()
        if compile:  # in place, so that the names of the parameters stay; of this module it would fail at logging
            self.model.compile()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.routing_learning_rates = routing_learning_rates
        self.flops_per_batch = 0.0  # of the last batch; ThroughputMonitor reads it
        self._step_results: list[Tensor] = []  # loss and accuracy of each batch of the step
        # torchmetrics counts examples over all devices; Lightning's own mean would weigh all parts the same.
        self.task = task
        self.val_accuracy = GroupAccuracy(task.groups)
        # A loss that is not a number stays one: by default it is left out, and with "disable" all weights would be 1.
        self.val_loss = MeanMetric(nan_strategy=math.nan)
        config = self.model.config
        self.val_routing_entropy = RoutingEntropy(read_sites(config)) if isinstance(config, AttnResConfig) else None
        self.save_hyperparameters(self._describe(int(seed)))

    def _describe(self, seed: int) -> dict[str, Any]:
        """What checkpoints hold of the options, in plain values: enough to build the model again."""
        optimizer = {
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "warmup_steps": self.warmup_steps,
            "routing_learning_rates": asdict(self.routing_learning_rates),
        }
        model_config = json.loads(json.dumps(self.model.config.to_dict(), default=str))
        return {"model_config": model_config, "condition": self.condition, "seed": seed, "optimizer": optimizer}

    @property
    def condition(self) -> str:
        """`vanilla`, the sources, or `frozen` and `frozen_block_sum`, …; with `_full` in full mode."""
        config = self.model.config
        if not isinstance(config, AttnResConfig):
            return "vanilla"
        name = config.attnres_source
        if config.attnres_routing == "frozen":
            name = "frozen" if name == "cumulative" else f"frozen_{name}"
        return name if config.attnres_mode == "block" else f"{name}_{config.attnres_mode}"

    def configure_model(self) -> None:
        """Divide the model over devices if the strategy asks for it."""
        if self.device_mesh is not None and not is_divided(self.model):
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the gradient of a step, once it is known to be finite."""
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = total_norm(p.grad for p in trained)
        check_step(self.trainer, self, torch.stack(self._step_results)[:, 0], norm)
        if not gradient_clip_val:
            return
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            clip_to_norm(trained, gradient_clip_val, norm)

    def forward(self, batch: TaskBatch, **options: Any) -> Any:
        """The model's outputs; logits are those at the queries, (batch, positions, vocab_size)."""
        return self.model(batch.input_ids, logits_to_keep=batch.query_positions, use_cache=False, **options)

    def answer(self, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Call the model and score its outputs."""
        return self.score(batch, self(batch))

    @staticmethod
    def score(batch: TaskBatch, outputs: Any) -> tuple[Tensor, Tensor]:
        """The mean NLL of the answers in nats, and which answers are right, (batch, positions) bool."""
        answers, logits = batch.labels[:, batch.query_positions], outputs.logits.float()
        if batch.num_queries is None:
            loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        else:
            losses = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="none")
            loss = mean_over_queries(losses.view_as(answers), batch)
        return loss, logits.argmax(dim=-1) == answers

    def training_step(self, batch: TaskBatch, batch_idx: int) -> dict[str, Tensor]:
        loss, correct = self.answer(batch)
        self.flops_per_batch = self._model_flops(len(batch.labels), batch.labels.shape[1], len(batch.query_positions))
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._step_results.clear()
        self._step_results.append(torch.stack((loss.detach(), mean_over_queries(correct.float(), batch))))
        mean_loss, mean_accuracy = torch.stack(self._step_results).mean(0)  # of the step's batches so far
        metrics = {
            "train/loss": mean_loss,
            "train/accuracy": mean_accuracy,
            "train/size": float(batch.size),
            "train/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        self.log_dict(metrics, batch_size=len(batch), sync_dist=True)
        return {"loss": loss, "accuracy": mean_accuracy}

    def _model_flops(self, batch_size: int, seq: int, queries: int) -> float:
        """FLOPs of a batch, for MFU. Recomputed activations do not count (arXiv:2204.02311, appendix B)."""
        return 3 * batch_size * sum(forward_flops(self.model.config, seq, queries).values())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norms of routing gradients before they are clipped, at the steps that are logged."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            norms = routing_gradient_norms(self.model)
            self.log_dict({f"train/grad_norm_{kind}": norm for kind, norm in norms.items()})

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
        if self.val_routing_entropy is None:
            outputs = self(batch)
        else:
            outputs = self(batch, output_routing_weights=True)
            self.val_routing_entropy.update(outputs.routing_weights)
        loss, correct = self.score(batch, outputs)
        self.val_accuracy.update(correct, batch.groups)
        self.val_loss.update(loss, len(batch))

    def on_validation_epoch_end(self) -> None:
        accuracies, loss = self.val_accuracy.compute(), self.val_loss.compute()
        if self.trainer.state.fn == TrainerFn.FITTING:
            check_validation(self.trainer, self.model, loss)
        metrics = {"val/loss": loss, **{f"val/{name}": accuracy for name, accuracy in accuracies.items()}}
        if self.val_routing_entropy is not None:
            shares = self.val_routing_entropy.compute()
            metrics |= {f"val/routing_entropy_{sublayer}": share for sublayer, share in shares.items()}
            self.val_routing_entropy.reset()
        self.log_dict(metrics, sync_dist=True)
        self.val_accuracy.reset()
        self.val_loss.reset()

    def build_optimizer(self, foreach: bool | None = None) -> torch.optim.AdamW:
        """AdamW over the module's parameters; `foreach` as torch's, which decides by the device."""
        groups = parameter_groups(self.model, self.weight_decay, self.routing_learning_rates)
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, foreach=foreach)

    def configure_optimizers(self) -> Any:
        optimizer = self.build_optimizer()
        scheduler = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=self.trainer.max_steps,
            scheduler_specific_kwargs={"min_lr_rate": MIN_LEARNING_RATE_RATIO},
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def mean_over_queries(values: Tensor, batch: TaskBatch) -> Tensor:
    """Mean of `values` (batch, positions), which must be zero where an example has no query.

    Where examples have different numbers of queries, each example weighs the same. The mean over a step is then also
    the mean over its devices.
    """
    if batch.num_queries is None:
        return values.mean()
    return (values.sum(1) / batch.num_queries).mean()


def _build_model(options: Mapping[str, Any]) -> PreTrainedModel:
    """The model that the options of `RetrievalModule` describe."""
    common = {key: options[key] for key in (*SHAPE, "tie_word_embeddings")}
    common["max_position_embeddings"] = options["task"].num_tokens
    common |= {"bos_token_id": None, "eos_token_id": None}
    if options["architecture"] == "vanilla":
        return Qwen3ForCausalLM(Qwen3Config(**common))
    config = AttnResConfig(**common, **{key: options[key] for key in options if key.startswith("attnres_")})
    model = AttnResForCausalLM(config)
    # The recency bias of a read without `current` takes no gradient, which DistributedDataParallel refuses.
    for site in read_sites(config):
        if site.layer_idx is not None and not site.has_current and not site.is_additive:
            name = "attn_res_bias" if site.sublayer == "self_attn" else "mlp_res_bias"
            getattr(model.model.layers[site.layer_idx], name).requires_grad_(False)
    return model


def _check_memory(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for a model whose weights alone are more than this machine's memory. On "meta", none are."""
    if torch.get_default_device().type == "meta":
        return
    hidden, heads = options["hidden_size"], 2 * (options["num_attention_heads"] + options["num_key_value_heads"])
    layer = hidden * (3 * options["intermediate_size"] + heads * options["head_dim"])
    parameters = options["num_hidden_layers"] * layer + options["vocab_size"] * hidden
    hint = "make model.hidden_size, intermediate_size, num_hidden_layers or data.task.vocab_size smaller"
    check_memory(f"a model of {parameters:,} parameters", 4 * parameters, hint)


def _check(options: Mapping[str, Any]) -> None:
    """Raises ValueError for the first option that is out of range."""
    heads, key_value_heads = options["num_attention_heads"], options["num_key_value_heads"]
    std, betas = options["embedding_init_std"], options["betas"]
    requirements = [
        ("learning_rate", options["learning_rate"] > 0, "positive"),
        ("weight_decay", options["weight_decay"] >= 0, "at least 0"),
        ("betas", all(0 <= beta < 1 for beta in betas), "at least 0 and below 1"),
        ("warmup_steps", options["warmup_steps"] >= 0, "at least 0"),
        ("embedding_init_std", std is None or std > 0, "positive or null"),
        *((key, options[key] >= 1, "a positive integer") for key in SHAPE),
        ("head_dim", options["head_dim"] % 2 == 0, "even (rotary position embedding)"),
    ]
    for key, holds, wanted in requirements:
        if not holds:
            raise ValueError(f"{key} must be {wanted}, got {options[key]}")
    if heads % key_value_heads:
        raise ValueError(f"num_key_value_heads ({key_value_heads}) must divide num_attention_heads ({heads})")

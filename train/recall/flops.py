"""Floating-point operations of a model, by part. A multiplication and an addition are two.

Counted are the matrix products, attention, and the weighted sums of routing. Norms, activations, softmax and the
optimiser are not: a few per cent. torch's `FlopCounterMode` finds the same numbers, but it leaves out the weighted
sums, and with gradient checkpointing it books attention under the MLP. A formula costs nothing while a model trains.
"""

from __future__ import annotations

from itertools import accumulate

from transformers import PreTrainedModel

from attnres import AttnResConfig, read_sites

ATTENTION_BACKWARD = 2.5
"""Backward pass of attention, in forward passes: fused kernels compute the scores again. Other parts take 2."""


def forward_flops(config, seq: int, queries: int) -> dict[str, float]:
    """Operations of one sequence's forward pass.

    Attention is counted over all `seq` x `seq` scores, as `FlopCounterMode` does, although half of them are masked.

    Args:
        config: the model's, an `AttnResConfig` or a `Qwen3Config`.
        seq: tokens of the sequence.
        queries: positions at which the head runs.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    query_width = config.num_attention_heads * config.head_dim
    key_value_width = config.num_key_value_heads * config.head_dim
    flops = {
        "projections": 2 * layers * seq * hidden * (2 * query_width + 2 * key_value_width),
        "attention": 2 * layers * seq * seq * 2 * query_width,
        "mlp": 2 * layers * seq * hidden * 3 * config.intermediate_size,
        "head": 2 * queries * hidden * config.vocab_size,
    }
    if isinstance(config, AttnResConfig):
        sites = read_sites(config)
        # A logit for each source that is completed before, and one for `current` unless it is the newest of those.
        closed = [config.closes_block(site.layer_idx, site.sublayer) for site in sites if site.layer_idx is not None]
        before = accumulate(closed, initial=1)  # the embedding
        logits = sum(n + (s.has_current and not s.current_is_alias) for n, s in zip(before, sites, strict=False))
        flops["routing_logits"] = 2 * seq * hidden * logits
        flops["routing_sums"] = 2 * seq * hidden * sum(site.num_sources for site in sites)
    return {part: float(value) for part, value in flops.items()}


def training_flops(model: PreTrainedModel, seq: int, queries: int) -> dict[str, float]:
    """Operations of one sequence's forward and backward pass.

    Gradient checkpointing adds a forward pass of all layers. (In truth it stops a little before the end of each.)
    """
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    backward = {"attention": ATTENTION_BACKWARD}
    if getattr(model.config, "attnres_routing", None) == "frozen":
        backward["routing_logits"] = 1  # queries take no gradient
    return {
        part: flops * (1 + backward.get(part, 2) + (recomputed and part != "head"))
        for part, flops in forward_flops(model.config, seq, queries).items()
    }

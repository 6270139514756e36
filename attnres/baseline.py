"""The recency-bias wrapper: a vanilla Qwen3 seen as an AttnRes model whose routing has an analytic answer."""

from __future__ import annotations

import copy
import math
from os import PathLike

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from attnres.configuration_attnres import AttnResConfig
from attnres.loading import load_whole
from attnres.modeling_attnres import AttnResForCausalLM
from attnres.sites import ReadSite, read_sites


def wrap_qwen3(
    model_or_path: Qwen3ForCausalLM | str | PathLike[str],
    num_blocks: int = 8,
    recency_bias: float = 3.0,
    trainable: bool = False,
) -> AttnResForCausalLM:
    """See a vanilla Qwen3 as an AttnRes model with zero queries and a fixed recency bias (cumulative sources).

    With n sources the mass on `current` is `e^b / (e^b + n - 1)` and each other source gets `1 / (e^b + n - 1)`,
    whatever the input; as b grows the vanilla model comes back (arXiv:2606.13168, baseline).

    Args:
        model_or_path: the model, a folder or a hub id.
        num_blocks: N of the block partition.
        recency_bias: b of every read.
        trainable: whether queries, key gains and biases take gradients. By default the schedule is fixed.

    Returns:
        A model in the dtype of the vanilla one. The two share their parameters: `to`, an optimiser or
        `resize_token_embeddings` on one of them changes the other.

    Raises:
        ValueError: this is not a vanilla Qwen3, nothing was found, tensors are missing or unexpected, there are more
            blocks than layers, or the dtype does not hold the bias.
    """
    vanilla = _load_vanilla(model_or_path) if isinstance(model_or_path, (str, PathLike)) else model_or_path
    if not isinstance(vanilla, Qwen3ForCausalLM):
        raise ValueError(f"wrap_qwen3 takes a Qwen3ForCausalLM, got {type(vanilla).__name__}")
    fields = vanilla.config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        fields.pop(key, None)
    config = AttnResConfig(
        **fields,
        attnres_num_blocks=num_blocks,
        attnres_recency_bias_init=recency_bias,
        attnres_routing="learned" if trainable else "frozen",
    )
    reference = vanilla.model.norm.weight
    if abs(recency_bias) > (most := torch.finfo(reference.dtype).max):
        raise ValueError(
            f"recency_bias {recency_bias:g} is not a number in {reference.dtype}, whose largest is {most:g}"
        )
    config._attn_implementation = vanilla.config._attn_implementation
    with torch.device("meta"):
        wrapped = AttnResForCausalLM(config)
    for name, parameter in vanilla.named_parameters(remove_duplicate=False):  # tied ones under both names
        _assign(wrapped, name, parameter)
    wrapped.generation_config = copy.deepcopy(vanilla.generation_config)
    wrapped.model.rotary_emb = vanilla.model.rotary_emb  # it has buffers only
    for name, parameter in wrapped.routing_parameters().items():
        value = torch.empty(parameter.shape, dtype=reference.dtype, device=reference.device)
        value.fill_(0.0 if "_proj" in name else 1.0 if "_norm" in name else recency_bias)
        _assign(wrapped, name, nn.Parameter(value, requires_grad=trainable))
    return wrapped.train(vanilla.training)


def _load_vanilla(path: str | PathLike[str]) -> Qwen3ForCausalLM:
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(f"wrap_qwen3: {path} is neither a folder with a model nor a model on the hub") from error
    if config.model_type != Qwen3Config.model_type:
        raise ValueError(f"wrap_qwen3: {path} is a '{config.model_type}' model, only a vanilla 'qwen3' can be wrapped")
    try:
        return load_whole(Qwen3ForCausalLM.from_pretrained, path)[0]
    except OSError as error:
        raise ValueError(f"wrap_qwen3: {path} has a config.json but no weights ({error})") from error


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Make `parameter` itself, not a copy, the model's parameter `name`."""
    module_name, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module_name), attribute, parameter)


def _site_schedule(site: ReadSite, bias: float) -> Tensor:
    logits = torch.zeros(site.num_sources, dtype=torch.float64)
    if site.has_current:
        logits[-1] = bias
    return torch.softmax(logits, dim=-1)


def recency_schedule(model_or_config: AttnResForCausalLM | AttnResConfig | Qwen3Config) -> tuple[Tensor, ...]:
    """The analytic routing weights of a model whose queries are zero.

    Args:
        model_or_config: a model, for the schedule of its own biases, or a configuration, for that of
            `attnres_recency_bias_init`.

    Returns:
        One float64 tensor (num_sources,) per read, in the order of `attnres.read_sites`.

    Raises:
        ValueError: the model has learned (non-zero) queries, so its weights depend on the input, or this is not an
            AttnRes model or configuration.
    """
    is_model = isinstance(model_or_config, AttnResForCausalLM)
    config = model_or_config.config if is_model else model_or_config
    if not isinstance(config, AttnResConfig):
        raise ValueError(
            f"recency_schedule needs an AttnResForCausalLM or its config, got {type(model_or_config).__name__}"
        )
    sites = read_sites(config)
    if not isinstance(model_or_config, AttnResForCausalLM):
        return tuple(_site_schedule(site, config.attnres_recency_bias_init) for site in sites)
    router = model_or_config.model.router()
    if bool(router.queries.any()):
        raise ValueError(
            "recency_schedule: this model has learned queries, its routing weights depend on the input; "
            "only models with zero queries (wrap_qwen3, attnres_routing='frozen') have an analytic schedule"
        )
    biases = [0.0 if bias is None else float(bias.detach()) for bias in router.biases]
    if not all(map(math.isfinite, biases)):
        raise ValueError("recency_schedule: the model has a recency bias that is not finite")
    return tuple(_site_schedule(site, bias) for site, bias in zip(sites, biases, strict=True))

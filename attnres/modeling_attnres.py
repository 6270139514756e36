# trf-ignore: TRF028: the licence is stated once, in LICENSE and pyproject.toml.
"""Block Attention Residuals on Qwen3. This file states only what differs from transformers' own Qwen3.

Data flows one way: tokens -> `DepthState` -> for each layer *read, run, write* (twice) and *close the block* ->
final read (block_sum) -> norm -> logits. `attnres/routing.py` defines a read; `attnres/sites.py` lists all reads.

(TRF057 of transformers' modelling linter is off: `auto_docstring` would overwrite our docstrings.)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from attnres import formats, routing
from attnres.configuration_attnres import AttnResConfig
from attnres.loading import load_whole
from attnres.outputs import AttnResCausalLMOutputWithPast, AttnResModelOutputWithPast, LayerOutput, Recorder
from attnres.routing import DepthState, Intervention, Router
from attnres.sites import ReadSite, read_sites


class DepthQuery(nn.Module):
    """A pseudo-query `w`, shape (1, hidden). It has a class of its own so that `_init_weights` can set it to zero.

    It is no `nn.Linear`: the router reads the weight and never calls the module, so adapters and quantisation, which
    wrap or replace linear modules, would do nothing here, or do harm.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size))


def _recency_bias(config: AttnResConfig) -> nn.Parameter | None:
    """A read's bias on `current`; an additive read, which has no such source, has none."""
    # CODEPATH: additive in checkpoints of Delta Attention Residuals (delta_block, delta), not in all others.
    return None if config.is_additive else nn.Parameter(torch.tensor(float(config.attnres_recency_bias_init)))


class AttnResDecoderLayer(GradientCheckpointingLayer):
    """A Qwen3 layer whose two residual additions are replaced by depth-wise reads and writes."""

    def __init__(self, config: AttnResConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Qwen3Attention(config=config, layer_idx=layer_idx)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # The routing parameters carry the names of the published checkpoints; `AttnResModel.router` reads them.
        self.attn_res_proj = DepthQuery(config.hidden_size)
        self.attn_res_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn_res_bias = _recency_bias(config)
        self.mlp_res_proj = DepthQuery(config.hidden_size)
        self.mlp_res_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_res_bias = _recency_bias(config)
        self.closes_block = tuple(config.closes_block(layer_idx, name) for name in ("self_attn", "mlp"))

    def forward(
        self,
        state: DepthState,
        router: Router,
        intervention: Intervention | None = None,
        stop_before: int | None = None,
        **kwargs: Any,
    ) -> LayerOutput:
        """Read, run and write: first attention, unless `state` is already past it, then the MLP, unless `stop_before`
        is its read."""
        states: list[DepthState] = []
        all_weights: list[Tensor] = []
        attentions = None
        if state.read_index % 2 == 0:
            hidden_states, weights, state = routing.read(router, state, intervention)
            attn_output, attentions = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            state = routing.write(state, attn_output)
            if self.closes_block[0]:
                state = routing.close_block(router, state, attn_output)
            states.append(state)
            all_weights.append(weights)
        if state.read_index != stop_before:
            hidden_states, weights, state = routing.read(router, state, intervention)
            mlp_output = self.mlp(self.post_attention_layernorm(hidden_states))
            state = routing.write(state, mlp_output)
            if self.closes_block[1]:
                state = routing.close_block(router, state, mlp_output)
            states.append(state)
            all_weights.append(weights)
        return LayerOutput(tuple(states), tuple(all_weights), attentions)


# trf-ignore: TRF057: see the head of this file.
class AttnResPreTrainedModel(PreTrainedModel):
    config_class = AttnResConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["AttnResDecoderLayer"]
    _skip_keys_device_placement: ClassVar = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """
        | parameter | initial value |
        |---|---|
        | linear and embedding weights | normal(0, `initializer_range`); the row of `pad_token_id` 0 |
        | linear biases (`attention_bias`) | 0 |
        | norm gains, key gains `*_res_norm.weight` | 1 |
        | pseudo-queries `*_res_proj.weight` | 0: a uniform read, but for the recency bias |
        | recency biases `*_res_bias` (none with delta_block) | `attnres_recency_bias_init` |

        Values loaded from a checkpoint stay as they are: `transformers.initialization` skips them.
        """
        super()._init_weights(module)
        if isinstance(module, DepthQuery):
            init.zeros_(module.weight)
        elif isinstance(module, AttnResDecoderLayer):
            for bias in (module.attn_res_bias, module.mlp_res_bias):
                if bias is not None:
                    init.constant_(bias, self.config.attnres_recency_bias_init)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but missing or unexpected tensors are errors. Frozen routing comes back frozen.

        Raises:
            ValueError: a tensor is missing, unexpected or misshapen, or the variant of AttnRes is not supported.
        """
        model, info = load_whole(super().from_pretrained, *args, **kwargs)
        model._apply_frozen_routing()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, format: str = formats.ATTNRES, **kwargs: Any) -> None:
        """As in transformers, and:

        Args:
            format: of the files: "attnres", which holds every model; "delta" (Delta Attention Residuals: block_sum and
                delta_block without biases) or "open_attnres" (open-attention-residuals: cumulative), for those codes.

        Raises:
            ValueError: the format cannot hold this model.
        """
        formats.check_writable(self.config, format)
        if format == formats.DELTA:
            state = kwargs.get("state_dict")
            kwargs["state_dict"] = formats.written_state(self.state_dict() if state is None else state, format)
        with formats.writing(format):
            super().save_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        """Refuse reentrant checkpointing, which finds no tensors in a DepthState. Transformers' switches call this."""
        if getattr(kwargs.get("gradient_checkpointing_func"), "keywords", {}).get("use_reentrant"):
            raise ValueError("gradient checkpointing with use_reentrant=True is not supported; False is the default")
        super()._set_gradient_checkpointing(*args, **kwargs)

    def routing_parameters(self) -> dict[str, nn.Parameter]:
        """Pseudo-queries, key gains and recency biases by name."""
        return {name: p for name, p in self.named_parameters() if "_res_" in name}

    def _apply_frozen_routing(self) -> None:
        # CODEPATH: "frozen" in what wrap_qwen3 makes and in configs/frozen.yaml, "learned" in published checkpoints.
        if self.config.attnres_routing == "frozen":
            for parameter in self.routing_parameters().values():
                parameter.requires_grad_(False)


UNUSED_KWARGS = {"token_type_ids"}  # tokenizers return it; Qwen3 ignores it too
KNOWN_KWARGS = TransformersKwargs.__annotations__.keys() | {"cache_position", "return_dict"}


def _checked(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Refuse unknown arguments: dropping a misspelt `intervention` would report a clean run as an ablated one."""
    kwargs = {name: value for name, value in kwargs.items() if name not in UNUSED_KWARGS}
    unknown = kwargs.keys() - KNOWN_KWARGS
    if unknown:
        raise TypeError(f"forward() has no argument '{min(unknown)}'")
    return kwargs


# trf-ignore: TRF057: see the head of this file.
class AttnResModel(AttnResPreTrainedModel):
    """Embedding, layers, final read (block_sum) and final norm."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^lm_head\."]  # of a checkpoint with a head

    def __init__(self, config: AttnResConfig) -> None:
        config.check()
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(AttnResDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config=config)
        self.sites = read_sites(config)
        self.final_res_proj: DepthQuery | None = None
        self.final_res_norm: Qwen3RMSNorm | None = None
        if self.sites[-1].sublayer == "final":
            self.final_res_proj = DepthQuery(config.hidden_size)
            self.final_res_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()
        self._apply_frozen_routing()

    def router(self) -> Router:
        """The current routing parameters, with the gains folded into the queries."""
        projections, norms, biases = [], [], []
        for layer in self.layers:
            projections += [layer.attn_res_proj, layer.mlp_res_proj]
            norms += [layer.attn_res_norm, layer.mlp_res_norm]
            biases += [layer.attn_res_bias, layer.mlp_res_bias]
        if self.final_res_proj is not None:
            projections.append(self.final_res_proj)
            norms.append(self.final_res_norm)
            biases.append(None)
        device = self.norm.weight.device
        if any(projection.weight.device != device for projection in projections):
            raise ValueError("routing parameters are on several devices: a device_map must keep the model on one")
        dtype = routing.routing_dtype(self.norm.weight.dtype)
        queries = torch.cat([p.weight for p in projections]).to(dtype)
        gains = torch.stack([n.weight for n in norms]).to(dtype)
        about = (self.config.rms_norm_eps, self.config.attnres_source, self.config.attnres_mode == "full", self.sites)
        return Router(queries * gains, tuple(biases), *about)

    def _attention_inputs(
        self,
        embedding: Tensor,
        attention_mask: Tensor | dict | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
        """The causal mask of each layer type, and the arguments that all attention sublayers share, as in Qwen3."""
        if position_ids is None:
            num_past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(embedding.shape[1], device=embedding.device) + num_past).unsqueeze(0)
        shared = {"position_ids": position_ids, "past_key_values": past_key_values}
        if isinstance(attention_mask, dict):  # prepared by `generate`
            masks = attention_mask
        else:
            kwargs = {"config": self.config, "inputs_embeds": embedding, "attention_mask": attention_mask, **shared}
            masks = {"full_attention": create_causal_mask(**kwargs)}
            # CODEPATH: sliding layers in Qwen3 configurations with use_sliding_window; published AttnRes has none.
            if "sliding_attention" in self.config.layer_types:
                masks["sliding_attention"] = create_sliding_window_causal_mask(**kwargs)
        return masks, {**shared, "position_embeddings": self.rotary_emb(embedding, position_ids)}

    # trf-ignore: TRF045: the hooks of `capture_outputs` record tensors, and what our layers pass on is a `DepthState`.
    @can_return_tuple
    def forward(  # trf-ignore: TRF057: see the head of this file.
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_routing_weights: bool = False,
        intervention: Intervention | None = None,
        depth_state: DepthState | None = None,
        output_depth_states: bool = False,
        stop_before: int | None = None,
        **kwargs: Any,
    ) -> AttnResModelOutputWithPast:
        """
        As [`~transformers.Qwen3Model.forward`], and:

        Args:
            output_routing_weights: return the routing weights of every read.
            intervention: called at every read; see `attnres.routing.Intervention`.
            depth_state: resume before this state's next read. Earlier sublayers do not run; the bits are the same.
            output_depth_states: return the state before every read that happens, and the one after the last layer.
            stop_before: stop before this sublayer's read. Then the last of `depth_states` is the state there, and
                `last_hidden_state` is None.

        Raises:
            ValueError: not exactly one of `input_ids`, `inputs_embeds` and `depth_state` is given, `stop_before` is
                not a later read, or the attention implementation cannot return the attention weights asked for.
            TypeError: an argument does not exist.
        """
        kwargs = _checked(kwargs)
        record = Recorder.of_call(
            self.config,
            hidden_states=output_hidden_states,
            attentions=output_attentions,
            routing_weights=output_routing_weights,
            depth_states=output_depth_states,
        )
        if (input_ids is not None) + (inputs_embeds is not None) + (depth_state is not None) != 1:
            raise ValueError("give exactly one of input_ids, inputs_embeds or depth_state")
        router = self.router()
        if depth_state is None:
            embedding = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            if embedding.device != router.queries.device:
                raise ValueError(
                    f"routing parameters are on {router.queries.device}, inputs on {embedding.device}: offloading is "
                    "not supported, as all reads of a model are prepared at once"
                )
            state = routing.start(router, embedding)
        else:
            state = depth_state
        if stop_before is not None and not state.read_index < stop_before < 2 * len(self.layers):
            raise ValueError(f"stop_before must be a sublayer's read after {state.read_index}, got {stop_before}")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        masks, shared = self._attention_inputs(state.completed[0], attention_mask, position_ids, past_key_values)

        record.add("depth_states", state)
        run = slice(state.read_index // 2, None if stop_before is None else (stop_before + 1) // 2)
        for layer, layer_type in zip(self.layers[run], self.config.layer_types[run], strict=True):
            record.add("hidden_states", state.stream)
            attention = {"attention_mask": masks[layer_type], "use_cache": use_cache, **shared, **kwargs}
            output = layer(state, router, intervention, stop_before, **attention)
            state = output.states[-1]
            record.add("depth_states", *output.states)
            record.add("routing_weights", *output.routing_weights)
            record.add("attentions", output.attentions)

        last_hidden_state = None
        if stop_before is None:
            hidden_states = state.stream
            if self.final_res_proj is not None:
                hidden_states, weights, _ = routing.read(router, state, intervention)
                record.add("routing_weights", weights)
            last_hidden_state = self.norm(hidden_states)
            record.add("hidden_states", last_hidden_state)
        return AttnResModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            past_key_values=past_key_values if use_cache else None,
            **record.outputs(),
        )


# trf-ignore: TRF057: see the head of this file.
class AttnResForCausalLM(AttnResPreTrainedModel, GenerationMixin):
    """A Block AttnRes Qwen3 with a language-model head."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: AttnResConfig) -> None:
        super().__init__(config)
        self.model = AttnResModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def sites(self) -> tuple[ReadSite, ...]:
        """The model's reads, in the order of `routing_weights`."""
        return self.model.sites

    # trf-ignore: TRF057: see the head of this file.
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routing_weights: bool = False,
        intervention: Intervention | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> AttnResCausalLMOutputWithPast:
        """
        As [`~transformers.Qwen3ForCausalLM.forward`], and:

        Args:
            output_routing_weights: return `routing_weights`, one (batch, seq, num_sources) float32 tensor per read, in
                the order of `sites`. Sources are ordered embedding, completed blocks, current (if the read has one).
            intervention: called at every read; see `attnres.routing.Intervention`.
            shift_labels: (batch, seq) labels at the positions that predict them, instead of `labels`.

        Raises:
            ValueError: as in `AttnResModel.forward`, or `stop_before` is given, which leaves no logits.
        """
        if kwargs.get("stop_before") is not None:
            raise ValueError("stop_before leaves no logits: give it to model.model")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing_weights=output_routing_weights,
            intervention=intervention,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None or shift_labels is not None:
            if shift_labels is not None:
                kwargs["shift_labels"] = shift_labels
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return AttnResCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing_weights=outputs.routing_weights,
            depth_states=outputs.depth_states,
        )


__all__ = ["AttnResForCausalLM", "AttnResModel", "AttnResPreTrainedModel"]

"""A batch's clean run, and ablated runs that begin where they start to differ from it.

What makes a replay cheaper than a full forward, and leaves every number the same:

- it resumes the clean run before the first read at which an ablation acts (`DepthState`);
- ablations that start at one read run as one batch;
- where only query positions are ablated, positions before the first query keep the clean run's keys and values;
- after the last attention everything is per position: only the positions of answers are carried on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import DynamicCache

from attnres import AttnResForCausalLM
from attnres.routing import map_state
from probe.ablation.interventions import Ablation, Together
from probe.ablation.metrics import CleanRun
from probe.ablation.observer import Observer
from probe.examples.examples import Examples

NO_MASKS = {"full_attention": None, "sliding_attention": None}


class CleanBatch:
    """The clean run of a batch; `observer` measures it.

    Attributes:
        run: the clean run's logits at the queries, to compare others with.
        spent: full forwards run so far, times sequences; a part of a forward counts as that part.
    """

    def __init__(self, model: AttnResForCausalLM, inputs: Examples, observer: Observer, keep_cache: bool) -> None:
        self.model = model
        self.inputs = inputs
        self.queries = inputs.queries
        self.num_layers = model.config.num_hidden_layers
        self._cache = DynamicCache() if keep_cache else None  # without a config: sliding layers keep all keys, too
        outputs = model.model(
            inputs.input_ids,
            use_cache=keep_cache,
            past_key_values=self._cache,
            output_depth_states=True,
            intervention=observer,
        )
        self._states = outputs.depth_states
        self._first_query = int(self.queries.any(0).nonzero()[0])
        logits = model.lm_head(outputs.last_hidden_state[self.queries])
        self.run = CleanRun.from_logits(logits, inputs.labels[self.queries], inputs.rivals, inputs.answer_rows)
        self.spent = float(len(inputs))

    def num_tokens(self, at_queries: bool) -> int:
        """Tokens of one ablated run."""
        return self.queries[:, self._offset(at_queries) :].numel()

    def _offset(self, at_queries: bool) -> int:
        """Positions that ablations cannot change."""
        return self._first_query if at_queries and self._cache is not None else 0

    def ablated(self, start: int, ablations: Sequence[Ablation], at_queries: bool = False) -> list[dict[str, Tensor]]:
        """Per-query metrics of the run under each ablation, none of which acts before read `start`.

        Args:
            at_queries: the ablations act at query positions only.
        """
        offset = self._offset(at_queries)
        queries = self.queries[:, offset:]
        last = 2 * self.num_layers - 1  # the last MLP's read: from there on nothing looks at other positions
        count, state = len(ablations), self._states[start]
        num_answers, seq = len(self.run.answers), self.queries.shape[1]
        self.spent += count * replay_cost(start, self.num_layers, seq, queries.numel(), num_answers)

        def answers(value: Tensor) -> Tensor:
            return value.unflatten(0, (count, -1))[:, queries]

        if start < last:
            state = self._map(state, lambda value: _repeat(value[:, offset:], count))
            state = self.model.model(
                depth_state=state,
                stop_before=last,
                output_depth_states=True,
                use_cache=False,
                past_key_values=self._prefix(start // 2, offset, count),
                intervention=_together(ablations, lambda value: value[:, offset:]),
            ).depth_states[-1]
            state = self._map(state, answers)
        else:
            state = self._map(state, lambda value: _repeat(value[:, offset:][queries].unsqueeze(0), count))
        outputs = self.model.model(
            depth_state=state,
            use_cache=False,
            attention_mask=NO_MASKS,
            intervention=_together(ablations, lambda value: value[:, offset:][queries].unsqueeze(0)),
        )
        metrics = self.run.of_hidden(outputs.last_hidden_state, self.model.lm_head)
        return [{name: values[i] for name, values in metrics.items()} for i in range(count)]

    def _map(self, state, function: Callable[[Tensor], Tensor]):
        return map_state(len(self.model.model.sites), state, function)

    def _prefix(self, first_layer: int, length: int, count: int) -> DynamicCache | None:
        """The clean run's keys and values of the first `length` positions, for `count` copies of the batch."""
        if length == 0:
            return None
        assert self._cache is not None
        prefix = DynamicCache()
        for layer_idx, layer in enumerate(self._cache.layers):
            # Layers that are not run only say how many positions are past.
            copies = count if layer_idx >= first_layer else 1
            held: Any = layer
            keys, values = (_repeat(x[:, :, :length], copies) for x in (held.keys, held.values))
            prefix.update(keys, values, layer_idx)
        return prefix


def replay_cost(start: int, num_layers: int, seq: int, tokens: int, answers: int) -> float:
    """What one ablated run from read `start` costs, in full forwards times sequences of `seq` tokens.

    Args:
        tokens: that the run carries up to the last MLP.
        answers: queries, the only positions that the last MLP is run for.
    """
    last = 2 * num_layers - 1
    sublayers = max(0, last - start) * tokens + max(0, last + 1 - max(start, last)) * answers
    return sublayers / (2 * num_layers * seq)


def _repeat(value: Tensor, count: int) -> Tensor:
    return value if count == 1 else value.repeat(count, *[1] * (value.dim() - 1))


def _together(ablations: Sequence[Ablation], view: Callable[[Tensor], Tensor]) -> Together:
    return Together(tuple(replace(each, context=replace(each.context, view=view)) for each in ablations))

"""Every kind of ablation as naively as it can be written: loops over positions, one full forward each (oracle.py).

Independent of `probe/`: of it, only the names of cells are used, and the definition of a partner and of the random
draws (which are data, not computation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnres import AttnResForCausalLM
from tests.support import oracle

FLOOR = 1e-3


class NaiveProbe:
    """One model on a batch of equally long sequences.

    Args:
        partner: for each sequence, the number of the one whose content and weights stand in.
        draws: (sequences, reads, sources) random numbers for `matched_mass` and `keep_random`.
    """

    def __init__(self, model: AttnResForCausalLM, input_ids: Tensor, labels: Tensor, partner: Sequence[int], draws):
        self.model, self.ids, self.labels, self.draws = model, input_ids, labels, draws
        self.sites = model.model.sites
        self.logits, self.weights, self.values = (self._detach(x) for x in oracle.run(model, input_ids))
        self.other_weights = [w[list(partner)] for w in self.weights]
        self.other_values = [v[:, list(partner)] for v in self.values]

    @staticmethod
    def _detach(value):
        return value.detach() if isinstance(value, Tensor) else tuple(v.detach() for v in value)

    def members(self, index: int, families: Sequence[str], with_aliases: bool) -> list[bool]:
        site = self.sites[index]
        chosen = [family in families for family in site.families]
        if with_aliases and site.current_is_alias and (chosen[-1] or chosen[-2]):
            chosen[-1] = chosen[-2] = True
        return chosen

    def logits_under(
        self, kind, families, reads, positions: Tensor, with_aliases: bool = False, sublayer: str = "both"
    ) -> Tensor:
        """Logits (B, T, vocabulary) of a full forward with the ablation at `positions` (B, T) of a route's `reads`.

        `sublayer` is the route's, which `rescue` silences at all depths.
        """
        keeps = kind in ("keep_only", "keep_random", "rescue")
        twins = keeps or (with_aliases and kind != "increment")  # to keep is to keep both; no increment has a twin
        sublayers = ("self_attn", "mlp") if sublayer == "both" else (sublayer,)
        changed = [s.index for s in self.sites if s.sublayer in sublayers] if kind == "rescue" else reads

        def replacement(index: int):
            def replace(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
                weights, values = weights.clone(), values.clone()
                chosen = self.members(index, families if index in reads else (), twins)
                for b, t in positions.nonzero().tolist():
                    new = self.at(kind, index, b, t, chosen, weights[b, t].tolist(), values[:, b, t])
                    if new is not None:
                        weights[b, t], values[:, b, t] = torch.tensor(new[0], dtype=weights.dtype), new[1]
                return weights, values

            return replace

        logits, _ = oracle.forward(self.model, self.ids, {index: replacement(index) for index in changed})
        return logits.detach()

    def at(self, kind: str, index: int, b: int, t: int, chosen: list[bool], w: list[float], v: Tensor):
        """New weights (list) and values (n, H) at one position, or None where nothing can be done."""
        n = len(w)
        inside, outside = [i for i in range(n) if chosen[i]], [i for i in range(n) if not chosen[i]]
        left = sum(w[i] for i in outside)
        if kind == "silence" or (kind == "rescue" and not inside):
            return [0.0] * n, v
        if not inside:
            return None
        if kind in ("keep_only", "keep_random") and not outside:
            return None
        if kind in ("mask_renormalise", "zero", "matched_mass", "increment") and not outside:
            return None
        match kind:
            case "mask_renormalise":
                return ([w[i] / left if i in outside else 0.0 for i in range(n)], v) if left >= FLOOR else None
            case "coalition":
                return [w[i] / left if i in outside and left >= FLOOR else 0.0 for i in range(n)], v
            case "zero":
                return [w[i] if i in outside else 0.0 for i in range(n)], v
            case "mean" | "resample":
                new = v.clone()
                for i in inside:
                    new[i] = self.values_mean(index, i, t) if kind == "mean" else self.other_values[index][i, b, t]
                return w, new
            case "uniform":
                mean = sum(w[i] for i in inside) / len(inside)
                return [mean if i in inside else w[i] for i in range(n)], v
            case "patch_weights":
                other = self.other_weights[index][b, t].tolist()
                if not outside:
                    return (other, v) if n > 1 else None
                new_left = sum(other[i] for i in outside)
                return (
                    ([other[i] if i in inside else w[i] * new_left / left for i in range(n)], v)
                    if left >= FLOOR
                    else None
                )
            case "matched_mass":
                return self._matched(index, b, inside, outside, w, left, v)
            case "keep_only" | "rescue":
                return self._keep(inside, w), v
            case "keep_random":
                return self._keep(self._random_sources(index, b, inside), w), v
            case "increment":
                return self._increment(index, inside, w, v)
        raise NotImplementedError(kind)

    def values_mean(self, index: int, source: int, t: int) -> Tensor:
        return self.values[index][source, :, t].mean(0)

    def _matched(self, index: int, b: int, inside, outside, w, left, v):
        mass = sum(w[i] for i in inside)
        if left < mass:
            return None
        new, to_take = list(w), mass
        for i in sorted(outside, key=lambda i: float(self.draws[b, index, i])):
            taken = min(new[i], to_take)
            new[i] -= taken
            to_take -= taken
        return [x / (1 - mass) for x in new], v

    def _keep(self, kept: Sequence[int], w: list[float]) -> list[float]:
        return [w[i] / sum(w[j] for j in kept) if i in kept else 0.0 for i in range(len(w))]

    def _random_sources(self, index: int, b: int, inside: list[int]) -> list[int]:
        """As many distinct sources as there are `inside`, those with the lowest draws; never the same ones."""
        site = self.sites[index]
        last = site.num_sources - 1
        distinct = [i for i in range(site.num_sources) if not (site.current_is_alias and i == last)]
        drawn = sorted(distinct, key=lambda i: float(self.draws[b, index, i]))
        count = len([i for i in inside if i in distinct])
        kept = drawn[:count]
        if set(kept) == {i for i in inside if i in distinct}:
            kept = [*drawn[: count - 1], drawn[count]]
        return [*kept, last] if site.current_is_alias and last - 1 in kept else kept

    def _increment(self, index: int, inside, w, v):
        """h minus the contributions of the increments, written as one source that carries everything."""
        site, n = self.sites[index], len(w)
        real = n - site.current_is_alias
        taken = [j for j in inside if j < real]
        if not taken or len(taken) == real:
            return None
        hidden = sum(w[i] * v[i] for i in range(n))
        for j in taken:
            increment = v[j] - (v[j - 1] if j else 0)
            hidden = hidden - sum(w[j:]) * increment
        values = v.clone()
        values[0] = hidden
        return [1.0] + [0.0] * (n - 1), values


def answers_of(labels: Sequence[int], values: Sequence[Sequence[int]]) -> list[tuple[list[int], Sequence[int]]]:
    """The (positions, tokens) of each answer: labels from left to right, cut into values."""
    found, positions = [], [t for t, label in enumerate(labels) if label != -100]
    while positions:
        (answer,) = [value for value in values if [labels[t] for t in positions[: len(value)]] == list(value)]
        found.append((positions[: len(answer)], answer))
        positions = positions[len(answer) :]
    return found


def metrics(logits: Tensor, labels: Tensor, values: Sequence[Sequence[Sequence[int]]], distractors: dict | None):
    """Per (sequence, first position) of an answer: nll, logit_diff, logit_diff_mean, accuracy; and the distractors,
    chosen where not given: the position at which one parts from the answer, and its token there.

    `logit_diff_mean` is the answer's lead over the mean of the other values, at the position of the distractor: of all
    of them where answers have one token, else of those that part from the answer there."""
    names = ("nll", "logit_diff", "logit_diff_mean", "accuracy")
    found: dict[str, dict[tuple[int, int], float]] = {name: {} for name in names}
    chosen = {}
    for b, row_labels in enumerate(labels.tolist()):
        for positions, answer in answers_of(row_labels, values[b]):
            rows = {t: logits[b, t].double() for t in positions}
            gaps, leads = {}, {t: [] for t in positions}
            for value in values[b]:
                parting = [j for j, (x, y) in enumerate(zip(answer, value, strict=False)) if x != y]
                if parting:
                    t, right, wrong = positions[parting[0]], answer[parting[0]], value[parting[0]]
                    gaps[t, wrong] = float(rows[t][right] - rows[t][wrong])
                    leads[t].append(gaps[t, wrong])
            key = (b, positions[0])
            chosen[key] = min(gaps, key=lambda gap: gaps[gap]) if distractors is None else distractors[key]
            nll = [-float(rows[t].log_softmax(0)[x]) for t, x in zip(positions, answer, strict=True)]
            hits = [int(rows[t].argmax()) == x for t, x in zip(positions, answer, strict=True)]
            found["nll"][key] = math.fsum(nll)
            found["logit_diff"][key] = gaps[chosen[key]]
            found["logit_diff_mean"][key] = math.fsum(leads[chosen[key][0]]) / len(leads[chosen[key][0]])
            found["accuracy"][key] = float(all(hits))
    return found, chosen

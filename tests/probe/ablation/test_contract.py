"""A kind of one's own is held to what it promises: no return of it is broadcast, cast or measured silently."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from attnres.tasks import MQAR
from probe import Examples, ProbeSettings, measure
from probe.ablation.base import Ablation, everywhere
from probe.ablation.interventions import find_kind

EXAMPLES = Examples.from_batch(MQAR(num_pairs=4, vocab_size=40).batch("probe", range(3)))


@pytest.fixture(autouse=True)
def _known_again() -> Iterator[None]:
    before = dict(Ablation.known)
    yield
    Ablation.known.clear()
    Ablation.known.update(before)


def define(ablated, **fields) -> type[Ablation]:
    return type("Odd", (Ablation,), {"kind": "odd", "ablated": lambda self, read: ablated(read), **fields})


def probe(model, **fields):
    settings = {"kinds": ["odd"], "scopes": ["all"], "positions": ["all"], "num_resamples": 20, "flip": False}
    return measure(model, EXAMPLES, ProbeSettings(**(settings | fields)))


def weights(change):
    return lambda read: (read._replace(routing_weights=change(read.routing_weights)), everywhere(read))


def sources(change):
    return lambda read: (read._replace(sources=change(read.sources)), everywhere(read))


WRONG = {
    "nothing": (lambda read: None, "returned NoneType .*: expected a Read and where that is possible"),
    "the read alone": (lambda read: read, "returned a tuple of ReadSite, Tensor, tuple, Tensor"),
    "a plain tuple": (
        lambda read: ((read.routing_weights, read.sources), everywhere(read)),
        "a tuple of tuple, Tensor",
    ),
    "one row of weights": (
        weights(lambda w: w[:1]),
        r"routing_weights as float32 \(1, 12, \d\) on cpu .*: expected flo",
    ),
    "a scalar": (weights(lambda w: w.mean()), r"routing_weights as float32 \(\) on cpu"),
    "no position": (weights(lambda w: w[:, :1]), r"routing_weights as float32 \(3, 1, \d\)"),
    "more sources": (weights(lambda w: torch.cat((w, w), -1)), "routing_weights as float32"),
    "other precision": (weights(lambda w: w.double()), r"as float64 .*: expected float32 \(3, 12, \d\) on cpu"),
    "an array": (weights(lambda w: w.numpy()), "returned routing_weights as ndarray"),
    "another device": (weights(lambda w: w.to("meta")), r"\(3, 12, \d\) on meta"),
    "negative": (weights(lambda w: -w), r"returned a weight of -[\d.]+ .*: expected weights of zero or more"),
    "NaN": (weights(lambda w: w * torch.nan), "weights or sources that are not finite"),
    "infinite": (weights(lambda w: w / 0), "weights or sources that are not finite"),
    "a source less": (sources(lambda s: s[:-1]), "returned sources a tuple of .*: expected 2 tensors"),
    "a list": (sources(list), "returned sources list"),
    "one vector": (sources(lambda s: tuple(v[:1, :1] for v in s)), r"returned source 0 as float32 \(1, 1, 16\)"),
    "an integer source": (sources(lambda s: (s[0].long(), *s[1:])), "returned source 0 as int64"),
    "a NaN source": (sources(lambda s: (s[0] * torch.nan, *s[1:])), "weights or sources that are not finite"),
    "possible as numbers": (lambda read: (read, everywhere(read).float()), r"possible as float32 .*: expected bool"),
    "possible once": (
        lambda read: (read, torch.tensor(True)),
        r"possible as bool \(\) on cpu .*: expected bool \(3, 12\)",
    ),
    "possible per source": (lambda read: (read, read.routing_weights > 0), r"possible as bool \(3, 12, \d\)"),
    "possible as a bool": (lambda read: (read, True), "possible as bool at"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_return_is_named_with_its_class(make_model, name):
    ablated, message = WRONG[name]
    define(ablated)
    with pytest.raises(ValueError, match=rf"^kind 'odd' \(Odd\) .*{message}") as error:
        probe(make_model())
    assert "\n" not in str(error.value)
    assert "at read " in str(error.value)


def test_where_it_is_not_possible_a_kind_may_return_what_it_likes(make_model):
    def nowhere(read):
        return read._replace(routing_weights=read.routing_weights * torch.nan), ~everywhere(read)

    define(nowhere)
    assert not probe(make_model()).effects["applicable"].any()


def test_a_kind_that_says_so_may_have_negative_weights(make_model):
    define(weights(lambda w: -w), is_signed=True)
    assert probe(make_model()).effects["effect"].abs().max() > 0


def test_effects_that_are_not_finite_are_named(make_model):
    """Finite on the clean run, and not in the run that the ablation makes: its reads are not looked at one by one."""
    seen = set()

    def once(read):
        is_new = read.site.index not in seen
        seen.add(read.site.index)
        return read._replace(routing_weights=read.routing_weights * (1 if is_new else torch.nan)), everywhere(read)

    define(once, labels=("all",), exists_at=lambda self, site: True)
    with pytest.raises(
        ValueError, match=r"^kind 'odd' \(Odd\) on all -> all attention at all positions makes outputs th"
    ):
        probe(make_model(), sublayers=["self_attn"])


def test_a_clean_run_that_overflows_is_named(make_model):
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(ValueError, match=r"^the clean model's outputs are not finite: the model overflows in float32"):
        probe(model, kinds=["zero"])


def test_a_kind_cannot_take_the_place_of_another():
    with pytest.raises(ValueError, match=r"^kind 'zero' of .*Odd is that of probe\.ablation\.necessity\.Zero: choose"):
        define(lambda read: (read, everywhere(read)), kind="zero")
    first, again = (define(lambda read: (read, everywhere(read))) for _ in range(2))  # a cell that is run again
    assert first is not again
    assert Ablation.known["odd"] is again


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"needs": "partners"}, "kind 'odd' needs 'partners': choose from None, partner, mean, priorities"),
        ({"labels": ("embeding",)}, "label of kind 'odd' 'embeding' does not exist; choose from embedding"),
    ],
)
def test_what_a_kind_asks_for_must_exist(fields, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        define(lambda read: (read, everywhere(read)), **fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("raise KeyError('x')", r"cannot be imported \(KeyError: 'x'\): give module.Class"),
        ("import none_such", r"cannot be imported \(ModuleNotFoundError: No module named 'none_such'\)"),
        ("def f(:", r"cannot be imported \(SyntaxError: "),
        ("Kind = 3", "must be a subclass of probe.Ablation with a `kind` of its own"),
        ("import probe\nclass Kind(probe.Ablation):\n    kind = 'bare'", "must define ablated"),
    ],
)
def test_a_module_that_cannot_be_used_is_named(tmp_path, monkeypatch, request, content, message):
    name = f"kinds_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"^kind '{name}.Kind' {message}"):
        find_kind(f"{name}.Kind")


@pytest.mark.parametrize("name", ["..x", ".", "a..b", "x.", "a b.c"])
def test_a_place_that_is_none_is_named(name):
    with pytest.raises(ValueError, match=r"^kind '.*' (cannot be imported|does not exist)"):
        find_kind(name)

"""The LightningModule: models, conditions, optimiser groups, metrics."""

import json
from types import SimpleNamespace

import pytest
import torch

from attnres import AttnResConfig, AttnResForCausalLM
from attnres.tasks import MQAR
from tests.conftest import MODES, SOURCES
from train.recall.metrics import GroupAccuracy, RoutingEntropy
from train.recall.module import RetrievalModule
from train.recall.optim import RoutingLearningRates, routing_gradient_norms

TINY = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "attnres_num_blocks": 2,
    "task": MQAR(num_pairs=4, vocab_size=32),
}


def make(**changes) -> RetrievalModule:
    return RetrievalModule(**{**TINY, **changes})


@pytest.mark.parametrize(
    ("options", "condition"),
    [
        ({"architecture": "vanilla"}, "vanilla"),
        ({}, "cumulative"),
        ({"attnres_source": "block_sum"}, "block_sum"),
        ({"attnres_routing": "frozen"}, "frozen"),
        ({"attnres_routing": "frozen", "attnres_source": "block_sum"}, "frozen_block_sum"),
        ({"attnres_source": "delta_block"}, "delta_block"),
        ({"attnres_source": "delta_block", "attnres_mode": "full"}, "delta_block_full"),
        ({"attnres_mode": "full"}, "cumulative_full"),
        ({"attnres_routing": "frozen", "attnres_mode": "full"}, "frozen_full"),
    ],
)
def test_condition(options, condition):
    module = make(**options)
    assert module.condition == module.hparams["condition"] == condition


def test_hyperparameters_are_plain_and_rebuild_the_model():
    module = make(seed=5, attnres_recency_bias_init=1.5)
    hparams = json.loads(json.dumps(dict(module.hparams)))
    assert hparams["seed"] == 5
    assert hparams["model_config"]["model_type"] == "qwen3_attnres"
    rebuilt = AttnResForCausalLM(AttnResConfig(**hparams["model_config"]))
    rebuilt.load_state_dict(module.model.state_dict())
    assert rebuilt.config.max_position_embeddings == 12


def test_logits_are_those_at_the_queries():
    module, batch = make().eval(), MQAR(4, 32).batch("train", range(3))
    assert torch.allclose(module(batch).logits, module.model(batch.input_ids).logits[:, 8:], atol=1e-6)


def test_embedding_init_std():
    stds = [make(embedding_init_std=std).model.state_dict()["model.embed_tokens.weight"].std() for std in (1.0, None)]
    assert stds[0] > 0.8
    assert stds[1] < 0.03


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch, when it first compiles
def test_options_that_change_no_loss_are_applied():
    """That they change nothing but by rounding: test_train_options.py."""
    for wanted in (False, True):
        module = make(gradient_checkpointing=wanted, compile=wanted)
        assert [layer.gradient_checkpointing for layer in module.model.model.layers] == [wanted] * 2
        assert (module.model._compiled_call_impl is not None) == wanted


def optimizer_of(module: RetrievalModule):
    module._trainer = SimpleNamespace(max_steps=100)  # type: ignore[assignment]
    return module.configure_optimizers()


@pytest.mark.parametrize("source", ["cumulative", "block_sum"])
def test_weight_decay_spares_gains_biases_and_routing(source):
    module = make(attnres_source=source, weight_decay=0.1)
    groups = optimizer_of(module)["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    names = {id(p): name for name, p in module.model.named_parameters()}
    decayed_names, kept_names, scalars = ({names[id(p)] for p in group["params"]} for group in groups)
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert decayed_names | kept_names | scalars == trained
    assert scalars == {name for name in trained if name.endswith("_res_bias")}
    assert not {name for name in decayed_names if "_res_" in name}
    assert all("norm" not in name for name in decayed_names)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= decayed_names


def test_routing_parameters_can_have_learning_rates_of_their_own():
    rates = RoutingLearningRates(queries=0.5, biases=0.0)
    module = make(learning_rate=0.01, routing_learning_rates=rates, attnres_source="block_sum")
    optimizer = optimizer_of(module)["optimizer"]
    names = {id(p): name for name, p in module.model.named_parameters()}
    by_name = {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}
    assert by_name.keys() == {name for name, p in module.model.named_parameters() if p.requires_grad}
    for name, group in by_name.items():
        peak = 0.5 if "_res_proj" in name else 0.0 if "_res_bias" in name else 0.01
        assert group["initial_lr"] == peak, name
        assert group["weight_decay"] == (0.01 if "_res_" not in name and "norm" not in name else 0.0), name
    with pytest.raises(ValueError, match=r"routing_learning_rates\.gains must not be negative, got -1"):
        RoutingLearningRates(gains=-1)


def test_gradient_norms_of_routing_parameters():
    module = make(attnres_source="block_sum")
    module(MQAR(4, 32).batch("train", range(2))).logits.square().sum().backward()
    norms = routing_gradient_norms(module.model)
    assert norms.keys() == {"queries", "gains", "biases"}
    squares = sum(p.grad.square().sum() for name, p in module.named_parameters() if "_res_proj" in name)
    assert norms["queries"].item() == pytest.approx(squares.sqrt().item(), rel=1e-5)
    assert norms["queries"] > 0
    assert norms["gains"] == 0  # of queries that are zero
    assert routing_gradient_norms(make(architecture="vanilla").model) == {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_trained_parameter_takes_a_gradient(source, mode):
    module = make(attnres_source=source, attnres_mode=mode)
    module(MQAR(4, 32).batch("train", range(2))).logits.sum().backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


def test_frozen_routing_is_not_optimised():
    module = make(attnres_routing="frozen")
    optimised = {id(p) for group in optimizer_of(module)["optimizer"].param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in module.model.routing_parameters().values()}  # type: ignore[operator]


def test_learning_rate_warms_up_and_decays_to_a_tenth():
    configured = optimizer_of(make(learning_rate=0.01, warmup_steps=10))
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == rates[10] == pytest.approx(0.01)
    assert rates[100] == pytest.approx(0.001)
    assert rates[5] == pytest.approx(0.005)


def test_accuracy_of_groups():
    """Groups need not be of one size, nor at one place."""
    metric = GroupAccuracy(["one", "two"])
    metric.update(torch.tensor([[True, False, True], [True, False, False]]), torch.tensor([[0, 1, 1], [0, 0, 1]]))
    metric.update(torch.tensor([[True, True, False]]), torch.tensor([[0, 0, 0]]))
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx({"accuracy": 5 / 9, "accuracy_one": 4 / 6, "accuracy_two": 1 / 3})


@pytest.mark.parametrize("source", SOURCES)
def test_routing_entropy(source):
    model = make(attnres_source=source, num_hidden_layers=3, attnres_num_blocks=3).model  # all choose somewhere
    even = model(torch.arange(6).view(2, 3), output_routing_weights=True).routing_weights  # queries are zero
    metric = RoutingEntropy(model.sites)
    metric.update(even)
    assert metric.compute() == pytest.approx(dict.fromkeys(dict.fromkeys(s.sublayer for s in model.sites), 1.0))
    metric.reset()
    one_hot = [torch.zeros_like(weights) for weights in even]
    for weights in one_hot:
        weights[..., -1:] = 1
    metric.update(one_hot)
    assert all(share == 0 for share in metric.compute().values())
    metric.update(even)
    assert metric.compute()["mlp"] == pytest.approx(0.5)


def test_routing_entropy_leaves_out_reads_without_a_choice():
    model = make(attnres_source="block_sum", num_hidden_layers=1, attnres_num_blocks=1).model
    metric = RoutingEntropy(model.sites)
    metric.update(model(torch.arange(6).view(2, 3), output_routing_weights=True).routing_weights)
    assert metric.compute().keys() == {"mlp", "final"}


@torch.no_grad()
def test_a_loss_of_different_lengths_is_the_mean_over_parts():
    task = MQAR(4, 32, min_pairs=1, noise_tokens=2)
    module = make(task=task).eval()
    whole, halves = task.batch("train", range(8)), [task.batch("train", range(i, i + 4)) for i in (0, 4)]
    loss, correct = module.answer(whole)
    parts = [module.answer(half) for half in halves]
    assert loss == pytest.approx(float(sum(part[0] for part in parts) / 2), abs=1e-6)
    assert whole.num_pairs is not None
    assert correct.sum() == sum(part[1].sum() for part in parts)
    # By hand: the mean over examples of the mean over each one's queries, alone and without padding.
    losses = []
    for row, pairs in enumerate(whole.num_pairs.tolist()):
        tokens, labels = whole.input_ids[row, : 3 * pairs + 2], whole.labels[row, : 3 * pairs + 2]
        log_probs = module.model(tokens[None]).logits[0].log_softmax(-1)
        losses.append(-log_probs[-pairs:].gather(1, labels[-pairs:, None]).mean())
    assert loss == pytest.approx(float(sum(losses) / 8), abs=1e-6)


@pytest.mark.parametrize("architecture", ["attnres", "vanilla"])
@pytest.mark.parametrize(
    "bad",
    [
        {"num_hidden_layers": 0},
        {"hidden_size": -1},
        {"head_dim": 7},
        {"num_attention_heads": 3, "num_key_value_heads": 2},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"warmup_steps": -1},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"embedding_init_std": 0.0},
    ],
)
def test_bad_settings_are_named(architecture, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make(architecture=architecture, **bad)


def test_unsupported_routing_options_are_named():
    with pytest.raises(ValueError, match=r"attnres_source 'sum'.*cumulative, block_sum"):
        make(attnres_source="sum")
    with pytest.raises(ValueError, match=r"attnres_num_blocks \(3\) exceeds num_hidden_layers"):
        make(attnres_num_blocks=3)

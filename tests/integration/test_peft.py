"""LoRA adapters of peft: trained, saved, loaded in each way there is, merged."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import AutoModelForCausalLM

from attnres import AttnResForCausalLM
from tests.conftest import SOURCES

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 for it by its old name; transformers warns of itself.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers.modeling_utils"
)

ATTENTION = ("q_proj", "v_proj")
QUERIES = ("attn_res_proj", "mlp_res_proj")


def adapt(model: AttnResForCausalLM, targets="qv", **options):
    targets = list(ATTENTION) if targets == "qv" else targets
    return peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **options)
    ).eval()


def train(model: torch.nn.Module, input_ids: torch.Tensor) -> list[float]:
    """Loss before each of a few steps, and after the last."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = model(input_ids, labels=input_ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return [*losses, model(input_ids, labels=input_ids).loss.item()]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("targets", "init"), [("qv", True), *(("all-linear", how) for how in (True, "pissa", "olora"))]
)
@torch.no_grad()
def test_a_new_adapter_changes_nothing(make_model, make_tokens, source, targets, init):
    """Some inits take from a weight what the adapter starts with: wrong for a weight that is read past its adapter."""
    model = make_model(attnres_source=source)
    input_ids = make_tokens(model)
    base = model(input_ids, output_routing_weights=True)
    adapted = adapt(model, targets, init_lora_weights=init)(input_ids, output_routing_weights=True)
    torch.testing.assert_close(adapted.logits, base.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(adapted.routing_weights, base.routing_weights, atol=1e-5, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_only_the_adapter_trains(make_model, make_tokens, source):
    model = make_model(attnres_source=source)
    before = copy.deepcopy(model.state_dict())
    input_ids = make_tokens(model)
    logits = model(input_ids).logits
    adapted = adapt(model)
    losses = train(adapted, input_ids)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    assert (adapted(input_ids).logits - logits).abs().max() > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids).logits, logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(adapted.unload().state_dict(), before, atol=0, rtol=0)  # routing parameters among them


LOADERS: dict[str, Callable] = {
    "peft, onto a base": lambda base, adapter: peft.PeftModel.from_pretrained(
        AttnResForCausalLM.from_pretrained(base), adapter
    ),
    "peft, by itself": lambda base, adapter: peft.AutoPeftModelForCausalLM.from_pretrained(adapter),
    "transformers": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": list(QUERIES)}], ids=["adapter", "adapter and queries"])
def test_a_saved_adapter_gives_the_same_logits(make_model, make_tokens, save, tmp_path, source, loader, options):
    base = save(make_model(attnres_source=source))
    model = AttnResForCausalLM.from_pretrained(base)
    input_ids = make_tokens(model)
    clean = model(input_ids).logits
    adapted = adapt(model, **options)
    train(adapted, input_ids)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = LOADERS[loader](base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = adapted(input_ids).logits
        torch.testing.assert_close(loaded(input_ids).logits, logits, atol=1e-6, rtol=0)
    assert (logits - clean).abs().max() > 1e-2


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
@torch.no_grad()
def test_merging_and_interventions(make_model, make_tokens, tmp_path, source, targets):
    model = make_model(attnres_source=source)
    names = model.state_dict().keys()
    input_ids = make_tokens(model)
    adapted = adapt(model, targets, init_lora_weights=False)  # random, where a new adapter is zero
    seen = []

    def watch(read):
        seen.append(read.routing_weights)
        return read

    before = adapted(input_ids, output_routing_weights=True, intervention=watch)
    assert len(seen) == len(model.sites)
    assert all(map(torch.equal, before.routing_weights, seen))
    with adapted.disable_adapter():
        clean = adapted(input_ids, output_routing_weights=True).routing_weights
    assert (before.routing_weights[-1] - clean[-1]).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    assert type(merged) is AttnResForCausalLM
    assert merged.state_dict().keys() == names
    after = merged(input_ids, output_routing_weights=True)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(after.routing_weights, before.routing_weights, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path)
    assert torch.equal(AttnResForCausalLM.from_pretrained(tmp_path)(input_ids).logits, after.logits)


@pytest.mark.parametrize("source", SOURCES)
def test_modules_to_save_train_the_queries(make_model, make_tokens, source):
    """How routing is trained with peft: a copy of a query takes its place in the router."""
    model = make_model(attnres_source=source)
    before = copy.deepcopy(model.state_dict())
    input_ids = make_tokens(model)
    clean = model(input_ids).logits
    adapted = adapt(model, modules_to_save=list(QUERIES))
    train(adapted, input_ids)
    trained = adapted(input_ids).logits
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids).logits, clean, atol=1e-6, rtol=0)
    copies = {name: parameter for name, parameter in adapted.named_parameters() if "_res_proj.modules_to_save" in name}
    assert len(copies) == 2 * model.config.num_hidden_layers
    for name, trained_copy in copies.items():
        original = before[name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")]
        assert not torch.equal(trained_copy, original), name
    merged = adapted.merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged(input_ids).logits, trained, atol=1e-5, rtol=0)
    merged.load_state_dict({name: before[name] for name in before if "_res_proj" in name}, strict=False)
    assert (merged(input_ids).logits - trained).abs().max() > 1e-4  # the trained queries had been at work


@pytest.mark.parametrize("query", [*QUERIES, "final_res_proj"])
def test_an_adapter_that_the_router_would_not_see_is_refused(make_model, query):
    """The router reads queries, it does not call them: an adapter would train nothing, and merging change the model."""
    with pytest.raises(ValueError, match="not supported"):
        adapt(make_model(attnres_source="block_sum"), [*ATTENTION, query])


def test_gradients_under_checkpointing(make_model, make_tokens):
    input_ids = make_tokens(make_model())
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapted = adapt(make_model(), init_lora_weights=False).train()
        if checkpointing:
            adapted.enable_input_require_grads()  # as peft's recipes have it
            base = adapted.get_base_model()
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        adapted(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*gradients, atol=0, rtol=0)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())

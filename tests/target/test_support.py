# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Targets whose forwards depend on more than a node's own path: exact where that can be, or refused."""

from __future__ import annotations

from copy import deepcopy
from functools import wraps

import peft
import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from block_drafters_for_tests import block_drafter
from conftest import SIZES, prompt_of, tiny_target
from options_for_tests import BASE, refusal, same_text
from targets_for_tests import LIMIT, ROPES, TargetKind, forget_the_past, make_target
from torch import nn
from training_for_tests import tiny_drafter
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, Phi3Config, PreTrainedModel
from transformers.utils import logging

from specblock_hf import LookupDrafter
from specblock_hf.compat import CACHE, RELEASE
from specblock_hf.target.support import RopeLimit, rope_limits


GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 14}


def with_rope(rope: str, family: str = "llama") -> TargetKind:
    return TargetKind(family, rope=rope)


def run(kind: TargetKind, batch: dict, drafter=None, **options) -> torch.LongTensor:
    target = make_target(kind)
    forget_the_past(kind, target)
    return target.generate(**batch, **GREEDY | options, assistant_model=drafter)


def kept(drafter) -> int:
    return sum(drafter.last_statistics.accepted)


def test_the_limits_of_rotary_frequencies():
    assert [rope_limits(make_target(with_rope(rope))) for rope in ("default", "linear", "yarn", "llama3")] == [[]] * 4
    assert rope_limits(make_target(with_rope("dynamic"))) == [RopeLimit(LIMIT, changes_once=False)]
    assert rope_limits(make_target(with_rope("longrope"))) == [RopeLimit(LIMIT, changes_once=True)]
    # Gemma 3 has frequencies of their own for its two kinds of layers, GPT-2 none.
    target = deepcopy(tiny_target("gemma3"))
    target.config.rope_parameters["full_attention"] |= {"rope_type": "dynamic", "factor": 2.0}
    assert rope_limits(target) == [RopeLimit(256, changes_once=False)]
    assert rope_limits(make_target(TargetKind("gpt2"))) == []


def test_how_deep_a_tree_may_be():
    for changes_once in (True, False):
        limit = RopeLimit(8, changes_once)
        # The root at position 7 is the eighth token.
        assert [limit.depth(root) for root in (0, 5, 7)] == [7, 2, 0]
    assert RopeLimit(8, True).depth(8) is None and RopeLimit(8, False).depth(8) == 0


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize("length", [LIMIT - 12, LIMIT - 3, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 20])
@pytest.mark.parametrize("cached", [False, True])
def test_a_text_over_the_length_at_which_frequencies_change(rope, length, cached):
    kind, batch = with_rope(rope), padded_batch((length,))

    def options() -> dict:
        return {CACHE: DynamicCache(config=make_target(kind).config)} if cached else {}

    plain = run(kind, batch, **options())
    for drafter in (oracles(plain, batch["attention_mask"], [lambda number: 5]), garbage(1)):
        assert torch.equal(run(kind, batch, drafter, **options()), plain)
    oracle = oracles(plain, batch["attention_mask"], [lambda number: 5])
    run(kind, batch, oracle, **options())
    drafted = 14 - 1 if rope == "longrope" else max(LIMIT - length, 0)
    # All that can be kept is, but for the target's own token of every round.
    assert (kept(oracle) > 0) == (drafted > 1) and kept(oracle) >= drafted * 5 // 6 - 3


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_without_the_limit_the_text_would_be_another(rope, monkeypatch):
    monkeypatch.setattr(RopeLimit, "depth", lambda self, root: None)
    kind, differs = with_rope(rope), 0
    for seed in range(6):
        batch = padded_batch((LIMIT - 3,), seed)
        plain = run(kind, batch)
        drafter = oracles(plain, batch["attention_mask"], [lambda number: 8])
        differs += not torch.equal(run(kind, batch, drafter), plain)
    assert differs


def test_a_drafter_hears_of_the_round_that_it_must_sit_out():
    kind, batch = with_rope("longrope"), padded_batch((LIMIT - 3,))
    plain = run(kind, batch)
    # From position 13 to 15, whose forward is the last one with the first frequencies.
    drafter = oracles(plain, batch["attention_mask"], [lambda number: 1], feature_layers=(0, 2))
    run(kind, batch, drafter)
    assert drafter.last_statistics.accepted[:3] == [1, 0, 1]
    (told,) = drafter.drafters[0].states
    assert told.positions() == list(range(len(told.positions())))
    assert told.tokens() == plain[0, 1 : len(told.tokens()) + 1].tolist()
    assert len(told.positions()) > LIMIT + 1


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
@pytest.mark.parametrize(("lengths", "new"), [((4, 2), 12), ((LIMIT, 3), 1)])
def test_batches_within_the_length(rope, lengths, new):
    kind, batch = with_rope(rope), padded_batch(lengths)
    plain = run(kind, batch, max_new_tokens=new)
    for drafter in (oracles(plain, batch["attention_mask"]), garbage(2)):
        assert torch.equal(run(kind, batch, drafter, max_new_tokens=new), plain)


def test_a_row_that_has_stopped_does_not_come_to_the_length():
    kind, batch = TargetKind("llama", layers=4, rope="longrope"), padded_batch((4, 8))
    plain = run(kind, batch, max_new_tokens=LIMIT + 1 - 8)
    options = {"max_new_tokens": LIMIT + 1 - 8, "eos_token_id": plain[0, 10].item()}
    plain = run(kind, batch, **options)
    assert (plain[0, 11:] == 0).all() and plain.shape[1] == LIMIT + 1
    for drafter in (block_drafter(), tiny_drafter(), LookupDrafter(make_target(kind).config)):
        assert torch.equal(run(kind, batch, drafter, **options), plain)


def test_batches_beyond_the_length():
    batch = padded_batch((LIMIT + 9, LIMIT + 1))
    plain = run(with_rope("longrope"), batch)
    for drafter in (oracles(plain, batch["attention_mask"]), garbage(2)):
        assert torch.equal(run(with_rope("longrope"), batch, drafter), plain)


@pytest.mark.parametrize(("rope", "lengths"), [("dynamic", (4, 2)), ("dynamic", (30, 20)), ("longrope", (30, 3))])
def test_batches_that_cross_the_length_are_refused(rope, lengths):
    kind, batch = with_rope(rope), padded_batch(lengths)
    cache, drafter = DynamicCache(config=make_target(kind).config), garbage(2)
    with pytest.raises(
        ValueError, match=r"^the rotary positions of Llama.* over 16 tokens, .*; call generate\(\) for"
    ):
        run(kind, batch, drafter, **{CACHE: cache})
    assert not drafter.drafters[0].states and cache.get_seq_length() == 0


@pytest.fixture(scope="module")
def phi3() -> PreTrainedModel:
    """Plain decoding gives its cache up when a text is over 16 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | ROPES["longrope"]
    config = Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=rope)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("length", [1, LIMIT - 4, LIMIT - 1, LIMIT, LIMIT + 1, LIMIT + 20])
@pytest.mark.parametrize("store", ["own", "users", "static", "chunks"])
def test_a_model_that_reads_a_text_again(phi3, length, store):
    batch = padded_batch((length,))
    # transformers 5.17 loses the text whose cache it has given up: what it writes without a cache is right.
    plain = phi3.generate(**batch, **GREEDY, use_cache=False)
    options = {"static": {"cache_implementation": "static"}, "chunks": {"prefill_chunk_size": 3}}.get(store, {})
    if store == "chunks" and length > LIMIT:
        # The first chunks are read by the frequencies of short texts.
        plain = phi3.generate(**batch, **GREEDY, **options)
    for plan in range(4):
        drafter = oracles(plain, batch["attention_mask"], [lambda number, plan=plan: plan], feature_layers=(0, 4))
        if store == "users":
            options[CACHE] = DynamicCache(config=phi3.config)
        assert torch.equal(phi3.generate(**batch, **GREEDY, **options, assistant_model=drafter), plain)
        assert kept(drafter) >= plan
        (told,) = drafter.drafters[0].states
        assert told.tokens() == plain[0, 1 : len(told.tokens()) + 1].tolist()
        if store == "users":
            cache = options[CACHE]
            assert {layer.get_seq_length() for layer in cache.layers} == {plain.shape[1] - 1}
            ids = torch.cat((plain, prompt_of(3, seed=2)), dim=1)
            more = {"attention_mask": torch.ones_like(ids), CACHE: cache, "assistant_model": garbage(1)}
            if ids.shape[1] > LIMIT + 3:
                again = phi3.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **GREEDY)
                assert torch.equal(phi3.generate(ids, **GREEDY, **more), again)


@pytest.mark.skipif(RELEASE < (5, 24), reason="plain decoding loses the text whose cache it has given up")
@pytest.mark.parametrize("first", [2, 30])
def test_a_text_that_is_read_again_keeps_its_positions(phi3, first):
    # Its frequencies change by position, and it is read again by column.
    batch = padded_batch((LIMIT - 5,)) | {"position_ids": torch.arange(LIMIT - 5).unsqueeze(0) + first}
    plain = phi3.generate(**batch, **GREEDY)
    for plan in range(4):
        drafter = oracles(plain, batch["attention_mask"], [lambda number, plan=plan: plan])
        assert torch.equal(phi3.generate(**batch, **GREEDY, assistant_model=drafter), plain)


def test_a_call_that_ends_while_a_text_is_read_again(phi3):
    batch, cache = padded_batch((LIMIT - 2,)), DynamicCache(config=phi3.config)
    layer, seen = phi3.model.layers[2], []

    def stop(module, args, kwargs):
        seen.append(args[0].shape[1])
        if seen[-1] == LIMIT + 1:
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        phi3.generate(**batch, **GREEDY, **{CACHE: cache}, assistant_model=garbage(1))
    handle.remove()
    assert len(seen) > 2 and cache.get_seq_length() == 0
    same_text(phi3, batch, lambda: {CACHE: deepcopy(cache), "max_new_tokens": 2})


def test_what_a_text_that_is_read_again_cannot_have(phi3):
    cache = DynamicCache(config=phi3.config)
    phi3(prompt_of(30)[:, :5], **{CACHE: cache})
    said = refusal(phi3, padded_batch((30,)), lambda: {CACHE: cache})
    assert said.startswith("Phi3ForCausalLM reads a text again from its beginning when it is over 16 tokens, and of")
    assert cache.get_seq_length() == 5
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    assert "are not handed back; leave them out." in refusal(phi3, padded_batch((4,)), lambda: wanted)
    phi3.generate(**padded_batch((4,)), **BASE | wanted | {"max_new_tokens": 13}, assistant_model=garbage(1))
    # Rows of a batch are over it at different times.
    assert refusal(phi3, padded_batch((4, 2)), dict).startswith("the rotary positions of Phi3ForCausalLM change for a")
    for batch in (padded_batch((30, 18)), padded_batch((4, 2))):
        same_text(phi3, batch, lambda: {"max_new_tokens": 12})


def test_dropout(monkeypatch):
    batch = padded_batch((5,))
    for family in ("llama", "gpt2", "opt", "falcon"):
        kind = TargetKind(family, mode="dropout")
        target = deepcopy(make_target(kind))
        said = refusal(target, batch, dict)
        assert "is in training mode and leaves out values at random (" in said and said.endswith("target.eval().")
        same_text(target.eval(), batch, dict)
    # Without dropout the mode changes nothing.
    same_text(make_target(TargetKind(mode="train")), batch, dict)
    lora = peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    target = peft.get_peft_model(deepcopy(tiny_target("llama")), lora)
    assert "(dropout)" in refusal(target.train(), batch, dict)
    target = deepcopy(tiny_target("llama")).train()
    target.get_decoder().gradient_checkpointing = True
    assert "with gradient checkpointing, which turns off the cache" in refusal(target, batch, dict)
    same_text(target.eval(), batch, dict)


@pytest.mark.parametrize("wrap", ["prompt tuning", "prefix tuning", "p-tuning"])
def test_adapters_of_prompts(wrap):
    target, cache = make_target(TargetKind(wrap=wrap)), DynamicCache()
    for lengths in ((7,), (7, 3)):
        said = refusal(target, padded_batch(lengths), lambda: {CACHE: cache})
        assert said.startswith("the adapter of this LlamaForCausalLM (") and "puts columns of its own" in said
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("config", [peft.IA3Config, peft.AdaptionPromptConfig])
def test_adapters_of_weights(config):
    fields = {
        peft.IA3Config: {
            "target_modules": ["k_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
            "init_ia3_weights": False,
        },
        peft.AdaptionPromptConfig: {"adapter_len": 4, "adapter_layers": 2},
    }
    torch.manual_seed(0)
    target = peft.get_peft_model(deepcopy(tiny_target("llama")), config(**fields[config], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if "adaption" in name:
                nn.init.normal_(weight)
    for lengths in ((7,), (7, 3)):
        plain = same_text(target.eval(), padded_batch(lengths), dict)
        assert not torch.equal(plain, same_text(tiny_target("llama"), padded_batch(lengths), dict))


def test_an_adapter_that_tokens_activate():
    # Its rows are those behind the token 3, counted from the end of a forward.
    config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    target = peft.get_peft_model(deepcopy(tiny_target("llama")), config).eval()
    assert refusal(target, padded_batch((7,)), dict).startswith(
        "an adapter of LlamaForCausalLM is activated by tokens"
    )


def strange(target: PreTrainedModel, prepare) -> PreTrainedModel:
    """A target that makes something else of its prompt."""
    target = deepcopy(target)
    original = target.prepare_inputs_for_generation

    @wraps(original)
    def changed(ids, is_first_iteration=False, **kwargs):
        inputs = original(ids, is_first_iteration=is_first_iteration, **kwargs)
        return prepare(target, inputs) if is_first_iteration else inputs

    target.prepare_inputs_for_generation = changed
    return target


def longer(target: PreTrainedModel, inputs: dict) -> dict:
    ids = inputs.pop("input_ids")
    return {CACHE: inputs[CACHE], "input_ids": torch.cat((ids[:, :2], ids), dim=1)}


def elsewhere(target: PreTrainedModel, inputs: dict) -> dict:
    return inputs | {CACHE: DynamicCache()}


@pytest.mark.parametrize(("prepare", "held"), [(longer, "9 columns"), (elsewhere, "no columns")])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_prompt_must_add_its_columns_to_the_given_cache(prepare, held, kind):
    target, cache = strange(tiny_target(kind), prepare), DynamicCache(config=tiny_target(kind).config)
    batch = padded_batch((7,))
    said = refusal(target, batch, lambda: {CACHE: cache})
    assert said.startswith(f"the target's cache holds {held} after 7 tokens of the prompt")
    assert cache.get_seq_length() == 0 and not any(layer.is_initialized for layer in cache.layers)
    # The user may go on with it, in a batch of another size too.
    batch = padded_batch((7, 3))
    same_text(tiny_target(kind), batch, lambda: {CACHE: deepcopy(cache)})


def wrapped(target: PreTrainedModel, keep_signature: bool = False) -> PreTrainedModel:
    target = deepcopy(target)
    forward = target.forward

    def replaced(*args, **kwargs):
        return forward(*args, **kwargs)

    target.forward = wraps(forward)(replaced) if keep_signature else replaced
    return target


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
def test_a_forward_of_any_arguments(kind):
    for keep_signature in (False, True):
        target = wrapped(tiny_target(kind), keep_signature)
        for lengths in ((7,), (7, 3, 12)):
            same_text(target, padded_batch(lengths), dict)
        # Then `generate()` makes no mask, and notes no length of one.
        prompt = prompt_of(7)
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(target.generate(prompt, **GREEDY, assistant_model=garbage(1)), plain)
    target = deepcopy(tiny_target(kind))
    target.__class__ = type(
        "Wrapped",
        (type(target),),
        {"forward": lambda self, *args, **kwargs: type(tiny_target(kind)).forward(self, *args, **kwargs)},
    )
    same_text(target, padded_batch((7, 3)), dict)


def test_a_wrapped_forward_hides_nothing():
    target = wrapped(make_target(TargetKind("bloom", attention="eager")))
    assert refusal(target, padded_batch((5,)), dict).startswith("BloomForCausalLM takes no position_ids")


@pytest.mark.parametrize(
    ("settings", "warns"),
    [
        (BitsAndBytesConfig(load_in_8bit=True), True),
        (BitsAndBytesConfig(load_in_4bit=True), False),
        ({"quant_method": "torchao", "quant_type": "Float8DynamicActivation...(granularity=PerTensor())"}, True),
        ({"quant_method": "torchao", "quant_type": "Float8DynamicActivation...(granularity=PerRow())"}, False),
        ({"quant_method": "torchao", "quant_type": "Int4WeightOnlyConfig(group_size=128)"}, False),
        ({"config_groups": {"group_0": {"input_activations": {"dynamic": True, "strategy": "tensor"}}}}, True),
        ({"config_groups": {"group_0": {"input_activations": {"dynamic": True, "strategy": "token"}}}}, False),
    ],
)
def test_scales_of_a_whole_forward(settings, warns, caplog, monkeypatch):
    target = deepcopy(tiny_target("llama"))
    target.config.quantization_config = settings
    monkeypatch.setattr(logging.get_logger("specblock_hf"), "propagate", True)
    logging.get_logger("specblock_hf").warning_once.cache_clear()
    for _ in range(2):
        target.generate(prompt_of(5), **GREEDY, assistant_model=garbage(1))
    assert caplog.text.count("may scale the activations of a whole forward together") == int(warns)


@pytest.mark.parametrize("lengths", [(4,), (4, 2)])
def test_hidden_states_of_a_target_with_several_at_every_token(lengths):
    kind, batch = TargetKind("gemma3n"), padded_batch(lengths)
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True}
    plain = run(kind, batch, **wanted)
    for drafter in (oracles(plain.sequences, batch["attention_mask"]), garbage(len(lengths))):
        output = run(kind, batch, drafter, **wanted)
        assert torch.equal(output.sequences, plain.sequences)
        for ours, theirs in zip(output.hidden_states, plain.hidden_states, strict=True):
            for mine, layer in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, layer, rtol=0, atol=1e-5)
    assert plain.hidden_states[1][1].ndim == 4


@pytest.mark.parametrize("lengths", [(7,), (4, 7)], ids=len)
def test_falcon_with_sdpa_hides_nothing_where_attentions_are_asked_for(lengths):
    batch, wanted = padded_batch(lengths), {"return_dict_in_generate": True, "output_attentions": True}
    target = make_target(TargetKind("falcon", 4, "sdpa"))
    with pytest.raises(ValueError, match=r"adds its Boolean masks to the attention scores, .*leave output_attentions"):
        target.generate(**batch, **GREEDY, **wanted, assistant_model=garbage(len(lengths)))
    # Without them, and with eager attention, whose masks are numbers, it is exact.
    for attention, options in (("sdpa", {}), ("eager", wanted)):
        target = make_target(TargetKind("falcon", 4, attention))
        plain = target.generate(**batch, **GREEDY, **options)
        output = target.generate(**batch, **GREEDY, **options, assistant_model=garbage(len(lengths)))
        assert torch.equal(output.sequences if options else output, plain.sequences if options else plain)


def test_attentions_over_a_cache_that_slides_nowhere():
    """A `DynamicCache()` knows of no configuration, so that plain decoding shows every column of it."""
    target, batch = tiny_target("mistral", "eager"), padded_batch((7,))
    wanted = {"return_dict_in_generate": True, "output_attentions": True}
    for made in (lambda: DynamicCache(), lambda: DynamicCache(config=target.config)):
        plain = target.generate(**batch, **GREEDY, **wanted, **{CACHE: made()})
        for drafter in (oracles(plain.sequences, batch["attention_mask"]), garbage(1)):
            output = target.generate(**batch, **GREEDY, **wanted, **{CACHE: made()}, assistant_model=drafter)
            assert torch.equal(output.sequences, plain.sequences)
            for ours, theirs in zip(output.attentions, plain.attentions, strict=True):
                for mine, layer in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(mine, layer, rtol=0, atol=1e-5)


def test_a_hook_of_the_user_sees_all_nodes_of_a_draft(caplog, monkeypatch):
    target, said = deepcopy(tiny_target("llama")), "sees all nodes of a draft tree at once"
    monkeypatch.setattr(logging.get_logger("specblock_hf"), "propagate", True)
    logging.get_logger("specblock_hf").warning_once.cache_clear()
    # With hooks of ours and of transformers' own.
    options = GREEDY | {"output_hidden_states": True, "return_dict_in_generate": True}
    target.generate(prompt_of(5), **options, assistant_model=tiny_drafter())
    assert said not in caplog.text
    # One warning for all of them, whatever they are.
    target.model.layers[0].register_forward_pre_hook({}.__setitem__)
    target.model.layers[1].register_forward_pre_hook(lambda layer, args: None)
    for _ in range(2):
        target.generate(prompt_of(5), **GREEDY, assistant_model=garbage(1))
    assert caplog.text.count(said) == 1

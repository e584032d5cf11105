# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention that copies no keys which heads share: transformers' own sums, and models that are left as they are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import KINDS, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AttentionInterface, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specblock_hf import DraftingPlan, SpecBlockConfig, SpecBlockDrafter, grouped_attention
from specblock_hf.compat import SHARED_KEYS_ON_CPUS
from specblock_hf.grouped_attention import NAME, grouped_twin


pytestmark = pytest.mark.skipif(not SHARED_KEYS_ON_CPUS, reason="this torch copies shared keys")
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}


def a_layer(groups: int) -> nn.Module:
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = groups, True
    return layer


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 4),
    rows=st.integers(1, 9),
    more=st.integers(0, 40),
    of_each_row=st.booleans(),
    of_each_text=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_the_sums_are_transformers_own(batch, key_heads, groups, rows, more, of_each_row, of_each_text, dtype, seed):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, key_heads * groups, rows, 8, generator=draw).to(dtype)
    key, value = (torch.randn(batch, key_heads, rows + more, 8, generator=draw).to(dtype) for _ in range(2))
    shape = (batch if of_each_text else 1, 1, rows if of_each_row else 1, rows + more)
    mask = torch.rand(shape, generator=draw) < 0.7
    mask[..., 0] = True
    inputs = (a_layer(groups), query, key, value, mask)
    mine, theirs = (
        attend(*inputs, scaling=0.3)[0] for attend in (grouped_attention.grouped_attention, sdpa_attention_forward)
    )
    assert mine.shape == theirs.shape == (batch, rows, key_heads * groups, 8)
    assert torch.equal(mine, theirs) and mine.is_contiguous()


def test_what_is_no_tree_goes_to_transformers_own(monkeypatch):
    asked = []
    monkeypatch.setattr(
        grouped_attention, "sdpa_attention_forward", lambda *args, **options: asked.append(options) or (None, None)
    )
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    seen = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    for rows, mask, options in (
        (1, seen[:, :, :1], {}),
        (3, None, {}),
        (3, seen, {"position_bias": torch.zeros(1, 4, 3, 5)}),
        (3, seen, {"softcap": 30.0}),
    ):
        grouped_attention.grouped_attention(a_layer(2), query[:, :, :rows], key, key, mask, **options)
        assert options.items() <= asked.pop().items()
    grouped_attention.grouped_attention(a_layer(2), query, key, key, seen, softcap=None, sliding_window=4)
    assert not asked


@pytest.fixture
def heard(monkeypatch):
    """Rows of the queries that were asked with."""
    rows = []

    def spy(module, query, *args, **kwargs):
        rows.append(query.shape[2])
        return grouped_attention.grouped_attention(module, query, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, spy)
    return rows


def parts_of(model: nn.Module) -> list:
    configs = [(module, set(vars(module)), vars(module).get("config")) for module in model.modules()]
    return [(*part, part[2] and part[2]._attn_implementation) for part in configs]


@pytest.mark.parametrize("prepacks", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_are_read_by_it_and_prompts_are_not(kind, prepacks, heard):
    target, prompt, drafter = tiny_target(kind), prompt_of(6), GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(3, 1)
    if not prepacks:
        drafter.prepacked_weights = None
    before = parts_of(target)
    text = target.generate(prompt, assistant_model=drafter, **GREEDY)
    rounds = drafter.last_statistics.rounds
    assert len(heard) == 4 * rounds and max(heard) == 4
    assert before == parts_of(target)
    assert torch.equal(text, target.generate(prompt, **GREEDY)) and len(heard) == 4 * rounds


def test_drafters_attend_by_it(heard):
    target = tiny_target("llama")
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, num_hidden_layers=2, block_size=2)).eval()
    drafter.drafting_plan, before = DraftingPlan(5, 2), parts_of(drafter.layers)
    text = target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    rounds = drafter.last_statistics.rounds
    # Four layers of the target, two of the drafter in each of two forwards, or in one before the last tokens.
    assert 8 * rounds - 8 <= len(heard) <= 8 * rounds and before == parts_of(drafter.layers)
    assert torch.equal(text, target.generate(prompt_of(6), **GREEDY))


def test_a_call_that_hands_states_out_is_left_as_it_is(heard):
    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(3, 1)
    options = GREEDY | {"output_hidden_states": True, "return_dict_in_generate": True}
    target.generate(prompt_of(6), assistant_model=drafter, **options)
    assert not heard


def a_falcon() -> nn.Module:
    config = FalconConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, new_decoder_architecture=True,
        num_kv_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    return FalconForCausalLM(config)


def a_llama(key_heads: int = 2, **options) -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    config.num_attention_heads, config.num_key_value_heads = 4, key_heads
    return LlamaForCausalLM._from_config(config, **options)


def compiled(model: nn.Module) -> nn.Module:
    model.model.layers[0].compile(backend="eager")
    return model


def replaced(model: nn.Module) -> nn.Module:
    model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward
    return model


def own_code(model: nn.Module) -> nn.Module:
    """Remote code that asks nobody for the function to attend with."""

    class Attention(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Attention
    return model


def told_apart(model: nn.Module) -> nn.Module:
    """Remote code that does something of its own where attention is sdpa."""

    class Attention(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **kwargs):
            assert self.config._attn_implementation in ("eager", "sdpa"), ALL_ATTENTION_FUNCTIONS
            return super().forward(*args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Attention
    return model


def of_another_kind(model: nn.Module) -> nn.Module:
    model.model.layers[0].self_attn.config = SimpleNamespace(_attn_implementation="sdpa")
    return model


@pytest.mark.parametrize(
    "make",
    [
        a_falcon,
        lambda: a_llama(attn_implementation="eager"),
        lambda: a_llama(key_heads=4),
        lambda: compiled(a_llama()),
        lambda: replaced(a_llama()),
        lambda: own_code(a_llama()),
        lambda: told_apart(a_llama()),
        lambda: of_another_kind(a_llama()),
        lambda: a_llama().to("meta"),
    ],
    ids=["falcon", "eager", "heads", "compiled", "replaced", "own code", "told apart", "configuration", "elsewhere"],
)
def test_models_that_are_left_as_they_are(make):
    model = make()
    assert grouped_twin(model) is model


def test_somebodys_own_function_for_all_models_is_called_in_rounds(monkeypatch):
    target, prompt, drafter, called = tiny_target("llama"), prompt_of(6), GarbageDrafter(VOCAB), []
    drafter.drafting_plan = DraftingPlan(3, 1)

    def own(module, query, key, *args, **kwargs):
        called.append(query.shape[2])
        return sdpa_attention_forward(module, query, 0.5 * key, *args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", own)
    text = target.generate(prompt, assistant_model=drafter, **GREEDY)
    assert called.count(4) > 4
    assert torch.equal(text, target.generate(prompt, **GREEDY))


def test_what_a_prompt_leaves_on_a_part_reaches_rounds(heard):
    """A hook writes to the part that it was put on, whatever reads the rounds."""
    target, drafter = a_llama().eval(), GarbageDrafter(VOCAB)
    drafter.drafting_plan, seen = DraftingPlan(3, 1), []
    attention = target.model.layers[0].self_attn

    def count(module, inputs, output):
        module.forwards = vars(module).get("forwards", 0) + 1
        seen.append(module)

    handle = attention.register_forward_hook(count)
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    handle.remove()
    assert set(seen) == {attention} and attention.forwards == drafter.last_statistics.target_calls > 3
    assert heard


def test_an_error_leaves_no_hook_on_the_target(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a part that cannot be copied")

    target, drafter = tiny_target("llama"), GarbageDrafter(VOCAB, feature_layers=(1,))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()]
    for module in ("specblock_hf.rounds_model.grouped_twin", "specblock_hf.target.model.stepwise"):
        with monkeypatch.context() as patch:
            patch.setattr(module, fail)
            with pytest.raises(RuntimeError, match="cannot be copied"):
                target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
        after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in target.modules()]
        assert before == after


def test_a_twin_has_settings_of_its_own():
    model = a_llama()
    twin = grouped_twin(model)
    attention, own = twin.model.layers[0].self_attn, model.model.layers[0].self_attn
    assert attention.config._attn_implementation == NAME and own.config._attn_implementation == "sdpa"
    assert twin.config is model.config and attention.q_proj is own.q_proj

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rounds by prepacked weights: the same text and drafts, models that know nothing of it, and no stale copy."""

from __future__ import annotations

import gc
import pickle
from copy import copy, deepcopy

import pytest
import torch
from conftest import KINDS, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter
from torch import nn

from specblock_hf import (
    DraftingPlan,
    JoinedDrafter,
    LookupDrafter,
    prepacking,
)
from specblock_hf.drafting.drafter import DraftingCallback
from specblock_hf.drafting.pilot import Pilot
from specblock_hf.prepacking import (
    LONG_PROMPT,
    PATIENCE,
    Packed,
    PrepackedLinear,
    PrepackedWeights,
    fitting,
    prepacked_twin,
)


GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 24, "eos_token_id": None}


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch):
    monkeypatch.setattr(prepacking, "LEAST_BYTES", 0)
    if not fitting(tiny_target("llama")):
        pytest.skip("prepacked weights are for x86 CPUs")


def a_drafter(budget: int = 3) -> GarbageDrafter:
    drafter = GarbageDrafter(VOCAB)
    drafter.drafting_plan = DraftingPlan(budget, 1)
    return drafter


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_text_is_plain_decodings(kind, call):
    target, prompt = tiny_target(kind), prompt_of(6)
    drafter = a_drafter()
    for _ in range(2):
        torch.manual_seed(0)
        text = target.generate(prompt, assistant_model=drafter, **call)
        assert drafter.last_statistics.prepacked
    torch.manual_seed(0)
    assert torch.equal(text, target.generate(prompt, **call))


def test_the_target_is_not_touched():
    target = tiny_target("llama")

    def state() -> list:
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        return [(m, type(m), set(vars(m)), [list(vars(m)[name]) for name in hooks]) for m in target.modules()]

    before = state()
    target.generate(prompt_of(6), assistant_model=a_drafter(), **GREEDY)
    assert before == state()


def test_a_reader_reads_as_the_target_does():
    target, ids = tiny_target("llama"), prompt_of(9)
    reader = prepacked_twin(target, fitting(target), PrepackedWeights())
    linear = [module for module in target.modules() if isinstance(module, nn.Linear)]
    packed = [module for module in reader.modules() if isinstance(module, PrepackedLinear)]
    assert len(packed) == len(linear) == len(fitting(target))
    with torch.no_grad():
        assert torch.allclose(reader(ids).logits, target(ids).logits, atol=1e-5)
        assert reader.lm_head(torch.zeros(1, 2, linear[-1].in_features)).shape == (1, 2, linear[-1].out_features)


def test_what_reads_hooks_of_the_target_hears_of_rounds():
    target, heard = tiny_target("llama"), []
    handle = target.lm_head.register_forward_hook(lambda *_: heard.append(1))
    drafter = a_drafter()
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    assert len(heard) == drafter.last_statistics.target_calls
    handle.remove()


def test_copies_are_made_once_some_rounds_have_been_read(monkeypatch):
    target, made = tiny_target("llama"), []
    copy_of = Packed.of
    monkeypatch.setattr(Packed, "of", lambda *args: made.append(1) or copy_of(*args))
    drafter = a_drafter(0)
    call = {"assistant_model": drafter, **GREEDY}
    # Whether of one call or of several.
    for rounds in (1, PATIENCE - 1):
        target.generate(prompt_of(6), **call | {"max_new_tokens": rounds + 1})
        assert not made and not drafter.last_statistics.prepacked
    target.generate(prompt_of(6), **call | {"max_new_tokens": 2})
    assert len(made) == len(fitting(target)) and drafter.last_statistics.prepacked
    # Once they are there, from the first round on.
    target.generate(prompt_of(6), **call | {"max_new_tokens": 2})
    assert drafter.last_statistics.prepacked and drafter.last_statistics.rounds == 1


def rows_by_copies(monkeypatch) -> list[int]:
    """Tokens of every forward of the first layer with copied weights."""
    rows, own = [], PrepackedLinear.forward

    def forward(self: PrepackedLinear, input: torch.Tensor) -> torch.Tensor:
        if not rows or self.weight is rows_of[0]:
            rows_of[:] = [self.weight]
            rows.append(input.shape[-2])
        return own(self, input)

    rows_of: list[nn.Parameter] = []
    monkeypatch.setattr(PrepackedLinear, "forward", forward)
    return rows


@pytest.mark.parametrize("call", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("chunk", [None, 4])
def test_prompts_are_read_by_copies_that_are_there(call, chunk, monkeypatch):
    target, drafter, prompt = tiny_target("llama"), a_drafter(), prompt_of(9)
    rows, call = rows_by_copies(monkeypatch), call | {"prefill_chunk_size": chunk}
    target.generate(prompt_of(6), assistant_model=drafter, **call)
    assert rows[0] < 6  # a round
    del rows[:]
    torch.manual_seed(0)
    text = target.generate(prompt, assistant_model=drafter, **call)
    assert rows[: 1 if chunk is None else 3] == ([9] if chunk is None else [4, 4, 1])
    torch.manual_seed(0)
    assert torch.equal(text, target.generate(prompt, **call))


def test_prompts_with_images_are_read_by_the_target_which_keeps_where_the_text_begins(monkeypatch):
    target, drafter = deepcopy(tiny_target("llama")), a_drafter()
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    rows = rows_by_copies(monkeypatch)
    monkeypatch.setattr(type(target.config), "get_text_config", lambda self, decoder=None: copy(self))
    target.generate(prompt_of(9), assistant_model=drafter, **GREEDY)
    assert rows and 9 not in rows


def test_copies_are_made_for_a_long_prompt_where_16_bits_are_not_multiplied(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for tokens, first in ((LONG_PROMPT, LONG_PROMPT), (LONG_PROMPT - 1, 6)):
        target, drafter = deepcopy(tiny_target("llama")).to(torch.bfloat16), a_drafter(5)
        with monkeypatch.context() as patch:
            rows = rows_by_copies(patch)
            target.generate(prompt_of(tokens), assistant_model=drafter, **GREEDY)
        assert rows[0] == first


def test_rounds_teach_no_times_until_they_are_read_as_later_ones(monkeypatch):
    settled = []
    monkeypatch.setattr(Pilot, "record", lambda self, *args: settled.append(args[-1]))
    drafter, call = a_drafter(0), {"do_sample": False, "max_new_tokens": PATIENCE + 4, "eos_token_id": None}
    for _ in range(2):
        tiny_target("llama").generate(prompt_of(6), assistant_model=drafter, **call)
    drafter.prepacked_weights.most_bytes = 0  # as where nothing fits
    tiny_target("llama").generate(prompt_of(6), assistant_model=drafter, **call)
    rounds, copying = PATIENCE + 3, [False]
    first = [False] * PATIENCE + copying + [True] * (rounds - PATIENCE - 1)
    # Those of the second call are lent before its prompt is read.
    assert settled == first + [True] * rounds + [True] * rounds


def rescale(target, factor: float, how: str) -> None:
    for layer in fitting(target):
        if how == "in place":
            with torch.no_grad():
                layer.weight.mul_(factor)
        elif how == "in the data":
            layer.weight.data.mul_(factor)
        elif how == "by other data":
            layer.weight.data = layer.weight.data * factor
        elif how == "rows of the data":
            layer.weight.data.copy_(layer.weight.data.flip(0))
        elif how == "columns of the data" and layer is fitting(target)[0]:
            layer.weight.data.copy_(layer.weight.data.flip(0))
        elif how == "columns of the data":  # whole words, so that no sum of a row is another
            layer.weight.data.copy_(layer.weight.data.roll(8, 1))
        else:
            layer.weight = nn.Parameter(layer.weight.detach() * factor)


@pytest.mark.parametrize(
    "how",
    ["in place", "in the data", "by other data", "rows of the data", "columns of the data", "by another parameter"],
)
def test_changed_weights_are_noticed(how):
    target, prompt = deepcopy(tiny_target("llama")), prompt_of(6)
    drafter = a_drafter()
    before = target.generate(prompt, assistant_model=drafter, **GREEDY)
    rescale(target, -1.5, how)
    after = target.generate(prompt, **GREEDY)
    assert not torch.equal(before, after)
    assert torch.equal(target.generate(prompt, assistant_model=drafter, **GREEDY), after)
    assert drafter.last_statistics.prepacked


@pytest.mark.parametrize(
    ("how", "made_anew"), [("in place", 1), ("in the data", None), ("by another parameter", None)]
)
def test_what_changed_in_place_is_copied_anew_alone(how, made_anew, monkeypatch):
    target, weights, made = deepcopy(tiny_target("llama")), PrepackedWeights(), []
    copy_of = Packed.of
    monkeypatch.setattr(Packed, "of", lambda *parts: made.append(parts) or copy_of(*parts))
    layers = fitting(target)
    prepacked_twin(target, layers, weights)
    assert len(made) == len(layers) > 1
    del made[:]
    first, second = layers[0].weight, layers[1].weight
    if how == "by another parameter":  # whose rows may come in another order, and with them the columns of a second
        layers[0].weight = nn.Parameter(first.detach().flip(0))
        second.data.copy_(second.data.roll(8, 1))
    else:
        with torch.no_grad():
            (first if how == "in place" else first.data).mul_(2)
    prepacked_twin(target, layers, weights)
    assert len(made) == (made_anew or len(layers))
    assert weights.knows(layers)


class Rescales(DraftingCallback):
    """Changes the target in the middle of a call."""

    def __init__(self, target, at: int):
        self.target, self.rounds = target, at

    def on_commit(self, call, tree, scored, walk, pairs) -> None:
        self.rounds -= 1
        if not self.rounds:
            rescale(self.target, -1.5, "in place")


def test_weights_that_change_during_a_call_are_the_targets():
    texts = []
    for weights in (PrepackedWeights(), None):
        target = deepcopy(tiny_target("llama"))
        drafter = a_drafter(0)
        drafter.prepacked_weights = weights
        drafter.add_callback(Rescales(target, 10))
        texts.append(target.generate(prompt_of(6), assistant_model=drafter, **GREEDY))
        # In the end by copies of the new ones.
        assert drafter.last_statistics.prepacked == (weights is not None)
    assert torch.equal(*texts)
    assert not torch.equal(texts[0], tiny_target("llama").generate(prompt_of(6), **GREEDY))


def replaced(target):
    target.lm_head.forward = target.lm_head.forward


def computed(target):
    nn.utils.parametrizations.weight_norm(target.lm_head)
    for layer in target.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            nn.utils.parametrizations.weight_norm(getattr(layer.self_attn, name))
        for name in ("gate_proj", "up_proj", "down_proj"):
            nn.utils.parametrizations.weight_norm(getattr(layer.mlp, name))


@pytest.mark.parametrize("change", [replaced, computed])
def test_targets_that_are_left_as_they_are(change):
    target = deepcopy(tiny_target("llama"))
    change(target)
    drafter = a_drafter()
    text = target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    assert torch.equal(text, target.generate(prompt_of(6), **GREEDY))
    assert not drafter.last_statistics.prepacked


def test_calls_that_are_left_as_they_are(monkeypatch):
    target, prompt = tiny_target("llama"), prompt_of(6)
    drafter = a_drafter()
    call = {"assistant_model": drafter, **GREEDY}
    target.generate(prompt, return_dict_in_generate=True, output_hidden_states=True, **call)
    assert not drafter.last_statistics.prepacked
    with torch.autocast("cpu", torch.bfloat16):
        target.generate(prompt, **call)
    assert not drafter.last_statistics.prepacked
    size = sum(layer.weight.nbytes for layer in fitting(target))
    for weights in (None, PrepackedWeights(size - 1), PrepackedWeights(size)):
        drafter.prepacked_weights = weights
        target.generate(prompt, **call)
        assert drafter.last_statistics.prepacked == (weights is not None and weights.most_bytes == size)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert fitting(target) == []


def test_float32_that_is_made_of_fewer_bits_is_left_as_it_is():
    target, prompt, drafter = tiny_target("llama"), prompt_of(6), a_drafter()
    precision = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"  # as `TrainingArguments(tf32=True)` does
        with pytest.raises(RuntimeError):
            torch.get_float32_matmul_precision()
        assert fitting(target) == []
        target.generate(prompt, assistant_model=drafter, **GREEDY)
        assert not drafter.last_statistics.prepacked
    finally:
        torch.backends.fp32_precision = precision


def test_weights_that_changed_between_calls_are_copied_when_some_rounds_have_been_read_again():
    target, prompt, drafter = deepcopy(tiny_target("llama")), prompt_of(6), a_drafter(0)
    call = {"assistant_model": drafter, **GREEDY}
    target.generate(prompt, **call)
    rescale(target, -1.5, "in place")
    for rounds, prepacked in ((PATIENCE, False), (1, True)):
        target.generate(prompt, **call | {"max_new_tokens": rounds + 1})
        assert drafter.last_statistics.prepacked == prepacked


@pytest.mark.parametrize("part", ["the target", "one of its layers"])
def test_a_compiled_target_is_left_as_it_is(part):
    target, drafter = deepcopy(tiny_target("llama")), a_drafter()
    (target if part == "the target" else target.model.layers[1]).compile(backend="eager")
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    assert not drafter.last_statistics.prepacked


def test_only_plain_weights_in_one_piece_fit():
    def fits(layer: nn.Module) -> bool:
        return fitting(nn.Sequential(layer)) != []

    assert fits(nn.Linear(8, 4)) and fits(nn.Linear(8, 4, bias=False))
    assert not fits(nn.Linear(8, 4, dtype=torch.float64)) and not fits(nn.Linear(7, 4))
    assert not fits(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(8, 4).t())
    assert not fits(layer)
    layer.weight = nn.Parameter(torch.zeros(33)[1:].view(4, 8))
    assert not fits(layer)


def test_precision_that_is_lowered_during_a_call_breaks_nothing_off(monkeypatch):
    target, weights = tiny_target("llama"), PrepackedWeights()
    layers = fitting(target)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert weights.has_room(layers) and not fitting(target)
    assert isinstance(prepacked_twin(target, layers, weights).lm_head, PrepackedLinear)


def test_small_weights_are_left(monkeypatch):
    monkeypatch.setattr(prepacking, "LEAST_BYTES", 4 * 8 * 4)
    layers = nn.Sequential(nn.Linear(8, 3), nn.Linear(8, 4))
    assert fitting(layers) == [layers[1]]


def test_copies_go_with_their_target_and_not_with_a_copied_drafter():
    target = deepcopy(tiny_target("llama"))
    drafter = a_drafter()
    drafter.prepacked_weights.most_bytes = 1 << 20
    target.generate(prompt_of(6), assistant_model=drafter, **GREEDY)
    weights = drafter.prepacked_weights
    assert weights.knows(fitting(target))
    for copied in (deepcopy(weights), pickle.loads(pickle.dumps(weights))):
        assert copied.most_bytes == 1 << 20 and not copied.knows(fitting(target))
    joined = JoinedDrafter(drafter, LookupDrafter(target.config))
    assert joined.prepacked_weights is joined.parts[0].prepacked_weights
    del target, joined, drafter
    gc.collect()
    assert len(weights._packed) == 0

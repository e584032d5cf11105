# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a call that is broken off leaves of a user's cache: whoever goes on with it gets plain decoding's text."""

from __future__ import annotations

import sys
from copy import copy, deepcopy
from types import FrameType

import pytest
import torch
from attention_for_tests import ALL, allowed
from batches_for_tests import garbage, oracles, padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from transformers import (
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
    cache_utils,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.streamers import BaseStreamer

from specblock_hf import DraftingCallback
from specblock_hf.compat import CACHE
from specblock_hf.target import cache as target_cache
from specblock_hf.target import cache_layer as target_layer
from specblock_hf.target import model as target_module
from specblock_hf.target.cache import TargetCache


GREEDY = {"do_sample": False, "max_new_tokens": 16, "eos_token_id": None, "pad_token_id": 0}
PROMPT, ROUND = 11, 4  # tokens of the prompt, and of every round of the oracle below
ONE = torch.ones(1, PROMPT, dtype=torch.long)
KINDS = [("llama", "dynamic"), ("llama", "static"), ("mistral", "dynamic"), ("gemma3", "dynamic")]


def test_rows_grow_apart_where_layers_are_on_another_device():
    """The embedding's device has the trees and masks; a device map may part the layers from it."""
    here, there, cache = torch.device("cpu"), torch.device("meta"), DynamicCache()
    cache.update(*torch.zeros(2, 2, 1, PROMPT + 2, 4, device=there), 0)
    for visible in (None, torch.ones(2, PROMPT, dtype=torch.bool)):
        committed = TargetCache(copy(cache), 2, PROMPT, visible, here)
        committed.commit(torch.tensor([[0, 1], [0, -1]]), 2)
        assert committed.visible.device == here
        assert committed.visible.sum(1).tolist() == [PROMPT + 2, PROMPT + 1]


class Stop(BaseException):
    """Like an interrupt from the keyboard, nothing that a handler of errors would catch."""


class Counter:
    """Raises when it is counted for the n-th time."""

    def __init__(self, left: int):
        self.left = left

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Stop


class StreamerThatStops(Counter, BaseStreamer):
    def put(self, value):
        self.count()

    def end(self):
        pass


class CriterionThatStops(Counter, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.count()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class ProcessorThatStops(Counter, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.count()
        return scores


class CallbackThatStops(Counter, DraftingCallback):
    def __init__(self, left: int, event: str):
        super().__init__(left)
        setattr(self, event, lambda *args, **kwargs: self.count())


class DrafterThatStops(OracleDrafter):
    def draft(self, state, limits):
        if len(state.limits) == 3:
            raise Stop
        return super().draft(state, limits)


def make_cache(target: PreTrainedModel, kind: str) -> DynamicCache | StaticCache:
    return DynamicCache(config=target.config) if kind == "dynamic" else StaticCache(target.config, max_cache_len=80)


def oracle(target: PreTrainedModel) -> OracleDrafter:
    """Every round keeps three drafted tokens, with siblings between them."""
    text = target.generate(prompt_of(PROMPT), attention_mask=ONE, **GREEDY)[0].tolist()
    return OracleDrafter(VOCAB, text, plan=lambda number: ROUND - 1)


def check_continued(
    target: PreTrainedModel, cache: DynamicCache | StaticCache, ids: torch.LongTensor, mask: torch.LongTensor
) -> None:
    """Plain decoding and ours go on with all tokens that were emitted as if there were no cache."""
    types = {type(layer) for layer in cache.layers}
    assert types <= {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}
    assert not any(layer.record_past for layer in cache.layers if type(layer) is DynamicSlidingWindowLayer)
    assert len({int(layer.get_seq_length()) for layer in cache.layers}) <= 1
    ids = torch.cat((ids, prompt_of(3, seed=9).expand(len(ids), -1)), dim=1)
    options = GREEDY | {"attention_mask": torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)}
    options["max_new_tokens"] = 8
    plain = target.generate(ids, **options)
    assert torch.equal(target.generate(ids, **{CACHE: deepcopy(cache)}, **options), plain)
    assert torch.equal(target.generate(ids, **{CACHE: cache}, assistant_model=garbage(len(ids)), **options), plain)


def break_off(target: PreTrainedModel, cache: DynamicCache | StaticCache, drafter, **options) -> None:
    ids = options.pop("input_ids", prompt_of(PROMPT))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache}
    with pytest.raises(Stop):
        target.generate(**GREEDY | inputs | options, assistant_model=drafter)


@pytest.mark.parametrize(("kind", "store"), KINDS)
@pytest.mark.parametrize("way", ["streamer", "criterion", "processor"])
@pytest.mark.parametrize("token", [1, 2, 5, 12])
def test_whatever_looks_at_tokens_may_raise(kind, store, way, token):
    target = tiny_target(kind)
    drafter, cache = oracle(target), make_cache(target, store)
    options = {
        "streamer": {"streamer": StreamerThatStops(1 + token)},  # which gets the prompt first
        "criterion": {"stopping_criteria": [CriterionThatStops(token)]},
        "processor": {"logits_processor": [ProcessorThatStops(token)]},
    }
    break_off(target, cache, drafter, **options[way])
    # The first token comes alone; the last one of a round is read with the next.
    finished = max((token + ROUND - 2) // ROUND - 1, 0)
    assert int(cache.get_seq_length()) == PROMPT + ROUND * finished
    check_continued(target, cache, torch.tensor([drafter.text[: PROMPT + token]]), ONE)


@pytest.mark.parametrize(("kind", "store"), KINDS)
@pytest.mark.parametrize("event", ["on_draft", "on_verify", "on_commit", "on_generate_end"])
def test_a_callback_may_raise(kind, store, event):
    target = tiny_target(kind)
    drafter, cache = oracle(target), make_cache(target, store)
    drafter.add_callback(CallbackThatStops(1 if event == "on_generate_end" else 3, event))
    break_off(target, cache, drafter)
    # The first token is committed, too; the third round would be, had it got so far.
    assert int(cache.get_seq_length()) == PROMPT + {"on_commit": 8, "on_generate_end": 15}.get(event, 8)
    check_continued(target, cache, torch.tensor([drafter.text]), ONE)


@pytest.mark.parametrize(("kind", "store"), KINDS)
def test_a_drafter_may_raise(kind, store):
    target = tiny_target(kind)
    drafter, cache = DrafterThatStops(VOCAB, oracle(target).text, lambda number: ROUND - 1), make_cache(target, store)
    break_off(target, cache, drafter)
    assert int(cache.get_seq_length()) == PROMPT + 2 * ROUND
    check_continued(target, cache, torch.tensor([drafter.text]), ONE)


@pytest.mark.parametrize(("kind", "store"), KINDS)
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(("forward", "columns"), [(1, 0), (2, 4), (3, 8), (4, PROMPT), (6, PROMPT + 2 * ROUND)])
def test_a_forward_may_end_between_two_layers(kind, store, layer, forward, columns):
    target = tiny_target(kind)
    drafter, cache = oracle(target), make_cache(target, store)
    counter = Counter(forward)
    handle = target.get_decoder().layers[layer].self_attn.register_forward_hook(lambda *args: counter.count())
    try:
        break_off(target, cache, drafter, prefill_chunk_size=4)
    finally:
        handle.remove()
    assert int(cache.get_seq_length()) == columns
    check_continued(target, cache, torch.tensor([drafter.text[: max(PROMPT, columns)]]), ONE)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mistral"])
@pytest.mark.parametrize("event", ["on_draft", "on_verify", "on_commit"])
def test_the_rows_of_a_batch_go_back_to_their_prompts(kind, event):
    target, batch = tiny_target(kind), padded_batch((7, 11, 4))
    plain = target.generate(**batch, **GREEDY)
    drafter, cache = oracles(plain, batch["attention_mask"]), make_cache(target, "dynamic")
    drafter.add_callback(CallbackThatStops(4, event))
    break_off(target, cache, drafter, **batch)
    assert cache.get_seq_length() == 11
    check_continued(target, cache, plain[:, :13], batch["attention_mask"])


def test_a_cache_of_an_earlier_turn_keeps_it():
    target = tiny_target("gemma3")
    for forward in range(1, 8):
        cache = make_cache(target, "dynamic")
        first = target.generate(prompt_of(9), attention_mask=ONE[:, :9], **{CACHE: cache}, **GREEDY)
        ids = torch.cat((first, prompt_of(6, seed=1)), dim=1)
        counter = Counter(forward)
        handle = target.get_decoder().layers[2].register_forward_hook(lambda *args, counter=counter: counter.count())
        break_off(target, cache, GarbageDrafter(VOCAB), input_ids=ids, prefill_chunk_size=3)
        handle.remove()
        assert cache.get_seq_length() >= first.shape[1] - 1
        text = target.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        check_continued(target, cache, text, torch.ones_like(text))


class Interrupts:
    """
    Interrupts a call at the n-th line that it runs of the code that handles caches, as a key may, before the cache is
    given back.
    """

    FILES = {module.__file__ for module in (cache_utils, target_cache, target_layer, target_module)}

    def __init__(self, line: int):
        self.left = line

    def __enter__(self) -> None:
        sys.settrace(self._call)

    def __exit__(self, *exc_info) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object):
        if frame.f_code is target_module.TargetModel.__exit__.__code__:
            sys.settrace(None)
        return self._line if frame.f_code.co_filename in self.FILES else None

    def _line(self, frame: FrameType, event: str, arg: object):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise Stop
        return self._line


@pytest.mark.parametrize(("kind", "store"), KINDS)
@pytest.mark.parametrize("lengths", [(PROMPT,), (7, PROMPT, 4)], ids=["one", "batch"])
def test_a_call_may_end_at_any_line(kind, store, lengths):
    if store == "static" and len(lengths) > 1:
        pytest.skip("refused")
    target, batch = tiny_target(kind), padded_batch(lengths)
    plain = target.generate(**batch, **GREEDY)
    lines = 0
    for line in range(60, 10_000, 149):
        cache = make_cache(target, store)
        drafter = oracles(plain, batch["attention_mask"])
        with Interrupts(line):
            try:
                target.generate(**batch, **GREEDY, **{CACHE: cache}, assistant_model=drafter)
                break
            except Stop:
                lines += 1
        check_continued(target, cache, plain, batch["attention_mask"])
        assert allowed() == ALL, "what the package sets for a moment is taken back"
    assert lines > 10

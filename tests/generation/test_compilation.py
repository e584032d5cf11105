# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Rounds of fixed shapes that are compiled as well, mostly with a backend that runs traced graphs as they are."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
from types import FunctionType

import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import OracleDrafter
from models_for_tests import tiny_drafter
from targets_for_tests import TargetKind, make_target
from torch import nn
from transformers import CompileConfig, DynamicCache

from specblock_hf import (
    DraftingCallback,
    DraftingPlan,
    JoinedDrafter,
    LookupDrafter,
    SpecBlockConfig,
    SpecBlockDrafter,
    compile_rounds,
)
from specblock_hf.compat import CACHE
from specblock_hf.drafters.falcon import FalconDrafter, FalconDrafterConfig
from specblock_hf.target.twin import _kept


GREEDY = {"do_sample": False}


class Graphs:
    """A backend of `torch.compile` that counts what it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Graphs:
    return Graphs()


class Trees(DraftingCallback):
    """Keeps tokens and parents of every drafted tree, without padding."""

    def __init__(self):
        self.seen = []

    def on_draft(self, call, tree):
        rows = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        self.seen.append([[pair for pair in zip(*row, strict=True) if pair[1] > -2] for row in rows])


def small_drafter():
    """One that has two graphs for each call that fits: of trees of 5 nodes, and of few rows."""
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(4, 1)
    return drafter


def whole(prompt: torch.LongTensor) -> dict[str, torch.LongTensor]:
    return {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_text_the_features_and_two_graphs(attention, graphs):
    target, layers, told = tiny_target("qwen3", attention), (0, 2, 4), []
    inputs = whole(prompt_of(9))
    text = target.generate(**inputs, **GREEDY, max_new_tokens=30)
    for compiles in (False, True):
        drafter = OracleDrafter(VOCAB, text[0].tolist(), lambda number: (number * 5 + 3) % 9, feature_layers=layers)
        if compiles:
            compile_rounds(target, drafter, max_length=40, tree_sizes=(16, 48), backend=graphs)
        assert torch.equal(text, target.generate(**inputs, **GREEDY, max_new_tokens=30, assistant_model=drafter))
        figures = drafter.last_statistics
        assert figures.compiled_rounds == (figures.rounds if compiles else 0) and max(figures.accepted) > 4
        assert figures.target_calls == figures.rounds + 1
        told.append(drafter.states[0])
    assert graphs.count == 2
    assert told[0].tokens() == told[1].tokens() and told[0].positions() == told[1].positions()
    for layer in range(len(layers)):
        torch.testing.assert_close(told[0].features(layer), told[1].features(layer))


@pytest.mark.parametrize(("kind", "lookup"), [("specblock", False), ("eagle3", True)], ids=["alone", "joined"])
def test_the_drafter_grows_the_same_trees_from_few_graphs(kind, lookup, llama, graphs):
    drafter = tiny_drafter(kind)
    drafter.drafting_plan = DraftingPlan(12, 3, 4)
    if lookup:
        drafter = JoinedDrafter(drafter, LookupDrafter(llama.config))
    seen = []
    for compiles in (False, True):
        if compiles:
            compile_rounds(llama, drafter, max_length=64, backend=graphs)
        trees = Trees()
        drafter.add_callback(trees)
        for seed, length in enumerate((2, 14, 33)):
            drafted = llama.generate(
                **whole(prompt_of(length, seed)), **GREEDY, max_new_tokens=24, assistant_model=drafter
            )
            assert not compiles or drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds
            trees.seen.append(drafted.tolist())
        drafter.remove_callback(trees)
        seen.append(trees.seen)
    assert seen[0] == seen[1]
    # Of the target trees and roots, of the drafter the first forward and all others.
    assert graphs.count == 2 + 2
    llama.generate(**whole(prompt_of(21, 9)), **GREEDY, max_new_tokens=40, assistant_model=drafter)
    assert graphs.count == 2 + 2


def test_other_drafters_have_their_target_compiled(llama, graphs):
    torch.manual_seed(1)
    drafter = FalconDrafter(FalconDrafterConfig.for_target(llama.config, draft_vocab_size=24)).eval()
    inputs = whole(prompt_of(7))
    text = llama.generate(**inputs, **GREEDY, max_new_tokens=20)
    compile_rounds(llama, drafter, max_length=30, tree_sizes=(61,), backend=graphs)
    assert torch.equal(text, llama.generate(**inputs, **GREEDY, max_new_tokens=20, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds
    assert drafter.last_statistics.eager_because == "a round of FalconDrafter has no fixed shapes"
    assert graphs.count == 1


@pytest.mark.parametrize("eos", [None, 3], ids=["length", "eos"])
def test_rows_of_a_batch_end_at_different_rounds_in_a_full_cache(eos, llama, graphs):
    batch = padded_batch((5, 9, 2))
    options = batch | GREEDY | {"max_new_tokens": 26, "eos_token_id": eos, "pad_token_id": 0}
    text = llama.generate(**options)
    drafter = oracles(text, batch["attention_mask"], feature_layers=(1,)) if eos is None else garbage(3)
    compile_rounds(llama, drafter, batch_size=3, max_length=9 + 26, tree_sizes=(1, 48), backend=graphs)
    assert torch.equal(text, llama.generate(**options, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds > 3
    assert graphs.count <= 2


# Rows of a batch share the random numbers, so that private draws change which row gets which.
@pytest.mark.parametrize(("sampling", "lengths"), [("topk", (3, 8)), ("sampled", (8,))], ids=["topk", "sampled"])
def test_a_seed_gives_the_same_text(sampling, lengths, llama, graphs):
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(8, 2, 4, draft_sampling=sampling, verification="walk")
    options = padded_batch(lengths) | {"do_sample": True, "max_new_tokens": 20, "eos_token_id": 3, "pad_token_id": 0}
    texts, accepted = [], []
    for compiles in (False, True):
        if compiles:
            compile_rounds(llama, drafter, batch_size=len(lengths), max_length=32, tree_sizes=(9,), backend=graphs)
        for seed in range(2):
            torch.manual_seed(seed)
            texts.append(llama.generate(**options, assistant_model=drafter).tolist())
            accepted.append(drafter.last_statistics.accepted)
            assert bool(drafter.last_statistics.compiled_rounds) == compiles
    assert texts[:2] == texts[2:]
    assert sampling == "sampled" or accepted[:2] == accepted[2:]  # private draws differ from call to call


def test_larger_trees_lose_their_last_nodes(llama, graphs):
    inputs = whole(prompt_of(6))
    text = llama.generate(**inputs, **GREEDY, max_new_tokens=40)
    drafter = oracles(text, inputs["attention_mask"])
    compile_rounds(llama, drafter, max_length=46, tree_sizes=(12,), backend=graphs)
    drafter.drafting_plan = DraftingPlan(24, 1)  # after compiling
    assert torch.equal(text, llama.generate(**inputs, **GREEDY, max_new_tokens=40, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds
    assert drafter.last_statistics.nodes_verified <= 12 * drafter.last_statistics.rounds
    assert graphs.count == 1


def test_calls_that_do_not_fit_run_uncompiled(llama, graphs):
    drafter = small_drafter()
    compile_rounds(llama, drafter, max_length=24, tree_sizes=(5,), backend=graphs)
    inputs, batch = whole(prompt_of(5)), padded_batch((5, 3))
    for options in (
        inputs | {"max_new_tokens": 20},
        batch | {"max_new_tokens": 10},
        inputs | {"max_new_tokens": 10, "return_dict_in_generate": True},
        inputs | {"max_new_tokens": 10, CACHE: DynamicCache(config=llama.config)},
    ):
        llama.generate(**options, **GREEDY, assistant_model=drafter)
        assert drafter.last_statistics.rounds and not drafter.last_statistics.compiled_rounds
    assert graphs.count == 0
    llama.generate(**inputs, **GREEDY, max_new_tokens=19, assistant_model=drafter)
    assert drafter.last_statistics.compiled_rounds
    embeds = llama.get_input_embeddings()(inputs["input_ids"])
    text = llama.generate(**inputs, **GREEDY, max_new_tokens=19)[:, 5:]
    for most, fits in ((19, True), (20, False)):
        of_embeds = llama.generate(inputs_embeds=embeds, **GREEDY, max_new_tokens=most, assistant_model=drafter)
        assert torch.equal(text, of_embeds[:, :19]) and bool(drafter.last_statistics.compiled_rounds) == fits


def test_a_call_inside_another_runs_uncompiled_and_spoils_nothing(llama, graphs):
    class Interrupter(DraftingCallback):
        inner = []

        def on_draft(self, call, tree):
            if len(self.inner) < 2 and threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=self.call)
                thread.start()
                thread.join()

        def call(self):
            self.inner.append(llama.generate(**other, **GREEDY, max_new_tokens=12, assistant_model=drafter))
            self.inner[-1] = (self.inner[-1], drafter.last_statistics.compiled_rounds)

    drafter, inputs, other = small_drafter(), whole(prompt_of(5)), whole(prompt_of(8, 3))
    texts = [llama.generate(**ids, **GREEDY, max_new_tokens=12) for ids in (inputs, other)]
    compile_rounds(llama, drafter, max_length=24, tree_sizes=(5,), backend=graphs)
    drafter.add_callback(Interrupter())
    assert torch.equal(texts[0], llama.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds
    assert all(torch.equal(texts[1], text) and count == 0 for text, count in Interrupter.inner)


def test_calls_under_inference_mode(llama, graphs):
    drafter, inputs = small_drafter(), whole(prompt_of(5))
    text = llama.generate(**inputs, **GREEDY, max_new_tokens=12)
    with torch.inference_mode():
        compile_rounds(llama, drafter, max_length=24, tree_sizes=(5,), backend=graphs)
        assert torch.equal(text, llama.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter))
    assert torch.equal(text, llama.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds


def test_nobody_else_sees_a_compiled_target_or_drafter(graphs):
    target = copy.deepcopy(tiny_target("llama"))
    drafter = small_drafter()

    def state() -> list:
        return [(name, dict(vars(part)), len(part._forward_hooks)) for name, part in target.named_modules()]

    target(prompt_of(4))  # what transformers installs at first use
    before = state()
    compile_rounds(target, drafter, max_length=24, backend=graphs)
    target.generate(**whole(prompt_of(5)), **GREEDY, max_new_tokens=12, assistant_model=drafter)
    after = state()
    assert [names for names, *_ in before] == [names for names, *_ in after]
    for (_, old, hooks), (_, new, hooks_now) in zip(before, after, strict=True):
        assert old.keys() == new.keys() and hooks == hooks_now
        assert all(old[name] is new[name] for name in old)
    assert graphs.count > 0
    assert copy.deepcopy(drafter).compiled_rounds is None
    assert pickle.loads(pickle.dumps(drafter)).compiled_rounds is None


def test_new_weights_are_used_without_compiling_again(graphs):
    target = copy.deepcopy(tiny_target("llama"))
    drafter, inputs = small_drafter(), whole(prompt_of(5))
    compile_rounds(target, drafter, max_length=24, tree_sizes=(5,), backend=graphs)
    target.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter)
    count = graphs.count
    with torch.no_grad():
        for weight in target.parameters():
            weight.mul_(1.1)
    text = target.generate(**inputs, **GREEDY, max_new_tokens=12)
    assert torch.equal(text, target.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds and graphs.count <= count + 1


def test_what_cannot_be_compiled_is_refused(llama):
    drafter = tiny_drafter()
    with pytest.raises(ValueError, match="^MistralForCausalLM has layers that slide, .* use the drafter uncompiled.$"):
        compile_rounds(tiny_target("mistral"), drafter)
    target = copy.deepcopy(llama)
    target.model.forward = target.model.forward
    with pytest.raises(ValueError, match="^the forward of this LlamaModel was replaced .* onto one device.$"):
        compile_rounds(target, drafter)
    target = copy.deepcopy(llama)
    target.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(
        ValueError, match="^the rotary positions of LlamaForCausalLM change at a length, .* uncompiled.$"
    ):
        compile_rounds(target, drafter)
    assert drafter.compiled_rounds is None


def test_what_keeps_a_state_can_be_traced():
    states: dict[int, torch.Tensor] = {}
    layer, keep = nn.Linear(2, 2), _kept(states, 3)
    # torch 2.11 traces no partial of a method of `dict`.
    assert type(keep) is FunctionType
    layer.register_forward_hook(lambda _, args, output: keep(output))
    traced = torch.compile(lambda x: (layer(x), states[3]), backend="eager", fullgraph=True)
    output, kept = traced(torch.ones(1, 2))
    assert torch.equal(output, kept) and torch.equal(output, layer(torch.ones(1, 2)))


def test_flags_of_training_are_off(graphs):
    target = make_target(TargetKind("mixtral", flag="output_router_logits"))
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
    text = target.generate(**whole(prompt_of(6)), **GREEDY, max_new_tokens=12)
    compile_rounds(target, drafter, max_length=18, tree_sizes=(5,), backend="eager", fullgraph=False)
    assert torch.equal(
        text, target.generate(**whole(prompt_of(6)), **GREEDY, max_new_tokens=12, assistant_model=drafter)
    )
    assert drafter.last_statistics.compiled_rounds


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_code_writes_the_same_text(llama):
    inputs, drafter = whole(prompt_of(6)), small_drafter()
    text = llama.generate(**inputs, **GREEDY, max_new_tokens=12)
    compile_rounds(llama, drafter, max_length=18, tree_sizes=(5,), backend="inductor")
    assert torch.equal(text, llama.generate(**inputs, **GREEDY, max_new_tokens=12, assistant_model=drafter))
    assert drafter.last_statistics.compiled_rounds == drafter.last_statistics.rounds


@pytest.mark.parametrize("lengths", [(7,), (7, 4, 9)])
def test_a_static_cache_that_plain_decoding_compiles_for(llama, graphs, lengths):
    """As it does by itself on accelerators; the rounds of a drafter stay uncompiled, because trees change shape."""
    llama = copy.deepcopy(llama)  # transformers keeps the compiled call on it
    everywhere = CompileConfig(backend=lambda graph, inputs: graphs(graph, inputs), mode=None, fullgraph=False)
    everywhere._compile_all_devices = True
    batch, options = padded_batch(lengths), {"cache_implementation": "static", "compile_config": everywhere}
    plain = llama.generate(**batch, **GREEDY, **options, max_new_tokens=12)
    compiled = graphs.count
    output = llama.generate(**batch, **GREEDY, **options, max_new_tokens=12, assistant_model=garbage(len(lengths)))
    assert torch.equal(output, plain) and 0 < compiled == graphs.count

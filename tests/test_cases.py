# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of faults that users of this and of other libraries have met, one test for each, which tells what happens now:
`pytest tests -k cases -s`. Each kind has more members, in the tests of the part that it concerns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from baselines_for_tests import baseline
from batches_for_tests import garbage, padded_batch
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from drafters_for_tests import ToldDrafter, make_tree
from families_for_tests import FAMILIES, target_of
from fresh_import_for_tests import imported_afresh
from interruptions_for_tests import Broken, Ended, Listener
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from options_for_tests import BASE, refusal, same_text
from targets_for_tests import LIMIT, MOE_FAMILIES, OFFLOADED, ROPES, TargetKind, forget_the_past, make_target
from training_for_tests import tiny_drafter
from transfers_for_tests import TwoDevices
from transformers import AutoModelForCausalLM, DynamicCache, Phi3Config

from specblock_hf import DraftingPlan, JoinedDrafter, LookupDrafter, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.checkpoints import provenance
from specblock_hf.compat import CACHE
from specblock_hf.drafters.common.configuration import UNRECORDED_LAYER


def case(number: int, fault: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """
    Makes a test of a function that checks what happens now and returns it as the end of the printed line.

    Args:
        number (`int`): Of the case.
        fault (`str`): What once went wrong.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def test(*args, **kwargs) -> None:
            print(f"\n{number:2d}. {fault}: {check(*args, **kwargs)}", end="")

        return test

    return decorate


# Targets: 1 to 8.


@case(1, "a call that is broken off")
def test_a_cache_after_a_call_that_was_broken_off() -> str:
    emitted = {}
    for kind in ("llama", "gemma3"):
        target, prompt = tiny_target(kind), prompt_of(11)
        cache, listener = DynamicCache(config=target.config), Listener(Ended(Broken, 9))
        with pytest.raises(Broken):
            target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=listener,
                assistant_model=garbage(1),
                **BASE | {CACHE: cache, "eos_token_id": None},
            )
        ids = torch.cat((prompt, torch.tensor([listener.tokens]), prompt_of(4, seed=1)), dim=1)
        options = BASE | {"attention_mask": torch.ones_like(ids)}
        plain = target.generate(ids, **options)
        assert torch.equal(target.generate(ids, **options, **{CACHE: cache}, assistant_model=garbage(1)), plain)
        emitted[kind] = len(listener.tokens)
    return f"after {emitted['llama']} tokens the next turn with the same cache writes plain decoding's text"


@case(2, "columns that are not the prompt's")
def test_a_prompt_that_adds_other_columns() -> str:
    said = refusal(make_target(TargetKind(wrap="prompt tuning")), padded_batch((9,)), dict)
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | ROPES["longrope"]
    config = Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=rope)
    same_text(AutoModelForCausalLM.from_config(config).eval(), padded_batch((100,)), dict)
    return f"Phi-3 beyond its original length writes plain decoding's text; prompt tuning: {said}"


@case(3, "rows of a forward that depend on each other")
def test_rows_that_depend_on_each_other() -> str:
    for rope in ("dynamic", "longrope"):
        kind = TargetKind(rope=rope)
        for length in (LIMIT - 7, LIMIT - 2, LIMIT + 20):
            batch, texts = padded_batch((length,)), []
            for drafter in (None, garbage(1)):
                forget_the_past(kind, make_target(kind))
                texts.append(make_target(kind).generate(**batch, **BASE, assistant_model=drafter))
            assert torch.equal(*texts)
    said = refusal(make_target(TargetKind(mode="dropout")), padded_batch((9,)), dict)
    return f"dynamic RoPE and longrope write plain decoding's text across their length; dropout: {said}"


@case(4, "what transformers adds to a multimodal call")
def test_multimodal_targets() -> str:
    for kind in MULTIMODAL:
        target = multimodal_target(kind)
        same_text(target, padded_batch((7,)), dict)
        plain = same_text(target, prompts_with_images(kind, (7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        chunks = BASE | {"prefill_chunk_size": 3, "assistant_model": drafter}
        assert torch.equal(target.generate(**prompts_with_images(kind, (7,)), **chunks), plain)
    return f"{', '.join(MULTIMODAL)}: text, a picture, and a picture with prefill_chunk_size are exact"


@case(5, "training flags in a saved configuration")
def test_training_flags() -> str:
    for family in MOE_FAMILIES:
        same_text(make_target(TargetKind(family, flag="output_router_logits")), padded_batch((7,)), dict)
    for flag in ("output_hidden_states", "output_attentions", "use_cache"):
        same_text(make_target(TargetKind(attention="eager", flag=flag)), padded_batch((7,)), dict)
    return f"{', '.join(MOE_FAMILIES)} with output_router_logits and Llama with three others are exact"


@case(6, "weights that are elsewhere between forwards")
def test_offloaded_weights() -> str:
    for offload in OFFLOADED:
        target = make_target(TargetKind(wrap=offload))
        plain = same_text(target, padded_batch((7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return f"{', '.join(OFFLOADED)}: exact"


@case(7, "ids of int32, no ids")
def test_other_ids() -> str:
    batch = padded_batch((7,))
    same_text(tiny_target("llama"), batch | {"input_ids": batch["input_ids"].int()}, dict)
    empty = torch.ones(1, 0, dtype=torch.long)
    said = refusal(tiny_target("llama"), {"input_ids": empty, "attention_mask": empty}, dict)
    return f"int32 is exact; an empty prompt: {said}"


@case(8, "a wrapped forward, a package imported afresh")
def test_wrapped_and_imported_afresh() -> str:
    same_text(make_target(TargetKind(wrap="wrapped forward")), padded_batch((7,)), dict)
    target = tiny_target("llama")
    plain = target.generate(**padded_batch((7,)), **BASE)
    old = SpecBlockDrafter(SpecBlockConfig.for_target(target.config)).eval()
    with imported_afresh() as package:
        new = package.SpecBlockDrafter(package.SpecBlockConfig.for_target(target.config)).eval()
        assert not isinstance(new, SpecBlockDrafter)
        for drafter in (old, new):
            assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return "both are exact, with drafters of the old package and of the new one"


# Drafters: 9 to 11, 14, 15, 17.


class TooDeep(ToldDrafter):
    """Proposes a chain of a hundred tokens whatever it is told, and calls it flat."""

    def draft(self, state, limits):
        return replace(make_tree([1] * 100, range(-1, 99)), height=1)


@case(9, "a drafter that ignores its limits at the target's last position")
def test_a_drafter_beyond_its_limits():
    target, drafter = target_of("GPT-2"), TooDeep(VOCAB)
    options = {"do_sample": False, "max_length": target.config.max_position_embeddings}
    assert torch.equal(
        target.generate(prompt_of(9), assistant_model=drafter, **options), target.generate(prompt_of(9), **options)
    )
    return f"exact to position {options['max_length']}, {drafter.last_statistics.nodes_verified} nodes in all"


@case(10, "for_target knows Llama's names only")
def test_families_with_other_names():
    for family in FAMILIES:
        target = target_of(family)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, draft_vocab_size=24)).eval()
        texts = [
            target.generate(prompt_of(7), do_sample=False, max_new_tokens=6, assistant_model=helper)
            for helper in (drafter, None)
        ]
        assert torch.equal(*texts)
    return f"drafters made and texts exact for {', '.join(FAMILIES)}"


@case(11, "a joined drafter forgets what its parts know")
def test_a_joined_drafter_asks_its_parts():
    target, medusa = tiny_target("llama"), baseline("medusa")
    medusa.config.feature_layers = [UNRECORDED_LAYER]
    joined = JoinedDrafter(medusa, LookupDrafter(target.config))
    medusa.drafting_plan = DraftingPlan(5, 1)
    options = {"do_sample": False, "max_new_tokens": 12}
    output = target.generate(prompt_of(9), assistant_model=joined, **options)
    assert torch.equal(output, target.generate(prompt_of(9), **options))
    assert joined.last_statistics.nodes_verified <= 6 * joined.last_statistics.rounds
    return f"{joined} reads layer {joined.feature_layers_for(target)[0]} of 4 and drafts by a plan set after joining"


@case(14, "Falcon in a batch on a GPU; saving where the package is not installed")
def test_falcon_on_a_device_and_a_package_without_metadata(tmp_path, monkeypatch):
    falcon, lengths = baseline("falcon_drafter"), torch.tensor([3, 0, 5])
    states = torch.randn(3, 5, falcon.config.hidden_size)
    alone = [falcon.read(states[row : row + 1, :5], states[row : row + 1])[0][0] for row in (0, 2)]
    with TwoDevices() as devices:
        together, _ = falcon.read(states, states, lengths=lengths.cpu())
    assert [transfer.kind for transfer in devices.transfers if transfer.kind == "upload"] == []
    for row, count, own in ((0, 3, alone[0]), (2, 5, alone[1])):
        torch.testing.assert_close(together[row, :count], own[:count])

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(provenance, "version", version)
    falcon.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "provenance.json").read_text())["versions"] == {}
    return "lengths and states meet on one device; saved with no versions"


@case(15, "starts without bound")
def test_free_starts():
    target, drafter = tiny_target("llama"), tiny_drafter(branching=[8, 8, 8, 8], root_width=12, max_starts=None)
    rows = {}
    for plan in (DraftingPlan(2, 3), DraftingPlan(2, 4), DraftingPlan(12, 4)):
        drafter.drafting_plan = plan
        target.generate(prompt_of(9), do_sample=False, max_new_tokens=16, assistant_model=drafter)
        statistics = drafter.last_statistics
        most = sum(max(plan.tree_budget - forward, 0) for forward in range(1, plan.num_forwards))
        assert statistics.drafter_rows <= 9 + 16 + most * statistics.rounds
        rows[plan.tree_budget, plan.num_forwards] = statistics.drafter_rows
    return ", ".join(f"{count} rows for 16 tokens by DraftingPlan{plan}" for plan, count in rows.items())


@case(17, "a drafter whose network says NaN")
def test_a_network_of_nan():
    target, drafter, calls = tiny_target("llama"), tiny_drafter(), 0
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.fill_(math.nan)
    options = {"max_new_tokens": 8, "top_k": 1, "do_sample": True}  # one token has all the probability
    plain = target.generate(prompt_of(9), max_new_tokens=8, do_sample=False)
    for drawing in ("sampled", "independent", "paths"):
        for rule in ("walk", "token", "block"):
            drafter.drafting_plan = DraftingPlan(9, 2, draft_sampling=drawing, verification=rule)
            for sampling in (options, {"max_new_tokens": 8, "do_sample": False}):
                assert torch.equal(target.generate(prompt_of(9), assistant_model=drafter, **sampling), plain)
                calls += 1
    return f"the target's text in {calls} calls, drawn and greedy"


# Adaptation: 12, 13, 16, 18.


# Checkpoints: 19 to 23.

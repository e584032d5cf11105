# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which calls have captured rounds without being asked to, when they are captured anew, and what is left eager."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from batches_for_tests import padded_batch
from conftest import prompt_of, tiny_target
from graphs_for_tests import PretendedGraphs, recorders
from peft import LoraConfig
from training_for_tests import tiny_drafter
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from specblock_hf import DraftingPlan, compile_rounds
from specblock_hf.compat import CACHE
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LookupDrafter
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.generation import compilation
from specblock_hf.generation.compilation import KEPT, CompiledRounds, Shapes
from specblock_hf.generation.rounds.fingerprint import fingerprint
from specblock_hf.generation.rounds.graphs import PATIENCE
from specblock_hf.generation.rounds.lending import Request


GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def pretended(monkeypatch):
    monkeypatch.setattr(compilation, "recorder_for", lambda device: PretendedGraphs)
    # transformers 5.24 asks for a peft that is not out yet, and calls the newest one as it did before.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")


def following(target: PreTrainedModel) -> TreeDrafter:
    """A drafter as its first call on CUDA leaves it."""
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(12, 2, 4)
    drafter.compiled_rounds = CompiledRounds(target.device)
    return drafter


def check(target: PreTrainedModel, drafter: TreeDrafter, inputs: dict, **options):
    """The call's figures, after its text was compared with plain decoding's."""
    options = GREEDY | options
    plain = target.generate(**inputs, **options | {"cache_implementation": None})
    assert target.generate(**inputs, **options, assistant_model=drafter).tolist() == plain.tolist()
    return drafter.last_statistics


def one(length: int = 9, seed: int = 0) -> dict[str, torch.LongTensor]:
    ids = prompt_of(length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_static_cache_asks_for_captured_rounds(llama):
    drafter = following(llama)
    figures = check(llama, drafter, one(), max_new_tokens=30, cache_implementation="static")
    assert figures.compiled_rounds == figures.rounds and figures.eager_because is None
    # A step is captured in the use after those that it waits for.
    assert figures.captured_drafts == figures.rounds - PATIENCE - 2
    assert 0 < figures.captured_rounds <= figures.rounds - PATIENCE - 1
    figures = check(llama, drafter, one(14, 1), max_new_tokens=30, cache_implementation="static")
    assert figures.captured_drafts == figures.rounds - 1 and figures.captured_rounds >= figures.rounds - 1


def test_drafts_are_captured_whatever_the_cache_is(llama):
    drafter = following(llama)
    for options in ({}, {"return_dict_in_generate": False}, {"prefill_chunk_size": 4}):
        figures = check(llama, drafter, one(), max_new_tokens=24, **options)
        assert figures.compiled_rounds == 0 and figures.eager_because is None
    assert figures.captured_drafts == figures.rounds - 1
    output = llama.generate(
        **one(), **GREEDY, max_new_tokens=24, return_dict_in_generate=True, assistant_model=drafter
    )
    assert output.sequences.tolist() == llama.generate(**one(), **GREEDY, max_new_tokens=24).tolist()
    assert drafter.last_statistics.captured_drafts


def test_buffers_follow_the_calls(llama, monkeypatch):
    monkeypatch.setattr(compilation, "STEP", 16)
    drafter = following(llama)
    lengths = [(6, 8), (9, 30), (4, 8), (30, 2), (5, 40)]
    for cache in ("static", None):
        for prompt, new in lengths:
            check(llama, drafter, one(prompt, new), max_new_tokens=new, cache_implementation=cache)
        for rows in ((5, 2, 9), (7, 7), (4,)):
            check(llama, drafter, padded_batch(rows), max_new_tokens=16, cache_implementation=cache, eos_token_id=5)
    assert [kept.max_length for kept in drafter.compiled_rounds._drafts] == [32, 32]
    drafter.drafting_plan = DraftingPlan(4, 1)
    assert check(llama, drafter, one(), max_new_tokens=20).captured_drafts


def test_what_takes_turns_is_captured_once(llama, monkeypatch):
    made = []

    monkeypatch.setattr(compilation, "recorder_for", recorders(made))
    drafter = following(llama)
    joined = JoinedDrafter(drafter, LookupDrafter(llama.config))

    def turns(*calls) -> list[int]:
        """What had been captured after each of them."""
        counts = []
        for helper, plan in calls:
            drafter.drafting_plan = plan
            check(llama, helper, one(), max_new_tokens=30)
            counts.append(sum(graphs.captured for graphs in made))
        return counts

    plan, smaller = DraftingPlan(12, 2, 4), DraftingPlan(12, 1)
    assert turns(*[(drafter, plan), (joined, plan)] * 3) == [1, 2, 2, 2, 2, 2]
    assert turns(*[(drafter, plan), (drafter, smaller)] * 2) == [2, 3, 3, 3]
    # Of three the one that was used longest ago goes.
    assert turns((joined, plan), (drafter, smaller), (drafter, plan)) == [4, 4, 5]
    assert len(drafter.compiled_rounds._drafts) == KEPT


def test_a_static_cache_of_the_users_own_stays_eager(llama):
    drafter = following(llama)
    figures = check(llama, drafter, one(), max_new_tokens=20, cache_implementation="static")
    assert figures.compiled_rounds
    output = llama.generate(
        **one(),
        **GREEDY,
        max_new_tokens=20,
        cache_implementation="static",
        return_dict_in_generate=True,
        assistant_model=drafter,
    )
    assert output.sequences.tolist() == llama.generate(**one(), **GREEDY, max_new_tokens=20).tolist()
    figures = drafter.last_statistics
    assert not figures.compiled_rounds and figures.eager_because == "the call's cache is somebody else's or handed out"


def test_targets_that_slide_say_so_once_and_run_eagerly(caplog):
    target = tiny_target("mistral")
    drafter = following(target)
    figures = check(target, drafter, one(), max_new_tokens=20)
    assert figures.eager_because is None and figures.captured_drafts


def lora_target() -> PreTrainedModel:
    target = copy.deepcopy(tiny_target("llama"))
    for name in ("first", "second"):
        torch.manual_seed(len(name))
        target.add_adapter(
            LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["q_proj", "v_proj"]), name
        )
    return target.eval()


def layers_of(target: PreTrainedModel) -> list:
    return [part for part in target.modules() if hasattr(part, "scaling") and isinstance(part.scaling, dict)]


CHANGES = {
    "another adapter": lambda target: target.set_adapter("first"),
    "disabled": lambda target: target.disable_adapters(),
    "scaling": lambda target: [part.scaling.update(second=part.scaling["second"] / 3) for part in layers_of(target)],
    "merged": lambda target: [part.merge() for part in layers_of(target)],
    "moved weights": lambda target: setattr(
        target.lm_head, "weight", torch.nn.Parameter(target.lm_head.weight * 1.5 + 0.1)
    ),
    "attention": lambda target: target.set_attn_implementation("eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_without_a_pointer_is_noticed(change):
    target = lora_target()
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(8, 1)
    compile_rounds(target, drafter, max_length=40)
    before = [check(target, drafter, one(), max_new_tokens=24) for _ in range(2)]
    assert before[1].captured_rounds == before[1].rounds
    made = drafter.compiled_rounds._target
    CHANGES[change](target)
    after = [check(target, drafter, one(), max_new_tokens=24) for _ in range(2)]
    assert after[1].captured_rounds == after[1].rounds
    assert drafter.compiled_rounds._target is not made


def test_new_values_of_weights_need_no_new_graphs():
    target = copy.deepcopy(tiny_target("llama"))
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(8, 1)
    compile_rounds(target, drafter, max_length=40)
    check(target, drafter, one(), max_new_tokens=24)
    rounds = drafter.compiled_rounds
    made = rounds._target, *rounds._drafts, fingerprint(target, drafter)
    with torch.no_grad():
        for weight in (*target.parameters(), *drafter.parameters()):
            weight.mul_(1.1)
    figures = check(target, drafter, one(), max_new_tokens=24)
    assert figures.captured_rounds == figures.rounds
    assert made == (rounds._target, *rounds._drafts, fingerprint(target, drafter))


def test_hooks_of_others_are_called(caplog):
    target = copy.deepcopy(tiny_target("llama"))
    drafter = following(target)
    check(target, drafter, one(), max_new_tokens=24, cache_implementation="static")
    calls = []
    target.model.layers[1].register_forward_hook(lambda part, args, output: calls.append(1))
    figures = check(target, drafter, one(), max_new_tokens=24, cache_implementation="static")
    assert "LlamaForCausalLM has forward hooks" in figures.eager_because and not figures.compiled_rounds
    assert len(calls) >= figures.target_calls + 24


def test_weights_that_are_kept_elsewhere_are_fetched():
    target = cpu_offload(copy.deepcopy(tiny_target("llama")), execution_device="cpu")
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(12, 2, 4)
    drafter.compiled_rounds = CompiledRounds(torch.device("cpu"))
    figures = check(target, drafter, one(), max_new_tokens=24)
    assert "weights of Embedding are kept elsewhere between forwards" in figures.eager_because
    assert not figures.captured_drafts


IDS = torch.ones(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "hindrance"),
    [
        ({"position_ids": IDS}, None),
        ({"position_ids": IDS, "token_type_ids": IDS}, "the target is told a type of every token"),
        ({"position_ids": IDS.expand(3, -1, -1)}, "a token's position is not one number that generate() prepares"),
        ({}, "a token's position is not one number that generate() prepares"),
    ],
)
def test_what_a_tree_must_be_told_beside_itself_stays_eager(inputs, hindrance, llama):
    request = Request.of_call(llama, tiny_drafter(), DraftingPlan(4, 1), IDS, {CACHE: None} | inputs, 8, False)
    assert (request.hindrance, request.length, request.batch_size) == (hindrance, 12, 2)
    rounds = CompiledRounds(llama.device, Shapes(llama, 2, 20))
    with rounds.lend(request) as lent:
        assert (lent.target is None, lent.reason) == (hindrance is not None, hindrance) and lent.drafts


class Unwilling(PretendedGraphs):
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_captured_goes_on_eagerly(llama, monkeypatch):
    monkeypatch.setattr(compilation, "recorder_for", lambda device: Unwilling)
    drafter = following(llama)
    figures = check(llama, drafter, one(), max_new_tokens=40, cache_implementation="static")
    assert figures.compiled_rounds == figures.rounds > PATIENCE and not figures.captured_rounds
    figures = check(llama, drafter, one(), max_new_tokens=40, cache_implementation="static")
    assert not figures.compiled_rounds
    assert figures.eager_because == ("a round could not be captured: operation not permitted when stream is capturing")


class Bomb(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= self.length:
            raise KeyError("bomb")
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_a_call_that_fails_leaves_nothing_behind(llama):
    drafter = following(llama)
    check(llama, drafter, one(), max_new_tokens=24, cache_implementation="static")
    for length in (10, 17, 25):
        with pytest.raises(KeyError, match="bomb"):
            llama.generate(
                **one(),
                **GREEDY,
                max_new_tokens=24,
                cache_implementation="static",
                assistant_model=drafter,
                stopping_criteria=StoppingCriteriaList([Bomb(length)]),
            )
        figures = check(llama, drafter, one(11, length), max_new_tokens=24, cache_implementation="static")
        assert figures.compiled_rounds == figures.rounds and figures.captured_drafts


def test_captures_rounds_can_be_switched_off(llama):
    drafter = tiny_drafter()
    cuda = torch.device("cuda")
    assert compilation.rounds_of(drafter, torch.device("cpu")) is None
    made = compilation.rounds_of(drafter, cuda)
    assert made is not None and compilation.rounds_of(drafter, cuda) is made
    drafter.compiled_rounds, drafter.captures_rounds = None, False
    assert compilation.rounds_of(drafter, cuda) is None


def test_a_drafter_that_was_left_on_another_device_is_named(llama, caplog):
    rounds = following(llama).compiled_rounds
    network = torch.nn.Module()
    network.device, network.label = torch.device("meta"), "SpecBlockDrafter"
    drafter = SimpleNamespace(network=network, has_fixed_rounds=True, label="SpecBlockDrafter + LookupDrafter")
    request = SimpleNamespace(plan=DraftingPlan(12, 2, 4), drafter=drafter, target=llama, length=24)
    with caplog.at_level("WARNING", "specblock_hf"):
        assert rounds._why_no_drafts(request) == "drafter and target are on different devices"
    assert "the SpecBlockDrafter is on meta" in caplog.text and "put it there by .to(target.device)" in caplog.text

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Timing methods side by side: what is run in which order, what is counted, and what survives a crash."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from conftest import VOCAB, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter
from models_for_tests import tiny_drafter, tiny_tokenizer

from specblock_hf import DraftingPlan, GenerationStatistics, LookupDrafter
from specblock_hf.data.suites import EvaluationPrompt
from specblock_hf.drafters.common import block
from specblock_hf.evaluation import benchmark
from specblock_hf.evaluation.benchmark import (
    Benchmark,
    ResultFolder,
    Run,
    Unit,
    answer,
    answer_row,
    decoding_settings,
    evenly,
    median_seconds,
)
from specblock_hf.evaluation.methods import Method


GREEDY = decoding_settings(0, 20)
PLAIN = Method("vanilla", "plain")
OWN_LOOKUP = Method("prompt_lookup", "transformers", {"prompt_lookup_num_tokens": 4})


def method(name, drafter, plan=None) -> Method:
    drafter.drafting_plan = plan
    return Method(name, name, {"assistant_model": drafter}, drafter)


def methods() -> list[Method]:
    plan = DraftingPlan(6, 2, 3)
    drafters = {"specblock": tiny_drafter(), "eagle3": tiny_drafter("eagle3")}
    lookup = method("lookup", LookupDrafter(tiny_target("llama").config))
    return [PLAIN, OWN_LOOKUP, lookup, *(method(name, drafter, plan) for name, drafter in drafters.items())]


def unit(text="abc", *later, temperature=0.0, name="1") -> Unit:
    return Unit(EvaluationPrompt("mine", name, text, (text, *later), later), temperature)


def ids_of(text: str) -> torch.LongTensor:
    return torch.tensor([tiny_tokenizer()(text)["input_ids"]])


def greedy(text: str) -> list[int]:
    prompt = ids_of(text)
    mask = torch.ones_like(prompt)
    return tiny_target("llama").generate(prompt, attention_mask=mask, **GREEDY)[0, prompt.shape[1] :].tolist()


def test_every_method_answers_every_turn_with_the_same_text(llama):
    chosen = methods()
    rows = Benchmark(llama, tiny_tokenizer(), chosen, 20, repeats=2).run(unit("hello", "again"))
    places = [(row["turn"], row["method"]) for row in rows]
    assert places == [(turn, one.name) for turn in (0, 1) for one in chosen]
    assert all(row["tokens"] == 20 and len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    assert all(row["identical"] for row in rows if row["method"] != "vanilla")
    assert all("identical" not in row for row in rows if row["method"] == "vanilla")
    for row in rows:
        if row["method"] in ("lookup", "specblock", "eagle3"):
            assert sum(row["accepted"]) + row["rounds"] == 19 and len(row["cut"]) == row["rounds"]
    json.dumps(rows)


def test_a_later_turn_follows_the_plain_answer(llama):
    tokenizer = tiny_tokenizer()
    rows = Benchmark(llama, tokenizer, methods(), 20).run(unit("hello", "again"))
    told = ids_of("hello\n\n" + tokenizer.decode(greedy("hello")) + "\n\nagain")
    assert {row["prompt_tokens"] for row in rows} == {5, told.shape[1]}
    # Its answer, made by hand.
    again = llama.generate(told, attention_mask=torch.ones_like(told), **GREEDY)[0, told.shape[1] :].tolist()
    runs = Benchmark(llama, tokenizer, [PLAIN], 20)
    encoded = runs._encode(["hello", "again"], [tokenizer.decode(greedy("hello"))])
    assert torch.equal(encoded, told)
    assert answer(llama, encoded, PLAIN, GREEDY, 0).ids == again


def test_sampled_answers_of_tree_drafters_are_plain_ones_of_the_same_seed(llama):
    chosen = methods()
    before = torch.random.get_rng_state()
    rows = Benchmark(llama, tiny_tokenizer(), chosen, 20, seed=11).run(unit(temperature=1.0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [row.get("identical") for row in rows] == [None, None, True, True, True]
    first, other = (answer(llama, ids_of("abc"), PLAIN, decoding_settings(1.0, 20), seed).ids for seed in (11, 12))
    assert first != other and first != greedy("abc")


def test_sampling_cuts_nothing_off_the_distribution():
    assert decoding_settings(0, 5) == {"do_sample": False, "max_new_tokens": 5}
    sampled = {"do_sample": True, "max_new_tokens": 5, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    assert decoding_settings(0.7, 5) == sampled


def recorded(monkeypatch, replies=None):
    """Let `answer` note who is called, and give wrong ids where told to."""
    calls, real = [], benchmark.answer

    def noting(target, prompt_ids, method, settings, seed):
        calls.append((method.name, settings["max_new_tokens"]))
        run = real(target, prompt_ids, method, settings, seed)
        return Run((replies or {}).get(method.name, run.ids), run.seconds, run.statistics, run.draft_rows)

    monkeypatch.setattr(benchmark, "answer", noting)
    return calls


def test_the_order_rotates_from_unit_to_unit_turn_to_turn_and_repeat_to_repeat(llama, monkeypatch):
    calls = recorded(monkeypatch)
    bench = Benchmark(
        llama, tiny_tokenizer(), [PLAIN, OWN_LOOKUP, method("garbage", GarbageDrafter(VOCAB))], 4, repeats=2
    )
    for number in (0, 1):
        bench.run(unit("ab", "c"), number)
    first = [name for name, _ in calls][::3]
    assert first == ["vanilla", "prompt_lookup", "prompt_lookup", "garbage"] + [
        "prompt_lookup",
        "garbage",
        "garbage",
        "vanilla",
    ]
    assert all(len({name for name, _ in calls[i : i + 3]}) == 3 for i in range(0, len(calls), 3))


def test_warming_up_is_short_and_covers_every_method_and_temperature(llama, monkeypatch):
    calls = recorded(monkeypatch)
    units = [unit(temperature=t, name=name) for name in "xy" for t in (0.0, 1.0)]
    Benchmark(llama, tiny_tokenizer(), [PLAIN, OWN_LOOKUP], 400).warm_up(units)
    assert sorted(calls) == [("prompt_lookup", 16)] * 2 + [("vanilla", 16)] * 2


def test_a_divergence_has_its_place_and_plain_decodings_margin(llama, monkeypatch):
    right = greedy("abc")
    wrong = {"lookup": [*right[:6], (right[6] + 1) % VOCAB, *right[7:]], "specblock": right[:3], "eagle3": [*right, 1]}
    recorded(monkeypatch, wrong)
    rows = {row["method"]: row for row in Benchmark(llama, tiny_tokenizer(), methods(), 20).run(unit())}
    out = llama.generate(
        ids_of("abc"), attention_mask=torch.ones(1, 3), output_scores=True, return_dict_in_generate=True, **GREEDY
    )
    margins = [float((s := scores[0].topk(2).values)[0] - s[1]) for scores in out.scores]
    assert [rows[name]["identical"] for name in ("lookup", "specblock", "eagle3")] == [False] * 3
    assert [rows[name]["differs_at"] for name in ("lookup", "specblock", "eagle3")] == [6, 3, 20]
    assert rows["lookup"]["margin"] == pytest.approx(margins[6])
    assert rows["specblock"]["margin"] == pytest.approx(margins[3])
    assert rows["eagle3"]["margin"] is None and rows["prompt_lookup"]["identical"]


@pytest.mark.parametrize(("kind", "slots"), [("specblock", 4), ("eagle3", 1)])
def test_draft_rows_are_the_pairs_of_each_round_after_the_first(llama, kind, slots):
    drafter = tiny_drafter(kind)
    run = answer(
        llama, ids_of("a long prompt that counts in no round"), method(kind, drafter, DraftingPlan(4, 1)), GREEDY, 0
    )
    accepted = run.statistics.accepted
    # Every round after the first reads what the one before emitted; the last one may have no draft and reads nothing.
    read = [slots * (kept + 1) for kept in accepted[:-1]]
    if run.statistics.drafter_calls < run.statistics.rounds:
        read = read[:-1]
    assert run.draft_rows == sum(read) / (len(accepted) - 1)
    assert not drafter.callbacks and not drafter._forward_hooks


@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
def test_a_prompt_that_is_read_in_pieces_counts_in_no_round_either(llama, kind, monkeypatch):
    def draft_rows() -> float | None:
        prompt, plan = ids_of("a long prompt that counts in no round"), DraftingPlan(4, 1)
        return answer(llama, prompt, method(kind, tiny_drafter(kind), plan), GREEDY, 0).draft_rows

    whole = draft_rows()
    monkeypatch.setattr(block, "PREFILL_PAIRS", 8)
    assert draft_rows() == whole > 0


def test_starts_of_a_second_forward_are_rows(llama):
    drafter = tiny_drafter()
    with_starts, without = (
        answer(llama, ids_of("abc"), method("specblock", drafter, DraftingPlan(0, 1)), GREEDY, 0).draft_rows,
        answer(llama, ids_of("abc"), method("specblock", drafter, DraftingPlan(8, 2, 3)), GREEDY, 0).draft_rows,
    )
    assert with_starts is None and without > 4 * 3


def test_forwards_of_transformers_own_helpers_are_counted(llama):
    # The copy drafts what the target will say and runs about once a token itself, which does not count.
    perfect = Method("a", "transformers", {"assistant_model": copy.deepcopy(llama)})
    assisted = answer(llama, ids_of("abc"), perfect, GREEDY, 0)
    assert assisted.ids == greedy("abc") and assisted.statistics is None
    assert 1 <= assisted.target_calls < 20
    looked_up = answer(llama, ids_of("abc"), OWN_LOOKUP, GREEDY, 0)
    assert math.ceil(20 / 5) <= looked_up.target_calls <= 20
    assert answer(llama, ids_of("abc"), PLAIN, GREEDY, 0).target_calls is None and not llama._forward_pre_hooks


def test_the_run_with_the_median_time_speaks_for_all():
    runs = [
        Run([1, 2], seconds, GenerationStatistics(rounds=rounds)) for seconds, rounds in ((3.0, 7), (1.0, 8), (2.0, 9))
    ]
    row = answer_row(runs)
    assert row["seconds"] == [3.0, 1.0, 2.0] and row["rounds"] == 9 and median_seconds(row) == 2.0
    even = answer_row(runs[:2])
    assert even["rounds"] == 8 and median_seconds(even) == 1.0


def test_prompts_are_spaced_evenly():
    assert evenly(list(range(10)), 3) == [0, 3, 6] and evenly([1, 2], 5) == evenly([1, 2], None) == [1, 2]


def rows_for(one: Unit) -> list[dict]:
    suite, name, temperature = one.key
    place = {"suite": suite, "prompt": name, "temperature": temperature}
    return [place | {"turn": turn, "method": who} for turn in range(len(one.turns)) for who in ("vanilla", "lookup")]


def test_what_was_measured_is_read_back_and_a_torn_unit_is_taken_out(tmp_path):
    units = [unit("a", "b"), unit("c", name="2"), unit("c", name="2", temperature=1.0)]
    folder = ResultFolder(tmp_path / "new")
    assert folder.open({}, lambda known: ()) == folder.open({}, lambda known: ()) == {"conditions": {}, "plans": {}}
    assert folder.rows(units, 2) == []
    for one in units:
        folder.append(rows_for(one))
    assert folder.rows(units, 2) == [row for one in units for row in rows_for(one)]
    whole = folder.answers.read_text()
    for cut, left in ((1, 2), (60, 2), (len(whole) // 2, 1)):  # bytes lost at the end, units left
        folder.answers.write_text(whole[:-cut])
        kept = folder.rows(units, 2)
        if cut == 1:  # only the line's end is missing
            assert kept == [row for one in units for row in rows_for(one)]
            continue
        assert kept == [row for one in units[:left] for row in rows_for(one)]
        folder.append(rows_for(units[left]))
        assert folder.rows(units, 2) == kept + rows_for(units[left])


def test_a_folder_goes_on_only_under_the_same_conditions(tmp_path):
    folder = ResultFolder(tmp_path)
    conditions = {"dtype": "float32", "limits": (1, 2)}
    made = folder.open(conditions, lambda known: [("lookup", {"plan": [8, 1, None]})])
    again = folder.open(conditions, lambda known: () if "lookup" in known else pytest.fail("planned twice"))
    assert again == made | {"conditions": {"dtype": "float32", "limits": [1, 2]}}
    with pytest.raises(ValueError, match="with dtype = 'float32' and this one has 'bfloat16'; give another --output"):
        folder.open({"dtype": "bfloat16", "limits": (1, 2)}, lambda known: ())
    with pytest.raises(ValueError, match="with limits = \\[1, 2\\] and this one has None"):
        folder.open({"dtype": "float32"}, lambda known: ())


def test_a_plan_is_kept_before_the_next_one_is_made(tmp_path):
    def interrupted(known):
        yield "first", {"plan": [8, 1, None]}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ResultFolder(tmp_path).open({}, interrupted)
    setting = ResultFolder(tmp_path).open({}, lambda known: [(f"not {name}", {}) for name in known])
    assert setting["plans"] == {"first": {"plan": [8, 1, None]}, "not first": {}}


def test_an_oracle_needs_few_rounds(llama):
    text = ids_of("abc")[0].tolist() + greedy("abc")
    oracle = method("oracle", OracleDrafter(VOCAB, text, plan=lambda number: 4))
    (_, row) = Benchmark(llama, tiny_tokenizer(), [PLAIN, oracle], 20).run(unit())
    assert row["identical"] and row["rounds"] == 4 and row["accepted"] == [4, 4, 4, 3] and row["draft_rows"] is None

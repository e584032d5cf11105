# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Random calls, compared with plain decoding; `benchmarks/fuzz_generate.py` runs as many as one likes."""

from __future__ import annotations

import pytest
from calls_for_tests import judge
from cases_for_tests import Case, DrafterKind
from draws_for_tests import draw_case
from targets_for_tests import TargetKind
from verdicts_for_tests import FAULTS, is_refusal

from specblock_hf import DraftingPlan
from specblock_hf.drafting import pilot
from specblock_hf.generation import loop as generation
from specblock_hf.generation.token_selector import TokenChoice


CALLS, GROUP = 200, 20
USUAL = Case(
    seed=1,
    target=TargetKind(),
    lengths=(5,),
    source="ids",
    ids="int64",
    mask="int64",
    positions=0,
    turns=2,
    more=2,
    between="",
    cache="dynamic",
    options={"max_new_tokens": 10, "do_sample": False, "eos_token_id": None},
    returns=(),
    entry="hook",
    drafter=DrafterKind("oracle", depths=[[3, 0, 1]]),
    plan=None,
    abort=None,
)


@pytest.mark.parametrize("first", range(0, CALLS, GROUP))
def test_a_call_writes_what_plain_decoding_writes_or_is_refused(first):
    outcomes = set()
    for seed in range(first, first + GROUP):
        verdict = judge(draw_case(seed))
        assert verdict.outcome not in FAULTS, f"seed {seed}: {verdict.outcome}, {verdict.detail}"
        outcomes.add(verdict.outcome)
    assert "same" in outcomes


def test_a_case_is_a_function_of_its_seed():
    assert draw_case(7) == draw_case(7) != draw_case(8)


def test_a_drafter_that_knows_the_text_is_followed():
    first, again = judge(USUAL), judge(USUAL)
    assert first.outcome == "same" and first.kept == again.kept > 6


def other_token(original):
    return lambda self, row, node: (original(self, row, node) + 1) % 24


def forgotten_hook(original):
    def decode(target, *args):
        target.target.register_forward_hook(lambda *_: None)
        return original(target, *args)

    return decode


def failing(original):
    def round_limits(*args):
        raise KeyError("limits")

    return round_limits


def refusing(original):
    return lambda *args: refuse()


def refusing_late(original):
    return lambda *args: (original(*args), refuse())


def refuse():
    DraftingPlan(tree_budget=-1, num_forwards=1)


@pytest.mark.parametrize(
    ("holder", "name", "broken", "outcome"),
    [
        (TokenChoice, "select", other_token, "mismatch"),
        (generation, "decode", forgotten_hook, "touched target"),
        (pilot, "round_limits", failing, "raw error"),
        (generation, "decode", refusing, "needless refusal"),
        (generation, "decode", refusing_late, "late refusal"),
    ],
)
def test_a_broken_promise_is_noticed(monkeypatch, holder, name, broken, outcome):
    monkeypatch.setattr(holder, name, broken(getattr(holder, name)))
    assert judge(USUAL).outcome == outcome


def test_only_a_sentence_of_the_package_is_a_refusal():
    def refuse_here():
        raise ValueError("this is a sentence with an end; but it is somebody else's.")

    def raised(call) -> ValueError:
        with pytest.raises(ValueError) as error:
            call()
        return error.value

    assert is_refusal(raised(refuse))
    assert not is_refusal(raised(refuse_here))

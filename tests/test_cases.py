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

import torch
from baselines_for_tests import baseline
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import ToldDrafter, make_tree
from families_for_tests import FAMILIES, target_of
from training_for_tests import tiny_drafter
from transfers_for_tests import TwoDevices

from specblock_hf import (
    DraftingPlan,
    JoinedDrafter,
    LookupDrafter,
    SpecBlockConfig,
    SpecBlockDrafter,
)
from specblock_hf.checkpoints import provenance
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

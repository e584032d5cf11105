# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A drafter on another device than its target. Two devices of any machine are made of fake tensors, which have a shape, a
dtype and a device and nothing in them: torch refuses to compute with two of them that lie apart, as it does with real
ones. No other test runs on two devices unless the machine has them.
"""

from __future__ import annotations

import pytest
import torch
from baselines_for_tests import BASELINES, baseline, read_by
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from torch._subclasses.fake_tensor import FakeTensorMode
from training_for_tests import Told, tiny_drafter

from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LookupDrafter
from specblock_hf.drafting.drafter import DraftState
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits
from specblock_hf.trees.tree import DraftTree


HERE, THERE = torch.device("cpu"), torch.device("cpu:1")
LIMITS = Limits((8,), (8,), num_forwards=2)


class Guesses(LookupDrafter):
    """Finds something whatever it is told, where it is told."""

    def begin(self, table, batch_size, max_length, *, first_position=0):
        return DraftState(table, batch_size, max_length, first_position)

    def extend(self, state, pairs):
        """It remembers nothing."""

    def propose(self, state, pairs, limits):
        root = DraftTree.root(pairs.tokens[:, -1])
        return DraftTree(*(torch.cat((part, part), dim=1) for part in vars(root).values() if torch.is_tensor(part)))


def drafter_called(name: str):
    if name == "joined":
        return JoinedDrafter(tiny_drafter(), Guesses(tiny_target("llama").config))
    own = {"specblock": tiny_drafter, "dflash": block_drafter, "dspark": lambda: block_drafter("dspark")}
    if name == "eagle3-own-embedding":
        return baseline("eagle3", own_embedding=True)
    return own[name]() if name in own else baseline(name)


def fake(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def move(module: torch.nn.Module, device: torch.device) -> None:
    """As `module.to(device)`, of weights that are not fake yet."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(fake(weight, device), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, fake(buffer, device))


@pytest.mark.parametrize("name", ["specblock", *BASELINES, "eagle3-own-embedding", "dflash", "dspark", "joined"])
def test_what_is_told_on_one_device_is_drafted_on_another(name, monkeypatch):
    drafter, told = drafter_called(name), Told(1, 24).pairs([0], [9])
    made = torch.tensor
    # Which forgets this device's number.
    monkeypatch.setattr(torch, "tensor", lambda *args, device=None, **kw: made(*args, **kw).to(device or HERE))
    with FakeTensorMode(), torch.no_grad():
        move(drafter.network, THERE)
        table = TokenTable(torch.nn.Embedding(32, 32, device=HERE), torch.nn.Linear(32, 32, device=HERE), 32)
        features = read_by(drafter, [fake(feature, HERE) for feature in told.features])
        parts = [fake(part, HERE) for part in (told.tokens, told.positions, told.lengths)]
        pairs = Pairs(parts[0], features, parts[1], parts[2], table)
        state = drafter.begin(table, 1, 40)
        drafter.extend(state, pairs)
        tree = drafter.propose(state, pairs, LIMITS)
        assert tree.tokens.shape[1] > 1
        assert {part.device for part in (tree.tokens, tree.parents, tree.log_probs, tree.origin)} == {THERE}
        tree = tree.to(HERE)
        assert {part.device for part in (tree.tokens, tree.parents, tree.log_probs, tree.origin)} == {HERE}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize(("target_on", "drafter_on"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_the_text_is_plain_decodings_wherever_the_drafter_is(target_on, drafter_on):
    target, drafter = tiny_target("llama"), tiny_drafter().to(drafter_on)
    target.to(target_on)
    try:
        ids = torch.cat((prompt_of(9), prompt_of(9, 1))).to(target_on)
        options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": 5, "pad_token_id": 0}
        expected = target.generate(ids, **options)
        for assistant in (drafter, JoinedDrafter(drafter, LookupDrafter(target.config))):
            assert torch.equal(target.generate(ids, **options, assistant_model=assistant), expected)
    finally:
        target.to("cpu")

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A greedy round waits for the device once, however it drafts."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from baselines_for_tests import baseline
from batches_for_tests import padded_batch
from block_drafters_for_tests import block_drafter
from conftest import tiny_target
from training_for_tests import tiny_drafter
from transfers_for_tests import DEVICE, HOST, Transfer, TwoDevices

from specblock_hf import DraftingCallback, DraftingPlan
from specblock_hf.devices import on_device, upload
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import LookupDrafter
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.statistics import Clock
from specblock_hf.generation import loop as generation


def joined() -> JoinedDrafter:
    return JoinedDrafter(tiny_drafter(), LookupDrafter(tiny_target("llama").config))


DRAFTERS = {
    "rank-guided": tiny_drafter,
    "best-first": partial(tiny_drafter, expansion="best_first"),
    **{name: partial(baseline, name) for name in ("eagle3", "medusa", "parallelspec", "falcon_drafter")},
    "dflash": block_drafter,
    "joined": joined,
}
ALONE, TOGETHER = (9,), (4, 12, 7)
CASES = [(name, lengths) for lengths in (ALONE, TOGETHER) for name in DRAFTERS]
PLAN = DraftingPlan(12, 2, 4)
OPTIONS = {"do_sample": False, "max_new_tokens": 22, "pad_token_id": 0}
STEADY = 7


class Rounds(DraftingCallback):
    """Splits what is moved into rounds."""

    def __init__(self, devices: TwoDevices):
        self.devices = devices
        self.ends: list[int] = []
        self.kept: list[list[list[int]]] = []

    def on_commit(self, call, tree, scored, walk, pairs):
        self.ends.append(len(self.devices.transfers))
        self.kept.append([row[:count] for row, count in zip(walk.nodes.tolist(), walk.lengths.tolist(), strict=True)])

    def steady(self) -> list[list[Transfer]]:
        """Of the rounds after the first, which reads the prompt, and before the last, in which rows may draft less."""
        rounds = zip(self.ends[1:], self.ends[2:], strict=False)
        return [self.devices.transfers[first:last] for first, last in rounds][:STEADY]


def rounds_of(drafter: TreeDrafter, plan: DraftingPlan, lengths: tuple[int, ...], **options: int) -> Rounds:
    """Generate the target's own text, noting what is moved."""
    target, batch, rounds = tiny_target("llama"), padded_batch(lengths), Rounds(TwoDevices())
    plain = target.generate(**batch, **OPTIONS, **options)
    drafter.drafting_plan, drafter.captures_rounds = plan, False
    drafter.add_callback(rounds)
    with pytest.MonkeyPatch.context() as patch, rounds.devices:
        # Events on a stream need the real device.
        patch.setattr(generation, "Clock", lambda device: Clock(HOST))
        text = target.generate(**batch, **OPTIONS, **options, assistant_model=drafter)
    assert text.tolist() == plain.tolist()
    return rounds


@cache
def usual_rounds(name: str, lengths: tuple[int, ...]) -> Rounds:
    return rounds_of(DRAFTERS[name](), PLAN, lengths)


def kinds(transfers: list[Transfer]) -> dict[str, int]:
    names = [transfer.kind for transfer in transfers]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize(("name", "lengths"), CASES, ids=lambda value: value if isinstance(value, str) else len(value))
def test_a_round_waits_once(name, lengths):
    steady = usual_rounds(name, lengths).steady()
    assert len(steady) == STEADY
    for transfers in steady:
        waits = [transfer for transfer in transfers if transfer.kind != "quiet upload"]
        assert [(wait.kind, wait.line.split(":")[0]) for wait in waits] == [("download", "token_selector.py")]


# The walk for the drafter's pairs and again for the target; where rows may differ in length, the committed columns of
# the drafter's cache, before its first forward and for its starts; a tree that the host has found; a tree's fixed
# shape.
QUIET = {
    ("rank-guided", ALONE): 2,
    ("best-first", ALONE): 2,
    ("eagle3", ALONE): 2,
    ("medusa", ALONE): 2,
    ("dflash", ALONE): 2,
    ("falcon_drafter", ALONE): 6,
    ("joined", ALONE): 4,
    ("rank-guided", TOGETHER): 4,
    ("medusa", TOGETHER): 2,
    ("dflash", TOGETHER): 4,
    ("joined", TOGETHER): 6,
}


@pytest.mark.parametrize(("name", "lengths"), QUIET, ids=lambda value: value if isinstance(value, str) else len(value))
def test_little_is_moved_to_the_device(name, lengths):
    rounds, straight = usual_rounds(name, lengths), 0
    for transfers, kept in zip(rounds.steady(), rounds.kept[2:], strict=False):
        # Columns of the target's cache that are to be moved have to be named.
        moves = len({len(nodes) for nodes in kept}) > 1 or any(nodes != list(range(len(nodes))) for nodes in kept)
        straight += not moves
        assert kinds(transfers)["quiet upload"] == QUIET[name, lengths] + moves
    assert straight


@pytest.mark.parametrize(
    ("plan", "waits"),
    [
        # How wide a tree or a forward gets is read from the device where it depends on probabilities.
        (DraftingPlan(12, 2, 4, min_probability=1e-3), 2),
        (DraftingPlan(12, 2, 4, min_probability=1e-3, min_start_probability=1e-3), 3),
    ],
)
@pytest.mark.parametrize("lengths", [ALONE, TOGETHER], ids=len)
def test_what_a_plan_with_probabilities_waits_for(plan, waits, lengths):
    for transfers in rounds_of(tiny_drafter(), plan, lengths).steady():
        assert kinds(transfers)["download"] == waits and "upload" not in kinds(transfers)


def test_rows_that_have_stopped_bring_no_waiting():
    rounds = rounds_of(joined(), PLAN, (7, 3, 12, 1), eos_token_id=5)
    emitting = [sum(map(bool, kept)) for kept in rounds.kept[2:]]
    assert len(set(emitting)) > 2
    for transfers in rounds.steady():
        assert kinds(transfers)["download"] == 1 and "upload" not in kinds(transfers)


def device_tensor() -> torch.Tensor:
    return torch.arange(6, device=DEVICE).view(2, 3)


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda: device_tensor().tolist(), ["download"]),
        (lambda: int(device_tensor().max()), ["download"]),
        (lambda: bool(device_tensor().any()), ["download"]),
        (lambda: device_tensor().cpu().tolist(), ["download"]),
        (lambda: device_tensor().to(HOST).sum().item(), ["download"]),
        (lambda: device_tensor().nonzero(), ["download"]),
        (lambda: device_tensor()[device_tensor() > 2], ["download"]),
        (lambda: torch.where(device_tensor() > 2), ["download"]),
        (lambda: device_tensor().repeat_interleave(device_tensor()[0], dim=1), ["download"]),
        (lambda: device_tensor().repeat_interleave(2, dim=1), []),
        (lambda: device_tensor()[:, [0, 2]], ["upload"]),
        (lambda: device_tensor()[:, torch.tensor([0, 2])], ["upload"]),
        (lambda: torch.tensor([1], device=DEVICE), ["upload"]),
        (lambda: device_tensor().new_tensor([1]), ["upload"]),
        (lambda: torch.tensor([1]).to(DEVICE), ["upload"]),
        (lambda: upload(torch.tensor([1]), DEVICE), ["quiet upload"]),
        (lambda: on_device([1], DEVICE) + device_tensor(), ["quiet upload"]),
        # Its memory may be gone before it is read.
        (lambda: upload(torch.tensor([1]), torch.device("mps")), ["upload"]),
        (lambda: torch.tensor([1]).tolist(), []),
        (lambda: torch.where(device_tensor() > 2, device_tensor(), 0).gather(1, device_tensor()[:, :1] % 2), []),
    ],
)
def test_what_counts_as_moved(call, moved):
    with TwoDevices() as devices:
        call()
    assert [transfer.kind for transfer in devices.transfers] == moved


def test_nothing_is_computed_on_both_at_once():
    with TwoDevices(), pytest.raises(AssertionError, match="on host and device at once"):
        device_tensor() + torch.arange(3)

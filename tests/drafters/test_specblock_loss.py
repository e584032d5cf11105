# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The objective against one that loops over texts, positions, slots and blocks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from conftest import VOCAB
from training_for_tests import DRAFT_VOCAB, Told, logits_below, naive_states, tiny_drafter

from specblock_hf.drafters.specblock.loss import SpecBlockObjective, specblock_loss
from specblock_hf.drafting.target_batch import TargetBatch
from specblock_hf.training.cpu_attention import NAME as CHUNKED


ROWS, LENGTH, TOP = 3, 26, 5
LENGTHS, ANSWER_STARTS = (26, 19, 23), (4, 9, 2)


def lively_drafter(**overrides):
    """One that is right often, on texts that consist mostly of two tokens that it favours."""
    drafter = tiny_drafter(**overrides).train()
    with torch.no_grad():
        drafter.lm_head.weight[:2] *= 6
    return drafter


def favoured_text(drafter, seed: int = 0) -> Told:
    told = Told(ROWS, LENGTH, seed)
    generator = torch.Generator().manual_seed(seed + 100)
    favourites = drafter.draft_to_target[torch.randint(2, told.tokens.shape, generator=generator)]
    rare = torch.rand(told.tokens.shape, generator=generator) < 0.1
    told.tokens = torch.where(rare, told.tokens, favourites)
    return told


def batch_of(drafter, told: Told, seed: int = 0) -> TargetBatch:
    """Targets with five likely tokens each, some of them outside the draft vocabulary; mostly led by the text's."""
    generator = torch.Generator().manual_seed(seed)
    draft_ids = torch.full((VOCAB,), -1)
    draft_ids[drafter.draft_to_target] = torch.arange(DRAFT_VOCAB)
    order = torch.rand(ROWS, LENGTH, VOCAB, generator=generator)
    order.scatter_(2, told.tokens[..., None], 2.0)  # the text's token is the likeliest ...
    target_ids = order.topk(TOP).indices
    swap = torch.rand(ROWS, LENGTH, generator=generator) < 0.15  # ... but not in sampled places
    target_ids[swap] = target_ids[swap].roll(1, dims=-1)
    probs = torch.rand(ROWS, LENGTH, TOP, generator=generator).sort(-1, descending=True).values / TOP
    batch = told.batch(LENGTHS, ANSWER_STARTS)
    return replace(batch, top_ids=draft_ids[target_ids], top_probs=probs)


def naive_loss(drafter, told: Told, batch: TargetBatch, num_blocks: int, cuts: list[int], width: int = 1):
    """Draft loss, rank loss, and hits and counts `[blocks][slots]`, one position at a time."""
    size = drafter.config.block_size
    hits, counts, draft_sums, rank_sums = ([[0] * size for _ in range(num_blocks)] for _ in range(4))
    for row in range(ROWS):
        text = told.tokens[row].tolist()
        for pair in range(LENGTHS[row] - 1):
            path: list[tuple[int, int]] = []
            for block in range(num_blocks):
                place = pair + 2 + sum(cut for cut, _ in path)
                states = naive_states(drafter, told, row, pair, path)
                chain = True  # whether it is the greedy chain so far
                reached = None  # whether the chain is right up to the cut, that slot itself left out
                for slot in range(size):
                    at = place + slot
                    if at >= LENGTHS[row] or at < ANSWER_STARTS[row]:
                        break
                    if block < len(cuts) and slot + 1 == cuts[block]:
                        reached = at
                    ids, probs = batch.top_ids[row, at], batch.top_probs[row, at]
                    if ids[0] < 0:
                        break
                    normed = drafter.norm(states[slot])
                    logits = logits_below(drafter, states[slot], slot, text[at - 1])
                    target = torch.zeros(DRAFT_VOCAB)
                    for index, prob in zip(ids.tolist(), probs.tolist(), strict=True):
                        if index >= 0:
                            target[index] += prob
                    target /= target.sum()
                    draft_sums[block][slot] = draft_sums[block][slot] - (target * logits.log_softmax(-1)).sum()
                    place_in_order = logits.argsort(descending=True).tolist().index(int(ids[0])) + 1
                    label = next(b for b, most in enumerate((1, 4, 10, DRAFT_VOCAB)) if place_in_order <= most)
                    rank_logits = drafter.rank_logits(normed, logits.topk(drafter.config.rank_top_k).values)
                    rank_sums[block][slot] = rank_sums[block][slot] - rank_logits.log_softmax(-1)[label]
                    likeliest = drafter.draft_to_target[logits.argsort(descending=True)].tolist()
                    counts[block][slot] += chain
                    chain = chain and likeliest[0] == text[at]
                    hits[block][slot] += chain
                    if text[at] not in likeliest[:width]:
                        break
                if reached is None or reached + 1 >= LENGTHS[row] or reached + 1 < ANSWER_STARTS[row]:
                    break
                path.append((cuts[block], text[reached]))
    total = 0
    total_rank = 0
    for block in range(num_blocks):
        first = max(counts[block][0], 1)
        total = total + sum(0.8**slot * draft_sums[block][slot] for slot in range(size)) / first
        total_rank = total_rank + sum(rank_sums[block]) / first
    return total, total_rank, hits, counts


@pytest.mark.parametrize(
    ("num_blocks", "cuts", "block_size", "markov_rank", "width"),
    [
        *((1, [], 4, 0, 1), (2, [1], 4, 0, 1), (2, [4], 4, 0, 1), (3, [2, 1], 4, 0, 1), (3, [1, 3], 4, 0, 1)),
        *((3, [3, 3], 3, 0, 1), (2, [1], 1, 0, 1), (1, [], 4, 3, 1), (3, [2, 1], 4, 3, 1)),
        *((1, [], 4, 3, 2), (3, [2, 1], 4, 3, 2), (2, [3], 4, 0, 3)),
    ],
)
def test_loss_counts_and_gradients_equal_the_naive_ones(num_blocks, cuts, block_size, markov_rank, width):
    drafter = lively_drafter(block_size=block_size, markov_rank=markov_rank)
    told = favoured_text(drafter)
    batch = batch_of(drafter, told)
    objective = SpecBlockObjective(num_blocks, rank_weight=0.7, prefix_width=width)
    out = specblock_loss(drafter, batch, objective, cuts)
    draft, rank, hits, counts = naive_loss(drafter, told, batch, num_blocks, cuts, width)

    assert out["counted"].tolist() == counts and out["agreed"].tolist() == hits
    assert counts[0][0] > 40 and sum(counts[-1]) > 0 and hits[0][0] < counts[0][0]
    torch.testing.assert_close(out["draft_loss"], draft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["rank_loss"], rank, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out["loss"], draft + 0.7 * rank, rtol=1e-5, atol=1e-5)

    parameters = drafter.parameters_of("full")
    found = torch.autograd.grad(out["loss"], parameters, allow_unused=True)
    wanted = torch.autograd.grad(draft + 0.7 * rank, parameters, allow_unused=True)
    for (name, _), ours, naive in zip(drafter.named_parameters(), found, wanted, strict=True):
        scale = naive.abs().max()
        assert scale > 0, name
        assert (ours - naive).abs().max() < 1e-3 * scale, name


def test_slots_that_few_texts_reach_are_in_the_comparison():
    """The cases above would prove little if chains never survived."""
    drafter = lively_drafter()
    told = favoured_text(drafter)
    out = specblock_loss(drafter, batch_of(drafter, told), SpecBlockObjective(), [2, 1])
    assert (out["counted"] > 0).all()
    assert (out["counted"][:, 1:] == out["agreed"][:, :-1]).sum() < out["counted"][:, 1:].numel()


def test_only_answers_are_learned():
    """Places before the answer or behind the text neither count nor matter, whatever the targets say there."""
    drafter = lively_drafter()
    told = favoured_text(drafter)
    batch = batch_of(drafter, told)
    out = specblock_loss(drafter, batch, SpecBlockObjective(2), [2])
    scored = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for row in range(ROWS):
        scored[row, max(ANSWER_STARTS[row], 2) : LENGTHS[row]] = True
    assert out["counted"][0, 0] == (scored & (batch.top_ids[..., 0] >= 0)).sum()

    other = replace(
        batch,
        top_ids=torch.where(batch.scored[..., None], batch.top_ids, (batch.top_ids + 3) % DRAFT_VOCAB),
        top_probs=torch.where(batch.scored[..., None], batch.top_probs, 0.9),
    )
    assert torch.equal(specblock_loss(drafter, other, SpecBlockObjective(2), [2])["loss"], out["loss"])
    moved = replace(batch, top_probs=batch.top_probs.flip(-1))
    assert not torch.equal(specblock_loss(drafter, moved, SpecBlockObjective(2), [2])["loss"], out["loss"])


def test_padding_does_not_matter():
    drafter = lively_drafter()
    told = favoured_text(drafter)
    batch = batch_of(drafter, told)
    padding = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None]
    other = replace(
        batch,
        tokens=torch.where(padding, 5, batch.tokens),
        embeds=torch.where(padding[..., None], 40.0, batch.embeds),
        features=torch.where(padding[..., None], -40.0, batch.features),
    )
    ours, theirs = (specblock_loss(drafter, b, SpecBlockObjective(), [2, 1]) for b in (batch, other))
    assert ours["counted"].tolist() == theirs["counted"].tolist()
    torch.testing.assert_close(ours["loss"], theirs["loss"])


def test_a_batch_without_answers_gives_zero():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    batch = replace(batch, scored=torch.zeros_like(batch.scored))
    out = specblock_loss(drafter, batch, SpecBlockObjective(), [2, 1])
    assert out["loss"].item() == 0 and out["counted"].sum() == 0
    out["loss"].backward()
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


def test_without_the_rank_head():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    with_rank, without = (
        specblock_loss(drafter, batch, SpecBlockObjective(2, rank_weight=weight), [2]) for weight in (1.0, 0.0)
    )
    assert without["rank_loss"].item() == 0 and with_rank["rank_loss"].item() > 0
    torch.testing.assert_close(without["loss"], with_rank["draft_loss"])
    with_rank["rank_loss"].backward()
    touched = {name for name, p in drafter.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"rank_head.0.weight", "rank_head.2.weight"}


@pytest.mark.parametrize("attention", ["eager", CHUNKED])
def test_every_attention_backend_gives_the_same_loss(attention):
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    results = []
    for backend in ("sdpa", attention):
        drafter.set_attn_implementation(backend)
        drafter.zero_grad()
        out = specblock_loss(drafter, batch, SpecBlockObjective(), [2, 1])
        out["loss"].backward()
        results.append((out["loss"].detach(), [p.grad.clone() for p in drafter.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(results[0][1], results[1][1], strict=True):
        assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


def test_a_share_of_the_starts():
    """A share of 0.5 trains fewer later starts, the same ones for the same seed, and every first block."""
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))

    def counted(share: float, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        objective = SpecBlockObjective(2, starts_share=share)
        return specblock_loss(drafter, batch, objective, [1], generator)["counted"].tolist()

    whole = specblock_loss(drafter, batch, SpecBlockObjective(2), [1])["counted"].tolist()
    half = counted(0.5, 0)
    assert half == counted(0.5, 0) and half != counted(0.5, 1)
    assert half[0] == whole[0] and 0 < half[1][0] < whole[1][0]
    assert counted(0.0, 0)[1] == [0, 0, 0, 0]


def test_cuts_are_drawn_from_one_to_the_block_size(monkeypatch):
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    seen = []

    def spy(drafter, batch, objective, cuts, generator):
        seen.append(cuts)
        return {"loss": torch.tensor(math.nan)}

    monkeypatch.setattr("specblock_hf.drafters.specblock.drafting.specblock_loss", spy)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        drafter.loss(batch, generator=generator)
    assert {len(cuts) for cuts in seen} == {2}
    assert {cut for cuts in seen for cut in cuts} == {1, 2, 3, 4}


def test_without_the_valid_prefix_every_place_counts_in_every_slot():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    masked, whole = (
        specblock_loss(drafter, batch, SpecBlockObjective(2, valid_prefix=valid), [2]) for valid in (True, False)
    )
    places = torch.arange(LENGTH)
    for slot in range(4):
        assert whole["counted"][0, slot] == (batch.counted & (places >= 2 + slot)).sum()
    assert masked["counted"][0, 0] == whole["counted"][0, 0]
    assert (masked["counted"][0, 1:] < whole["counted"][0, 1:]).all()
    assert (masked["counted"][1] < whole["counted"][1]).all()


def test_a_slot_may_be_divided_by_its_own_survivors():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    parts = []
    for slot_mean in ("first", "survivors"):
        # With the decay 0 only the first slot counts, which both divide by the same number.
        for decay in (0.0, 1.0):
            objective = SpecBlockObjective(1, slot_decay=decay, slot_mean=slot_mean)
            parts.append(specblock_loss(drafter, batch, objective, [])["draft_loss"].item())
    counted = specblock_loss(drafter, batch, SpecBlockObjective(1), [])["counted"][0]
    assert parts[0] == pytest.approx(parts[2]) and counted[1] < counted[0]
    assert parts[3] - parts[2] > (parts[1] - parts[0]) * counted[0] / counted[1] * 0.99


def test_later_blocks_may_see_their_own_keys_of_earlier_pairs():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    losses = []
    for earlier_keys in (False, True):
        out = specblock_loss(drafter, batch, SpecBlockObjective(2, earlier_keys=earlier_keys), [1])
        first = specblock_loss(drafter, batch, SpecBlockObjective(1, earlier_keys=earlier_keys), [])
        losses.append((first["draft_loss"].item(), out["draft_loss"].item()))
    assert losses[0][0] == losses[1][0] and abs(losses[0][1] - losses[1][1]) > 1e-3


def test_the_rank_losses_differ_and_have_the_same_labels():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    plain, release = (
        specblock_loss(drafter, batch, SpecBlockObjective(2, rank_loss=kind), [2]) for kind in ("plain", "release")
    )
    assert torch.equal(plain["rank_confusion"], release["rank_confusion"])
    assert plain["rank_confusion"].sum() == plain["counted"].sum()
    assert abs(plain["rank_loss"] - release["rank_loss"]) > 0.1 and release["rank_loss"].isfinite()


def test_the_rest_joins_when_its_time_has_come():
    drafter = lively_drafter()
    batch = batch_of(drafter, favoured_text(drafter))
    for progress, blocks in ((0.0, 1), (0.29, 1), (0.3, 2), (1.0, 2)):
        out = drafter.loss(batch, SpecBlockObjective(2, join_at=0.3), progress=progress)
        assert len(out["counted"]) == blocks and (out["rank_loss"].item() > 0) == (blocks == 2)
    assert len(drafter.loss(batch)["counted"]) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_blocks": 0}, "at least the first block is trained"),
        ({"prefix_width": 0}, "prefix_width is 0; a prefix holds likeliest tokens, so give 1 or more"),
        ({"slot_mean": "all"}, "slot_mean is 'all'; known are first and survivors"),
        ({"rank_loss": "ordinal"}, "rank_loss is 'ordinal'; known are plain and release"),
    ],
)
def test_other_objectives_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SpecBlockObjective(**fields)

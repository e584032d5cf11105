# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The objective of block-diffusion drafters against drafting itself, slot by slot, and in a short training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from block_drafters_for_tests import VARIANTS, block_drafter
from conftest import ATTENTIONS, VOCAB, prompt_of, tiny_target

from specblock_hf import BlockDiffusionConfig, BlockDiffusionDrafter
from specblock_hf.drafters.dflash import loss as loss_module
from specblock_hf.drafters.dflash.loss import BlockDiffusionObjective, _draw_anchors, _run_blocks
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.target_batch import TargetBatch
from specblock_hf.training.cpu_attention import NAME as CPU_ATTENTION


LENGTH = 19
LENGTHS, STARTS = (19, 12, 15), (4, 3, 13)
ALL = 64  # anchors: more than any text has
TRAINED = {
    "dflash": {},
    "sliding": {},
    "causal-window": {},
    "jetspec": {},
    "dflash2": {"selector_rank": 0},
    "dspark": {"markov_rank": 0, "confidence_head": False, "confidence_head_with_markov": False},
    "scaled": {},
    "block-window": {},
}


def random_batch(top_k: int = 4) -> TargetBatch:
    """Three texts of different lengths, random features, and random distributions of the target."""
    generator = torch.Generator().manual_seed(7)
    rows = len(LENGTHS)
    table = TokenTable.of(tiny_target("llama"))
    tokens = torch.randint(VOCAB, (rows, LENGTH), generator=generator)
    distributions = torch.randn(rows, LENGTH, VOCAB, generator=generator).softmax(-1).topk(top_k)
    places = torch.arange(LENGTH)
    starts, lengths = torch.tensor(STARTS)[:, None], torch.tensor(LENGTHS)
    return TargetBatch(
        tokens=tokens,
        embeds=table.embed(tokens).detach(),
        features=torch.randn(rows, LENGTH, 96, generator=generator),
        lengths=lengths,
        top_ids=distributions.indices,
        top_probs=distributions.values,
        scored=(places >= starts) & (places < lengths[:, None]),
        table=table,
    )


def trained_drafter(variant: str, **overrides) -> BlockDiffusionDrafter:
    return block_drafter(variant, **(TRAINED[variant] | overrides))


def anchors_of(row: int) -> range:
    """Every place of a text that a block may start at: answer tokens that another follows."""
    return range(STARTS[row], LENGTHS[row] - 1)


def drafted(drafter: BlockDiffusionDrafter, batch: TargetBatch, row: int, anchor: int):
    """What the drafter drafts after the token at `anchor`: states and logits."""
    pairs = Pairs(
        tokens=batch.tokens[row : row + 1, 1 : anchor + 1],
        features=batch.features[row : row + 1, :anchor].split(32, dim=-1),
        positions=torch.arange(anchor)[None],
        lengths=torch.tensor([anchor]),
        table=batch.table,
    )
    state = drafter.begin(batch.table, 1, LENGTH)
    drafter.extend(state, pairs)
    where = torch.tensor([[anchor]])
    return drafter.draft_block(state, batch.tokens[row : row + 1, where[0]], where, drafter.config.num_predictions)


@torch.no_grad()
@pytest.mark.parametrize("attention", [*ATTENTIONS, CPU_ATTENTION])
@pytest.mark.parametrize("variant", TRAINED)
def test_blocks_of_a_batch_equal_what_is_drafted(variant, attention):
    drafter, batch = trained_drafter(variant), random_batch()
    drafter.set_attn_implementation(attention)
    anchors, valid, hidden = _run_blocks(drafter, batch, ALL, torch.Generator().manual_seed(0))
    for row in range(len(LENGTHS)):
        found = anchors[row][valid[row]].tolist()
        assert sorted(found) == list(anchors_of(row))
        for number, anchor in enumerate(found):
            expected = drafted(drafter, batch, row, anchor).hidden[0]
            assert torch.allclose(hidden[row, number], expected, atol=2e-5), (row, anchor)


def slots_of(batch: TargetBatch, drafter: BlockDiffusionDrafter):
    """Row, anchor and slot (from 1) of everything that is trained."""
    for row, length in enumerate(LENGTHS):
        for anchor in anchors_of(row):
            for slot in range(1, drafter.config.num_predictions + 1):
                if anchor + slot < length:
                    yield row, anchor, slot


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "objective", "soft", "decay"),
    [
        ("dflash", {}, False, 2),
        ("dflash2", {"decay": 0.7}, False, 0.7),
        ("dspark", {"decay": 0.0, "soft": True}, True, 0),
        ("jetspec", {}, True, 0),
        ("causal-window", {"soft": False, "decay": 3.0}, False, 3),
    ],
)
def test_the_loss_slot_by_slot(variant, objective, soft, decay):
    drafter, batch = trained_drafter(variant), random_batch()
    out = drafter.loss(batch, BlockDiffusionObjective(num_anchors=ALL, **objective))
    total, weights = 0.0, 0.0
    agreed, counted = torch.zeros(drafter.config.num_predictions), torch.zeros(drafter.config.num_predictions)
    alive = True
    for row, anchor, slot in slots_of(batch, drafter):
        log_probs = drafted(drafter, batch, row, anchor).logits[0, slot - 1].log_softmax(-1)
        place = anchor + slot
        if soft:
            probs = batch.top_probs[row, place] / batch.top_probs[row, place].sum()
            loss = -(probs * log_probs[batch.top_ids[row, place]]).sum()
        else:
            loss = -log_probs[batch.tokens[row, place]]
        weight = torch.tensor(-(slot - 1) / decay).exp() if decay else 1.0
        total, weights = total + weight * loss, weights + weight
        alive = True if slot == 1 else alive
        counted[slot - 1] += alive
        alive = alive and log_probs.argmax() == batch.tokens[row, place]
        agreed[slot - 1] += alive
    assert torch.allclose(out["loss"], total / weights, atol=1e-5)
    assert out["agreed"].tolist() == [agreed.tolist()] and out["counted"].tolist() == [counted.tolist()]


@torch.no_grad()
def test_guesses_that_are_right_count_as_long_as_all_before_them_are(monkeypatch):
    drafter, batch = trained_drafter("dflash"), random_batch()
    objective = BlockDiffusionObjective(num_anchors=ALL)
    anchors, _, _ = _run_blocks(drafter, batch, ALL, None)
    wanted = []  # right in the first, second and fourth slot
    for row, anchor, slot in sorted(slots_of(batch, drafter), key=lambda s: _order(anchors, s)):
        token = int(batch.tokens[row, anchor + slot])
        wanted.append(token if slot != 3 else (token + 1) % VOCAB)
    logits = torch.nn.functional.one_hot(torch.tensor(wanted), VOCAB).float()
    monkeypatch.setattr(drafter, "head_logits", lambda hidden, table: logits)
    out = drafter.loss(batch, objective)
    slots = [slot for _, _, slot in slots_of(batch, drafter)]
    reached = [slots.count(slot) for slot in (1, 2, 3)]
    assert out["counted"].tolist() == [[*reached, 0]] and out["agreed"].tolist() == [[*reached[:2], 0, 0]]


def _order(anchors: torch.LongTensor, slot: tuple[int, int, int]) -> tuple[int, int, int]:
    row, anchor, number = slot
    return row, anchors[row].tolist().index(anchor), number


@pytest.mark.parametrize("variant", TRAINED)
def test_every_weight_learns_and_the_target_does_not(variant):
    drafter, batch = trained_drafter(variant).train(), random_batch()
    if variant == "dflash2":
        for name, weight in drafter.named_parameters():
            assert "conv" not in name or weight.std() > 0
    drafter.loss(batch)["loss"].backward()
    own = {"embed_tokens.weight"} if drafter.config.own_embedding else set()
    for name, weight in drafter.named_parameters():
        assert name in own or (weight.grad is not None and weight.grad.abs().max() > 0), name
    assert all(weight.grad is None for weight in tiny_target("llama").get_input_embeddings().parameters())


@pytest.mark.parametrize("variant", ["dflash", "jetspec", "dspark"])
def test_logits_of_some_rows_at_a_time(variant, monkeypatch):
    """Those of DSpark come from a head that learns, too."""
    drafter, batch = trained_drafter(variant).train(), random_batch()
    head_logits, rows = drafter.head_logits, []

    def noted(hidden: torch.Tensor, table: TokenTable) -> torch.Tensor:
        rows.append(len(hidden))
        return head_logits(hidden, table)

    def learned() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        drafter.zero_grad()
        out = drafter.loss(batch, BlockDiffusionObjective(num_anchors=ALL))
        out["loss"].backward()
        own = {name: weight.grad for name, weight in drafter.named_parameters() if weight.grad is not None}
        return {name: value.detach() for name, value in out.items()}, own

    monkeypatch.setattr(drafter, "head_logits", noted)
    whole, count = learned(), len(list(slots_of(batch, drafter)))
    assert rows == [count] and count % 9
    monkeypatch.setattr(loss_module, "DEVICE_WORK", 9 * VOCAB)
    in_parts = learned()
    forward = [9] * (count // 9) + [count % 9]
    assert rows[1:] == forward + forward[::-1]  # once more in the backward pass
    torch.testing.assert_close(in_parts, whole)


def test_anchors_are_drawn_from_the_generator_alone():
    batch, before = random_batch(), torch.random.get_rng_state()
    drawn = [_draw_anchors(batch, 3, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
    places, valid = drawn[0]
    assert valid.sum(-1).tolist() == [3, 3, 1]  # the last text has one place
    for row in range(len(LENGTHS)):
        found = places[row][valid[row]].tolist()
        assert len(set(found)) == len(found) and set(found) <= set(anchors_of(row))
    assert torch.equal(_draw_anchors(batch, 3, None)[0], _draw_anchors(batch, 3, None)[0])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_batch_without_answers_costs_nothing():
    drafter, batch = trained_drafter("dflash"), random_batch()
    out = drafter.loss(replace(batch, scored=torch.zeros_like(batch.scored)))
    out["loss"].backward()
    assert out["loss"] == 0 and out["counted"].sum() == 0
    assert all(weight.grad is None or weight.grad.abs().max() == 0 for weight in drafter.parameters())


@pytest.mark.parametrize("variant", ["dflash2", "dspark", "dspark-bare"])
def test_heads_that_are_not_trained_are_refused(variant):
    assert variant in VARIANTS
    with pytest.raises(
        ValueError, match=r"^Drafters with a selector, Markov or confidence head are loaded and run but"
    ):
        block_drafter(variant).loss(random_batch())


def test_a_batch_without_the_head_is_refused():
    with pytest.raises(ValueError, match=r"^The batch has no table, .*; pass the table\.$"):
        trained_drafter("dflash").loss(replace(random_batch(), table=None))


@pytest.mark.parametrize("options", [{"num_anchors": 0}, {"decay": -1.0}])
def test_an_objective_that_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match=r"cannot be trained; give at least one anchor and a decay of 0 or more\.$"):
        BlockDiffusionObjective(**options)


@pytest.mark.parametrize("causal", [None, True])
def test_a_short_training_drafts_what_the_target_writes(causal):
    """On one text of the target, until whole blocks of it are accepted."""
    target, prompt = tiny_target("llama"), prompt_of(6)
    text = target.generate(prompt, max_new_tokens=40, do_sample=False)
    with torch.no_grad():
        out = target(text, output_hidden_states=True)
    distributions = torch.nn.functional.pad(out.logits.softmax(-1)[:, :-1], (0, 0, 1, 0)).topk(4)
    config = BlockDiffusionConfig.for_target(target.config, num_hidden_layers=1, block_size=4, causal=causal)
    batch = TargetBatch(
        tokens=text,
        embeds=out.hidden_states[0],
        features=torch.cat([out.hidden_states[layer] for layer in config.feature_layers], dim=-1),
        lengths=torch.tensor([text.shape[1]]),
        top_ids=distributions.indices,
        top_probs=distributions.values,
        scored=torch.arange(text.shape[1])[None] >= 6,
        table=TokenTable.of(target),
    )
    torch.manual_seed(5)
    drafter, generator = BlockDiffusionDrafter(config).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=5e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        loss = drafter.loss(batch, generator=generator)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drafter.eval()
    output = target.generate(prompt, max_new_tokens=40, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, text)
    accepted = drafter.last_statistics.accepted
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accepted {accepted}")
    assert sum(accepted) >= 0.8 * 3 * len(accepted)

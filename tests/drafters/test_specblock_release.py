# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The authors' objective against losses, labels and gradients computed by their own code (`fixtures/conformance`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specblock_hf import AutoDrafter
from specblock_hf.drafters.common.cache import GraphCache
from specblock_hf.drafters.specblock.loss import SpecBlockObjective, TrainingBlock, first_block, later_block
from specblock_hf.drafters.specblock.rank_loss import rank_buckets
from specblock_hf.drafters.specblock.release_loss import release_loss
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.drafting.target_batch import TargetBatch


FIXTURES = Path(__file__).parents[1] / "fixtures" / "conformance"
LOSS = {"rtol": 0, "atol": 2e-4}  # tolerances as the fixtures state them
GRADIENT = {"rtol": 0, "atol": 1e-4}


class Golden:
    """A drafter with a golden checkpoint's weights, its inputs as a batch, and what the authors' code made of them."""

    def __init__(self, name: str):
        folder = FIXTURES / name
        self.drafter = AutoDrafter.from_pretrained(folder / "checkpoint").eval()
        self.expected = load_file(folder / "expected.safetensors")
        found = json.loads((folder / "expected.json").read_text())
        self.cuts, self.gradient_norms = found["dims"]["cuts"], found["facts"]["grad_norms"]
        inputs = load_file(folder / "inputs.safetensors")
        # Their inputs are S pairs with the target's distribution after each pair's token; ours are texts whose last
        # token is what the last pair predicts, so one column more, of which nothing but the distribution is known.
        embedding = torch.nn.Embedding.from_pretrained(inputs["target_embed_tokens.weight"])
        tokens = torch.nn.functional.pad(inputs["tokens"], (0, 1))
        self.table = TokenTable(embedding, torch.nn.Identity(), self.drafter.config.vocab_size)
        draft_ids = torch.full((self.drafter.config.vocab_size,), -1)
        draft_ids[self.drafter.draft_to_target] = torch.arange(self.drafter.config.draft_vocab_size)
        distributions = inputs["target_logits"].softmax(-1).sort(-1, descending=True)
        probs, ids = distributions.values, draft_ids[distributions.indices]
        self.batch = TargetBatch(
            tokens=tokens,
            embeds=self.table.embed(tokens),
            features=torch.nn.functional.pad(inputs["target_hidden"], (0, 0, 0, 2)),
            lengths=torch.full((len(tokens),), tokens.shape[1]),
            top_ids=torch.nn.functional.pad(ids, (0, 0, 2, 0), value=-1),
            top_probs=torch.nn.functional.pad(probs, (0, 0, 2, 0)),
            scored=torch.nn.functional.pad(inputs["loss_mask"][..., 0].bool(), (2, 0)),
        )

    def blocks(self) -> list[tuple[TrainingBlock, torch.Tensor]]:
        """All three blocks, with their states at every pair."""
        cache = GraphCache(self.drafter.config.num_hidden_layers)
        block = first_block(self.drafter, self.batch, cache)
        blocks = [(block, block.states(self.drafter))]
        for cut in self.cuts:
            (block, states), everywhere = blocks[-1], torch.ones_like(blocks[0][0].valid)
            block = later_block(self.drafter, self.batch, cache, block, everywhere, states[:, :, cut - 1], cut, True)
            blocks.append((block, block.states(self.drafter)))
        return blocks


@pytest.fixture(scope="module", params=["specblock_a", "specblock_b"])
def golden(request) -> Golden:
    return Golden(request.param)


def test_a_step_has_the_golden_losses_and_gradients(golden):
    golden.drafter.zero_grad()
    out = release_loss(golden.drafter, golden.batch, SpecBlockObjective(num_blocks=3), golden.cuts)
    expected = {name.removeprefix("loss/step/"): value for name, value in golden.expected.items() if "/step/" in name}
    slots = expected["draft_losses_summed_over_blocks"]
    decay = 0.8 ** torch.arange(len(slots))
    torch.testing.assert_close(out["draft_loss"], (slots * decay).sum(), rtol=0, atol=5e-4)
    torch.testing.assert_close(out["rank_loss"], expected["rank_loss_summed_over_blocks"][0], **LOSS)
    torch.testing.assert_close(out["loss"], expected["total_0p8k_plus_rank"][0], rtol=0, atol=5e-4)
    out["loss"].backward()
    gradients = {name: p.grad for name, p in golden.drafter.named_parameters()}
    compared = [name.removeprefix("grad/") for name in expected if name.startswith("grad/")]
    assert len(compared) == 5
    for name in compared:
        torch.testing.assert_close(gradients[name], expected[f"grad/{name}"], **GRADIENT)
    norms = {name: value for name, value in golden.gradient_norms.items() if "embed_tokens" not in name}
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("budget", "suffix"), [(10.0, ""), (2.0, "_budget2"), (None, "_nobudget")])
def test_blocks_add_up_to_the_golden_losses(golden, budget, suffix):
    """Slot by slot from the differences of longer and shorter runs, and the rank loss under every budget."""
    before = {"rank_loss": 0.0, "slots": 0.0}
    with torch.no_grad():
        for number in (1, 2, 3):
            slots = [
                release_loss(
                    golden.drafter, golden.batch, SpecBlockObjective(number, slot_decay=decay), golden.cuts, budget
                )
                for decay in (0.0, 1.0)
            ]
            block = f"loss/block{number}"
            wanted = golden.expected[f"{block}/draft_loss_per_slot"]
            found = torch.stack([slots[0]["draft_loss"], slots[1]["draft_loss"]])
            torch.testing.assert_close(found - before["slots"], torch.stack([wanted[0], wanted.sum()]), **LOSS)
            rank = golden.expected[f"{block}/rank_loss{suffix}"][0]
            torch.testing.assert_close(slots[0]["rank_loss"] - before["rank_loss"], rank, **LOSS)
            before = {"rank_loss": slots[0]["rank_loss"], "slots": found}
            classes = slots[0]["rank_confusion"].sum(1)
            total = sum(golden.expected[f"loss/block{b}/rank_count_per_class"] for b in range(1, number + 1))
            assert classes.tolist() == total.tolist()


@torch.no_grad()
def test_rank_labels_are_the_golden_ones(golden):
    last = golden.batch.tokens.shape[1] - 1
    distributions = torch.nn.functional.pad(golden.expected["loss/target_p"].argmax(-1), (2, 0))
    for number, (block, states) in enumerate(golden.blocks(), 1):
        wanted = golden.expected[f"loss/block{number}/rank_labels"].long()
        for slot in range(len(wanted)):
            pairs = slice(0, last - 1)
            places = block.pairs[:, pairs] + block.shift + 2 + slot
            truth = distributions.gather(1, places.clamp_max(last))
            _, logits = golden.drafter.draft_logits(states[:, pairs, slot])
            own = logits.gather(-1, truth.unsqueeze(-1))
            best = logits.topk(golden.drafter.config.rank_top_k).values
            found = rank_buckets(best.flatten(0, 1), own.flatten()).view_as(truth)
            # Theirs has labels behind the end of the text too, of a distribution that is all zero, and trains none of
            # them.
            inside = places <= last
            assert inside.sum() == 2 * (last - 1 - block.shift - slot) and (wanted[slot][inside] >= 0).all()
            assert torch.equal(found[inside], wanted[slot][inside]), (number, slot)

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a Markov term adds to a SpecBlock drafter."""

from __future__ import annotations

import pytest
import torch
from conftest import prompt_of, tiny_target
from test_specblock import assert_same_row, draft, nodes_of, path_tokens
from training_for_tests import DRAFT_VOCAB, Told, logits_below, naive_states, tiny_drafter
from transformers import set_seed

from specblock_hf import DraftingPlan, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.drafters.specblock import drafting
from specblock_hf.drafting.plan import Limits


@torch.no_grad()
def test_with_a_markov_term_the_tree_holds_the_likeliest_paths_of_all():
    """Every path is spelled out, with the logits of each slot after the token that the path has before it."""
    drafter = tiny_drafter(block_size=3, markov_rank=3, expansion="best_first", root_width=DRAFT_VOCAB)
    told, budget, pair = Told(1, 16), 40, 8
    tree = draft(drafter, told, pair + 1, Limits((budget,), (3,)))
    states, scores = naive_states(drafter, told, 0, pair), {(): 0.0}
    for slot in range(3):
        for path in [path for path in scores if len(path) == slot]:
            log_probs = logits_below(drafter, states[slot], slot, path[-1] if path else -1).log_softmax(-1)
            for token, log_prob in zip(drafter.draft_to_target.tolist(), log_probs.tolist(), strict=True):
                scores[(*path, token)] = scores[path] + log_prob
    del scores[()]
    wanted = sorted(scores, key=lambda path: -scores[path])[:budget]
    found = [tuple(path_tokens(tree, node)) for node in range(1, int(tree.num_nodes[0]))]
    assert sorted(found) == sorted(wanted)
    # Siblings have different children, which no distribution of the slot alone would give them.
    below = {path[:1]: {p[1] for p in wanted if p[:1] == path[:1] and len(p) == 2} for path in wanted}
    assert len({frozenset(tokens) for tokens in below.values() if tokens}) > 1


@torch.no_grad()
def test_rank_guided_slots_read_the_term_along_their_greedy_chain():
    drafter, told, pair = tiny_drafter(markov_rank=3), Told(1, 16), 8
    state = drafter.begin(told.table, 1, 40)
    _, hidden, _ = drafter._first_block(state, told.pairs([0], [pair + 1]))
    outputs, before = drafter._chain_outputs(hidden, 3), -1
    for slot in range(4):
        logits = logits_below(drafter, hidden[0, 0, slot], slot, before)
        best = logits.topk(drafter.config.rank_top_k)
        torch.testing.assert_close(outputs.log_probs[0, 0, slot], logits.log_softmax(-1)[best.indices[:3]])
        assert outputs.tokens[0, 0, slot].tolist() == drafter.draft_to_target[best.indices[:3]].tolist()
        rank = drafter.rank_logits(drafter.norm(hidden[0, 0, slot]), best.values).argmax()
        assert outputs.rank_class[0, 0, slot] == rank
        before = int(outputs.tokens[0, 0, slot, 0])


@torch.no_grad()
@pytest.mark.parametrize("expansion", ["rank_guided", "best_first"])
def test_a_new_markov_term_changes_nothing(expansion, monkeypatch):
    monkeypatch.setattr("specblock_hf.drafters.specblock.drafting.AFTER_ALTERNATIVES", 0.0)  # which a term replaces
    told, plain = Told(1, 20), tiny_drafter(expansion=expansion)
    term = SpecBlockDrafter(SpecBlockConfig.from_dict(plain.config.to_dict() | {"markov_rank": 3})).eval()
    term.load_state_dict(plain.state_dict(), strict=False)
    assert nodes_of(draft(term, told)) == nodes_of(draft(plain, told))
    torch.testing.assert_close(draft(term, told).log_probs, draft(plain, told).log_probs)
    term.markov_head.markov_w2.weight.normal_()
    assert nodes_of(draft(term, told)) != nodes_of(draft(plain, told))


@torch.no_grad()
def test_a_markov_term_comes_back_from_disk(tmp_path):
    drafter, told = tiny_drafter(markov_rank=3, expansion="best_first"), Told(1, 20)
    drafter.save_pretrained(tmp_path)
    again = SpecBlockDrafter.from_pretrained(tmp_path)
    assert_same_row(draft(again, told), 0, draft(drafter, told))


def test_trees_are_drawn_only_where_slots_know_nothing_of_each_other():
    assert tiny_drafter().can_sample and not tiny_drafter(markov_rank=3).can_sample


@pytest.mark.parametrize("expansion", ["rank_guided", "best_first"])
@pytest.mark.parametrize("sampling", [{"do_sample": False}, {"do_sample": True, "temperature": 1.3}])
def test_a_markov_term_never_changes_the_text(expansion, sampling):
    target, drafter = tiny_target("llama"), tiny_drafter(markov_rank=3, expansion=expansion)
    options = sampling | {"max_new_tokens": 20, "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    set_seed(3)
    plain = target.generate(prompt_of(6), **options)
    set_seed(3)
    assert torch.equal(target.generate(prompt_of(6), assistant_model=drafter, **options), plain)
    assert drafter.last_statistics.rounds < plain.shape[1] - 6


def test_drawn_trees_are_refused_with_a_markov_term():
    drafter = tiny_drafter(markov_rank=3)
    drafter.drafting_plan = DraftingPlan(8, 2, draft_sampling="sampled")
    with pytest.raises(ValueError, match="drafts the likeliest tokens only and the drafting plan asks for drawn ones"):
        tiny_target("llama").generate(prompt_of(6), do_sample=True, max_new_tokens=4, assistant_model=drafter)


@torch.no_grad()
@pytest.mark.parametrize("count", [2, 5, 23])
def test_a_markov_term_may_reorder_the_likeliest_tokens_of_a_slot_only(count, monkeypatch):
    """What is left out keeps its weight, so that the log-probs of candidates sum up with it to one."""
    monkeypatch.setattr(drafting, "MARKOV_CANDIDATES", count)
    drafter, told, pair = tiny_drafter(markov_rank=3, expansion="best_first"), Told(1, 16), 8
    state = drafter.begin(told.table, 1, 40)
    _, hidden, _ = drafter._first_block(state, told.pairs([0], [pair + 1]))
    children = drafter._children(hidden, 2)
    before = drafter.draft_to_target[torch.tensor([[4, 9, 1]])]
    for level in range(4):
        tokens, log_probs = children(level, torch.zeros(1, 3, dtype=torch.long), before)
        plain = drafter.lm_head.weight @ drafter.norm(hidden[0, 0, level])
        chosen = plain.topk(count).indices
        for node in range(3):
            logits = plain.clone()
            logits[chosen] = logits_below(drafter, hidden[0, 0, level], level, int(before[0, node]))[chosen]
            best = logits[chosen].topk(2)
            assert tokens[0, node].tolist() == drafter.draft_to_target[chosen[best.indices]].tolist()
            torch.testing.assert_close(log_probs[0, node], best.values - logits.logsumexp(-1))

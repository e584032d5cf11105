# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Block-diffusion drafters in the decoding loop, and their trees against every path."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from block_drafters_for_tests import BLOCK, VARIANTS, OracleBlockDrafter, block_drafter
from conftest import ATTENTIONS, KINDS, VOCAB, prompt_of, tiny_target
from hypothesis import given, settings
from hypothesis import strategies as st
from test_best_first import nodes_of
from transformers import AutoModel

from specblock_hf import AutoDrafter, BlockDiffusionDrafter, DraftingPlan
from specblock_hf.drafters.dflash.drafting import Block
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits


GREEDY = {"do_sample": False}


def table() -> TokenTable:
    return TokenTable.of(tiny_target("llama"))


def told(first: int, last: int, rows: int = 1) -> Pairs:
    """Pairs `first` to `last - 1` of random texts with random features; those of a text are always the same."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (4, 41), generator=generator)[:rows]
    features = torch.randn(4, 40, 3, 32, generator=generator)[:rows]
    return Pairs(
        tokens=tokens[:, first + 1 : last + 1],
        features=features[:, first:last].unbind(2),
        positions=torch.arange(first, last).expand(rows, -1),
        lengths=torch.full((rows,), last - first),
        table=table(),
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_weights_leave_the_text_alone(variant, attention):
    """Greedy and sampled, on a target of a different kind for each variant."""
    target = tiny_target(KINDS[list(VARIANTS).index(variant) % len(KINDS)], attention)
    prompt, drafter = prompt_of(7), block_drafter(variant)
    drafter.set_attn_implementation(attention)
    expected = target.generate(prompt, max_new_tokens=20, **GREEDY)
    output = target.generate(prompt, max_new_tokens=20, assistant_model=drafter, **GREEDY)
    assert torch.equal(output, expected)
    assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds
    assert drafter.last_statistics.drafter_calls <= drafter.last_statistics.rounds
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.8, "top_k": 0}
    torch.manual_seed(11)
    expected = target.generate(prompt, **options)
    torch.manual_seed(11)
    assert torch.equal(target.generate(prompt, assistant_model=drafter, **options), expected)


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_oracle_is_accepted_to_the_end_of_its_block(variant, eos):
    target = tiny_target(KINDS[list(VARIANTS).index(variant) % len(KINDS)])
    prompt = prompt_of(7)
    text = target.generate(prompt, max_new_tokens=30, **GREEDY)[0].tolist()
    options = {"eos_token_id": text[7 + 13]} if eos else {}
    expected = target.generate(prompt, max_new_tokens=30, **options, **GREEDY)
    drafter = block_drafter(variant, OracleBlockDrafter, confidence_threshold=0.0, final_logit_softcapping=None)
    drafter.text = text
    output = target.generate(prompt, max_new_tokens=30, assistant_model=drafter, **options, **GREEDY)
    assert torch.equal(output, expected)
    accepted, position, end = [], 7, expected.shape[1] - 1
    while position < end:
        accepted.append(min(drafter.config.num_predictions, end - position - 1))
        position += accepted[-1] + 1
    assert drafter.last_statistics.accepted == accepted
    assert drafter.config.num_predictions == (BLOCK if variant.startswith("dspark") else BLOCK - 1)


@pytest.mark.parametrize("variant", ["dflash", "sliding", "jetspec", "dflash2", "dspark"])
@pytest.mark.parametrize("oracle", [False, True])
def test_a_padded_batch_says_what_plain_decoding_says(variant, oracle):
    target = tiny_target("gemma3")
    short, long = prompt_of(4, seed=1), prompt_of(9, seed=2)
    prompts = torch.cat([torch.nn.functional.pad(short, (5, 0)), long])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    options = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 0, **GREEDY}
    expected = target.generate(prompts, **options)
    drafter = block_drafter(variant, OracleBlockDrafter if oracle else BlockDiffusionDrafter)
    drafter.text = expected[1].tolist()  # right for one of the rows, so that they do not advance together
    assert torch.equal(target.generate(prompts, assistant_model=drafter, **options), expected)
    assert drafter.last_statistics.emitted == 28


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_of_a_batch_are_drafted_alone(variant, attention):
    """Rows of different lengths over three rounds, one of them finished after the first."""
    drafter = block_drafter(variant)
    drafter.set_attn_implementation(attention)
    rounds = [(9, 14, 4), (2, 5, 0), (3, 1, 0)]
    everything = told(0, 40, rows=3)
    done, alone = [0, 0, 0], [drafter.begin(table(), 1, 2) for _ in range(3)]
    together = drafter.begin(table(), 3, 2)
    for counts in rounds:
        widest = max(counts)
        columns = [
            torch.arange(widest).clamp_max(max(count - 1, 0)) + start
            for count, start in zip(counts, done, strict=True)
        ]
        index = torch.stack(columns)
        pairs = Pairs(
            tokens=everything.tokens.gather(1, index),
            features=tuple(f.gather(1, index.unsqueeze(-1).expand(-1, -1, 32)) for f in everything.features),
            positions=index,
            lengths=torch.tensor(counts),
            table=table(),
        )
        limits = Limits(tuple(9 if count else 0 for count in counts), (3, 9, 9))
        tree = drafter.propose(together, pairs, limits)
        for row, count in enumerate(counts):
            if not count:
                assert tree.num_nodes[row] == 1
                continue
            own = Pairs(
                tokens=pairs.tokens[row : row + 1, :count],
                features=tuple(f[row : row + 1, :count] for f in pairs.features),
                positions=pairs.positions[row : row + 1, :count],
                lengths=torch.tensor([count]),
                table=table(),
            )
            single = drafter.propose(alone[row], own, Limits((9,), (limits.depth[row],)))
            assert nodes_of(tree, row) == pytest.approx(nodes_of(single), abs=1e-4)
            assert tree.tokens[row, 0] == own.tokens[0, -1]
            done[row] += count


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_taking_pairs_in_costs_no_forward_and_chunks_leave_no_trace(variant):
    drafter, limits = block_drafter(variant), Limits((12,), (9,))
    whole = drafter.begin(table(), 1, 20)
    expected = drafter.propose(whole, told(0, 17), limits)
    state = drafter.begin(table(), 1, 20)
    for first, last in ((0, 1), (1, 8), (8, 16)):
        drafter.extend(state, told(first, last))
    assert state.calls == 0
    tree = drafter.propose(state, told(16, 17), limits)
    assert nodes_of(tree) == pytest.approx(nodes_of(expected), abs=1e-4)
    assert state.calls == whole.calls == 1 and state.committed == 17


@torch.no_grad()
@pytest.mark.parametrize(("nodes", "depth"), [(0, 5), (5, 0), (5, 1), (3, 2), (40, 99)])
@pytest.mark.parametrize("variant", ["dflash", "jetspec", "dspark"])
def test_limits_bound_the_tree_and_what_a_causal_drafter_runs(variant, nodes, depth):
    drafter = block_drafter(variant, confidence_threshold=0.0)
    state = drafter.begin(table(), 1, 20)
    tree = drafter.propose(state, told(0, 6), Limits((nodes,), (depth,)))
    deepest = min(nodes, depth, drafter.config.num_predictions)
    assert tree.num_nodes.item() - 1 == (nodes if deepest else 0)
    assert tree.depths().max() <= deepest
    assert state.calls == (deepest > 0)
    rows = {"dflash": BLOCK, "jetspec": 1 + deepest, "dspark": BLOCK}[variant]
    assert state.cache.width == 6 + (rows if deepest else 0)
    assert state.forward_rows == (rows if deepest else 0)


@torch.no_grad()
def test_a_narrow_tree_and_a_chain():
    chain, narrow = block_drafter(tree_width=1), block_drafter(tree_width=2)
    wide = block_drafter()
    trees = {
        drafter.config.tree_width: nodes_of(
            drafter.propose(drafter.begin(table(), 1, 20), told(0, 6), Limits((10,), (9,)))
        )
        for drafter in (chain, narrow, wide)
    }
    assert [len(path) for path in trees[1]] == [1, 2, 3, 4]
    children: dict[tuple[int, ...], int] = {}
    for path in trees[2]:
        children[path[:-1]] = children.get(path[:-1], 0) + 1
    assert max(children.values()) == 2 and len(trees[2]) == len(trees[None]) == 10
    assert sum(map(math.exp, trees[1].values())) < sum(map(math.exp, trees[2].values()))
    assert sum(map(math.exp, trees[2].values())) <= sum(map(math.exp, trees[None].values())) + 1e-6


def distributions(drafter: BlockDiffusionDrafter, block: Block, level: int, before: int) -> torch.Tensor:
    """The distribution `[vocab_size]` of the token after `before`, written down for one node."""
    logits = block.logits[0, level]
    if drafter.config.selector_rank:
        selector = drafter.candidate_selector
        kept = logits.topk(drafter.config.selector_top_k).indices
        weights = selector.predecessor_codebook[before] * (selector.hidden_projection.weight @ block.hidden[0, level])
        gained = torch.full_like(logits, -torch.inf)
        gained[kept] = logits[kept] + selector.successor_codebook[kept] @ weights
        return gained.log_softmax(-1)
    if drafter.config.markov_rank:
        head = drafter.markov_head
        return (logits + head.markov_w2.weight @ head.markov_w1.weight[before]).log_softmax(-1)
    return logits.log_softmax(-1)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["dflash", "dflash2", "dspark"]), st.integers(0, 1000), st.integers(1, 14))
@torch.no_grad()
def test_the_tree_holds_the_likeliest_of_all_paths(variant, seed, budget):
    """
    Against every path of a small vocabulary, by distributions that depend on the token before where the drafter's do.
    """
    size, depth = 7, 3
    fields = {"vocab_size": size, "block_size": depth + (variant != "dspark"), "confidence_threshold": 0.0}
    drafter = block_drafter(variant, **fields)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in drafter.named_parameters():
        if "codebook" in name or "markov" in name:
            weight.normal_(generator=generator)
    block = Block(torch.randn(1, depth, 32, generator=generator), torch.randn(1, depth, size, generator=generator))
    drafter.draft_block = lambda *args: block
    pairs = replace(told(0, 1), tokens=torch.tensor([[2]]))
    tree = nodes_of(drafter.propose(drafter.begin(table(), 1, 4), pairs, Limits((budget,), (99,))))
    scores: dict[tuple[int, ...], float] = {(): 0.0}
    for level in range(depth):
        for path in list(product(range(size), repeat=level)):
            distribution = distributions(drafter, block, level, path[-1] if path else 2)
            scores |= {(*path, token): scores[path] + float(distribution[token]) for token in range(size)}
    del scores[()]
    assert tree == pytest.approx({path: scores[path] for path in tree}, abs=1e-4)
    best = sorted(scores.values(), reverse=True)[:budget]
    assert sorted(tree.values(), reverse=True) == pytest.approx(best, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["dflash", "jetspec"])
def test_a_drawn_tree_is_drawn_from_the_distributions_of_its_depths(variant):
    drafter, target_table = block_drafter(variant), table()
    limits, shapes, tokens = Limits((12,), (3,), num_forwards=2, draft_sampling="sampled"), set(), set()
    before = torch.random.get_rng_state()
    for _ in range(8):
        state = drafter.begin(target_table, 1, 20)
        state.warp = lambda logits: logits / 0.7
        tree = drafter.propose(state, told(0, 7), limits)
        drafter.extend(again := drafter.begin(target_table, 1, 20), told(0, 7))
        block = drafter.draft_block(again, told(0, 7).tokens[:, -1:], torch.tensor([[7]]), 3)
        expected = (block.logits / 0.7).log_softmax(-1)
        depths = tree.depths()[0]
        assert depths.max() <= 3 and tree.num_nodes.item() > 4
        for node in range(1, tree.num_nodes.item()):
            distribution = tree.distributions.log_probs[0, tree.distributions.rows[0, node]]
            assert torch.allclose(distribution, expected[0, depths[node] - 1], atol=1e-4)
            drawn = distribution[tree.distributions.token_ids == tree.tokens[0, node]].item()
            assert tree.log_probs[0, node].item() == pytest.approx(drawn, abs=1e-5)
        shapes.add(tuple(tree.parents[0].tolist()))
        tokens.add(tuple(tree.tokens[0].tolist()))
    assert len(tokens) > 1 and len(shapes) == 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_drawn_trees_are_verified_and_drafters_without_known_distributions_refuse_them():
    """A target with one possible token at every place, so that what is sampled is known."""
    target, prompt = tiny_target("qwen3"), prompt_of(7)
    text = target.generate(prompt, max_new_tokens=16, **GREEDY)
    options = {"max_new_tokens": 16, "do_sample": True, "top_k": 1}
    drafter = block_drafter("dflash", OracleBlockDrafter)
    drafter.text = text[0].tolist()
    drafter.drafting_plan = DraftingPlan(9, 1, draft_sampling="sampled")
    assert torch.equal(target.generate(prompt, assistant_model=drafter, **options), text)
    assert max(drafter.last_statistics.accepted) >= 3
    for variant in ("dflash2", "dspark"):
        drafter = block_drafter(variant)
        drafter.drafting_plan = DraftingPlan(9, 1, draft_sampling="sampled")
        with pytest.raises(ValueError, match=r"drafts the likeliest tokens only and the drafting plan asks for drawn"):
            target.generate(prompt, assistant_model=drafter, **options)


@torch.no_grad()
def test_nothing_is_drafted_below_a_low_confidence():
    drafter, pairs, limits = block_drafter("dspark"), told(0, 7), Limits((60,), (9,))
    drafter.confidence_head.proj.weight.neg_()  # with these weights it is surest at the root
    drafter.config.confidence_threshold = 0.0
    whole = nodes_of(drafter.propose(drafter.begin(table(), 1, 20), pairs, limits))
    state = drafter.begin(table(), 1, 20)
    drafter.extend(state, pairs)
    block = drafter.draft_block(state, pairs.tokens[:, -1:], torch.tensor([[7]]), BLOCK)
    proj = drafter.confidence_head.proj

    def sure(path: tuple[int, ...]) -> float:
        """How likely the last token of a path is accepted."""
        before = (int(pairs.tokens[0, -1]), *path)[-2]
        inputs = torch.cat([block.hidden[0, len(path) - 1], drafter.markov_head.markov_w1.weight[before]])
        return torch.sigmoid(proj.weight[0] @ inputs + proj.bias).item()

    between = sorted({sure(path) for path in whole})
    drafter.config.confidence_threshold = threshold = sum(between[len(between) // 2 :][:2]) / 2
    assert threshold < sure((0,))
    cut = nodes_of(drafter.propose(drafter.begin(table(), 1, 20), pairs, limits))
    assert cut and all(sure(path[: length + 1]) >= threshold for path in cut for length in range(len(path)))
    lost = whole.keys() - cut.keys()
    assert lost and all(any(sure(path[: n + 1]) < threshold for n in range(len(path))) for path in lost)
    drafter.config.confidence_threshold = 1.0
    tree = drafter.propose(drafter.begin(table(), 1, 20), pairs, limits)
    assert tree.num_nodes.item() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_drafter_in_another_dtype(dtype):
    target, prompt = tiny_target("llama"), prompt_of(7)
    for variant in ("dflash2", "dspark"):
        drafter = block_drafter(variant).to(dtype)
        output = target.generate(prompt, max_new_tokens=12, assistant_model=drafter, **GREEDY)
        assert torch.equal(output, target.generate(prompt, max_new_tokens=12, **GREEDY))
        tree = drafter.propose(drafter.begin(table(), 1, 9), told(0, 5), Limits((9,), (9,)))
        assert tree.log_probs.dtype == torch.float32


@torch.no_grad()
def test_scores_are_made_in_float32():
    """Rounded to the head's dtype, log-probs of a flat distribution tie; the drafter's do not."""
    drafter = block_drafter(output_multiplier=0.01)
    target = tiny_target("llama", dtype=torch.bfloat16)
    state = drafter.begin(TokenTable.of(target), 1, 9)
    tree = drafter.propose(state, told(0, 5), Limits((20,), (9,)))
    assert len(set(tree.log_probs[0].tolist())) > len(set(tree.log_probs[0].bfloat16().tolist()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_drafter_comes_back(variant, tmp_path):
    drafter = block_drafter(variant)
    drafter.save_pretrained(tmp_path)
    for load in (BlockDiffusionDrafter.from_pretrained, AutoModel.from_pretrained, AutoDrafter.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is BlockDiffusionDrafter
        assert loaded.config.layer_rules == drafter.config.layer_rules
        assert loaded.config.feature_layers == [1, 2, 3]
        state, expected = loaded.state_dict(), drafter.state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_its_card_names_the_method():
    card = str(block_drafter("jetspec").model_card("org/drafter"))
    assert "Method: [DFlash](https://huggingface.co/papers/2602.06036)" in card
    assert f"| Tokens a forward | {BLOCK} |" in card and "SpecBlock" not in card


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_the_anchor_and_masks_as_the_target_embeds_them(kind):
    """With whatever its embedding does beside the look-up (Gemma scales its rows), and then the drafter's factor."""
    target, drafter = tiny_target(kind), block_drafter("scaled", mask_token_id=9)
    embeds = drafter.block_embeds(torch.tensor([[3], [5]]), 4, TokenTable.of(target))
    ids = torch.tensor([[[3, 9, 9, 9]], [[5, 9, 9, 9]]])
    assert torch.equal(embeds, 0.5 * target.get_input_embeddings()(ids))

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What all drafters beside SpecBlock have to do alike."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from baselines_for_tests import BASELINES, DEPTH, FORWARDS, baseline, batch_for, listening, pairs_for
from batches_for_tests import padded_batch
from conftest import VOCAB, prompt_of, tiny_target
from training_for_tests import DRAFT_VOCAB, Told
from transformers import AutoConfig, AutoModel, LlamaConfig

from specblock_hf import AutoDrafter, DraftingPlan
from specblock_hf.drafters.common.block import PREFILL_PAIRS
from specblock_hf.drafters.common.registry import drafter_kinds
from specblock_hf.drafting.plan import Limits
from specblock_hf.training.cpu_attention import NAME as CHUNKED
from specblock_hf.trees.tree import DraftTree


NEW = ("medusa", "parallelspec", "falcon_drafter")
LENGTHS, STARTS = (20, 13, 17), (3, 6, 2)


def paths_of(tree: DraftTree, row: int = 0) -> dict[tuple[int, ...], float]:
    """The cumulative log-prob of every path of tokens of one row."""
    paths: list[tuple[int, ...]] = []
    for node in range(int(tree.num_nodes[row])):
        parent = int(tree.parents[row, node])
        paths.append((*(paths[parent] if parent >= 0 else ()), int(tree.tokens[row, node])))
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, tree.cumulative_log_probs()[row].tolist(), strict=False))


def assert_same_paths(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert max(abs(ours[path] - theirs[path]) for path in ours) < 1e-4


@pytest.mark.parametrize(("kind", "attention"), [("llama", "sdpa"), ("gemma3", "eager"), ("mistral", "sdpa")])
@pytest.mark.parametrize("name", NEW)
def test_random_weights_leave_the_text_alone(name, kind, attention):
    target, drafter = tiny_target(kind, attention), baseline(name, kind)
    for length in (1, 7):
        prompt = prompt_of(length)
        expected = target.generate(prompt, max_new_tokens=20, do_sample=False)
        output = target.generate(prompt, max_new_tokens=20, do_sample=False, assistant_model=drafter)
        assert torch.equal(output, expected)
        assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds
    torch.manual_seed(11)
    expected = target.generate(prompt, max_new_tokens=14, do_sample=True, temperature=0.8, top_k=0)
    torch.manual_seed(11)
    output = target.generate(
        prompt, max_new_tokens=14, do_sample=True, temperature=0.8, top_k=0, assistant_model=drafter
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", NEW)
def test_batches_leave_the_texts_alone(llama, name):
    drafter = baseline(name)
    batch = padded_batch((2, 11, 6), seed=3)
    options = {"max_new_tokens": 18, "do_sample": False, "eos_token_id": 12, "pad_token_id": 0}
    expected = llama.generate(**batch, **options)
    assert torch.equal(llama.generate(**batch, **options, assistant_model=drafter), expected)


@pytest.mark.parametrize("name", NEW)
def test_bfloat16(llama, name):
    drafter = baseline(name, dtype=torch.bfloat16)
    expected = llama.generate(prompt_of(7), max_new_tokens=12, do_sample=False)
    output = llama.generate(prompt_of(7), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_rows_of_a_batch_are_drafted_alone(name):
    """Four rounds with rows of different lengths, one of which learns nothing in the third."""
    drafter, told = baseline(name), Told(3, 24)
    limits = Limits((12,) * 3, (9,) * 3, num_forwards=FORWARDS[name])
    together = drafter.begin(told.table, 3, 24)
    alone = [drafter.begin(told.table, 1, 24) for _ in range(3)]
    told_up_to = ((0, 0, 0), (9, 1, 14), (12, 6, 15), (13, 6, 19), (15, 9, 20))
    for first, last in itertools.pairwise(told_up_to):
        tree = drafter.propose(together, pairs_for(drafter, told, first, last), limits)
        for row in range(3):
            if first[row] == last[row]:
                continue
            own = pairs_for(drafter, told, first[row : row + 1], last[row : row + 1], rows=[row])
            expected = drafter.propose(alone[row], own, Limits((12,), (9,), num_forwards=FORWARDS[name]))
            assert_same_paths(paths_of(tree, row), paths_of(expected))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", BASELINES)
@torch.no_grad()
def test_a_prompt_in_chunks(name, rows, monkeypatch):
    monkeypatch.setattr("specblock_hf.drafters.common.block.PREFILL_PAIRS", 4)
    monkeypatch.setattr("specblock_hf.drafters.parallelspec.drafting.PREFILL_PAIRS", 4)
    assert PREFILL_PAIRS > 24  # what is compared with was not in chunks
    drafter, told = baseline(name), Told(2, 24)
    limits = Limits((12,) * rows, (9,) * rows, num_forwards=FORWARDS[name])

    def pairs(first, last):
        return pairs_for(drafter, told, first[:rows], last[:rows], range(rows))

    state = drafter.begin(told.table, rows, 24)
    drafter.extend(state, pairs((0, 0), (5, 2)))
    tree = drafter.propose(state, pairs((5, 2), (17, 4)), limits)
    monkeypatch.undo()
    whole = drafter.propose(drafter.begin(told.table, rows, 24), pairs((0, 0), (17, 4)), limits)
    for row in range(rows):
        assert_same_paths(paths_of(tree, row), paths_of(whole, row))


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_limits_bound_the_tree_and_the_work(name):
    drafter, told = baseline(name), Told(1, 12)
    for nodes, depth, forwards in ((0, 5, 3), (5, 0, 3), (1, 9, 1), (5, 1, 3), (7, 2, 3), (40, 99, 3)):
        state = drafter.begin(told.table, 1, 12)
        limits = Limits((nodes,), (depth,), num_forwards=forwards)
        tree = drafter.propose(state, pairs_for(drafter, told, (0,), (6,)), limits)
        full = {0: 0, 1: 3}.get(depth, 99 if name == "falcon_drafter" else 3 + 9 + 27)
        assert int(tree.num_nodes[0]) - 1 == min(nodes, full)
        assert int(tree.depths().max()) <= depth
        assert state.calls <= (forwards if name == "falcon_drafter" else 1)
    assert int(tree.depths().max()) == DEPTH[name]
    assert tree.tokens[0, 0] == told.tokens[0, 6]
    assert set(tree.tokens[0, 1:].tolist()) <= set(drafter.draft_to_target.tolist())


@pytest.mark.parametrize("name", NEW)
@torch.no_grad()
def test_rows_have_limits_of_their_own(name):
    drafter, told = baseline(name), Told(3, 12)
    limits = Limits((9, 4, 0), (2, 9, 9), num_forwards=FORWARDS[name])
    tree = drafter.propose(drafter.begin(told.table, 3, 12), pairs_for(drafter, told, (0,) * 3, (6, 5, 4)), limits)
    assert tree.num_nodes.tolist()[1:] == [5, 1] and 1 < tree.num_nodes[0] <= 10
    assert tree.depths()[0].max() == 2


@pytest.mark.parametrize("attention", ["eager", CHUNKED])
@pytest.mark.parametrize("name", ("parallelspec", "falcon_drafter"))
@torch.no_grad()
def test_every_attention_backend_drafts_the_same(name, attention):
    drafter, told = baseline(name), Told(2, 12)
    limits = Limits((12,) * 2, (9,) * 2, num_forwards=FORWARDS[name])
    trees = []
    for backend in ("sdpa", attention):
        drafter.set_attn_implementation(backend)
        pairs = pairs_for(drafter, told, (0, 0), (7, 4))
        trees.append(drafter.propose(drafter.begin(told.table, 2, 12), pairs, limits))
    for row in range(2):
        assert_same_paths(paths_of(trees[0], row), paths_of(trees[1], row))


@pytest.mark.parametrize("name", NEW)
def test_an_oracle_is_accepted(llama, name):
    """Told what comes, the drafter's best tokens are kept as deep as it reaches."""
    text = llama.generate(prompt_of(7), max_new_tokens=26, do_sample=False)[0].tolist()

    class Oracle(drafter_kinds()[name]):
        def propose(self, state, pairs, limits):
            self.root, self.forwards = int(pairs.positions[0, int(pairs.lengths[0]) - 1]) + 1, 0
            return super().propose(state, pairs, limits)

        def best_tokens(self, hidden, width):
            tokens, log_probs = super().best_tokens(hidden, width)
            first = self.root + 1 + self.forwards * hidden.shape[2]
            coming = (text + [0] * 20)[first : first + hidden.shape[2]]
            self.forwards += 1
            # The path that is right goes on from the first start; what it displaces may not come twice.
            right = torch.tensor(coming)[None, None, :, None]
            others = torch.where(tokens == right, (right + 1) % VOCAB, tokens)[..., 1:]
            log_probs[..., 0] = -0.01
            return torch.cat([right.expand_as(tokens[..., :1]), others], -1), log_probs

    drafter = baseline(name, base=Oracle)
    drafter.drafting_plan = DraftingPlan(40, FORWARDS[name])
    output = llama.generate(prompt_of(7), max_new_tokens=26, do_sample=False, assistant_model=drafter)
    assert output[0].tolist() == text
    accepted, left = drafter.last_statistics.accepted, 25  # the first token is the prompt's
    for kept in accepted:
        assert kept == min(DEPTH[name], left - 1)
        left -= kept + 1


@pytest.mark.parametrize("name", NEW)
def test_saved_and_loaded(name, tmp_path, llama):
    drafter = baseline(name)
    drafter.config.acceptance = [[8, 1, 0, 1.5, 1.75], [12, 2, 4, 2.0, 2.25]]
    drafter.save_pretrained(tmp_path)
    loaded = [
        drafter_kinds()[name].from_pretrained(tmp_path),
        AutoDrafter.from_pretrained(tmp_path, target=llama),
        AutoModel.from_pretrained(tmp_path),
    ]
    for other in loaded:
        assert type(other) is drafter_kinds()[name]
        assert other.feature_layers == drafter.feature_layers
        for (key, ours), theirs in zip(drafter.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs), key
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(drafter.config)
    papers = {"medusa": "2401.10774", "parallelspec": "2410.05589", "falcon_drafter": "2412.12639"}
    assert f"https://huggingface.co/papers/{papers[name]})." in (tmp_path / "README.md").read_text()
    assert loaded[0].acceptance() == [(DraftingPlan(8, 1), 1.5), (DraftingPlan(12, 2, 4), 2.0)]
    assert [tau for _, tau in loaded[0].acceptance(with_lookup=True)] == [1.75, 2.25]
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        AutoDrafter.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", BASELINES)
def test_at_most_45_megabytes_for_the_default_target(name):
    """With the geometry of SmolLM2-135M."""
    target = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    kind = drafter_kinds()[name]
    with torch.device("meta"):
        drafter = kind(kind.config_class.for_target(target, draft_vocab_size=16384))
    megabytes = 2 * sum(weight.numel() for weight in drafter.parameters()) / 1e6
    assert 15 < megabytes <= 45


@pytest.mark.parametrize("name", NEW)
def test_a_drafter_for_another_target_is_refused(name, llama):
    for fields, what in (({"vocab_size": 40}, "vocabulary is 40"), ({"target_num_layers": 6}, "layers is 6")):
        with pytest.raises(ValueError, match=what):
            llama.generate(prompt_of(5), max_new_tokens=4, assistant_model=baseline(name, **fields))


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("medusa", {"block_size": 0}, "^block_size is 0; at least one token"),
        ("medusa", {"tree_width": 0}, "^tree_width is 0; "),
        ("medusa", {"feature_layers": [1, 2]}, r"^feature_layers is \[1, 2\]; a medusa drafter reads one state"),
        ("medusa", {"target_hidden_size": 64}, "^The target's states are 64 wide and the drafter's 32; "),
        ("medusa", {"draft_vocab_size": 33}, r"^draft_vocab_size \(33\) is larger than the target's vocab_size"),
        ("parallelspec", {"block_size": 1}, "^block_size is 1; a group has at least one mask"),
        ("parallelspec", {"tree_width": 0}, "^tree_width is 0; "),
        ("parallelspec", {"num_hidden_layers": 2}, "^A ParallelSpec drafter has one layer"),
        ("parallelspec", {"target_hidden_size": 64}, "^The target's states are 64 wide"),
        ("falcon_drafter", {"block_size": 1}, "^block_size is 1; the rows of a block look at each other"),
        ("falcon_drafter", {"num_hidden_layers": 2}, "^A Falcon drafter has one attention layer"),
        ("falcon_drafter", {"rank_weights": [0.5, 0.6]}, r"^rank_weights is \[0.5, 0.6\]; "),
        ("falcon_drafter", {"rank_weights": [0.02] * 25}, "^rank_weights has 25 entries but draft_vocab_size is 24"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(name, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        baseline(name, **fields)


@pytest.mark.parametrize("name", ("medusa", "falcon_drafter"))
def test_the_last_state_is_the_one_that_the_head_reads(name, llama):
    assert baseline(name).feature_layers == (4,)
    unrecorded = baseline(name, target_num_layers=None)
    assert unrecorded.feature_layers == (-1,) and unrecorded.feature_layers_for(llama) == (4,)


@pytest.mark.parametrize("name", BASELINES)
def test_every_weight_is_trained(name):
    drafter, told = baseline(name).train(), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    out = drafter.loss(batch, generator=torch.Generator().manual_seed(0))
    out["loss"].backward()
    for key, weight in drafter.named_parameters():
        assert weight.grad is not None and weight.grad.abs().max() > 0, key
    assert [p.shape for p in drafter.parameters_of("head")] == [(DRAFT_VOCAB, 32)]
    assert len(drafter.parameters_of("full")) == len(list(drafter.parameters()))


@pytest.mark.parametrize("name", BASELINES)
def test_only_answers_are_learned(name):
    """What the target says outside of the answers and the tokens behind the texts do not matter."""
    drafter, told = baseline(name), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)

    def loss(of):
        return drafter.loss(of, generator=torch.Generator().manual_seed(0))

    out = loss(batch)
    padding = (torch.arange(20) >= torch.tensor(LENGTHS)[:, None])[..., None]
    other = replace(
        batch,
        top_ids=torch.where(batch.scored[..., None], batch.top_ids, (batch.top_ids + 3) % DRAFT_VOCAB),
        top_probs=torch.where(batch.scored[..., None], batch.top_probs, 0.9),
        embeds=torch.where(padding, 40.0, batch.embeds),
        features=torch.where(padding, -40.0, batch.features),
    )
    torch.testing.assert_close(loss(other)["loss"], out["loss"])
    assert loss(other)["counted"].tolist() == out["counted"].tolist() and out["counted"].sum() > 0
    moved = replace(batch, top_probs=batch.top_probs.flip(-1))
    assert not torch.equal(loss(moved)["loss"], out["loss"])
    nothing = loss(replace(batch, scored=torch.zeros_like(batch.scored)))
    assert nothing["loss"].item() == 0 and nothing["counted"].sum() == 0


@pytest.mark.parametrize("name", BASELINES)
def test_an_objective_draws_from_its_generator_alone(name):
    drafter, told = baseline(name).train(), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    losses = []
    for _ in range(2):
        before = torch.random.get_rng_state()
        out = drafter.loss(batch, progress=0.0, generator=torch.Generator().manual_seed(4))
        losses.append(out["loss"].item())
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(1)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", BASELINES)
def test_training_steps_lower_the_loss(name):
    drafter, told = baseline(name).train(), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    optimizer = torch.optim.AdamW(drafter.parameters_of("full"), lr=3e-3)
    losses = []
    for _ in range(25):
        out = drafter.loss(batch, generator=torch.Generator().manual_seed(0))
        losses.append(out["loss"].item())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", BASELINES)
def test_mixed_precision(name):
    drafter, told = baseline(name).train(), Told(3, 20)
    batch = batch_for(drafter, told, LENGTHS, STARTS)
    whole = drafter.loss(batch, generator=torch.Generator().manual_seed(0))["loss"]
    half = replace(batch, features=batch.features.bfloat16(), embeds=batch.embeds.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        out = drafter.loss(half, generator=torch.Generator().manual_seed(0))
    out["loss"].backward()
    assert abs(out["loss"].item() / whole.item() - 1) < 0.1
    assert all(weight.grad.dtype == torch.float32 for weight in drafter.parameters())


@pytest.mark.parametrize(
    ("name", "rows"), [("eagle3", 6 + 3 * 3), ("medusa", 1), ("parallelspec", 6), ("falcon_drafter", 6 + 2 + 2)]
)
@torch.no_grad()
def test_rows_of_the_drafters_forwards_are_counted(name, rows):
    """Committed pairs and starts; what a pair or start adds in slots is the drafter's own affair."""
    drafter, told = baseline(name), Told(2, 12)
    state = drafter.begin(told.table, 1, 12)
    limits = Limits((40,), (9,), num_forwards=FORWARDS[name], max_starts={"falcon_drafter": 2}.get(name))
    drafter.propose(state, pairs_for(drafter, told, (0,), (6,), rows=[0]), limits)
    assert state.forward_rows == rows
    both = drafter.begin(told.table, 2, 12)
    limits = replace(limits, nodes=(40, 40), depth=(9, 9))
    drafter.propose(both, pairs_for(drafter, told, (0, 0), (6, 6)), limits)
    assert both.forward_rows == 2 * rows


def test_what_was_heard_is_what_was_drafted():
    """The helper of the tests of training against drafting."""
    drafter = baseline("medusa", base=listening("medusa"))
    tiny_target("llama").generate(prompt_of(3), max_new_tokens=3, assistant_model=drafter)
    assert len(drafter.heard) == drafter.last_statistics.rounds - 1  # nothing is drafted for the last token

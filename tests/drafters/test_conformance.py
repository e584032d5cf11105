# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The network against tensors computed by the authors' own code (`fixtures/conformance`, float32)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from specblock_hf.drafters.auto import AutoDrafter
from specblock_hf.drafters.common.cache import BlockPath, GraphCache
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.trees.expansion import Starts


FIXTURES = Path(__file__).parents[1] / "fixtures" / "conformance"
TOLERANCE = 5e-5  # absolute, as the fixtures state it; values are of order 1 to 10
NAMES = ("specblock_a", "specblock_b")


class Golden:
    """A drafter with a golden checkpoint's weights, its inputs and what the authors' code made of them."""

    def __init__(self, name: str):
        folder = FIXTURES / name
        self.drafter = AutoDrafter.from_pretrained(folder / "checkpoint").eval()
        self.inputs = load_file(folder / "inputs.safetensors")
        self.expected = load_file(folder / "expected.safetensors")
        self.dims = json.loads((folder / "expected.json").read_text())["dims"]
        embedding = torch.nn.Embedding.from_pretrained(self.inputs["target_embed_tokens.weight"])
        self.table = TokenTable(embedding, torch.nn.Identity(), self.drafter.config.vocab_size)
        self.worst = 0.0

    def check(self, prefix: str, hidden: torch.Tensor) -> None:
        """Compare states and both heads with the golden tensors below `prefix`, printing each error."""
        normed, logits = self.drafter.draft_logits(hidden)
        made = {"hidden": hidden, "logits": logits}
        for name, top in (("rank_logits", 20), ("rank_logits_top20feat", 20), ("rank_logits_top10feat", 10)):
            made[name] = self.drafter.rank_logits(normed, logits.topk(top).values)
        compared = [name for name in made if f"{prefix}/{name}" in self.expected]
        assert len(compared) >= 2, prefix
        for name in compared:
            error = (made[name] - self.expected[f"{prefix}/{name}"]).abs().max().item()
            print(f"{prefix}/{name}: max abs error {error:.1e}")
            assert error <= TOLERANCE

    def pairs(self, first: int, last: int, row: int = 0) -> Pairs:
        """Committed pairs `first` to `last - 1` of one row of the inputs."""
        width = self.drafter.config.target_hidden_size
        hidden = self.inputs["target_hidden"][row : row + 1, first:last]
        return Pairs(
            tokens=self.inputs["tokens"][row : row + 1, first + 1 : last + 1],
            features=hidden.split(width, dim=-1),
            positions=torch.arange(first, last)[None],
            lengths=torch.tensor([last - first]),
            table=self.table,
        )


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> Golden:
    return Golden(request.param)


def first_block(golden: Golden, cache: GraphCache) -> torch.Tensor:
    tokens, features = golden.inputs["tokens"], golden.inputs["target_hidden"]
    positions = torch.arange(features.shape[1]).expand(len(tokens), -1)
    embeds = golden.table.embed(tokens[:, 1:])
    return golden.drafter(embeds, golden.drafter.project_features(features), positions, cache=cache)


def training_mask(path: BlockPath, pairs: int, size: int) -> torch.BoolTensor:
    """The release's training mask: a later block also sees its own block's keys of earlier pairs."""
    mask = path.mask(pairs * size).clone()
    own = torch.arange(pairs * size)
    mask[..., -pairs * size :] = own[:, None] >= own
    return mask


@torch.no_grad()
def test_training_forward(golden):
    size, pairs = golden.drafter.config.block_size, golden.dims["S"]
    tokens = golden.inputs["tokens"]
    rows = torch.arange(pairs).expand(len(tokens), -1)
    hidden = first_block(golden, GraphCache(golden.dims["layers"]))
    golden.check("train/block1", hidden)
    shifted = {}
    for cut in range(1, size + 1):
        cache = GraphCache(golden.dims["layers"])
        hidden = first_block(golden, cache)
        path = BlockPath(rows * size + cut, size)
        embeds = golden.table.embed(tokens[:, (torch.arange(pairs) + cut).clamp_max(pairs - 1) + 1])
        shifted[cut] = golden.drafter(embeds, hidden[:, :, cut - 1], rows, training_mask(path, pairs, size), cache)
        golden.check(f"train/block2_cut{cut}", shifted[cut])
        if cut == golden.dims["cuts"][0]:
            second = golden.dims["cuts"][1]
            path = path.step(rows, torch.full_like(rows, second - 1))
            embeds = golden.table.embed(tokens[:, (torch.arange(pairs) + cut + second).clamp_max(pairs - 1) + 1])
            third = golden.drafter(
                embeds, shifted[cut][:, :, second - 1], rows, training_mask(path, pairs, size), cache
            )
            golden.check(f"train/block3_cuts{cut}_{second}", third)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 2])
def test_incremental_drafting(golden, chunk):
    """
    The very methods that `propose` calls: committed pairs in steps of 1, 3 and 2, then later blocks from many
    starts.
    """
    drafter = golden.drafter
    state = drafter.begin(golden.table, 1, 4)  # room for less than will come: the cache has to grow
    prefix = golden.dims["P"]
    if chunk:
        for first in range(0, prefix, chunk):
            drafter.extend(state, golden.pairs(first, min(first + chunk, prefix)))
    else:
        drafter.extend(state, golden.pairs(0, prefix))
    done = prefix
    for step, count in enumerate((1, 3, 2)):
        pairs = golden.pairs(done, done + count)
        done += count
        _, hidden, position = drafter._first_block(state, pairs)
        assert position.item() == done - 1
        golden.check(f"infer/step{step}/block1", hidden[0])
        first_width = state.cache.width
        assert first_width == done * drafter.config.block_size

        given = golden.inputs[f"infer/step{step}/block2_starts"]
        starts = Starts(torch.ones(1, len(given)), torch.zeros(1, len(given), dtype=torch.long), *given.T[:, None])
        path = drafter._path_to(starts, None, state)
        second = drafter._later_block(state, hidden, starts, path, position, first_width)
        golden.check(f"infer/step{step}/block2", second[0])

        given = golden.inputs[f"infer/step{step}/block3_starts"]
        starts = Starts(torch.ones(1, len(given)), *given.T[:, None])
        path = drafter._path_to(starts, path, state)
        third = drafter._later_block(state, second, starts, path, position, first_width)
        golden.check(f"infer/step{step}/block3", third[0])

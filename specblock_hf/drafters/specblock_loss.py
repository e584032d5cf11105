# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
The SpecBlock objective: valid-prefix masked cross-entropy over blocks and slots, and the rank head's (section
3.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..modeling_specblock import BlockPath, GraphCache
from ..training.objective import TargetBatch, rank_buckets, rank_cross_entropy, soft_cross_entropy


if TYPE_CHECKING:
    from .specblock import SpecBlockDrafter


SLOT_DECAY = 0.8


@dataclass
class TrainingBlock:
    """
    The rows of one training block, R of them for each of B texts.

    Args:
        hidden (`torch.Tensor` of shape `[B, R, K, d]`): What the forward returned.
        pairs (`torch.LongTensor` of shape `[B, R]`): The committed pair i that a row hangs on.
        shift (`int`): Tokens of the text between the pair and the row's own token: the cuts so far.
        valid (`torch.BoolTensor` of shape `[B, R]`): False for padding rows.
        path (`BlockPath`): How the rows hang on the committed pairs; `None` in the first block.
    """

    hidden: torch.Tensor
    pairs: torch.LongTensor
    shift: int
    valid: torch.BoolTensor
    path: BlockPath | None = None


def specblock_loss(
    drafter: SpecBlockDrafter,
    batch: TargetBatch,
    num_blocks: int,
    rank_weight: float,
    cuts: list[int],
    starts_share: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """
    The objective on one batch.

    Only surviving rows are computed: a later block starts where every slot before its cut guessed right, because only
    there can a
    tree that is being verified have reached it; a slot goes through the head only while its chain is alive.

    Args:
        drafter ([`SpecBlockDrafter`]): The drafter.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        num_blocks (`int`): Blocks that are trained.
        rank_weight (`float`): Weight of the rank head's loss; 0 skips it.
        cuts (`list[int]`): Cut M of every transition from a block to the next, each from 1 to K.
        starts_share (`float`, *optional*, defaults to 1.0): Share of a later block's starts that are trained.
        generator (`torch.Generator`, *optional*): Draws them.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, `draft_loss`, `rank_loss`, and without gradient `agreed` and `counted` of
        shape
        `[blocks, K]`: surviving rows whose guess is the text's token, and surviving rows.
    """
    cache = GraphCache(drafter.config.num_hidden_layers)
    block = _first_block(drafter, batch, cache)
    alive = block.valid
    draft_loss = block.hidden.new_zeros((), dtype=torch.float32)
    rank_loss = draft_loss.clone()
    agreed, counted = [], []
    for number in range(num_blocks):
        if number > 0:
            if starts_share < 1:
                alive = alive & (torch.rand(alive.shape, generator=generator).to(alive.device) < starts_share)
            block = _later_block(drafter, batch, cache, block, alive, cuts[number - 1])
        scores = _score_block(drafter, batch, block, rank_weight > 0, cuts[number] if number < len(cuts) else 0)
        first = scores["counted"][0].clamp_min(1)
        decay = SLOT_DECAY ** torch.arange(len(scores["draft"]), device=first.device)
        # Every slot is divided by the number of first slots, not by its own survivors: the mean is the paper's
        # expectation, and
        # a late slot with one survivor weighs as little as its noise deserves.
        draft_loss = draft_loss + (scores["draft"] * decay).sum() / first
        rank_loss = rank_loss + scores["rank"].sum() / first
        agreed.append(scores["agreed"])
        counted.append(scores["counted"])
        alive = scores["alive"]
    return {
        "loss": draft_loss + rank_weight * rank_loss,
        "draft_loss": draft_loss,
        "rank_loss": rank_loss,
        "agreed": torch.stack(agreed),
        "counted": torch.stack(counted),
    }


def _first_block(drafter: SpecBlockDrafter, batch: TargetBatch, cache: GraphCache) -> TrainingBlock:
    pairs = torch.arange(batch.tokens.shape[1] - 1, device=batch.tokens.device).expand(len(batch.tokens), -1)
    conditions = drafter.project_features(batch.features[:, :-1])
    hidden = drafter(batch.embeds[:, 1:], conditions, pairs, cache=cache)
    return TrainingBlock(hidden, pairs, 0, pairs < batch.lengths[:, None] - 1)


def _later_block(
    drafter, batch: TargetBatch, cache: GraphCache, before: TrainingBlock, alive: torch.BoolTensor, cut: int
) -> TrainingBlock:
    shift, size, last = before.shift + cut, drafter.config.block_size, batch.tokens.shape[1] - 1
    # A row starts where the token that its first slot is about is still part of the answer.
    wanted = before.pairs + shift + 2
    starts = alive & (wanted < batch.lengths[:, None]) & batch.scored.gather(1, wanted.clamp_max(last))
    width = max(int(starts.sum(-1).max()), 1)
    # A stable sort brings each text's starts to the front in their order; what remains is padding.
    rows = starts.int().sort(dim=-1, descending=True, stable=True).indices[:, :width]
    pairs = before.pairs.gather(1, rows)
    if before.path is None:
        path = BlockPath(visible=pairs * size + cut)
    else:
        path = before.path.step(rows, torch.full_like(rows, cut - 1), before.pairs.shape[1])
    places = (pairs + shift + 1).clamp_max(last)
    conditions = before.hidden[:, :, cut - 1].gather(1, rows[..., None].expand(-1, -1, before.hidden.shape[-1]))
    embeds = batch.embeds.gather(1, places[..., None].expand(-1, -1, batch.embeds.shape[-1]))
    mask = path.mask((batch.tokens.shape[1] - 1) * size, size)
    hidden = drafter(embeds, conditions, pairs, attention_mask=mask, cache=cache)
    return TrainingBlock(hidden, pairs, shift, starts.gather(1, rows), path)


def _score_block(drafter, batch: TargetBatch, block: TrainingBlock, rank: bool, cut: int) -> dict[str, torch.Tensor]:
    """
    Sums over surviving rows of every slot, and the rows whose chain is right up to `cut` (that slot itself may
    err).
    """
    alive, survivors = block.valid, block.valid
    last = batch.tokens.shape[1] - 1
    sums: dict[str, list] = {"draft": [], "rank": [], "agreed": [], "counted": []}
    for slot in range(drafter.config.block_size):
        places = block.pairs + block.shift + 2 + slot
        inside = places < batch.lengths[:, None]
        places = places.clamp_max(last)
        alive = alive & inside & batch.scored.gather(1, places)
        if slot + 1 == cut:
            survivors = alive
        row, column = (alive & batch.counted.gather(1, places)).nonzero(as_tuple=True)
        place = places[row, column]
        normed, logits = drafter.draft_logits(block.hidden[row, column, slot])
        ids = batch.top_ids[row, place]
        sums["draft"].append(soft_cross_entropy(logits, ids, batch.top_probs[row, place]).sum())
        if rank:
            buckets = rank_buckets(logits.detach(), ids[:, 0])
            rank_logits = drafter.rank_logits(normed, logits.detach().topk(drafter.config.rank_top_k, -1).values)
            sums["rank"].append(rank_cross_entropy(rank_logits, buckets).sum())
        else:
            sums["rank"].append(logits.new_zeros((), dtype=torch.float32))
        guess = drafter.draft_to_target[logits.detach().argmax(-1)]
        right = guess == batch.tokens[row, place]
        sums["agreed"].append(right.sum())
        sums["counted"].append(torch.tensor(len(row), device=right.device))
        alive = torch.zeros_like(alive).index_put((row, column), right)
    return {name: torch.stack(values) for name, values in sums.items()} | {"alive": survivors}

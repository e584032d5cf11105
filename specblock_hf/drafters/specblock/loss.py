# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The SpecBlock objective: valid-prefix masked cross-entropy over blocks and slots, and the rank head's (section
3.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ...drafting.target_batch import TargetBatch
from ..common.cache import BlockPath, GraphCache, OpenBlock
from ..common.losses import soft_cross_entropy
from .rank_loss import ordinal_rank_loss, rank_buckets, rank_cross_entropy


if TYPE_CHECKING:
    from .drafting import SpecBlockDrafter


@dataclass(frozen=True)
class SpecBlockObjective:
    """
    What may be chosen about the objective. Defaults are what measured better where that is known, and the paper's
    elsewhere.

    Args:
        num_blocks (`int`, *optional*, defaults to 3): Blocks that are trained (paper: 3); 1 leaves cross-block
            training out.
        starts_share (`float`, *optional*, defaults to 1.0): Share of a later block's possible starts that are trained.
        rank_weight (`float`, *optional*, defaults to 1.0): Weight of the rank head's loss; 0 skips it.
        join_at (`float`, *optional*, defaults to 0.1): Share of the run's steps before the rank head and later blocks
            join.
        slot_decay (`float`, *optional*, defaults to 0.8): Slot k counts this to the power of k.
        valid_prefix (`bool`, *optional*, defaults to `True`):
            Leave out slots after a wrong guess, and blocks that a tree under verification cannot have reached (section
            3.3); without it every place of an answer counts in every slot.
        prefix_width (`int`, *optional*, defaults to 1):
            A slot comes after a right guess if the text's token is among so many of the likeliest: 1 is the paper's
            greedy chain, more also trains what comes below the alternatives of a tree, which only a drafter with a
            Markov term can tell apart. Counts of right guesses are of a block's greedy chain all the same.
        slot_mean (`str`, *optional*, defaults to `"first"`):
            What a slot's sum is divided by: the rows of the block's `"first"` slot, so that the mean is the paper's
            expectation, or its own `"survivors"` as in the authors' release.
        rank_loss (`str`, *optional*, defaults to `"plain"`):
            `"plain"` cross-entropy, or `"release"`: rare buckets reweighted, ordinal smoothing, distance weights.
        earlier_keys (`bool`, *optional*, defaults to `False`):
            Later blocks also see their own block's keys of earlier positions, as in the release's training and
            unlike any drafting.
        release (`bool`, *optional*, defaults to `False`):
            The authors' released objective to the letter, see [`release_loss`]; of the above only `num_blocks`,
            `rank_weight`, `join_at` and `slot_decay` matter then.
    """

    num_blocks: int = 3
    starts_share: float = 1.0
    rank_weight: float = 1.0
    join_at: float = 0.1
    slot_decay: float = 0.8
    valid_prefix: bool = True
    prefix_width: int = 1
    slot_mean: str = "first"
    rank_loss: str = "plain"
    earlier_keys: bool = False
    release: bool = False

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ValueError(
                f"num_blocks is {self.num_blocks}; at least the first block is trained, so give 1 or more."
            )
        if self.prefix_width < 1:
            raise ValueError(
                f"prefix_width is {self.prefix_width}; a prefix holds likeliest tokens, so give 1 or more."
            )
        for name, known in (("slot_mean", ("first", "survivors")), ("rank_loss", ("plain", "release"))):
            if vars(self)[name] not in known:
                raise ValueError(f"{name} is {vars(self)[name]!r}; known are {' and '.join(known)}.")

    def at(self, progress: float) -> SpecBlockObjective:
        """The objective at a share of the run: the first block alone, and then all of it."""
        return self if progress >= self.join_at else replace(self, num_blocks=1, rank_weight=0.0)


@dataclass
class TrainingBlock:
    """
    The rows of one training block, R of them for each of B texts.

    Args:
        opened (`OpenBlock`): The network's part, whose states are read where they are wanted.
        pairs (`torch.LongTensor` of shape `[B, R]`): The committed pair i that a row hangs on.
        shift (`int`): Tokens of the text between the pair and the row's own token: the cuts so far.
        valid (`torch.BoolTensor` of shape `[B, R]`): False for padding rows.
        path (`BlockPath`): How the rows hang on the committed pairs; `None` in the first block.
    """

    opened: OpenBlock
    pairs: torch.LongTensor
    shift: int
    valid: torch.BoolTensor
    path: BlockPath | None = None

    def states(self, drafter: SpecBlockDrafter) -> torch.Tensor:
        """The states `[B, R, K, d]` of all slots of all rows."""
        shape = (*self.pairs.shape, drafter.config.block_size)
        everything = torch.ones(shape, dtype=torch.bool, device=self.pairs.device)
        states = drafter.read_slots(self.opened, *everything.nonzero(as_tuple=True))
        return states.view(*shape, -1)


def specblock_loss(
    drafter: SpecBlockDrafter,
    batch: TargetBatch,
    objective: SpecBlockObjective,
    cuts: list[int],
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """
    The objective on one batch.

    Only surviving rows are computed: a later block starts where every slot before its cut guessed right, because only
    there can a
    tree that is being verified have reached it; a slot goes through the last layer and the head only while its chain
    is alive.

    Args:
        drafter ([`SpecBlockDrafter`]): The drafter.
        batch ([`TargetBatch`]): Texts and the target's view of them.
        objective ([`SpecBlockObjective`]): What is trained, and how it is weighed.
        cuts (`list[int]`): Cut M of every transition from a block to the next, each from 1 to K.
        generator (`torch.Generator`, *optional*): Draws the share of the later starts.

    Returns:
        `dict[str, torch.Tensor]`: `loss`, `draft_loss`, `rank_loss`, and the counts `agreed` and `counted` of shape
        `[blocks, K]` and `rank_confusion` of shape `[buckets, buckets]`; see [`TreeDrafter.loss`].
    """
    cache, last = GraphCache(drafter.config.num_hidden_layers), batch.tokens.shape[1] - 1
    block = first_block(drafter, batch, cache)
    alive, conditions = block.valid, None
    blocks = []
    for number in range(objective.num_blocks):
        if number > 0:
            if objective.starts_share < 1:
                draws = torch.rand(alive.shape, generator=generator, device="cpu").to(alive.device)
                alive = alive & (draws < objective.starts_share)
            # Where the token that the next block's first slot is about is still part of the answer.
            wanted = block.pairs + block.shift + cuts[number - 1] + 2
            inside = (wanted < batch.lengths[:, None]) & batch.scored.gather(1, wanted.clamp_max(last))
            starts = alive & inside
            block = later_block(
                drafter, batch, cache, block, starts, conditions, cuts[number - 1], objective.earlier_keys
            )
        cut = cuts[number] if number < len(cuts) else 0
        scores, alive, conditions = _score_block(drafter, batch, block, objective, cut)
        blocks.append(scores)
    sums = {name: torch.stack([scores[name] for scores in blocks]) for name in blocks[0]}
    # Divided by the first slots, the mean is the paper's expectation, and a late slot with one survivor weighs as
    # little as its noise deserves.
    first = sums["counted"][:, :1].clamp_min(1)
    rows = first if objective.slot_mean == "first" else sums["rows"].clamp_min(1)
    decay = objective.slot_decay ** torch.arange(drafter.config.block_size, device=first.device)
    draft_loss = (sums["draft"] / rows * decay).sum()
    plain = objective.rank_loss == "plain"
    rank_loss = (sums["rank"] / (first if plain else sums["rank_weights"].sum(-1, keepdim=True).clamp_min(1e-6))).sum()
    return weighed(draft_loss, rank_loss, sums, objective)


def weighed(
    draft_loss: torch.Tensor, rank_loss: torch.Tensor, sums: dict[str, torch.Tensor], objective: SpecBlockObjective
) -> dict[str, torch.Tensor]:
    """What [`TreeDrafter.loss`] returns, of both losses and the sums of all slots of all blocks."""
    return {
        "loss": draft_loss + objective.rank_weight * rank_loss,
        "draft_loss": draft_loss,
        "rank_loss": rank_loss,
        "agreed": sums["agreed"],
        "counted": sums["counted"],
        "rank_confusion": sums["confusion"].sum((0, 1)),
    }


def first_block(drafter: SpecBlockDrafter, batch: TargetBatch, cache: GraphCache) -> TrainingBlock:
    """The block that starts at every committed pair."""
    pairs = torch.arange(batch.tokens.shape[1] - 1, device=batch.tokens.device).expand(len(batch.tokens), -1)
    conditions = drafter.project_features(batch.features[:, :-1])
    opened = drafter(batch.embeds[:, 1:], conditions, pairs, None, cache, opens=True)
    return TrainingBlock(opened, pairs, 0, pairs < batch.lengths[:, None] - 1)


def later_block(
    drafter: SpecBlockDrafter,
    batch: TargetBatch,
    cache: GraphCache,
    before: TrainingBlock,
    starts: torch.BoolTensor,
    conditions: torch.Tensor,
    cut: int,
    earlier_keys: bool,
) -> TrainingBlock:
    """
    A block that continues rows of another one after its slot `cut - 1`.

    Args:
        drafter ([`SpecBlockDrafter`]): The drafter.
        batch ([`TargetBatch`]): The texts.
        cache (`GraphCache`): Holds the keys of all blocks so far.
        before (`TrainingBlock`): The block to continue.
        starts (`torch.BoolTensor` of shape `[B, R]`): Which of its rows are continued.
        conditions (`torch.Tensor` of shape `[B, R, d]`): The states of its slot `cut - 1` in those rows.
        cut (`int`): Slots that are kept of it.
        earlier_keys (`bool`): See [`SpecBlockObjective`].
    """
    shift, size, last = before.shift + cut, drafter.config.block_size, batch.tokens.shape[1] - 1
    width = max(int(starts.sum(-1).max()), 1)
    # A stable sort brings each text's starts to the front in their order; what remains is padding.
    rows = starts.int().sort(dim=-1, descending=True, stable=True).indices[:, :width]
    pairs = before.pairs.gather(1, rows)
    if before.path is None:
        path = BlockPath(pairs * size + cut, size)
    else:
        path = before.path.step(rows, torch.full_like(rows, cut - 1))
    places = (pairs + shift + 1).clamp_max(last)
    conditions = conditions.gather(1, rows[..., None].expand(-1, -1, conditions.shape[-1]))
    embeds = batch.embeds.gather(1, places[..., None].expand(-1, -1, batch.embeds.shape[-1]))
    mask = path.mask((batch.tokens.shape[1] - 1) * size)
    valid = starts.gather(1, rows)
    if earlier_keys:
        earlier = (pairs[:, :, None] > pairs[:, None]) & valid[:, None]
        mask[..., -width * size :] |= earlier.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
    opened = drafter(embeds, conditions, pairs, mask, cache, opens=True)
    return TrainingBlock(opened, pairs, shift, valid, path)


def _score_block(
    drafter: SpecBlockDrafter, batch: TargetBatch, block: TrainingBlock, objective: SpecBlockObjective, cut: int
) -> tuple[dict[str, torch.Tensor], torch.BoolTensor, torch.Tensor | None]:
    """
    Sums over surviving rows of every slot, the rows `[B, R]` whose chain is right up to `cut` (that slot itself may
    err), and their states `[B, R, d]` of that slot.
    """
    alive, survivors, conditions = block.valid, block.valid, None
    chain = alive  # where the greedy chain is
    last = batch.tokens.shape[1] - 1
    slots = []
    for slot in range(drafter.config.block_size):
        places = block.pairs + block.shift + 2 + slot
        inside = places < batch.lengths[:, None]
        places = places.clamp_max(last)
        reached = alive & inside & batch.scored.gather(1, places)
        row, column = reached.nonzero(as_tuple=True)
        states = drafter.read_slots(block.opened, row, column, slot)
        if slot + 1 == cut:
            survivors = reached
            conditions = states.new_zeros(*reached.shape, states.shape[-1]).index_put((row, column), states)
        counted = batch.counted[row, places[row, column]]
        row, column = row[counted], column[counted]
        place = places[row, column]
        before = batch.tokens[row, place - 1] if slot else None
        normed, logits = drafter.draft_logits(states[counted], before)
        best = logits.detach().topk(drafter.config.rank_top_k)
        ids = batch.top_ids[row, place]
        guesses = drafter.draft_to_target[best.indices[:, : objective.prefix_width]]
        hits = guesses == batch.tokens[row, place].unsqueeze(-1)
        right = hits[:, 0] & chain[row, column]
        sums = {
            "draft": soft_cross_entropy(logits, ids, batch.top_probs[row, place]).sum(),
            "agreed": right.sum(),
            "counted": chain[row, column].sum(),
            "rows": torch.tensor(len(row), device=right.device),
        }
        own = logits.detach().gather(-1, ids[:, :1]).squeeze(-1)
        slots.append(sums | _score_ranks(drafter, normed, best.values, own, objective))
        if objective.valid_prefix:
            alive = torch.zeros_like(alive).index_put((row, column), hits.any(-1))
            chain = torch.zeros_like(alive).index_put((row, column), right)
    return {name: torch.stack([sums[name] for sums in slots]) for name in slots[0]}, survivors, conditions


def _score_ranks(
    drafter: SpecBlockDrafter,
    normed: torch.Tensor,
    best: torch.Tensor,
    own: torch.Tensor,
    objective: SpecBlockObjective,
) -> dict[str, torch.Tensor]:
    """
    The rank head's loss, summed over rows, the rows' weights, and places by true and predicted bucket; from the
    largest logits `[n, rank_top_k]` and those of the target's tokens `[n]`.
    """
    classes = drafter.config.num_rank_classes
    if objective.rank_weight == 0:
        nothing = best.new_zeros((), dtype=torch.float32)
        confusion = torch.zeros(classes, classes, dtype=torch.long, device=best.device)
        return {"rank": nothing, "rank_weights": nothing, "confusion": confusion}
    buckets = rank_buckets(best, own)
    rank_logits = drafter.rank_logits(normed, best)
    if objective.rank_loss == "plain":
        losses = rank_cross_entropy(rank_logits, buckets)
        weights = torch.ones_like(losses)
    else:
        losses, weights = ordinal_rank_loss(rank_logits, buckets, torch.ones_like(buckets))
    pairs = buckets * classes + rank_logits.detach().argmax(-1)
    return {
        "rank": losses.sum(),
        "rank_weights": weights.sum(),
        "confusion": pairs.bincount(minlength=classes**2).view(classes, classes),
    }

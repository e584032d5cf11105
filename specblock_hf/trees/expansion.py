# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Growing a draft tree from the outputs of a drafter that predicts blocks of tokens. Knows no model.

A block is laid out as `[starts, slots, candidates]`, candidate 0 being the greedy token, and is appended to the tree
whole; what the rule does not want is padding. The same layout lists the candidates for the next block's starts. Shapes
thus follow from shapes alone and nothing is read back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .tree import DraftTree


Best = tuple[torch.Tensor, torch.Tensor]
"""Ids and log-probs of the likeliest tokens."""

Children = Callable[[int, torch.LongTensor, torch.LongTensor], Best]
"""
`children(level, rows, tokens)`: target ids and log-probs `[B, F, W]`, best first, below F nodes of a level, given the
row of
the forward `[B, F]` that each belongs to and its token `[B, F]`.
"""


@dataclass
class BlockOutputs:
    """
    What one drafter forward predicts: K slots below each of S starts.

    Args:
        tokens (`torch.LongTensor` of shape `[B, S, K, W]`): The W best target ids of every slot, best first.
        log_probs (`torch.Tensor` of shape `[B, S, K, W]`): Their log-probs over the whole draft vocabulary.
        rank_class (`torch.LongTensor` of shape `[B, S, K]`, *optional*):
            The rank bucket that the rank head predicts for the slot; only rank-guided growth asks for it.
    """

    tokens: torch.LongTensor
    log_probs: torch.Tensor
    rank_class: torch.LongTensor | None = None

    def children(self, width: int, after_alternatives: float = 0.0) -> Children:
        """
        The `width` best tokens of every slot, as [`best_first`] asks for them: the same below any token.

        Args:
            width (`int`): Children of a node.
            after_alternatives (`float`, *optional*, defaults to 0.0):
                Added to the log-probs of children of all tokens but the likeliest of the slot before: what a slot says
                is meant for that one if its network knows what its slots guess.
        """

        def children(level: int, rows: torch.LongTensor, tokens: torch.LongTensor) -> Best:
            picked = rows.unsqueeze(-1).expand(-1, -1, width)
            best = (self.tokens[:, :, level, :width], self.log_probs[:, :, level, :width])
            found, log_probs = best[0].gather(1, picked), best[1].gather(1, picked)
            if level and after_alternatives:
                alternative = tokens != self.tokens[:, :, level - 1, 0].gather(1, rows)
                log_probs = torch.add(log_probs, alternative.unsqueeze(-1), alpha=after_alternatives)
            return found, log_probs

        return children


def children_by_parent(
    logits: torch.Tensor,
    gains: Callable[[torch.LongTensor, torch.LongTensor | None], torch.Tensor],
    width: int,
    token_ids: torch.LongTensor,
    first_level: int = 0,
    candidates: int | None = None,
) -> Children:
    """
    The `width` best tokens below every node by logits of its slot and what they gain from the node's own token.

    Args:
        logits (`torch.Tensor` of shape `[B, S, K, D]`): Of every slot, whatever comes before.
        gains (`Callable`):
            Turns tokens before `[B, F]` and some logits' indices `[B, F, C]` (`None` for all D) into what those logits
            gain.
        width (`int`): Children of a node.
        token_ids (`torch.LongTensor` of shape `[D]`): The target id of every logit.
        first_level (`int`, *optional*, defaults to 0): The first slot whose logits gain something.
        candidates (`int`, *optional*):
            Only so many of a slot's largest logits gain something and become children, at a cost that does not depend
            on D; all other tokens keep their weight. All of them if not given.
    """
    ids, rest = None, logits.new_full(logits.shape[:3], -torch.inf, dtype=torch.float32)
    if candidates is not None and candidates < logits.shape[-1]:
        total = logits.float().logsumexp(-1)
        logits, ids = logits.topk(candidates, dim=-1)
        share = (logits.float().logsumexp(-1) - total).exp()
        rest = total + (1 - share).clamp_min(0).log()

    def children(level: int, rows: torch.LongTensor, tokens: torch.LongTensor) -> Best:
        index = rows.unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        picked = logits[:, :, level].gather(1, index)
        chosen = None if ids is None else ids[:, :, level].gather(1, index)
        if level >= first_level:
            picked = picked + gains(tokens, chosen)
        best = picked.topk(width, dim=-1)
        total = torch.logaddexp(picked.float().logsumexp(-1), rest[:, :, level].gather(1, rows))
        found = best.indices if chosen is None else chosen.gather(2, best.indices)
        return token_ids[found], best.values.float() - total.unsqueeze(-1)

    return children


@dataclass
class Starts:
    """
    Nodes that a drafter forward continues, one row of it each.

    Args:
        node (`torch.LongTensor` of shape `[B, S]`): Index in the tree; -2 for padding.
        parent_start (`torch.LongTensor` of shape `[B, S]`):
            Row of the previous forward that proposed the node, an index into the starts of that forward; 0 for the
            root.
        slot (`torch.LongTensor` of shape `[B, S]`): Slot of the previous forward that proposed it; -1 for the root.
        tokens (`torch.LongTensor` of shape `[B, S]`): The node's token; any valid id for padding.
    """

    node: torch.LongTensor
    parent_start: torch.LongTensor
    slot: torch.LongTensor
    tokens: torch.LongTensor

    @classmethod
    def root(cls, tree: DraftTree) -> Starts:
        """The first forward's only start: the root of each row."""
        tokens = tree.tokens[:, :1]
        zero = torch.zeros_like(tokens)
        return cls(node=zero, parent_start=zero, slot=zero - 1, tokens=tokens)


@dataclass(frozen=True)
class Branching:
    """
    How many children a slot gets (section 3.2 of the paper; probability cuts and the reach of a give-up as in the
    authors' release).

    Args:
        children (`tuple[int, ...]`, *optional*, defaults to `(2, 4, 10, 0)`):
            Children of a slot for each predicted rank bucket, the greedy one counted. 0 for the last bucket means
            giving up: such a slot and all later ones of the block get their greedy token only.
        root_width (`int`, *optional*, defaults to 10): Children of the root, whatever its bucket.
        probability_cuts (`bool`, *optional*, defaults to `False`):
            Fewer children where the greedy token is likely, as in the authors' runner: at most 8, 5, 3 below the
            root if its probability is at least 0.6, 0.8, 0.9, and at most 3, 2 elsewhere from 0.85, 0.95.
    """

    children: tuple[int, ...] = (2, 4, 10, 0)
    root_width: int = 10
    probability_cuts: bool = False

    def __post_init__(self):
        if not self.children or min(self.children) < 0:
            raise ValueError(f"children is {self.children}; give one number of children >= 0 per rank bucket.")
        if self.root_width < 1:
            raise ValueError(f"root_width is {self.root_width}; the root needs its greedy child, so give at least 1.")

    def most(self, first_block: bool) -> int:
        """The largest width that a slot can get."""
        return max(1, *self.children, self.root_width if first_block else 1)

    def widths(self, outputs: BlockOutputs, first_block: bool) -> torch.LongTensor:
        """
        Args:
            outputs (`BlockOutputs`): Of one drafter forward.
            first_block (`bool`): Whether it started from the root.

        Returns:
            `torch.LongTensor` of shape `[B, S, K]`: Children at every slot, the greedy one counted; 0 where
            branching has stopped (the greedy chain goes on).
        """
        bucket = outputs.rank_class
        # A look-up table would have to be copied to the device in every call.
        widths = torch.full_like(bucket, self.children[0])
        can_give_up = self.children[-1] == 0  # what such a slot would get is masked out below
        for i in range(1, len(self.children) - can_give_up):
            widths.add_(bucket >= i, alpha=self.children[i] - self.children[i - 1])
        if self.probability_cuts:
            widths = _cut(widths, outputs.log_probs[..., 0], {0.85: 3, 0.95: 2})
        if can_give_up:
            gave_up = bucket == len(self.children) - 1
            if first_block:
                gave_up[..., 0] = False
            widths.masked_fill_(gave_up.cummax(dim=-1).values, 0)
        if first_block:
            root = widths[..., 0].fill_(self.root_width)
            if self.probability_cuts:
                root.copy_(_cut(root, outputs.log_probs[..., 0, 0], {0.6: 8, 0.8: 5, 0.9: 3}))
        return widths

    def reaches_end(self, outputs: BlockOutputs, first_block: bool) -> torch.BoolTensor:
        """
        Whether the last greedy node of a block may start the next one even if its slot does not branch: in the first
        block unless the first bucket other than 0 is a give-up, in later blocks unless any is.

        Returns:
            `torch.BoolTensor` of shape `[B, S]`.
        """
        bucket = outputs.rank_class
        if self.children[-1]:
            return torch.ones_like(bucket[..., 0], dtype=torch.bool)
        gave_up = bucket == len(self.children) - 1
        if first_block:
            gave_up &= (bucket > 0).cumsum(dim=-1) == 1
        return ~gave_up.any(dim=-1)


def _cut(widths: torch.LongTensor, log_probs: torch.Tensor, most: dict[float, int]) -> torch.LongTensor:
    """Bound `widths` by `most[p]` where the greedy token's probability is at least p."""
    for probability, width in most.items():
        widths = torch.where(log_probs >= math.log(probability), widths.clamp_max(width), widths)
    return widths


def rank_guided(
    tree: DraftTree, starts: Starts, outputs: BlockOutputs, branching: Branching, forward_index: int
) -> tuple[DraftTree, Starts]:
    """
    Append a block below every start (Algorithm 2 of the paper): its greedy chain, and at each slot as many
    alternatives as the rank head's bucket asks for.

    Args:
        tree (`DraftTree`): The tree so far, N nodes wide.
        starts (`Starts`): The S nodes that the block continues.
        outputs (`BlockOutputs`): The drafter's predictions below them.
        branching (`Branching`): The rule.
        forward_index (`int`): Which forward of the round this is; 0 starts from the root.

    Returns:
        `tuple[DraftTree, Starts]`: The tree, `S * K * branching.most(first_block)` nodes wider, and as many
        candidates for the next block's starts: greedy nodes whose slot branches, every alternative, and the last
        greedy node unless the rank head gave up.

    Raises:
        `ValueError`: If `outputs` has fewer candidates than the branching asks for.
    """
    first_block = forward_index == 0
    width = branching.most(first_block)
    given = outputs.tokens.shape[3]
    if given < width:
        raise ValueError(
            f"The drafter gave {given} candidates per slot but the branching asks for up to {width}; "
            "give more candidates or narrow the branching."
        )
    widths = branching.widths(outputs, first_block)
    branches = widths > 1
    branches[..., -1] |= branching.reaches_end(outputs, first_block)
    unwanted = torch.arange(width, device=widths.device) >= widths.clamp_min(1).unsqueeze(-1)
    return _append(tree, starts, outputs, width, forward_index, unwanted, ~branches.unsqueeze(-1))


def every_child(
    tree: DraftTree, starts: Starts, outputs: BlockOutputs, forward_index: int
) -> tuple[DraftTree, Starts]:
    """
    Append a level below every start: all candidates of a block of one slot (the trees of EAGLE-2).

    Args:
        tree (`DraftTree`): The tree so far.
        starts (`Starts`): The S nodes that the level continues.
        outputs (`BlockOutputs`): The W predictions below each of them.
        forward_index (`int`): Which forward of the round this is.

    Returns:
        `tuple[DraftTree, Starts]`: The tree, `S * W` nodes wider, and those nodes as candidates for the next starts.
    """
    return _append(tree, starts, outputs, outputs.tokens.shape[3], forward_index)


def _append(
    tree: DraftTree,
    starts: Starts,
    outputs: BlockOutputs,
    width: int,
    forward_index: int,
    unwanted: torch.BoolTensor | None = None,
    ends: torch.BoolTensor | None = None,
) -> tuple[DraftTree, Starts]:
    """
    Append the first `width` candidates of every slot, all of a slot below the greedy token of the slot before, but
    for `unwanted` ones `[B, S, K, width]`. Those that are `ends` `[B, S, K, 1]` do not start anything.
    """
    batch, num_starts, slots, _ = outputs.tokens.shape
    tokens, log_probs = outputs.tokens[..., :width], outputs.log_probs[..., :width]
    place = torch.arange(num_starts * slots * width, device=tokens.device)
    row, slot = place // (slots * width), place // width % slots
    origin = torch.stack((torch.full_like(slot, forward_index), slot), dim=-1)
    index = (place + tree.tokens.shape[1]).view(num_starts, slots, width).expand_as(tokens)
    above = starts.node.view(batch, num_starts, 1, 1)
    padding = above < 0
    if unwanted is not None:
        padding = padding | unwanted
    if slots > 1:
        above = torch.cat((above, index[:, :, :-1, :1]), dim=2)
    tokens = tokens.flatten(1)
    grown = DraftTree(
        tokens=torch.cat((tree.tokens, tokens), dim=1),
        parents=torch.cat((tree.parents, above.expand_as(index).masked_fill(padding, -2).flatten(1)), dim=1),
        log_probs=torch.cat((tree.log_probs, log_probs.masked_fill(padding, -torch.inf).flatten(1)), dim=1),
        origin=torch.cat((tree.origin, origin.expand(batch, -1, -1)), dim=1),
        height=tree.max_depth + slots,
    )
    node = index.masked_fill(padding if ends is None else padding | ends, -2).flatten(1)
    return grown, Starts(node, parent_start=row.expand_as(node), slot=slot.expand_as(node), tokens=tokens)


def best_first(
    tree: DraftTree,
    starts: Starts,
    children: Children,
    depth: int,
    beam: int,
    forward_index: int,
    most: int | None = None,
) -> tuple[DraftTree, Starts]:
    """
    Append the likeliest continuations of every start, level by level: each of the `beam` likeliest nodes of a level
    gets
    children. With a beam as wide as the tree's budget nothing that pruning would keep is missed.

    Unlike [`rank_guided`] it also continues alternatives within a block. Drafters differ only in `children`: a block's
    slots have distributions of their own whatever token a node has, a Markov term makes them depend on it.

    Args:
        tree (`DraftTree`): The tree so far, N nodes wide.
        starts (`Starts`): The S nodes to continue.
        children (`Children`): The drafter's predictions below some nodes of a level.
        depth (`int`): Levels to append (SpecBlock: slots K).
        beam (`int`): Nodes of a level that get children.
        forward_index (`int`): Which forward of the round this is.
        most (`int`, *optional*):
            Nodes of a level that are appended, the likeliest ones; more of them than the tree's budget could never
            stay. All if not given.

    Returns:
        `tuple[DraftTree, Starts]`: The grown tree, and all new nodes as candidates for the next forward's starts.
    """
    device, offset = tree.tokens.device, tree.tokens.shape[1]
    front, tokens = starts.node, starts.tokens
    scores = tree.cumulative_log_probs().gather(1, front.clamp_min(0)).masked_fill(front < 0, -torch.inf)
    rows = torch.arange(front.shape[1], device=device).expand_as(front)
    grown: dict[str, list[torch.Tensor]] = {"tokens": [], "parents": [], "log_probs": [], "rows": [], "slots": []}
    for level in range(depth):
        new_tokens, log_probs = children(level, rows, tokens)
        width = new_tokens.shape[2]
        scores = (scores.unsqueeze(2) + log_probs).flatten(1)
        tokens, log_probs = new_tokens.flatten(1), log_probs.flatten(1)
        kept = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        if most is not None and most < tokens.shape[1]:
            scores, kept = scores.topk(most, dim=1)
            tokens, log_probs = tokens.gather(1, kept), log_probs.gather(1, kept)
        above = kept // width
        parents, rows = front.gather(1, above), rows.gather(1, above)
        impossible = ~(scores > -torch.inf)  # which NaN is, too
        grown["tokens"].append(tokens)
        grown["parents"].append(parents.masked_fill(impossible, -2))
        grown["log_probs"].append(log_probs.masked_fill(impossible, -torch.inf))
        grown["rows"].append(rows)
        grown["slots"].append(torch.full_like(tokens, level))
        index = torch.arange(offset, offset + tokens.shape[1], device=device)
        offset += tokens.shape[1]
        scores, kept = scores.topk(min(beam, tokens.shape[1]), dim=1)
        front, tokens, rows = index[kept], tokens.gather(1, kept), rows.gather(1, kept)
    made = {name: torch.cat(parts, dim=1) for name, parts in grown.items()}
    origin = torch.stack((torch.full_like(made["slots"], forward_index), made["slots"]), dim=-1)
    nodes = torch.arange(tree.tokens.shape[1], offset, device=device)
    return DraftTree(
        tokens=torch.cat((tree.tokens, made["tokens"]), dim=1),
        parents=torch.cat((tree.parents, made["parents"]), dim=1),
        log_probs=torch.cat((tree.log_probs, made["log_probs"]), dim=1),
        origin=torch.cat((tree.origin, origin), dim=1),
        height=tree.max_depth + depth,
    ), Starts(torch.where(made["parents"] >= 0, nodes, -2), made["rows"], made["slots"], made["tokens"])


def limit_starts(
    starts: Starts, tree: DraftTree, max_starts: int | None, min_probability: float = 0.0, trim: bool = True
) -> Starts:
    """
    Keep the likeliest starts by cumulative log-prob, best first.

    Args:
        starts (`Starts`): Candidates, S wide.
        tree (`DraftTree`): The tree that they are nodes of.
        max_starts (`int`, *optional*): Most starts of each row; `None` keeps all.
        min_probability (`float`, *optional*, defaults to 0.0):
            Less likely starts are left out.
        trim (`bool`, *optional*, defaults to `True`):
            Cut off what then is padding in all rows, whose number is read from the device.

    Returns:
        `Starts`: `min(S, max_starts)` wide, or as wide as the row that has most likely ones.
    """
    scores = tree.cumulative_log_probs().gather(1, starts.node.clamp_min(0))
    scores = scores.masked_fill(starts.node < 0, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    order = order[:, :max_starts]
    node = starts.node.gather(1, order)
    if min_probability:
        likely = scores[:, :max_starts] >= math.log(min_probability)
        width = int(likely.sum(1).max()) if trim else None
        node, order = torch.where(likely, node, -2)[:, :width], order[:, :width]
    return Starts(
        node=node,
        parent_start=starts.parent_start.gather(1, order),
        slot=starts.slot.gather(1, order),
        tokens=starts.tokens.gather(1, order),
    )

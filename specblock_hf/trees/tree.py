# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The draft tree: tokens, parents and log-probabilities of everything that one round proposes. Knows no model.

Every operation works on padded batches, with shapes that follow from the shapes of its inputs, and reads nothing back
from the device (except `to_text`), so that a whole round can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from ..devices import on_device
from .distributions import DraftDistributions
from .paths import PATH_FACTOR, path_counts, path_sums, path_sums_on_host


FOUND = -2
"""Origin of nodes that no drafter forward proposed: continuations looked up in the text so far."""


class Decoder(Protocol):
    """The part of a tokenizer that a picture of a tree needs."""

    def decode(self, token_ids: list[int]) -> str: ...


def children_of(parents: Sequence[int]) -> defaultdict[int, list[int]]:
    """The children of every node of a tree, in order; none of padding."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    return children


@dataclass
class DraftTree:
    """
    A batch of draft trees. Parents come before their children; node 0 is the last committed token. Padding (parent -2)
    may lie between the nodes of a growing tree; after [`~DraftTree.prune`] it follows them. The token of padding is
    any valid id.

    Args:
        tokens (`torch.LongTensor` of shape `[B, N]`): Target token ids.
        parents (`torch.LongTensor` of shape `[B, N]`):
            Index of the parent in the same row; -1 for the root, -2 for padding.
        log_probs (`torch.Tensor` of shape `[B, N]`):
            log q(token | parent) by the drafter; 0 for the root, -inf for padding.
        origin (`torch.LongTensor` of shape `[B, N, 2]`):
            (drafter forward, slot) that proposed the node; -1, -1 for the root, `FOUND` where it was found in the
            text.
        height (`int`, *optional*, defaults to `N - 1`):
            No node of any row is deeper. It bounds the passes from child to parent, so state it where the host knows
            it.
        distributions ([`DraftDistributions`], *optional*):
            Of a sampled tree, whose shape must not depend on what was drawn: it cannot be pruned or merged. `None`
            for a tree that follows from the text before.
    """

    tokens: torch.LongTensor
    parents: torch.LongTensor
    log_probs: torch.Tensor
    origin: torch.LongTensor
    height: int | None = None
    distributions: DraftDistributions | None = None

    @classmethod
    def root(cls, tokens: torch.LongTensor) -> DraftTree:
        """
        Trees without a draft.

        Args:
            tokens (`torch.LongTensor` of shape `[B]`): Each row's last committed token.
        """
        tokens = tokens.unsqueeze(1)
        minus_one = torch.full_like(tokens, -1)
        log_probs = torch.zeros_like(tokens, dtype=torch.float32)
        return cls(tokens, minus_one, log_probs, minus_one.unsqueeze(-1).expand(-1, -1, 2), height=0)

    @property
    def num_nodes(self) -> torch.LongTensor:
        """Nodes of each row, `[B]`, the root counted and padding not."""
        return (self.parents > -2).sum(1)

    @property
    def max_depth(self) -> int:
        """`height`, or the most that the number of nodes allows."""
        return self.tokens.shape[1] - 1 if self.height is None else self.height

    def depths(self) -> torch.LongTensor:
        """Distance of every node from the root, `[B, N]`; 0 for padding, never above `max_depth`."""
        return path_counts(self.parents, self.max_depth, (self.parents >= 0).long()).clamp_max(self.max_depth)

    def cumulative_log_probs(self) -> torch.Tensor:
        """Sum of the log-probs from the root to every node, `[B, N]`; -inf for padding, never above the parent's."""
        # Rounding lifts log-probs above 0 and a broken drafter gives NaN; neither may put a node before its parent.
        return path_sums(
            self.parents, self.max_depth, self.log_probs.clamp_max(0).nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        )

    def ancestors(self) -> torch.BoolTensor:
        """Which nodes lie on each node's path, `[B, N, N]`: row sees column and itself. Padding sees only itself."""
        itself = self._positions().expand_as(self.parents)
        above = torch.where(self.parents < 0, itself, self.parents)
        seen = itself.unsqueeze(2) == self._positions()
        # `above` is as many steps away as `seen` reaches, and both double.
        for _ in range(self.max_depth.bit_length()):
            seen = seen | seen.gather(1, above.unsqueeze(2).expand_as(seen))
            above = above.gather(1, above)
        return seen

    def merge_duplicates(self, recompute: bool = True) -> DraftTree:
        """
        Merge nodes that spell the same tokens from the root, so that siblings are distinct. The earliest copy stays
        where it is (which keeps parents before children), with the best copy's log-prob and all copies' children; the
        others become padding.

        Args:
            recompute (`bool`, *optional*, defaults to `True`):
                Keep every child's log-prob given its parent, so that a child of a less likely copy gains from the
                merge. `False` keeps every child's cumulative log-prob instead, as the authors' release does.
        """
        # Copies are found by a hash of their path. Should two different paths ever collide, one draft is lost.
        steps = (self.tokens + 1).masked_fill(self.parents < 0, 0)
        paths = path_counts(self.parents, self.max_depth, steps, factor=PATH_FACTOR)
        ordered, order = paths.sort(dim=1, stable=True)
        # Padding hashes like the root, whose copy it thereby becomes.
        kept_copy = order.gather(1, torch.searchsorted(ordered, paths))

        parent = self.parents.clamp_min(0)
        log_probs = self.log_probs if recompute else self.cumulative_log_probs()
        log_probs = torch.full_like(log_probs, -torch.inf).scatter_reduce_(1, kept_copy, log_probs, "amax")
        merged_parent = kept_copy.gather(1, parent)
        if not recompute:
            log_probs = log_probs - log_probs.gather(1, merged_parent)
        parents = torch.where(self.parents >= 0, merged_parent, self.parents)
        copies = kept_copy != self._positions()
        return replace(self, parents=parents.masked_fill(copies, -2), log_probs=log_probs)

    def prune(self, budget: int | Sequence[int]) -> DraftTree:
        """
        Keep each row's likeliest nodes by cumulative log-prob, ancestors included, and pack them: the likeliest path
        first (the likeliest child, its likeliest child, ...), so that accepting a prefix of it leaves a verified cache
        without holes; then the rest by likelihood.

        Args:
            budget (`int` or sequence of `int`): Most drafted nodes (the root not counted), of every row or of each.

        Returns:
            [`DraftTree`]: `1 + min(max(budget), N - 1)` nodes wide.

        Raises:
            `ValueError`: For a sampled tree.
        """
        self._check_fixed()
        budgets = self._per_row(budget, "budget")
        most = min(max(budgets), self.tokens.shape[1] - 1)
        tree = self._likeliest(most)
        if min(budgets) < most:
            tree = tree._drop(tree._positions() > self._column(budgets))
        return tree._likeliest_path_first()

    def cut(self, budgets: torch.LongTensor, depths: torch.LongTensor, most: int) -> DraftTree:
        """
        `limit_depth` and `prune` by numbers that are on the device.

        Args:
            budgets (`torch.LongTensor` of shape `[B]`): Most drafted nodes of each row.
            depths (`torch.LongTensor` of shape `[B]`): Depth of the deepest node to keep of each row.
            most (`int`): No budget is larger; it decides how wide the tree gets.
        """
        self._check_fixed()
        tree = self._drop(self.depths() > depths.unsqueeze(1))._likeliest(min(most, self.tokens.shape[1] - 1))
        return tree._drop(tree._positions() > budgets.unsqueeze(1))._likeliest_path_first()

    def first(self, count: int) -> DraftTree:
        """The trees of the first nodes, padding counted. A node without its parent becomes padding."""
        if count >= self.tokens.shape[1]:
            return self
        cut, drawn = self._each(lambda part: part[:, :count]), self._drawn(lambda rows: rows[:, :count])
        tree = replace(cut, height=min(self.max_depth, count - 1), distributions=drawn)
        return replace(tree, parents=tree.parents.masked_fill(tree.parents >= count, -2))

    def keep_likely(self, min_probability: float, trim: bool = True, multiple: int = 1) -> DraftTree:
        """
        The tree without the nodes that the drafter gives less than this path probability. A drawn tree stays whole,
        because its shape must not depend on what was drawn.

        Args:
            min_probability (`float`): 0 leaves the tree alone, and reads nothing from the device.
            trim (`bool`, *optional*, defaults to `True`): Cut off what then is padding in all rows.
            multiple (`int`, *optional*, defaults to 1):
                Of which the number of nodes shall be one, root counted: the likeliest of the others fill it up, and
                what is left is cut off, if anything is.
        """
        if min_probability == 0 or self.distributions is not None:
            return self
        if multiple > 1:
            return self._likeliest_of_each(math.log(min_probability), multiple)
        tree = self._drop(self.cumulative_log_probs() < math.log(min_probability))
        return tree.pack() if trim else tree._take(tree._packed())

    def _likeliest_of_each(self, least: float, multiple: int) -> DraftTree:
        """
        Each row's nodes of a cumulative log-prob of `least` or more, filled up to a multiple, in the order that they
        have.
        """
        rows = [path_sums_on_host(*row) for row in zip(self.parents.tolist(), self.log_probs.tolist(), strict=True)]
        wide = -(-max(sum(total >= least for total in sums) for sums in rows) // multiple) * multiple
        if wide >= self.tokens.shape[1]:
            return self
        # No node scores above its parent, and a stable sort leaves the parent first in ties.
        kept = [sorted(sorted(range(len(sums)), key=lambda node: -sums[node])[:wide]) for sums in rows]
        return replace(self._take(on_device(kept, self.tokens.device)), height=min(self.max_depth, wide - 1))

    def limit_depth(self, depths: int | Sequence[int]) -> DraftTree:
        """
        Turn nodes that are too deep into padding.

        Args:
            depths (`int` or sequence of `int`): Depth of the deepest node to keep, of every row or of each.
        """
        limits = self._per_row(depths, "depths")
        if min(limits) >= self.max_depth:
            return self
        return replace(self._drop(self.depths() > self._column(limits)), height=min(max(limits), self.max_depth))

    def merge(self, other: DraftTree) -> DraftTree:
        """
        The union of two drafts below the same roots; a path of both keeps the larger log-prob. Not packed.

        Args:
            other ([`DraftTree`]): A tree of the same batch, such as continuations looked up in the text so far.

        Raises:
            `ValueError`: If one of them is a sampled tree.
        """
        self._check_fixed()
        other._check_fixed()
        return self.join(other).merge_duplicates()

    def join(self, other: DraftTree) -> DraftTree:
        """
        Two drafts below the same roots, with nothing merged and siblings repeated where both have them.

        Args:
            other ([`DraftTree`]): A tree of the same batch that follows from the text before.

        Raises:
            `ValueError`: If `other` is a sampled tree.
        """
        other._check_fixed()
        shift = self.tokens.shape[1] - 1
        parents = torch.where(other.parents > 0, other.parents + shift, other.parents)[:, 1:]
        return DraftTree(
            tokens=torch.cat((self.tokens, other.tokens[:, 1:]), dim=1),
            parents=torch.cat((self.parents, parents), dim=1),
            log_probs=torch.cat((self.log_probs, other.log_probs[:, 1:].to(self.log_probs)), dim=1),
            origin=torch.cat((self.origin, other.origin[:, 1:]), dim=1),
            height=max(self.max_depth, other.max_depth),
            distributions=self._drawn(lambda rows: torch.cat((rows, torch.full_like(parents, -1)), dim=1)),
        )

    def clone(self) -> DraftTree:
        """The trees in memory of their own, but for distributions."""
        return self._each(torch.clone)

    def to(self, device: torch.device) -> DraftTree:
        """The trees on another device; distributions, which are large, stay where they were made."""
        return self._each(lambda part: part.to(device))

    def scatter_rows(self, rows: Sequence[int], roots: torch.LongTensor) -> DraftTree:
        """
        These trees as some rows of a batch whose other rows have no draft.

        Args:
            rows (sequence of `int`): Where in that batch each of these trees is.
            roots (`torch.LongTensor` of shape `[B]`): The last committed token of every row of that batch.
        """
        index = on_device(rows, self.tokens.device)

        def filled(own: torch.Tensor, value: float) -> torch.Tensor:
            return own.new_full((len(roots), *own.shape[1:]), value).index_copy_(0, index, own)

        distributions = self.distributions
        if distributions is not None:
            distributions = replace(
                distributions, log_probs=filled(distributions.log_probs, 0), rows=filled(distributions.rows, -1)
            )
        tree = DraftTree(
            tokens=filled(self.tokens, 0),
            parents=filled(self.parents, -2),
            log_probs=filled(self.log_probs, -math.inf),
            origin=filled(self.origin, -1),
            height=self.height,
            distributions=distributions,
        )
        tree.tokens[:, 0], tree.parents[:, 0], tree.log_probs[:, 0] = roots.to(self.tokens.device), -1, 0
        return tree

    def pad(self, width: int) -> DraftTree:
        """
        Trees of the same nodes with padding behind them.

        Args:
            width (`int`): Nodes and padding of a row, at least as many as now.
        """
        added = width - self.tokens.shape[1]
        return replace(
            self,
            tokens=nn.functional.pad(self.tokens, (0, added)),
            parents=nn.functional.pad(self.parents, (0, added), value=-2),
            log_probs=nn.functional.pad(self.log_probs, (0, added), value=-math.inf),
            origin=nn.functional.pad(self.origin, (0, 0, 0, added), value=-1),
            height=self.max_depth,
            distributions=self._drawn(lambda rows: nn.functional.pad(rows, (0, added), value=-1)),
        )

    def pack(self) -> DraftTree:
        """
        Move padding behind the nodes, which keep their order, and cut off the columns that are padding in every row.
        Reads the number of nodes from the device.
        """
        return self._take(self._packed()[:, : int(self.num_nodes.max())])

    def to_text(self, tokenizer: Decoder, row: int = 0, accepted: Sequence[int] = ()) -> str:
        """
        Draw one row: a line per node with its text, its probability given its parent and its origin; accepted nodes
        carry a star.

        Args:
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Decodes one token at a time.
            row (`int`, *optional*, defaults to 0): Which tree of the batch.
            accepted (sequence of `int`, *optional*, defaults to `()`):
                Nodes to mark, such as a walk's `nodes[row].tolist()`.
        """
        tokens, parents = self.tokens[row].tolist(), self.parents[row].tolist()
        probs, origin = self.log_probs[row].exp().tolist(), self.origin[row].tolist()
        children, lines = children_of(parents), []
        stack = [(0, "", "")]
        while stack:
            node, lead, branch = stack.pop()
            line = f"{lead}{branch}{tokenizer.decode([tokens[node]])!r}"
            if node:
                where = "found" if origin[node][0] == FOUND else f"{origin[node][0]}, {origin[node][1]}"
                line += f" {probs[node]:.3f} ({where})"
            lines.append(f"{line} *" if node in accepted else line)
            inner = lead + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
            likeliest_last = sorted(children[node], key=probs.__getitem__)
            stack += [(child, inner, "├─ " if i else "└─ ") for i, child in enumerate(likeliest_last)]
        return "\n".join(lines)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> DraftTree:
        names = ("tokens", "parents", "log_probs", "origin")
        return replace(self, **{name: change(vars(self)[name]) for name in names})

    def _drawn(self, change: Callable[[torch.Tensor], torch.Tensor]) -> DraftDistributions | None:
        """The distributions, if there are any, of nodes that move as `change` moves their rows."""
        return self.distributions and replace(self.distributions, rows=change(self.distributions.rows))

    def _positions(self) -> torch.LongTensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def _take(self, order: torch.LongTensor) -> DraftTree:
        """The nodes at `order` `[B, M]`, which holds the parent of every node that it holds."""
        new = torch.arange(order.shape[1], device=order.device).expand_as(order)
        place = torch.zeros_like(self.parents).scatter_(1, order, new)
        parents = self.parents.gather(1, order)
        return replace(
            self,
            distributions=self._drawn(lambda rows: rows.gather(1, order)),
            tokens=self.tokens.gather(1, order),
            parents=torch.where(parents >= 0, place.gather(1, parents.clamp_min(0)), parents),
            log_probs=self.log_probs.gather(1, order),
            origin=self.origin.gather(1, order.unsqueeze(-1).expand(-1, -1, 2)),
        )

    def _packed(self) -> torch.LongTensor:
        """The nodes' order `[B, N]` with padding behind them."""
        return (self.parents < -1).long().sort(dim=1, stable=True).indices

    def _likeliest(self, most: int) -> DraftTree:
        """So many nodes beside the root, the likeliest first."""
        # No node scores above its parent and a stable sort leaves the parent first in ties, so every prefix is a tree.
        order = self.cumulative_log_probs().sort(dim=1, descending=True, stable=True).indices[:, : most + 1]
        return replace(self._take(order), height=min(self.max_depth, most))

    def _likeliest_path_first(self) -> DraftTree:
        return self._take(self._off_likeliest_path().sort(dim=1, stable=True).indices)

    def _check_fixed(self) -> None:
        if self.distributions is not None:
            raise ValueError(
                "a sampled tree keeps its shape, or its verification would no longer be exact; draw a smaller one."
            )

    def _drop(self, unwanted: torch.BoolTensor) -> DraftTree:
        return replace(
            self,
            parents=self.parents.masked_fill(unwanted, -2),
            log_probs=self.log_probs.masked_fill(unwanted, -torch.inf),
        )

    def _off_likeliest_path(self) -> torch.BoolTensor:
        """Nodes `[B, N]` of a tree sorted by likelihood that are padding, a later child or below one."""
        same = self.parents.unsqueeze(2) == self.parents.unsqueeze(1)
        turns = same.tril(-1).any(2) | (self.parents < -1)
        return path_counts(self.parents, self.max_depth, turns.long()) > 0

    def _per_row(self, limit: int | Sequence[int], name: str) -> list[int]:
        rows = self.tokens.shape[0]
        limits = [limit] * rows if isinstance(limit, int) else list(limit)
        if len(limits) != rows or min(limits) < 0:
            raise ValueError(f"{name} is {limit} for {rows} rows; pass one number >= 0, or one for each row.")
        return limits

    def _column(self, limits: Sequence[int]) -> torch.LongTensor:
        return on_device(limits, self.tokens.device).unsqueeze(1)

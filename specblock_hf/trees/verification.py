# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Walking a scored draft tree: which drafted tokens the target keeps. Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ..devices import upload
from .tree import DraftTree


@dataclass
class Walk:
    """
    What one round emits, on the host, where it was decided. Emitted token j of a row was chosen by the target at node
    j of the row, so the two line up as pairs.

    Args:
        nodes (`torch.LongTensor` of shape `[B, E]`): Kept nodes: the root, then the accepted ones; -1 is padding.
        tokens (`torch.LongTensor` of shape `[B, E]`):
            Emitted tokens: the accepted ones, then the target's own; -1 is padding.
        lengths (`torch.LongTensor` of shape `[B]`): Emitted tokens of each row; 0 for a row that had finished before.
        stopped (`torch.BoolTensor` of shape `[B]`): The row's last emitted token ends it.
    """

    nodes: torch.LongTensor
    tokens: torch.LongTensor
    lengths: torch.LongTensor
    stopped: torch.BoolTensor

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[list[int], list[int], bool]]) -> Walk:
        """
        Args:
            rows (sequence of `tuple`): Kept nodes, emitted tokens and whether the last one ends the row.
        """
        lengths = [len(emitted) for _, emitted, _ in rows]
        widest = max(lengths)

        def padded(lists: list[list[int]]) -> torch.Tensor:
            lists = [values + [-1] * (widest - len(values)) for values in lists]
            return torch.tensor(lists, dtype=torch.long, device="cpu")

        return cls(
            nodes=padded([nodes for nodes, _, _ in rows]),
            tokens=padded([emitted for _, emitted, _ in rows]),
            lengths=torch.tensor(lengths, device="cpu"),
            stopped=torch.tensor([stopped for _, _, stopped in rows], device="cpu"),
        )

    def emitted(self) -> list[list[int]]:
        """The emitted tokens of each row, without padding."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    def to(self, device: torch.device) -> Walk:
        """The walk on a device, moved in one piece, for which the host does not wait."""
        columns = (self.nodes, self.tokens, self.lengths.unsqueeze(1), self.stopped.long().unsqueeze(1))
        whole = upload(torch.cat(columns, dim=1), device)
        nodes, tokens, lengths, stopped = whole.split([part.shape[1] for part in columns], dim=1)
        return Walk(nodes, tokens, lengths.squeeze(1), stopped.squeeze(1).bool())


Select = Callable[[int, int], int]
"""`select(row, node)`: the target's token after that node; called once per emitted token, in order."""

Stop = Callable[[int, int], bool]
"""`stop(row, token)`: whether this emitted token ends the row; called once per emitted token, in order."""


class Verifier(Protocol):
    """A rule that turns a drafted tree and the target's distributions at its nodes into emitted tokens."""

    def __call__(self, tree: DraftTree, active: Sequence[bool], select: Select, stop: Stop) -> Walk: ...


def sample_and_walk(tree: DraftTree, active: Sequence[bool], select: Select, stop: Stop) -> Walk:
    """
    Let the target choose one token after another and follow the draft as far as it agrees. The emitted tokens follow
    the target's own distribution for every tree that is a function of the prefix, and no rule accepts more of such a
    tree on average.

    Args:
        tree (`DraftTree`):
            The draft; only its tokens and parents matter. Where siblings repeat a token, the longest path over all
            copies is taken.
        active (sequence of `bool`): One for each row; a row that is not active emits nothing.
        select (`Select`): Draws from, or takes the argmax of, the target's distribution after a node.
        stop (`Stop`): Tells whether an emitted token ends the row; nothing is emitted after it.

    Returns:
        [`Walk`]: As wide as the longest row.
    """
    tokens, parents = torch.stack((tree.tokens, tree.parents)).tolist()
    rows = [
        _walk_row(row, tokens[row], parents[row], select, stop) if active[row] else ([], [], False)
        for row in range(len(tokens))
    ]
    return Walk.of_rows(rows)


def _walk_row(
    row: int, tokens: list[int], parents: list[int], select: Select, stop: Stop
) -> tuple[list[int], list[int], bool]:
    """Kept nodes, emitted tokens and whether the last one ends the row."""
    children: dict[tuple[int, int], list[int]] = {}
    for node, parent in enumerate(parents):
        if parent >= 0:
            children.setdefault((parent, tokens[node]), []).append(node)

    emitted: list[int] = []
    # All nodes that spell what was emitted; the target's distribution is the same at each of them.
    copies, stopped = [0], False
    while copies and not stopped:
        deepest = copies[0]
        token = select(row, deepest)
        emitted.append(token)
        stopped = stop(row, token)
        copies = [child for node in copies for child in children.get((node, token), ())]
    nodes = [deepest]
    while parents[nodes[-1]] >= 0:
        nodes.append(parents[nodes[-1]])
    return nodes[::-1], emitted, stopped

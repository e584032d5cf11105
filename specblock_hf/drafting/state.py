# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What one `generate()` call makes a drafter remember, and what waits for a drafter that does not draft now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from .pairs import Pairs, TokenTable


if TYPE_CHECKING:
    from .drafter import TreeDrafter


MOST_WAITING = 1024
"""Pairs of a row that wait for a drafter: a long prompt is taken in as it always was."""


@dataclass
class DraftState:
    """
    What one `generate()` call makes a drafter remember. Drafters subclass it; nothing of it ever lives on a module,
    so that one drafter serves several threads. A subclass that remembers something of each row overrides
    [`~DraftState.keep_rows`].

    Args:
        table (`TokenTable`): The target's embedding and head.
        batch_size (`int`): Rows that it drafts for, at first those of the batch.
        max_length (`int`): Most positions that the drafter can be told about, prompt included.
        first_position (`int`, *optional*, defaults to 0): Position of the first pair (above 0 for a continued cache).
        generator (`torch.Generator`, *optional*): Private randomness of sampled drafts; the global one belongs to the
            target.
        warp (`Callable`, *optional*):
            Turns a drafter's logits `[..., D]` into those of the request, at its temperature and cut by its warpers.
            Set by the loop where drafts are sampled.

    Attributes:
        drafting (`list[int]`): Which rows of the batch those are.
        waiting (`list[Pairs]`): What those rows have learned while nothing was drafted; see [`wait`].
        promised (`float`): Tokens of a row that look-ups promised in the last round.
        left_out (`bool`): The last round did without forwards of the drafter, see [`Limits`].
    """

    table: TokenTable
    batch_size: int
    max_length: int
    first_position: int = 0
    generator: torch.Generator | None = None
    warp: Callable[[torch.Tensor], torch.Tensor] | None = None
    calls: int = field(default=0, init=False)  # drafter forwards so far
    forward_rows: int = field(default=0, init=False)  # and their rows: committed pairs and starts
    drafting: list[int] = field(init=False)
    waiting: list[Pairs] = field(default_factory=list, init=False)
    promised: float = field(default=0.0, init=False)
    left_out: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.drafting = list(range(self.batch_size))

    def keep_rows(self, places: Sequence[int]) -> None:
        """
        Go on with some rows and forget the others, which will never draft again: they must cost nothing any more.

        Args:
            places (sequence of `int`): Indices into `drafting`, in order.
        """
        self.drafting = [self.drafting[place] for place in places]
        self.batch_size = len(self.drafting)
        self.waiting = [pairs.of_rows(places) for pairs in self.waiting]

    def caught_up(self, pairs: Pairs) -> Pairs:
        """What has waited and `pairs`, all of the rows that draft; nothing waits any more."""
        self.waiting, waiting = [], [*self.waiting, pairs]
        return Pairs.joined(waiting)

    def reset(self) -> None:
        """Forget a call, for a state of fixed shapes that the next call uses again."""
        self.calls = self.forward_rows = 0
        self.waiting = []

    def fuse(self, wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> None:
        """Let a state of fixed shapes run what `wrap` makes of the network's forward, if there is one."""


def wait(drafter: TreeDrafter, state: DraftState, pairs: Pairs) -> None:
    """
    Keep what a drafter would have been told, for when it drafts again. More than `MOST_WAITING` pairs do not wait: the
    drafter takes them in at once.
    """
    state.waiting.append(pairs)
    if too_many(state.waiting):
        with drafter.lock:
            drafter.extend(state, Pairs.joined(state.waiting))
        state.waiting = []


def too_many(waiting: Sequence[Pairs]) -> bool:
    """Whether a drafter has to take in what waits for it."""
    return sum(pairs.tokens.shape[1] for pairs in waiting) > MOST_WAITING

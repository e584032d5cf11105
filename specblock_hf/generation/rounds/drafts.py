# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the trees of a call come from: a drafter's rounds as they are, or of fixed shapes, which may be captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from ...devices import on_device, without_cudnn_attention
from ...drafting.drafter import DraftState, TreeDrafter
from ...drafting.pairs import Pairs, TokenTable
from ...drafting.plan import DraftingPlan, FixedLimits, Limits
from ...drafting.proposal import propose, within
from ...drafting.state import too_many, wait
from ...target.fixed import FixedStep, MakeStep
from ...trees.tree import DraftTree


Wrap = Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]

UNLIMITED = 10**6  # levels; no tree is deeper


class Drafts(Protocol):
    """
    The drafter's side of one call.

    Attributes:
        calls (`int`): Forwards of the drafter so far.
        rows (`int`): And their rows: committed pairs and starts.
        captured (`int`): Trees that were replayed.
        settled (`bool`): The last tree took as long as later ones will.
    """

    @property
    def state(self) -> DraftState: ...

    @property
    def calls(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def captured(self) -> int: ...

    @property
    def settled(self) -> bool: ...

    def extend(self, pairs: Pairs) -> None:
        """Take in, without drafting, a chunk of the prompt or what the last round taught."""

    def propose(self, pairs: Pairs, limits: Limits) -> DraftTree:
        """
        A tree for each row that may still draft and a root for the others. Those have stopped, or have one token left,
        or never were to draft, and will not again.

        Args:
            pairs ([`Pairs`]): What the last round taught, of all rows of the batch.
            limits ([`Limits`]): Of all rows of the batch.
        """


class EagerDrafts:
    """
    Runs the drafter as it is, or with prepacked weights. It does not hear any more of rows that have ended.

    Args:
        drafter ([`TreeDrafter`]): Held by its lock while it drafts.
        state ([`DraftState`]): Of the call.
    """

    captured, settled = 0, True

    def __init__(self, drafter: TreeDrafter, state: DraftState):
        self.drafter, self.state = drafter, state
        self._model = drafter.rounds_model(drafter.prepacked_weights)

    @property
    def calls(self) -> int:
        return self.state.calls

    @property
    def rows(self) -> int:
        return self.state.forward_rows

    def extend(self, pairs: Pairs) -> None:
        if self.state.batch_size < len(pairs.lengths):
            pairs = pairs.of_rows(self.state.drafting)
        with self.drafter.lock, without_cudnn_attention:
            drafter = self.drafter
            if self._model is not None:
                drafter = drafter.with_network(self._model.of_prompt(pairs.tokens.shape[1]))
            drafter.extend(self.state, self.state.caught_up(pairs))

    def propose(self, pairs: Pairs, limits: Limits) -> DraftTree:
        drafter, self.settled = self.drafter, True
        if self._model is not None and any(limits.nodes):
            with drafter.lock:
                drafter = drafter.with_network(self._model.next())
            self.settled = self._model.settled
        return draft(drafter, self.state, pairs, limits)


@without_cudnn_attention
def draft(drafter: TreeDrafter, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
    """
    A tree within its limits for each row that may still draft, and a root for the others. Those have stopped, or have
    one token left, or never were to draft, and will not again: the drafter does not hear of them any more.

    Args:
        drafter ([`TreeDrafter`]): Held by its lock while it drafts.
        state ([`DraftState`]): Of the call.
        pairs ([`Pairs`]): What the last round taught, of all rows of the batch.
        limits ([`Limits`]): Of all rows of the batch.
    """
    rows = [row for row, nodes in enumerate(limits.nodes) if nodes]
    if rows and len(rows) == len(limits.nodes):
        return propose(drafter, state, state.caught_up(pairs), limits)
    roots = pairs.last_tokens()
    if limits.waits:
        drafting = state.drafting
        wait(drafter, state, pairs if len(drafting) == len(limits.nodes) else pairs.of_rows(drafting))
    if not rows:
        return DraftTree.root(roots)
    if len(rows) < state.batch_size:
        state.keep_rows([state.drafting.index(row) for row in rows])
    pairs = state.caught_up(pairs.of_rows(rows))
    return propose(drafter, state, pairs, limits.of_rows(rows)).scatter_rows(rows, roots)


@dataclass
class RoundCost:
    """Forwards of a round and their rows, which a replay does not count."""

    calls: int = 0
    rows: int = 0


class DraftRounds:
    """
    A drafter's rounds of one plan as a function of buffers, which many calls use one after the other.

    Args:
        drafter ([`TreeDrafter`]): Whose rounds have fixed shapes.
        table ([`TokenTable`]): The target's embedding and head.
        batch_size (`int`): Rows of the batch.
        max_length (`int`): Most tokens of a row.
        plan ([`DraftingPlan`]): What every round drafts.
        make_step (`Callable`): See `MakeStep`.
        wrap (`Callable`, *optional*): Makes something faster of the network's forward.
    """

    def __init__(
        self,
        drafter: TreeDrafter,
        table: TokenTable,
        batch_size: int,
        max_length: int,
        plan: DraftingPlan,
        make_step: MakeStep,
        wrap: Wrap | None = None,
    ):
        self._wrap = wrap
        self.drafter, self.table, self.plan = drafter, table, plan
        self.batch_size, self.max_length = batch_size, max_length
        self.width = drafter.deepest(plan) + 1
        self.state, self.device = drafter.begin_fixed(table, batch_size, max_length, self.width), table.device
        zeros = torch.zeros(2, batch_size, dtype=torch.long, device=self.device)
        self.limits = FixedLimits(
            (plan.tree_budget,) * batch_size,
            (UNLIMITED,) * batch_size,
            plan.num_forwards,
            plan.max_starts,
            plan.min_start_probability,
            nodes_now=zeros[0],
            depth_now=zeros[1],
        )
        self._limits_now = zeros
        self.pairs: Pairs | None = None
        self.cost = RoundCost()
        self.step: FixedStep = make_step(self._propose)

    def begin(self, keeps: bool) -> CallDrafts:
        """Forget the call before; see [`CallDrafts`] for the new one."""
        self.state.reset()
        return CallDrafts(self, keeps)

    def load(self, pairs: Pairs) -> None:
        """Put at most `width` pairs into the buffers."""
        if self.pairs is None:
            with torch.inference_mode(False), torch.no_grad():
                self.pairs = self._empty(pairs)
                if self._wrap is not None:
                    self._propose()  # which makes room for its scratch: compiled forwards know how much there is
                    self.state.fuse(self._wrap)
        own, count = self.pairs, pairs.tokens.shape[1]
        own.tokens[:, :count] = pairs.tokens
        own.positions[:, :count] = pairs.positions
        own.lengths.copy_(pairs.lengths)
        for mine, theirs in zip(own.features, pairs.features, strict=True):
            mine[:, :count] = theirs

    def limit(self, nodes: Sequence[int], depth: Sequence[int]) -> None:
        """Say what the coming rounds may draft."""
        self._limits_now.copy_(on_device((list(nodes), list(depth)), self.device))

    def _empty(self, like: Pairs) -> Pairs:
        tokens = torch.zeros(self.batch_size, self.width, dtype=torch.long, device=self.device)
        features = tuple(part.new_zeros(*tokens.shape, part.shape[2]) for part in like.features)
        return Pairs(tokens, features, torch.zeros_like(tokens), torch.zeros_like(tokens[:, 0]), self.table)

    @without_cudnn_attention
    def _propose(self) -> DraftTree:
        calls, rows = self.state.calls, self.state.forward_rows
        tree = self.drafter.propose(self.state, self.pairs, self.limits)
        self.cost = RoundCost(self.state.calls - calls, self.state.forward_rows - rows)
        return within(tree, self.pairs, self.limits)


class CallDrafts:
    """
    The drafts of one call by [`DraftRounds`]. Rows that have ended stay, because they are part of the shapes.

    Args:
        rounds ([`DraftRounds`]): Lent to this call.
        keeps (`bool`): Somebody may hold on to trees, which are copied for that.
    """

    def __init__(self, rounds: DraftRounds, keeps: bool):
        self.rounds, self._keeps = rounds, keeps
        self.calls = self.rows = self.captured = 0
        self.settled = True
        self._now: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def state(self) -> DraftState:
        return self.rounds.state

    def extend(self, pairs: Pairs) -> None:
        state = self.rounds.state
        calls, rows = state.calls, state.forward_rows
        with self.rounds.drafter.lock, without_cudnn_attention:
            self.rounds.drafter.extend(state, pairs)
        self.calls += state.calls - calls
        self.rows += state.forward_rows - rows

    def propose(self, pairs: Pairs, limits: Limits) -> DraftTree:
        rounds, self.settled = self.rounds, True
        if not any(limits.nodes):
            if limits.waits:
                self._wait(pairs)
            return DraftTree.root(pairs.last_tokens())
        pairs = rounds.state.caught_up(pairs)
        if pairs.read is None or pairs.tokens.shape[1] > rounds.width:
            pairs = self._last(pairs)
        # A row without nodes has no say in how deep the others may go.
        depth = tuple(depth if nodes else 0 for nodes, depth in zip(limits.nodes, limits.depth, strict=True))
        if self._now != (limits.nodes, depth):
            self._now = limits.nodes, depth
            rounds.limit(*self._now)
        with rounds.drafter.lock:
            rounds.drafter.find(rounds.state, pairs, limits)
            rounds.load(pairs)
            tree = rounds.step()
        self.calls += rounds.cost.calls
        self.rows += rounds.cost.rows
        self.captured += rounds.step.captured
        self.settled = rounds.step.settled
        tree = tree.first(1 + max(limits.nodes))
        return tree.clone() if self._keeps else tree

    def _wait(self, pairs: Pairs) -> None:
        """Keep, of buffers that the next round fills anew, what the drafter will be told when it drafts again."""
        waiting = self.rounds.state.waiting
        waiting.append(pairs.each(torch.clone, lengths=pairs.lengths.clone()))
        if too_many(waiting):
            self.extend(Pairs.joined(waiting))
            waiting.clear()

    def _last(self, pairs: Pairs) -> Pairs:
        """Take in all but the last pair of each row, which are returned."""
        last = (pairs.lengths - 1).clamp_min(0)
        if pairs.tokens.shape[1] > 1:
            self.extend(replace(pairs, lengths=last, read=pairs.read and [row[:-1] for row in pairs.read]))

        def picked(values: torch.Tensor) -> torch.Tensor:
            return values.take_along_dim(last.view(-1, 1, *[1] * (values.ndim - 2)), dim=1)

        return Pairs(
            picked(pairs.tokens).clamp_min(0),
            tuple(map(picked, pairs.features)),
            picked(pairs.positions),
            pairs.lengths.clamp_max(1),
            pairs.table,
            read=pairs.read and [row[-1:] for row in pairs.read],
        )

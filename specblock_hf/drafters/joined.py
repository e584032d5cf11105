# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A drafter whose trees are joined with text found by look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ..drafting.drafter import DraftingCallback, DraftState, TreeDrafter
from ..drafting.pairs import Pairs, TokenTable
from ..drafting.plan import DraftingPlan, Limits
from ..drafting.proposal import propose
from ..drafting.state import wait
from ..trees.tree import DraftTree
from .lookup import LookupDrafter


def _of_first(name: str) -> Any:
    """An attribute of the first part, as it is now, unless the joined drafter is given one of its own."""
    own = f"_own_{name}"

    def get(joined: JoinedDrafter) -> Any:
        return vars(joined).get(own, getattr(joined.parts[0], name))

    def give(joined: JoinedDrafter, value: Any) -> None:
        vars(joined)[own] = value

    return property(get, give)


@dataclass
class JoinedState(DraftState):
    """The state of every drafter, the first one's being the one that counts forwards."""

    parts: list[DraftState] = field(default_factory=list)

    def keep_rows(self, places: Sequence[int]) -> None:
        super().keep_rows(places)
        for part in self.parts:
            part.keep_rows(places)

    def reset(self) -> None:
        super().reset()
        for part in self.parts:
            part.reset()

    def fuse(self, wrap: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]) -> None:
        for part in self.parts:
            part.fuse(wrap)


class JoinedDrafter(TreeDrafter):
    """
    Several drafters as one: their trees are merged and the likeliest nodes kept. Whatever a drafter has that is not
    given to the joined one, such as a plan or a lock, is the first drafter's; callbacks are those of all.

    Args:
        drafter ([`TreeDrafter`]): The one that reads the target's states and decides what is drafted where.
        *others ([`TreeDrafter`]): Drafters that read none, such as [`LookupDrafter`].
    """

    _added: tuple[DraftingCallback, ...] = ()
    _not_copied = (*TreeDrafter._not_copied, "_added", "_own_compiled_rounds")

    def __init__(self, drafter: TreeDrafter, *others: TreeDrafter):
        readers = [type(other).__name__ for other in others if other.feature_layers]
        if readers:
            raise ValueError(
                f"{readers[0]} reads the target's states, which only the first drafter may; put it first."
            )
        self.parts = (drafter, *others)

    config = _of_first("config")
    lock = _of_first("lock")
    feature_layers = _of_first("feature_layers")
    objective_class = _of_first("objective_class")
    can_sample = _of_first("can_sample")
    predicts_at_once = _of_first("predicts_at_once")
    drafting_plan = _of_first("drafting_plan")
    acceptance_measured = _of_first("acceptance_measured")
    compiled_rounds = _of_first("compiled_rounds")
    captures_rounds = _of_first("captures_rounds")
    prepacked_weights = _of_first("prepacked_weights")
    default_plan = _of_first("default_plan")
    feature_layers_for = _of_first("feature_layers_for")
    loss = _of_first("loss")
    parameters_of = _of_first("parameters_of")
    rounds_model = _of_first("rounds_model")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label})"

    @property
    def label(self) -> str:
        return " + ".join(part.label for part in self.parts)

    @property
    def look_ups(self) -> Literal["none", "joined", "alone"]:
        kinds = {part.look_ups for part in self.parts}
        return "none" if kinds == {"none"} else "joined" if "none" in kinds else "alone"

    @property
    def network(self) -> TreeDrafter:
        return self.parts[0].network

    @property
    def callbacks(self) -> tuple[DraftingCallback, ...]:
        """Those of the parts, and those that were added to the joined drafter."""
        return (*self._heard_by_parts(), *self._added)

    @callbacks.setter
    def callbacks(self, callbacks: tuple[DraftingCallback, ...]) -> None:
        heard = self._heard_by_parts()
        self._added = tuple(callback for callback in callbacks if callback not in heard)

    def _heard_by_parts(self) -> tuple[DraftingCallback, ...]:
        return tuple(dict.fromkeys(callback for part in self.parts for callback in part.callbacks))

    def remove_callback(self, callback: DraftingCallback) -> None:
        """As [`~TreeDrafter.remove_callback`]; one of a part is taken off the part."""
        for part in self.parts:
            if callback in part.callbacks:
                return part.remove_callback(callback)
        super().remove_callback(callback)

    def acceptance(self, with_lookup: bool = False) -> list[tuple[DraftingPlan, float]]:
        looks_up = any(isinstance(part, LookupDrafter) for part in self.parts[1:])
        return self.parts[0].acceptance(with_lookup or looks_up)

    def check_target(self, target: PreTrainedModel) -> None:
        for part in self.parts:
            part.check_target(target)

    def with_network(self, network: Any) -> JoinedDrafter:
        first = self.parts[0].with_network(network)
        if first is self.parts[0]:
            return self
        twin = copy(self)
        twin.parts = (first, *self.parts[1:])
        return twin

    def begin(self, table: TokenTable, batch_size: int, max_length: int, *, first_position: int = 0) -> JoinedState:
        parts = [part.begin(table, batch_size, max_length, first_position=first_position) for part in self.parts]
        return JoinedState(table, batch_size, max_length, first_position=first_position, parts=parts)

    @property
    def has_fixed_rounds(self) -> bool:
        return all(part.has_fixed_rounds for part in self.parts)

    def begin_fixed(self, table: TokenTable, batch_size: int, max_length: int, width: int) -> JoinedState:
        parts = [part.begin_fixed(table, batch_size, max_length, width) for part in self.parts]
        return JoinedState(table, batch_size, max_length, parts=parts)

    def deepest(self, plan: DraftingPlan) -> int:
        return max(part.deepest(plan) for part in self.parts)

    def find(self, state: JoinedState, pairs: Pairs, limits: Limits) -> None:
        for part, part_state in zip(self.parts, state.parts, strict=True):
            part.find(part_state, pairs, limits)

    def extend(self, state: JoinedState, pairs: Pairs) -> None:
        for part, part_state in zip(self.parts, state.parts, strict=True):
            with part.lock:
                part.extend(part_state, part_state.caught_up(pairs))
        self._count(state)

    def propose(self, state: JoinedState, pairs: Pairs, limits: Limits) -> DraftTree:
        if limits.draft_sampling != "topk":
            return self._draw(state, pairs, limits)
        (drafter, *others), (first, *rest) = self.parts, state.parts
        trees = [propose(part, s, pairs, limits) for part, s in zip(others, rest, strict=True)]
        state.promised = sum(part.promised for part in rest)
        state.left_out = bool(trees) and state.promised >= limits.enough_found
        if state.left_out:
            wait(drafter, first, pairs)
        else:
            trees.insert(0, propose(drafter, first, first.caught_up(pairs), limits))
        self._count(state)
        tree = trees[0]
        for other in trees[1:]:
            if other.tokens.shape[1] > 1:
                tree = tree.merge(other.to(tree.tokens.device))
        return limits.cut(tree)

    def _draw(self, state: JoinedState, pairs: Pairs, limits: Limits) -> DraftTree:
        """A drawn tree beside the likeliest of what the others find, which gets at most half of the nodes."""
        half = tuple(nodes // 2 for nodes in limits.nodes)
        fixed = replace(limits, nodes=half, draft_sampling="topk")
        trees = [propose(part, s, pairs, fixed) for part, s in zip(self.parts[1:], state.parts[1:], strict=True)]
        found = trees[0] if trees else None
        for other in trees[1:]:
            found = found.merge(other).prune(half)
        taken = found.tokens.shape[1] - 1 if trees else 0
        left = replace(limits, nodes=tuple(nodes and nodes - taken for nodes in limits.nodes))
        state.parts[0].warp = state.warp
        drawn = propose(self.parts[0], state.parts[0], pairs, left)
        self._count(state)
        return drawn.join(found.to(drawn.tokens.device)) if taken else drawn

    @staticmethod
    def _count(state: JoinedState) -> None:
        state.calls, state.forward_rows = state.parts[0].calls, state.parts[0].forward_rows

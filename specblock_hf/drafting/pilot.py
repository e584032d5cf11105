# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What each round of a call may draft: as a plan says, or as a [`PlanController`] finds out while the call runs."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..planning.controller import PlanController, Setting
from ..planning.estimates import MULTIPLE
from ..planning.offers import Choice, Offer, Round, Way
from ..trees.paths import path_sums_on_host
from .drafter import DraftState, TreeDrafter
from .plan import DraftingPlan, Limits, round_limits
from .statistics import Clock


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..trees.tree import DraftTree
    from ..trees.verification import Walk


NODE_COST = {"cpu": 0.06}
"""Share of a plain step that a verified node costs, where nothing was measured yet."""

NODE_COST_ELSEWHERE = 0.004


class Pilot:
    """
    The limits of a call's rounds by a fixed plan.

    Args:
        plan ([`DraftingPlan`]): The same for all rounds.
    """

    def __init__(self, plan: DraftingPlan):
        self.plan = plan

    def limits(self, remaining: Sequence[int], room: int | None, depth: int | None) -> Limits:
        """Of the next round; the arguments are those of [`round_limits`]."""
        return round_limits(self.plan, remaining, room, depth)

    def cut(self, tree: DraftTree, trim: bool = True) -> DraftTree:
        """What of a tree is worth verifying; the arguments are those of [`~DraftTree.keep_likely`]."""
        return tree.keep_likely(self.plan.min_probability, trim)

    def record(
        self,
        tree: DraftTree,
        walk: Walk,
        active: Sequence[bool],
        state: DraftState,
        clock: Clock,
        columns: int,
        settled: bool,
    ) -> None:
        """
        A round is over but for its last lap.

        Args:
            tree ([`DraftTree`]): What was verified.
            walk ([`Walk`]): What was kept of it.
            active (sequence of `bool`): The rows that had not stopped before.
            state ([`DraftState`]): Of the drafter.
            clock ([`Clock`]): With the laps of drafting and verifying.
            columns (`int`): What the target read of each row.
            settled (`bool`): Later rounds will take as long; those of fixed shapes do not before they are captured.
        """

    def describe(self) -> str:
        """The plan in effect and why."""
        return f"{self.plan.tree_budget} nodes by {self.plan.num_forwards} forward(s), as given"


class AutoPilot(Pilot):
    """
    The limits of a call's rounds by a controller, which learns from them. Times of a CUDA device are read when it has
    come to them by itself, a round later.

    Args:
        controller ([`PlanController`]): Of the drafter; it may serve other calls too.
        setting ([`Setting`]): Of this call.
        offer ([`Offer`]): What the drafter can do.
    """

    def __init__(self, controller: PlanController, setting: Setting, offer: Offer):
        super().__init__(DraftingPlan(0, 1))
        self._controller, self._setting, self._offer = controller, setting, offer
        self._choice, self._may_draft = Choice(0), False
        self._remaining: Sequence[int] = ()
        self._behind = True  # the drafter has not taken in the prompt
        self._unread: deque[tuple[Round, Sequence[Any], Clock, int]] = deque()

    @classmethod
    def of_call(
        cls,
        drafter: TreeDrafter,
        target: PreTrainedModel,
        device: torch.device,
        batch_size: int,
        sampled: bool,
        sizes: Sequence[int] = (),
        drafts: DraftingPlan | None = None,
    ) -> AutoPilot:
        """
        Args:
            drafter ([`TreeDrafter`]): Of the call.
            target ([`~transformers.PreTrainedModel`]): Of the call.
            device (`torch.device`): Where the target runs.
            batch_size (`int`): Rows of the batch.
            sampled (`bool`): Tokens are drawn.
            sizes (sequence of `int`, *optional*): The only sizes of trees, the root counted.
            drafts ([`DraftingPlan`], *optional*): The only way to draft, of which a round may verify less.
        """
        setting = setting_of(target, device, batch_size, sampled, bool(sizes), drafts is not None)
        drafter.controller.begin(setting)
        return cls(drafter.controller, setting, offer_of(drafter, device, sizes, drafts))

    def limits(self, remaining: Sequence[int], room: int | None, depth: int | None) -> Limits:
        self._read()
        choice, self._remaining = self._controller.next(self._setting, self._offer), remaining
        if choice is not self._choice:
            forwards = max(choice.way.forwards, 1)
            self.plan = DraftingPlan(choice.nodes, forwards, choice.way.starts, choice.min_probability)
            self._choice = choice
        limits = super().limits(remaining, room, depth)
        self._may_draft = any(limits.nodes)
        waits = not choice.nodes and max(limits.depth) > 0
        return replace(limits, enough_found=choice.enough_found, waits=waits)

    def cut(self, tree: DraftTree, trim: bool = True) -> DraftTree:
        return tree.keep_likely(self.plan.min_probability, trim, MULTIPLE)

    def record(
        self,
        tree: DraftTree,
        walk: Walk,
        active: Sequence[bool],
        state: DraftState,
        clock: Clock,
        columns: int,
        settled: bool,
    ) -> None:
        nodes, lengths, stopped = walk.nodes.tolist(), walk.lengths.tolist(), walk.stopped.tolist()
        going = [row for row, is_active in enumerate(active) if is_active]
        # Where a row may end, it would count only if little were accepted.
        free = [row for row in going if self._remaining[row] > tree.max_depth + 1 and not stopped[row]]
        whole = free if self._choice.nodes else []
        # From CUDA they come when they come, and are looked at when the times have come too. The next round may be
        # drafted into the same memory.
        parts = (tree.parents, tree.log_probs) if whole else ()
        copies = [part.to("cpu", non_blocking=part.is_cuda, copy=True) for part in parts]
        drafted = bool(self._choice.nodes and self._offer.ways and not state.left_out)
        seen = Round(
            self._choice,
            rows=(),
            nodes=tree.tokens.shape[1],
            emitted=sum(lengths[row] for row in going) / len(going),
            drafted=drafted,
            found=state.promised,
            draft=0.0,
            rest=0.0,
            # With one token left nothing is drafted, nor where a recurrent target reads its states again.
            usual=self._may_draft and not (drafted and self._behind),
            settled=settled,
            # What plain steps read again was left by rounds that were not plain.
            columns=columns if self._choice.nodes and columns > tree.tokens.shape[1] else None,
        )
        self._behind = not drafted
        rows = [(copies[0][row], set(nodes[row]), copies[1][row]) for row in whole]
        self._unread.append((seen, rows, clock, len(clock)))

    def _read(self) -> None:
        """Tell the controller of the rounds whose times are there."""
        while self._unread:
            seen, rows, clock, end = self._unread[0]
            seconds = clock.seconds(end - 2, end + 1)
            if seconds is None:
                return
            self._unread.popleft()
            draft, verify, host = seconds
            paths = [_paths(parents.tolist(), kept, log_probs.tolist()) for parents, kept, log_probs in rows]
            if not seen.choice.nodes:
                draft, host = 0.0, host + draft
            self._controller.observe(
                self._setting, self._offer, replace(seen, rows=paths, draft=draft, rest=verify + host)
            )

    def describe(self) -> str:
        self._read()
        return self._controller.describe(self._setting)


def _paths(parents: Sequence[int], kept: set[int], log_probs: Sequence[float]) -> list[tuple[float, bool]]:
    """Log2 of each drafted node's path probability, and whether it was kept."""
    # As far down as anybody asks.
    sums = (max(total * 1.4426950408889634, -100.0) for total in path_sums_on_host(parents, log_probs))
    return [
        (total, node in kept) for node, (total, parent) in enumerate(zip(sums, parents, strict=True)) if parent >= 0
    ]


def fixed_plan(plan: DraftingPlan | str | None, drafter: TreeDrafter, device: torch.device) -> DraftingPlan:
    """A plan, or the drafter's default one on a device where it finds itself or none is given."""
    return plan if isinstance(plan, DraftingPlan) else drafter.default_plan(device)


def setting_of(
    target: PreTrainedModel,
    device: torch.device,
    batch_size: int = 1,
    sampled: bool = False,
    compiled: bool = False,
    compiled_drafts: bool = False,
) -> Setting:
    """What is learned in such a call holds in others like it; the arguments are those of [`Setting`]."""
    text = target.config.get_text_config()
    name = f"{type(target).__name__} {target.config.name_or_path} {text.num_hidden_layers}x{text.hidden_size}"
    where = (" ".join(name.split()), machine_of(device), str(target.dtype))
    return Setting(*where, batch_size, compiled, sampled, compiled_drafts)


def machine_of(device: torch.device) -> str:
    """What a device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def offer_of(
    drafter: TreeDrafter, device: torch.device, sizes: Sequence[int] = (), drafts: DraftingPlan | None = None
) -> Offer:
    """What a drafter can do on a device; the arguments are those of [`~AutoPilot.of_call`]."""
    figures: dict[Way, dict[int, float]] = {}
    # Of the network alone: what look-ups find is known before each round.
    plans = drafter.network.acceptance()
    for plan, tau in plans:
        figures.setdefault(_way_of(plan), {})[plan.tree_budget] = tau
    ways = {way: sorted(points.items()) for way, points in figures.items()}
    most = max([plan.tree_budget for plan, _ in plans] + [drafter.default_plan(device).tree_budget])
    if drafts is not None:
        ways, most = {_way_of(drafts): ways[min(ways, key=partial(_differs, drafts))]}, drafts.tree_budget
    return Offer(
        ways={} if drafter.look_ups == "alone" else ways,
        most=most,
        trusted=drafter.acceptance_measured,
        # Where all of a round is drafted at once, no part is left out.
        finds=drafter.look_ups == "alone" or (drafter.look_ups == "joined" and drafts is None),
        # Elsewhere the host would have to wait for the tree.
        cuts=device.type == "cpu" and not sizes and drafts is None,
        # All that can be drafted fits the largest.
        sizes=tuple(sorted({min(size - 1, most) for size in sizes if size > 1})),
        slope=NODE_COST.get(device.type, NODE_COST_ELSEWHERE),
    )


def _way_of(plan: DraftingPlan) -> Way:
    return Way(plan.num_forwards, plan.max_starts)


def _differs(plan: DraftingPlan, way: Way) -> tuple[int, float]:
    """How far a way is from a plan's, which has figures of its own as a rule."""
    starts, others = (1 / most if most else 0.0 for most in (plan.max_starts, way.starts))
    return abs(plan.num_forwards - way.forwards), abs(starts - others)

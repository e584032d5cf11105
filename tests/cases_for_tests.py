# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Random conversations with `generate()`: target, prompt, options, cache, drafter, plan and what interrupts them. A case
is a function of its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

from targets_for_tests import (
    TargetKind,
)


SLIDING = ("mistral", "gemma2", "gemma3", "gemma3n", "gemma4", "gpt_oss", "cohere2", "exaone4", "gemma3 with images")
NETWORKS = ("specblock", "best first", "eagle3", "medusa", "parallelspec", "falcon", "dflash", "jetspec", "dflash2")
NETWORKS = (*NETWORKS, "dspark")
DAMAGES = ("nan", "all nan", "inf", "huge", "d2t too high", "d2t negative", "bfloat16", "train")
ABORTS = ("streamer", "criterion", "processor", "allowed tokens", "callback", "drafter", "target")
EVENTS = ("on_generate_begin", "on_prompt", "on_draft", "on_verify", "on_commit", "on_generate_end")
LISTENERS = (
    *("adapting", "adapting to nan", "watcher raises", "clock raises", "bandit raises", "more tokens than there are"),
    *("trace", "trace on a full disk", "tracker raises", "log"),
)


@dataclass(frozen=True)
class Plan:
    """
    The fields of a [`DraftingPlan`], and where it is set.

    Args:
        fields (`dict`): Keyword arguments.
        place (`str`): "drafter", "call" (its generation configuration) or "part" of a joined drafter, after joining.
    """

    fields: dict[str, Any]
    place: str


@dataclass(frozen=True)
class DrafterKind:
    """
    A drafter.

    Args:
        name (`str`): "oracle", "garbage", "lookup", "third party" or one of `NETWORKS`.
        detail (`str`): What is wrong with it: one of `FAULTS`, or of `DAMAGES` for a network.
        layers (`str`): "none", "some" or "unrecorded", for one that reads the target's states.
        joined (`bool`): A look-up goes with it.
        sent (`str`): "", or "copied", "pickled" or "saved" before the call.
        listener (`str`): "" or one of `LISTENERS`.
        depths (`list[list[int]]`): For an oracle: right tokens in each round, of each row.
    """

    name: str
    detail: str = ""
    layers: str = "none"
    joined: bool = False
    sent: str = ""
    listener: str = ""
    depths: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Abort:
    """
    What ends a call before its time.

    Args:
        by (`str`): One of `ABORTS`.
        turn (`int`): Of the conversation.
        at (`int`): Which time it is called, from 0 on.
        error (`str`): "error", "interrupt" or "exit".
        event (`str`): One of `EVENTS`, for a callback.
    """

    by: str
    turn: int
    at: int
    error: str
    event: str


@dataclass(frozen=True)
class Case:
    """
    A conversation.

    Args:
        seed (`int`): That it was drawn from.
        target ([`TargetKind`]): The target.
        lengths (`tuple[int, ...]`): Of the prompts.
        source (`str`): "ids", "embeds", "image", "empty" or "nothing".
        ids (`str`): Their dtype.
        mask (`str`): A dtype, "absent", "holes" or "right" for padding on that side.
        positions (`int`): Added to the positions that `generate()` counts; 0 leaves that to it.
        turns (`int`): Calls.
        more (`int`): Tokens that the user adds between them.
        between (`str`): What else the user does there with a cache: "", "crop" or "copy".
        cache (`str`): "" for a new one each call, or the user's: "dynamic", "bare" (without configuration), "static".
        options (`dict`): Of `generate()`.
        returns (`tuple[str, ...]`): "dict" and what else is handed back.
        entry (`str`): "hook", "custom_generate", "inference mode" with the hook, or "attached".
        drafter ([`DrafterKind`]): The drafter.
        plan ([`Plan`], *optional*): How much it drafts.
        abort ([`Abort`], *optional*): What ends one of the calls.
    """

    seed: int
    target: TargetKind
    lengths: tuple[int, ...]
    source: str
    ids: str
    mask: str
    positions: int
    turns: int
    more: int
    between: str
    cache: str
    options: dict[str, Any]
    returns: tuple[str, ...]
    entry: str
    drafter: DrafterKind
    plan: Plan | None
    abort: Abort | None

    def draws(self) -> list[str]:
        """What was drawn, to be counted."""
        target, drafter = self.target, self.drafter
        drawn = [
            f"target: {target.family}",
            f"layers: {target.layers}",
            f"attention: {target.attention}",
            f"RoPE: {target.rope}",
            f"mode: {target.mode}",
            f"rows: {len(self.lengths)}",
            f"prompt: {self.source}",
            f"ids: {self.ids}",
            f"mask: {self.mask}",
            f"turns: {self.turns}",
            f"cache: {self.cache or 'of each call'}",
            f"entry: {self.entry}",
            f"drafter: {drafter.name}",
            f"reads: {drafter.layers}",
            *(f"option: {name}" for name in self.options),
            *(f"returns: {name}" for name in self.returns),
        ]
        for name, value in (
            ("target is", target.wrap),
            ("flag", target.flag),
            ("target has", target.damage),
            ("target is", "tight" if target.tight else ""),
            ("drafter has", drafter.detail),
            ("drafter is", drafter.sent),
            ("listener", drafter.listener),
            ("drafter is", "joined with a look-up" if drafter.joined else ""),
            ("positions", "given" if self.positions else ""),
            ("between turns", self.between),
        ):
            drawn += [f"{name}: {value}"] if value else []
        if self.plan is not None:
            fields = self.plan.fields
            drawn += [f"plan: of the {self.plan.place}", f"plan: {fields['num_forwards']} forwards"]
            drawn += ["plan: free starts"] * (fields["max_starts"] is None)
            drawn += [f"plan: {fields.get('draft_sampling', 'topk')}, {fields.get('verification', 'default')}"]
        if self.abort is not None:
            drawn += [f"abort: {self.abort.by}", f"abort: {self.abort.error}"]
            drawn += [f"abort: {self.abort.event}"] * (self.abort.by == "callback")
        return drawn


class Dice(Random):
    """Draws of a case."""

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def mostly(self, usual: Any, probability: float, *others: Any) -> Any:
        """The usual value, but with some probability one of others."""
        return self.choice(others) if self.chance(probability) else usual

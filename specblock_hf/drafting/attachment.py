# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters that serve calls of `generate()` which do not name them: who drafts for what, and what became of calls."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import GenerationMixin


if TYPE_CHECKING:
    from .drafter import TreeDrafter
    from .statistics import GenerationStatistics


logger = logging.getLogger(__name__)


@dataclass
class AttachmentStatistics:
    """
    What became of the calls of an attached target.

    Args:
        calls (`int`): Calls that named no assistant of their own.
        tokens (`int`): Emitted by those that the drafter served, over all rows.
        rounds (`int`): Rounds of every row of these.
        kept (`int`): Drafted tokens that were kept in those rounds.
        left_alone (`Counter`): Calls that ran as they would without the drafter, by the reason.
    """

    calls: int = 0
    tokens: int = 0
    rounds: int = 0
    kept: int = 0
    left_alone: Counter[str] = field(default_factory=Counter)

    @property
    def served(self) -> int:
        """Calls that the drafter served."""
        return self.calls - self.left_alone.total()

    @property
    def tau(self) -> float:
        """Tokens of a row and round, the target's own one included; not a number where no round was drafted."""
        return 1 + self.kept / self.rounds if self.rounds else float("nan")


class Attachment:
    """
    Lets a drafter serve all calls of a target's `generate()` that name no assistant, until it is detached; made by
    [`~TreeDrafter.attach`]. As a context manager it detaches at the end. Nothing is put on the target, so that its
    copies, pickles and saves are those of before, and copies are not attached.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        drafter ([`TreeDrafter`]): The drafter.

    Attributes:
        statistics ([`AttachmentStatistics`]):
            Of all calls since then. Where several threads call at once, tokens and rounds may be those of whichever
            finished last.
    """

    def __init__(self, target: GenerationMixin, drafter: TreeDrafter):
        self.drafter = drafter
        self.statistics = AttachmentStatistics()
        self._target = weakref.ref(target)
        self._lock = Lock()
        if _ATTACHED.setdefault(target, self) is not self:
            other = _ATTACHED[target].drafter.label
            raise ValueError(f"this {type(target).__name__} has a {other} attached already; detach it first.")

    def detach(self) -> None:
        """Leave the target's calls to themselves; a second time does nothing, and calls under way go on."""
        target = self._target()
        if target is not None and _ATTACHED.get(target) is self:
            del _ATTACHED[target]

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    def count_served(self, statistics: GenerationStatistics) -> None:
        """Count a call that the drafter has served."""
        with self._lock:
            self.statistics.calls += 1
            self.statistics.tokens += statistics.emitted
            self.statistics.rounds += len(statistics.accepted)
            self.statistics.kept += sum(statistics.accepted)

    def count_left_alone(self, reason: str) -> None:
        """Count a call that runs as it would without the drafter; a reason is logged once."""
        with self._lock:
            self.statistics.calls += 1
            self.statistics.left_alone[reason] += 1
            first = self.statistics.left_alone[reason] == 1
        if first:
            logger.warning("a call of generate() runs without the attached %s: %s", self.drafter.label, reason)


# By the object: two targets are never the same, whatever their weights are.
_ATTACHED: weakref.WeakKeyDictionary[GenerationMixin, Attachment] = weakref.WeakKeyDictionary()
_ASIDE: ContextVar[frozenset[int]] = ContextVar("_ASIDE", default=frozenset())


def attachment_of(target: Any) -> Attachment | None:
    """Of a target, if it has one."""
    return None if id(target) in _ASIDE.get() else _ATTACHED.get(target)


@contextmanager
def set_aside(target: nn.Module) -> Iterator[None]:
    """This thread's calls of a target run as if nothing was attached to it meanwhile."""
    model = next((module for module in target.modules() if isinstance(module, GenerationMixin)), target)
    token = _ASIDE.set(_ASIDE.get() | {id(model)})
    try:
        yield
    finally:
        _ASIDE.reset(token)


def attach(drafter: TreeDrafter, target: nn.Module) -> Attachment:
    """
    See [`~TreeDrafter.attach`].

    Raises:
        ValueError: In one sentence.
    """
    # Wrappers of peft and accelerate call the generate() of what they wrap.
    model = next((module for module in target.modules() if isinstance(module, GenerationMixin)), None)
    if model is None:
        raise ValueError(f"{type(target).__name__} has no generate() to draft for; attach to a causal language model.")
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose texts a tree drafter cannot follow; attach to a "
            "decoder-only model."
        )
    drafter.check_target(model)
    return Attachment(model, drafter)


@contextmanager
def refusing(drafter: TreeDrafter) -> Iterator[None]:
    """Mark errors as a refusal to serve a call, before any of its work was done."""
    try:
        yield
    except ValueError as error:
        error.refused_by = drafter  # type: ignore[attr-defined]
        raise


def is_refusal(error: ValueError, drafter: TreeDrafter) -> bool:
    """Whether an error is a drafter's refusal to serve a call, of which nothing has been done."""
    return vars(error).get("refused_by") is drafter

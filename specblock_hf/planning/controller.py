# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The plan that finds itself while decoding: what was learned in each setting, kept for the next call, written down or
frozen.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..locks import DrafterLock
from .offers import Choice, Offer, Round, Way
from .record import Record


logger = logging.getLogger(__name__)

EVERY = 12
"""Rounds after which what pays most is worked out again; in the first ones of a record and after a lesson at once."""

VERSION = 6


@dataclass(frozen=True)
class Setting:
    """
    Where what was learned holds.

    Args:
        target (`str`): Which model.
        machine (`str`): Which device.
        dtype (`str`): Of the target's weights.
        batch_size (`int`): Rows of a batch.
        compiled (`bool`): Trees are verified in fixed shapes.
        sampled (`bool`): Tokens are drawn.
        compiled_drafts (`bool`): And drafted so.
    """

    target: str
    machine: str
    dtype: str
    batch_size: int = 1
    compiled: bool = False
    sampled: bool = False
    compiled_drafts: bool = False

    def __str__(self) -> str:
        how = "sampled" if self.sampled else "greedy"
        how += ", compiled" * self.compiled + ", compiled drafts" * self.compiled_drafts
        return f"{self.target}, {self.machine}, {self.dtype}, batch {self.batch_size}, {how}"


class PlanController:
    """
    Chooses how much each round drafts, by what rounds have cost and accepted so far. Serves several threads.

    Attributes:
        frozen (`bool`): Nothing is learned or tried any more, so that a call drafts the same whenever it is made.

    Example:

    ```python
    >>> drafter.controller.save("plan.json")
    >>> drafter.controller = PlanController.load("plan.json").freeze()
    ```
    """

    def __init__(self) -> None:
        self.frozen = False
        self._records: dict[Setting, Record] = {}
        self._choices: dict[Setting, tuple[int, Choice]] = {}
        self._again: dict[Setting, Choice] = {}
        self._foreign = False
        self._lock = DrafterLock()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {"saved": self.to_dict(), "frozen": self.frozen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(vars(PlanController()))
        self._records, self.frozen = self._read(state["saved"]), state["frozen"]

    def __repr__(self) -> str:
        lines = [f"{setting}: {self.describe(setting)}" for setting in list(self._records)]
        return f"{type(self).__name__}({'frozen' * self.frozen}{'; '.join(lines)})"

    def freeze(self) -> PlanController:
        """Learn nothing any more; this controller."""
        with self._lock:
            self.frozen = True
            self._choices.clear()
        return self

    def begin(self, setting: Setting) -> None:
        """
        A call begins, with a text of its own.

        Args:
            setting ([`Setting`]): Of the call.
        """
        with self._lock:
            self._again.pop(setting, None)
            if setting in self._records and not self.frozen:
                self._records[setting].forget_text()
                self._work_out_again(setting)

    def next(self, setting: Setting, offer: Offer) -> Choice:
        """
        What to draft in the next round.

        Args:
            setting ([`Setting`]): Of the call.
            offer ([`Offer`]): What its drafter can do.
        """
        with self._lock:
            record = self._record(setting, offer)
            if setting in self._again and not self.frozen:
                return self._again.pop(setting)
            at, best = self._choices.get(setting, (-EVERY, Choice(0)))
            if record.now - at < (EVERY if record.now > 4 * EVERY else 1) or (
                self.frozen and setting in self._choices
            ):
                return best
            # A frozen controller would hold what it thinks of the last text against all others.
            best, lesson = (record.of_any_text() if self.frozen else record).decide(offer)
            self._choices[setting] = record.now, best
            return best if lesson is None or self.frozen else lesson

    def observe(self, setting: Setting, offer: Offer, seen: Round) -> None:
        """
        Learn from a round; a frozen controller does not.

        Args:
            setting ([`Setting`]): Of its call.
            offer ([`Offer`]): As it was asked with.
            seen ([`Round`]): What happened.
        """
        if self.frozen:
            return
        with self._lock:
            self._record(setting, offer).observe(offer, seen)
            if seen.choice.learns:
                self._work_out_again(setting)
                if not seen.settled or (seen.drafted and not seen.usual):
                    # What it cost says nothing of rounds that are captured, and in which the drafter has caught up.
                    self._again[setting] = seen.choice

    def fill(
        self, setting: Setting, offer: Offer, verify: list[tuple[int, float]], draft: list[tuple[Way, float]]
    ) -> None:
        """
        Take measured seconds over instead of what is known of this setting.

        Args:
            setting ([`Setting`]): Where they were measured.
            offer ([`Offer`]): What the drafter can do there.
            verify (list of (`int`, `float`)): Nodes, the root counted, and seconds of everything but drafting.
            draft (list of ([`Way`], `float`)): Seconds of drafting.
        """
        with self._lock:
            record = self._record(setting, offer)
            record.take(verify, draft)
            self._choices.pop(setting, None)  # a frozen controller, too, works it out by what was measured

    def describe(self, setting: Setting) -> str:
        """The plan in effect there, why, and how much is known."""
        with self._lock:
            if setting not in self._records:
                return "nothing is known yet"
            record, (_, choice) = self._records[setting], self._choices.get(setting, (0, Choice(0)))
            return f"{choice}: {choice.why} ({record.sureness()})"

    def save(self, path: str | Path) -> None:
        """Write everything that was learned to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PlanController:
        """
        What [`~PlanController.save`] wrote. What holds for other targets and machines stays in it and is not used.

        Raises:
            ValueError: The file is none of ours.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            controller = cls()
            controller._records = cls._read(saved)
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} holds no plans that this release can read; save them again with controller.save()."
            ) from error
        controller._foreign = True
        return controller

    def to_dict(self) -> dict[str, Any]:
        with self._lock:
            records = [{"setting": asdict(s)} | record.to_dict() for s, record in self._records.items()]
        return {"version": VERSION, "records": records}

    @staticmethod
    def _read(saved: dict[str, Any]) -> dict[Setting, Record]:
        if saved["version"] != VERSION:
            raise KeyError("version")
        records = {}
        for values in saved["records"]:
            learned = dict(values)
            setting = Setting(**learned.pop("setting"))
            records[setting] = Record.from_dict(learned)
        return records

    def _work_out_again(self, setting: Setting) -> None:
        """Do not wait with it; until then the plan in effect is the last one."""
        if setting in self._choices:
            self._choices[setting] = -EVERY, self._choices[setting][1]

    def _record(self, setting: Setting, offer: Offer) -> Record:
        if setting not in self._records:
            here = (setting.target, setting.machine)
            if self._foreign and here not in {(known.target, known.machine) for known in self._records}:
                logger.warning("What was loaded of plans is for another target or machine than %s: not used.", setting)
            self._foreign = False
            self._records[setting] = Record(offer.slope, setting.batch_size)
        return self._records[setting]

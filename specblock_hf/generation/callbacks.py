# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What may listen to drafting: hooks with a Trainer's habits, and three ready-made listeners."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drafting.drafter import DraftingCall, DraftingCallback


if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from ..drafting.pairs import Pairs, Scored
    from ..drafting.statistics import GenerationStatistics
    from ..trees.tree import DraftTree
    from ..trees.verification import Walk


logger = logging.getLogger(__name__)


def tell(callbacks: Sequence[DraftingCallback], hook: str, call: DraftingCall, *what: Any) -> None:
    """
    Tell every callback of a call, in the order in which they were added.

    Args:
        callbacks (sequence of [`DraftingCallback`]): As they were when the call began.
        hook (`str`): What has happened: the name of the method that hears of it.
        call ([`DraftingCall`]): The call.
        *what: What else that method takes.
    """
    for callback in callbacks:
        if callback.failure is not None:
            continue
        try:
            getattr(callback, hook)(call, *what)
        except Exception as error:
            if not callback.optional:
                raise
            call.notes.pop(callback, None)
            callback.fail(error)


def call_figures(statistics: GenerationStatistics) -> dict[str, float]:
    """The numbers of one finished call that are worth following over many; without a round there is no tau."""
    figures = {
        "emitted": statistics.emitted,
        "rounds": statistics.rounds,
        "seconds": statistics.seconds,
        "tokens_per_second": statistics.tokens_per_second,
    }
    if statistics.rounds:
        figures |= {
            "tau": statistics.tau,
            "nodes_per_round": statistics.nodes_verified / statistics.rounds,
            "draft_share": statistics.draft_share,
        }
    return figures


class StatisticsLogger(DraftingCallback):
    """
    Writes one line about every call to the log of this package.

    Args:
        level (`int`, *optional*, defaults to `logging.INFO`): Of the lines.
    """

    optional = True

    def __init__(self, level: int = logging.INFO):
        self.level = level

    def on_generate_end(self, call: DraftingCall) -> None:
        figures = call_figures(call.statistics)
        tau = f"tau {figures['tau']:.2f}, " if "tau" in figures else ""
        logger.log(
            self.level,
            "%d tokens in %.2f s: %s%.1f tokens/s",
            figures["emitted"],
            figures["seconds"],
            tau,
            figures["tokens_per_second"],
        )


class JsonlTrace(DraftingCallback):
    """
    Appends a line of JSON for every round and every call: counts and seconds, no text and no token.

    Args:
        path (`str` or `Path`): The file; it is created with its folders, and added to if it exists.
    """

    optional = True

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()  # whatever the working folder is when a round is written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def on_commit(self, call: DraftingCall, tree: DraftTree, scored: Scored, walk: Walk, pairs: Pairs) -> None:
        nodes, emitted = tree.num_nodes.tolist(), walk.lengths.tolist()
        self._write({"event": "commit", "nodes": nodes, "emitted": emitted})

    def on_generate_end(self, call: DraftingCall) -> None:
        self._write({"event": "end", "batch_size": call.batch_size} | call_figures(call.statistics))

    def _write(self, row: dict[str, Any]) -> None:
        # One write for each line, which concurrent calls cannot tear.
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")


class TrackerCallback(DraftingCallback):
    """
    Hands the figures of every call to an experiment tracker (TensorBoard, Weights & Biases, ... through accelerate).

    Args:
        tracker (`Tracker`): One of accelerate's trackers.
        prefix (`str`, *optional*, defaults to `"drafting/"`): Before every name.
    """

    optional = True

    def __init__(self, tracker: GeneralTracker, prefix: str = "drafting/"):
        self.tracker = tracker
        self.prefix = prefix
        self.calls = 0

    def on_generate_end(self, call: DraftingCall) -> None:
        figures = {f"{self.prefix}{name}": value for name, value in call_figures(call.statistics).items()}
        self.tracker.log(figures, step=self.calls)
        self.calls += 1

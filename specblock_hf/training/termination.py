# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Ending a run when its process is told to, by whoever started it or a scheduler that takes the machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Terminated(Exception):
    """
    A run ended on a signal.

    Args:
        step (`int`): The last step, which is saved.
        by (`signal.Signals`): The signal.
    """

    def __init__(self, step: int, by: signal.Signals):
        super().__init__(f"ended by {by.name} after step {step}, which is saved; the same command goes on from there.")
        self.by = by


class Termination:
    """
    Notes SIGTERM and SIGINT, a terminal's Ctrl-C, instead of dying of them, for as long as it is entered. A second
    SIGINT does what it always does.

    Args:
        heeded (`bool`):
            Whether to. Processes that work together get the signal at different steps, and one that stopped would let
            the others wait; they die as they would.
    """

    def __init__(self, heeded: bool):
        # Python lets the main thread alone say what a signal does.
        self._noted = SIGNALS if heeded and threading.current_thread() is threading.main_thread() else ()
        self._before: dict[int, Any] = {}
        self.asked: signal.Signals | None = None

    def __enter__(self) -> Termination:
        self._before = {number: signal.getsignal(number) for number in self._noted}
        for number in self._noted:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = signal.Signals(number)
        if number == signal.SIGINT:  # a launcher may pass SIGTERM on more than once, a person means it
            signal.signal(number, self._before[number])

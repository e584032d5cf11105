# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Ending a run when its process is told to, as schedulers do before they take a machine away."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Terminated(Exception):
    """
    A run ended on SIGTERM.

    Args:
        step (`int`): The last step, which is saved.
    """

    def __init__(self, step: int):
        super().__init__(f"ended by SIGTERM after step {step}, which is saved; the same command goes on from there.")


class Termination:
    """
    Notes SIGTERM instead of dying of it, for as long as it is entered.

    Args:
        heeded (`bool`):
            Whether to. Processes that work together get the signal at different steps, and one that stopped would let
            the others wait; they die as they would.
    """

    def __init__(self, heeded: bool):
        # Python lets the main thread alone say what a signal does.
        self._heeded = heeded and threading.current_thread() is threading.main_thread()
        self._before: Any = None
        self.asked = False

    def __enter__(self) -> Termination:
        if self._heeded:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._heeded:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

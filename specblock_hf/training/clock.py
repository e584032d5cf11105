# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the time of a training step goes to."""

from __future__ import annotations

import time
from typing import Any

import torch


class StepClock:
    """
    Adds up time by phase, on a GPU the GPU's own: nobody waits for it before the shares are asked for.

    Args:
        device (`torch.device`): Whose time it is.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.laps: list[tuple[str, Any, Any]] = []
        self.last: Any = None

    def start(self) -> None:
        """Begin the first phase of a step."""
        self.last = self._mark()

    def lap(self, phase: str) -> None:
        """Charge `phase` with the time since the last call."""
        now = self._mark()
        self.laps.append((phase, self.last, now))
        self.last = now

    def shares(self) -> dict[str, float]:
        """Share of every phase since the last call of this method."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = {}
        for phase, first, last in self.laps:
            seconds[phase] = seconds.get(phase, 0.0) + (first.elapsed_time(last) if on_gpu else last - first)
        self.laps = []
        total = sum(seconds.values())
        return {phase: round(lasted / total, 3) for phase, lasted in seconds.items()}

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

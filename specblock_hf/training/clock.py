# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the time of a training step goes to."""

from __future__ import annotations

from ..devices import PhaseClock


class StepClock(PhaseClock):
    """
    Adds up time by phase, on a GPU the GPU's own: nobody waits for it before the shares are asked for.

    Args:
        device (`torch.device`): Whose time it is.
    """

    def shares(self) -> dict[str, float]:
        """Share of every phase since the last call of this method."""
        seconds, self.laps = self.totals(), []
        total = sum(seconds.values())
        return {phase: round(lasted / total, 3) for phase, lasted in seconds.items()}

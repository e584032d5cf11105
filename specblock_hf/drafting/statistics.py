# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What one `generate()` call with a drafter did and where its time went."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..devices import PhaseClock


if TYPE_CHECKING:
    from ..trees.tree import DraftTree
    from ..trees.verification import Walk


@dataclass
class GenerationStatistics:
    """
    Counts and seconds of one call. A round is one verification by the target; the token that the prefill emits belongs
    to none.

    Args:
        rounds (`int`): Verifications.
        emitted (`int`): Tokens emitted, the prefill's counted.
        accepted (`list[int]`): Drafted tokens kept (A), one entry for each round of each unfinished row.
        cut (`list[bool]`):
            Along with `accepted`: the row ended in that round (EOS, `max_new_tokens`, any stopping criterion).
        nodes_verified (`int`): Tree nodes that the target scored, roots and padding counted, finished rows not.
        target_calls (`int`): Forwards of the target, prefill chunks counted.
        drafter_calls (`int`): Forwards of the drafter.
        prefill_seconds (`float`):
            The target's forwards over the prompt, and the drafter's over all chunks but the last.
        draft_seconds (`float`): Spent in `propose`.
        verify_seconds (`float`): Masks and forwards of the target over trees.
        host_seconds (`float`): Everything else of a round: choosing tokens, processors, stopping, the cache.
        row (`list[int]`): Along with `accepted`: which row of the batch it was.
        drafter_rows (`int`): Rows of the drafter's forwards: committed pairs, the prompt's included, and starts.
        compiled_rounds (`int`): Rounds that were verified in fixed shapes; see [`compile_rounds`].
        captured_rounds (`int`): How many of these replayed a CUDA graph.
        captured_drafts (`int`): Rounds whose draft replayed a CUDA graph.
        eager_because (`str`, *optional*): Why rounds, or their drafts, did not have fixed shapes that they could have.
        prepacked (`bool`): Rounds were verified with prepacked weights; see [`PrepackedWeights`].
        plan (`str`): What the last rounds drafted by, and why.
    """

    rounds: int = 0
    emitted: int = 0
    accepted: list[int] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    nodes_verified: int = 0
    target_calls: int = 0
    drafter_calls: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    host_seconds: float = 0.0
    row: list[int] = field(default_factory=list)
    drafter_rows: int = 0
    compiled_rounds: int = 0
    captured_rounds: int = 0
    captured_drafts: int = 0
    eager_because: str | None = None
    prepacked: bool = False
    plan: str = ""

    def add_round(self, tree: DraftTree, walk: Walk, rows: int) -> None:
        """Count one verified tree, of which the target scored so many rows, and what was kept of it."""
        self.rounds += 1
        self.nodes_verified += rows * tree.tokens.shape[1]
        for row, (length, stopped) in enumerate(zip(walk.lengths.tolist(), walk.stopped.tolist(), strict=True)):
            if length:
                self.emitted += length
                self.accepted.append(length - 1)
                self.cut.append(stopped)
                self.row.append(row)

    @property
    def tau(self) -> float:
        """Tokens emitted per verification, `(emitted - 1) / rounds` for one row; NaN without a round."""
        return _mean_emitted(self.accepted)

    @property
    def tau_uncut(self) -> float:
        """`tau` over the rounds that neither EOS nor `max_new_tokens` nor another criterion ended; NaN without one."""
        return _mean_emitted([kept for kept, cut in zip(self.accepted, self.cut, strict=True) if not cut])

    def tau_of(self, row: int) -> float:
        """`tau` of one row of the batch; NaN if it needed no round."""
        return _mean_emitted([kept for kept, its in zip(self.accepted, self.row, strict=True) if its == row])

    @property
    def accepted_per_depth(self) -> list[int]:
        """Entry d counts the rounds that kept a node at depth d + 1."""
        return [sum(kept > depth for kept in self.accepted) for depth in range(max(self.accepted, default=0))]

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.draft_seconds + self.verify_seconds + self.host_seconds

    @property
    def draft_share(self) -> float:
        """The drafter's share of the rounds' time (draft + verify + host); NaN without a round."""
        iteration = self.draft_seconds + self.verify_seconds + self.host_seconds
        return self.draft_seconds / iteration if iteration else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second, prefill included; NaN if nothing was timed."""
        return self.emitted / self.seconds if self.seconds else math.nan

    def summary(self) -> str:
        """A few lines for people."""
        lines = [
            f"{self.emitted} tokens in {self.seconds:.2f} s: {self.tokens_per_second:.1f} tokens/s",
            f"prefill {self.prefill_seconds:.2f} s, draft {self.draft_seconds:.2f} s, "
            f"verify {self.verify_seconds:.2f} s, host {self.host_seconds:.2f} s",
            f"{self.target_calls} calls of the target, {self.drafter_calls} of the drafter",
        ]
        if self.rounds:
            shares = ", ".join(f"{count / len(self.accepted):.0%}" for count in self.accepted_per_depth)
            lines += [
                f"draft share {self.draft_share:.0%} of the rounds' time",
                f"tau {self.tau:.2f} over {self.rounds} rounds ({self.tau_uncut:.2f} where nothing cut it short)",
                f"{self.nodes_verified / self.rounds:.1f} nodes verified a round",
                f"accepted by depth: {shares or 'none'}",
            ]
            lines += [f"plan: {self.plan}"] * bool(self.plan)
        return "\n".join(lines)


class Clock(PhaseClock):
    """
    Splits a call's time into phases. On CUDA the laps are events on the stream and nothing waits for the device until
    `write_to`.

    Args:
        device (`torch.device`): Where the target runs.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.start()

    def __len__(self) -> int:
        return len(self.laps)

    def seconds(self, first: int, end: int) -> list[float] | None:
        """Those of some laps, counted from 0; `None` as long as the device has not come to their end."""
        laps = self.laps[first:end]
        if len(self.laps) < end or (self.device.type == "cuda" and not laps[-1][2].query()):
            return None
        return [self._between(before, now) for _, before, now in laps]

    def write_to(self, statistics: GenerationStatistics) -> None:
        """Add every phase's seconds up in `statistics`."""
        totals = self.totals()
        statistics.prefill_seconds, statistics.draft_seconds = totals["prefill"], totals["draft"]
        statistics.verify_seconds, statistics.host_seconds = totals["verify"], totals["host"]


def _mean_emitted(accepted: list[int]) -> float:
    return 1 + sum(accepted) / len(accepted) if accepted else math.nan

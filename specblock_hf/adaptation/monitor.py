# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Telling a drafter that gets worse from texts that happen to be harder."""

from __future__ import annotations

from typing import Literal


LEVEL_WEIGHT = 0.2  # of an interval in the level of tau: slow enough that a slow fall does not pass as the usual


class FallMonitor:
    """
    Watches the accepted length over intervals of queries and tells when it keeps falling (section 3.4).

    Args:
        interval (`int`, *optional*, defaults to 8): Queries of an interval; over fewer, tau falls by chance.
        falls (`int`, *optional*, defaults to 3): Intervals in a row that must have fallen.
        least_fall (`float`, *optional*, defaults to 0.1):
            Share of tau that must be lost over them, half of it through the weights: the good ones would lose less on
            the newest texts. The paper has none, but three falls in a row happen by chance in one of 24 intervals, and
            texts can be harder than those before.
    """

    def __init__(self, interval: int = 8, falls: int = 3, least_fall: float = 0.1):
        self.interval = interval
        self.falls = falls
        self.least_fall = least_fall
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        self.taus: list[float] = []
        self.level: float | None = None
        self._queries = self._rounds = self._emitted = 0

    def see(self, emitted: int, rounds: int) -> Literal["open", "held", "fell", "fallen"]:
        """
        Take in a query: `"open"` inside of an interval, otherwise whether tau `"held"` its usual level or `"fell"`
        below it, or has now `"fallen"` from interval to interval too often.

        Args:
            emitted (`int`): Tokens of the query's rounds.
            rounds (`int`): Its rounds.
        """
        self._queries, self._rounds, self._emitted = self._queries + 1, self._rounds + rounds, self._emitted + emitted
        if self._queries < self.interval or not self._rounds:
            return "open"
        tau = self._emitted / self._rounds
        level = tau if self.level is None else self.level
        self.taus, self.level = [*self.taus, tau][-self.falls - 1 :], level + LEVEL_WEIGHT * (tau - level)
        self._queries = self._rounds = self._emitted = 0
        falling = all(after < before for before, after in zip(self.taus, self.taus[1:], strict=False))
        if len(self.taus) > self.falls and falling and tau < (1 - self.least_fall) * self.taus[0]:
            return "fallen"
        return "held" if tau >= level else "fell"

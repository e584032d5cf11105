# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Whether a query is worth an update of the drafter, and of which part (https://huggingface.co/papers/2605.07243,
sections 3.4 and A.3). Knows no model and no clock, so that it can be tried in a simulated environment.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal


Action = Literal["skip", "head", "full"]

ACTIONS: tuple[Literal["full", "head"], ...] = ("full", "head")
"""What may be updated."""

SEEDS = 2  # rewards of each kind before the cold start goes on with full updates


@dataclass(frozen=True)
class Decision:
    """
    What was decided after one query, and from which numbers.

    Args:
        query (`int`): Queries seen before it.
        action (`str`): `"skip"`, `"head"` or `"full"`.
        reason (`str`):
            `"warm-up"`, `"cool-down"` and `"not ready"` always skip; `"explored"` was drawn, `"gain"` chosen by
            predicted gain; `"schedule"` comes from a policy without a bandit.
        signal (`float`): Sum of 1 - q over the query's rejected positions.
        throughput (`float`, *optional*):
            Tokens per second of the last queries without an update beside them; `None` before the warm-up's end.
        gains (`dict[str, float]`): Predicted gain of every action, relative to the throughput.
        reward (`float`, *optional*): Of the update whose measurement ended with this query.
        rewarded (`str`, *optional*): Which action that was.
    """

    query: int
    action: Action
    reason: str
    signal: float
    throughput: float | None = None
    gains: dict[str, float] | None = None
    reward: float | None = None
    rewarded: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True, eq=False)
class AdaptationBandit:
    """
    Chooses among skip, head and full after every query. The value of an action is a moving average of the reward that
    its updates brought for each unit of the signal that triggered them, the reward being the relative change of the
    throughput over the queries that follow, which contains what the update cost. An update is made where value times
    signal is largest and above 0. The paper's constants are not public; the defaults are those that worked here.

    Args:
        beta (`float`, *optional*, defaults to 0.2):
            Weight of a new reward; the first ones are averaged, until an equal weight would be below it.
        min_signal (`float`, *optional*, defaults to 0.5): Rewards of updates triggered by less are not learned from.
        warmup (`int`, *optional*, defaults to 4): Queries that only measure the throughput.
        cold_start (`int`, *optional*, defaults to 32):
            Updates over which exploration decays. The first ones gain most, and for all queries that follow, so after
            two of each kind full ones are tried: those gained more each, and as much for each second.
        epsilon (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.02)`):
            Chance of trying an update whatever its predicted gain, at the first update and after the cold start. The
            last one keeps values that noise made negative from staying so.
        interval (`int`, *optional*, defaults to 4): Queries over which a throughput is measured.
        cooldown (`int`, *optional*, defaults to 3):
            Queries after an update that trigger none; an open measurement blocks them as well.
        seed (`int`, *optional*, defaults to 0): Of the exploration.

    Raises:
        ValueError: A constant out of its range.
    """

    beta: float = 0.2
    min_signal: float = 0.5
    warmup: int = 4
    cold_start: int = 32
    epsilon: tuple[float, float] = (1.0, 0.02)
    interval: int = 4
    cooldown: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1 or not all(0 <= chance <= 1 for chance in self.epsilon):
            raise ValueError(
                f"beta is {self.beta} and epsilon {self.epsilon}; beta lies in (0, 1] and chances lie in [0, 1]."
            )
        if self.interval < 1 or min(self.warmup, self.cold_start, self.cooldown) < 0 or self.min_signal < 0:
            raise ValueError(
                f"interval is {self.interval}, warmup {self.warmup}, cold_start {self.cold_start}, cooldown "
                f"{self.cooldown} and min_signal {self.min_signal}; an interval has at least one query and nothing "
                "else is negative."
            )
        self.random = random.Random(self.seed)
        self.queries = self.events = 0
        self.reset()
        self._recent: deque[tuple[int, float]] = deque(maxlen=self.interval)

    def reset(self) -> None:
        """Forget the values, and the update that is being measured."""
        self.values = dict.fromkeys(ACTIONS, 0.0)
        self.rewards = dict.fromkeys(ACTIONS, 0)
        self._blocked = 0
        self._open: dict[str, Any] | None = None

    @property
    def exploration(self) -> float:
        """The chance of trying an update now."""
        first, last = self.epsilon
        return first + (last - first) * min(self.events / max(self.cold_start, 1), 1.0)

    def step(self, signal: float, tokens: int, seconds: float, ready: bool = True, updating: bool = False) -> Decision:
        """
        Take in a finished query and decide about an update.

        Args:
            signal (`float`): Sum over the query's rejected positions of 1 - q, q the drafter's probability of the
                target's token.
            tokens (`int`): Emitted by the query.
            seconds (`float`): That it took, updates included.
            ready (`bool`, *optional*, defaults to `True`): There is enough to train on.
            updating (`bool`, *optional*, defaults to `False`):
                An update ran meanwhile. What that cost is the update's, and not the usual throughput.
        """
        if not updating:
            self._recent.append((tokens, seconds))
        warm = self.queries + 1 >= self.warmup and bool(self._recent)
        throughput = _throughput(self._recent) if warm else None
        rewarded, reward = self._measure(tokens, seconds)
        action, reason = self._choose(signal, throughput is not None, ready)
        decision = Decision(
            query=self.queries,
            action=action,
            reason=reason,
            signal=signal,
            throughput=throughput,
            gains={name: value * signal for name, value in self.values.items()},
            reward=reward,
            rewarded=rewarded,
        )
        self.queries += 1
        if action != "skip":
            self.events += 1
            # The query that closes the measurement may trigger the next update.
            self._blocked = max(self.cooldown, self.interval - 1)
            self._open = {"action": action, "signal": signal, "before": throughput, "queries": 0} | _NOTHING
        return decision

    def _measure(self, tokens: int, seconds: float) -> tuple[str | None, float | None]:
        """Add a query to the open measurement; at its end, the action and its reward."""
        if self._open is None:
            return None, None
        self._open["queries"] += 1
        self._open["tokens"] += tokens
        self._open["seconds"] += seconds
        if self._open["queries"] < self.interval:
            return None, None
        done, self._open = self._open, None
        reward = done["tokens"] / done["seconds"] / done["before"] - 1
        if done["signal"] >= self.min_signal and done["signal"] > 0:
            name = done["action"]
            self.rewards[name] += 1
            weight = max(self.beta, 1 / self.rewards[name])
            self.values[name] += weight * (reward / done["signal"] - self.values[name])
        return done["action"], reward

    def _choose(self, signal: float, warm: bool, ready: bool) -> tuple[Action, str]:
        if not warm:
            return "skip", "warm-up"
        if self._blocked:
            self._blocked -= 1
            return "skip", "cool-down"
        if not ready:
            return "skip", "not ready"
        if self.random.random() < self.exploration:
            return self._try(), "explored"
        best = max(ACTIONS, key=lambda name: self.values[name] * signal)
        return (best if self.values[best] * signal > 0 else "skip"), "gain"

    def _try(self) -> Action:
        """
        Which update to try: in turns until both have a value to go by; then the full one, which gains more where there
        is much to learn; and after the cold start the less tried one, whose value may be wrong.
        """
        fewest = min(ACTIONS, key=lambda name: self.rewards[name])
        if self.rewards[fewest] < SEEDS or self.events >= self.cold_start:
            return fewest
        return "full"

    def state_dict(self) -> dict[str, Any]:
        """Everything that it has learned, as numbers, strings and lists."""
        version, internal, gauss = self.random.getstate()
        return {
            "queries": self.queries,
            "events": self.events,
            "values": dict(self.values),
            "rewards": dict(self.rewards),
            "blocked": self._blocked,
            "open": None if self._open is None else dict(self._open),
            "recent": [list(query) for query in self._recent],
            "random": [version, list(internal), gauss],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was called; the constants are those of this object."""
        self.queries, self.events = state["queries"], state["events"]
        self.values, self.rewards = dict(state["values"]), dict(state["rewards"])
        self._blocked = state["blocked"]
        self._open = None if state["open"] is None else dict(state["open"])
        self._recent = deque(((tokens, seconds) for tokens, seconds in state["recent"]), maxlen=self.interval)
        version, internal, gauss = state["random"]
        self.random.setstate((version, tuple(internal), gauss))


_NOTHING = {"tokens": 0, "seconds": 0.0}


def _throughput(queries: Sequence[tuple[int, float]] | deque[tuple[int, float]]) -> float:
    return sum(tokens for tokens, _ in queries) / sum(seconds for _, seconds in queries)

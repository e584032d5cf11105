# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The adaptation bandit in a simulated service in which the gain of every update is known: how often it takes the better
action once it has learned, and the regret, that is the gain that it missed against always taking the best action.

    python benchmarks/bandit_regret.py
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from specblock_hf.adaptation import AdaptationBandit, Decision


RESULTS = Path(__file__).parent / "results"
TOKENS = 64
CASES = {
    "head pays more": {"head": 0.008, "full": 0.002},
    "full pays more": {"head": 0.002, "full": 0.008},
    "head pays, full costs": {"head": 0.004, "full": -0.006},
    "nothing pays": {"head": -0.004, "full": -0.008},
}
"""Relative gain of throughput for each unit of the signal."""


@dataclass
class SimulatedService:
    """
    Queries of one service, whose throughput an update multiplies by 1 + gain * signal for all that follow.

    Args:
        gains (`dict[str, float]`): Of every action, for each unit of the signal that triggered it.
        noise (`float`): Standard deviation of the logarithm of a query's throughput.
        seed (`int`): Of signals and noise.
    """

    gains: Mapping[str, float]
    noise: float = 0.03
    seed: int = 0
    throughput: float = 25.0
    regret: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def run(self, bandit: AdaptationBandit, queries: int) -> SimulatedService:
        """Serve; `right` gets an entry for every free decision of the bandit, `regret` one for every query."""
        rng = random.Random(self.seed)
        missed = 0.0
        for _ in range(queries):
            signal = rng.uniform(3, 9)
            seconds = TOKENS / (self.throughput * rng.lognormvariate(0, self.noise))
            decision = bandit.step(signal, TOKENS, seconds)
            if is_free(decision):
                gained, best = self.gain(decision.action), max(0.0, *self.gains.values())
                self.right.append(gained == best)
                missed += (best - gained) * signal
            self.throughput *= 1 + self.gain(decision.action) * signal
            self.regret.append(missed)
        return self

    def gain(self, action: str) -> float:
        return 0.0 if action == "skip" else self.gains[action]


def is_free(decision: Decision) -> bool:
    """Whether the bandit had a choice."""
    return decision.reason in ("gain", "explored")


def late_share(services: Sequence[SimulatedService]) -> float:
    """Share of right decisions in the later half of every run."""
    late = [right for service in services for right in service.right[len(service.right) // 2 :]]
    return sum(late) / len(late)


def simulate(gains: Mapping[str, float], seeds: int, queries: int, noise: float = 0.03) -> list[SimulatedService]:
    """Independent runs with the default bandit."""
    return [SimulatedService(gains, noise, seed).run(AdaptationBandit(seed=seed), queries) for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="independent runs of each case (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=1000, help="of each run (default: %(default)s)")
    parser.add_argument("--noise", type=float, default=0.03, help="of a query's throughput (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "adaptation_bandit.json", help="and .png beside it")
    args = parser.parse_args()
    runs = {name: simulate(gains, args.seeds, args.queries, args.noise) for name, gains in CASES.items()}
    report = {
        "seeds": args.seeds,
        "queries": args.queries,
        "noise": args.noise,
        "cases": {
            name: {
                "gains": CASES[name],
                "right_in_late_decisions": round(late_share(services), 4),
                "mean_regret": round(sum(s.regret[-1] for s in services) / len(services), 4),
                "regret_of_the_later_half": round(
                    sum(s.regret[-1] - s.regret[len(s.regret) // 2] for s in services) / len(services), 4
                ),
            }
            for name, services in runs.items()
        },
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    plot(runs, args.output.with_suffix(".png"))
    for name, figures in report["cases"].items():
        print(f"{name}: right in {figures['right_in_late_decisions']:.1%} of the late decisions")


def plot(runs: Mapping[str, Sequence[SimulatedService]], path: Path) -> None:
    """Mean regret over queries, with the range of the middle 80 % of the runs."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, services in runs.items():
        columns = [sorted(values) for values in zip(*(service.regret for service in services), strict=True)]
        tenth = len(services) // 10
        line = axes.plot([sum(column) / len(column) for column in columns], label=name)[0]
        low, high = [column[tenth] for column in columns], [column[-1 - tenth] for column in columns]
        axes.fill_between(range(len(columns)), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="query", ylabel="missed gain of throughput, added up", title="Regret of the adaptation bandit")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

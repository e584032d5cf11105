# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How a drafter follows a policy that moves: the rollouts of `examples/grpo_with_drafter.py`, step by step.

    python examples/grpo_with_drafter.py --drafter none --output runs/grpo
    python examples/grpo_with_drafter.py --drafter static --plan 6 1 --output runs/grpo
    python examples/grpo_with_drafter.py --drafter adapted --plan 6 1 --gain --output runs/grpo
    python examples/grpo_with_drafter.py --drafter static --output runs/grpo-auto
    python benchmarks/rollouts.py runs/grpo --auto runs/grpo-auto

With a fixed plan tau says how well the drafter still knows the policy, whatever the machine does meanwhile. Sampled
batches differ from run to run, so policies do as well; what adapting is worth is therefore measured on the very same
rollouts: the drafter that served them against the first one, in tokens a round (`--gain`).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any


RESULTS = Path(__file__).parent / "results"
RUNS = {"none": "plain", "static": "drafter as it was", "adapted": "drafter that learns from the rollouts"}
DRAWS = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with none.json, static.json and adapted.json")
    parser.add_argument("--auto", type=Path, help="folder with static.json of a run without --plan")
    parser.add_argument("--output", type=Path, default=RESULTS / "rollouts.json")
    args = parser.parse_args(arguments)
    rows = {name: _rows(args.runs / f"{name}.json") for name in RUNS}
    if args.auto:
        rows["auto"] = _rows(args.auto / "static.json")
    report: dict[str, Any] = {"runs": {name: summary(of) | {"steps": of} for name, of in rows.items()}}
    report["gain_of_adapting"] = gain(rows["adapted"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.output.with_suffix(".png"))
    for name, of in report["runs"].items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in of.items() if key != "steps"))
    print(f"gain of adapting: {report['gain_of_adapting']}")


def _rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of the first and the last third of the steps, and of all."""
    third = len(rows) // 3
    figures: dict[str, Any] = {
        "tokens_a_second": round(sum(row["tokens"] for row in rows) / sum(row["rollout_seconds"] for row in rows), 2),
        "kl_of_last_third": round(mean(row["kl"] for row in rows[-third:]), 3),
    }
    for name in ("reward", "tau"):
        if name in rows[0]:
            for of, part in {"": rows, "_first_third": rows[:third], "_last_third": rows[-third:]}.items():
                figures[f"{name}{of}"] = round(mean(row[name] for row in part), 3)
    return figures


def gain(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean factor of the second half of the steps, with a 95 % interval over steps drawn again."""
    later = [row["gain"] for row in rows[len(rows) // 2 :]]
    draw = random.Random(0)
    means = sorted(mean(draw.choices(later, k=len(later))) for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    return {"second_half": round(mean(later), 3), "interval": [round(low, 3), round(high, 3)]}


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """tau and rewards by step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (tau, factor, reward) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for color, (name, label) in enumerate(RUNS.items()):
        steps = [row["step"] for row in rows[name]]
        if name != "none":
            tau.plot(steps, [row["tau"] for row in rows[name]], color=f"C{color}", label=label)
        reward.plot(steps, [row["reward"] for row in rows[name]], color=f"C{color}", label=label)
    factor.plot([row["step"] for row in rows["adapted"]], [row["gain"] for row in rows["adapted"]], color="C2")
    factor.axhline(1, color="grey", linewidth=1)
    tau.set(xlabel="step of the policy", ylabel="tau of its rollouts, one plan throughout")
    factor.set(xlabel="step of the policy", ylabel="tokens a round: adapted over first")
    reward.set(xlabel="step of the policy", ylabel="mean reward of 8 rollouts")
    figure.legend(*reward.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

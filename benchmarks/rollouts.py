# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How a drafter follows a policy that moves: the rollouts of `examples/grpo_with_drafter.py`, step by step.

    for drafter in none static adapted; do
        python examples/grpo_with_drafter.py --drafter $drafter --plan 6 1 --output runs/grpo
    done
    python examples/grpo_with_drafter.py --drafter static --output runs/grpo-auto
    python benchmarks/rollouts.py runs/grpo --auto runs/grpo-auto

With a fixed plan tau says how well the drafter still knows the policy, whatever the machine does meanwhile; tokens a
second are those of each run's own time.
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
    report["adapted_minus_static"] = margin(rows["adapted"], rows["static"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(rows, args.output.with_suffix(".png"))
    for name, of in report["runs"].items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in of.items() if key != "steps"))
    print(f"adapted minus static: {report['adapted_minus_static']}")


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


def margin(adapted: Sequence[dict[str, Any]], static: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """tau of the last half of the steps, adapted minus static, with a 95 % interval over steps drawn again."""
    half = len(static) // 2
    one, other = ([row["tau"] for row in rows[-half:]] for rows in (adapted, static))
    draw = random.Random(0)
    means = sorted(mean(draw.choices(one, k=half)) - mean(draw.choices(other, k=half)) for _ in range(DRAWS))
    low, high = means[int(0.025 * DRAWS)], means[int(0.975 * DRAWS)]
    return {"tau_last_half": round(mean(one) - mean(other), 3), "interval": [round(low, 3), round(high, 3)]}


def plot(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """tau and rewards by step."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (tau, reward) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for color, (name, label) in enumerate(RUNS.items()):
        steps = [row["step"] for row in rows[name]]
        if name != "none":
            tau.plot(steps, [row["tau"] for row in rows[name]], color=f"C{color}", label=label)
        reward.plot(steps, [row["reward"] for row in rows[name]], color=f"C{color}", label=label)
    tau.set(xlabel="step of the policy", ylabel="tau of its rollouts, one plan throughout")
    reward.set(xlabel="step of the policy", ylabel="mean reward of 8 rollouts")
    reward.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

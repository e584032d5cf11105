# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Ways to train a drafter, each for as many steps on the same answers in the same order: how often every slot is right on
held-out answers, and the tau of real trees. Choices that win here are worth a longer run.

    python benchmarks/screen.py --work runs/screen --output benchmarks/results/screen.json -- \
        --data answers/ --views views/ --epochs 0.2 --batch-tokens 2048 --learning-rate 1e-3

What follows `--` are options of `specblock train`. Runs that are done are not trained again, and one that was killed
goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Of `specblock train`: fields of the drafter's configuration and of its objective, and other options."""

    config: list[str] = field(default_factory=list)
    objective: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


ARMS = {
    "paper": Arm(),
    "muon": Arm(options=["--optimizer", "muon"]),
    "below alternatives": Arm(objective=["prefix_width=4"]),
    "markov term": Arm(["markov_rank=128"]),
    "markov term, below alternatives": Arm(["markov_rank=128"], ["prefix_width=4"]),
}
COMMON = Arm(["expansion=best_first"], ["num_blocks=2", "starts_share=0.4"])


def command(arm: Arm, folder: Path, seed: int, options: Sequence[str]) -> list[str]:
    """Arguments of `specblock` that train an arm."""
    return [
        *("train", "--output", str(folder), "--seed", str(seed), *options, *arm.options),
        *("--config", *COMMON.config, *arm.config, "--objective", *COMMON.objective, *arm.objective),
    ]


def figures(folder: Path) -> dict[str, Any]:
    """The last measurement of a finished run."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = [row for row in log if "held_out_agreement" in row][-1]
    taus = {name: value for name, value in measured.items() if name.startswith("tau_")}
    return {name: measured[name] for name in ("step", "tokens", "held_out_agreement", "held_out_chain")} | taus


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: %(default)s")
    parser.add_argument("options", nargs="*", help="of `specblock train`, after --")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    versions = {name: version(name) for name in ("torch", "transformers")}
    report: dict[str, Any] = {"versions": versions, "runs": []}
    for seed in args.seeds:
        for name in args.arms:
            folder = args.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            if not (folder / "final" / "config.json").exists():
                subprocess.run(
                    [sys.executable, "-m", "specblock_hf", *command(ARMS[name], folder, seed, args.options)],
                    check=True,
                )
            report["runs"].append({"arm": name, "seed": seed} | figures(folder))
            args.output.write_text(json.dumps(report, indent=1) + "\n")
            print(report["runs"][-1], flush=True)


if __name__ == "__main__":
    main()

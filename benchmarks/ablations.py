# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The paper's ablations (https://huggingface.co/papers/2605.07243, Table 2) on drafters trained here on equal terms: tau
over the evaluation suites, with one part left out at a time, beside the paper's figures. Train the drafters with one
command, to which each but the first adds its own switch (docs/training.md):

    specblock train ... --output full
    specblock train ... --output no-shift --config layer_shift=false
    specblock train ... --output no-broadcast --config prefix_broadcast=false
    specblock train ... --output no-mask --objective valid_prefix=false
    python benchmarks/ablations.py --full full/final --layer-shift no-shift/final --valid-prefix no-mask/final
        --prefix-broadcast no-broadcast/final --gsm8k test.jsonl --output benchmarks/results/ablations.json

The tree of the last row needs no training: a uniform one at the same budget, drafted by the full drafter.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from acceptance import Suite
from tqdm.auto import tqdm

from specblock_hf import DraftingPlan, SpecBlockDrafter
from specblock_hf.cli.models import load_target
from specblock_hf.data.suites import SUITES
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.simulate import simulate_acceptance


PAPER = {
    "full": 4.41,
    "without prefix broadcast": 4.13,
    "without layer-wise shift": 4.02,
    "without valid-prefix mask": 4.23,
    "without rank-guided branching": 4.25,
}
"""Mean tau of Llama-3.1-8B at temperature 0 over six suites."""

UNIFORM: dict[str, Any] = {"branching": [3, 3, 3, 3], "root_width": 3}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--full", required=True, help="folder of the drafter with all parts")
    parser.add_argument("--prefix-broadcast", required=True, help="folder of the drafter without")
    parser.add_argument("--layer-shift", required=True, help="folder of the drafter without")
    parser.add_argument("--valid-prefix", required=True, help="folder of the drafter trained without")
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "gsm8k"], default=["humaneval", "mtbench", "gsm8k"])
    parser.add_argument("--gsm8k", help="JSON-lines file of GSM8K's test set, for --suite gsm8k")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each suite, evenly spaced")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--num-forwards", type=int, default=2, help="drafter forwards of a round")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", required=True, help="JSON file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    variants: dict[str, tuple[str, dict[str, Any]]] = {
        "full": (args.full, {}),
        "without prefix broadcast": (args.prefix_broadcast, {}),
        "without layer-wise shift": (args.layer_shift, {}),
        "without valid-prefix mask": (args.valid_prefix, {}),
        "without rank-guided branching": (args.full, UNIFORM),
    }
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    table, plan = TokenTable.of(target), DraftingPlan(args.budget, args.num_forwards)
    report: dict[str, Any] = {
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "tree_budget": args.budget,
        "num_forwards": args.num_forwards,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "prompts_of_each_suite": args.limit,
        "tau": {},
    }
    suites: list[Suite] = []
    for name, (folder, changed) in tqdm(variants.items(), desc="variants"):
        options = {"expansion": "rank_guided", **changed}
        drafter = SpecBlockDrafter.from_pretrained(folder, dtype=getattr(torch, args.dtype), **options).eval()
        drafter.check_target(target)
        suites = suites or [Suite.answered(suite, target, tokenizer, drafter, args) for suite in args.suite]
        row, accepted = {}, []
        for suite in suites:
            found = simulate_acceptance(drafter, table, suite.examples, suite.views, plan, args.max_new_tokens)
            row[suite.name] = round(found.tau, 4)
            accepted += found.accepted
        report["tau"][name] = row | {"all": round(1 + sum(accepted) / len(accepted), 4), "paper": PAPER[name]}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(as_table(report["tau"]))


def as_table(taus: dict[str, dict[str, float]]) -> str:
    """The rows as a Markdown table."""
    columns = list(taus["full"])
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |" for name, row in taus.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()

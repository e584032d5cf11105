# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
When does speculation stop paying as batches grow? Plain `generate()` and the drafter answer the same batches, padded
on the left, at several batch sizes. The drafter's plan is calibrated for each size, with a trial on as many other
prompts of the suite (or, where it has too few, also on those of `specblock demo`; without one for a batch that they do
not fill), and may come out as no drafts at all.

    python benchmarks/batches.py --dtype bfloat16
    python benchmarks/batches.py --dtype bfloat16 --plan 8 1 4 --output -

Both sides answer a batch right after each other, taking turns in who goes first; medians of the repeats count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from specblock_hf import calibrate
from specblock_hf.calibration.calibrate import Calibration
from specblock_hf.calibration.trial import Batch, answers, batches_of
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.demo import PROMPTS, describe_setting
from specblock_hf.cli.models import add_model_arguments, encode, load_models
from specblock_hf.data.suites import load_prompts, own_prompts
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.evaluation.benchmark import evenly


SIZES = (1, 2, 4, 8)
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "batches.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="batch sizes (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, help="JSON-lines file of prompts (default: HumanEval)")
    parser.add_argument(
        "--limit", type=int, default=8, help="prompts, a multiple of every batch size (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="times that a batch is answered (default: %(default)s)")
    parser.add_argument(
        "--output", default=str(DEFAULT_OUTPUT), help="JSON file, or - for none (default: %(default)s)"
    )
    args = parser.parse_args(arguments)
    if any(size < 1 or args.limit % size for size in args.sizes):
        parser.error(f"--limit {args.limit} leaves a batch of {args.sizes} unfilled; give a multiple of all of them.")
    return args


def timed(target: PreTrainedModel, batch: Batch, options: Mapping[str, Any]) -> tuple[float, torch.LongTensor]:
    """Seconds of a call, and its new tokens `[B, n]`."""
    start = time.perf_counter()
    output = target.generate(**batch, **options).cpu()  # copying waits for the device
    return time.perf_counter() - start, output[:, batch["input_ids"].shape[1] :]


def compare(
    target: PreTrainedModel, drafter: TreeDrafter, batch: Batch, options: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
    """One batch answered by both sides; medians of their seconds."""
    eos = target.generation_config.eos_token_id
    seconds: dict[str, list[float]] = {"plain": [], "drafted": []}
    texts: dict[str, list[list[int]]] = {}
    for repeat in range(repeats):
        for side in list(seconds)[:: -1 if repeat % 2 else 1]:
            helper = {"assistant_model": drafter} if side == "drafted" else {}
            spent, ids = timed(target, batch, {**options, **helper})
            seconds[side].append(spent)
            texts[side] = answers(ids, eos)
    pairs = zip(texts["plain"], texts["drafted"], strict=True)
    return {
        "seconds": {side: statistics.median(spent) for side, spent in seconds.items()},
        "tokens": {side: sum(map(len, rows)) for side, rows in texts.items()},
        "identical": sum(plain == drafted for plain, drafted in pairs),
        "accepted": drafter.last_statistics.accepted,
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tokens a second of both sides over all batches of a size, their ratio, tau and how many answers are the same."""
    speeds = {
        side: sum(row["tokens"][side] for row in rows) / sum(row["seconds"][side] for row in rows)
        for side in ("plain", "drafted")
    }
    accepted = [count for row in rows for count in row["accepted"]]
    return {
        "tokens_per_second": speeds,
        "ratio": speeds["drafted"] / speeds["plain"],
        "tau": 1 + statistics.mean(accepted) if accepted else None,
        "identical": sum(row["identical"] for row in rows),
    }


def chosen_texts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The texts to measure on, and as many others for trials, if there are."""
    suite = own_prompts(args.prompts) if args.prompts else load_prompts("humaneval")
    measured = evenly(suite, args.limit)
    others = evenly([prompt for prompt in suite if prompt not in measured], args.limit)
    texts = [prompt.prompt for prompt in others] + [text for _, text in PROMPTS]
    return [prompt.prompt for prompt in measured], texts[: args.limit]


def noted(calibration: Calibration) -> dict[str, Any]:
    """What a calibration found, ready for JSON."""
    return {
        "expected": calibration.speedup,
        "spread": calibration.spread,
        "tried": [{"plan": asdict(plan), "ratio": ratio} for plan, ratio in calibration.tried],
        "curves": calibration.curves.to_dict(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    target, tokenizer, drafter = load_models(args)
    measured, others = chosen_texts(args)
    prompts, trials = ([encode(tokenizer, text, target.device) for text in texts] for texts in (measured, others))
    pad = target.generation_config.pad_token_id
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens, "pad_token_id": 0 if pad is None else pad}
    report: dict[str, Any] = {
        "setting": describe_setting(target),
        "drafter": Path(args.drafter or find_default_drafter()).name,  # a path would name the machine
        "lookup": args.lookup,
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "sizes": {},
    }
    for size in args.sizes:
        notes: dict[str, Any] = {"expected": None}
        if not args.plan:
            tried = trials if len(trials) >= size else None
            drafter.drafting_plan = None  # a fixed plan, which calibration gives
            notes = noted(calibrate(target, drafter, batch_size=size, prompts=tried))
        batches = batches_of(prompts, size, pad or 0)
        compare(target, drafter, batches[0], options | {"max_new_tokens": 8}, 1)  # warms up
        rows = [compare(target, drafter, batch, options, args.repeats) for batch in tqdm(batches, desc=f"{size} rows")]
        summary = {"plan": asdict(drafter.drafting_plan)} | notes | summarise(rows)
        report["sizes"][str(size)] = summary
        speeds = summary["tokens_per_second"]
        print(
            f"batch {size}: plain {speeds['plain']:.1f}, drafted {speeds['drafted']:.1f} tokens/s, "
            f"ratio {summary['ratio']:.2f}, tau {summary['tau'] or 1:.2f}, {drafter.drafting_plan.tree_budget} nodes, "
            f"{summary['identical']} of {len(prompts)} answers identical"
        )
        if args.output != "-":
            path = Path(args.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

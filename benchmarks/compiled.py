# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Plain decoding and decoding with a drafter, each with and without compiled forwards: plain `generate()` compiles itself
over a static cache, as transformers offers it, and rounds by `compile_rounds`. Every prompt is answered by all four
sides in turn, after a warm-up that compiles.

    python benchmarks/compiled.py --dtype bfloat16 --output benchmarks/results/compiled.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import CompileConfig, PreTrainedModel

from specblock_hf import calibrate, compile_rounds
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.demo import describe_setting
from specblock_hf.cli.models import add_model_arguments, encode, load_models
from specblock_hf.data.suites import load_prompts, own_prompts
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.evaluation.benchmark import evenly


SIDES = ("plain", "plain, compiled", "drafted", "drafted, compiled")
DEFAULT_OUTPUT = Path(__file__).parent / "results" / "compiled.json"


class Sides:
    """
    The four ways to answer a prompt.

    Args:
        target ([`~transformers.PreTrainedModel`]): The target.
        drafter ([`TreeDrafter`]): Calibrated.
        max_length (`int`): Most tokens of a text, prompt included.
        max_new_tokens (`int`): Most tokens of an answer.
        backend (`str`): Of `torch.compile`.
    """

    def __init__(
        self, target: PreTrainedModel, drafter: TreeDrafter, max_length: int, max_new_tokens: int, backend: str
    ):
        self.target, self.drafter = target, drafter
        self.options = {"do_sample": False, "max_new_tokens": max_new_tokens}
        self.rounds = compile_rounds(target, drafter, max_length=max_length, backend=backend)
        compile_config = CompileConfig(dynamic=False, mode="default", backend=backend)
        compile_config._compile_all_devices = True  # generate() compiles on accelerators only, if not told so
        self.compiled_plain = {"cache_implementation": "static", "compile_config": compile_config}

    def answer(self, side: str, ids: torch.LongTensor) -> tuple[float, torch.LongTensor]:
        """Seconds of a call and its new tokens `[1, n]`."""
        options: dict[str, Any] = dict(self.options)
        if side.startswith("drafted"):
            options["assistant_model"] = self.drafter
            self.drafter.compiled_rounds = self.rounds if side.endswith("compiled") else None
        elif side.endswith("compiled"):
            options |= self.compiled_plain
        start = time.perf_counter()
        output = self.target.generate(ids, attention_mask=torch.ones_like(ids), **options).cpu()
        return time.perf_counter() - start, output[:, ids.shape[1] :]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--prompts", type=Path, help="JSON-lines file of prompts (default: HumanEval)")
    parser.add_argument("--limit", type=int, default=6, help="prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, help="times that a side answers (default: %(default)s)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument(
        "--output", default=str(DEFAULT_OUTPUT), help="JSON file, or - for none (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    target, tokenizer, drafter = load_models(args)
    found = evenly(own_prompts(args.prompts) if args.prompts else load_prompts("humaneval"), args.limit)
    prompts = [encode(tokenizer, prompt.prompt, target.device) for prompt in found]
    # generate() keeps its static cache while it is large enough, and compiles anew for another one.
    prompts.sort(key=lambda ids: -ids.shape[1])
    if not args.plan:
        drafter.drafting_plan = None  # a fixed plan, which calibration gives
        calibrate(target, drafter)
    sides = Sides(target, drafter, prompts[0].shape[1] + args.max_new_tokens, args.max_new_tokens, args.backend)
    compiling = {side: sum(sides.answer(side, prompts[0])[0] for _ in range(2)) for side in SIDES}
    report: dict[str, Any] = {
        "setting": describe_setting(target),
        "drafter": Path(args.drafter or find_default_drafter()).name,  # a path would name the machine
        "lookup": args.lookup,
        "plan": asdict(drafter.drafting_plan or drafter.default_plan(target.device)),
        "prompts": len(prompts),
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "seconds_of_the_first_two_calls": compiling,
        "rows": [],
    }
    for ids in tqdm(prompts, desc="prompts"):
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        texts: dict[str, torch.LongTensor] = {}
        compiled_rounds = 0
        for repeat in range(args.repeats):
            for side in SIDES[:: -1 if repeat % 2 else 1]:
                spent, texts[side] = sides.answer(side, ids)
                seconds[side].append(spent)
                if side == "drafted, compiled":
                    compiled_rounds = drafter.last_statistics.compiled_rounds
        report["rows"].append(
            {
                "tokens": texts["plain"].shape[1],
                "seconds": {side: statistics.median(spent) for side, spent in seconds.items()},
                "identical": {side: torch.equal(text, texts["plain"]) for side, text in texts.items()},
                "compiled_rounds": compiled_rounds,
            }
        )
        report["speedup"] = {
            side: statistics.geometric_mean(row["seconds"]["plain"] / row["seconds"][side] for row in report["rows"])
            for side in SIDES
        }
        if args.output != "-":
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    for side, speedup in report["speedup"].items():
        same = sum(row["identical"][side] for row in report["rows"])
        print(f"{side}: {speedup:.2f} times plain generate(), {same} of {len(prompts)} texts identical")


if __name__ == "__main__":
    main()

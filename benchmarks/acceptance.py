# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
tau of a drafter at several tree budgets over the evaluation suites, alone and with look-ups. The target answers every
prompt once, greedily and in a batch; each plan is then walked along those answers with the drafter's real trees, which
gives the rounds of `generate()` without the target's share of their time.

    python benchmarks/acceptance.py --gsm8k test.jsonl --output benchmarks/results/acceptance.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from specblock_hf import AutoDrafter, DraftingPlan, JoinedDrafter, LookupDrafter
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.models import encode, load_target
from specblock_hf.data.examples import Example
from specblock_hf.data.suites import SUITES, load_suite
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.evaluation.simulate import simulate_acceptance
from specblock_hf.regeneration.answering import Answering, Prompt
from specblock_hf.training.target_views import TargetView, view_target


TOP_K = 1  # the simulation reads the target's states only


def greedy_answers(target, tokenizer, texts: list[str], max_new_tokens: int) -> list[Example]:
    """The target's greedy answers, in the order of their prompts."""
    ids = [tuple(encode(tokenizer, text, torch.device("cpu"))[0].tolist()) for text in texts]
    prompts = [Prompt(text, "", str(number), ids[number], 0.0) for number, text in enumerate(texts)]
    eos = target.generation_config.eos_token_id
    stop_ids = set(eos) if isinstance(eos, list) else {eos}
    answering = Answering(target, min(len(texts), 20), max(map(len, ids)), max_new_tokens, stop_ids)
    answers: dict[str, list[int]] = {}
    with torch.no_grad(), tqdm(total=len(texts), desc="answers") as bar:
        for finished in answering(prompts):
            answers |= {prompt.key: answer for prompt, answer in finished}
            bar.update(len(finished))
    return [
        Example([*ids[number], *answers[str(number)]], len(ids[number]), True, str(number))
        for number in range(len(texts))
    ]


@dataclass
class Suite:
    """A suite's prompts with the target's answers to them, and its view of those."""

    name: str
    examples: list[Example]
    views: list[TargetView]

    @classmethod
    def answered(cls, name: str, target, tokenizer, drafter, args: argparse.Namespace) -> Suite:
        everything = load_suite(name, args.gsm8k if name == "gsm8k" else None)
        count = min(args.limit, len(everything))
        texts = [everything[place * len(everything) // count] for place in range(count)]
        examples = greedy_answers(target, tokenizer, texts, args.max_new_tokens)
        layers = drafter.feature_layers_for(target)
        with torch.no_grad():
            views = [view_target(target, [example], layers, TOP_K)[0] for example in examples]
        return cls(name, examples, views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--drafter", default=str(find_default_drafter()))
    parser.add_argument("--suite", nargs="+", choices=[*SUITES, "gsm8k"], default=["humaneval", "mtbench", "gsm8k"])
    parser.add_argument("--gsm8k", help="JSON-lines file of GSM8K's test set, for --suite gsm8k")
    parser.add_argument("--limit", type=int, default=40, help="prompts of each suite, evenly spaced")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--budget", type=int, nargs="+", default=[8, 16, 60])
    parser.add_argument("--num-forwards", type=int, default=2, help="drafter forwards of a round; 1 below 16 nodes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", required=True, help="JSON file")
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    target.eval()
    drafter = AutoDrafter.from_pretrained(args.drafter, dtype="auto").eval()
    drafter.check_target(target)
    drafters = {"alone": drafter, "with_lookup": JoinedDrafter(drafter, LookupDrafter(target.config))}
    plans = [DraftingPlan(budget, args.num_forwards if budget >= 16 else 1) for budget in args.budget]
    report = {
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "expansion": drafter.config.to_dict().get("expansion"),
        "plans": [str(plan) for plan in plans],
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "suites": {},
        "all": {},
    }
    suites = [Suite.answered(name, target, tokenizer, drafter, args) for name in args.suite]
    for suite in suites:
        tokens = sum(len(e.input_ids) - e.answer_start for e in suite.examples)
        report["suites"][suite.name] = {"prompts": len(suite.examples), "tokens": tokens}
    for kind, plan in tqdm([(k, p) for k in drafters for p in plans], desc="plans"):
        accepted = []
        for suite in suites:
            found = simulate_acceptance(
                drafters[kind], TokenTable.of(target), suite.examples, suite.views, plan, args.max_new_tokens
            )
            report["suites"][suite.name].setdefault(kind, {})[plan.tree_budget] = round(found.tau, 4)
            accepted += found.accepted
        report["all"].setdefault(kind, {})[plan.tree_budget] = round(1 + sum(accepted) / len(accepted), 4)
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["all"]))


if __name__ == "__main__":
    main()

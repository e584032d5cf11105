# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Side by side on one machine: plain `generate()`, transformers' prompt lookup, and trees of look-ups, of a SpecBlock
drafter and of
both, greedy, over prompts of the usual suites. Everything runs in one process, prompt by prompt in rotating order, so
that a
machine that slows down favours no method.

    python benchmarks/compare.py --suite humaneval mtbench --limit 12 --dtype bfloat16 --output
    benchmarks/results/compare.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm

from specblock_hf import AutoDrafter, DraftingPlan, JoinedDrafter, LookupDrafter, calibrate
from specblock_hf.evaluation.suites import load_suite
from specblock_hf.terminal import DEFAULT_DRAFTER, encode, load_target


METHODS = ("plain", "prompt_lookup", "lookup", "specblock", "specblock+lookup")
PROMPT_LOOKUP_TOKENS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--drafter", default=str(DEFAULT_DRAFTER))
    parser.add_argument("--suite", nargs="+", default=["humaneval", "mtbench"])
    parser.add_argument("--gsm8k", help="JSON-lines file of GSM8K, for --suite gsm8k")
    parser.add_argument("--limit", type=int, default=12, help="prompts of each suite")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", required=True, help="JSON file; finished prompts in it are not run again")
    args = parser.parse_args()
    output = Path(args.output)
    rows = json.loads(output.read_text())["prompts"] if output.exists() else []
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    drafters, plans = make_drafters(target, args.drafter)
    prompts = []
    for suite in args.suite:
        everything = load_suite(suite, args.gsm8k if suite == "gsm8k" else None)
        # Evenly spaced: MT-Bench's questions are sorted by category.
        numbers = [place * len(everything) // args.limit for place in range(min(args.limit, len(everything)))]
        prompts += [(suite, number, everything[number]) for number in numbers]
    done = {(row["suite"], row["number"]) for row in rows}
    for place, (suite, number, prompt) in enumerate(tqdm(prompts, desc="prompts")):
        if (suite, number) in done:
            continue
        prompt_ids = encode(tokenizer, prompt, target.device)
        order = METHODS[place % len(METHODS) :] + METHODS[: place % len(METHODS)]
        answers = {name: answer(target, prompt_ids, name, drafters, args.max_new_tokens) for name in order}
        plain = answers["plain"].pop("ids")
        for name in METHODS[1:]:
            answers[name]["identical"] = torch.equal(answers[name].pop("ids"), plain)
        rows.append({"suite": suite, "number": number, "methods": {name: answers[name] for name in METHODS}})
        report = summarise(rows, args, plans)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report | {"prompts": rows}, indent=1) + "\n")
    print(table(rows))


def make_drafters(target, path: str) -> tuple[dict, dict]:
    """Every method's assistant, calibrated, and the plans."""
    drafter = AutoDrafter.from_pretrained(path, dtype="auto").eval()
    joined = JoinedDrafter(drafter, LookupDrafter(target.config))
    lookup = LookupDrafter(target.config)
    lookup.drafting_plan = DraftingPlan(8, 1)
    found = {"specblock": calibrate(target, drafter), "specblock+lookup": calibrate(target, joined)}
    plans = {name: str(c.plan) for name, c in found.items()} | {"lookup": str(lookup.drafting_plan)}
    plans["curves"] = found["specblock"].curves.to_dict()
    return {"lookup": lookup, "specblock": drafter, "specblock+lookup": joined}, plans


def answer(target, prompt_ids: torch.LongTensor, method: str, drafters: dict, tokens: int) -> dict:
    """One greedy answer: its ids, seconds, and tau where there are rounds."""
    settings = {"attention_mask": torch.ones_like(prompt_ids), "do_sample": False, "max_new_tokens": tokens}
    if method == "prompt_lookup":
        settings["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
    drafter = drafters.get(method)
    start = time.perf_counter()
    ids = target.generate(prompt_ids, assistant_model=drafter, **settings)
    seconds = time.perf_counter() - start
    result = {"ids": ids, "seconds": seconds, "tokens": ids.shape[1] - prompt_ids.shape[1]}
    if drafter is not None:
        figures = drafter.last_statistics
        result |= {"tau": figures.tau, "draft": figures.draft_seconds, "verify": figures.verify_seconds}
        result |= {"host": figures.host_seconds, "rounds": figures.rounds}
    return result


def ratio(row: dict, method: str) -> float:
    """Speed of a method over that of plain `generate()`, for one prompt."""
    plain, other = row["methods"]["plain"], row["methods"][method]
    return (other["tokens"] / other["seconds"]) / (plain["tokens"] / plain["seconds"])


def pooled_tau(rows: list[dict], method: str) -> float | None:
    """Tokens per verification over all prompts together."""
    answers = [row["methods"][method] for row in rows if row["methods"][method].get("rounds")]
    rounds = sum(a["rounds"] for a in answers)
    return sum(a["tau"] * a["rounds"] for a in answers) / rounds if rounds else None


def summarise(rows: list[dict], args: argparse.Namespace, plans: dict) -> dict:
    """What a model card needs: the conditions, and a row for each suite with look-ups joined."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    summary = []
    for suite in suites:
        chosen = [row for row in rows if row["suite"] == suite]
        for method in METHODS[1:]:
            summary.append(
                {
                    "suite": f"{suite}, {method}",
                    "prompts": len(chosen),
                    "temperature": 0,
                    "tau": pooled_tau(chosen, method) or float("nan"),
                    "speedup": statistics.geometric_mean(ratio(row, method) for row in chosen),
                    "identical": sum(row["methods"][method]["identical"] for row in chosen),
                }
            )
    return {
        "hardware": f"{torch.get_num_threads()} CPU threads ({platform.processor() or platform.machine()})",
        "dtype": args.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "max_new_tokens": args.max_new_tokens,
        "plans": plans,
        "rows": [row for row in summary if row["suite"].split(", ")[1].startswith("specblock")],
        "all_rows": summary,
    }


def table(rows: list[dict]) -> str:
    """Speedup and tau by suite, in Markdown."""
    lines = ["| suite | " + " | ".join(METHODS[1:]) + " |", "|---" * len(METHODS) + "|"]
    for suite in [*dict.fromkeys(row["suite"] for row in rows), "all"]:
        chosen = [row for row in rows if suite in ("all", row["suite"])]
        cells = []
        for method in METHODS[1:]:
            speedup = statistics.geometric_mean(ratio(row, method) for row in chosen)
            tau = pooled_tau(chosen, method)
            cells.append(f"{speedup:.2f}x" + (f" (tau {tau:.2f})" if tau else ""))
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

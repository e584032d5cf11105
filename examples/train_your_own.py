# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A drafter for a target of your own, from nothing but prompts: let the target answer them, train on the answers, decode
with the result. As it stands, it makes a very small drafter for the default target in some minutes on one core; what a
real one takes is in docs/training.md.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

from specblock_hf import AutoDrafter
from specblock_hf.cli import main
from specblock_hf.cli.models import encode, load_target
from specblock_hf.devices import best_device


TASKS = (
    "Explain {} to a child in two sentences.",
    "Write three facts about {}.",
    "Why do people care about {}?",
    "Give a short definition of {}.",
    "Write a short story about {}.",
    "What should a beginner know about {}?",
    "List two advantages and two disadvantages of {}.",
    "Summarise the history of {} in one paragraph.",
)
TOPICS = (
    "rain",
    "bread",
    "the moon",
    "bicycles",
    "chess",
    "honey bees",
    "libraries",
    "volcanoes",
    "coffee",
    "trains",
    "sleep",
    "rivers",
    "music",
    "gardens",
    "maps",
    "batteries",
    "cats",
    "football",
    "paper",
    "bridges",
    "clouds",
    "salt",
    "languages",
    "clocks",
    "wind power",
    "the heart",
    "robots",
    "forests",
    "money",
    "the ocean",
)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--target", help="folder or Hub id of your model (default: the default target)")
parser.add_argument("--output", type=Path, default=Path("runs/own"))
parser.add_argument("--epochs", default="5", help="passes over the answers (default: %(default)s)")
parser.add_argument("--least-tau", type=float, default=1.0, help="fail below this mean of emitted tokens per round")
args = parser.parse_args()
args.output.mkdir(parents=True, exist_ok=True)
named = ["--target", args.target] if args.target else []

# 1. Prompts like those that your users write; a few thousand for a drafter worth serving.
prompts = args.output / "prompts.jsonl"
rows = [{"prompt": task.format(topic)} for task, topic in itertools.product(TASKS, TOPICS)]
prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

# 2. The target's own answers: a drafter learns to say what this very model says.
answers = str(args.output / "answers")
regenerate = ["regenerate", *named, "--prompts", str(prompts), "--output", answers, "--max-new-tokens", "64"]
if status := main(regenerate):
    sys.exit(status)

# 3. Train. One block and a small vocabulary, because this is small; leave --config, --objective and the vocabulary out
#    for the defaults.
train = ["train", *named, "--data", answers, "--output", str(args.output / "run")]
train += ["--views", str(args.output / "views"), "--epochs", args.epochs, "--learning-rate", "2e-3"]
train += ["--draft-vocab-size", "2048", "--config", "intermediate_size=512", "num_blocks=1"]
train += ["--objective", "num_blocks=1", "join_at=0.0", "--batch-tokens", "1024", "--held-out", "0.1"]
train += ["--eval-steps", "60", "--eval-budgets", "8", "--log-steps", "20"]
if status := main(train):
    sys.exit(status)

# 4. Decode with it. The text is the same as without; how far drafts were right is in the statistics.
target, tokenizer = load_target(args.target, "auto")
target = target.to(best_device())
drafter = AutoDrafter.from_pretrained(args.output / "run" / "final", target=target, dtype="auto")
prompt_ids = encode(tokenizer, "Write three facts about the sun.", target.device)
settings = {"attention_mask": torch.ones_like(prompt_ids), "max_new_tokens": 64, "do_sample": False}
target.generate(prompt_ids, assistant_model=drafter, **settings)
print(drafter.last_statistics.summary())

log = [json.loads(line) for line in (args.output / "run" / "log.jsonl").read_text().splitlines()]
measured = [row["tau_8"] for row in log if "tau_8" in row]
print("tau on held-out answers with trees of 8 nodes, while training:", *measured)
if measured[-1] < args.least_tau:
    sys.exit(f"tau is {measured[-1]}, which is below {args.least_tau}: training does not work as it should.")

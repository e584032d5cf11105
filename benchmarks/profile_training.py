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
What a training step of a drafter consists of: floating-point operations by part of the network, which no other load on
the machine changes, and positions per second, which any does.
"""

import argparse
import json
import statistics
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from specblock_hf import AutoDrafter, TokenTable
from specblock_hf.terminal import DEFAULT_DRAFTER, load_target
from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.attention import NAME as CPU_ATTENTION
from specblock_hf.training.batches import collate
from specblock_hf.training.command import TOP_K
from specblock_hf.training.data import load_examples
from specblock_hf.training.features import view_target
from specblock_hf.training.options import read_pairs
from specblock_hf.training.trainer import DrafterTrainer


def parts(flops: dict[str, dict], total: int) -> dict[str, float]:
    """Share of every direct part of the drafter, and of what belongs to none (attention of custom kernels)."""
    root = "ObjectiveModule.drafter."
    found = {
        name.removeprefix(root): sum(counts.values()) / total
        for name, counts in flops.items()
        if name.startswith(root) and name.count(".") <= 2 + (".layers." in name or ".shift_proj." in name)
    }
    return {name: round(share, 3) for name, share in sorted(found.items(), key=lambda item: -item[1]) if share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="answers as `specblock regenerate` writes them")
    parser.add_argument("--target", help="folder or Hub id (default: the default target)")
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER, help="a trained one (default: the shipped one)")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--objective", nargs="+", default=["num_blocks=2", "starts_share=0.4"], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, 0 to count only (%(default)s)")
    parser.add_argument("--mixed-precision", default="bf16")
    args = parser.parse_args()

    target, tokenizer = load_target(args.target, torch.bfloat16)
    drafter = AutoDrafter.from_pretrained(args.drafter, target=target, dtype=torch.float32)
    drafter.set_attn_implementation(CPU_ATTENTION)
    examples = load_examples(args.data, tokenizer)[:400]
    kind = drafter.objective_class
    objective = kind(**read_pairs(args.objective, list(kind.__dataclass_fields__), "--objective"))
    arguments = DrafterTrainingArguments(
        output_dir="runs/profile", batch_tokens=args.batch_tokens, mixed_precision=args.mixed_precision
    )
    trainer = DrafterTrainer(
        drafter,
        TokenTable.of(target),
        examples,
        lambda indices: view_target(target, [examples[i] for i in indices], drafter.feature_layers, TOP_K),
        arguments,
        objective=objective,
    )
    batches = trainer.batches_from(0)
    first = next(batches)
    batch = collate([examples[i] for i in first[0]], trainer.views(first[0]), trainer.table, trainer.draft_ids)
    # Forward only: the backward pass costs twice that, and its operations cannot be told apart by part.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trainer.module(batch, 1.0, torch.Generator().manual_seed(0))
    flops = counter.get_flop_counts()
    drafted = sum(flops["ObjectiveModule"].values())
    seconds, positions = [], []
    trainer.clock.shares()
    for _ in range(args.steps):
        step = next(batches)
        started = time.perf_counter()
        trainer.gradients(step, 1.0)
        trainer.optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        positions.append(sum(len(examples[i].input_ids) for batch in step for i in batch))
    rates = [count / time for count, time in zip(positions, seconds, strict=True)]
    report = {
        "objective": args.objective,
        "batch_tokens": args.batch_tokens,
        "gflop_forward_a_position": round(drafted / 1e9 / int(batch.lengths.sum()), 4),
        "share_by_part": parts(flops, drafted),
    }
    if rates:
        report |= {"share_by_phase": trainer.clock.shares(), "positions_a_second": round(statistics.median(rates))}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

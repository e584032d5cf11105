# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a training step of a drafter consists of: floating-point operations by part of the network, which no other load on
the machine changes, positions per second, which any does, and positions per second of processor time, which lies
between the two. The target's states are made before, as `specblock train --views` does.

Two versions of the code are compared by taking turns: run this file from one checkout after the other, with its
`--label` and the same `--output`, which keeps all runs and shows every label's medians over those of the first label.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from specblock_hf import AutoDrafter
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.models import load_target
from specblock_hf.cli.options import read_pairs
from specblock_hf.cli.train import TOP_K
from specblock_hf.data.examples import load_examples
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.training.arguments import DrafterTrainingArguments
from specblock_hf.training.batches import collate
from specblock_hf.training.cpu_attention import NAME as CPU_ATTENTION
from specblock_hf.training.target_views import TargetView, view_target
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


def timed_steps(trainer: DrafterTrainer, steps: list[list[list[int]]]) -> dict:
    """What steps without the optimiser's part take, phase by phase."""
    rates: dict[str, list[float]] = {"positions_a_second": [], "positions_a_processor_second": []}
    trainer.clock.shares()
    for step in steps:
        started, used = time.perf_counter(), time.process_time()
        trainer.gradients(step, 1.0)
        trainer.module.zero_grad()
        seconds, processor_seconds = time.perf_counter() - started, time.process_time() - used
        positions = sum(len(trainer.examples[i].input_ids) for batch in step for i in batch)
        rates["positions_a_second"].append(positions / seconds)
        rates["positions_a_processor_second"].append(positions / processor_seconds)
    medians = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    return {"share_by_phase": trainer.clock.shares()} | medians


def add_run(path: Path, label: str, report: dict) -> None:
    """Put a run beside those in the file, and every label's medians over the first one's."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    runs.setdefault(label, []).append(report)
    medians = {
        name: {
            key: statistics.median(run[key] for run in reports)
            for key in ("gflop_forward_a_position", "positions_a_second", "positions_a_processor_second")
        }
        for name, reports in runs.items()
    }
    first = next(iter(medians.values()))
    ratios = {name: {key: round(row[key] / first[key], 3) for key in row} for name, row in medians.items()}
    note = "medians; absolute figures hold for the machine and its load at that time, ratios for runs that took turns"
    path.write_text(json.dumps({"note": note, "medians": medians, "ratios": ratios, "runs": runs}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="answers as `specblock regenerate` writes them")
    parser.add_argument("--target", help="folder or Hub id (default: the default target)")
    parser.add_argument("--drafter", default=find_default_drafter(), help="a trained one (default: the shipped one)")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--objective", nargs="+", default=["num_blocks=2", "starts_share=0.4"], metavar="NAME=VALUE")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, 0 to count only (%(default)s)")
    parser.add_argument("--mixed-precision", default="bf16")
    parser.add_argument("--output", type=Path, help="JSON file that this run is added to")
    parser.add_argument("--label", default="now", help="what this run is called there (%(default)s)")
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
    views: dict[int, TargetView] = {}
    trainer = DrafterTrainer(
        drafter,
        TokenTable.of(target),
        examples,
        lambda indices: [views[i] for i in indices],
        arguments,
        None,
        objective,
    )
    stream = trainer.batches_from(0)
    steps = [next(stream) for _ in range(args.steps + 1)]
    for (indices,) in steps:
        told = view_target(target, [examples[i] for i in indices], drafter.feature_layers, TOP_K)
        views |= dict(zip(indices, told, strict=True))
    (first,) = steps[0]
    batch = collate([examples[i] for i in first], trainer.views(first), trainer.table, trainer.draft_ids)
    # Forward only: the backward pass costs twice that, and its operations cannot be told apart by part.
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        trainer.module(batch, 1.0, torch.Generator().manual_seed(0))
    flops = counter.get_flop_counts()
    drafted = sum(flops["ObjectiveModule"].values())
    trainer.gradients(steps[0], 1.0)  # the first step also allocates
    trainer.module.zero_grad()
    report = {
        "objective": args.objective,
        "batch_tokens": args.batch_tokens,
        "gflop_forward_a_position": round(drafted / 1e9 / int(batch.lengths.sum()), 4),
        "share_by_part": parts(flops, drafted),
    }
    if args.steps:
        report |= timed_steps(trainer, steps[1:])
    if args.output:
        add_run(args.output, args.label, report | {"threads": torch.get_num_threads()})
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

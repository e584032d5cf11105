# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Tokens per second of `specblock regenerate` and of prompt-by-prompt `generate()`, side by side in one process: in every
round a few prompts are answered one by one, then a batch's worth as the command answers them, greedily and to their
ends. Processor time is measured as well, because it tells the same on a machine that does other work.

    python benchmarks/regenerate_throughput.py --prompts prompts.jsonl --output benchmarks/results/regenerate.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from specblock_hf.cli.models import load_target
from specblock_hf.cli.regenerate import answer_groups, stop_ids_of
from specblock_hf.regeneration.answering import Prompt, groups_of
from specblock_hf.regeneration.prompts import evaluation_digests, read_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--prompts", nargs="+", required=True, help="as for specblock regenerate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain-prompts", type=int, default=4, help="of a round, answered one by one")
    parser.add_argument("--batch-prompts", type=int, default=256, help="of a round, answered by the command's way")
    parser.add_argument("--max-new-tokens", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--output", required=True, help="JSON file")
    args = parser.parse_args()
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    target.eval()
    stop_ids = stop_ids_of(target.generation_config, tokenizer)
    room = target.config.get_text_config().max_position_embeddings - args.max_new_tokens
    prompts, _ = read_prompts(args.prompts, tokenizer, evaluation_digests(), room)
    # By their digests, which is at random: sources come one after another.
    prompts.sort(key=lambda prompt: prompt.key)
    rounds = []
    for number in tqdm(range(args.rounds), desc="rounds"):
        count = args.plain_prompts + args.batch_prompts
        taken = [prompts[place % len(prompts)] for place in range(number * count, (number + 1) * count)]
        one_by_one, together = taken[: args.plain_prompts], taken[args.plain_prompts :]
        plain = timed(lambda chosen=one_by_one: plainly(target, chosen, args.max_new_tokens, sorted(stop_ids)))
        groups = groups_of(together, args.batch_size, args.batch_tokens, args.max_new_tokens)
        batched = timed(lambda chosen=groups: in_batches(target, chosen, args.max_new_tokens, stop_ids))
        rounds.append({"plain": plain, "regenerate": batched})
        report = summarise(rounds, args)
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{report['ratio']:.1f}x the tokens per second, {report['ratio_of_processor_time']:.1f}x per processor second"
    )


def plainly(target: PreTrainedModel, prompts: list[Prompt], tokens: int, stop_ids: list[int]) -> int:
    """Answer one by one; the number of tokens."""
    made = 0
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        out = target.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        made += out.shape[1] - ids.shape[1]
    return made


def in_batches(target: PreTrainedModel, groups: list, tokens: int, stop_ids: set[int]) -> int:
    """Answer as `specblock regenerate` does; the number of tokens."""
    pairs = (pair for part in answer_groups(target, groups, tokens, stop_ids) for pair in part)
    return sum(len(answer) for _, answer in pairs)


def timed(work: Callable[[], int]) -> dict[str, float]:
    """Tokens, seconds and processor seconds of all threads."""
    start, used = time.perf_counter(), time.process_time()
    tokens = work()
    return {
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 3),
        "processor_seconds": round(time.process_time() - used, 3),
    }


def summarise(rounds: list[dict], args: argparse.Namespace) -> dict:
    """The conditions, each side's median speed and the median ratio of the rounds."""

    def speed(row: dict, clock: str) -> float:
        return row["tokens"] / max(row[clock], 1e-3)

    def ratio(clock: str) -> float:
        return statistics.median(speed(r["regenerate"], clock) / speed(r["plain"], clock) for r in rounds)

    sides = ("plain", "regenerate")
    return {
        "hardware": f"{torch.get_num_threads()} CPU threads ({platform.processor() or platform.machine()})",
        "dtype": args.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "tokens_per_second": {s: round(statistics.median(speed(r[s], "seconds") for r in rounds), 2) for s in sides},
        "ratio": round(ratio("seconds"), 2),
        "ratio_of_processor_time": round(ratio("processor_seconds"), 2),
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()

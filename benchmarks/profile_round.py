# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Where the time of a round goes: every microsecond between two rounds is booked under exactly one part, so that the
parts add up to the round.

    python benchmarks/profile_round.py --dtype bfloat16 --output benchmarks/results/profile.json

Parts are functions of the library, timed from outside; a part's own time is what is left after the parts that it
calls.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from specblock_hf import calibrate
from specblock_hf.cli.models import add_model_arguments, encode, load_models
from specblock_hf.data.suites import load_suite
from specblock_hf.drafters.common import block as block_drafter
from specblock_hf.drafters.joined import JoinedDrafter
from specblock_hf.drafters.lookup import FoundText
from specblock_hf.drafters.specblock import drafting as specblock
from specblock_hf.drafters.specblock.modeling import SpecBlockModel
from specblock_hf.drafting import plan as drafting_plan
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.statistics import GenerationStatistics
from specblock_hf.generation import loop as generation
from specblock_hf.generation.token_selector import TokenChoice
from specblock_hf.target.cache import TargetCache
from specblock_hf.target.masks import TreeMasks
from specblock_hf.target.model import TargetModel
from specblock_hf.trees.tree import DraftTree


class Stopwatch:
    """Books time under the innermost part that is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._running: list[str] = []
        self._since = time.perf_counter()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._book()
        self._running.append(name)
        self.calls[name] += 1
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    @contextmanager
    def watching(self, owner: Any, attribute: str, name: str) -> Iterator[None]:
        """Time a method or function while the context lasts."""
        original = owner.__dict__[attribute]

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, attribute, timed)
        try:
            yield
        finally:
            setattr(owner, attribute, original)


def parts(target: torch.nn.Module) -> list[tuple[Any, str, str]]:
    """What is timed: where it lives, its name there, and the name of the part."""
    return [
        (JoinedDrafter, "propose", "draft: joining trees"),
        (FoundText, "draft", "draft: looking up"),
        (specblock.SpecBlockDrafter, "propose", "draft: rest"),
        (block_drafter.BlockDrafter, "_commit", "draft: committing pairs"),
        (SpecBlockModel, "forward", "draft: network"),
        (specblock.SpecBlockDrafter, "_children", "draft: heads and top-k"),
        (specblock.SpecBlockDrafter, "_chain_outputs", "draft: heads and top-k"),
        (specblock, "best_first", "draft: growing"),
        (specblock, "rank_guided", "draft: growing"),
        (drafting_plan, "limit_starts", "draft: choosing starts"),
        (DraftTree, "merge_duplicates", "draft: merging, pruning"),
        (DraftTree, "prune", "draft: merging, pruning"),
        (TargetModel, "score", "verify: inputs"),
        (TreeMasks, "mask", "verify: mask"),
        (type(target), "forward", "verify: target"),
        (TokenChoice, "observe", "host: processors"),
        (TargetModel, "greedy_walk", "host: walk"),
        (generation, "sample_and_walk", "host: walk"),
        (TokenChoice, "stop", "host: stopping"),
        (TargetModel, "commit", "host: commit"),
        (TargetCache, "commit", "host: cache"),
    ]


def answer(target, drafter, ids: torch.LongTensor, max_new_tokens: int) -> GenerationStatistics:
    """Decode one prompt greedily, for its statistics."""
    target.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=drafter,
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return drafter.last_statistics


def profile(target, drafter, prompts: list[torch.LongTensor], max_new_tokens: int) -> dict[str, Any]:
    """Decode all prompts; milliseconds of a round by phase."""
    rounds, emitted = 0, 0
    phases = dict.fromkeys(("draft", "verify", "host"), 0.0)
    for ids in prompts:
        figures = answer(target, drafter, ids, max_new_tokens)
        rounds, emitted = rounds + figures.rounds, emitted + sum(figures.accepted) + len(figures.accepted)
        for phase in phases:
            phases[phase] += vars(figures)[f"{phase}_seconds"]
    per_round = {phase: 1000 * seconds / rounds for phase, seconds in phases.items()}
    return {"rounds": rounds, "tau": emitted / rounds, "milliseconds": per_round}


def watched_profile(target, drafter, prompts: list[torch.LongTensor], max_new_tokens: int) -> dict[str, float]:
    """Milliseconds of a round by part; the prefill is left out because a round begins with its first draft."""
    watch, rounds = Stopwatch(), 0
    with ExitStack() as stack:
        for owner, attribute, name in parts(target):
            stack.enter_context(watch.watching(owner, attribute, name))
        stack.enter_context(_rounds_only(watch))
        for ids in prompts:
            figures = answer(target, drafter, ids, max_new_tokens)
            rounds += figures.rounds
    return {name: 1000 * seconds / rounds for name, seconds in sorted(watch.seconds.items())}


@contextmanager
def _rounds_only(watch: Stopwatch) -> Iterator[None]:
    """Book the loop itself as "host: rest", and forget what was booked when a call's prefill ends."""
    original = generation.decode

    def decode(target, *args: Any, **kwargs: Any) -> Any:
        kept = dict(watch.seconds)
        close = target.close_prompt

        def close_prompt(pairs: Pairs, walk: Any) -> Pairs:
            pairs = close(pairs, walk)
            watch._book()
            watch.seconds.clear()
            watch.seconds.update(kept)
            return pairs

        target.close_prompt = close_prompt
        with watch.part("host: rest"):
            return original(target, *args, **kwargs)

    generation.decode = decode
    try:
        yield
    finally:
        generation.decode = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--limit", type=int, default=4, help="HumanEval prompts (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--label", default="now", help="name of this measurement in the output (default: %(default)s)")
    parser.add_argument("--output", help="JSON file; measurements by other names in it are kept")
    args = parser.parse_args()
    target, tokenizer, drafter = load_models(args)
    if not args.plan:
        drafter.drafting_plan = None  # a fixed plan, which calibration gives
        calibrate(target, drafter)
    prompts = [encode(tokenizer, text, target.device) for text in load_suite("humaneval")[: args.limit]]
    profile(target, drafter, prompts[:1], 16)  # warms up
    whole = profile(target, drafter, prompts, args.max_new_tokens)
    by_part = watched_profile(target, drafter, prompts, args.max_new_tokens)
    total = sum(whole["milliseconds"].values())
    print(f"{drafter.label}, {args.dtype}, {drafter.drafting_plan}: tau {whole['tau']:.2f}, {total:.2f} ms a round")
    for phase, milliseconds in whole["milliseconds"].items():
        print(f"  {phase:26s} {milliseconds:7.3f} ms {milliseconds / total:6.1%}")
    print("by part (timed one by one, which itself costs a little):")
    for name, milliseconds in by_part.items():
        print(f"  {name:26s} {milliseconds:7.3f} ms {milliseconds / sum(by_part.values()):6.1%}")
    if args.output:
        path = Path(args.output)
        results = json.loads(path.read_text()) if path.exists() else {}
        results[args.label] = whole | {
            "dtype": args.dtype,
            "drafter": drafter.label,
            "plan": str(drafter.drafting_plan),
            "threads": torch.get_num_threads(),
            "parts_milliseconds": by_part,
        }
        path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

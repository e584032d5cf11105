# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compare random calls in fixed shapes, replayed as pretended CUDA graphs, with eager rounds and with plain decoding: the
same tokens, trees, walks and pairs. Some calls draft in some rounds only, and the drafter is told later what it has
missed. On a tiny target in fp32. Nodes of a tree may stand in another order, because the columns that are hidden from
a forward decide how it rounds, and so the order of nodes that are as likely as each other. Goes on where an earlier
run into the same file ended.

    python benchmarks/fuzz_rounds.py --calls 1000
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers


ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "generation")]

from batches_for_tests import padded_batch  # noqa: E402
from conftest import tiny_target  # noqa: E402
from graphs_for_tests import PretendedGraphs  # noqa: E402
from test_fixed_rounds import DRAFTERS, GREEDY, Rounds  # noqa: E402

from specblock_hf import DraftingPlan, compile_rounds  # noqa: E402
from specblock_hf.drafting import state  # noqa: E402
from specblock_hf.generation import compilation  # noqa: E402
from specblock_hf.planning.controller import PlanController  # noqa: E402
from specblock_hf.planning.offers import Choice, Way  # noqa: E402


OPTIONS: dict[str, Any] = {
    "eos_token_id": lambda: random.choice([[12, 21], [4]]),
    "min_new_tokens": lambda: random.randint(1, 12),
    "no_repeat_ngram_size": lambda: random.randint(2, 3),
    "prefill_chunk_size": lambda: random.randint(1, 8),
    "repetition_penalty": lambda: random.uniform(0.8, 1.8),
    "suppress_tokens": lambda: [random.randint(1, 15)],
}


class Paths(Rounds):
    """Keeps trees as the log-probs of their paths, and what walks emit."""

    def on_draft(self, call, tree):
        log_probs, seen = tree.cumulative_log_probs().tolist(), tree.ancestors().tolist()
        rows = []
        for tokens, parents, sums, above in zip(
            tree.tokens.tolist(), tree.parents.tolist(), log_probs, seen, strict=True
        ):
            nodes = [node for node, parent in enumerate(parents) if parent > -2]
            # A root alone is any token where its row has stopped.
            drafted = nodes if len(nodes) > 1 else []
            rows.append(
                {tuple(t for t, on in zip(tokens, above[node], strict=True) if on): sums[node] for node in drafted}
            )
        self.seen.append(rows)

    def on_commit(self, call, tree, scored, walk, pairs):
        super().on_commit(call, tree, scored, walk, pairs)
        self.seen[-1] = self.seen[-1][1:]


class Pausing(PlanController):
    """Drafts by a plan in some rounds and nothing in the others, the same ones in every call."""

    def __init__(self, plan: DraftingPlan, pauses: list[bool]):
        super().__init__()
        self._drafts = Choice(plan.tree_budget, Way(plan.num_forwards, plan.max_starts))
        self._pauses = pauses
        self.begin()

    def begin(self) -> None:
        self._rounds = itertools.cycle(self._pauses)

    def next(self, setting: Any, offer: Any) -> Choice:
        return Choice(0) if next(self._rounds) else self._drafts

    def observe(self, setting: Any, offer: Any, seen: Any) -> None:
        """It knows."""


def same(rounds: list, others: list) -> bool:
    """Whether all paths and walks are the same, log-probs up to rounding."""
    if len(rounds) != len(others):
        return False
    for one, other in zip(rounds, others, strict=True):
        if not isinstance(one, list):
            if one != other:
                return False
            continue
        for paths, same_paths in zip(one, other, strict=True):
            if paths.keys() != same_paths.keys():
                return False
            if any(abs(value - same_paths[path]) > 1e-4 for path, value in paths.items()):
                return False
    return True


def case() -> dict[str, Any]:
    """A call: drafter, plan, prompts, options, and how the target attends."""
    lengths = [random.randint(1, 24) for _ in range(random.choice([1, 1, 1, 2, 3, 8]))]
    options = {name: OPTIONS[name]() for name in random.sample(sorted(OPTIONS), random.choice([0, 0, 1, 2]))}
    options["max_new_tokens"] = random.randint(1, 40)
    if random.random() < 0.25:
        options |= {"do_sample": True, "temperature": random.uniform(0.5, 1.5)}
    plan = DraftingPlan(random.randint(1, 24), random.randint(1, 3), random.randint(1, 8))
    pauses = [random.random() < 0.6 for _ in range(random.randint(2, 9))] if random.random() < 0.3 else None
    if random.random() < 0.2 and pauses is None:
        plan = DraftingPlan(plan.tree_budget, plan.num_forwards, plan.max_starts, 1e-3, 1e-2)
    return {
        "drafter": random.choice(sorted(DRAFTERS)),
        "target": random.choice(["llama", "llama", "qwen3"]),
        "attention": random.choice(["sdpa", "sdpa", "eager"]),
        "plan": plan,
        "pauses": pauses,
        "most_waiting": random.choice([4, 1024]),
        "lengths": lengths,
        "seed": random.randint(0, 999),
        "options": GREEDY | options,
    }


def compare(case: dict[str, Any], made: dict) -> Counter[str]:
    """
    Run a call three times, and the last one twice.

    Raises:
        AssertionError: Something differs.
    """
    target = tiny_target(case["target"], case["attention"])
    if case["drafter"] not in made:
        made[case["drafter"]] = DRAFTERS[case["drafter"]]()
    drafter = made[case["drafter"]]
    drafter.drafting_plan, drafter.compiled_rounds = case["plan"], None
    if case["pauses"]:
        drafter.drafting_plan, drafter.default_plan = "auto", lambda device: case["plan"]
        drafter.controller, state.MOST_WAITING = Pausing(case["plan"], case["pauses"]), case["most_waiting"]
    batch = padded_batch(case["lengths"], case["seed"])
    longest = max(case["lengths"]) + case["options"]["max_new_tokens"]

    def answer(helper: Any) -> tuple[list, list]:
        rounds = Paths()
        drafter.add_callback(rounds)
        torch.manual_seed(case["seed"])
        if case["pauses"]:
            drafter.controller.begin()
        text = target.generate(**batch, **case["options"], assistant_model=helper)
        drafter.remove_callback(rounds)
        return text.tolist(), rounds.seen

    plain, _ = answer(None)
    text, seen = answer(drafter)
    exact = not case["options"]["do_sample"] or len(case["lengths"]) == 1
    assert text == plain or not exact, "eager rounds differ from plain decoding"
    compile_rounds(target, drafter, batch_size=len(case["lengths"]), max_length=longest + random.randint(0, 9))
    for time_ in ("first", "second"):
        again, rounds = answer(drafter)
        assert again == text and same(rounds, seen), f"captured rounds differ from eager ones in the {time_} call"
    figures = drafter.last_statistics
    assert figures.compiled_rounds == figures.rounds and figures.eager_because is None
    return Counter(rounds=figures.rounds, replayed=figures.captured_rounds, drafts_replayed=figures.captured_drafts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no call begins")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_rounds.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    compilation.recorder_for = lambda device: PretendedGraphs
    result = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": args.seed,
        "mismatches": 0,
        "seconds": 0,
        "counts": {"calls": 0},
        "first_mismatches": [],
    }
    if args.output.exists():
        result = json.loads(args.output.read_text())
        if (result["seed"], result["transformers"]) != (args.seed, transformers.__version__):
            parser.error(f"{args.output} is of another seed or release of transformers; give another file.")
    counts, mismatches = Counter(result["counts"]), result["first_mismatches"]
    start, made, before = time.perf_counter(), {}, result["seconds"]
    for number in range(counts["calls"], args.calls):
        if time.perf_counter() - start > args.seconds:
            break
        random.seed(f"{args.seed} {number}")
        call = case()
        counts.update(["calls", call["drafter"], call["target"], call["attention"], f"{len(call['lengths'])} rows"])
        counts.update(name for name, value in call["options"].items() if value)
        counts["pauses"] += call["pauses"] is not None
        try:
            counts += compare(call, made)
        except Exception as error:  # whatever it is, it is one of this call, and the others go on
            result["mismatches"] += 1
            mismatches.append(f"call {number}, {call}: {error!r}")
        result |= {
            "seconds": before + round(time.perf_counter() - start),
            "counts": dict(sorted(counts.items())),
            "first_mismatches": mismatches[:10],
        }
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{counts['calls']} calls, {result['mismatches']} mismatches, written to {args.output}")


if __name__ == "__main__":
    main()

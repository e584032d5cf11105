# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Captured rounds on a GPU, in a few short sections. Each is caught, timed and written at once, so that one that fails
costs one line.

    python benchmarks/check_rounds.py --output check.json
    python benchmarks/check_rounds.py --tiny --device cpu --dtype float32 --output check.json

Weights are random and the target counts (token + 1 follows every token), as in `draft_cost.py`: accepted lengths are
forced. A loop's rate at the accepted length of the SpecBlock paper (4.41, and 5.89 for EAGLE-3) follows from the time
of its rounds, which does not depend on it.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from counting import Candidate, ReplayedDrafter, counting_target, random_drafter
from draft_cost import Bench, describe_machine, measure, write
from transformers import PreTrainedModel

from specblock_hf import DraftingPlan, compile_rounds
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.generation.compilation import CompiledRounds
from specblock_hf.generation.rounds.lending import Request
from specblock_hf.trees.tree import DraftTree


NODES = (1, 16, 32, 64)
SPECBLOCK = Candidate("SpecBlock M=2", "specblock", DraftingPlan(60, 2))
CANDIDATES = (SPECBLOCK, Candidate("EAGLE-3", "eagle3", DraftingPlan(59, 8, 10)))
PAPER_TAU = {"specblock": 4.41, "eagle3": 5.89}


class Check:
    """
    The sections' common ground.

    Args:
        args (`argparse.Namespace`): Of the command.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device)
        dtype = getattr(torch, args.dtype)
        self.target: PreTrainedModel = counting_target(args.target, args.tiny, self.device, dtype, "sdpa")
        self.benches = {batch: Bench(self.target, args.context, batch, args.repeats, args.rounds) for batch in (1, 8)}
        self.figures: dict[str, Any] = {}

    @property
    def length(self) -> int:
        return self.args.context + 8 * self.args.rounds + 64

    def plain(self, batch: int) -> dict[str, float]:
        self.figures[f"plain {batch}"] = self.benches[batch].plain()
        return {"ms": self.figures[f"plain {batch}"]}

    def plain_compiled(self) -> dict[str, float]:
        # Last: hooks, which the drafters' features come from, do not run in a forward that was compiled.
        return {"ms": self.benches[1].plain(static=True), "compiled": self.device.type == "cuda"}

    def steps(self, batch: int, **options: Any) -> dict[str, Any]:
        """Milliseconds of every replayed step of a round."""
        found: dict[str, Any] = {}
        for candidate in CANDIDATES:
            drafter = random_drafter(candidate, self.target)
            drafter.drafting_plan = candidate.plan
            compile_rounds(self.target, drafter, batch_size=batch, max_length=self.length, tree_sizes=NODES, **options)
            # Captures what a call needs, and leaves the buffers as in the middle of one.
            replayed = self._call(drafter, batch, 24)
            found[candidate.name] = replayed | {"draft": self._draft(drafter, candidate.plan, batch)}
            if candidate is SPECBLOCK:
                with drafter.compiled_rounds.lend(self._request(drafter, candidate.plan, batch)) as lent:
                    found["verify"] = [self._verify(lent.target, nodes, batch) for nodes in NODES]
            drafter.compiled_rounds = None
        return found

    def loop(self, candidate: Candidate, batch: int, captured: bool, **options: Any) -> dict[str, Any]:
        """The whole `generate()` at a forced accepted length."""
        drafter = ReplayedDrafter(random_drafter(candidate, self.target), 3)
        drafter.drafting_plan, drafter.captures_rounds = candidate.plan, False
        if captured:
            compile_rounds(self.target, drafter, batch_size=batch, max_length=self.length, **options)
        tokens = self.args.rounds * 4 + 1
        rows = []
        for _ in range(self.args.repeats + 1):  # the first one warms up
            text = self.benches[batch]._generate(drafter, tokens)[:, self.args.context :]
            rows.append(drafter.last_statistics)
        figures = min(rows[1:], key=lambda row: row.seconds - row.prefill_seconds)
        spent = {
            name: 1000 * vars(figures)[f"{name}_seconds"] / figures.rounds for name in ("draft", "verify", "host")
        }
        steps = torch.arange(1, tokens + 1, device=self.device)
        expected = (self.benches[batch].ids[:, -1:] + steps) % self.target.config.vocab_size
        tau, round_ms = PAPER_TAU[candidate.kind], sum(spent.values())
        rate = 1000 * batch * tau / round_ms
        plain = self.figures.get(f"plain {batch}")
        return {
            "same_text": bool(text.equal(expected)),
            "tau": figures.tau,
            "round_ms": round_ms,
            **{f"{name}_ms": value for name, value in spent.items()},
            "captured": [figures.captured_rounds, figures.captured_drafts, figures.rounds],
            "eager_because": figures.eager_because,
            "tokens_per_second_at": {f"{tau}": rate},
            "of_plain": None if plain is None else rate * plain / 1000 / batch,
        }

    def _call(self, drafter: TreeDrafter, batch: int, tokens: int) -> dict[str, Any]:
        self.benches[batch]._generate(drafter, tokens)
        figures = drafter.last_statistics
        return {
            "captured": [figures.captured_rounds, figures.captured_drafts, figures.rounds],
            "eager_because": figures.eager_because,
        }

    def _request(self, drafter: TreeDrafter, plan: DraftingPlan, batch: int) -> Request:
        return Request(self.target, drafter, plan, batch, self.length)

    def _draft(self, drafter: TreeDrafter, plan: DraftingPlan, batch: int) -> dict[str, float]:
        rounds: CompiledRounds = drafter.compiled_rounds
        with rounds.lend(self._request(drafter, plan, batch)) as lent:
            return measure(self.device, self.args.repeats, lent.drafts.step)

    def _verify(self, rounds: Any, nodes: int, batch: int) -> dict[str, Any]:
        sized = rounds.sized(nodes)
        zeros = torch.zeros(batch, nodes, dtype=torch.long, device=self.device)
        parents = zeros.clone()
        parents[:, 0] = -1
        sized.fill(DraftTree(zeros + 1, parents, zeros.float(), zeros.unsqueeze(-1).expand(-1, -1, 2)))
        sized.judged = sized.score()
        cost = {"nodes": nodes, "score": measure(self.device, self.args.repeats, sized.score)}
        sized.walk()
        # Nothing is committed, so that the texts stay where they are.
        sized.lengths.zero_()
        sized.nodes.fill_(-1)
        sized.commit()
        return cost | {"commit": measure(self.device, self.args.repeats, sized.commit)}


def sections(check: Check) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for batch in (1, 8):
        found[f"plain, batch {batch}"] = lambda batch=batch: check.plain(batch)
        found[f"steps, batch {batch}"] = lambda batch=batch: check.steps(batch)
        for candidate in CANDIDATES:
            for captured in (True, False):
                name = f"{candidate.name}, {'captured' if captured else 'eager'}, batch {batch}"
                found[name] = lambda kind=candidate, batch=batch, on=captured: check.loop(kind, batch, on)
    if check.args.fuse:
        found["steps, fused"] = lambda: check.steps(1, fuse=True)
        found["SpecBlock M=2, fused"] = lambda: check.loop(SPECBLOCK, 1, True, fuse=True)
    found["plain, compiled"] = check.plain_compiled
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", default="llama-3.1-8b", help="default: %(default)s")
    add("--context", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    add("--tiny", action="store_true", help="the same architecture in tiny, to try the script")
    add("--fuse", action="store_true", help="also with torch.compile, which takes minutes")
    add("--repeats", type=int, default=3, help="of every measurement (default: %(default)s)")
    add("--rounds", type=int, default=16, help="of a call with a forced accepted length (default: %(default)s)")
    add("--seconds", type=float, default=150, help="after which no section begins (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run every section; 1 if one failed or had no time, or a text was not the target's."""
    args = parse(arguments)
    end = time.monotonic() + args.seconds
    check = Check(args)
    report: dict[str, Any] = {"machine": describe_machine(check.device), "settings": {"tiny": args.tiny}}
    report["sections"] = rows = {}
    for name, section in sections(check).items():
        started = time.monotonic()
        try:
            rows[name] = {"result": section()} if started < end else {"error": "out of time"}
        except Exception as error:  # a section must not cost those after it
            rows[name] = {"error": repr(error), "tail": traceback.format_exc().splitlines()[-8:]}
        rows[name]["seconds"] = time.monotonic() - started
        write(args.output, report)
        print(f"{name}: {rows[name].get('result', rows[name].get('error'))}", flush=True)
    wrong = [row for row in rows.values() if not row.get("result", {}).get("same_text", "result" in row)]
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())

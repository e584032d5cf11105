# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What drafting costs on targets of real size: no weights are needed, because the time of a forward does not depend on
their values.

    python benchmarks/draft_cost.py --target llama-3.1-8b qwen3-8b --context 512 4096 --output cost.json
    python benchmarks/draft_cost.py --target smollm2-135m --device cpu --dtype float32 --repeats 1 --output cost.json

For every target and context: a token of plain `generate()` (as it is, and with a static cache, compiled), a
verification of n nodes, a proposal of every drafter, and the whole `generate()` loop at accepted lengths that are
forced: the target counts (token + 1 follows every token), and a drafter's real tree gets the right tokens along its
first path, down to a chosen depth. The output holds one entry for each target, context and batch, written drafter by
drafter, of which one that fails costs its own line; entries that are finished are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from counting import TARGETS, Candidate, ReplayedDrafter, counting_target, random_drafter, shape_of
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

from specblock_hf import DraftingPlan
from specblock_hf.compat import CACHE
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.plan import round_limits
from specblock_hf.generation.rounds.drafts import draft
from specblock_hf.target.model import TargetModel
from specblock_hf.trees.tree import DraftTree
from specblock_hf.trees.verification import Walk, sample_and_walk


VERIFIED = (1, 8, 16, 32, 64, 96)  # nodes, the root counted
TAUS = (3, 4, 5, 6)
PAIRS = 4  # that a proposal is told of: what a round at tau = 4 leaves behind
EAGLE3 = "EAGLE-3"
CANDIDATES = (
    Candidate(EAGLE3, "eagle3", DraftingPlan(59, 8, 10), taus=TAUS),
    Candidate("SpecBlock M=1", "specblock", DraftingPlan(60, 1), taus=TAUS),
    Candidate("SpecBlock M=2", "specblock", DraftingPlan(60, 2), taus=TAUS),
    Candidate("SpecBlock M=3", "specblock", DraftingPlan(60, 3, 60), taus=TAUS),
    Candidate("SpecBlock M=2, best-first", "specblock", DraftingPlan(60, 2, 8), {"expansion": "best_first"}),
    Candidate("Medusa", "medusa", DraftingPlan(63, 1)),
    Candidate("ParallelSpec", "parallelspec", DraftingPlan(60, 1)),
    Candidate("Falcon", "falcon", DraftingPlan(60, 4)),
    Candidate("DFlash", "dflash", DraftingPlan(60, 1), {"block_size": 16}),
)
"""EAGLE-3 as its authors run it: depth 7 after the first level, top-k 10, 60 nodes with the root. Two blocks of
SpecBlock start wherever the paper's rule says; of a third one, more starts than the tree has nodes would be wasted."""


def seconds_of(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of one call from an idle device until the device is idle again."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    first.record(torch.cuda.current_stream(device))
    call()
    last.record(torch.cuda.current_stream(device))
    last.synchronize()
    return first.elapsed_time(last) / 1000


class OperatorCount(TorchDispatchMode):
    """Counts the operators that torch dispatches, which is what the host has to do whatever the device is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators_of(call: Callable[[], Any]) -> int:
    """Operators that one call dispatches, views included."""
    with OperatorCount() as counter:
        call()
    return counter.count


def device_work(device: torch.device, call: Callable[[], Any]) -> dict[str, float]:
    """Milliseconds for which a GPU is busy with one call, and its kernels; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize(device)
    kernels = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return {"device_ms": sum(event.time_range.elapsed_us() for event in kernels) / 1000, "kernels": len(kernels)}


def measure(device: torch.device, repeats: int, call: Callable[[], Any]) -> dict[str, float]:
    """What a call costs: median and spread of its time, operators, kernels."""
    call()
    cost: dict[str, float] = {"operators": operators_of(call)} | device_work(device, call)
    times = sorted(1000 * seconds_of(device, call) for _ in range(repeats))
    return {"ms": median(times), "least_ms": times[0], "most_ms": times[-1]} | cost


class Bench:
    """
    Everything that is measured for one target, context and batch.

    Args:
        target ([`~transformers.PreTrainedModel`]): From [`counting_target`].
        context (`int`): Tokens of the prompts.
        batch_size (`int`): Prompts.
        repeats (`int`): Measurements of every figure.
        rounds (`int`): Of a call whose accepted length is forced.
        plain_tokens (`int`, *optional*, defaults to 48): Tokens that a plain call emits more than another one.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        context: int,
        batch_size: int,
        repeats: int,
        rounds: int,
        plain_tokens: int = 48,
    ):
        self.target, self.context, self.batch_size = target, context, batch_size
        self.repeats, self.rounds, self.plain_tokens = repeats, rounds, plain_tokens
        self.device = target.device
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(target.config.vocab_size, (batch_size, context), generator=generator)
        self.ids = ids.to(self.device)

    def plain(self, static: bool = False) -> float:
        """
        Milliseconds of a token of plain `generate()`, by the difference of a longer and a shorter answer; with a
        static cache it compiles the target's forward on a GPU (mode reduce-overhead).
        """
        shorter, longer = 8, 8 + self.plain_tokens
        cache = StaticCache(config=self.target.config, max_cache_len=self.context + longer) if static else None

        def seconds(tokens: int) -> float:
            if cache is not None:
                cache.reset()
            return seconds_of(self.device, lambda: self._generate(None, tokens, **({CACHE: cache} if static else {})))

        seconds(shorter)
        differences = [seconds(longer) - seconds(shorter) for _ in range(self.repeats)]
        return 1000 * median(differences) / self.plain_tokens

    def _generate(self, drafter: TreeDrafter | None, tokens: int, **options: Any) -> torch.LongTensor:
        return self.target.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            assistant_model=drafter,
            do_sample=False,
            max_new_tokens=tokens,
            **options,
        )

    def reader(self, layers: Sequence[int]) -> tuple[TargetModel, Pairs]:
        """The target after the prompt, and what it has learned of it; leave it as a context."""
        kwargs = {
            "attention_mask": None,
            "position_ids": torch.arange(self.context, device=self.device).expand(self.batch_size, -1),
            CACHE: DynamicCache(config=self.target.config),
            "use_cache": True,
        }
        scorer = TargetModel(self.target, layers, self.ids, kwargs, mask_length=self.context)
        _, pairs = next(scorer.prefill())
        walk = self._root_walk(self.ids[:, -1])
        pairs = scorer.close_prompt(pairs, walk)
        scorer.commit(walk)
        return scorer, pairs

    def _root_walk(self, roots: torch.LongTensor) -> Walk:
        """A round that keeps nothing of its tree."""
        tree = DraftTree.root(roots)
        return sample_and_walk(tree, [True] * self.batch_size, lambda row, node: 0, lambda row, token: False)

    def verify(self, layers: Sequence[int]) -> list[dict[str, float]]:
        """What the target's forward over n nodes costs, mask included."""
        scorer, _ = self.reader(layers)
        rows = []
        with scorer:
            for nodes in VERIFIED:
                tree = self._star(nodes)

                def call(tree: DraftTree = tree) -> None:
                    scorer.score(tree)
                    scorer.commit(self._root_walk(tree.tokens[:, 0]))

                rows.append({"nodes": nodes} | measure(self.device, self.repeats, call))
        return rows

    def _star(self, nodes: int) -> DraftTree:
        """A root and its children: the cost is that of any tree with as many nodes."""
        parents = torch.zeros(self.batch_size, nodes, dtype=torch.long, device=self.device)
        parents[:, 0] = -1
        zeros = torch.zeros_like(parents)
        return DraftTree(zeros + 1, parents, zeros.float(), zeros.unsqueeze(-1).expand(-1, -1, 2), height=1)

    def proposal(self, drafter: TreeDrafter, plan: DraftingPlan) -> dict[str, Any]:
        """What one round's draft costs, `PAIRS` new pairs read included."""
        scorer, prompt = self.reader(drafter.feature_layers_for(self.target))
        with scorer:
            calls = self.repeats + 4  # and those of `measure` that are not timed
            state = drafter.begin(scorer.table, self.batch_size, self.context + PAIRS * calls)
            limits = round_limits(plan, [10**4] * self.batch_size)
            draft(drafter, state, prompt, limits)
            places = torch.arange(PAIRS, device=self.device).expand(self.batch_size, -1)
            told = [
                Pairs(
                    tokens=prompt.tokens[:, -PAIRS:],
                    features=tuple(feature[:, -PAIRS:] for feature in prompt.features),
                    positions=self.context + PAIRS * number + places,
                    lengths=torch.full_like(prompt.lengths, PAIRS),
                    table=scorer.table,
                )
                for number in range(calls)
            ]
            coming, trees = iter(told), []
            before = state.calls, state.forward_rows

            def call() -> None:
                trees.append(draft(drafter, state, next(coming), limits))

            cost = measure(self.device, self.repeats, call)
            return cost | {
                "nodes": torch.cat([tree.num_nodes for tree in trees]).float().mean().item() - 1,
                "forwards": (state.calls - before[0]) / len(trees),
                "rows": (state.forward_rows - before[1]) / len(trees) / self.batch_size,
            }

    def loop(self, drafter: TreeDrafter, plan: DraftingPlan, tau: int, plain_ms: float) -> dict[str, Any]:
        """The whole `generate()` at a forced accepted length; rates are those of the rounds, without the prompt."""
        replayed = ReplayedDrafter(drafter, tau - 1)
        replayed.drafting_plan = plan
        tokens = self.rounds * tau + 1
        expected = (self.ids[:, -1:] + torch.arange(1, tokens + 1, device=self.device)) % self.target.config.vocab_size
        figures = []
        for _ in range(self.repeats + 1):
            answer = self._generate(replayed, tokens)[:, self.context :]
            figures.append(replayed.last_statistics)
        # The first one warmed up.
        timed = sorted(figures[1:], key=lambda call: call.seconds - call.prefill_seconds)
        middle = timed[len(timed) // 2]
        seconds = middle.draft_seconds + middle.verify_seconds + middle.host_seconds
        per_token = 1000 * seconds / (middle.emitted / self.batch_size - 1)
        return {
            "tau_wanted": tau,
            "tau": middle.tau,
            "same_text": bool(answer.equal(expected)),
            "tokens_per_second": 1000 * self.batch_size / per_token,
            "speedup": plain_ms / per_token,
            **{f"{phase}_ms": 1000 * vars(middle)[f"{phase}_seconds"] / middle.rounds for phase in PHASES},
            "nodes": middle.nodes_verified / middle.rounds / self.batch_size,
        }


PHASES = ("draft", "verify", "host")


def measure_all(bench: Bench, candidates: Sequence[Candidate], unit: dict[str, Any], keep: Callable[[], None]) -> None:
    """Write every figure of one target, context and batch into `unit`, and keep it after every drafter."""
    plain = unit["plain_ms"] = bench.plain()
    unit |= {"verify": None, "drafters": {}, "failed": {}}
    for candidate in candidates:
        try:
            drafter = random_drafter(candidate, bench.target)
            if unit["verify"] is None:
                unit["verify"] = bench.verify(drafter.feature_layers_for(bench.target))
            drafted = {"plan": str(candidate.plan), "parameters": sum(p.numel() for p in drafter.parameters())}
            drafted["proposal"] = bench.proposal(drafter, candidate.plan)
            drafted["loops"] = [bench.loop(drafter, candidate.plan, tau, plain) for tau in candidate.taus]
            unit["drafters"][candidate.name] = drafted
        except Exception as error:  # one drafter must not cost those after it
            unit["failed"][candidate.name] = repr(error)
        unit["ratios"] = ratios(unit["drafters"])
        keep()
    # Last: hooks, which the drafters' features come from, do not run in a forward that was compiled.
    unit["plain_static_ms"] = bench.plain(static=True)
    unit["static_is_compiled"] = bench.device.type == "cuda"
    del unit["unfinished"]
    keep()


def ratios(drafters: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Costs of a proposal relative to EAGLE-3's (the paper: 0.44 to 0.52 for SpecBlock)."""
    if EAGLE3 not in drafters:
        return {}
    base = drafters[EAGLE3]["proposal"]
    names = [name for name in ("ms", "device_ms", "operators", "kernels", "forwards") if name in base]
    return {
        drafter: {name: figures["proposal"][name] / base[name] for name in names}
        for drafter, figures in drafters.items()
        if drafter != EAGLE3
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What makes figures comparable: commit, versions, hardware."""
    commit = None
    if shutil.which("git"):
        asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or None,  # a copy without its history has none
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def table(unit: dict[str, Any]) -> str:
    """One unit's figures for a person, in milliseconds."""
    verify = ", ".join(f"{row['nodes']}: {row['ms']:.2f}" for row in unit["verify"])
    lines = [
        f"{unit['target']}, context {unit['context']}, batch {unit['batch']}: plain {unit['plain_ms']:.2f} ms a token"
        f", static cache {unit['plain_static_ms']:.2f}; verify {verify}",
        f"{'':36s}{'propose':>9s}{'of E-3':>8s}{'ops':>7s}{'rows':>7s}   tau: tokens/s (speedup, draft/verify/host)",
    ]
    for name, figures in unit["drafters"].items():
        cost, ratio = figures["proposal"], unit["ratios"].get(name, {"ms": 1.0})["ms"]
        loops = ", ".join(
            f"{row['tau']:.1f}: {row['tokens_per_second']:.1f} ({row['speedup']:.2f}, "
            f"{'/'.join(format(row[f'{phase}_ms'], '.1f') for phase in PHASES)})"
            for row in figures["loops"]
        )
        lines.append(f"{name:36s}{cost['ms']:9.2f}{ratio:8.2f}{cost['operators']:7d}{cost['rows']:7.1f}   {loops}")
    return "\n".join([*lines, *(f"{name}: {error}" for name, error in unit["failed"].items())])


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(".partial")
    begun.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(begun, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--target", nargs="+", choices=TARGETS, default=["llama-3.1-8b", "qwen3-8b"], help="default: both of 8B")
    add("--context", type=int, nargs="+", default=[512, 4096], help="tokens of the prompt (default: 512 4096)")
    add("--batch", type=int, nargs="+", default=[1], help="prompts at once (default: 1)")
    add(
        "--drafter",
        nargs="+",
        choices=list(trainable_drafters()),
        default=list(trainable_drafters()),
        help="kinds (default: all)",
    )
    add("--tiny", action="store_true", help="the same architectures in tiny, to try the script")
    add("--repeats", type=int, default=5, help="of every measurement; the median counts (default: %(default)s)")
    add("--rounds", type=int, default=16, help="of a call with a forced accepted length (default: %(default)s)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default: %(default)s")
    add("--attention", default="sdpa", help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--output", type=Path, required=True, help="JSON file; a run that was interrupted goes on there")
    return parser.parse_args(arguments)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not in the output; 1 if a drafter failed or a text was not the target's."""
    args = parse(arguments)
    device = torch.device(args.device)
    candidates = [candidate for candidate in CANDIDATES if candidate.kind in args.drafter]
    settings = {"dtype": args.dtype, "attention": args.attention, "tiny": args.tiny}
    settings |= {"repeats": args.repeats, "rounds": args.rounds}
    report: dict[str, Any] = {"units": []}
    if args.output.exists():
        report = json.loads(args.output.read_text())
        report["units"] = [unit for unit in report["units"] if "unfinished" not in unit]
    done = {(unit["target"], unit["context"], unit["batch"]) for unit in report["units"]}
    for name in args.target:
        target = None
        for context, batch in product(args.context, args.batch):
            if (name, context, batch) in done:
                continue
            if target is None:
                # The one before must be gone first.
                target = counting_target(name, args.tiny, device, getattr(torch, args.dtype), args.attention)
            place = {"target": name, "context": context, "batch": batch}
            unit = place | {"settings": settings, "shape": shape_of(name, args.tiny)}
            unit["machine"] = describe_machine(device)
            unit["unfinished"] = True
            report["units"].append(unit)
            bench = Bench(target, context, batch, args.repeats, args.rounds)
            measure_all(bench, candidates, unit, partial(write, args.output, report))
            print(table(unit), flush=True)
    loops = [loop for unit in report["units"] for drafted in unit["drafters"].values() for loop in drafted["loops"]]
    failed = any(unit.get("failed") for unit in report["units"])
    return int(failed or not all(loop["same_text"] for loop in loops))


if __name__ == "__main__":
    raise SystemExit(main())

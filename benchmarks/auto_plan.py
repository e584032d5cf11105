# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
What the plan that finds itself loses against the best plan, which it has to find first.

    python benchmarks/auto_plan.py --costs                          # of this machine, for the next one
    python benchmarks/auto_plan.py                                  # in a simulated service, without a model
    python benchmarks/auto_plan.py --measure --dtype bfloat16       # against fixed plans and plain generate()
    python benchmarks/auto_plan.py --measure --temperature 1 --prompts 10 --tokens 128

The simulation draws rounds by costs and acceptance that were recorded on two cores, from a seed; it writes a picture.
Measured are plain `generate()`, three fixed plans, the plan that finds itself, from its very first call and anew for
every suite, and a drafter with random weights that finds its plan. All answer a prompt in turns. Rows are kept as they
come, and a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specblock_hf import DraftingPlan, JoinedDrafter, calibrate
from specblock_hf.calibration.costs import CostCurves
from specblock_hf.calibration.trial import padded
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.models import add_model_arguments, encode, load_models
from specblock_hf.data.suites import load_prompts
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.evaluation.benchmark import evenly
from specblock_hf.planning.controller import PlanController
from specblock_hf.planning.offers import Choice, Offer, Way


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from plan_service_for_tests import Nature, SimulatedService  # noqa: E402


RESULTS = Path(__file__).parent / "results"
COSTS, DTYPES = RESULTS / "auto_plan_costs.json", ("bfloat16", "float32")
MATCHES = (0.6, 0.1, 0.1, 0.2)
NATURES: dict[str, Callable[[float], Nature]] = {
    "never right": lambda tokens: Nature(0.0),
    "as recorded": lambda tokens: Nature(1.0),
    "half as often right": lambda tokens: Nature(0.5),
    "chat, code, chat": lambda tokens: Nature(1.3) if 1280 <= tokens < 2560 else Nature(0.05),
    "look-ups": lambda tokens: Nature(0.7, MATCHES),
}
PLANS = {f"{plan[0]} nodes, {plan[1]} forward(s)": DraftingPlan(*plan) for plan in ((5, 1), (7, 1), (11, 2, 4))}
LEARNING = ("auto", "random")
SIDES = ("plain", *PLANS, *LEARNING)
CALLS_TO_LEARN = 2
DRAWS = 2000


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--measure", action="store_true", help="real calls instead of simulated rounds")
    parser.add_argument("--costs", action="store_true", help="measure what rounds cost here, and nothing else")
    parser.add_argument(
        "--suites",
        nargs="+",
        default=["humaneval", "mtbench"],
        help="default: %(default)s; mtbench+humaneval+mtbench is one that changes",
    )
    parser.add_argument("--suite-file", type=Path, help="of a suite that has to be downloaded")
    parser.add_argument("--prompts", type=int, default=10, help="of each suite (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=1, help="with other prompts and nothing learned (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=128, help="of an answer, or simulated ones times 30")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--no-record", action="store_true", help="as if the drafter's acceptance was never measured")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=SIDES, metavar="SIDE", help="default: all (%(choices)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="of the simulation (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, help="default: auto_plan.json, or auto_plan_measured.jsonl, in results/"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.costs:
        record_costs(args, args.output or COSTS)
    elif args.measure:
        measure(args, args.output or RESULTS / "auto_plan_measured.jsonl")
    else:
        simulate(args, args.output or RESULTS / "auto_plan.json")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def record_costs(args: argparse.Namespace, output: Path) -> None:
    """Write the default target's and drafter's costs in every dtype."""
    costs = {}
    for dtype in DTYPES:
        args.dtype = dtype
        target, _, drafter = load_models(args)
        costs[dtype] = calibrate(target, drafter, repeats=9, apply=False, progress=True).curves.to_dict()
    output.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")


def recorded_curves(dtype: str) -> CostCurves:
    """What rounds cost; a plain step is a round without drafts."""
    curves = CostCurves.from_dict(read_json(COSTS)[dtype])
    ((_, plain), *_), _ = curves.for_controller(())
    return replace(curves, plain=plain)


def recorded_offer(finds: bool) -> Offer:
    """What the shipped drafter was recorded to accept."""
    ways: dict[Way, list[tuple[int, float]]] = {}
    for nodes, forwards, starts, tau, _ in read_json(find_default_drafter() / "config.json")["acceptance"]:
        ways.setdefault(Way(forwards, starts or None), []).append((nodes, tau))
    return Offer(ways, 60, trusted=True, finds=finds)


def simulate(args: argparse.Namespace, output: Path) -> None:
    """Serve texts of every nature and write what was lost."""
    report: dict[str, Any] = {}
    for dtype in DTYPES:
        curves = recorded_curves(dtype)
        for label, nature in NATURES.items():
            offer = recorded_offer(len(nature(0.0).found) > 1 and nature(0.0).found[0] < 1)
            runs = []
            for seed in range(args.seeds):
                service = SimulatedService(curves, offer, nature, spikes=0.02, seed=seed)
                runs.append(service.run(PlanController(), 30 * args.tokens))
            plain = runs[0].expected(Choice(0), nature(0.0))[1]
            every = [len(run.lost) // 100 or 1 for run in runs]
            report[f"{label}, {dtype}"] = {
                "of_best": [1 - run.lost[-1] / run.seconds for run in runs],
                "of_plain": [run.tokens / run.seconds * plain for run in runs],
                "seconds": [run.seconds for run in runs],
                "lost": [run.lost[::step] for run, step in zip(runs, every, strict=True)],
                "best": str(runs[0].best(nature(runs[0].tokens))[1]),
            }
            print(f"{label}, {dtype}: {_range(report[f'{label}, {dtype}'])}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report) + "\n", encoding="utf-8")
    plot(report, output.with_suffix(".png"))


def _range(figures: Mapping[str, list[float]]) -> str:
    best, plain = figures["of_best"], figures["of_plain"]
    return (
        f"{sum(best) / len(best):.3f} ({min(best):.3f} at worst) of the best plan, "
        f"{sum(plain) / len(plain):.2f} of plain steps"
    )


def plot(report: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Seconds lost to the best plan, over the answers' time."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(DTYPES), figsize=(11, 4), sharey=True)
    for axis, dtype in zip(axes, DTYPES, strict=True):
        for label in NATURES:
            figures = report[f"{label}, {dtype}"]
            for number, (lost, seconds) in enumerate(zip(figures["lost"], figures["seconds"], strict=True)):
                times = [seconds * step / len(lost) for step in range(len(lost))]
                color = f"C{list(NATURES).index(label)}"
                axis.plot(times, lost, color=color, alpha=0.6, linewidth=1, label=None if number else label)
        axis.set(title=f"{dtype}, costs of two cores", xlabel="seconds of decoding")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("seconds lost to the best plan")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def measure(args: argparse.Namespace, output: Path) -> None:
    """Answer all prompts by all sides; rows that are there already are not made again."""
    target, tokenizer, drafter = load_models(args)
    if args.no_record:
        drafter.network.config.acceptance = None
    condition = f"{args.dtype}, temperature {args.temperature}, batch {args.batch_size}, {args.tokens} tokens"
    condition += ", no record" * args.no_record + ", no look-ups" * (not args.lookup)
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(row["condition"], row["suite"], row["repeat"], row["batch"], row["side"]) for row in rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    sides = make_sides(drafter, args.lookup)
    sides = {name: side for name, side in sides.items() if name in args.sides}
    for suite, repeat in itertools.product(args.suites, range(args.repeats)):
        states = {name: output.with_suffix(f".{suite}.{repeat}.{name}.json") for name in LEARNING if name in sides}
        for name, path in states.items():
            known = any((condition, part, repeat, 0, name) in done for part in (suite, _part(suite, 1)))
            sides[name][0].controller = PlanController.load(path) if known and path.exists() else PlanController()
        for part, batch, prompts in batches_of(suite, repeat, args, tokenizer, target.device):
            for name in _turned(list(sides), batch):
                if (condition, part, repeat, batch, name) in done:
                    continue
                row = {"condition": condition, "suite": part, "repeat": repeat, "batch": batch, "side": name}
                row |= answer(target, *sides[name], prompts, args)
                rows.append(row)
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                if name in states:
                    sides[name][0].controller.save(states[name])
    print("\n".join(summarise([row for row in rows if row["condition"] == condition])))


def batches_of(
    suite: str, repeat: int, args: argparse.Namespace, tokenizer: Any, device: torch.device
) -> Iterator[tuple[str, int, Mapping[str, torch.Tensor]]]:
    """The part of a suite that a batch is of, its number, and its prompts."""
    names, number = suite.split("+"), itertools.count()
    for place, name in enumerate(names, 1):
        prompts = evenly(load_prompts(name, args.suite_file), args.prompts * args.repeats)[repeat :: args.repeats]
        ids = [encode(tokenizer, prompt.prompt, device) for prompt in prompts]
        for first in range(0, len(ids) - args.batch_size + 1, args.batch_size):
            batch = padded(ids[first : first + args.batch_size], tokenizer.pad_token_id or 0)
            yield suite if len(names) == 1 else _part(suite, place), next(number), batch


def _part(suite: str, number: int) -> str:
    return f"{suite}, part {number}"


def make_sides(drafter: TreeDrafter, lookup: bool) -> dict[str, tuple[TreeDrafter | None, Any]]:
    """By name: a drafter, and what it drafts by."""
    first = drafter.network
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = type(first)(first.config.__class__(**first.config.to_dict() | {"acceptance": None})).eval()
    untrained.d2t.copy_(first.d2t)
    drafting = untrained.to(first.device, first.dtype)
    strangers = (
        JoinedDrafter(drafting, *drafter.parts[1:]) if isinstance(drafter, JoinedDrafter) and lookup else drafting
    )
    sides: dict[str, tuple[TreeDrafter | None, Any]] = {"plain": (None, None)}
    sides |= {name: (drafter, plan) for name, plan in PLANS.items()}
    return sides | {"auto": (drafter, "auto"), "random": (strangers, "auto")}


def answer(
    target: Any, drafter: TreeDrafter | None, plan: Any, prompts: Mapping[str, torch.Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """One call: its seconds and tokens."""
    options: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": args.temperature > 0}
    if args.temperature:
        options["temperature"] = args.temperature
    if drafter is not None:
        drafter.drafting_plan = plan
    torch.manual_seed(0)
    start = time.perf_counter()
    output = target.generate(**prompts, assistant_model=drafter, **options).cpu()
    seconds = time.perf_counter() - start
    pad = target.generation_config.pad_token_id
    made = output[:, prompts["input_ids"].shape[1] :]
    tokens = int((made != pad).sum()) if pad is not None else made.numel()
    text = zlib.crc32(made.numpy().tobytes())
    plan = drafter.last_statistics.plan if drafter else ""
    return {"seconds": seconds, "tokens": tokens, "text": text, "plan": plan}


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """
    Lines to print: speeds over plain's of every suite, and the plan that finds itself, after the calls in which it
    learns, over the fixed plan that is the best in the other half of the batches; in bfloat16 their texts may differ,
    and the faster one may only have the easier text, so that the batches with equal ones are told apart.
    """
    lines, table, texts = [], {}, {}
    for row in rows:
        place = row["suite"], (row["repeat"], row["batch"]), row["side"]
        table[place] = row["tokens"] / row["seconds"]
        texts[place] = row["text"]
    suites, sides = (list(dict.fromkeys(row[name] for row in rows)) for name in ("suite", "side"))
    for suite in suites:
        batches = sorted({batch for name, batch, _ in table if name == suite})
        for side in sides:
            both = [b for b in batches if {(suite, b, side), (suite, b, "plain")} <= table.keys()]
            if both and side != "plain":
                ratios = [table[suite, b, side] / table[suite, b, "plain"] for b in both]
                lines.append(f"{suite}: {side} / plain {_interval(ratios)}")
        learned = [batch for batch in batches if batch[1] >= CALLS_TO_LEARN]
        fixed = [side for side in sides if side not in ("plain", *LEARNING)]
        halves, best, ratios, alike = (learned[::2], learned[1::2]), [], [], []
        for choosing, comparing in (halves, halves[::-1]) if fixed and "auto" in sides else ():
            if comparing:
                best.append(max(fixed, key=lambda side: sum(table[suite, b, side] for b in choosing)))
                ratios += [table[suite, b, "auto"] / table[suite, b, best[-1]] for b in comparing]
                alike += [texts[suite, b, "auto"] == texts[suite, b, best[-1]] for b in comparing]
        if len(best) == 2:
            same = [ratio for ratio, equal in zip(ratios, alike, strict=True) if equal]
            lines.append(f"{suite}: auto / best fixed ({' and '.join(dict.fromkeys(best))}) {_interval(ratios)}")
            lines.append(f"{suite}: the same where their texts are equal {_interval(same) if same else '(nowhere)'}")
    return lines


def _interval(ratios: Sequence[float]) -> str:
    """The mean, and between what nine of ten bootstrap means lie."""
    draw = random.Random(0)
    means = sorted(sum(draw.choices(ratios, k=len(ratios))) / len(ratios) for _ in range(DRAWS))
    mean = sum(ratios) / len(ratios)
    return f"{mean:.3f} ({means[DRAWS // 20]:.3f} to {means[-DRAWS // 20]:.3f}, {len(ratios)} batches)"


def _turned(sides: list[str], by: int) -> list[str]:
    """The sides in another order for every batch."""
    by %= len(sides)
    return sides[by:] + sides[:by]


if __name__ == "__main__":
    main()

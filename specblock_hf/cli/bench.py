# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock bench`: drafters and transformers' own helpers side by side on one target, with tables and pictures."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..checkpoints.saving import save_text_whole
from ..data.suites import load_prompts, own_prompts
from ..drafting.plan import DraftingPlan
from ..evaluation.benchmark import Benchmark, ResultFolder, Row, Unit, evenly
from ..evaluation.methods import TRANSFORMERS_OWN, TREES, Method, MethodLoader, name_of
from ..evaluation.plans import apply_plans, choose_plans
from ..evaluation.plots import draw_benchmark, require_matplotlib
from ..evaluation.report import markdown
from ..evaluation.summary import summarise
from .default_target import find_default_drafter
from .demo import PROMPTS
from .models import add_device, add_dtype, add_thinking, dtype_named, encode, load_target, tell_thinking
from .options import Extending, refuse_below_one


OWN = "specblock"
"""The drafter that needs no `--drafter` where the target is the default one."""

TRIALS = 3
"""Prompts that the calibrated plans are chosen by: a function, a chat and a sum."""

MODEL_FILES = ("config.json", "*.safetensors", "*.bin")
"""What of a model's folder decides its figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--target", help="folder or Hub id (default: the default target, from a wheel)")
    add(
        "--methods",
        nargs="+",
        action=CommaSeparated,
        default=["vanilla", "prompt_lookup", "lookup", "specblock", "specblock+lookup"],
        metavar="NAME",
        help="vanilla, prompt_lookup, assistant:MODEL, dflash_native:MODEL, lookup, or the name of a drafter, with "
        f":{{{','.join(TREES)}}} for another tree of a SpecBlock drafter and +lookup for look-ups joined to it "
        "(default: vanilla prompt_lookup lookup specblock specblock+lookup)",
    )
    add(
        "--drafter", type=named, nargs="+", action="extend", default=[], metavar="NAME=PATH", help="folders or Hub ids"
    )
    add(
        "--plan",
        type=named_plan,
        nargs="+",
        action="extend",
        default=[],
        metavar="METHOD=NODES,FORWARDS[,STARTS]",
        help="how much a round of a method drafts (default: calibrated for each)",
    )
    add("--suite", nargs="+", action=CommaSeparated, default=[], metavar="NAME", help="humaneval, mtbench, gsm8k")
    add("--gsm8k", metavar="FILE", help="JSON lines of GSM8K, which no package carries")
    add("--prompts", metavar="FILE", help="JSON lines of your own: prompt, question or turns")
    add("--temperature", type=float, nargs="+", action=Extending, default=[0.0], help="0 is greedy (default: 0)")
    add("--max-new-tokens", type=int, default=128, help="of every answer (default: %(default)s)")
    add("--limit", type=int, help="prompts of each suite, evenly spaced (default: all)")
    add("--repeats", type=int, default=3, help="times that every answer is made (default: %(default)s)")
    add("--seed", type=int, default=0, help="of sampled answers (default: %(default)s)")
    add_thinking(parser)
    add_dtype(parser)
    add_device(parser)
    add("--output", required=True, metavar="DIR", help="a run that was interrupted goes on there")
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw PNGs (default: yes)")


def run(args: argparse.Namespace) -> int:
    """
    Measure what is missing, write the report and print it.

    Returns:
        `int`: 1 if a tree drafter's greedy answer differs in fp32, where it never may; 0 otherwise.
    """
    start = time.perf_counter()
    check(args)
    units = read_units(args)
    target, tokenizer = load_target(args.target, dtype_named(args.dtype))
    tell_thinking(tokenizer, args.thinking)
    target = target.eval().to(args.device)
    methods = MethodLoader(target, tokenizer, drafter_paths(args)).load(args.methods)
    folder = ResultFolder(args.output)
    # Written for the demo, and in none of the suites.
    trials = [encode(tokenizer, text, target.device) for _, text in PROMPTS[:TRIALS]]
    setting = folder.open(
        conditions(args, target, methods),
        lambda known: choose_plans(methods, target, dict(args.plan), trials, known, progress=not args.quiet),
    )
    apply_plans(methods, setting["plans"])
    rows = folder.rows(units, len(methods))
    benchmark = Benchmark(target, tokenizer, methods, args.max_new_tokens, args.repeats, args.seed)
    try:
        rows += measure(benchmark, units, rows, folder, not args.quiet)
    except KeyboardInterrupt:
        print(f"interrupted; what is measured stays in {folder.folder}, and the same command goes on", file=sys.stderr)
        raise
    summary = summarise(setting, rows)
    text = markdown(summary)
    save_text_whole(folder.folder / "results.json", json.dumps(summary, indent=1) + "\n")
    save_text_whole(folder.folder / "results.md", text)
    pictures = draw_benchmark(summary, folder.folder) if args.plots else []
    print(text)
    print(f"written: {', '.join(map(str, [folder.folder / 'results.md', folder.folder / 'results.json', *pictures]))}")
    print(f"wall time of the command: {time.perf_counter() - start:.0f} s")
    return int(target.dtype == torch.float32 and not all_identical(summary))


def check(args: argparse.Namespace) -> None:
    """
    Refuse what would fail only after the models are loaded or the answers made.

    Raises:
        ValueError: An option's value.
        ImportError: Pictures are wanted and matplotlib is not installed.
    """
    if not args.suite and args.prompts is None:
        raise ValueError("there is nothing to ask; name a suite with --suite, or a file with --prompts.")
    refuse_below_one(args, "max_new_tokens", "repeats", "limit")
    if min(args.temperature) < 0 or len(set(args.temperature)) < len(args.temperature):
        raise ValueError(f"the temperatures are {args.temperature}; give different ones of 0 (greedy) or more.")
    if args.plots:
        require_matplotlib()


def read_units(args: argparse.Namespace) -> list[Unit]:
    """Every prompt at every temperature, the temperatures of a prompt one after the other."""
    suites = [load_prompts(name, args.gsm8k if name == "gsm8k" else None) for name in args.suite]
    if args.prompts is not None:
        suites.append(own_prompts(args.prompts))
    prompts = [prompt for suite in suites for prompt in evenly(suite, args.limit)]
    return [Unit(prompt, temperature) for prompt in prompts for temperature in args.temperature]


def drafter_paths(args: argparse.Namespace) -> dict[str, str]:
    """Every drafter's folder or Hub id by its name; the default drafter is there if its target is and it is wanted."""
    given = dict(args.drafter)
    if args.target is None and OWN not in given and any(re.match(rf"{OWN}\b", name) for name in args.methods):
        return {OWN: str(find_default_drafter())} | given
    return given


def conditions(args: argparse.Namespace, target: PreTrainedModel, methods: Sequence[Method]) -> dict[str, Any]:
    """
    What decides the figures; a run goes on only where all of it is the same. Files and folders go by their names,
    which say nothing about the machine, and by what tells them from others of that name.
    """
    drafters = drafter_paths(args)
    given = {"target": target.name_or_path, "prompts": args.prompts, "gsm8k": args.gsm8k}
    given |= {f"drafter {name}": path for name, path in drafters.items()}
    others = (name.partition(":") for name in args.methods)
    given |= {f"{kind} {name_of(model)}": model for kind, _, model in others if kind in TRANSFORMERS_OWN}
    hardware = (
        f"{torch.get_num_threads()} {platform.machine()} CPU thread(s), {torch.backends.cpu.get_cpu_capability()}"
    )
    if target.device.type == "cuda":
        hardware = torch.cuda.get_device_name(target.device)
    return {
        "target": name_of(target.name_or_path),
        "methods": [method.name for method in methods],
        "kinds": {method.name: method.kind for method in methods},
        "drafters": {name: name_of(path) for name, path in drafters.items()},
        "given_plans": {name: [plan.tree_budget, plan.num_forwards, plan.max_starts] for name, plan in args.plan},
        "suites": args.suite,
        "prompts": args.prompts and name_of(args.prompts),
        "gsm8k": args.gsm8k and name_of(args.gsm8k),
        "files": {name: state for name, path in given.items() if path and (state := state_of(path))},
        "temperatures": args.temperature,
        **{name: vars(args)[name] for name in ("max_new_tokens", "limit", "repeats", "seed", "thinking")},
        "dtype": str(target.dtype).removeprefix("torch."),
        "attention": target.config._attn_implementation,
        "hardware": hardware,
        "versions": {"torch": version("torch"), "transformers": version("transformers")},
    }


def state_of(path: str) -> str | None:
    """Size and time of a file, or of a folder's configuration and weights; `None` for a Hub id."""
    place = Path(path)
    files = [place] if place.is_file() else [file for kind in MODEL_FILES for file in place.glob(kind)]
    if not files:
        return None
    stats = [file.stat() for file in files]
    newest = datetime.fromtimestamp(max(stat.st_mtime for stat in stats), UTC)
    return f"{sum(stat.st_size for stat in stats)} bytes of {newest.isoformat()}"


def measure(
    benchmark: Benchmark, units: Sequence[Unit], done: Sequence[Row], folder: ResultFolder, progress: bool = True
) -> list[Row]:
    """Run the units that are not done, written one by one, with a progress bar if it is wanted."""
    finished = {(row["suite"], row["prompt"], row["temperature"]) for row in done}
    missing = [(number, unit) for number, unit in enumerate(units) if unit.key not in finished]
    if missing:
        benchmark.warm_up(units)
    rows: list[Row] = []
    left = {"initial": len(units) - len(missing), "total": len(units)}
    with tqdm(**left, unit="prompt", file=sys.stderr, disable=not progress) as bar:
        for number, unit in missing:
            bar.set_description(unit.prompt.suite)
            made = benchmark.run(unit, number)
            folder.append(made)
            rows += made
            bar.update()
    return rows


def all_identical(summary: dict[str, Any]) -> bool:
    """Whether every greedy answer of every tree drafter is the plain one."""
    return all(
        method["identical"] is None or method["identical"]["same"] == method["identical"]["of"]
        for figures in summary["temperatures"]
        if figures["temperature"] == 0
        for method in figures["methods"]
        if method["kind"] != "transformers"
    )


class CommaSeparated(Extending):
    """Values with blanks or with commas between them, as one list."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        parts = [part.strip() for text in values for part in text.split(",") if part.strip()]
        super().__call__(parser, namespace, parts)


def named(text: str) -> tuple[str, str]:
    """`NAME=VALUE` as a pair."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def named_plan(text: str) -> tuple[str, DraftingPlan]:
    """`METHOD=NODES,FORWARDS[,STARTS]` as a pair."""
    name, value = named(text)
    return name, plan_of(value)


def plan_of(text: str) -> DraftingPlan:
    """`NODES,FORWARDS[,STARTS]`; 0 starts, or none given, are all."""
    try:
        nodes, forwards, *starts = map(int, text.split(","))
        if len(starts) > 1:
            raise ValueError(f"{len(starts)} numbers of starts")
        return DraftingPlan(nodes, forwards, (starts[0] or None) if starts else None)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not NODES,FORWARDS[,STARTS] ({error})") from error

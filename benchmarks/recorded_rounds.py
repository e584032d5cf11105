# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The plan that finds itself against fixed plans on recorded rounds, without a clock.

    python benchmarks/recorded_rounds.py --record --suites humaneval mtbench    # two minutes a suite
    python benchmarks/recorded_rounds.py                                        # seconds

Recorded is, at every token of an answer, what each way to draft would have drafted there and the target kept of it. So
any choice can be played, in the order of the text, and what another would have brought is known. Costs are those that
`auto_plan.py --costs` measured, at a pace that drifts as that of machines does: slow at first, from call to call by
3 %, from round to round by 2 %.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import mean
from typing import Any

import torch


sys.path.insert(0, str(Path(__file__).parent))
from auto_plan import DTYPES, PLANS, evenly, recorded_curves, recorded_offer  # noqa: E402

from specblock_hf import DraftingPlan, JoinedDrafter  # noqa: E402
from specblock_hf.calibration.costs import CostCurves, interpolate  # noqa: E402
from specblock_hf.cli.models import add_model_arguments, encode, load_models  # noqa: E402
from specblock_hf.data.suites import load_prompts  # noqa: E402
from specblock_hf.planning.controller import PlanController, Setting  # noqa: E402
from specblock_hf.planning.estimates import MULTIPLE  # noqa: E402
from specblock_hf.planning.offers import LOOKUPS, Choice, Offer, Round, Way  # noqa: E402
from specblock_hf.trees.paths import path_sums_on_host  # noqa: E402
from specblock_hf.trees.tree import DraftTree  # noqa: E402


WAYS = (Way(1), Way(2, 4), Way(2, 8), LOOKUPS)
MOST = 23
"""Nodes of a recorded tree; a smaller one is taken for its likeliest nodes, which is nearly so."""

LOOKUP_SECONDS, OWN_SECONDS = 0.001, 0.0003
"""What looking up takes, and what finding a plan does, of each round."""

CALLS_TO_LEARN = 2
Recorded = Mapping[str, Any]
"""Of a way at a token: log2 of the nodes' paths, ranks of those kept, tokens promised by look-ups, height."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.add_argument("--record", action="store_true", help="draft every way at every token, and nothing else")
    parser.add_argument("--suites", nargs="+", default=["humaneval", "mtbench"], help="default: %(default)s")
    parser.add_argument("--suite-file", type=Path, help="of a suite that has to be downloaded")
    parser.add_argument("--prompts", type=int, default=20, help="of each suite (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=12, help="of a machine's pace (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=Path, default=Path("recorded_rounds.json.gz"), help="the record (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    if args.record:
        record(args)
    else:
        with gzip.open(args.rounds, "rt") as file:
            suites = json.load(file)
        for suite, texts in suites.items():
            for dtype in DTYPES:
                print(f"{suite}, {dtype}: {compare(texts, recorded_curves(dtype), args.seeds)}")


class EveryWay(JoinedDrafter):
    """Drafts every way in every round, keeps the trees for itself and gives the root to be verified."""

    def __init__(self, *parts: Any):
        super().__init__(*parts)
        self.rounds: list[dict[str, tuple[DraftTree, float]]] = []

    def propose(self, state: Any, pairs: Any, limits: Any) -> DraftTree:
        trees = {}
        for way in WAYS if len(self.parts) > 1 else WAYS[:-1]:
            twin = copy.deepcopy(state, {id(state.table): state.table})
            asked = replace(
                limits,
                nodes=(MOST,),
                num_forwards=max(way.forwards, 1),
                max_starts=way.starts,
                enough_found=math.inf if way.forwards else 0.0,
            )
            trees[way.name] = super().propose(twin, pairs, asked), float(twin.promised)
        self.rounds.append(trees)
        super().propose(state, pairs, replace(limits, nodes=(1,)))
        return DraftTree.root(pairs.last_tokens())


def record(args: argparse.Namespace) -> None:
    """Answer the prompts token by token, and write what was drafted and kept."""
    target, tokenizer, drafter = load_models(args)
    parts = drafter.parts if isinstance(drafter, JoinedDrafter) else (drafter,)
    suites: dict[str, list[dict[str, Any]]] = {}
    options: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": args.temperature > 0}
    if args.temperature:
        options["temperature"] = args.temperature
    for suite in args.suites:
        for prompt in evenly(load_prompts(suite, args.suite_file), args.prompts):
            ids, every = encode(tokenizer, prompt.prompt, target.device), EveryWay(*parts)
            every.drafting_plan = DraftingPlan(MOST, 1)
            torch.manual_seed(0)
            output = target.generate(ids, attention_mask=torch.ones_like(ids), assistant_model=every, **options)
            emitted = output[0, ids.shape[1] :].tolist()
            suites.setdefault(suite, []).append({"tokens": len(emitted), "rounds": kept(every.rounds, emitted)})
        print(f"{suite}: {len(suites[suite])} texts")
    with gzip.open(args.rounds, "wt") as file:
        json.dump(suites, file)


def kept(rounds: Sequence[Mapping[str, tuple[DraftTree, float]]], emitted: Sequence[int]) -> list[dict[str, Recorded]]:
    """What the text that followed kept of the trees that were drafted at each of its tokens."""
    told = []
    for place, trees in enumerate(rounds, 1):
        following, ways = emitted[place:], {}
        for name, (tree, promised) in trees.items():
            tokens, parents, chances = (part[0].tolist() for part in (tree.tokens, tree.parents, tree.log_probs))
            sums, depths, right = path_sums_on_host(parents, chances), tree.depths()[0].tolist(), {0}
            for node, parent in enumerate(parents[1:], 1):
                if parent in right and following[depths[node] - 1 : depths[node]] == [tokens[node]]:
                    right.add(node)
            order = sorted((n for n, parent in enumerate(parents) if parent >= 0), key=lambda node: -sums[node])
            ways[name] = {
                "claims": [round(max(sums[node] / math.log(2), -100.0), 2) for node in order],
                "kept": [rank for rank, node in enumerate(order) if node in right],
                "promised": round(promised, 3),
                "height": tree.max_depth,
            }
        told.append(ways)
    if len(told) < len(emitted) - 1:  # with one token left nothing is drafted
        told.append({name: {"claims": [], "kept": [], "promised": 0.0, "height": 0} for name in told[-1]})
    return told


@dataclass
class Machine:
    """
    Plays choices on recorded texts.

    Args:
        texts (sequence): As [`record`] wrote them.
        curves ([`CostCurves`]): What rounds cost.
        offer ([`Offer`]): What the drafter can do.
        seed (`int`, *optional*): Of its pace; `None` for one that never changes.
    """

    texts: Sequence[Mapping[str, Any]]
    curves: CostCurves
    offer: Offer
    seed: int | None = None

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._rounds, self._call, self._cold = 0, 0.0, self._random.uniform(0.05, 0.15)

    def answer(self, text: int, pilot: Played | Finding) -> float:
        """Seconds of a text's rounds."""
        rounds, place, seconds = self.texts[text]["rounds"], 0, 0.0
        self._call = 0.5 * self._call + self._random.gauss(0, 0.025)
        while place < len(rounds):
            seen = self._play(pilot.next(), rounds[place], len(rounds) - place, place == 0)
            seconds, place = seconds + seen.draft + seen.rest, place + int(seen.emitted)
            pilot.observe(seen)
        return seconds

    def _play(self, choice: Choice, ways: Mapping[str, Recorded], left: int, first: bool) -> Round:
        pace, finds = self._pace(), self.offer.finds
        promised = ways[Way(1).name]["promised"] if finds else 0.0
        if not choice.nodes or left < 2:
            return Round(choice, [], 1, 1.0, False, promised, 0.0, pace * self.curves.plain, settled=not first)
        alone = finds and (promised >= choice.enough_found or choice.way == LOOKUPS)
        way = LOOKUPS if alone else choice.way if choice.way.name in ways else Way(2, 8)
        drafted, nodes = ways[way.name], choice.nodes
        if choice.min_probability:
            likely = sum(claim >= math.log2(choice.min_probability) for claim in drafted["claims"][:nodes])
            nodes = min(-(-(1 + likely) // MULTIPLE) * MULTIPLE - 1, nodes)
        row = [(claim, rank in drafted["kept"]) for rank, claim in enumerate(drafted["claims"][:nodes])]
        right = sum(is_kept for _, is_kept in row)
        draft, rest = LOOKUP_SECONDS * finds, self.curves.host + interpolate(self.curves.verify, 1 + len(row))
        if not alone:
            more = interpolate(self.curves.later or ((1, self.curves.draft),), way.starts or 8)
            draft += self.curves.draft + (way.forwards - 1) * more
        free = left > drafted["height"] + 1 and right < left - 1
        emitted = 1.0 + min(right, left - 1)
        return Round(
            choice, [row] if free else [], 1 + len(row), emitted, not alone, promised, pace * draft, pace * rest,
            settled=not first,
        )  # fmt: skip

    def _pace(self) -> float:
        if self.seed is None:
            return 1.0
        self._rounds += 1
        spike = 1.4 if self._random.random() < 0.01 else 1
        cold = 1 + self._cold * math.exp(-self._rounds / 70)
        return cold * math.exp(self._call) * spike * self._random.lognormvariate(0, 0.022)


class Played:
    """Choices that are known beforehand."""

    def __init__(self, choices: Iterable[Choice]):
        self.next = iter(choices).__next__

    def observe(self, seen: Round) -> None:
        """Nothing follows from it."""


class Finding:
    """Choices of a controller that begins with nothing learned."""

    def __init__(self, offer: Offer):
        self._controller, self._offer = PlanController(), offer
        self._setting = Setting("a target", "a machine", "float32")
        self.chosen: list[Choice] = []

    def begin(self) -> None:
        self.chosen = []
        self._controller.begin(self._setting)

    def next(self) -> Choice:
        self.chosen.append(self._controller.next(self._setting, self._offer))
        return self.chosen[-1]

    def observe(self, seen: Round) -> None:
        self._controller.observe(self._setting, self._offer, seen)


def compare(texts: Sequence[Mapping[str, Any]], curves: CostCurves, seeds: int) -> str:
    """The plan that finds itself over the best fixed plan, from the third text on, at a pace that does not count."""
    offer, later = recorded_offer(LOOKUPS.name in texts[0]["rounds"][0]), range(CALLS_TO_LEARN, len(texts))
    steady, seconds = Machine(texts, curves, offer), {}
    for name, plan in PLANS.items():
        choice = Choice(plan.tree_budget, Way(plan.num_forwards, plan.max_starts))
        seconds[name] = [steady.answer(text, Played(repeat(choice))) for text in range(len(texts))]
    best = min(seconds, key=lambda name: sum(seconds[name][text] / texts[text]["tokens"] for text in later))
    ratios = []
    for seed in range(seeds):
        machine, finding, found = Machine(texts, curves, offer, seed), Finding(offer), []
        for text in range(len(texts)):
            finding.begin()
            machine.answer(text, finding)
            found.append(steady.answer(text, Played(finding.chosen)) + OWN_SECONDS * len(finding.chosen))
        ratios.append(mean(seconds[best][text] / found[text] for text in later))
    return f"{mean(ratios):.3f} ({min(ratios):.3f} at worst) of {best}"


if __name__ == "__main__":
    main()

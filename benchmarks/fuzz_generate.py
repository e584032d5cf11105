# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Compare random calls of `generate()` with plain decoding, on tiny targets in fp32, and write down what became of them.

    python benchmarks/fuzz_generate.py --calls 10000 --workers 2
    python benchmarks/fuzz_generate.py --only 1234
    python benchmarks/fuzz_generate.py --targets recurrent multimodal --calls 2000
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import resource
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pprint import pprint
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar


SAVED_EVERY = 100  # calls, so that a run that was cut short has something to say
CHUNK = 10  # calls that a worker is given at a time
MEMORY = 12 * 2**30  # bytes that a worker may ask for: what wants more has lost its bound
KEPT_FAULTS, KEPT_SEEDS = 200, 10
SLOWEST = 10
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from calls_for_tests import judge  # noqa: E402
from cases_for_tests import Case  # noqa: E402
from draws_for_tests import KINDS, draw_case  # noqa: E402
from verdicts_for_tests import FAULTS  # noqa: E402


@dataclass
class Record:
    """
    The results so far, as they are written.

    Args:
        settings (`dict`): What the calls depend on; a run goes on only where these are the same.
        calls (`int`): Seeds that are done, from the first one on.
        seconds (`float`): Of the processes for all calls together, plain decoding included.
        drafted_tokens_kept (`int`): In all calls.
        outcomes (`Counter`): Calls by what became of them.
        draws (`Counter`): Calls by what was drawn.
        refusals (`Counter`): Calls by the sentence that refused them.
        plain_raises (`Counter`): Calls by what plain decoding raised.
        faults (`dict[str, list[int]]`): What was wrong, with the first seeds of each.
        slowest (`list[dict]`): Seconds and seeds.
    """

    settings: dict[str, Any]
    calls: int = 0
    seconds: float = 0.0
    drafted_tokens_kept: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    draws: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    plain_raises: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[int]] = field(default_factory=dict)
    slowest: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_faults(self) -> int:
        return sum(self.outcomes[outcome] for outcome in FAULTS)

    def add(self, seed: int, draws: list[str], outcome: str, detail: str, seconds: float, kept: int) -> None:
        self.calls += 1
        self.seconds = round(self.seconds + seconds, 3)
        self.drafted_tokens_kept += kept
        self.outcomes[outcome] += 1
        self.draws.update(draws)
        if outcome == "refused":
            self.refusals[detail] += 1
        elif outcome == "plain raises":
            self.plain_raises[detail] += 1
        elif outcome in FAULTS and len(self.faults) < KEPT_FAULTS:
            seeds = self.faults.setdefault(f"{outcome}: {detail}", [])
            seeds += [seed] * (len(seeds) < KEPT_SEEDS)
        self.slowest.append({"seed": seed, "seconds": round(seconds, 2)})
        self.slowest = sorted(self.slowest, key=lambda call: -call["seconds"])[:SLOWEST]

    def save(self, path: Path) -> None:
        values = {
            name: dict(sorted(value.items())) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        written = path.with_suffix(".part")
        written.write_text(json.dumps(values, indent=2) + "\n")
        written.replace(path)

    @classmethod
    def load(cls, path: Path) -> Record:
        values = json.loads(path.read_text())
        for name in ("outcomes", "draws", "refusals", "plain_raises"):
            values[name] = Counter(values[name])
        return cls(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--calls", type=int, default=10000, help="seeds to draw calls from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--only", type=int, metavar="SEED", help="print what this seed draws and run it alone")
    parser.add_argument(
        "--targets", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of targets to draw (default: all)"
    )
    parser.add_argument("--attached", action="store_true", help="attach the drafters instead of naming them")
    parser.add_argument("--resume", action="store_true", help="go on where the run that wrote --output was cut short")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_generate.json")
    arguments = parser.parse_args()
    prepare()
    if arguments.only is not None:
        case = drawn(arguments.only, arguments.targets, arguments.attached)
        pprint(case, width=119)
        pprint(judge(case), width=119)
        return
    settings = {
        "seed": arguments.seed,
        "targets": arguments.targets,
        "attached": arguments.attached,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    record = Record(settings)
    if arguments.resume:
        record = Record.load(arguments.output)
        if record.settings != settings:
            parser.error(f"{arguments.output} was made with {record.settings} and not with {settings}")
    run(record, arguments)
    print(f"{record.calls} calls, {record.num_faults} faults, written to {arguments.output}")
    sys.exit(record.num_faults > 0)


def run(record: Record, arguments: argparse.Namespace) -> None:
    """Judge the calls that are left, in the order of their seeds, and write the record as they come in."""
    seeds = range(arguments.seed + record.calls, arguments.seed + arguments.calls)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(arguments.workers, initializer=prepare) as pool,
        tqdm(total=arguments.calls, initial=record.calls, unit="call", smoothing=0.05) as progress,
    ):
        judged = partial(judge_seed, targets=arguments.targets, attached=arguments.attached)
        for result in pool.imap(judged, seeds, chunksize=CHUNK):
            record.add(*result)
            progress.update()
            progress.set_postfix(faults=record.num_faults, refresh=False)
            if record.calls % SAVED_EVERY == 0:
                record.save(arguments.output)
    record.save(arguments.output)


def prepare() -> None:
    """Of every process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()  # what is said of services that are out of order
    disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def drawn(seed: int, targets: list[str], attached: bool) -> Case:
    case = draw_case(seed, targets)
    return replace(case, entry="attached") if attached else case


def judge_seed(seed: int, targets: list[str], attached: bool) -> tuple[int, list[str], str, str, float, int]:
    case = drawn(seed, targets, attached)
    verdict = judge(case)
    return seed, case.draws(), verdict.outcome, verdict.detail, verdict.seconds, verdict.kept


if __name__ == "__main__":
    main()

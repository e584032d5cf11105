# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
How should an update of a serving drafter train, and which part of it? One stream, explanations of docstrings of the
standard library, is answered once; then every way to learn from it is replayed on the recorded texts. Before it may
learn from an answer, the drafter in service drafts a chain with one forward at every place of it: tokens a round, on
texts that it has not seen. Defaults of `UpdateSettings` and of the bandit's exploration were chosen on this stream;
`adaptation.py` reports on another one.

    python benchmarks/adaptation_settings.py

Results are written down way by way and a run that was interrupted goes on with the way that it was in.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import sysconfig
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from specblock_hf import AutoDrafter, DraftingPlan
from specblock_hf.adaptation import DrafterUpdater, OnlineAdaptationCallback, UpdateSettings
from specblock_hf.adaptation.windows import Window, WindowBuffer
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.models import ask, encode, load_target


RESULTS = Path(__file__).parent / "results"
REQUEST = "Explain the following text to a child."
BUFFER_BYTES = 64 * 2**20  # as in OnlineAdaptationCallback
STRETCH = 40  # queries of a point of the reported curve

Scope = Literal["head", "full"]


@dataclass(frozen=True)
class Way:
    """
    A way to learn.

    Args:
        every (`int`): Queries from an update to the next.
        scopes (`tuple[str, ...]`): What the updates train, in turns.
        most (`int`, *optional*): Updates in all.
        settings (`dict[str, Any]`): Fields of `UpdateSettings` other than the defaults.
    """

    every: int = 8
    scopes: tuple[Scope, ...] = ("full",)
    most: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def scope(self, query: int) -> Scope | None:
        """What an update after this query trains, if there is one."""
        number, rest = divmod(query + 1, self.every)
        if rest or (self.most is not None and number > self.most):
            return None
        return self.scopes[(number - 1) % len(self.scopes)]


LARGE = {"averaging": 0.0, "batch_tokens": 1024}
WAYS = {
    "never": Way(most=0),
    "always": Way(),
    "always, large steps without an average": Way(settings=LARGE),
    "always, large steps without an average, half the rate": Way(settings=LARGE | {"learning_rate": 1e-4}),
    "28 of everything": Way(every=5, most=28),
    "14 of everything, 14 of the heads": Way(every=5, scopes=("full", "head"), most=28),
    "14 of everything": Way(every=10, most=14),
}


def docstrings() -> list[str]:
    """Paragraphs of 35 to 90 words of the standard library's docstrings, in a fixed order."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = set()
    for path in library.rglob("*.py"):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                for part in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(part.split())
                    if 35 <= len(text.split()) <= 90 and ">>>" not in text:
                        texts.add(text)
    chosen = sorted(texts)
    random.Random(0).shuffle(chosen)
    return chosen


def record(args: argparse.Namespace) -> list[Window]:
    """The stream's answers as the target saw them, one window each."""
    path = Path(args.state) / f"{args.queries}-answers-of-{args.max_new_tokens}-tokens.pt"
    if path.exists():
        return [Window(*parts) for parts in torch.load(path, weights_only=True)]
    target, tokenizer = load_target(args.target, torch.bfloat16)
    drafter = AutoDrafter.from_pretrained(args.drafter, dtype="auto").eval()
    drafter.drafting_plan = DraftingPlan(12, 2, 4)
    # Records every call and never gets to an update.
    callback = OnlineAdaptationCallback("always", every=args.queries + 1, buffer_bytes=2**40)
    drafter.add_callback(callback)
    for text in tqdm(docstrings()[: args.queries], desc="answers"):
        prompt_ids = encode(tokenizer, f"{REQUEST}\n\n{text}", target.device)
        ask(target, None, prompt_ids, drafter, False, do_sample=False, max_new_tokens=args.max_new_tokens)
    windows = callback.buffer.newest(args.queries)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save([(w.tokens, w.embeds, w.features, w.top_ids, w.top_probs) for w in windows], partial)
    os.replace(partial, path)
    return windows


def replay(way: Way, windows: list[Window], drafter_path: str) -> dict[str, Any]:
    """Serve the recorded stream with a drafter that learns in one way."""
    drafter = AutoDrafter.from_pretrained(drafter_path, dtype="auto").eval()
    settings = UpdateSettings(objective=drafter.objective_class(num_blocks=1), autocast=True, **way.settings)
    updater, buffer = DrafterUpdater(drafter, settings), WindowBuffer(BUFFER_BYTES)
    taus: list[float] = []
    updates: list[Scope] = []
    seconds = 0.0
    for query, window in enumerate(windows):
        taus.append(updater.tokens_a_round(updater.deployed, [window]))
        buffer.add(window)
        scope = way.scope(query)
        if scope is not None:
            began = time.perf_counter()
            updater.train(scope, updater.draw(buffer))
            updater.publish()
            seconds += time.perf_counter() - began
            updates.append(scope)
    return {
        "updates": {scope: updates.count(scope) for scope in ("full", "head")},
        "tokens_a_round": round(sum(taus) / len(taus), 4),
        "curve": [
            round(sum(part) / len(part), 3)
            for part in (taus[first : first + STRETCH] for first in range(0, len(taus), STRETCH))
        ],
        "update_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--drafter", default=str(find_default_drafter()))
    parser.add_argument("--queries", type=int, default=160, help="default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS / "adaptation_settings.json")
    parser.add_argument(
        "--state", default="runs/adaptation_settings", help="folder for the recorded answers (default: %(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = {
        "request": REQUEST,
        "drafter": Path(args.drafter).name,
        "dtype": "bfloat16",
        "queries": args.queries,
        "max_new_tokens": args.max_new_tokens,
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    report: dict[str, Any] = setting | {"ways": {}}
    if args.output.exists():
        report = json.loads(args.output.read_text())
        if {name: report.get(name) for name in setting} != setting:
            parser.error(f"{args.output} holds results of another setting; give another --output, or remove it.")
    windows = record(args)
    for name in tqdm(args.ways, desc="ways"):
        if name in report["ways"]:
            continue
        report["ways"][name] = replay(WAYS[name], windows, args.drafter)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

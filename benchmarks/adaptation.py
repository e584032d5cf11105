# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Traffic that the drafter was not trained for: does it pay to let it learn while it serves? A stream of questions about
paragraphs of the Python reference manual, answered greedily with a drafter that never learns, one that is updated
every 8 queries, and one that the bandit updates when that is expected to pay. Each policy has a drafter of its own;
they take turns, so that a machine that slows down favours none, and each turn waits for its last update, whose time it
pays.

    python benchmarks/adaptation.py
    python benchmarks/adaptation.py --identity 40 --dtype float32 --output benchmarks/results/adaptation_identity.json

Queries are written down turn by turn and a run that was interrupted goes on with the turn that it was in; what was
learned is kept in --state. Decoding has one thread by default, so that an update finds a core of its own on a machine
with two, as it finds room on a GPU; otherwise it takes its time from the answers. Constants were tuned on other
streams: with --task explain, on other paragraphs, and with `adaptation_settings.py`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tqdm.auto import tqdm

from specblock_hf import AutoDrafter, DraftingPlan
from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.demo import describe_setting
from specblock_hf.cli.models import ask, encode, load_target


RESULTS = Path(__file__).parent / "results"
POLICIES = ("never", "always", "bandit")
TUNING_TASK = "explain"
TUNING_PARAGRAPHS = 96
TASKS = {
    TUNING_TASK: "Explain the following text to a child.",
    "quiz": "Write three quiz questions about the following text.",
    "french": "Translate the following text into French.",
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WINDOW = 20  # queries over which the plot takes the mean


def paragraphs(task: str) -> list[str]:
    """Paragraphs of 35 to 90 words in a fixed order; the tuning task has the first ones for itself."""
    texts = {" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")}
    chosen = sorted(text for text in texts if 35 <= len(text.split()) <= 90)
    random.Random(0).shuffle(chosen)
    return chosen[:TUNING_PARAGRAPHS] if task == TUNING_TASK else chosen[TUNING_PARAGRAPHS:]


class Service:
    """
    One policy with a drafter of its own.

    Args:
        policy (`str`): Of its callback.
        args (`argparse.Namespace`): The command line.
        target ([`~transformers.PreTrainedModel`]): Shared with the other services.
    """

    def __init__(self, policy: str, args: argparse.Namespace, target):
        self.policy = policy
        self.target = target
        self.drafter = AutoDrafter.from_pretrained(args.drafter, dtype="auto").eval().to(target.device)
        self.drafter.drafting_plan = DraftingPlan(*args.plan)
        self.clock = CLOCKS[args.clock]
        settings = replace(args.settings, objective=self.drafter.objective_class(**args.objective))
        self.callback = OnlineAdaptationCallback(policy, settings=settings, clock=self.clock)
        self.drafter.add_callback(self.callback)
        self.state = Path(args.state) / f"{args.task}-{policy}.pt"
        if self.state.exists() and policy != "never" and not args.identity:
            self.callback.load_state(self.state)

    def answer(self, query: int, prompt_ids: torch.LongTensor, tokens: int) -> dict[str, Any]:
        """One query's figures."""
        events = len(self.callback.events)
        began = self.clock()
        answer = ask(self.target, None, prompt_ids, self.drafter, False, do_sample=False, max_new_tokens=tokens)
        used = self.clock() - began
        statistics = answer.statistics
        row = {
            "policy": self.policy,
            "query": query,
            "tokens": answer.new_tokens,
            "rounds": len(statistics.accepted),
            "accepted": sum(statistics.accepted),
            "seconds": round(answer.seconds, 4),
            "clock_seconds": round(used, 4),
            "events": [vars(event) for event in list(self.callback.events)[events:]],
        }
        if self.policy != "never":
            row["decision"] = self.callback.decisions[-1].to_dict()
        return row | {"ids": answer.ids}

    def rest(self, last: dict[str, Any]) -> None:
        """Let the last update of a turn finish, on this policy's account, and keep what was learned."""
        if self.policy == "never":
            return
        events, began, used = len(self.callback.events), time.perf_counter(), self.clock()
        self.callback.wait()
        last["seconds"] = round(last["seconds"] + time.perf_counter() - began, 4)
        last["clock_seconds"] = round(last["clock_seconds"] + self.clock() - used, 4)
        last["events"] += [vars(event) for event in list(self.callback.events)[events:]]
        self.state.parent.mkdir(parents=True, exist_ok=True)
        self.callback.save_state(self.state)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="default: the default target")
    parser.add_argument("--drafter", default=str(find_default_drafter()))
    parser.add_argument("--task", choices=TASKS, default="quiz", help="default: %(default)s")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--queries", type=int, default=300, help="default: %(default)s")
    parser.add_argument("--turn", type=int, default=20, help="queries until the next policy's turn")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--plan", type=int, nargs=3, default=(12, 2, 4), metavar=("NODES", "FORWARDS", "STARTS"))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads that decode, of the cores; updates have one more of their own",
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="what rewards the bandit; cpu counts every core's work and ignores other programs",
    )
    parser.add_argument("--learning-rate", type=float, default=UpdateSettings.learning_rate)
    parser.add_argument("--steps", type=int, default=UpdateSettings.steps, help="of an update")
    parser.add_argument(
        "--objective",
        type=json.loads,
        default={"num_blocks": 1},
        metavar="JSON",
        help="fields of the drafter's objective (default: %(default)s)",
    )
    parser.add_argument("--identity", type=int, metavar="N", help="compare the first N texts with plain generate()")
    parser.add_argument("--output", type=Path, default=RESULTS / "adaptation.json", help="and .jsonl, .png beside it")
    parser.add_argument(
        "--state", default="runs/adaptation", help="folder for what was learned (default: %(default)s)"
    )
    args = parser.parse_args()
    args.settings = UpdateSettings(
        learning_rate=args.learning_rate, steps=args.steps, autocast=args.dtype == "bfloat16"
    )
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    target = target.to(args.device)
    prompts = [f"{TASKS[args.task]}\n\n{text}" for text in paragraphs(args.task)]
    if args.identity:
        return check_identity(args, target, tokenizer, prompts)
    lines = args.output.with_suffix(".jsonl")
    rows = read_turns(lines, args)
    queries = min(args.queries, len(prompts))
    services = {policy: Service(policy, args, target) for policy in args.policies}
    turns = [
        (policy, range(first, min(first + args.turn, queries)))
        for number, first in enumerate(range(0, queries, args.turn))
        for policy in args.policies[number % len(args.policies) :] + args.policies[: number % len(args.policies)]
    ]
    done = {(row["policy"], row["query"]) for row in rows}
    for policy, turn in tqdm(turns, desc="turns"):
        if (policy, turn[-1]) in done:
            continue
        new = []
        for query in turn:
            row = services[policy].answer(query, encode(tokenizer, prompts[query], target.device), args.max_new_tokens)
            row.pop("ids")
            new.append(row)
        services[policy].rest(new[-1])
        with lines.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        rows += new
        report(args, target, rows)


def read_turns(lines: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of whole turns so far, of the policies that are asked for."""
    if not lines.exists():
        lines.parent.mkdir(parents=True, exist_ok=True)
        return []
    return [row for row in map(json.loads, lines.read_text().splitlines()) if row["policy"] in args.policies]


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one policy."""
    rounds, tokens = sum(row["rounds"] for row in rows), sum(row["tokens"] for row in rows)
    late = rows[len(rows) * 2 // 3 :]
    events = [event for row in rows for event in row["events"]]
    updates = [event for event in events if event["kind"] == "updated"]
    return {
        "queries": len(rows),
        "tokens": tokens,
        "tau": round(1 + sum(row["accepted"] for row in rows) / rounds, 4),
        "tau_of_the_last_third": round(
            1 + sum(row["accepted"] for row in late) / max(sum(row["rounds"] for row in late), 1), 4
        ),
        "tokens_per_second": round(tokens / sum(row["seconds"] for row in rows), 3),
        "tokens_per_clock_second": round(tokens / sum(row["clock_seconds"] for row in rows), 3),
        "updates": {scope: sum(event["scope"] == scope for event in updates) for scope in ("head", "full")},
        "update_seconds": round(sum(event["seconds"] for event in updates), 1),
        "rollbacks": sum(event["kind"] == "rolled back" for event in events),
        "failures": sum(event["kind"] == "failed" for event in events),
    }


def report(args: argparse.Namespace, target, rows: list[dict[str, Any]]) -> None:
    """Write the summary and the plot, over the queries that all policies have answered."""
    by_policy = {policy: [row for row in rows if row["policy"] == policy] for policy in args.policies}
    answered = min(len(mine) for mine in by_policy.values())
    if not answered:
        return
    names = ("learning_rate", "steps", "batch_tokens", "averaging", "drift_weight")
    settings = {name: getattr(args.settings, name) for name in names}
    result = {
        "task": TASKS[args.task],
        "drafter": Path(args.drafter).name,
        "machine": describe_setting(target),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "dtype": args.dtype,
        "max_new_tokens": args.max_new_tokens,
        "plan": list(args.plan),
        "clock": args.clock,
        "settings": settings | {"objective": args.objective},
        "policies": {policy: summarise(mine[:answered]) for policy, mine in by_policy.items()},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    plot({policy: mine[:answered] for policy, mine in by_policy.items()}, args.output.with_suffix(".png"))


def plot(by_policy: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """tau over the queries, the mean of the last queries, with a tick for every update."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for policy, rows in by_policy.items():
        recent = [rows[max(0, end - WINDOW) : end] for end in range(1, len(rows) + 1)]
        taus = [1 + sum(r["accepted"] for r in part) / sum(r["rounds"] for r in part) for part in recent]
        line = axes.plot(range(1, len(rows) + 1), taus, label=policy)[0]
        updated = [row["query"] for row in rows if any(event["kind"] == "updated" for event in row["events"])]
        axes.plot([query + 1 for query in updated], [taus[query] for query in updated], "|", color=line.get_color())
    axes.set(xlabel="query", ylabel=f"tau, mean of {WINDOW} queries")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def check_identity(args: argparse.Namespace, target, tokenizer, prompts: list[str]) -> None:
    """Are the texts of a drafter that is updated every 8 queries those of plain `generate()`?"""
    service, identical = Service("always", args, target), 0
    for query in tqdm(range(args.identity), desc="queries"):
        prompt_ids = encode(tokenizer, prompts[query], target.device)
        plain = ask(target, tokenizer, prompt_ids, None, False, do_sample=False, max_new_tokens=args.max_new_tokens)
        if query + 1 == args.identity:
            service.callback.wait()  # so that the count of updates is that of the whole run
        identical += torch.equal(service.answer(query, prompt_ids, args.max_new_tokens)["ids"], plain.ids)
        result = {
            "dtype": args.dtype,
            "max_new_tokens": args.max_new_tokens,
            "queries": query + 1,
            "identical": identical,
            "updates": service.callback.updates,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{identical} of {args.identity} texts are those of plain generate(), with {result['updates']} updates")


if __name__ == "__main__":
    main()

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
A service whose drafter learns from the verifier: a stream of questions of one kind, a line for every answer with tau,
tokens per second and what was decided, and in the end a plot of tau with the updates marked.

    python examples/serve_with_adaptation.py --queries 100 --plot adaptation.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from pydoc_data.topics import topics

from specblock_hf import SpecBlockDrafter
from specblock_hf.adaptation import OnlineAdaptationCallback, UpdateSettings
from specblock_hf.cli.default_target import find_default_drafter, load_default_target
from specblock_hf.drafters.specblock.loss import SpecBlockObjective


def questions() -> list[str]:
    """One kind of question about the paragraphs of the Python reference manual, in a fixed order."""
    texts = sorted({" ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")})
    chosen = [text for text in texts if 35 <= len(text.split()) <= 90]
    random.Random(0).shuffle(chosen)
    return [f"Write three quiz questions about the following text.\n\n{text}" for text in chosen]


def plot(taus: list[float], updated: list[int], path: Path, window: int = 20) -> None:
    """The mean tau of the last queries, with a mark for every query that triggered an update."""
    from matplotlib import pyplot

    means = [sum(taus[max(0, end - window) : end]) / min(end, window) for end in range(1, len(taus) + 1)]
    pyplot.plot(means)
    pyplot.plot(updated, [means[query] for query in updated], "k|", label="update")
    pyplot.xlabel("query")
    pyplot.ylabel(f"tau, mean of {window} queries")
    pyplot.legend()
    pyplot.savefig(path)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--queries", type=int, default=100)
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--policy", choices=["bandit", "always", "never"], default="bandit")
parser.add_argument("--plot", type=Path, help="PNG file")
parser.add_argument("--save", type=Path, help="folder for the adapted drafter")
args = parser.parse_args()

target, tokenizer = load_default_target()
drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype="auto")
# An update learns from the first block alone, which costs less.
settings = UpdateSettings(objective=SpecBlockObjective(num_blocks=1))
adaptation = OnlineAdaptationCallback(args.policy, settings=settings)
drafter.add_callback(adaptation)

taus: list[float] = []
updated: list[int] = []
for number, question in enumerate(questions()[: args.queries]):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    target.generate(**inputs, assistant_model=drafter, max_new_tokens=args.max_new_tokens, do_sample=False)
    statistics = drafter.last_statistics
    line = f"{number:4d}  tau {statistics.tau:.2f}  {statistics.tokens_per_second:5.1f} tokens/s"
    if args.policy != "never":
        decision = adaptation.decisions[-1]
        line += f"  signal {decision.signal:5.2f}  {decision.action} ({decision.reason})"
        if decision.reward is not None:
            line += f", the last {decision.rewarded} update changed the throughput by {decision.reward:+.1%}"
        if decision.action != "skip":
            updated.append(number)
    print(line)
    taus.append(statistics.tau)

drafter.remove_callback(adaptation)  # lets an update that is under way finish
if args.plot:
    plot(taus, updated, args.plot)
if args.save:
    drafter.save_pretrained(args.save)

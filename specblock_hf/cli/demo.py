# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock demo`: six fixed prompts, answered without and with the drafter, and an honest comparison of the two."""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import dataclass

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.calibrate import Calibration, calibrate
from ..drafting.drafter import TreeDrafter
from ..drafting.statistics import GenerationStatistics
from ..evaluation.divergence import Divergence, divergence_between
from ..evaluation.trace import trace_round
from .models import Answer, add_model_arguments, ask, encode, load_models


FIRST_TOKENS = 16
"""Of an answer of which the first tree is shown."""

PROMPTS = (
    (
        "code",
        "Complete this Python function.\n\n"
        "def longest_plateau(heights: list[int]) -> int:\n"
        '    """Return the length of the longest run of equal neighbours in heights.\n'
        "    >>> longest_plateau([3, 3, 5, 5, 5, 2])\n    3\n"
        '    >>> longest_plateau([])\n    0\n    """\n',
    ),
    (
        "chat",
        "My neighbour is away and I look after her tomato plants for two weeks in July. Write me a short list of what "
        "to check every morning, with one reason for each point.",
    ),
    (
        "arithmetic",
        "A ferry carries 36 cars on each crossing and makes 7 crossings a day. On Sunday it makes 2 crossings fewer. "
        "How many cars can it carry from Saturday morning to Sunday evening? Explain step by step.",
    ),
    (
        "code",
        "Complete this Python function.\n\n"
        "def initials(names: list[str]) -> dict[str, list[str]]:\n"
        '    """Group names by their upper-case first letter, skipping empty ones.\n'
        "    >>> initials(['ada', 'Alan', '', 'grace'])\n"
        "    {'A': ['ada', 'Alan'], 'G': ['grace']}\n    \"\"\"\n",
    ),
    (
        "chat",
        "Compare travelling by night train and by plane for a trip between two European capitals. Which would you "
        "recommend to someone who gets tired easily, and why?",
    ),
    (
        "arithmetic",
        "Nora bakes 5 trays of 18 rolls. She keeps 12 rolls for her family, gives a third of the remaining ones to a "
        "school and sells the others for 2 euros each. How much money does she take in? Explain step by step.",
    ),
)
"""(category, prompt); written for this demo, so that no drafter was trained on them."""

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Comparison:
    """
    One prompt, answered both ways.

    Args:
        category (`str`): Kind of prompt.
        plain (`Answer`): Without the drafter.
        drafted (`Answer`): With it.
        divergence ([`Divergence`], *optional*): `None` if both answers are the same, token for token.
    """

    category: str
    plain: Answer
    drafted: Answer
    divergence: Divergence | None

    @property
    def speedup(self) -> float:
        return self.drafted.tokens_per_second / self.plain.tokens_per_second


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add_model_arguments(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="for each answer (default: %(default)s)")
    parser.add_argument(
        "--prompts", nargs="+", action="extend", metavar="TEXT", help="prompts of your own instead of the six"
    )


def run(args: argparse.Namespace) -> int:
    """
    Answer all prompts and print the comparison.

    Returns:
        `int`: 1 if an answer differs in fp32, where it never may; 0 otherwise.
    """
    start = time.perf_counter()
    prompts = [("yours", text) for text in args.prompts] if args.prompts else PROMPTS
    target, tokenizer, drafter = load_models(args)
    print(describe_setting(target))
    settings = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    warm_up(target, tokenizer, drafter, prompts[0][1])
    if not args.plan:
        figures = calibrate(target, drafter, progress=not args.quiet)
        print(describe_calibration(figures, drafter.acceptance_measured))
    comparisons = []
    for number, (category, text) in enumerate(prompts):
        print(f"\n=== {number + 1}/{len(prompts)} {category}: {text}\n")
        comparisons.append(compare(target, tokenizer, drafter, category, text, number % 2 == 1, settings))
    tree = first_tree(target, tokenizer, drafter, encode(tokenizer, prompts[0][1], target.device))
    print(f"\n=== first draft tree of prompt 1\n{tree}")
    print("\n=== result\n" + "\n".join(report(comparisons)))
    print(f"wall time of the command: {time.perf_counter() - start:.0f} s")
    identical = all(comparison.divergence is None for comparison in comparisons)
    return int(target.dtype == torch.float32 and not identical)


def warm_up(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: TreeDrafter, prompt: str) -> None:
    """Answer a few tokens both ways, unprinted, so that first-call costs fall on neither."""
    prompt_ids = encode(tokenizer, prompt, target.device)
    for helper in (None, drafter):
        ask(target, tokenizer, prompt_ids, helper, stream=False, do_sample=False, max_new_tokens=WARM_UP_TOKENS)


def compare(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafter: TreeDrafter,
    category: str,
    prompt: str,
    drafter_first: bool,
    settings: dict,
) -> Comparison:
    """
    Stream the answer to one prompt both ways.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        drafter ([`TreeDrafter`]): The drafter.
        category (`str`): Kind of prompt.
        prompt (`str`): What to ask.
        drafter_first (`bool`): The order, alternated by the caller so that a machine that slows down favours neither.
        settings (`dict`): For both `generate()` calls.
    """
    prompt_ids = encode(tokenizer, prompt, target.device)
    answers = {}
    for with_drafter in (drafter_first, not drafter_first):
        print("--- with the drafter" if with_drafter else "--- plain generate()")
        answers[with_drafter] = ask(target, tokenizer, prompt_ids, drafter if with_drafter else None, **settings)
    plain, drafted = answers[False], answers[True]
    divergence = divergence_between(target, prompt_ids, plain.ids, drafted.ids, **settings)
    comparison = Comparison(category, plain, drafted, divergence)
    print(
        f"--- plain {plain.tokens_per_second:.1f} tokens/s, with the drafter {drafted.tokens_per_second:.1f} tokens/s "
        f"({comparison.speedup:.2f}x), tau {comparison.drafted.statistics.tau:.2f}, identical: {divergence is None}"
    )
    return comparison


def describe_setting(target: PreTrainedModel) -> str:
    """One line that makes the figures below it comparable with others."""
    device = (
        torch.cuda.get_device_name(target.device)
        if target.device.type == "cuda"
        else f"{torch.get_num_threads()} CPU thread(s)"
    )
    return (
        f"{target.name_or_path} in {str(target.dtype).removeprefix('torch.')} on {device}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def describe_calibration(calibration: Calibration, measured: bool = True) -> str:
    """The chosen plan, what it should bring, by a measured acceptance or not, and how well the measurements agree."""
    plan, spread = calibration.plan, f"measurements spread by {calibration.spread:.0%}"
    if plan.tree_budget == 0:
        return f"calibrated: no tree pays here, so generate() drafts nothing but a try now and then ({spread})"
    assumed = "" if measured else ", if it accepts what is usual: its checkpoint records nothing"
    starts = "" if plan.num_forwards == 1 else f" from up to {plan.max_starts or 'all'} starts"
    return (
        f"calibrated: {plan.tree_budget} drafted nodes, {plan.num_forwards} drafter forward(s) a round{starts}; "
        f"expected speedup {calibration.speedup:.2f}{assumed} ({spread})"
    )


def first_tree(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: TreeDrafter, prompt_ids: torch.LongTensor
) -> str:
    """The first tree of an answer as text, the accepted path marked; one line if there is none."""
    try:
        traced = trace_round(target, drafter, prompt_ids, do_sample=False, max_new_tokens=FIRST_TOKENS)
    except ValueError as error:
        return f"({error})"
    number = len(traced.accepted) - 1
    kept = f"(probability by the drafter; origin as drafter forward and slot; * = kept, {number} drafted)"
    return f"{kept}\n{traced.tree.to_text(tokenizer, accepted=traced.accepted)}"


def report(comparisons: list[Comparison]) -> list[str]:
    """
    The comparison in a few lines: speed, accepted length, where the time went, and whether the texts are the same.

    Args:
        comparisons (`list[Comparison]`): One for each prompt.
    """
    speedup = statistics.geometric_mean(comparison.speedup for comparison in comparisons)
    pooled = pool([comparison.drafted.statistics for comparison in comparisons])
    rounds = pooled.draft_seconds + pooled.verify_seconds + pooled.host_seconds or float("nan")
    lines = [
        f"plain {total_rate([c.plain for c in comparisons]):.1f} tokens/s, with the drafter "
        f"{total_rate([c.drafted for c in comparisons]):.1f} tokens/s",
        f"speedup: {speedup:.2f} (geometric mean of {len(comparisons)} prompts)"
        + (", slower than plain generate() here" if speedup < 1 else ""),
        f"tau: {pooled.tau:.2f} tokens a round ({pooled.tau_uncut:.2f} over rounds that nothing cut short)",
        f"time of a round: draft {pooled.draft_seconds / rounds:.0%}, verify {pooled.verify_seconds / rounds:.0%}, "
        f"host {pooled.host_seconds / rounds:.0%}",
    ]
    diverging = [(number, c.divergence) for number, c in enumerate(comparisons, 1) if c.divergence is not None]
    if diverging:
        lines.append(f"{len(diverging)} of {len(comparisons)} answers diverge:")
        lines += [f"  prompt {number}: {describe_divergence(divergence)}" for number, divergence in diverging]
    lines.append(f"identical: {not diverging}")
    return lines


def pool(parts: list[GenerationStatistics]) -> GenerationStatistics:
    """Several calls as if they were one; without a first round."""
    pooled = GenerationStatistics()
    for part in parts:
        for name in ("rounds", "emitted", "accepted", "cut", "draft_seconds", "verify_seconds", "host_seconds"):
            vars(pooled)[name] += vars(part)[name]
    return pooled


def total_rate(answers: list[Answer]) -> float:
    """Tokens per second over several answers together."""
    return sum(answer.new_tokens for answer in answers) / sum(answer.seconds for answer in answers)


def describe_divergence(divergence: Divergence) -> str:
    """One line; a small margin means that rounding decided between two tokens that nearly tie."""
    margin = "no margin, as plain had ended"
    if divergence.margin is not None:
        margin = f"top-2 margin there {divergence.margin:.3f}"
    tokens = f"plain {divergence.plain_token}, drafted {divergence.drafted_token}"
    return f"first at new token {divergence.position} ({tokens}; {margin})"

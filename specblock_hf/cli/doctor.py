# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock doctor`: does this drafter, or the one that is found, fit this target, and does it pay here?"""

from __future__ import annotations

import argparse
import sys

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.calibrate import calibrate
from ..checkpoints.files import DrafterFiles
from ..data.template import PromptStyle
from ..drafters.find import Candidate, find_drafters
from ..drafters.known import known_drafter
from ..drafters.layouts import layout_of
from ..drafting.drafter import TreeDrafter
from ..drafting.plan import DraftingPlan
from ..drafting.statistics import GenerationStatistics
from ..generation.hook import is_installed
from .demo import PROMPTS, describe_calibration, describe_setting, warm_up
from .models import add_model_arguments, ask, encode, load_models


PASTE = """
from specblock_hf import AutoDrafter{names}
drafter = AutoDrafter.from_pretrained("{name}", target=target, dtype=target.dtype){joined}
output = target.generate(**inputs, assistant_model=drafter)"""

WITH_LOOKUPS = {
    "names": ", JoinedDrafter, LookupDrafter",
    "joined": "\ndrafter = JoinedDrafter(drafter, LookupDrafter(target.config))",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add_model_arguments(parser, positional=("target", "drafter"))
    parser.add_argument(
        "--static-cache", action="store_true", help='as calls with cache_implementation="static" are, on both sides'
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="to time on (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """
    Print what was checked and the verdict.

    Returns:
        `int`: 0 if the drafter is worth using here, 1 if not.
    """
    found = find_for(args)
    target, tokenizer, drafter = load_models(args)
    if args.static_cache:
        target.generation_config.cache_implementation = "static"
    print(describe_setting(target))
    print(f"hook in generate(): {'installed' if is_installed() else 'missing; call specblock_hf.install()'}")
    print(f"compatible: yes ({describe_reading(target, drafter)})")
    if advice := _style(found, drafter).advice(tokenizer):
        print(advice)
    try:
        speedup, drafts = measure(args, target, tokenizer, drafter)
    except KeyboardInterrupt:
        print("interrupted before there was a verdict; what is said above holds", file=sys.stderr)
        raise
    if found is not None:
        print(PASTE.format(name=found.name, **WITH_LOOKUPS if args.lookup else dict.fromkeys(WITH_LOOKUPS, "")))
    return int(speedup <= 1 or not drafts)


def measure(
    args: argparse.Namespace, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: TreeDrafter
) -> tuple[float, bool]:
    """
    Time answers without and with the drafter, and say each figure as soon as it is known.

    Returns:
        `tuple[float, bool]`: Tokens per second with the drafter over those without, and whether rounds may draft.
    """
    prompt = PROMPTS[1][1]
    warm_up(target, tokenizer, drafter, prompt)
    if not args.plan:
        calibrated = calibrate(target, drafter, progress=not args.quiet)
        print(describe_calibration(calibrated, drafter.acceptance_measured), flush=True)
    prompt_ids = encode(tokenizer, prompt, target.device)
    settings = {"stream": False, "do_sample": False, "max_new_tokens": args.max_new_tokens}
    if target.device.type == "cuda":
        # What is captured is captured in the first answers of some length, a second a size.
        for _ in range(2):
            ask(target, tokenizer, prompt_ids, drafter, **settings)
    plain = ask(target, tokenizer, prompt_ids, **settings)
    step = plain.seconds / plain.new_tokens
    print(f"one plain step: {1000 * step:.1f} ms", flush=True)
    drafted = ask(target, tokenizer, prompt_ids, drafter, **settings)
    figures, speedup = drafted.statistics, drafted.tokens_per_second / plain.tokens_per_second
    plan = drafter.drafting_plan
    drafts = not isinstance(plan, DraftingPlan) or plan.tree_budget > 0
    print(f"plan in effect: {figures.plan}")
    if target.device.type == "cpu":
        print(f"prepacked weights: {'yes' if figures.prepacked else 'no'}")
    print("\n".join(diagnose(step, figures, speedup, drafts)))
    return speedup, drafts


def find_for(args: argparse.Namespace) -> Candidate | None:
    """
    The drafter that there is for the target that the command line names alone, as if it named that, too.

    Raises:
        ValueError: There is none, or what is named is a drafter itself.
    """
    if not args.target or args.drafter:
        return None
    try:
        found = find_drafters(args.target).best()
    except ValueError as error:
        if not _is_drafter(args.target):
            raise
        raise ValueError(
            f"{args.target} is a drafter; name the target first: specblock doctor TARGET {args.target}."
        ) from error
    args.drafter = found.name
    print(f"found: {found.name} ({found.kind}, layout {found.layout}, for {found.trained_for})")
    return found


def _is_drafter(name: str) -> bool:
    try:
        layout_of(DrafterFiles.of(name, {}).config, name)
    except ValueError:
        return False
    return True


def _style(found: Candidate | None, drafter: TreeDrafter) -> PromptStyle:
    if found is not None:
        return found.prompt_style
    known = known_drafter(drafter.config.name_or_path)
    return PromptStyle.recorded(drafter.config.to_dict(), known.thinking if known else None)


def describe_reading(target: PreTrainedModel, drafter: TreeDrafter) -> str:
    """What a drafter reads of this target, those layers too that its checkpoint does not record."""
    layers, depth = drafter.network.feature_layers_for(target), target.config.get_text_config().num_hidden_layers
    names = {0: "the embedding", depth: "the final norm"}
    states = [names.get(layer, f"layer {layer}") for layer in layers]
    return f"{drafter.label} reads what leaves {', '.join(states) or 'no layer'} of the target's {depth} layers"


def diagnose(step: float, figures: GenerationStatistics, speedup: float, drafts: bool = True) -> list[str]:
    """
    What a round costs, what it yields, and the verdict.

    Args:
        step (`float`): Seconds of plain decoding for one token.
        figures ([`GenerationStatistics`]): Of a call with the drafter.
        speedup (`float`): Tokens per second with the drafter over those without.
        drafts (`bool`, *optional*, defaults to `True`):
            Rounds may draft; if calibration has found that nothing pays, a difference is noise.

    Returns:
        `list[str]`: The lines to print.
    """
    if not drafts:
        return ["use it here? no, generate() is as fast without it"]
    if not figures.rounds:
        return ["no round was timed because the answer ended at once; give a larger --max-new-tokens"]
    parts = [
        seconds / figures.rounds for seconds in (figures.draft_seconds, figures.verify_seconds, figures.host_seconds)
    ]
    draft, verify, host = (1000 * seconds for seconds in parts)
    even = sum(parts) / step
    verdict = (
        f"yes, about {speedup:.2f}x" if speedup > 1 else f"no, {speedup:.2f}x is not faster than plain generate()"
    )
    return [
        f"one round: {draft + verify + host:.1f} ms (draft {draft:.1f}, verify {verify:.1f}, host {host:.1f}; "
        f"{figures.nodes_verified / figures.rounds:.0f} nodes)",
        f"a round yields {figures.tau:.2f} tokens and costs as much as {even:.2f} plain steps",
        f"use it here? {verdict}",
    ]

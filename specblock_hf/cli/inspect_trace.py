# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock inspect --trace`: the draft tree of a round, as text and picture, one drafter's beside another's."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.saving import save_text_whole
from ..drafters.auto import AutoDrafter
from ..drafters.joined import JoinedDrafter
from ..drafters.lookup import LookupDrafter
from ..drafting.drafter import TreeDrafter
from ..drafting.plan import DraftingPlan
from ..evaluation.trace import TracedRound, trace_round, trace_there
from ..evaluation.trace_page import trace_page
from ..trees.picture import TreePanel, check_format, save_trees
from .bench import plan_of
from .demo import PROMPTS
from .models import add_device, add_dtype, add_thinking, dtype_named, encode, load_target, tell_thinking


def add_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that only a trace has."""
    add = group.add_argument
    add("--against", metavar="DRAFTER", help="folder or Hub id of another drafter, traced at the same place")
    add("--prompt", default=PROMPTS[0][1], help="what to ask (default: the first one of `specblock demo`)")
    add("--round", type=int, default=1, help="whose tree to draw (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="of the answer (default: %(default)s)")
    add(
        "--plan",
        type=plan_of,
        nargs="+",
        action="extend",
        default=[],
        metavar="NODES,FORWARDS[,STARTS]",
        help="how much a round drafts; a second one is the other drafter's (default: each one's own)",
    )
    add("--lookup", action="store_true", help="add continuations found in the text so far to the trees")
    add_thinking(group)
    add_dtype(group)
    add_device(group)
    add("--html", metavar="FILE", help="write a page that steps through the rounds of the answer")
    add(
        "--picture",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="draw the trees too: .svg or .png",
    )


def run(args: argparse.Namespace) -> int:
    """Print the trees and draw the pictures that are asked for."""
    for picture in args.picture:
        check_format(picture)
    target, tokenizer = load_target(args.target, dtype_named(args.dtype))
    tell_thinking(tokenizer, args.thinking)
    target = target.eval().to(args.device)
    names = [args.drafter] + ([args.against] if args.against else [])
    if len(args.plan) > len(names):
        raise ValueError(f"there are {len(args.plan)} plans for {len(names)} drafter(s); give one for each, or fewer.")
    plans: list[DraftingPlan | None] = [*args.plan, *[None] * (len(names) - len(args.plan))]
    revisions = [args.revision, None]
    settings = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    panels: list[TreePanel] = []
    first: TracedRound | None = None
    for name, plan, revision in zip(names, plans, revisions, strict=False):
        drafter: TreeDrafter = AutoDrafter.from_pretrained(name, target=target, revision=revision, dtype="auto").eval()
        if args.lookup:
            drafter = JoinedDrafter(drafter, LookupDrafter(target.config))
        drafter.drafting_plan = plan
        if first is None:
            prompt_ids = encode(tokenizer, args.prompt, target.device)
            first = traced = trace_round(target, drafter, prompt_ids, args.round, **settings)
        else:
            traced = trace_there(target, drafter, first, **settings)
        if args.html and not panels:
            page = trace_page(target, tokenizer, drafter, prompt_ids, f"{drafter.label}, {name}", **settings)
            Path(args.html).parent.mkdir(parents=True, exist_ok=True)
            save_text_whole(args.html, page)
        panels.append(TreePanel(f"{drafter.label}, {name}", traced.tree, traced.accepted))
        print(f"{'' if len(panels) == 1 else chr(10)}{describe(drafter, name, traced, tokenizer)}")
    if args.html:
        print(f"written: {args.html}")
    for picture in args.picture:
        save_trees(picture, panels, tokenizer)
        print(f"drawn: {picture}")
    return 0


def describe(drafter: TreeDrafter, name: str, traced: TracedRound, tokenizer) -> str:
    """A traced tree as text under a line that counts it, and the tokens that the round emitted."""
    tree = traced.tree
    forwards = len({forward for forward, _ in tree.origin[0].tolist() if forward >= 0})
    emitted = [token for token in traced.walk.tokens[0].tolist() if token >= 0]
    return (
        f"{drafter.label}, {name}: {int(tree.num_nodes[0]) - 1} drafted by {forwards} forward(s), "
        f"{len(traced.accepted) - 1} accepted\n"
        "(probability by the drafter; origin as drafter forward and slot; * = kept)\n"
        f"{tree.to_text(tokenizer, accepted=traced.accepted)}\n"
        f"emitted: {tokenizer.decode(emitted)!r}"
    )

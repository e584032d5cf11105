# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What `specblock find` says without a target: the package's list, as `docs/models.md` has it."""

from __future__ import annotations

from itertools import groupby

from ..drafters.common.registry import published_layouts
from ..drafters.known import KnownDrafter, known_drafters, layouts_tested


_INTRODUCTION = """\
# Drafters that are known

Made by `specblock find > docs/models.md` from `specblock_hf/drafters/known.json`. `specblock find TARGET` and
`AutoDrafter.find(target)` look in this list and on the Hub, for the target and for what it was made from, and judge
every drafter by its `config.json` before anything large is downloaded.

Whether a drafter fits was not tried with the weights of these repositories: "tested" says how the reader of its layout
is tested here. Golden tensors are the authors' own, in the tests. In a golden run, small drafters that a project's
code made and saved said and drafted the same in its code and here (`benchmarks/goldens.py`, differences in
`benchmarks/results/goldens.json`). Where the layout is empty, only its `config.json` will tell. Figures are their
authors', under conditions and in a count of their own, and do not compare with each other. A drafter that was trained
on answers without thinking guesses badly where the target thinks, and the other way round: `specblock doctor` and
`specblock find` compare it with the tokenizer."""


def describe_list() -> str:
    """The list of known drafters in Markdown."""
    known = sorted(known_drafters(), key=lambda drafter: drafter.target.split("/")[0].lower())
    parts = [_INTRODUCTION, _layouts()]
    for owner, drafters in groupby(known, key=lambda drafter: drafter.target.split("/")[0]):
        rows = [
            f"## {owner}",
            "",
            "| Target | Drafter | Layout | Tested | Thinking | Stated | Listed by |",
            "|---|---|---|---|---|---|---|",
            *(_row(drafter) for drafter in drafters),
        ]
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _row(drafter: KnownDrafter) -> str:
    tested = layouts_tested().get(drafter.layout, "config only") if drafter.kind else "cannot be run"
    thinking = {None: "", True: "yes", False: "no"}[drafter.thinking]
    stated = drafter.acceptance
    figure = f"{stated.tau:g} tokens a round: {stated.setting} ({stated.source}, {stated.date})" if stated else ""
    name = drafter.target.split("/")[1]
    cells = (name, f"`{drafter.id}`", drafter.layout, tested, thinking, figure, drafter.source)
    return f"| {' | '.join(cells)} |"


def _layouts() -> str:
    layouts = {name: layout for name, (_, layout) in published_layouts().items()}
    unread = [name for name, layout in layouts.items() if not layout.is_readable and not layout.is_known_by_little]
    read = [name for name in layouts_tested() if name in layouts]
    written = [name for name in read if layouts[name].is_writable]
    return (
        f"Layouts that are read: {', '.join(read)}.\nOf these `specblock convert` writes: {', '.join(written)}.\n"
        f"Known by name alone: {', '.join(unread)}."
    )

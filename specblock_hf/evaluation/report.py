# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The figures of a benchmark as Markdown, with a table in the paper's form for each temperature."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


NOTHING = "–"

_NOTES = """\
Spd: tokens per second over those of plain `generate()` (`vanilla`), prompt by prompt, as the geometric mean; below 1
is slower. In brackets: 95 % bootstrap interval over prompts. The mean weighs every suite the same. tau: tokens emitted
per forward of the target that verifies. Draft share: the drafter's share of draft + verify + host. A drafter reads
the prompt in its first round, which `draft` contains."""

_ACCEPTANCE = """\
Share of rounds that kept a drafted token at each position, given that they kept the one before; in brackets, of all
rounds that the end of the answer did not cut."""


def markdown(summary: Mapping[str, Any]) -> str:
    """
    Args:
        summary (mapping): From [`summarise`].

    Returns:
        `str`: The whole report.
    """
    parts = ["# Side by side", _setting(summary), _NOTES]
    for figures in summary["temperatures"]:
        parts.append(f"## Temperature {figures['temperature']:g}")
        parts.append(main_table(figures))
        if any(method["round"] for method in figures["methods"]):
            parts += ["### What a round costs", rounds_table(figures)]
            parts += ["### Acceptance by position", _ACCEPTANCE, acceptance_table(figures)]
        if any(method["identical"] for method in figures["methods"]):
            parts += ["### The same text as plain decoding", identity_table(figures)]
    return "\n\n".join(parts) + "\n"


def main_table(figures: Mapping[str, Any]) -> str:
    """Speed and accepted length by suite, their mean, and the draft share."""
    suites = figures["suites"]
    header = ["method", *(f"{suite} {what}" for suite in suites for what in ("Spd", "tau"))]
    rows = []
    for method in figures["methods"]:
        cells = [method["method"]]
        for suite in suites:
            cells += [_speed(method["suites"][suite]), _number(method["suites"][suite]["tau"])]
        share = method["round"]["draft_share"] if method["round"] else None
        cells += [_speed(method["mean"]), _number(method["mean"]["tau"]), _number(share, "{:.0%}")]
        rows.append([*cells, f"{method['tokens_per_second']:.1f}"])
    return _table([*header, "mean Spd", "mean tau", "draft share", "tokens/s"], rows)


def rounds_table(figures: Mapping[str, Any]) -> str:
    """Times, forwards, rows and nodes of a round, and its drafting beside EAGLE-3's."""
    header = ["method", "plan", "T_draft", "T_verify", "T_host", "ms a token", "draft forwards", "draft rows", "nodes"]
    against = any(method["to_eagle3"] for method in figures["methods"])
    rows = []
    for method in figures["methods"]:
        cost = method["round"]
        if cost is None:
            continue
        times = [f"{cost[name]:.1f} ms" for name in ("draft_ms", "verify_ms", "host_ms")]
        counts = [_number(cost[name], "{:.1f}") for name in ("forwards", "rows", "nodes")]
        cells = [method["method"], describe_plan(method["plan"]), *times, f"{cost['ms_per_token']:.1f}", *counts]
        if against:
            ratios = method["to_eagle3"]
            cells += [_number(ratios.get(name)) for name in ("draft_ms", "draft_share", "rows")]
        rows.append(cells)
    more = ["T_draft / EAGLE-3", "draft share / EAGLE-3", "draft rows / EAGLE-3"] if against else []
    return _table(header + more, rows)


def acceptance_table(figures: Mapping[str, Any]) -> str:
    """Chance of every position, given the one before and, in brackets, from the root."""
    methods = [method for method in figures["methods"] if method["acceptance"]]
    deepest = max((len(method["acceptance"]) for method in methods), default=0)
    rows = []
    for method in methods:
        cells = [f"{at['given_before']:.2f} ({at['reached']:.2f})" for at in method["acceptance"]]
        rows.append([method["method"], *cells, *[NOTHING] * (deepest - len(cells))])
    return _table(["method", *map(str, range(1, deepest + 1))], rows)


def identity_table(figures: Mapping[str, Any]) -> str:
    """How many answers are the plain ones, and how close plain decoding's choice was where one is not."""
    rows = []
    for method in figures["methods"]:
        found = method["identical"]
        if found is None:
            continue
        margins = found["margins"]
        middle = _number(statistics.median(margins) if margins else None, "{:.3f}")
        largest = _number(max(margins, default=None), "{:.3f}")
        rate = f"{1 - found['same'] / found['of']:.0%}"
        rows.append([method["method"], f"{found['same']} of {found['of']}", rate, middle, largest])
    return _table(["method", "identical", "diverging", "median top-2 margin there", "largest"], rows)


def describe_plan(plan: Sequence[int | None] | None) -> str:
    """A drafting plan in a few words."""
    if plan is None:
        return NOTHING
    nodes, forwards, starts = plan
    if nodes == 0:
        return "no drafts (none pays)"
    if forwards == 1:
        return f"{nodes} nodes, 1 forward"
    return f"{nodes} nodes, {forwards} forwards, {starts or 'all'} starts"


def _setting(summary: Mapping[str, Any]) -> str:
    conditions = summary["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    prompts = conditions["limit"] or "all"
    lines = [
        f"{conditions['target']} in {conditions['dtype']} on {conditions['hardware']}; {versions}.",
        f"{prompts} prompts of each suite, at most {conditions['max_new_tokens']} new tokens, "
        f"median of {conditions['repeats']} run(s); {summary['answers']} answers, "
        f"{summary['answer_seconds'] / 60:.1f} minutes of decoding.",
    ]
    for name, note in summary["plans"].items():
        expected = f", {note['expected_speedup']:.2f}x expected" if "expected_speedup" in note else ""
        lines.append(f"- plan of {name}: {describe_plan(note['plan'])} ({note['from']}{expected})")
    return "\n".join(lines[:2]) + ("\n\n" + "\n".join(lines[2:]) if lines[2:] else "")


def _speed(figures: Mapping[str, float]) -> str:
    if figures["low"] == figures["high"]:
        return f"{figures['speedup']:.2f}"
    return f"{figures['speedup']:.2f} ({figures['low']:.2f}-{figures['high']:.2f})"


def _number(value: float | None, form: str = "{:.2f}") -> str:
    render: Callable[[float], str] = form.format
    return NOTHING if value is None else render(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

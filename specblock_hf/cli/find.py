# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock find`: which drafters there are for a target, and which of them fit."""

from __future__ import annotations

import argparse
import textwrap

from transformers import AutoTokenizer

from ..data.template import PromptStyle
from ..drafters.find import Candidate, Findings, find_drafters
from .find_list import describe_list


_HEADINGS = ("", "drafter", "kind", "layout", "size", "downloads", "stated acceptance")
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument(
        "target", nargs="?", help="folder or Hub id; only its config.json is read (default: print the package's list)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the target")
    parser.add_argument("--offline", action="store_true", help="ask nobody: only the cache and the package's list")


def run(args: argparse.Namespace) -> int:
    """
    Print what was found and the line that loads the best.

    Returns:
        `int`: 0 if a drafter fits, otherwise 1.
    """
    if args.target is None:
        print(describe_list(), end="")
        return 0
    findings = find_drafters(args.target, revision=args.revision, local_files_only=args.offline)
    print("\n".join(describe_findings(findings)))
    if not (findings.candidates and findings.candidates[0].fits):
        return 1
    advice = _advice(findings.best(), args)
    if advice:
        print("\n".join(_wrapped(advice)))
    return 0


def _advice(best: Candidate, args: argparse.Namespace) -> str | None:
    """Whether prompts of the target's tokenizer are those that the drafter was trained behind."""
    if best.prompt_style == PromptStyle():  # nobody says
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            args.target, revision=args.revision, local_files_only=args.offline, trust_remote_code=False
        )
    except (ValueError, OSError):
        return "The target's tokenizer cannot be had, so its chat template was not compared with the drafter's."
    return best.prompt_style.advice(tokenizer)


def describe_findings(findings: Findings) -> list[str]:
    """
    Args:
        findings ([`Findings`]): From [`find_drafters`].

    Returns:
        `list[str]`: A table of all candidates, why some do not fit, and what to do.
    """
    lines = []
    if findings.candidates:
        rows = [_HEADINGS, *map(_cells, findings.candidates)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
    reasons = [f"{one.name}: {one.misfit}" for one in findings.candidates if one.misfit]
    lines += [line for text in (*reasons, *findings.notes) for line in _wrapped(text)]
    try:
        best = findings.best()
    except ValueError as error:
        way_out = "No drafter fits; LookupDrafter(target.config) needs no training."
        return [*lines, way_out if findings.candidates else str(error)]
    return [*lines, f'drafter = AutoDrafter.from_pretrained("{best.name}", target=target)']


def _cells(one: Candidate) -> tuple[str, ...]:
    stated = one.known and one.known.acceptance
    return (
        "fits" if one.fits else "no",
        one.name,
        one.kind or "-",
        one.layout or "-",
        f"{one.listed.size / 1e6:,.1f} MB" if one.listed and one.listed.size else "-",
        f"{one.listed.downloads:,}" if one.listed else "-",
        f"{stated.tau:g} tokens a round ({stated.setting}; {stated.source}, {stated.date})" if stated else "-",
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False)

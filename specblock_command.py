# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
The `specblock` command as it is installed, beside the package because whoever imports anything of that imports
transformers, which takes seconds: help and version are said at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.metadata import version


COMMANDS = {
    "demo": ("specblock_hf.cli.demo", "answer six prompts with and without a drafter, and compare"),
    "find": ("specblock_hf.cli.find", "list the drafters that there are for a target, and which of them fit"),
    "doctor": ("specblock_hf.cli.doctor", "check a target and a drafter, and whether using them pays on this machine"),
    "regenerate": ("specblock_hf.cli.regenerate", "write a target's answers to prompts, to train a drafter on"),
    "train": ("specblock_hf.cli.train", "train a drafter on the target's own answers"),
    "generate": ("specblock_hf.cli.generate", "stream the answer to one prompt"),
    "play": ("specblock_hf.cli.play", "answer prompts on a page in the browser, without and with a drafter"),
    "bench": ("specblock_hf.cli.bench", "time drafters and transformers' own helpers side by side"),
    "inspect": ("specblock_hf.cli.inspect", "say what a drafter is and whether it fits a target"),
    "convert": ("specblock_hf.cli.convert", "write a drafter in another layout"),
    "push": ("specblock_hf.cli.push", "upload a drafter with its card to the Hub"),
}
"""Subcommand to (module, one line of help)."""


def command_line(
    commands: Mapping[str, tuple[str, str]], version: str
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command's parser, and those of its subcommands, without options yet."""
    parser = argparse.ArgumentParser(prog="specblock", description="SpecBlock drafters for transformers' generate().")
    parser.add_argument("--version", action="version", version=f"specblock_hf {version}")
    adding = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    subcommands = {
        name: adding.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        for name, (_, summary) in commands.items()
    }
    for subcommand in subcommands.values():
        subcommand.add_argument("--quiet", action="store_true", help="show no progress bars")
    return parser, subcommands


def main() -> int:
    """Run the command of this process; returns its exit status."""
    if not sys.argv[1:] or sys.argv[1] in ("-h", "--help", "--version"):
        command_line(COMMANDS, version("specblock_hf"))[0].parse_args()
    from specblock_hf import cli

    return cli.main()


__all__ = ["COMMANDS", "command_line", "main"]

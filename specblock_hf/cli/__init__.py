# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The `specblock` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`, imported on use.

`run` returns the exit status, or `None` for 0. A `ValueError`, `OSError` or `ImportError` that leaves it ends the
command with its message alone, because that is what the library raises for bad input; the rest keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module


COMMANDS = {
    "demo": ("specblock_hf.cli.demo", "answer six prompts with and without a drafter, and compare"),
    "doctor": ("specblock_hf.cli.doctor", "check a target and a drafter, and whether using them pays on this machine"),
    "regenerate": ("specblock_hf.cli.regenerate", "write a target's answers to prompts, to train a drafter on"),
    "train": ("specblock_hf.cli.train", "train a drafter on the target's own answers"),
    "generate": ("specblock_hf.cli.generate", "stream the answer to one prompt"),
    "bench": ("specblock_hf.cli.bench", "time drafters and transformers' own helpers side by side"),
    "inspect": ("specblock_hf.cli.inspect", "say what a drafter is and whether it fits a target"),
    "convert": ("specblock_hf.cli.convert", "write a drafter in another layout"),
    "push": ("specblock_hf.cli.push", "upload a drafter with its card to the Hub"),
}
"""Subcommand to (module, one line of help)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one subcommand.

    Args:
        arguments (`Sequence[str]`, *optional*):
            The command line without the program's name; defaults to this process's.

    Returns:
        `int`: The exit status.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="specblock", description="SpecBlock drafters for transformers' generate().")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name in arguments[:1]:
            module = import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"specblock {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

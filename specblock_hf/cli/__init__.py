# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The `specblock` command. A subcommand is a module with `add_arguments(parser)` and `run(args)`, imported on use.

`run` returns the exit status, or `None` for 0. A `ValueError`, `OSError` or `ImportError` that leaves it ends the
command with its message alone, because that is what the library raises for bad input, and a full device in what to
lower; the rest keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import torch

from specblock_command import COMMANDS, command_line

from ..version import __version__
from .bars import without_bars


LOWER = {
    "train": "lower --batch-tokens, --max-length or --eval-examples",
    "regenerate": "lower --batch-tokens or --batch-size",
}
"""What makes a subcommand need less of a device's memory."""
LOWER_ELSEWHERE = "give --dtype bfloat16 or another --device"


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
    parser, commands = command_line(COMMANDS, __version__)
    for name in commands.keys() & set(arguments[:1]):
        module = import_module(COMMANDS[name][0])
        module.add_arguments(commands[name])
        commands[name].set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        with without_bars(args.quiet):  # of loading and writing weights, which say nothing of how long a command takes
            return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"specblock {args.command}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        words = LOWER.get(args.command, LOWER_ELSEWHERE)
        print(f"specblock {args.command}: the device's memory is full; {words}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What wrote a drafter's folder: versions, commit and subcommand, in words that may be published with it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any


PACKAGES = ("specblock_hf", "transformers", "torch", "huggingface_hub", "safetensors")
_ONE_VALUE = (
    *("target", "data", "drafter", "init-from", "draft-vocab-size", "views", "eval-examples", "output", "epochs"),
    *("batch-tokens", "learning-rate", "warmup-ratio", "max-grad-norm", "held-out", "max-length", "log-steps"),
    *("save-steps", "eval-steps", "mixed-precision", "gradient-accumulation", "seed", "max-seconds", "optimizer"),
)
_SEVERAL = {"greedy-only": 0, "cpu": 0, "betas": 2, "config": None, "objective": None, "eval-budgets": None}
RECORDED: Mapping[str, Mapping[str, int | None]] = {
    "train": dict.fromkeys(_ONE_VALUE, 1) | _SEVERAL,
    "convert": {"to": 1, "target": 1},
}
"""Subcommands that write drafters, and what is recorded of them: options and how many values follow (`None`: some)."""
_NUMBERS = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?|true|false|null|\[[-+\d., e]*\]", re.IGNORECASE)


def provenance() -> dict[str, Any]:
    """The versions, the commit of this package (if it runs from a checkout) and the subcommand that wrote a folder."""
    return {"versions": _versions(), "commit": _commit(), "command": recorded_command(sys.argv)}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # it runs from a folder and is not installed
            continue
    return found


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return head.stdout.strip() or None


def recorded_command(arguments: Sequence[str]) -> str | None:
    """
    A command line as it may be published: the subcommand and its options that are known to hold numbers, choices and
    names of files. Of a path the last component stays; what is not known to be harmless is left out, and so is the
    command of any other program.

    Args:
        arguments (sequence of `str`): As in `sys.argv`.
    """
    program = PurePath(arguments[0])
    is_ours = program.stem == "specblock" or (program.name == "__main__.py" and program.parent.name == "specblock_hf")
    if not is_ours or len(arguments) < 2 or arguments[1] not in RECORDED:
        return None
    known, words, left = RECORDED[arguments[1]], ["specblock", arguments[1]], 0
    for argument in arguments[2:]:
        if argument.startswith("--"):
            name, given, value = argument[2:].partition("=")
            left = 0
            if name in known:
                words.append(f"--{name}")
                left = sys.maxsize if known[name] is None else known[name]
            values = [value] if given else []
        else:
            values = [argument]
        for value in values[:left]:
            words.append(published(value))
            left -= 1
    return shlex.join(words)


def published(value: str) -> str:
    """A number as it is, of a path or name its last component, of a `NAME=VALUE` the name unless the value is one."""
    name, given, number = value.partition("=")
    if given:
        return value if _NUMBERS.fullmatch(number) else name
    # Both kinds of separators, whatever this system's are.
    return PureWindowsPath(value).name or os.curdir


def published_setting(value: Any) -> Any:
    """A setting of a run as it may be published: of every text in it what [`published`] leaves, lists as a text."""
    if isinstance(value, list | tuple):
        return " ".join(published(part) if isinstance(part, str) else str(part) for part in value)
    return published(value) if isinstance(value, str) else value

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Dataclasses on a command line: an option for every field, or `NAME=VALUE` for the fields of any one of them. And what
commands ask of their options.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_type_hints


def add_fields(parser: argparse.ArgumentParser, kind: type, required: str) -> None:
    """
    Add an option for every field of a dataclass.

    Args:
        parser (`argparse.ArgumentParser`): Of a subcommand.
        kind (`type`): The dataclass; fields are numbers, strings, or lists or tuples of them.
        required (`str`): The field without a default, a folder.
    """
    hints, says = get_type_hints(kind), descriptions(kind)
    for field in dataclasses.fields(kind):
        words = says.get(field.name, "").replace("%", "%%")
        text = f"{words} (default: %(default)s)".lstrip()
        name, hint = "--" + field.name.replace("_", "-").removesuffix("-dir"), hints[field.name]
        if field.name == required:
            parser.add_argument(name, dest=field.name, required=True, help=words)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            parser.add_argument(name, type=get_args(hint)[0], nargs="+", action=Extending, default=default, help=text)
        elif isinstance(field.default, tuple):
            parser.add_argument(name, type=float, nargs=len(field.default), default=field.default, help=text)
        else:
            parser.add_argument(name, type=hint, default=field.default, help=text)


class Extending(argparse.Action):
    """As argparse's `extend`, but the option's first occurrence replaces the default."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        former = vars(namespace)[self.dest]
        setattr(namespace, self.dest, [*([] if former is self.default else former), *values])


def given(args: argparse.Namespace, add_arguments: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Which of the options that a function adds have other values than their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name in defaults if vars(args)[name] != defaults[name]]


def refuse_below_one(args: argparse.Namespace, *names: str) -> None:
    """
    Raises:
        ValueError: One of these options is given and below 1.
    """
    for name in names:
        value = vars(args)[name]
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; give 1 or more.")


def descriptions(kind: type) -> dict[str, str]:
    """What the docstring of a class says of each argument, in the Hugging Face format."""
    _, _, listing = inspect.cleandoc(kind.__doc__).partition("Args:\n")
    entries = re.finditer(r"^    (\w+) \(.*?\):\s(.*?)(?=^    \w|^\S|\Z)", listing, re.MULTILINE | re.DOTALL)
    return {entry[1]: " ".join(entry[2].split()).removesuffix(".") for entry in entries}


def read_pairs(pairs: Sequence[str], known: Sequence[str], option: str) -> dict[str, Any]:
    """
    Read `NAME=VALUE` pairs; values are JSON, and strings where they are not.

    Args:
        pairs (`Sequence[str]`): As they came on the command line.
        known (`Sequence[str]`): Names that may be given.
        option (`str`): What they are called there, for the message.

    Raises:
        ValueError: A pair has no `=`, or a name is not known.
    """
    found = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or name not in known:
            raise ValueError(
                f"{option} got {pair!r}; give NAME=VALUE with one of these names: {', '.join(known) or '(none)'}."
            )
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found

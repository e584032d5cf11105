# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Options from dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field

import pytest

from specblock_hf.cli.options import add_fields, descriptions, given, read_pairs
from specblock_hf.training.arguments import DrafterTrainingArguments


@dataclass
class Fields:
    """
    Of a run.

    Args:
        output_dir (`str`): Where to.
        batch_tokens (`int`, *optional*, defaults to 4): Tokens, 5 % of which are padding.
        learning_rate (`float`, *optional*, defaults to 0.5):
            Peak rate: what
            one climbs to.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`): Of AdamW.
        report_to (`list[str]`, *optional*): Trackers.

    Raises:
        ValueError: Never.
    """

    output_dir: str
    batch_tokens: int = 4
    learning_rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.95)
    eval_budgets: list[int] = field(default_factory=lambda: [8, 16])
    report_to: list[str] = field(default_factory=list)


def parse(*arguments: str) -> Fields:
    parser = argparse.ArgumentParser()
    add_fields(parser, Fields, "output_dir")
    return Fields(**vars(parser.parse_args(arguments)))


def test_every_field_is_an_option():
    assert parse("--output", "x") == Fields("x")
    arguments = ("--batch-tokens", "7", "--learning-rate", "1e-3", "--betas", "0.5", "0.6", "--eval-budgets", "3")
    found = parse("--output", "x", *arguments, "--report-to", "a", "b")
    assert found == Fields("x", 7, 1e-3, [0.5, 0.6], [3], ["a", "b"])


def test_a_list_may_come_in_parts():
    """The first of which replaces the default, and none changes it."""
    parts = ("--eval-budgets", "3", "4", "--report-to", "a", "--eval-budgets", "5", "--report-to", "b", "c")
    found = parse("--output", "x", *parts)
    assert found.eval_budgets == [3, 4, 5] and found.report_to == ["a", "b", "c"]
    parser = argparse.ArgumentParser()
    add_fields(parser, Fields, "output_dir")
    for _ in range(2):
        assert parser.parse_args(["--output", "x", "--report-to", "a"]).report_to == ["a"]
        assert parser.parse_args(["--output", "x"]).report_to == []


def test_which_options_are_given():
    def add_arguments(parser) -> None:
        parser.add_argument("--a-number", type=int, default=3)
        parser.add_argument("--said", action=argparse.BooleanOptionalAction)
        parser.add_argument("--listed", nargs="+", default=[])

    parser = argparse.ArgumentParser()
    parser.add_argument("--other")
    add_arguments(parser)
    for line, options in (
        ("--other x --a-number 3", []),
        ("--a-number 4", ["--a-number"]),
        ("--no-said --listed a", ["--said", "--listed"]),
    ):
        assert given(parser.parse_args(line.split()), add_arguments) == options


def test_help_says_what_the_docstring_says():
    parser = argparse.ArgumentParser()
    add_fields(parser, Fields, "output_dir")
    help = " ".join(parser.format_help().split())
    for words in (
        "--output OUTPUT_DIR Where to",
        "Tokens, 5 % of which are padding (default: 4)",
        "Peak rate: what one climbs to (default: 0.5)",
        "Of AdamW (default: (0.9, 0.95))",
        "Trackers (default: [])",
        "EVAL_BUDGETS ...] (default: [8, 16])",
    ):
        assert words in help
    assert descriptions(Fields).keys() == {"output_dir", "batch_tokens", "learning_rate", "betas", "report_to"}


def test_every_option_of_training_says_what_it_is():
    described = descriptions(DrafterTrainingArguments)
    assert described.keys() == {field.name for field in dataclasses.fields(DrafterTrainingArguments)}
    assert all(described.values())


def test_the_folder_must_be_named(capsys):
    with pytest.raises(SystemExit):
        parse()
    assert "--output" in capsys.readouterr().err


def test_pairs_are_json_or_strings():
    known = ["count", "share", "flag", "kind", "widths"]
    pairs = ["count=3", "share=0.5", "flag=false", "kind=release", "widths=[1, 2]"]
    expected = {"count": 3, "share": 0.5, "flag": False, "kind": "release", "widths": [1, 2]}
    assert read_pairs(pairs, known, "--objective") == expected


@pytest.mark.parametrize("pair", ["count", "other=3", "=3"])
def test_other_pairs_are_refused_with_the_names(pair):
    with pytest.raises(ValueError, match=r"--objective got '.*'; give NAME=VALUE .* names: count, share"):
        read_pairs([pair], ["count", "share"], "--objective")

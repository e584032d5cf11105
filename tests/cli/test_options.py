# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Options from dataclasses."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

import pytest

from specblock_hf.cli.options import add_fields, read_pairs


@dataclass
class Fields:
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

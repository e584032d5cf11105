# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A device whose memory is full: one sentence with what to lower, and of other errors still the traceback."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from specblock_hf import cli


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def ended_by(monkeypatch):
    """Runs a subcommand that is ended by an error, and gives the status."""

    def run(error: Exception, *arguments: str) -> int:
        def end(args):
            raise error

        monkeypatch.setattr(import_module(cli.COMMANDS[arguments[0]][0]), "run", end)
        return cli.main(arguments)

    return run


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train", "--data", "x", "--output", "y"], "lower --batch-tokens, --max-length or --eval-examples"),
        (["regenerate", "--prompts", "x", "--output", "y"], "lower --batch-tokens or --batch-size"),
        (["generate", "--prompt", "x"], "give --dtype bfloat16 or another --device"),
    ],
)
def test_it_is_said_what_to_lower(arguments, advice, ended_by, capsys):
    assert ended_by(FULL, *arguments) == 2
    assert capsys.readouterr().err == f"specblock {arguments[0]}: the device's memory is full; {advice}.\n"


def test_other_errors_of_a_device_keep_their_traceback(ended_by):
    with pytest.raises(RuntimeError, match="device-side assert"):
        ended_by(RuntimeError("device-side assert triggered"), "generate", "--prompt", "x")

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Every script in `benchmarks/` finds what it imports of the library, and does nothing before it is asked."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_imports_what_there_is(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(script.parent)
    runpy.run_path(str(script))
    assert not capsys.readouterr().out

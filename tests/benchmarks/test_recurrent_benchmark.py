# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/recurrent.py`: every text of its table is plain decoding's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


PATH = Path(__file__).parents[2] / "benchmarks" / "recurrent.py"


def test_the_table(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("recurrent_benchmark", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [str(PATH), "--layers", "4", "--hidden", "32", "--tokens", "13"])
    module.main()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 12 and all(row[-1] == "True" for row in rows)
    # More right tokens, fewer forwards.
    assert all(float(first[2]) <= float(second[2]) for first, second in zip(rows[8:], rows[9:], strict=False))

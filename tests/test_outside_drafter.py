# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A drafter of another package: found by its entry point, trained, loaded and drafted with like any other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_target
from training_for_tests import Told, char_tokenizer

from specblock_hf import SpecBlockConfig, register_drafter
from specblock_hf.drafters.medusa import MedusaDrafter


OUTSIDE = Path(__file__).parent / "outside_drafter"
GUIDE = Path(__file__).parents[1] / "docs" / "add_a_drafter.md"
# Nothing here imports the outside package.
USE = """
import sys
import torch
from transformers import AutoModelForCausalLM
from specblock_hf import AutoDrafter, cli

folder = sys.argv[1]
options = ["--target", f"{folder}/target", "--data", f"{folder}/data", "--output", f"{folder}/run"]
options += ["--drafter", "linear_drafter", "--draft-vocab-size", "24", "--config", "block_size=2"]
options += ["--epochs", "2", "--batch-tokens", "120", "--eval-steps", "4", "--eval-budgets", "8"]
options += ["--learning-rate", "0.01", "--held-out", "0.3", "--mixed-precision", "no", "--cpu"]
assert cli.main(["train", *options]) == 0
target = AutoModelForCausalLM.from_pretrained(f"{folder}/target")
drafter = AutoDrafter.from_pretrained(f"{folder}/run/final", target=target)
prompt = torch.arange(1, 7).unsqueeze(0)
plain = target.generate(prompt, max_new_tokens=24, do_sample=False)
assert torch.equal(target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=drafter), plain)
print(type(drafter).__module__, type(drafter).__name__, drafter.config.block_size, drafter.last_statistics.rounds)
"""


def test_a_drafter_of_another_package_is_trained_and_drafts(tmp_path):
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "answers-0.jsonl", "w") as file:
        for number, tokens in enumerate(Told(24, 7).tokens.tolist()):
            file.write(json.dumps({"prompt": f"{number}ab", "answer_ids": tokens * 2, "temperature": 0.0}) + "\n")
    path = os.pathsep.join([str(OUTSIDE), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", USE, tmp_path], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    module, name, block_size, rounds = done.stdout.split()[-4:]
    assert (module, name, block_size) == ("outside_drafter", "LinearDrafter", "2") and 0 < int(rounds) <= 24


def test_the_guide_shows_that_very_drafter():
    code = (OUTSIDE / "outside_drafter.py").read_text().split('"""\n', 1)[1].strip()
    assert f"```python\n{code}\n```" in GUIDE.read_text()


def test_a_taken_name_is_refused():
    with pytest.raises(
        ValueError, match="'specblock' is specblock_hf.drafters.specblock.drafting.SpecBlockDrafter al"
    ):
        register_drafter(SpecBlockConfig, MedusaDrafter)

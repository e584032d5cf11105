# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What release 0.1 has saved still loads: pickles of whole models, adaptation states, trainer checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from safetensors.torch import load_file
from training_for_tests import Told, char_tokenizer

import specblock_hf
from specblock_hf import OnlineAdaptationCallback, cli
from specblock_hf.drafters.common.registry import drafter_kinds
from specblock_hf.old_names import MOVED, MOVED_NAMES


FOLDER = Path(__file__).parent / "fixtures" / "release_0_1"


@pytest.mark.parametrize("kind", sorted(drafter_kinds()))
def test_a_pickled_drafter_loads_and_drafts(kind):
    # In a process of its own, which has not warned yet.
    script = f"""
import torch
drafter = torch.load({str(FOLDER / f"{kind}.pt")!r}, weights_only=False)
from conftest import prompt_of, tiny_target
target, prompt = tiny_target("llama"), prompt_of(6)
plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
drafted = target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=drafter)
print(type(drafter).__module__, tuple(vars(drafter.drafting_plan).values())[:2], torch.equal(plain, drafted))
"""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", "import specblock_hf" + script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"{drafter_kinds()[kind].__module__} (6, 1) True"
    assert "its old name goes with release 0.3" in done.stderr


@pytest.mark.parametrize("name", sorted(MOVED))
def test_every_old_module_has_what_its_successors_have(name):
    with pytest.warns(FutureWarning, match="goes with release 0.3"):
        sys.modules.pop(f"specblock_hf.{name}", None)
        old = import_module(f"specblock_hf.{name}")
    for place in MOVED[name]:
        new = import_module(f"specblock_hf.{place}")
        own = [key for key, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__]
        assert own and all(getattr(old, key) is getattr(new, key) for key in own)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = old.no_such_thing


@pytest.mark.parametrize("name", sorted(MOVED_NAMES))
def test_every_old_name_is_found_with_a_warning(name):
    with pytest.warns(FutureWarning, match=f"import {name} from specblock_hf.{MOVED_NAMES[name]}"):
        assert getattr(specblock_hf, name).__name__ == name


def test_every_public_name_is_there():
    assert all(getattr(specblock_hf, name) is not None for name in specblock_hf.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        _ = specblock_hf.no_such_thing


def test_an_adaptation_state_goes_on():
    with pytest.warns(FutureWarning):
        sys.modules.pop("specblock_hf.drafter", None)
        drafter = torch.load(FOLDER / "specblock.pt", weights_only=False)
    callback = OnlineAdaptationCallback(policy="always")
    drafter.add_callback(callback)
    callback.load_state_dict(torch.load(FOLDER / "adaptation.pt", weights_only=False))
    assert callback.queries == 3
    target, prompt = tiny_target("llama"), prompt_of(6)
    plain = target.generate(prompt, max_new_tokens=8, do_sample=False)
    drafted = target.generate(prompt, max_new_tokens=8, do_sample=False, assistant_model=drafter)
    assert torch.equal(plain, drafted) and callback.queries == 4
    drafter.remove_callback(callback)


def test_a_training_run_goes_on_from_its_checkpoint(tmp_path, capsys):
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama").save_pretrained(tmp_path / "target")
    (tmp_path / "data").mkdir()
    with open(tmp_path / "data" / "answers-0.jsonl", "w") as file:
        for number, tokens in enumerate(Told(24, 7).tokens.tolist()):
            file.write(json.dumps({"prompt": f"{number}ab", "answer_ids": tokens * 2, "temperature": 0.0}) + "\n")
    shutil.copytree(FOLDER / "training", tmp_path / "run")
    options = ["--target", tmp_path / "target", "--data", tmp_path / "data", "--output", tmp_path / "run"]
    options += ["--drafter", "medusa", "--config", "block_size=2", "--draft-vocab-size", 24, "--epochs", 2]
    options += ["--batch-tokens", 120, "--learning-rate", 0.01, "--held-out", 0.3, "--save-steps", 3]
    options += ["--eval-steps", 100, "--mixed-precision", "no", "--cpu"]
    assert cli.main(["train", *map(str, options)]) == 0, capsys.readouterr().err
    # Three of the six steps were taken by release 0.1, which took the other three in its own run too.
    weights = load_file(tmp_path / "run" / "final" / "model.safetensors")
    expected = load_file(FOLDER / "training" / "final.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.allclose(weights[key].float(), expected[key].float(), atol=1e-5) for key in weights)

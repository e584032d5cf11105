# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a folder says of its origin is what may be published: no token, no prompt, no path of somebody's machine."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from test_loading import small_drafter

from specblock_hf import cli
from specblock_hf.checkpoints import provenance
from specblock_hf.checkpoints.provenance import RECORDED, published_setting, recorded_command
from specblock_hf.training.arguments import DrafterTrainingArguments


TRAIN = "specblock train --data answers.jsonl --output run --objective num_blocks=2 --learning-rate 1e-3 --cpu"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (TRAIN, TRAIN),
        (
            "/opt/bin/specblock train --data=/home/ann/secret/a.jsonl --output C:\\Users\\ann\\run",
            "specblock train --data a.jsonl --output run",
        ),
        ("/x/specblock_hf/__main__.py train --init-from run1/final/", "specblock train --init-from final"),
        (
            "specblock train --config target_name_or_path=/home/ann/x block_size=3 branching=[2,1]",
            "specblock train --config target_name_or_path block_size=3 'branching=[2,1]'",
        ),
        (
            "specblock convert /home/ann/a b --to specblock --target org/model --revision secret",
            "specblock convert --to specblock --target model",
        ),
        ("specblock convert --to specblock /home/ann/a /home/ann/b", "specblock convert --to specblock"),
        ("specblock train --token hf_secret --tok=hf_secret --epochs 2 hf_secret", "specblock train --epochs 2"),
        ("specblock train --prompt tell me --cpu secret", "specblock train --cpu"),
        ("specblock generate --prompt secret", None),
        ("specblock push folder org/name --token hf_secret", None),
        ("specblock", None),
        ("/home/ann/serve.py train --api-key secret", None),
        ("/usr/lib/python/__main__.py train --data x", None),
        ("-c train", None),
    ],
)
def test_only_what_is_known_to_be_harmless_is_recorded(arguments, expected):
    assert recorded_command(arguments.split()) == expected


def test_what_is_recorded_are_options_that_there_are(capsys):
    for command, options in RECORDED.items():
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        words = capsys.readouterr().out.replace("[", " ").replace("]", " ").split()
        assert {f"--{option}" for option in options} <= set(words)


def test_whatever_decides_a_run_is_recorded():
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(DrafterTrainingArguments)}
    assert fields - RECORDED["train"].keys() == {"output-dir", "report-to"}


def test_settings_are_published_without_paths():
    said = {"config": ["target_name_or_path=/home/ann/x", "block_size=3"], "betas": (0.9, 0.95), "init_from": "/a/b"}
    assert {name: published_setting(value) for name, value in (said | {"seed": 0}).items()} == {
        "config": "target_name_or_path block_size=3",
        "betas": "0.9 0.95",
        "init_from": "b",
        "seed": 0,
    }


def test_packages_without_metadata_are_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance.provenance()["versions"].keys() == {"torch"}


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.provenance()["commit"] is None


def test_the_shipped_drafter_names_no_path():
    folder = Path(__file__).parents[2] / "model_cards" / "specblock-smollm2-135m-instruct"
    commands = json.loads((folder / "provenance.json").read_text())["commands"]
    assert commands and not any("/" in command or "\\" in command for command in commands)
    trained = [command for command in commands if command.startswith("specblock train")]
    assert trained == [recorded_command(command.split()) for command in trained]


def test_what_a_saved_folder_says_of_its_origin(tmp_path):
    small_drafter().save_pretrained(tmp_path)
    found = json.loads((tmp_path / "provenance.json").read_text())
    assert found.keys() == {"versions", "commit", "command"}
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["versions"].keys() == {"specblock_hf", "transformers", "torch", "huggingface_hub", "safetensors"}
    assert found["command"] is None  # whatever started this is no subcommand of ours, and nobody else's business

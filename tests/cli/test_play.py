# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock play`: two answers side by side, one call at a time, and the page in a real browser."""

from __future__ import annotations

import ast
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import tiny_target
from models_for_tests import save_models
from training_for_tests import char_tokenizer, tiny_drafter
from transformers import StoppingCriteria

from specblock_hf import DraftingPlan, cli
from specblock_hf.cli import play, side_by_side
from specblock_hf.cli.models import encode
from specblock_hf.cli.side_by_side import SideBySide


PROMPT = "hello"


@pytest.fixture
def models():
    """A target, its tokenizer, and a drafter with a plan, so that no clock decides."""
    drafter = tiny_drafter()
    drafter.drafting_plan = DraftingPlan(6, 1)
    return tiny_target("llama"), char_tokenizer(), drafter


def plain_text(target, tokenizer, max_new_tokens, **settings):
    ids = encode(tokenizer, PROMPT, target.device)
    torch.manual_seed(side_by_side.SEED)
    answer = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **settings)
    return tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_both_columns_end_with_the_plain_text(models, temperature):
    target, tokenizer, drafter = models
    *_, last = SideBySide(*models).answers(PROMPT, 24, temperature)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    text = plain_text(target, tokenizer, 24, **sampling)
    speeds, texts, verdict, rounds = last[0:4:2], last[1:4:2], *last[4:]
    assert texts == (text, text) and len(text) > 8
    assert all(" tokens in " in speed for speed in speeds)
    assert "the same text, token for token" in verdict and "6 nodes by 1 forward(s), as given" in verdict
    assert rounds.startswith("<iframe") and f"{drafter.last_statistics.rounds} rounds of" in verdict
    assert not drafter.callbacks


def test_an_answer_that_nobody_waits_for_ends_soon(models, monkeypatch):
    target, tokenizer, _ = models
    real, made = target.generate, []

    def generate(ids, **kwargs):
        (stop,) = kwargs["stopping_criteria"]

        class WaitsForTheEnd(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                made.append(input_ids.shape[1])
                if len(made) == 3:
                    stop.asked.wait(10)
                return torch.zeros(len(input_ids), dtype=torch.bool)

        kwargs["stopping_criteria"].insert(0, WaitsForTheEnd())
        return real(ids, **kwargs)

    monkeypatch.setattr(target, "generate", generate)
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **kwargs: "a\n" * len(ids))
    monkeypatch.setattr(side_by_side, "PAUSE", -1.0)
    answers = SideBySide(*models).answers(PROMPT, 64, 0)
    next(answers)  # nothing yet
    next(answers)
    answers.close()
    assert len(made) <= 3


def test_one_call_runs_at_a_time(models, monkeypatch):
    target, running, most = models[0], [], []
    real = target.generate

    def generate(ids, **kwargs):
        running.append(ids)
        most.append(len(running))
        try:
            return real(ids, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(target, "generate", generate)
    both = SideBySide(*models)
    visitors = [threading.Thread(target=lambda: list(both.answers(PROMPT, 8, 0))) for _ in range(3)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert most == [1] * 6


def test_a_refused_call_says_why(models):
    with pytest.raises(ValueError, match="max_new_tokens"):
        list(SideBySide(*models).answers(PROMPT, 0, 0))


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(play, "find_spec", lambda name: None)
    assert cli.main(["play"]) == 2
    error = 'specblock play: the page needs Gradio, which is not installed; run `pip install "specblock_hf[play]"`.\n'
    assert capsys.readouterr().err == error


def test_bad_names_end_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(play, "find_spec", lambda name: object())
    folders = save_models(tmp_path)
    assert cli.main(["play", folders["target"], "--drafter", str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err.splitlines()[-1]


def test_gradio_is_not_imported_before_there_is_a_page():
    whole = [Path(module.__file__).read_text() for module in (play, side_by_side)]
    run_at_once = [node for text in whole for node in ast.parse(text).body if isinstance(node, ast.Import)]
    assert "    import gradio" in whole[0]  # of a type checker, and of whoever builds the page
    assert not any(name.name.startswith("gradio") for node in run_at_once for name in node.names)


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pytest.importorskip("gradio", reason="needs Gradio")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs a browser")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_the_page_in_a_browser(models, browser, monkeypatch):
    target, tokenizer, drafter = models
    monkeypatch.setattr(play, "NEW_TOKENS", 24)
    app = play.build_app(*models)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True)
    try:
        page = browser.new_page(viewport={"width": 1300, "height": 1500})
        page.goto(address)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_role("button", name="Answer twice").click()
        page.get_by_text("the same text, token for token").wait_for(timeout=60_000)
        texts = [page.get_by_label(label).input_value() for label in play.COLUMNS]
        assert texts == [plain_text(target, tokenizer, play.NEW_TOKENS, do_sample=False)] * 2
        assert page.locator(".rate").count() == 2
        rounds = page.frame_locator("iframe[title=rounds]")
        count = drafter.last_statistics.rounds
        said = re.match(rf"round {count} of {count}: (\d) drafted, ", rounds.locator("#where").inner_text())
        assert rounds.locator("g.node").count() == int(said[1]) + 1
        rounds.get_by_text("earlier").click()
        assert rounds.locator("#where").inner_text().startswith(f"round {count - 1} of {count}: ")
    finally:
        app.close()

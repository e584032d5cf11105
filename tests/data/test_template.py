# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Which prompts a drafter was trained behind: told by its configuration, compared with a tokenizer's."""

from __future__ import annotations

import re

import pytest
from models_for_tests import tiny_tokenizer

from specblock_hf import BlockDiffusionConfig, Eagle3Config, SpecBlockConfig
from specblock_hf.data.template import PromptStyle, template_that_thinks


PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
# Qwen3's switch, which is on where nothing is said, and one that is off.
THINKS = PLAIN + "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}"
ANSWERS = PLAIN + "{% if enable_thinking is defined and enable_thinking %}yes{% endif %}"


def tokenizer_with(template: str | None):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_a_tokenizers_style():
    styles = [PromptStyle.of(tokenizer_with(template)) for template in (None, PLAIN, THINKS, ANSWERS)]
    assert [style.thinking for style in styles] == [None, None, True, False]
    digests = [style.chat_template for style in styles]
    assert digests[0] is None and len(set(digests)) == 4 and {len(digest) for digest in digests[1:]} == {16}


@pytest.mark.parametrize(
    ("thinking", "template", "advice"),
    [
        (
            False,
            THINKS,
            r"trained on answers without thinking, .* target thinks unless .*; pass enable_thinking=False",
        ),
        (True, ANSWERS, r"trained on answers with thinking, .* does not think unless .*; pass enable_thinking=True"),
        (True, THINKS, None),
        (False, ANSWERS, None),
        (False, PLAIN, None),  # which cannot think
        (None, THINKS, None),
        (False, None, None),
    ],
)
def test_another_mode_is_told(thinking, template, advice):
    found = PromptStyle(None, thinking).advice(tokenizer_with(template))
    assert found is None if advice is None else re.search(advice, found)


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("template", [THINKS, ANSWERS])
def test_a_template_that_is_told_once_for_all(template, thinks):
    tokenizer = tokenizer_with(template)
    before = PromptStyle.of(tokenizer)
    told = tokenizer_with(template_that_thinks(tokenizer, thinks))
    assert PromptStyle.of(told) == (before.chat_template, thinks) and tokenizer.chat_template == template
    turn = [{"role": "user", "content": "Hello"}]
    for said, expected in (({}, thinks), ({"enable_thinking": True}, True), ({"enable_thinking": False}, False)):
        texts = [
            chosen.apply_chat_template(turn, tokenize=False, **options)
            for chosen, options in ((told, said), (tokenizer, {"enable_thinking": expected}))
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("template", [None, PLAIN])
def test_a_template_without_a_switch_is_told_nothing(template):
    with pytest.raises(ValueError, match=r"has no enable_thinking to set; leave --thinking out\."):
        template_that_thinks(tokenizer_with(template), True)


def test_another_template_is_told():
    trained = PromptStyle.of(tokenizer_with(THINKS))
    assert trained.advice(tokenizer_with(THINKS)) is None
    assert trained.advice(tokenizer_with(THINKS + " ")).startswith(
        "This drafter was trained with another chat template"
    )


@pytest.mark.parametrize("kind", [SpecBlockConfig, Eagle3Config, BlockDiffusionConfig])
def test_a_drafters_own_words_go_first(kind, tmp_path):
    config = kind(chat_template="0123456789abcdef", thinking=False)
    config.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert PromptStyle.recorded(again.to_dict(), thinking=True) == ("0123456789abcdef", False)
    assert PromptStyle.recorded(kind().to_dict(), thinking=True) == (None, True)
    assert PromptStyle.recorded(kind().to_dict()) == (None, None)

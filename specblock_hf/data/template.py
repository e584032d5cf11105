# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which prompts a drafter was trained behind, and which a tokenizer makes. A drafter that has only seen answers without
thinking guesses badly where the target thinks, and the other way round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase


_TURN = [{"role": "user", "content": "Hello"}]
SWITCH = "enable_thinking"
"""What chat templates call it."""

_UNTOLD = {
    thinks: f"{{% if {SWITCH} is not defined %}}{{% set {SWITCH} = {str(thinks).lower()} %}}{{% endif %}}"
    for thinks in (True, False)
}
"""Before a template: what it takes for said where nothing is."""


def template_that_thinks(tokenizer: PreTrainedTokenizerBase, thinks: bool) -> str:
    """
    The chat template of a tokenizer, by which the target thinks before it answers, or does not, unless it is told to.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Not changed.
        thinks (`bool`): Whether it does.

    Raises:
        ValueError: The template has no switch for it.
    """
    if PromptStyle.of(tokenizer).thinking is None:
        raise ValueError(f"this tokenizer's chat template has no {SWITCH} to set; leave --thinking out.")
    return _UNTOLD[thinks] + tokenizer.chat_template


class PromptStyle(NamedTuple):
    """
    How prompts are written: two fields of a drafter's configuration.

    Args:
        chat_template (`str`, *optional*): The first 16 digits of the template's sha256; `None` without a template.
        thinking (`bool`, *optional*):
            Whether the target thinks before it answers where nothing is said; `None` for templates without a switch.
    """

    chat_template: str | None = None
    thinking: bool | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
        """That of a tokenizer whose template is told nothing."""
        template = tokenizer.chat_template
        if not isinstance(template, str):  # none, or several by name
            return cls()
        usual, on, off = (
            tokenizer.apply_chat_template(_TURN, tokenize=False, add_generation_prompt=True, **said)
            for said in ({}, {SWITCH: True}, {SWITCH: False})
        )
        for told in _UNTOLD.values():
            template = template.removeprefix(told)
        return cls(hashlib.sha256(template.encode()).hexdigest()[:16], None if on == off else usual == on)

    @classmethod
    def recorded(cls, config: Mapping[str, Any], thinking: bool | None = None) -> PromptStyle:
        """
        That which a drafter was trained behind.

        Args:
            config (`dict`): Its configuration.
            thinking (`bool`, *optional*): What others say, where the configuration says nothing.
        """
        own = config.get("thinking")
        return cls(config.get("chat_template"), thinking if own is None else own)

    def advice(self, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What to do where a drafter of this style meets a tokenizer of another, or `None`."""
        found = PromptStyle.of(tokenizer)
        if None not in (self.thinking, found.thinking) and self.thinking != found.thinking:
            trained, does = ("with", "does not think") if self.thinking else ("without", "thinks")
            said = ", and --thinking to commands" if self.thinking else ", and --no-thinking to commands"
            return (
                f"This drafter was trained on answers {trained} thinking, and with this tokenizer's chat template the "
                f"target {does} unless it is told to; pass {SWITCH}={self.thinking} to apply_chat_template"
                f"{said}, or fewer tokens are accepted."
            )
        if None not in (self.chat_template, found.chat_template) and self.chat_template != found.chat_template:
            return (
                "This drafter was trained with another chat template than this tokenizer's; use that one, or fewer "
                "tokens may be accepted."
            )
        return None

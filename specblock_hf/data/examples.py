# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Conversations with the target's own answers, as token ids with the answer marked."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .template import PromptStyle, template_that_thinks


logger = logging.getLogger(__name__)

ANSWERED_BY = "answered_by.json"
"""The file of a folder of answers that says whose they are: `target`, [`PromptStyle`]'s fields, `max_new_tokens`."""


@dataclass
class Example:
    """
    One conversation.

    Args:
        input_ids (`list[int]`): Prompt and answer.
        answer_start (`int`): Index of the answer's first token; the loss counts predictions of tokens from there on.
        greedy (`bool`): The answer is the target's greedy one, so it may stand for what `generate()` would write.
        key (`str`): Digest of the prompt, by which examples are split.
    """

    input_ids: list[int]
    answer_start: int
    greedy: bool
    key: str

    def __post_init__(self) -> None:
        if not 0 < self.answer_start < len(self.input_ids):
            raise ValueError(
                f"the answer starts at token {self.answer_start} of {len(self.input_ids)}, so the loss would count "
                "every token or none; check that the prompt is a prefix of the rendered conversation."
            )


def read_rows(path: str | Path) -> Iterator[dict]:
    """
    The rows of a JSON-lines file, `.gz` or plain, or of all such files of a folder in the order of their names.

    Args:
        path (`str` or `Path`): File, or folder with files `*.jsonl` or `*.jsonl.gz`.

    Raises:
        ValueError: A line is not a JSON object; the message names it.
    """
    path = Path(path)
    if path.is_dir():
        for file in sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")]):
            yield from read_rows(file)
        return
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}); repair or remove that line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f'{path}, line {number} is not a JSON object like {{"prompt": "Hello"}}, and every row is one; '
                    "repair or remove that line."
                )
            yield row


def as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A prompt as a conversation; a string is one turn of the user's."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def prompt_key(messages: list[dict[str, str]]) -> str:
    """Digest of a conversation, the same in every process and on every machine."""
    return hashlib.sha256(json.dumps(messages).encode()).hexdigest()


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """
    What the target reads before it answers: the tokenizer's chat template, or the bare texts if it has none.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        messages (`list[dict[str, str]]`): Turns with `role` and `content`.
    """
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def answered_by(path: str | Path) -> dict[str, Any]:
    """What the folder of answers, or that of a file of them, says of whose they are; nothing in older ones."""
    path = Path(path)
    said = (path if path.is_dir() else path.parent) / ANSWERED_BY
    return json.loads(said.read_text()) if said.exists() else {}


def load_examples(path: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int = 1024) -> list[Example]:
    """
    Read answers as `specblock regenerate` writes them: `prompt`, `answer_ids`, `temperature` in every row, and
    `prompt_ids`, without which the prompt is rendered anew. Warns of conversations that are longer than `max_length`.

    Args:
        path (`str` or `Path`): JSON-lines file, or a folder of them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The target's; its chat template renders the prompt, and is told to think or not as it was for the answers.
        max_length (`int`, *optional*, defaults to 1024): Longest conversation in tokens; longer ones are cut at the
            end.

    Raises:
        ValueError: A row lacks one of the three, or no row holds an answer of two tokens, or none within `max_length`.
    """
    thinks, usual = answered_by(path).get("thinking"), PromptStyle.of(tokenizer).thinking
    if None not in (thinks, usual) and thinks != usual:
        tokenizer.chat_template = template_that_thinks(tokenizer, thinks)
    examples, cut, left_out = [], 0, 0
    for number, row in enumerate(read_rows(path), 1):
        if not {"prompt", "answer_ids", "temperature"} <= row.keys():
            raise ValueError(
                f"row {number} of {path} has only {', '.join(row)}, and training needs prompt, answer_ids and "
                "temperature; write answers with `specblock regenerate`."
            )
        messages = as_messages(row["prompt"])
        prompt_ids = row.get("prompt_ids") or render_prompt(tokenizer, messages)
        whole = prompt_ids + row["answer_ids"]
        ids = whole[:max_length]
        if len(ids) - len(prompt_ids) < 2:  # nothing that a drafter could predict
            left_out += len(whole) - len(prompt_ids) >= 2
            continue
        cut += len(ids) < len(whole)
        examples.append(Example(ids, len(prompt_ids), row["temperature"] == 0.0, prompt_key(messages)))
    if left_out and not examples:
        raise ValueError(
            f"no conversation of {path} has two tokens of its answer within --max-length {max_length}; give more."
        )
    if not examples:
        raise ValueError(f"{path} holds no answer of two tokens or more; regenerate it with `specblock regenerate`.")
    if cut or left_out:
        logger.warning(
            "%d conversations of %s were cut at --max-length %d, and %d left out whose prompts fill it; raise it to "
            "keep them whole.",
            cut,
            path,
            max_length,
            left_out,
        )
    return examples


def split_examples(examples: list[Example], held_out: float = 0.02) -> tuple[list[Example], list[Example]]:
    """
    Training and held-out examples; a prompt with several answers stays on one side, whatever the order of the
    file.
    """
    limit = int(held_out * 16**8)
    train = [e for e in examples if int(e.key[:8], 16) >= limit]
    held = [e for e in examples if int(e.key[:8], 16) < limit]
    return train, held

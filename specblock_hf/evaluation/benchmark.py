# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Answers timed side by side: every method answers a prompt in the same process before the next prompt is begun, in an
order that rotates, so that a machine that slows down favours no method.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.saving import save_text_whole
from ..data.examples import render_prompt
from ..data.suites import EvaluationPrompt
from ..devices import timed
from ..drafting.drafter import DraftingCall, DraftingCallback, TreeDrafter
from ..drafting.statistics import GenerationStatistics
from ..trees.tree import DraftTree
from .divergence import first_difference, plain_margins
from .methods import PLAIN, Method


WARM_UP_TOKENS = 16

Row = dict[str, Any]
"""One answer's figures, ready for JSON."""


@dataclass(frozen=True)
class Unit:
    """A prompt at a temperature: what is done or not done when a run is resumed."""

    prompt: EvaluationPrompt
    temperature: float

    @property
    def key(self) -> tuple[str, str, float]:
        return self.prompt.suite, self.prompt.name, self.temperature

    @property
    def turns(self) -> tuple[str, ...]:
        return (self.prompt.prompt, *self.prompt.later_turns)


@dataclass(frozen=True)
class Run:
    """
    One `generate()` call.

    Args:
        ids (`list[int]`): The answer.
        seconds (`float`): Wall time, prompt included.
        statistics ([`GenerationStatistics`], *optional*): Of a tree drafter.
        draft_rows (`float`, *optional*):
            Rows of the drafter's forwards in a round, all slots counted; `None` without a network or a second round.
        target_calls (`int`, *optional*): Forwards of the target, counted where transformers' own helpers run.
    """

    ids: list[int]
    seconds: float
    statistics: GenerationStatistics | None = None
    draft_rows: float | None = None
    target_calls: int | None = None


class DraftRows(DraftingCallback):
    """
    Counts the rows that a drafter's network computes, from the second round on: the first one also reads the prompt.

    Args:
        drafter ([`TreeDrafter`]): Watched inside a `with` statement.
    """

    def __init__(self, drafter: TreeDrafter):
        self.drafter = drafter
        self.rows, self.rounds = 0, -1

    def __enter__(self) -> DraftRows:
        self.drafter.add_callback(self)
        network = self.drafter.network
        self._handle = network.register_forward_hook(self._count) if isinstance(network, nn.Module) else None
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.drafter.remove_callback(self)
        if self._handle is not None:
            self._handle.remove()

    @property
    def per_round(self) -> float | None:
        return self.rows / self.rounds if self.rows and self.rounds > 0 else None

    def on_draft(self, call: DraftingCall, tree: DraftTree) -> None:
        self.rounds += 1
        if self.rounds == 0:
            self.rows = 0

    def _count(self, module: nn.Module, args: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        self.rows += states.shape[:-1].numel()


def decoding_settings(temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """
    Greedy at 0, otherwise the whole distribution at that temperature, whatever the target's own configuration cuts
    off.
    """
    settings: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": max_new_tokens}
    return settings | ({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {})


def answer(
    target: PreTrainedModel, prompt_ids: torch.LongTensor, method: Method, settings: Mapping[str, Any], seed: int
) -> Run:
    """One timed and seeded `generate()` call that leaves the caller's random state alone."""
    devices = [target.device] if target.device.type == "cuda" else []

    def generate() -> Run:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            options = {"attention_mask": torch.ones_like(prompt_ids), **settings, **method.options}
            ids, seconds = timed(target.device, lambda: target.generate(prompt_ids, **options))
            return Run(ids[0, prompt_ids.shape[1] :].tolist(), seconds)

    if method.drafter is not None:
        with DraftRows(method.drafter) as rows:
            run = generate()
        return Run(run.ids, run.seconds, method.drafter.last_statistics, rows.per_round)
    if method.kind == "transformers":
        forwards: Counter = Counter()
        with target.register_forward_pre_hook(lambda module, args: forwards.update(calls=1)):
            run = generate()
        return Run(run.ids, run.seconds, target_calls=forwards["calls"])
    return generate()


def answer_row(runs: Sequence[Run]) -> Row:
    """The repeats of one answer as one row: all times, and the rest from the run with the median time."""
    run = sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
    row: Row = {"tokens": len(run.ids), "seconds": [run.seconds for run in runs]}
    if run.target_calls is not None:
        row["target_calls"] = run.target_calls
    if run.statistics is not None:
        figures = run.statistics
        row |= {"rounds": figures.rounds, "accepted": figures.accepted, "cut": figures.cut}
        row |= {"nodes": figures.nodes_verified, "draft_calls": figures.drafter_calls, "draft_rows": run.draft_rows}
        row |= {"prefill_seconds": figures.prefill_seconds, "draft_seconds": figures.draft_seconds}
        row |= {"verify_seconds": figures.verify_seconds, "host_seconds": figures.host_seconds}
    return row


@dataclass(eq=False)
class Benchmark:
    """
    Times methods on prompts.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        methods (sequence of [`Method`]): One of them plain.
        max_new_tokens (`int`): Of every answer.
        repeats (`int`, *optional*, defaults to 1): Times that every answer is made; medians count.
        seed (`int`, *optional*, defaults to 0): Every call starts from it; it matters only for sampling.
    """

    target: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    methods: Sequence[Method]
    max_new_tokens: int
    repeats: int = 1
    seed: int = 0

    def warm_up(self, units: Sequence[Unit]) -> None:
        """Let every method answer a few tokens at every temperature, so that first-call costs fall on none."""
        for unit in {unit.temperature: unit for unit in reversed(units)}.values():
            settings = decoding_settings(unit.temperature, min(WARM_UP_TOKENS, self.max_new_tokens))
            for method in self.methods:
                answer(self.target, self._encode([unit.turns[0]], []), method, settings, self.seed)

    def run(self, unit: Unit, turn_of: int = 0) -> list[Row]:
        """
        Let every method answer all turns of a prompt. Later turns follow the plain answers to the earlier ones, so
        that all methods read the same.

        Args:
            unit ([`Unit`]): The prompt.
            turn_of (`int`, *optional*, defaults to 0): Which method goes first, counted on from one unit to the next.

        Returns:
            `list[Row]`: For each turn and method one.
        """
        settings = decoding_settings(unit.temperature, self.max_new_tokens)
        rows: list[Row] = []
        replies: list[str] = []
        for turn in range(len(unit.turns)):
            prompt_ids = self._encode(unit.turns[: turn + 1], replies)
            runs: dict[str, list[Run]] = {method.name: [] for method in self.methods}
            for repeat in range(self.repeats):
                first = (turn_of + turn + repeat) % len(self.methods)
                for method in (*self.methods[first:], *self.methods[:first]):
                    runs[method.name].append(answer(self.target, prompt_ids, method, settings, self.seed))
            answers = {name: made[0].ids for name, made in runs.items()}
            replies.append(self.tokenizer.decode(answers[PLAIN], skip_special_tokens=True))
            differences = self._differences(prompt_ids, answers, settings)
            suite, name, temperature = unit.key
            place = {"suite": suite, "prompt": name, "turn": turn, "temperature": temperature}
            place["prompt_tokens"] = prompt_ids.shape[1]
            for method in self.methods:
                rows.append(place | {"method": method.name} | answer_row(runs[method.name]) | differences[method.name])
        return rows

    def _encode(self, turns: Sequence[str], replies: Sequence[str]) -> torch.LongTensor:
        """The conversation's ids `[1, T]`; each turn but the last has its reply."""
        messages = []
        for turn, text in enumerate(turns):
            messages.append({"role": "user", "content": text})
            if turn < len(replies):
                messages.append({"role": "assistant", "content": replies[turn]})
        return torch.tensor([render_prompt(self.tokenizer, messages)], device=self.target.device)

    def _differences(
        self, prompt_ids: torch.LongTensor, answers: Mapping[str, list[int]], settings: Mapping[str, Any]
    ) -> dict[str, Row]:
        """
        For each method whether its answer is the plain one, and where it is not, the place and plain decoding's top-2
        margin there. Sampled answers of transformers' own helpers draw other numbers, which says nothing.
        """
        notes: dict[str, Row] = {method.name: {} for method in self.methods}
        places: dict[str, int] = {}
        for method in self.methods:
            if method.name != PLAIN and (method.drafter is not None or not settings["do_sample"]):
                place = first_difference(answers[PLAIN], answers[method.name])
                notes[method.name]["identical"] = place is None
                if place is not None:
                    places[method.name] = place
        if places and not settings["do_sample"]:
            count = min(max(places.values()) + 1, len(answers[PLAIN]))
            margins = plain_margins(self.target, prompt_ids, count, **(dict(settings) | {"seed": self.seed}))
            for name, place in places.items():
                margin = margins[place] if place < len(margins) else None
                notes[name] |= {"differs_at": place, "margin": margin}
        return notes


class ResultFolder:
    """
    What a benchmark has measured so far: `setting.json`, and a line for each answer in `answers.jsonl`.

    Args:
        folder (`str` or `Path`): Made if absent.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.answers = self.folder / "answers.jsonl"
        self._setting = self.folder / "setting.json"

    def open(
        self, conditions: Mapping[str, Any], plan: Callable[[Container[str]], Iterable[tuple[str, Any]]]
    ) -> dict[str, Any]:
        """
        Begin, or go on with what was begun under the same conditions.

        Args:
            conditions (mapping): What decides the figures, ready for JSON.
            plan (`Callable`):
                Told which methods have plans, makes those of the others; each is kept as it comes.

        Returns:
            `dict`: `conditions` and `plans`.

        Raises:
            ValueError: The folder holds figures that were measured under other conditions.
        """
        if self._setting.exists():
            setting = json.loads(self._setting.read_text())
            before, now = setting["conditions"], json.loads(json.dumps(conditions))
            changed = [name for name in now | before if before.get(name) != now.get(name)]
            if changed:
                raise ValueError(
                    f"{self.folder} holds a benchmark with {changed[0]} = {before.get(changed[0])!r} and this one has "
                    f"{now.get(changed[0])!r}; give another --output, or the same options to go on with it."
                )
        else:
            setting = {"conditions": dict(conditions), "plans": {}}
        for name, chosen in plan(setting["plans"].keys()):
            setting["plans"][name] = chosen
            self._save(setting)
        self._save(setting)
        return setting

    def _save(self, setting: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_text_whole(self._setting, json.dumps(setting, indent=1) + "\n")

    def rows(self, units: Sequence[Unit], num_methods: int) -> list[Row]:
        """The rows of the units that are complete; what a crash has left of another one is taken out of the file."""
        if not self.answers.exists():
            return []
        rows = []
        for line in self.answers.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the line that was being written
        found = Counter(_key(row) for row in rows)
        done = {unit.key for unit in units if found[unit.key] == len(unit.turns) * num_methods}
        complete = [row for row in rows if _key(row) in done]
        save_text_whole(self.answers, "".join(json.dumps(row) + "\n" for row in complete))
        return complete

    def append(self, rows: Sequence[Row]) -> None:
        """Write a unit's rows to the disk."""
        with self.answers.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())


def evenly(prompts: Sequence[EvaluationPrompt], limit: int | None) -> list[EvaluationPrompt]:
    """So many prompts, evenly spaced: MT-Bench's questions are sorted by category."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompts[place * len(prompts) // limit] for place in range(limit)]


def median_seconds(row: Row) -> float:
    return statistics.median_low(row["seconds"])


def _key(row: Row) -> tuple[str, str, float]:
    return row["suite"], row["prompt"], row["temperature"]

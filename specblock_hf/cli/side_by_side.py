# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Two answers to a prompt side by side, plain and drafted, as a page shows them while they come."""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..drafting.drafter import TreeDrafter
from ..evaluation.divergence import divergence_between
from ..evaluation.trace_page import RoundKeeper
from .demo import describe_divergence
from .models import Answer, ask, encode


SEED = 0
"""Of both answers where they are sampled, so that they are the same then, too."""

PAUSE = 0.1
"""Seconds between two looks at a text that is being made: what showing it costs is the same for both."""

LARGE = "font-size: 1.3em"

FRAME = (
    '<iframe title="rounds" style="width: 100%; height: 720px; border: 1px solid #ccc; border-radius: 8px" '
    'srcdoc="{}"></iframe>'
)


class _Stop(StoppingCriteria):
    """Ends a call soon after nobody wants its answer any more."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


class _Streamer(TextIteratorStreamer):
    """A text that is being made, and how many tokens it has."""

    tokens = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 0 if self.next_tokens_are_prompt else value.numel()
        super().put(value)


@dataclass
class _Column:
    """One of the two answers as far as it has come."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    answer: Answer | None = None

    @property
    def shown(self) -> tuple[str, str]:
        rate = f"{self.tokens / self.seconds:.1f}" if self.seconds else "–"
        made = f"{self.tokens} tokens in {self.seconds:.1f} s" if self.seconds else "waits"
        speed = f"<b>{rate}</b> tokens a second <small>({made})</small>"
        return f'<div class="rate" style="{LARGE}">{speed}</div>', self.text


class SideBySide:
    """
    Answers a prompt twice, plainly and with the drafter; whoever asks, one `generate()` call runs at a time.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        drafter ([`TreeDrafter`]): The drafter.
    """

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: TreeDrafter):
        self.target, self.tokenizer, self.drafter = target, tokenizer, drafter
        self._lock = threading.Lock()

    def answers(self, prompt: str, max_new_tokens: int, temperature: float) -> Iterator[tuple[str, ...]]:
        """What the page shows while it comes: speed and text of either answer, the verdict, and the rounds."""
        prompt_ids = encode(self.tokenizer, prompt, self.target.device)
        settings: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
        if temperature > 0:
            settings["temperature"] = temperature
        plain, drafted = _Column(), _Column()
        keeper = RoundKeeper(self.tokenizer, self.target.device)
        yield *plain.shown, *drafted.shown, "", ""
        for column, keeping in ((plain, None), (drafted, keeper)):
            for _ in self._fill(column, prompt_ids, keeping, settings):
                yield *plain.shown, *drafted.shown, "", ""
        page = keeper.page("The rounds of the drafted answer", prompt_ids, shown=len(keeper.rounds))
        verdict = self._verdict(prompt_ids, plain.answer, drafted.answer, settings)
        yield *plain.shown, *drafted.shown, verdict, FRAME.format(html.escape(page))

    def _fill(
        self, column: _Column, prompt_ids: torch.LongTensor, keeper: RoundKeeper | None, settings: dict[str, Any]
    ) -> Iterator[None]:
        """Make an answer in a thread of its own, drafted if its rounds are kept, and tell when it has grown."""
        streamer, stop = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True), _Stop()
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._ask, prompt_ids, keeper, streamer, stop, settings)
            started = shown = time.perf_counter()
            try:
                for piece in streamer:
                    column.text += piece
                    now = time.perf_counter()
                    if now - shown > PAUSE:
                        column.tokens, column.seconds, shown = streamer.tokens, now - started, now
                        yield
            finally:
                stop.asked.set()
        column.answer = answer.result()
        column.tokens, column.seconds = column.answer.new_tokens, column.answer.seconds
        yield

    def _ask(
        self,
        prompt_ids: torch.LongTensor,
        keeper: RoundKeeper | None,
        streamer: _Streamer,
        stop: _Stop,
        settings: dict[str, Any],
    ) -> Answer:
        shared = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([stop])}
        drafter = self.drafter if keeper else None
        with self._lock:
            torch.manual_seed(SEED)
            if keeper:
                self.drafter.add_callback(keeper)
            try:
                return ask(self.target, self.tokenizer, prompt_ids, drafter, stream=False, **shared, **settings)
            finally:
                streamer.end()
                if keeper:
                    self.drafter.remove_callback(keeper)

    def _verdict(self, prompt_ids: torch.LongTensor, plain: Answer, drafted: Answer, settings: dict[str, Any]) -> str:
        with self._lock:
            divergence = divergence_between(self.target, prompt_ids, plain.ids, drafted.ids, seed=SEED, **settings)
        same = "the same text, token for token"
        if divergence is not None:
            same = f"the texts differ, {describe_divergence(divergence)}"
        ratio, figures = drafted.tokens_per_second / plain.tokens_per_second, drafted.statistics
        rounds = f"{figures.rounds} rounds of {figures.tau:.2f} tokens each" if figures.rounds else "no round"
        speed = f"<b>{ratio:.2f} times</b> the speed{'' if ratio > 1 else ', slower than plain here'}; {same}."
        return f'<div style="{LARGE}">{speed}</div><div>{rounds}; {figures.plan}</div>'

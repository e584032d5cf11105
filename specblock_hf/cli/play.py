# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock play`: a page in the browser that answers prompts without and with the drafter, and shows every round."""

from __future__ import annotations

import argparse
import html
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ..calibration.calibrate import calibrate
from ..drafting.drafter import TreeDrafter
from ..evaluation.divergence import divergence_between
from ..evaluation.trace_page import RoundKeeper
from .demo import PROMPTS, describe_calibration, describe_divergence, describe_setting, warm_up
from .doctor import find_for
from .models import Answer, add_model_arguments, ask, encode, load_models


if TYPE_CHECKING:
    import gradio


SEED = 0
"""Of both answers where they are sampled, so that they are the same then, too."""

NEW_TOKENS = 128

COLUMNS = ("Plain generate()", "With the drafter")

PAUSE = 0.1
"""Seconds between two looks at a text that is being made: what showing it costs is the same for both."""

LARGE = "font-size: 1.3em"

FRAME = (
    '<iframe title="rounds" style="width: 100%; height: 720px; border: 1px solid #ccc; border-radius: 8px" '
    'srcdoc="{}"></iframe>'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add_model_arguments(parser, positional=("target",))
    parser.add_argument("--host", default="127.0.0.1", help="who may ask; 0.0.0.0: everybody (default: %(default)s)")
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860)")


def run(args: argparse.Namespace) -> None:
    """
    Serve the page until it is interrupted.

    Raises:
        ImportError: Gradio is not installed.
    """
    require_gradio()
    find_for(args)
    target, tokenizer, drafter = load_models(args)
    if not args.plan:
        print(describe_calibration(calibrate(target, drafter, progress=not args.quiet)))
    build_app(target, tokenizer, drafter).launch(server_name=args.host, server_port=args.port, quiet=args.quiet)


def require_gradio() -> None:
    """
    Raises:
        ImportError: It is not installed.
    """
    if find_spec("gradio") is None:
        raise ImportError('the page needs Gradio, which is not installed; run `pip install "specblock_hf[play]"`.')


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
        divergence = divergence_between(self.target, prompt_ids, plain.ids, drafted.ids, seed=SEED, **settings)
        same = "the same text, token for token"
        if divergence is not None:
            same = f"the texts differ, {describe_divergence(divergence)}"
        ratio, figures = drafted.tokens_per_second / plain.tokens_per_second, drafted.statistics
        rounds = f"{figures.rounds} rounds of {figures.tau:.2f} tokens each" if figures.rounds else "no round"
        speed = f"<b>{ratio:.2f} times</b> the speed{'' if ratio > 1 else ', slower than plain here'}; {same}."
        return f'<div style="{LARGE}">{speed}</div><div>{rounds}; {figures.plan}</div>'


def build_app(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, drafter: TreeDrafter) -> gradio.Blocks:
    """
    The page; its `launch()` serves it.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        drafter ([`TreeDrafter`]): The drafter.

    Raises:
        ImportError: Gradio is not installed.
    """
    require_gradio()
    import gradio

    warm_up(target, tokenizer, drafter, PROMPTS[0][1])
    both = SideBySide(target, tokenizer, drafter)
    with gradio.Blocks(title="specblock", analytics_enabled=False) as page:
        gradio.Markdown(f"# The same text, sooner\n{describe_setting(target)}. Drafter: {drafter.label}.")
        with gradio.Row():
            prompt = gradio.Textbox(PROMPTS[0][1], label="Prompt", lines=6, scale=3)
            with gradio.Column(scale=1):
                tokens = gradio.Slider(16, 512, NEW_TOKENS, step=16, label="New tokens")
                temperature = gradio.Slider(0, 1.5, 0, step=0.1, label="Temperature (0: greedy)")
                go = gradio.Button("Answer twice", variant="primary")
        gradio.Examples([text for _, text in PROMPTS[1:4]], prompt)
        verdict = gradio.HTML()
        columns = []
        with gradio.Row():
            for label in COLUMNS:
                with gradio.Column():
                    columns += [gradio.HTML(), gradio.Textbox(label=label, lines=12, max_lines=12)]
        rounds = gradio.HTML()
        asked, shown = [prompt, tokens, temperature], [*columns, verdict, rounds]
        go.click(both.answers, asked, shown, concurrency_limit=1, show_progress="minimal", show_progress_on=verdict)
    return page

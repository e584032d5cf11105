# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock play`: a page in the browser that answers prompts without and with the drafter, and shows every round."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration.calibrate import calibrate
from ..drafting.drafter import TreeDrafter
from .demo import PROMPTS, describe_calibration, describe_setting, warm_up
from .doctor import find_for
from .models import add_model_arguments, load_models
from .side_by_side import SideBySide


if TYPE_CHECKING:
    import gradio


NEW_TOKENS = 128

COLUMNS = ("Plain generate()", "With the drafter")


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
        figures = calibrate(target, drafter, progress=not args.quiet)
        print(describe_calibration(figures, drafter.acceptance_measured))
    build_app(target, tokenizer, drafter).launch(
        server_name=args.host, server_port=args.port, quiet=args.quiet, show_error=True
    )


def require_gradio() -> None:
    """
    Raises:
        ImportError: It is not installed.
    """
    if find_spec("gradio") is None:
        raise ImportError('the page needs Gradio, which is not installed; run `pip install "specblock_hf[play]"`.')


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

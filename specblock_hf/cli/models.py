# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the subcommands that answer prompts share: options that name a target and a drafter, loading both, asking."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..checkpoints.loading import auto_class
from ..data.examples import render_prompt
from ..data.template import template_that_thinks
from ..devices import best_device, timed
from ..drafters.auto import AutoDrafter
from ..drafters.joined import JoinedDrafter
from ..drafters.lookup import LookupDrafter
from ..drafting.drafter import TreeDrafter
from ..drafting.plan import DraftingPlan
from ..drafting.statistics import GenerationStatistics
from .default_target import DEFAULT_TARGET, find_default_drafter, load_default_target


DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, positional: Collection[str] = ()) -> None:
    """
    Add the options that [`load_models`] reads.

    Args:
        parser (`argparse.ArgumentParser`): Of a subcommand.
        positional (collection of `str`, *optional*, defaults to `()`):
            Which of `target` and `drafter` are named without dashes.
    """
    defaults = {"target": f"{DEFAULT_TARGET}, from a wheel", "drafter": "the one of the default target"}
    for name, default in defaults.items():
        words = f"folder or Hub id (default: {default})"
        if name in positional:
            parser.add_argument(name, nargs="?", help=words)
        else:
            parser.add_argument(f"--{name}", help=words)
    parser.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="add continuations found in the text so far to the trees (default: yes)",
    )
    parser.add_argument(
        "--plan",
        type=int,
        nargs=3,
        metavar=("NODES", "FORWARDS", "STARTS"),
        help="how much a round drafts, 0 starts being all (default: found while decoding)",
    )
    add_thinking(parser)
    add_dtype(parser)
    add_device(parser)


def add_thinking(parser: argparse._ActionsContainer) -> None:
    """Add `--thinking`, which [`tell_thinking`] is given."""
    parser.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="let the target think before it answers, or not (default: as its chat template has it)",
    )


def tell_thinking(tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> None:
    """Change a tokenizer's chat template to one by which the target thinks, or does not; `None` leaves it as it is."""
    if thinking is not None:
        tokenizer.chat_template = template_that_thinks(tokenizer, thinking)


def add_dtype(parser: argparse._ActionsContainer, default: str = "auto") -> None:
    """Add `--dtype`, which [`dtype_named`] reads."""
    words = "of the target; auto is its checkpoint's, or float32 for the default target (default: %(default)s)"
    parser.add_argument("--dtype", choices=DTYPES, default=default, help=words)


def dtype_named(name: str) -> torch.dtype | str:
    """What a command line calls a dtype; `"auto"` stays."""
    return name if name == "auto" else getattr(torch, name)


def add_device(parser: argparse._ActionsContainer) -> None:
    """Add `--device`, the best one of this machine if it is not said."""
    parser.add_argument(
        "--device", default=str(best_device()), help="where to run (default: %(default)s, the best here)"
    )


def load_target(
    name: str | None, dtype: torch.dtype | str, device_map: str | dict | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A target and its tokenizer by folder or Hub id; the default target if there is no name. Of a multimodal one the
    text model alone, where transformers has a class for that.
    """
    if name is None:
        return load_default_target(dtype=torch.float32 if dtype == "auto" else dtype)
    kind = auto_class(AutoConfig.from_pretrained(name))
    target = kind.from_pretrained(name, dtype=dtype, device_map=device_map)
    return target, AutoTokenizer.from_pretrained(name)


def load_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TreeDrafter]:
    """
    The target, its tokenizer and a drafter that fits it, as the command line names them; look-ups join the drafter's
    trees unless `--no-lookup` says otherwise.

    Raises:
        ImportError: No drafter is named and the default one is not there.
        ValueError: The drafter is for another target, or none is named for one that is.
    """
    if args.target and not args.drafter:
        raise ValueError(
            f"no drafter is named for {args.target}; `specblock find {args.target}` lists those that there are, and "
            f"`specblock doctor {args.target}` times the one that fits."
        )
    drafter_path = args.drafter or find_default_drafter()
    target, tokenizer = load_target(args.target, dtype_named(args.dtype))
    tell_thinking(tokenizer, args.thinking)
    # The drafter keeps its checkpoint's dtype: it never decides a token, and half the bytes are half the time.
    drafter = AutoDrafter.from_pretrained(drafter_path, target=target, dtype="auto").eval().to(args.device)
    if args.lookup:
        drafter = JoinedDrafter(drafter, LookupDrafter(target.config))
    if args.plan:
        nodes, forwards, starts = args.plan
        drafter.drafting_plan = DraftingPlan(nodes, forwards, starts or None)
    return target.to(args.device), tokenizer, drafter


@dataclass(frozen=True)
class Answer:
    """
    One finished `generate()` call.

    Args:
        ids (`torch.LongTensor` of shape `[1, T + n]`): Prompt and answer.
        new_tokens (`int`): n.
        seconds (`float`): Wall time of the call, prompt included.
        statistics ([`GenerationStatistics`]): Of the drafter; empty without one.
    """

    ids: torch.LongTensor
    new_tokens: int
    seconds: float
    statistics: GenerationStatistics

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, device: torch.device) -> torch.LongTensor:
    """The prompt's ids `[1, T]`: one user turn of the chat template, or the bare text for a tokenizer without one."""
    return torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": prompt}])], device=device)


def ask(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: torch.LongTensor,
    drafter: TreeDrafter | None = None,
    stream: bool = True,
    **generate_kwargs,
) -> Answer:
    """
    Answer one prompt, printed while it is made.

    Args:
        target ([`~transformers.PreTrainedModel`]): The model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompt_ids (`torch.LongTensor` of shape `[1, T]`): From [`encode`].
        drafter ([`TreeDrafter`], *optional*): Without one it is plain `generate()`.
        stream (`bool`, *optional*, defaults to `True`): Print the text.
        **generate_kwargs: For `generate()`, another streamer among them.
    """
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    settings = {"attention_mask": torch.ones_like(prompt_ids), "assistant_model": drafter, "streamer": streamer}
    ids, seconds = timed(target.device, lambda: target.generate(prompt_ids, **(settings | generate_kwargs)))
    statistics = GenerationStatistics()
    if drafter is not None and drafter.last_statistics is not None:
        statistics = drafter.last_statistics
    return Answer(ids, ids.shape[1] - prompt_ids.shape[1], seconds, statistics)

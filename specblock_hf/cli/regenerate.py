# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`specblock regenerate`: a target's own answers to prompts, which is what a drafter is trained on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.suites import SUITES
from ..data.template import PromptStyle
from ..regeneration.answer_file import AnswerFile
from ..regeneration.answering import Answering, Prompt, groups_of, without_refills
from ..regeneration.prompts import Shares, evaluation_digests, read_prompts
from ..regeneration.server import ENGINES, Server, ServerAnswering
from ..target.recurrent import is_recurrent
from .default_target import DEFAULT_TARGET
from .models import add_dtype, add_thinking, dtype_named, load_target, tell_thinking
from .options import given, refuse_below_one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's options."""
    add = parser.add_argument
    add("--target", help="folder or Hub id (default: the default target, from a wheel)")
    add(
        "--prompts",
        nargs="+",
        action="extend",
        required=True,
        metavar="SOURCE",
        help="JSON lines (prompt, question, instruction, messages or conversations), a folder of them, a data set on "
        "the Hub as owner/name[/subset][:split], or sharegpt",
    )
    add("--output", required=True, metavar="DIR", help="folder for the answers; a run there goes on")
    add_thinking(parser)
    add("--max-new-tokens", type=int, default=320, help="longest answer (default: %(default)s)")
    add("--answers", type=int, default=1, help="answers to every prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="of sampled answers; 0: all are greedy (default: %(default)s)")
    add(
        "--greedy-share",
        type=float,
        default=0.0,
        help="share of the prompts whose first answer is greedy all the same (default: %(default)s)",
    )
    add(
        "--exclude",
        nargs="+",
        action="extend",
        default=[],
        metavar="SOURCE",
        help="leave out prompts that stand in these sources, too, or in a package's suite "
        f"({', '.join(SUITES)}); HumanEval, MT-Bench and GSM8K's test questions always are left out",
    )
    add("--limit", type=int, help="answer the first so many prompts only")
    add("--seed", type=int, default=0, help="of sampled answers and of the order (default: %(default)s)")
    here = parser.add_argument_group("answering here; several processes under `accelerate launch` share the prompts")
    here.add_argument("--batch-size", type=int, default=128, help="most prompts at once (default: %(default)s)")
    here.add_argument("--batch-tokens", type=int, default=65536, help="most tokens of their cache (%(default)s)")
    add_dtype(here, "bfloat16")
    here.add_argument("--device", help="where to run (default: this process's GPU, or cpu)")
    there = parser.add_argument_group("asking a server instead that speaks OpenAI's chat protocol")
    there.add_argument("--server", metavar="URL", help="up to and including /v1")
    add_server_arguments(there)


def add_server_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options that only a server has."""
    add = group.add_argument
    add("--model", help="its name for the target (default: the name of --target)")
    add("--engine", choices=list(ENGINES), default="openai", help="what it is (default: %(default)s)")
    add("--api-key", help="bearer token, if it wants one")
    add("--in-flight", type=int, default=64, help="requests at a time (default: %(default)s)")
    add("--tries", type=int, default=8, help="of every request (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Answer every prompt that has no answer in the output folder yet."""
    shares = Shares(args.answers, args.temperature, args.greedy_share)
    refuse_below_one(args, "max_new_tokens", "batch_size", "batch_tokens", "in_flight", "tries", "limit")
    if args.server is None and (of_a_server := given(args, add_server_arguments)):
        raise ValueError(
            f"{', '.join(of_a_server)} would be ignored, because no server is asked; name it with --server, or leave "
            "them out."
        )
    state = PartialState(cpu=args.device == "cpu" or args.server is not None)
    answers = AnswerFile(Path(args.output), state.process_index, state.num_processes)
    try:
        _run(args, shares, state, answers)
    finally:
        answers.close()
        if state.num_processes > 1:
            state.destroy_process_group()


def _run(args: argparse.Namespace, shares: Shares, state: PartialState, answers: AnswerFile) -> None:
    target = None
    if args.server is None or args.target is None:
        target, tokenizer = load_target(args.target, dtype_named(args.dtype))
        config, settings = target.config, target.generation_config
    else:
        config, tokenizer = AutoConfig.from_pretrained(args.target), AutoTokenizer.from_pretrained(args.target)
        settings = load_settings(args.target, config)
    tell_thinking(tokenizer, args.thinking)
    name, context = args.target or DEFAULT_TARGET, config.get_text_config().max_position_embeddings
    if args.max_new_tokens >= context:
        raise ValueError(
            f"--max-new-tokens is {args.max_new_tokens}, which leaves no room for a prompt in the {context} tokens "
            "that the target can read; give fewer."
        )
    style = PromptStyle.of(tokenizer)
    answers.claim(
        {
            "target": Path(name).as_posix(),  # however a folder's name ends
            "chat_template": style.chat_template,
            "thinking": style.thinking,
            "max_new_tokens": args.max_new_tokens,
        }
    )
    stop_ids = stop_ids_of(settings, tokenizer)
    prompts, left_out = read_prompts(
        args.prompts,
        tokenizer,
        evaluation_digests(args.exclude),
        context - args.max_new_tokens,
        shares,
        args.limit,
        state.process_index,
        state.num_processes,
    )
    answered = answers.answered()
    missing = [prompt for prompt in prompts if prompt.name not in answered]
    if state.is_main_process:
        tqdm.write(heading(len(prompts), len(missing), left_out, state.num_processes))
    shown = state.is_main_process and not args.quiet
    cut = 0
    with Progress(len(prompts), len(missing), args.max_new_tokens, shown) as progress:

        def finished(pairs: list[tuple[Prompt, list[int]]]) -> None:
            nonlocal cut
            cut += sum(stop_ids.isdisjoint(answer[-1:]) for _, answer in pairs)
            answers.append(answer_rows(tokenizer, pairs))
            progress.add(len(pairs))

        def arrived(pairs: list[tuple[Prompt, list[int]]]) -> None:
            progress.write(sum(len(answer) for _, answer in pairs))
            finished(pairs)

        if args.server is not None:
            server = Server(
                args.server,
                args.model or name,
                args.engine,
                args.api_key,
                args.in_flight,
                args.tries,
                thinking=args.thinking,
            )
            asking = ServerAnswering(server, tokenizer, args.max_new_tokens, stop_ids, args.seed)
            asking.ask(missing, arrived)
            report(asking)
        else:
            target = target.to(args.device or state.device).eval()
            groups = groups_of(missing, args.batch_size, args.batch_tokens, args.max_new_tokens, args.seed)
            for pairs in answer_groups(target, groups, args.max_new_tokens, stop_ids, args.seed, progress.write):
                finished(pairs)
    if cut:
        tqdm.write(f"{cut} of {progress.done} answers stopped at --max-new-tokens {args.max_new_tokens}")


def answer_groups(
    target: PreTrainedModel,
    groups: Iterable[tuple[int, list[Prompt]]],
    max_new_tokens: int,
    stop_ids: set[int],
    seed: int = 0,
    written: Callable[[int], None] = lambda tokens: None,
) -> Iterator[list[tuple[Prompt, list[int]]]]:
    """
    Answers of one group after the other, as they are finished.

    Args:
        target ([`~transformers.PreTrainedModel`]): Who answers.
        groups (iterable of `tuple[int, list[Prompt]]`): From [`groups_of`].
        max_new_tokens (`int`): Longest answer.
        stop_ids (`set[int]`): Tokens that end an answer.
        seed (`int`, *optional*, defaults to 0): Of sampled answers.
        written (`Callable`, *optional*): Told how many tokens each forward has added.
    """
    refills = not is_recurrent(target)
    for slots, prompts in groups if refills else without_refills(groups):
        longest = max(len(prompt.input_ids) for prompt in prompts)
        yield from Answering(target, slots, longest, max_new_tokens, stop_ids, seed, written, refills)(prompts)


def load_settings(name: str, config: PreTrainedConfig) -> GenerationConfig:
    """The generation configuration of a model whose weights are not loaded; what `config` implies if it has none."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(config)


def stop_ids_of(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that end an answer, by the generation configuration and the tokenizer."""
    configured = settings.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return {token for token in (*listed, tokenizer.eos_token_id) if token is not None}


def answer_rows(tokenizer: PreTrainedTokenizerBase, pairs: Iterable[tuple[Prompt, list[int]]]) -> Iterator[dict]:
    """The rows that [`load_examples`] reads."""
    for prompt, ids in pairs:
        yield {
            "prompt": prompt.given,
            "source": prompt.source,
            "answer": tokenizer.decode(ids, skip_special_tokens=True),
            "prompt_ids": prompt.input_ids,  # a template may have the day in it, and training may be another day
            "answer_ids": ids,
            "temperature": prompt.temperature,
            "sample": prompt.sample,
        }


def heading(wanted: int, missing: int, left_out: dict[str, int], processes: int) -> str:
    """What a run is about to do, in one line."""
    reasons = ", ".join(f"{count} left out as {reason}" for reason, count in sorted(left_out.items()))
    share = f" (this is the first of {processes} processes)" if processes > 1 else ""
    return (
        f"{wanted} answers wanted{share}, {wanted - missing} of them there already; {reasons or 'no prompt left out'}"
    )


def report(asking: ServerAnswering) -> None:
    """Say what a server would not answer, and whether its texts are the tokens that it generated."""
    if asking.refused:
        tqdm.write(f"{len(asking.refused)} prompts were refused by the server; the first: {asking.refused[0]}")
    if asking.retokenised:
        tqdm.write(
            f"{asking.retokenised} of {asking.answered} answers have another number of tokens than the server "
            "generated; an engine that gives token ids (vllm) avoids that."
        )


class Progress:
    """
    The bar: tokens written, how many there will be, time left, and answers made. An answer is taken to be as long as
    those that are done, and while few are, as long as it may get.

    Args:
        wanted (`int`): Answers that there shall be.
        missing (`int`): How many of them are not there yet.
        longest (`int`): Most tokens of an answer.
        shown (`bool`): Whether this process shows it.
    """

    def __init__(self, wanted: int, missing: int, longest: int, shown: bool):
        self.wanted = wanted
        self.missing = missing
        self.longest = longest
        self.done = 0
        self.bar = tqdm(total=missing * longest, desc="answers", unit="tok", smoothing=0, disable=not shown)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.close()

    def write(self, tokens: int) -> None:
        """Note tokens of answers, finished or not."""
        self.bar.update(tokens)

    def add(self, count: int) -> None:
        """Note finished answers, whose tokens have been noted."""
        self.done += count
        self.bar.total = max(self.bar.n, round(self.missing * min(self.longest, self.bar.n / self.done)))
        self.bar.set_postfix_str(f"{self.wanted - self.missing + self.done} of {self.wanted} answers")

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding loop, and the hook that lets `target.generate(assistant_model=drafter)` reach it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE
from ..devices import without_cudnn_attention
from ..drafting.attachment import refusing
from ..drafting.drafter import DraftingCall, DraftState, TreeDrafter
from ..drafting.pairs import Pairs
from ..drafting.plan import DraftingPlan, Limits, round_limits
from ..drafting.proposal import propose, scored_nodes
from ..drafting.statistics import Clock, GenerationStatistics
from ..target.cache import is_users
from ..target.model import TargetModel
from ..trees.rejection_sampling import SampledVerifier
from ..trees.tree import DraftTree
from ..trees.verification import Verifier, sample_and_walk
from .callbacks import Listeners
from .requests import drafting_plan
from .token_selector import TokenChoice


if TYPE_CHECKING:
    from .compilation import CompiledRounds


@without_cudnn_attention
def draft(drafter: TreeDrafter, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
    """
    A tree within its limits for each row that may still draft, and a root for the others. Those have stopped, or have
    one token left, or never were to draft, and will not again: the drafter does not hear of them any more.

    Args:
        drafter ([`TreeDrafter`]): Held by its lock while it drafts.
        state ([`DraftState`]): Of the call.
        pairs ([`Pairs`]): What the last round taught, of all rows of the batch.
        limits ([`Limits`]): Of all rows of the batch.
    """
    rows = [row for row, nodes in enumerate(limits.nodes) if nodes]
    if rows and len(rows) == len(limits.nodes):
        return propose(drafter, state, pairs, limits)
    roots = pairs.last_tokens()
    if not rows:
        return DraftTree.root(roots)
    if len(rows) < state.batch_size:
        state.keep_rows([state.drafting.index(row) for row in rows])
    return propose(drafter, state, pairs.of_rows(rows), limits.of_rows(rows)).scatter_rows(rows, roots)


def decode(
    target: TargetModel,
    drafter: TreeDrafter,
    choice: TokenChoice,
    plan: DraftingPlan,
    verify: Verifier = sample_and_walk,
    compiled: CompiledRounds | None = None,
) -> GenerationStatistics:
    """
    Draft, verify, commit, until every row has stopped (Algorithm 1 of https://huggingface.co/papers/2605.07243).

    Args:
        target ([`TargetModel`]): Before its prefill.
        drafter ([`TreeDrafter`]): Held by its lock while it drafts.
        choice ([`TokenChoice`]): Chooses, stops and keeps the tokens.
        plan ([`DraftingPlan`]): How much a round drafts.
        verify ([`Verifier`], *optional*, defaults to [`sample_and_walk`]): The rule that accepts drafted tokens.
        compiled ([`CompiledRounds`], *optional*): Lent to this call; the target has its part already.

    Returns:
        [`GenerationStatistics`]: Of this call.
    """
    clock, statistics = Clock(target.device), GenerationStatistics()
    batch_size = target.base.shape[0]
    listeners = Listeners(drafter.callbacks)
    call = DraftingCall(drafter, target.table, batch_size, statistics, target.version() if drafter.callbacks else 0)
    listeners.on_generate_begin(call)
    state = drafter.begin(
        target.table,
        batch_size,
        int(target.base.max()) + max(choice.remaining),
        first_position=target.first_position(),
    )
    state.warp = choice.warp
    if compiled is not None:
        compiled.attach(state)
    chunks = target.prefill()
    scored, pairs = next(chunks)
    for chunk in chunks:
        if pairs.tokens.shape[1]:  # a mask may hide all of a chunk
            with drafter.lock, without_cudnn_attention:
                drafter.extend(state, pairs)
            listeners.on_prompt(call, pairs)
        scored, pairs = chunk
    # The first token comes from a tree that is nothing but the prompt's last token.
    tree = DraftTree.root(pairs.tokens[:, -1])
    read = choice.observe(tree, scored.logits, scored.rows)
    walk = verify(read, [True] * batch_size, choice.select, choice.stop)
    pairs = target.close_prompt(pairs, walk)
    target.commit(walk)
    statistics.emitted = int(walk.lengths.sum())
    listeners.on_prompt(call, pairs)
    listeners.on_commit(call, tree, scored, walk, pairs)
    clock.lap("prefill")

    active = [not stopped for stopped in walk.stopped.tolist()]
    while any(active):
        limits = round_limits(plan, choice.remaining, target.room(), target.depth())
        if target.pauses():
            with drafter.lock, without_cudnn_attention:
                drafter.extend(state, pairs.of_rows(state.drafting))
        tree = target.scorable(draft(drafter, state, pairs, limits).keep_likely(plan.min_probability))
        listeners.on_draft(call, tree)
        clock.lap("draft")
        scored = target.score(tree)
        clock.lap("verify")
        listeners.on_verify(call, tree, scored)
        read = scored_nodes(choice.observe(tree, scored.logits, scored.rows))
        walk = verify(read, active, choice.select, choice.stop)
        pairs = Pairs.of(tree, scored.features, walk, target.base, target.table)
        target.commit(walk)
        statistics.add_round(tree, walk, len(scored.rows))
        listeners.on_commit(call, tree, scored, walk, pairs)
        active = [is_active and not stopped for is_active, stopped in zip(active, walk.stopped.tolist(), strict=True)]
        clock.lap("host")

    target.finish()
    statistics.target_calls, statistics.compiled_rounds = target.calls, target.compiled_calls
    statistics.drafter_calls, statistics.drafter_rows = state.calls, state.forward_rows
    clock.write_to(statistics)
    listeners.on_generate_end(call)
    return statistics


def generate_with_drafter(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    input_ids: torch.LongTensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.LongTensor:
    """
    The decoding method that `generate()` runs for a [`TreeDrafter`]; the arguments are those of transformers' own
    methods.

    Raises:
        ValueError: As [`TokenChoice`] and [`TargetModel`] do.
    """
    # As it comes out of plain decoding, which appends to it.
    input_ids = input_ids.long()
    # All ones: `generate()` dropped the mask and noted its length, unless it knows of no mask.
    mask_length = vars(generation_config).get("_mask_length") if model_kwargs.get("attention_mask") is None else None
    with ExitStack() as call:
        with refusing(drafter):
            choice = TokenChoice(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
            returns_cache = generation_config.return_dict_in_generate or is_users(model_kwargs[CACHE])
            # Their cache is not the call's to give away.
            rounds, compiled = None if returns_cache else drafter.compiled_rounds, None
            if rounds is not None:
                compiled = call.enter_context(rounds.lend(target, input_ids, model_kwargs, max(choice.remaining)))
            scorer = call.enter_context(
                TargetModel(
                    target,
                    drafter.feature_layers_for(target),
                    input_ids,
                    model_kwargs,
                    mask_length,
                    generation_config.prefill_chunk_size,
                    returns_cache,
                    compiled and compiled.target,
                )
            )
            scorer.check_length(max(choice.remaining))
            plan = drafting_plan(drafter, generation_config, scorer.device)
            # A chain is cut out by likelihood, by which a drawn tree must not be cut.
            if not generation_config.do_sample or scorer.chains_only:
                plan = replace(plan, draft_sampling="topk", verification=None)
            verify = sample_and_walk if plan.rule == "walk" else SampledVerifier(choice.distributions(), plan.rule)
        drafter.last_statistics = decode(scorer, drafter, choice, plan, verify, compiled)
    return choice.output(scorer.cache, scorer.token_outputs())

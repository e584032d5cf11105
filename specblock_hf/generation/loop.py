# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The decoding loop, and the hook that lets `target.generate(assistant_model=drafter)` reach it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.streamers import BaseStreamer

from ..compat import CACHE
from ..drafting.attachment import refusing
from ..drafting.drafter import DraftingCall, TreeDrafter
from ..drafting.pairs import TokenTable
from ..drafting.pilot import AutoPilot, Pilot, fixed_plan
from ..drafting.proposal import scored_nodes
from ..drafting.statistics import Clock, GenerationStatistics
from ..target.cache import is_users
from ..target.masks import TreeMasks
from ..target.model import TargetModel
from ..trees.rejection_sampling import SampledVerifier
from ..trees.tree import DraftTree
from ..trees.verification import Verifier, sample_and_walk
from .callbacks import tell
from .compilation import lend
from .requests import drafting_plan
from .rounds.drafts import Drafts, EagerDrafts
from .rounds.lending import Lent, Request
from .token_selector import TokenChoice


def decode(
    target: TargetModel,
    drafter: TreeDrafter,
    choice: TokenChoice,
    pilot: Pilot,
    verify: Verifier = sample_and_walk,
    lent: Lent | None = None,
) -> GenerationStatistics:
    """
    Draft, verify, commit, until every row has stopped (Algorithm 1 of https://huggingface.co/papers/2605.07243).

    Args:
        target ([`TargetModel`]): Before its prefill.
        drafter ([`TreeDrafter`]): Held by its lock while it drafts.
        choice ([`TokenChoice`]): Chooses, stops and keeps the tokens.
        pilot ([`Pilot`]): How much each round drafts.
        verify ([`Verifier`], *optional*, defaults to [`sample_and_walk`]): The rule that accepts drafted tokens.
        lent ([`Lent`], *optional*): Buffers of this call; the target has its part already.

    Returns:
        [`GenerationStatistics`]: Of this call.
    """
    lent = Lent() if lent is None else lent
    clock, statistics = Clock(target.device), GenerationStatistics(eager_because=lent.reason)
    batch_size = target.base.shape[0]
    callbacks = drafter.callbacks
    call = DraftingCall(drafter, target.table, batch_size, statistics, target.version() if callbacks else 0)
    tell(callbacks, "on_generate_begin", call)
    drafts = _drafts(target, drafter, choice, lent, bool(callbacks))
    chunks = target.prefill()
    # Until the first token is chosen nobody has seen anything of the call.
    with refusing(drafter):
        scored, pairs = next(chunks)
        for chunk in chunks:
            if pairs.tokens.shape[1]:  # a mask may hide all of a chunk
                drafts.extend(pairs)
                tell(callbacks, "on_prompt", call, pairs)
            scored, pairs = chunk
    # The first token comes from a tree that is nothing but the prompt's last token.
    tree = DraftTree.root(pairs.tokens[:, -1])
    read = choice.observe(tree, scored.logits, scored.rows)
    walk = verify(read, [True] * batch_size, choice.select, choice.stop)
    pairs = target.close_prompt(pairs, walk)
    target.commit(walk)
    statistics.emitted = int(walk.lengths.sum())
    tell(callbacks, "on_prompt", call, pairs)
    tell(callbacks, "on_commit", call, tree, scored, walk, pairs)
    clock.lap("prefill")

    active = [not stopped for stopped in walk.stopped.tolist()]
    while any(active):
        limits = pilot.limits(choice.remaining, target.room(), target.depth())
        if target.pauses():
            drafts.extend(pairs)
        tree = target.scorable(pilot.cut(drafts.propose(pairs, limits), trim=not target.fixed))
        tell(callbacks, "on_draft", call, tree)
        clock.lap("draft")
        scored = target.score(tree)
        clock.lap("verify")
        tell(callbacks, "on_verify", call, tree, scored)
        on_device = choice.is_greedy and verify is sample_and_walk
        read, walk = tree, target.greedy_walk(active, choice.stop) if on_device else None
        if walk is None:
            read = scored_nodes(choice.observe(tree, scored.logits, scored.rows))
            walk = verify(read, active, choice.select, choice.stop)
        pairs = target.settle(tree, scored, walk)
        statistics.add_round(tree, walk, len(scored.rows))
        settled = target.settled and drafts.settled
        pilot.record(read, walk, active, drafts.state, clock, target.columns, settled)
        tell(callbacks, "on_commit", call, tree, scored, walk, pairs)
        active = [is_active and not stopped for is_active, stopped in zip(active, walk.stopped.tolist(), strict=True)]
        clock.lap("host")

    target.finish()
    statistics.target_calls, statistics.compiled_rounds = target.calls, target.compiled_calls
    statistics.captured_rounds, statistics.captured_drafts = target.captured_calls, drafts.captured
    statistics.drafter_calls, statistics.drafter_rows = drafts.calls, drafts.rows
    statistics.prepacked = target.prepacked
    clock.write_to(statistics)
    statistics.plan = pilot.describe()
    tell(callbacks, "on_generate_end", call)
    return statistics


def _drafts(target: TargetModel, drafter: TreeDrafter, choice: TokenChoice, lent: Lent, keeps: bool) -> Drafts:
    """Where the trees of a call come from."""
    if lent.drafts is not None:
        return lent.drafts.begin(keeps)
    state = drafter.begin(
        target.table,
        target.base.shape[0],
        int(target.base.max()) + max(choice.remaining),
        first_position=target.first_position(),
    )
    state.warp = choice.warp
    return EagerDrafts(drafter, state)


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
            device = TokenTable.of(target).device
            chosen = drafting_plan(target, drafter, generation_config)
            plan = fixed_plan(chosen, drafter, device)
            # A chain is cut out by likelihood, by which a drawn tree must not be cut.
            if not generation_config.do_sample or TreeMasks(target).chains_only:
                plan = replace(plan, draft_sampling="topk", verification=None)
            verify = sample_and_walk if plan.rule == "walk" else SampledVerifier(choice.distributions(), plan.rule)
            most, chunk_size = max(choice.remaining), generation_config.prefill_chunk_size
            request = Request.of_call(target, drafter, plan, input_ids, model_kwargs, most, returns_cache)
            lent = call.enter_context(lend(request))
            inputs = (input_ids, model_kwargs, mask_length, chunk_size, returns_cache, plan.tree_budget)
            scorer = call.enter_context(lent.target_model(target, drafter, *inputs))
            scorer.check_length(most)
            pilot = Pilot(plan)
            if chosen == "auto":
                call_of = (drafter, target, device, len(input_ids), generation_config.do_sample)
                pilot = AutoPilot.of_call(*call_of, lent.sizes, lent.plan)
        drafter.last_statistics = decode(scorer, drafter, choice, pilot, verify, lent)
    return choice.output(scorer.cache, scorer.token_outputs())

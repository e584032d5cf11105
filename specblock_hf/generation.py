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
"""The decoding loop, and the hook that lets `target.generate(assistant_model=drafter)` reach it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import replace
from functools import wraps
from inspect import unwrap
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode
from transformers.generation.streamers import BaseStreamer

from .callbacks import DraftingCall, Listeners
from .choice import TokenChoice
from .compat import CACHE
from .devices import without_cudnn_attention
from .drafter import DraftingPlan, DraftState, Limits, Pairs, TokenTable, TreeDrafter
from .proposal import propose, scored_nodes
from .sampled_verification import SampledVerifier
from .statistics import Clock, GenerationStatistics
from .target import TargetModel
from .target_cache import is_users
from .target_checks import check_target
from .tree import DraftTree
from .verification import Verifier, sample_and_walk


if TYPE_CHECKING:
    from .compilation import CompiledRounds


# Sources of drafts that `generate()` has itself, and its lossy verification. Together with a drafter they would be
# ignored.
RIVAL_OPTIONS = (
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "use_mtp",
)


def drafting_plan(drafter: TreeDrafter, generation_config: GenerationConfig, device: torch.device) -> DraftingPlan:
    """
    How much the rounds of a call draft: what the call's `generation_config.drafting_plan` says, otherwise what the
    drafter was given or calibrated to, otherwise its default for the device.
    """
    # A field of ours, which a configuration has only where somebody set it.
    return vars(generation_config).get("drafting_plan") or drafter.drafting_plan or drafter.default_plan(device)


def round_limits(
    plan: DraftingPlan, remaining: Sequence[int], room: int | None = None, depth: int | None = None
) -> Limits:
    """
    How large a round's tree may be.

    Args:
        plan ([`DraftingPlan`]): What a round may cost.
        remaining (sequence of `int`):
            Tokens that each row may still emit; the last of them is always the target's own.
        room (`int`, *optional*): Nodes that the target's cache has room for, the root counted.
        depth (`int`, *optional*): Most levels below the root that the target can verify.

    Returns:
        [`Limits`]: No drafts for a row that has one token left.
    """
    depths = tuple(max(tokens - 1, 0) if depth is None else min(max(tokens - 1, 0), depth) for tokens in remaining)
    most = plan.tree_budget if room is None else min(plan.tree_budget, max(room - 1, 0))
    nodes = tuple(most if depth else 0 for depth in depths)
    return Limits(nodes, depths, plan.num_forwards, plan.max_starts, plan.min_start_probability, plan.draft_sampling)


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
    return propose(drafter, state, pairs.of_rows(rows), limits.of_rows(rows)).spread(rows, roots)


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
    call = DraftingCall(drafter, target.table, batch_size, statistics)
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
        with drafter.lock, without_cudnn_attention:
            drafter.extend(state, pairs)
        listeners.on_prompt(call, pairs)
        scored, pairs = chunk
    # The first token comes from a tree that is nothing but the prompt's last token.
    tree = DraftTree.root(pairs.tokens[:, -1])
    read = choice.see(tree, scored.logits, scored.rows)
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
            with drafter.lock:
                drafter.extend(state, pairs)
        tree = target.scorable(draft(drafter, state, pairs, limits).worth(plan.min_probability))
        listeners.on_draft(call, tree)
        clock.lap("draft")
        scored = target.score(tree)
        clock.lap("verify")
        listeners.on_verify(call, tree, scored)
        read = scored_nodes(choice.see(tree, scored.logits, scored.rows))
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
    choice = TokenChoice(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    returns_cache = generation_config.return_dict_in_generate or is_users(model_kwargs[CACHE])
    # Their cache is not the call's to give away.
    rounds = None if returns_cache else drafter.compiled_rounds
    with (
        rounds.lend(target, input_ids, model_kwargs, max(choice.remaining)) if rounds else nullcontext() as compiled,
        TargetModel(
            target,
            drafter.feature_layers_for(target),
            input_ids,
            model_kwargs,
            mask_length,
            generation_config.prefill_chunk_size,
            returns_cache,
            compiled and compiled.target,
        ) as scorer,
    ):
        scorer.check_length(max(choice.remaining))
        plan = drafting_plan(drafter, generation_config, scorer.device)
        # A chain is cut out by likelihood, by which a drawn tree must not be cut.
        if not generation_config.do_sample or scorer.chains_only:
            plan = replace(plan, draft_sampling="topk", verification=None)
        verify = sample_and_walk if plan.rule == "walk" else SampledVerifier(choice.laws(), plan.rule)
        drafter.last_statistics = decode(scorer, drafter, choice, plan, verify, compiled)
    return choice.output(scorer.cache, scorer.token_outputs())


def check_request(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    mode: GenerationMode,
    generation_config: GenerationConfig,
    mode_kwargs: dict[str, Any],
) -> None:
    """
    Refuse what cannot be decoded exactly with a drafter, before any work.

    Raises:
        ValueError: In one sentence: what, why and what to do.
    """
    check_target(target)
    drafter.check_target(target)
    if mode != GenerationMode.ASSISTED_GENERATION:
        raise ValueError(
            "a tree drafter speeds up greedy decoding and sampling and this call asks for "
            f"{mode.value.replace('_', ' ')}; set num_beams=1 and leave out penalty_alpha, dola_layers and "
            "constraints, or drop assistant_model."
        )
    rivals = [option for option in RIVAL_OPTIONS if getattr(generation_config, option)]
    if rivals:
        raise ValueError(
            f"{rivals[0]} would be ignored next to a tree drafter; set it to None, or drop assistant_model."
        )
    plan = drafting_plan(drafter, generation_config, TokenTable.of(target).device)
    if generation_config.do_sample and plan.draft_sampling != "topk" and not drafter.can_sample:
        raise ValueError(
            f"{drafter.label} drafts the likeliest tokens only and the drafting plan asks for drawn ones; leave out "
            f"draft_sampling={plan.draft_sampling!r}."
        )
    if generation_config.use_cache is False:
        raise ValueError(
            "draft trees are verified against the target's cache, which this call or the target's configuration turns "
            "off; pass use_cache=True."
        )
    if generation_config.cache_implementation not in (None, "dynamic", "static"):
        raise ValueError(
            f"cache_implementation={generation_config.cache_implementation!r} keeps rows that a draft tree cannot "
            'rearrange; leave it out or pass "dynamic" or "static".'
        )
    if mode_kwargs.get("synced_gpus"):
        raise ValueError(
            "synced_gpus needs the same number of forwards on every device and rounds of a tree drafter differ; drop "
            "assistant_model."
        )


def install() -> None:
    """
    Let `generate(assistant_model=drafter)` run [`TreeDrafter`]s, by wrapping two methods of
    [`~transformers.GenerationMixin`]. Everything else passes through untouched. Importing the package does this;
    calling it again does nothing. A package that is imported afresh has drafters of a class of its own, for which it
    wraps what it finds; those made before keep what was wrapped for them.
    """
    for name, wrap in (("_validate_generation_mode", _wrap_validate), ("_assisted_decoding", _wrap_assisted_decoding)):
        method = getattr(GenerationMixin, name)
        if not _leads_to_ours(method):
            wrapper = wrap(method, TreeDrafter)
            wrapper._specblock_hook = (wrapper, TreeDrafter)
            setattr(GenerationMixin, name, wrapper)


def is_installed() -> bool:
    """Whether `generate()` runs [`TreeDrafter`]s, others' wrappers around ours included."""
    methods = (GenerationMixin._validate_generation_mode, GenerationMixin._assisted_decoding)
    return all(map(_leads_to_ours, methods))


def uninstall() -> None:
    """
    Give [`~transformers.GenerationMixin`] its own methods back. Where someone has wrapped ours since, both stay:
    ours cannot be taken out from under theirs.
    """
    for name in ("_validate_generation_mode", "_assisted_decoding"):
        method = getattr(GenerationMixin, name)
        while _drafters_of(method) is not None:
            method = method.__wrapped__
        setattr(GenerationMixin, name, method)


def _drafters_of(method: Any) -> type | None:
    """The drafters that a method was wrapped for, by this package or by one that was imported before it."""
    hook, drafters = method.__dict__.get("_specblock_hook", (None, None))
    # Compared with itself, because `functools.wraps` copies the mark onto wrappers around ours.
    return drafters if hook is method else None


def _is_ours(method: Any) -> bool:
    return _drafters_of(method) is TreeDrafter


def _leads_to_ours(method: Any) -> bool:
    return _is_ours(unwrap(method, stop=_is_ours))


def _wrap_validate(original: Any, drafters: type) -> Any:
    @wraps(original)
    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        drafter = generation_mode_kwargs.get("assistant_model")
        if isinstance(drafter, drafters):
            check_request(self, drafter, generation_mode, generation_config, generation_mode_kwargs)
            # Several sequences of a prompt are a batch like any other, which transformers' own assistants cannot take.
            generation_config = copy(generation_config)
            generation_config.num_return_sequences = 1
        return original(self, generation_mode, generation_config, generation_mode_kwargs)

    return _validate_generation_mode


def _wrap_assisted_decoding(original: Any, drafters: type) -> Any:
    @wraps(original)
    def _assisted_decoding(self, input_ids, *args, assistant_model=None, **kwargs):
        if not isinstance(assistant_model, drafters):
            return original(self, input_ids, *args, assistant_model=assistant_model, **kwargs)
        for ignored in ("synced_gpus", "inputs_tensor", "assistant_tokenizer", "tokenizer"):
            kwargs.pop(ignored, None)
        return generate_with_drafter(self, assistant_model, input_ids, *args, **kwargs)

    return _assisted_decoding

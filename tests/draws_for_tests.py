# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws random cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cases_for_tests import ABORTS, DAMAGES, EVENTS, LISTENERS, NETWORKS, SLIDING, Abort, Case, Dice, DrafterKind, Plan
from hybrids_for_tests import BOUNDED, HYBRIDS
from multimodal_for_tests import MULTIMODAL
from targets_for_tests import (
    EAGER_FAMILIES,
    FAMILIES,
    FLAGS,
    LIMIT,
    MOE_FAMILIES,
    ROPE_FAMILIES,
    ROPES,
    TIGHT_FAMILIES,
    WRAPS,
    TargetKind,
)
from third_parties_for_tests import FAULTS
from transformers import WatermarkingConfig


def _ids(dice: Dice, most: int) -> list[int]:
    return [dice.randint(1, 15) for _ in range(dice.randint(1, most))]


# What is forced (ids from 16 on) must not be forbidden as well (ids below).
OPTIONS: dict[str, Callable[[Dice], Any]] = {
    "bad_words_ids": lambda dice: [_ids(dice, 2) for _ in range(dice.randint(1, 4))],
    "begin_suppress_tokens": lambda dice: _ids(dice, 4),
    "encoder_no_repeat_ngram_size": lambda dice: dice.randint(1, 2),
    "encoder_repetition_penalty": lambda dice: dice.uniform(0.8, 1.8),
    "exponential_decay_length_penalty": lambda dice: (dice.randint(1, 9), dice.uniform(1.01, 1.6)),
    "forced_eos_token_id": lambda dice: dice.randint(16, 23),
    "guidance_scale": lambda dice: dice.uniform(1.1, 2.0),
    "min_new_tokens": lambda dice: dice.randint(1, 8),
    "no_repeat_ngram_size": lambda dice: dice.randint(2, 3),
    "prefill_chunk_size": lambda dice: dice.randint(1, 8),
    "remove_invalid_values": lambda dice: True,
    "renormalize_logits": lambda dice: True,
    "repetition_penalty": lambda dice: dice.uniform(0.8, 1.8),
    "sequence_bias": lambda dice: {(token,): dice.uniform(-5, 5) for token in _ids(dice, 4)},
    "suppress_tokens": lambda dice: _ids(dice, 4),
    "max_time": lambda dice: 1000.0,
    "watermarking_config": lambda dice: WatermarkingConfig(bias=dice.uniform(0.5, 4.0), context_width=1),
    "num_return_sequences": lambda dice: 2,
    # Refused.
    "num_beams": lambda dice: 2,
    "use_cache": lambda dice: False,
    "prompt_lookup_num_tokens": lambda dice: 3,
}
RARE = ("guidance_scale", "num_return_sequences", "num_beams", "use_cache", "prompt_lookup_num_tokens", "max_time")
SAMPLING: dict[str, Callable[[Dice], Any]] = {
    "epsilon_cutoff": lambda dice: dice.uniform(0.01, 0.1),
    "eta_cutoff": lambda dice: dice.uniform(0.01, 0.1),
    "min_p": lambda dice: dice.uniform(0.01, 0.3),
    "temperature": lambda dice: dice.uniform(0.3, 1.8),
    "top_h": lambda dice: dice.uniform(0.3, 0.9),
    "top_k": lambda dice: dice.randint(1, 24),
    "top_p": lambda dice: dice.uniform(0.3, 1.0),
    "typical_p": lambda dice: dice.uniform(0.3, 0.95),
}


# Kinds of targets, and how often each is drawn.
KINDS = {
    "usual": 25,
    "family": 16,
    "recurrent": 10,
    "rope": 14,
    "tight": 3,
    "multimodal": 10,
    "wrap": 9,
    "flag": 5,
    "mode": 4,
    "small": 4,
    "damage": 1,
}


def draw_case(seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Case:
    """The case of a seed, with a target of one of these kinds."""
    dice = Dice(seed)
    target = _target(dice, kinds)
    source = _source(dice, target)
    lengths = _lengths(dice, target, source)
    # Plain decoding goes on with the states of rows that have ended.
    once = target.is_recurrent and len(lengths) > 1
    turns = 1 if target.tight or once or source in ("embeds", "empty", "nothing") else dice.mostly(1, 0.4, 2, 3)
    abort = _abort(dice, turns, len(lengths)) if turns > 1 and dice.chance(0.5) else None
    cache = _cache(dice, target, turns, len(lengths))
    options = _options(dice, target, source, len(lengths), cache)
    returns: tuple[str, ...] = ()
    if dice.chance(0.05 if "static" in (cache, options.get("cache_implementation")) and len(lengths) > 1 else 0.4):
        kinds = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        returns = ("dict", *dice.mostly((), 0.3, *((kind,) for kind in kinds)))
    drafter = _drafter(dice, target)
    uncut = target.family in SLIDING or target.is_recurrent
    return Case(
        seed=seed,
        target=target,
        lengths=lengths,
        source=source,
        ids=dice.mostly("int64", 0.06, "int32"),
        mask=_mask(dice, source),
        positions=dice.mostly(0, 0.02, 1, 5) if len(lengths) == turns == 1 and source == "ids" else 0,
        turns=turns,
        more=dice.randint(1, 4),
        between=dice.mostly("", 0.2, *(["copy"] if uncut else ["copy", "crop"])) if cache else "",
        cache=cache,
        options=options,
        returns=returns,
        entry=dice.mostly("hook", 0.1, "custom_generate", "inference mode"),
        drafter=drafter,
        plan=_plan(dice, drafter, options["do_sample"]),
        abort=abort,
    )


def _target(dice: Dice, kinds: Sequence[str]) -> TargetKind:
    layers = dice.choice([2, 2, 3, 4])
    attention = dice.choice(["sdpa", "eager"])
    chosen = dice.choices(kinds, [KINDS[kind] for kind in kinds])[0]
    usual = dice.choice(["llama", "qwen3", "mistral", "gemma3"])
    if chosen == "family":
        family = dice.choice([family for family in FAMILIES if family not in HYBRIDS | BOUNDED])
        return TargetKind(family, layers, "eager" if family in EAGER_FAMILIES else attention)
    if chosen == "recurrent":
        return TargetKind(dice.choice([*HYBRIDS, *BOUNDED]), layers, attention)
    if chosen == "rope":
        family = dice.choice(ROPE_FAMILIES)
        rope = "longrope" if family == "phi3" else dice.choice(list(ROPES))
        return TargetKind(family, layers, attention, rope=rope)
    if chosen == "tight":
        family = dice.choice(TIGHT_FAMILIES)
        return TargetKind(family, layers, "eager" if family in EAGER_FAMILIES else attention, tight=True)
    if chosen == "multimodal":
        return TargetKind(dice.choice(list(MULTIMODAL)), 2, attention)
    if chosen == "wrap":
        wrap = dice.choice(WRAPS)
        family = "llama" if wrap == "adaption prompt" else dice.choice(["llama", "llama", "qwen3"])
        return TargetKind(family, layers, attention, wrap=wrap)
    if chosen == "flag":
        flag = dice.choice((*FLAGS, "output_router_logits"))
        family = dice.choice(MOE_FAMILIES) if flag == "output_router_logits" else usual
        return TargetKind(family, layers, "eager" if flag == "output_attentions" else attention, flag=flag)
    if chosen == "mode":
        family, wrap = dice.choice([("llama", ""), ("gpt2", ""), ("llama", "lora")])
        return TargetKind(family, layers, attention, wrap=wrap, mode=dice.choice(["train", "dropout"]))
    if chosen == "small":
        return TargetKind(usual, layers, attention, vocab_size=24)
    return TargetKind(usual, layers, attention, damage="nan" if chosen == "damage" else "")


def _source(dice: Dice, target: TargetKind) -> str:
    if target.is_multimodal:
        return dice.choice(["ids", "image", "image"])
    if target.wrap:
        return "ids"
    return dice.mostly("ids", 0.15, "embeds", "embeds", "embeds", "embeds", "embeds", "empty", "nothing")


def _lengths(dice: Dice, target: TargetKind, source: str) -> tuple[int, ...]:
    rows = dice.choice([1, 1, 1, 2, 3, 4])
    if source == "empty":
        return (0,) * rows
    if source == "nothing":
        return (1,)
    if target.rope != "default" or target.depends_on_the_past:
        # Around the limit, well below it and beyond it.
        shortest, longest = dice.choice([(1, 8), (LIMIT - 4, LIMIT + 2), (LIMIT - 1, LIMIT + 1), (LIMIT, 2 * LIMIT)])
    else:
        shortest, longest = (1, LIMIT - 2) if target.tight else (1, 12)
    return tuple(dice.randint(shortest, longest) for _ in range(rows))


def _mask(dice: Dice, source: str) -> str:
    if source in ("empty", "nothing"):
        return "absent"
    others = ["absent", "absent", "bool", "int32", "float32"]
    return dice.mostly("int64", 0.15, *others, *(["holes", "right"] if source == "ids" else []))


def _cache(dice: Dice, target: TargetKind, turns: int, rows: int) -> str:
    """The user's; a static one is refused where rows of a batch must stay in it, and where layers slide."""
    static = dice.mostly("dynamic", 0.1 if rows > 1 or target.family in SLIDING else 0.6, "static")
    return dice.choice(["", "dynamic", "dynamic", "bare", static]) if turns > 1 else dice.mostly("", 0.1, static)


def _options(dice: Dice, target: TargetKind, source: str, rows: int, cache: str) -> dict[str, Any]:
    names = [name for name in OPTIONS if name not in RARE or dice.chance(0.05)]
    options = {name: OPTIONS[name](dice) for name in dice.sample(names, dice.choice([0, 0, 0, 1, 1, 2, 3]))}
    options |= {"max_length": LIMIT} if target.tight else {"max_new_tokens": dice.mostly(dice.randint(1, 10), 0.1, 20)}
    if target.tight or "min_new_tokens" not in options:
        options.pop("min_new_tokens", None)
    options["eos_token_id"] = dice.choice([12, [12, 21], [4], None])
    options["do_sample"] = dice.chance(0.25)
    if options["do_sample"]:
        options["top_k"] = 0
        options |= {name: SAMPLING[name](dice) for name in dice.sample(list(SAMPLING), dice.randint(0, 3))}
        if rows > 1 and dice.chance(0.7):
            options["top_k"] = 1  # so that a batch has one text, too
    if source in ("embeds", "empty", "nothing"):
        # They look at the prompt's ids.
        for name in ("encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "guidance_scale"):
            options.pop(name, None)
    if source == "embeds":
        options.pop("prefill_chunk_size", None)
    if source == "image" and target.family.startswith("qwen"):
        # Plain decoding fails, and what it says depends on the rows of the batch.
        options.pop("guidance_scale", None)
    if cache:
        # transformers 5.17 reads again in chunks what the cache holds already.
        options.pop("prefill_chunk_size", None)
        options.pop("num_return_sequences", None)
    elif dice.chance(0.15):
        usual = "dynamic" if target.family in SLIDING else "static"
        options["cache_implementation"] = dice.mostly(usual, 0.1, "dynamic", "static", "offloaded")
    if options["eos_token_id"] is None:
        options.pop("exponential_decay_length_penalty", None)
    return options


def _abort(dice: Dice, turns: int, rows: int) -> Abort:
    # The first three see one prompt at a time.
    return Abort(
        by=dice.choice(ABORTS if rows == 1 or dice.chance(0.1) else ABORTS[3:]),
        turn=dice.randint(0, turns - 2),
        at=dice.randint(0, 8),
        error=dice.choice(["error", "interrupt", "exit"]),
        event=dice.choice(EVENTS),
    )


def _drafter(dice: Dice, target: TargetKind) -> DrafterKind:
    name = dice.choices(
        ["oracle", "garbage", "lookup", "third party", "network"],
        [35, 8, 4, 18, 35],
    )[0]
    layers = dice.choice(["none", "some", "some", "unrecorded"])
    detail = sent = listener = ""
    if name == "third party":
        detail = dice.choice(list(FAULTS))
    elif name == "network":
        name, detail = dice.choice(NETWORKS), dice.mostly("", 0.25, *DAMAGES)
        # Nobody gives a vocabulary to a drafter that is loaded.
        sent = "saved" if detail.startswith("d2t") else dice.mostly("", 0.1, "copied", "pickled", "saved")
        listener = dice.mostly("", 0.15, *LISTENERS)
    depths = [[dice.randint(0, 8) for _ in range(dice.randint(1, 6))] for _ in range(4)] if name == "oracle" else []
    return DrafterKind(name, detail, layers, name != "lookup" and dice.chance(0.15), sent, listener, depths)


def _plan(dice: Dice, drafter: DrafterKind, samples: bool) -> Plan | None:
    if dice.chance(0.3):
        return None
    fields = {
        "tree_budget": dice.mostly(dice.randint(0, 16), 0.1, 40),
        "num_forwards": dice.choice([1, 1, 2, 3, 4]),
        "max_starts": dice.choice([None, None, 1, 4, 8]),
        "min_probability": dice.mostly(0.0, 0.15, 0.01, 0.2, 1.0),
        "min_start_probability": dice.mostly(0.0, 0.15, 0.01, 0.2, 1.0),
    }
    draws = drafter.name in ("specblock", "best first", "third party", "dflash", "jetspec")
    if dice.chance(0.5 if samples and draws else 0.03):
        fields["draft_sampling"] = "sampled"
        fields["verification"] = dice.choice([None, "walk", "token", "block"])
    return Plan(
        fields, dice.choice(["drafter", "call", "part"]) if drafter.joined else dice.choice(["drafter", "call"])
    )

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The options of `generate()` with what becomes of them, and how a call is compared with plain decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import unified_diff
from typing import Any

import pytest
import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import VOCAB
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    LogitsProcessor,
    PreTrainedTokenizerFast,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    set_seed,
)


EXACT, DISTRIBUTION = "exact", "exact in distribution"
ONE, SEVERAL = (7,), (7, 3, 12)
# This end comes late for one prompt and at different times for several.
BASE = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": 12}


class Grammar(LogitsProcessor):
    """A finite-state machine that counts its own steps: brackets of tokens 8 and 9 around runs of other tokens."""

    def __init__(self):
        self.state = 0

    def __call__(self, input_ids, scores):
        allowed = {0: [8], 1: list(range(10, 20)), 2: [*range(20, VOCAB), 9], 3: [8, 4]}[self.state]
        self.state = (self.state + 1) % 4
        return scores.index_fill(1, torch.tensor([t for t in range(VOCAB) if t not in allowed]), -torch.inf)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Every id is a word of two letters."""
    letters = [first + second for first in "aceg" for second in "bdfhjlnp"]
    backend = Tokenizer(WordLevel({word: number for number, word in enumerate(letters)}, unk_token="ab"))
    backend.pre_tokenizer = Split(Regex(".."), "isolated")
    backend.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", pad_token="ab", bos_token="ad", eos_token="al"
    )


@dataclass
class Row:
    """
    One option of `generate()`.

    Args:
        option (`str`): As it stands in the table.
        make (`Callable[[], dict]`): The keyword arguments of one call.
        one, several (`str`, *optional*, defaults to `EXACT`):
            For one prompt and for a padded batch: `EXACT`, `DISTRIBUTION` or how the refusal begins.
        kinds (`tuple[str, ...]`, *optional*): Targets to try it on.
        changes (`bool`, *optional*, defaults to `True`):
            Plain decoding of one of the targets writes something else with the option.
    """

    option: str
    make: Callable[[], dict[str, Any]]
    one: str = EXACT
    several: str = EXACT
    kinds: tuple[str, ...] = ("llama", "gemma3")
    changes: bool = True


WHOLE_BATCH = "{} may look at a whole batch at once"
UNPLUGGED = "set num_beams=1"
SAMPLE = {"do_sample": True, "top_k": 0, "eos_token_id": None}

RIVALS = {
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "assistant_ensemble_weight": 0.5,
    "use_mtp": True,
    "speculation_type": "dflash",
}
"""transformers' own sources of drafts and its lossy verification, with a value of each."""

UNTRIED = {
    "of ways to decode that are refused as such": {
        "constraints",
        "diversity_penalty",
        "dola_layers",
        "early_stopping",
        "force_words_ids",
        "length_penalty",
        "low_memory",
        "num_beam_groups",
        "penalty_alpha",
    },
    "of transformers' own assistants, which alone read it": {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "is_assistant",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
    },
    "of caches and plain steps that transformers makes": {
        "cache_config",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "max_cache_len",
    },
    "of encoders": {"decoder_start_token_id"},
    "tried along with others": {"begin_suppress_tokens", "bos_token_id", "pad_token_id"},
    "what wrote it": {"transformers_version"},
}
"""Fields of a `GenerationConfig` that the table does not name, by why."""

ROWS = [
    Row("`max_new_tokens=1`", lambda: {"max_new_tokens": 1}),
    Row("`max_length`", lambda: {"max_length": 20, "max_new_tokens": None}),
    Row("several `eos_token_id`", lambda: {"eos_token_id": [17, 29, 20]}),
    Row("`min_length`", lambda: {"min_length": 28}),
    Row("`min_new_tokens`", lambda: {"min_new_tokens": 20}),
    Row("`stop_strings`", lambda: {"stop_strings": ["cpgf"], "tokenizer": tiny_tokenizer()}),
    Row("`max_time`", lambda: {"max_time": 0.0}),
    Row(
        "`stopping_criteria` of one's own",
        lambda: {"stopping_criteria": [lambda ids, scores: (ids[:, -1] % 7 == 0) | (ids.shape[1] > 20)]},
        several=WHOLE_BATCH.format("function"),
    ),
    Row("`repetition_penalty`", lambda: {"repetition_penalty": 1.4}),
    Row("`encoder_repetition_penalty`", lambda: {"encoder_repetition_penalty": 1.6}),
    Row("`no_repeat_ngram_size`", lambda: {"no_repeat_ngram_size": 2}),
    Row("`encoder_no_repeat_ngram_size`", lambda: {"encoder_no_repeat_ngram_size": 1}),
    Row("`bad_words_ids`", lambda: {"bad_words_ids": [[21, 23], [4], [26]]}),
    Row("`sequence_bias`", lambda: {"sequence_bias": {(3,): 6.0, (17, 4): 6.0}}),
    Row("`suppress_tokens` and at the beginning", lambda: {"suppress_tokens": [4], "begin_suppress_tokens": [26]}),
    Row("`forced_eos_token_id`", lambda: {"forced_eos_token_id": 9, "max_new_tokens": 3}),
    Row("`exponential_decay_length_penalty`", lambda: {"exponential_decay_length_penalty": (2, 1.5)}),
    Row(
        "`remove_invalid_values`, `renormalize_logits`",
        lambda: {"remove_invalid_values": True, "renormalize_logits": True},
        changes=False,
    ),
    Row(
        "`prefix_allowed_tokens_fn`",
        lambda: {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * 5 + row) % VOCAB, 2 + row]},
    ),
    Row("`watermarking_config`", lambda: {"watermarking_config": WatermarkingConfig(bias=4.0, context_width=1)}),
    Row(
        "`watermarking_config` (SynthID)",
        lambda: {
            "watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[3, 14, 15], sampling_table_size=64)
        },
    ),
    Row("`guidance_scale`", lambda: {"guidance_scale": 1.8}),
    Row(
        "`logits_processor` of one's own, such as a grammar",
        lambda: {"logits_processor": [Grammar()]},
        several=WHOLE_BATCH.format("Grammar"),
    ),
    Row("`do_sample`", lambda: SAMPLE, several=DISTRIBUTION),
    Row("`temperature`", lambda: SAMPLE | {"temperature": 0.6}, several=DISTRIBUTION),
    Row("`top_k`", lambda: SAMPLE | {"top_k": 5}, several=DISTRIBUTION),
    Row("`top_p`", lambda: SAMPLE | {"top_p": 0.7}, several=DISTRIBUTION),
    Row("`min_p`", lambda: SAMPLE | {"min_p": 0.1}, several=DISTRIBUTION),
    Row("`top_h`", lambda: SAMPLE | {"top_h": 0.6}, several=DISTRIBUTION),
    Row("`typical_p`", lambda: SAMPLE | {"typical_p": 0.6}, several=DISTRIBUTION),
    Row(
        "`epsilon_cutoff`, `eta_cutoff`",
        lambda: SAMPLE | {"epsilon_cutoff": 0.03, "eta_cutoff": 0.03},
        several=DISTRIBUTION,
    ),
    Row("`num_return_sequences`", lambda: {"do_sample": True, "top_k": 1, "num_return_sequences": 2}, changes=False),
    Row("`prefill_chunk_size`", lambda: {"prefill_chunk_size": 3}, changes=False),
    Row('`cache_implementation="dynamic"`', lambda: {"cache_implementation": "dynamic"}, changes=False),
    Row(
        '`cache_implementation="static"`',
        lambda: {"cache_implementation": "static"},
        kinds=("llama", "qwen3"),
        changes=False,
    ),
    Row(
        '`cache_implementation="static"`, a target with layers that slide',
        lambda: {"cache_implementation": "static"},
        one="this StaticCache has layers that slide",
        several="this StaticCache has layers that slide",
        kinds=("gemma3", "mistral"),
    ),
    *(
        Row(
            f'`cache_implementation="{name}"`',
            lambda name=name: {"cache_implementation": name},
            one=f"cache_implementation='{name}' keeps rows",
            several=f"cache_implementation='{name}' keeps rows",
        )
        for name in ("offloaded", "offloaded_static", "quantized")
    ),
    Row("`use_cache=False`", lambda: {"use_cache": False}, *["draft trees are verified against"] * 2),
    Row("`num_beams`", lambda: {"num_beams": 2}, *["a tree drafter speeds up greedy decoding and sampling"] * 2),
    *(
        Row(f"`{name}`", lambda name=name, value=value: {name: value}, *[f"{name} would be ignored next to"] * 2)
        for name, value in RIVALS.items()
    ),
    Row("`synced_gpus`", lambda: {"synced_gpus": True}, *["synced_gpus needs the same number of forwards"] * 2),
]


NOTES = [
    "- With a continued cache the drafter's context begins with the tokens that this call reads: the",
    "  states of earlier ones are not in the cache. That may cost accepted tokens, never text. Pass the whole",
    "  conversation without a cache where acceptance matters more than the prefill.",
    "- `output_hidden_states` and `output_attentions` keep a copy for every emitted token, as plain decoding",
    "  does.",
    "- `num_assistant_tokens` and the other settings of transformers' own assistants say nothing to a tree drafter;",
    "  `drafter.drafting_plan` and `generation_config.drafting_plan` say how much it drafts.",
    "- FlexAttention reads the tree's mask as scores to add, so that no block mask is compiled for every shape of",
    "  tree. It was tried without compiling its kernel, and FlashAttention through a function that computes the",
    "  same: neither on a GPU.",
    "- During a call a `DynamicCache` is written in place, with room for up to 256 columns more than it holds;",
    "  what is handed back is an ordinary one without spare room. A round still rewrites what it shows in sliding",
    "  layers, and in a batch whose rows accept different lengths.",
    "- A row of a batch that has stopped costs neither the drafter nor the target anything; one that may emit one",
    "  more token costs the drafter nothing. Only where the cache is handed back (`return_dict_in_generate`, a",
    "  cache of one's own) the target goes on computing rows that have stopped, which stay in it.",
    "- Whatever ends a call (a streamer, criterion, processor, callback or drafter that raises, an interrupt),",
    "  a cache of one's own goes back to the last committed token: it holds the prompt and a part of what was",
    "  emitted, and whoever goes on with all that was emitted gets plain decoding's text. The rows of a batch",
    "  are at different tokens, of which nobody has been shown any, and go back to their prompts",
    "  (`tests/target/test_cache.py`).",
    "- A prompt with pictures is read in one forward, whatever `prefill_chunk_size` says. Where that changes plain",
    "  decoding's text it is refused: with Gemma, in which the tokens of a picture see each other, and with",
    "  recurrent layers and padding where `prefill_chunk_size=1` (`tests/target/test_recurrent.py`).",
    "- Recurrent layers (those above, and of Zamba2, OLMo-hybrid, Kimi-Linear, the mixtures of Qwen3.5 and",
    "  LFM2) keep a state that never goes back: what was committed behind it is read again together with the",
    "  next draft, in the same forward, until all that a forward reads is kept. Where reading again has cost as",
    "  much as a forward (`tree_budget` tokens) a round goes without drafts. The windows of LFM2's convolutions",
    "  are cut like keys and values. A cache that is handed back costs up to one forward more; in a batch its",
    "  states are those after each row's last token, where plain decoding reads padding into the rows that end",
    "  early (`tests/target/test_recurrent.py`).",
    "- transformers' Mamba layers bound time steps (`time_step_limit`; Nemotron-H, Zamba2: `time_step_min`, 0.001",
    "  in released models) where they read several tokens and not where they go on by one. A drafted call reads",
    "  the prompt with bounds and the drafts without, as plain decoding reads the same tokens; a target whose",
    "  parts' `forward` accelerate has replaced is refused then. transformers decodes no padded batch of Falcon-H1",
    "  in 5.17, and wherever it reads a column of padding alone (`prefill_chunk_size=1`) that changes the states,",
    "  in which a drafted call follows it.",
    '- RoPE of the types "dynamic" and "longrope" turns all rows of a forward by the largest position in it. No',
    '  tree crosses the length at which that begins; beyond it "dynamic" is decoded without drafts. Phi-3 reads',
    "  a text again from its beginning when it crosses that length, and so does a drafted call (transformers",
    "  5.17 loses the text instead).",
    "- Quantisation that scales the activations of a whole forward together (bitsandbytes' int8, dynamic scales",
    "  per tensor) makes a token's logits depend a little on the drafts beside it: a warning says so once.",
    "- A drafter may lie on another device than its target (`tests/drafters/test_devices.py`): that nothing is",
    "  computed across devices is checked with fake tensors, and the text only where there is a GPU.",
]


def render(sections: dict[str, dict[str, tuple[str, str, str]]]) -> str:
    lines = [
        "# What `generate(assistant_model=drafter)` accepts",
        "",
        "Written by `pytest tests/generation/test_generate_matrix.py --write-docs` and checked without it: every",
        "row is compared with plain `generate()` on tiny random targets in fp32, with a drafter that knows the",
        "answer and with one that knows nothing. *exact*: the very tokens of plain decoding (sampling: under the",
        "same seed). *exact in distribution*: each token follows the target's, but a seed gives other tokens than it",
        "gives plain sampling. Anything else is the sentence of the refusal. (Distributions are enumerated in",
        "`tests/generation/test_sampled_calls.py` and `tests/generation/test_batches.py`; combinations of options",
        "are drawn in `tests/generation/test_generate_fuzz.py`.)",
    ]
    for title, rows in sections.items():
        lines += ["", f"## {title}", "", "| | one prompt | padded batch | test |", "|---|---|---|---|"]
        lines += table_rows(rows)
    lines += ["", "## Notes", "", *NOTES]
    return "\n".join(lines) + "\n"


def table_rows(rows: dict[str, tuple[str, str, str]]) -> list[str]:
    def line(name: str, one: str, several: str, test: str) -> str:
        same = several == one and one not in (EXACT, DISTRIBUTION)
        return f"| {name} | {one} | {'the same' if same else several} | `{test}` |"

    return [line(name, *row) for name, row in rows.items()]


def outdated(page: str, sections: dict[str, dict[str, tuple[str, str, str]]], whole: bool) -> list[str]:
    """How a page differs from what was found, line by line; after some of the tests, which of their rows it lacks."""
    if whole:
        return list(unified_diff(page.splitlines(), render(sections).splitlines(), "page", "tests", n=0, lineterm=""))
    found = [line for rows in sections.values() for line in table_rows(rows)]
    return [f"+{line}" for line in found if line not in page.splitlines()]


def same_text(target, batch: dict, make: Callable[[], dict]) -> torch.Tensor:
    """Plain decoding's tokens, after both kinds of drafter have written them as well."""

    def run(drafter=None):
        set_seed(3)
        output = target.generate(**batch | BASE | make(), assistant_model=drafter)
        return output if isinstance(output, torch.Tensor) else output.sequences

    plain = run()
    mask, texts = batch["attention_mask"], plain
    if "inputs_embeds" in batch:
        texts = torch.cat((torch.zeros_like(mask), plain), dim=1)
    mask = mask.repeat_interleave(len(plain) // len(mask), dim=0)
    vocab_size = target.config.get_text_config().vocab_size
    for drafter in (oracles(texts, mask, vocab_size=vocab_size), garbage(len(plain), vocab_size=vocab_size)):
        assert torch.equal(run(drafter), plain)
    return plain


def refusal(target, batch: dict, make: Callable[[], dict]) -> str:
    rows = len(batch["attention_mask"])
    with pytest.raises(ValueError) as error:
        target.generate(**batch | BASE | make(), assistant_model=garbage(rows))
    sentence = str(error.value)
    assert "; " in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


def outcome(target, batch: dict, make: Callable[[], dict], expected: str) -> str:
    """What the table says."""
    if expected == EXACT:
        same_text(target, batch, make)
    elif expected == DISTRIBUTION:
        # Which distribution is a test of its own; here, that the call works.
        output = target.generate(**batch | BASE | make(), assistant_model=garbage(len(batch["attention_mask"])))
        assert output.shape == (len(batch["attention_mask"]), batch["attention_mask"].shape[1] + 24)
    else:
        sentence = refusal(target, batch, make)
        assert sentence.startswith(expected)
        return sentence
    return expected


def plainly(target, options: dict) -> list[int]:
    set_seed(3)
    return target.generate(**padded_batch(ONE) | BASE | options)[0].tolist()

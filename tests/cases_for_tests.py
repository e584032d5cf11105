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
"""Random calls of `generate()`: options, targets, caches and drafters in any combination that is not refused."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from batches_for_tests import garbage, oracles, padded_batch
from conftest import ATTENTIONS, KINDS, VOCAB, prompt_of, tiny_target
from hypothesis import assume
from hypothesis import strategies as st
from transformers import DynamicCache, PreTrainedModel, set_seed

from specblock_hf import SpecBlockConfig, SpecBlockDrafter, TreeDrafter
from specblock_hf.compat import CACHE


LAYERS = (0, 2, 4)
# What is forced must not be forbidden as well.
TOKENS, FORCED = st.integers(1, 15), st.integers(16, VOCAB - 1)
# Of a batch, and of one prompt.
OPTIONS: dict[str, st.SearchStrategy] = {
    "bad_words_ids": st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=4),
    "begin_suppress_tokens": st.lists(TOKENS, min_size=1, max_size=4),
    "encoder_no_repeat_ngram_size": st.integers(1, 2),
    "exponential_decay_length_penalty": st.tuples(st.integers(1, 9), st.floats(1.01, 1.6)),
    "forced_eos_token_id": FORCED,
    "min_new_tokens": st.integers(1, 12),
    "no_repeat_ngram_size": st.integers(2, 3),
    "prefill_chunk_size": st.integers(1, 8),
    "renormalize_logits": st.just(True),
    "repetition_penalty": st.floats(0.8, 1.8),
    "sequence_bias": st.dictionaries(st.tuples(TOKENS), st.floats(-5, 5).filter(bool), min_size=1, max_size=4),
    "suppress_tokens": st.lists(TOKENS, min_size=1, max_size=4),
}
SAMPLING: dict[str, st.SearchStrategy] = {
    "min_p": st.floats(0.01, 0.3),
    "temperature": st.floats(0.3, 1.8),
    "top_k": st.integers(1, VOCAB),
    "top_p": st.floats(0.3, 1.0),
    "typical_p": st.floats(0.3, 0.95),
}


@st.composite
def cases(draw) -> dict[str, Any]:
    """A call: `kind` and `attention` of the target, `lengths` of the prompts, `options`, `drafter`, and so on."""
    kind, attention = draw(st.sampled_from(KINDS)), draw(st.sampled_from(ATTENTIONS))
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    names = draw(st.sets(st.sampled_from(sorted(OPTIONS)), max_size=3))
    options = {name: draw(OPTIONS[name]) for name in sorted(names)}
    options["max_new_tokens"] = draw(st.integers(1, 24))
    options["eos_token_id"] = draw(st.sampled_from([12, [12, 21], [4]]))
    options["do_sample"] = len(lengths) == 1 and draw(st.booleans())
    if options["do_sample"]:
        names = draw(st.sets(st.sampled_from(sorted(SAMPLING)), max_size=3))
        options |= {"top_k": 0} | {name: draw(SAMPLING[name]) for name in sorted(names)}
    returns = draw(st.booleans())
    source = draw(st.sampled_from(["ids", "ids", "embeds"]))
    if source == "embeds":
        # The one looks at ids, and with the other plain decoding fails.
        for name in ("encoder_no_repeat_ngram_size", "prefill_chunk_size"):
            options.pop(name, None)
    turns = draw(st.integers(1, 3)) if source == "ids" and len(lengths) == 1 else 1
    if turns > 1:
        # transformers 5.17 reads again in chunks what the cache holds already.
        options.pop("prefill_chunk_size", None)
    if kind in ("llama", "qwen3") and turns == 1 and not (returns and len(lengths) > 1):
        options["cache_implementation"] = draw(st.sampled_from([None, "static"]))
    plans = draw(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6), min_size=4, max_size=4))
    return {
        "kind": kind,
        "attention": attention,
        "lengths": lengths,
        "seed": draw(st.integers(0, 99)),
        "source": source,
        "turns": turns,
        "returns": returns,
        "options": options,
        "drafter": draw(st.sampled_from(["oracle", "garbage", "block"])),
        "plans": plans,
    }


def check(case: dict[str, Any]) -> int:
    """
    Compare a call with plain decoding.

    Returns:
        `int`: Drafted tokens that were kept.

    Raises:
        AssertionError: The tokens, or what else is handed back, differ.
    """
    target = tiny_target(case["kind"], case["attention"])
    try:
        plain, plain_columns = run(target, case, lambda batch, turn: None)
    except RuntimeError as error:
        # Penalties of what is forbidden anyway may add up to no number at all.
        assume("probability tensor contains" not in str(error))
        raise
    drafters: list[TreeDrafter] = []

    def drafter(batch: dict, turn: int) -> TreeDrafter:
        drafters.append(make_drafter(case, target, batch, plain[turn]))
        return drafters[-1]

    drafted, columns = run(target, case, drafter)
    for ours, theirs in zip(drafted, plain, strict=True):
        assert torch.equal(ours, theirs), (ours.tolist(), theirs.tolist())
    assert columns == plain_columns
    return sum(sum(drafter.last_statistics.accepted) for drafter in drafters)


def run(target: PreTrainedModel, case: dict[str, Any], make_drafter) -> tuple[list[torch.Tensor], list[int]]:
    """The sequences of every turn of a case, and the columns of the caches that were handed back."""
    batch, options = padded_batch(case["lengths"], case["seed"]), case["options"] | {"pad_token_id": 0}
    if case["turns"] > 1:
        options[CACHE] = DynamicCache(config=target.config)
    if case["source"] == "embeds":
        batch["inputs_embeds"] = target.get_input_embeddings()(batch.pop("input_ids"))
    set_seed(case["seed"])
    sequences, columns = [], []
    for turn in range(case["turns"]):
        output = target.generate(
            **batch,
            **options,
            return_dict_in_generate=case["returns"],
            assistant_model=make_drafter(batch, turn),
        )
        sequences.append(output.sequences if case["returns"] else output)
        if case["returns"]:
            columns.append(int(output[CACHE].get_seq_length()))
        ids = torch.cat((sequences[-1], prompt_of(3, seed=turn)), dim=1) if case["turns"] > 1 else sequences[-1]
        if turn + 1 < case["turns"]:
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return sequences, columns


def make_drafter(case: dict[str, Any], target: PreTrainedModel, batch: dict, plain: torch.Tensor) -> TreeDrafter:
    mask, layers = batch["attention_mask"], LAYERS if case["seed"] % 2 else ()
    if case["drafter"] == "garbage":
        return garbage(len(mask), layers)
    if case["drafter"] == "block":
        return block_drafter(case["kind"], case["attention"])
    texts = torch.cat((torch.zeros_like(mask), plain), dim=1) if "inputs_embeds" in batch else plain

    def plan(numbers: Sequence[int]):
        return lambda number: numbers[number % len(numbers)]

    return oracles(texts, mask, [plan(numbers) for numbers in case["plans"]], layers)


@cache
def block_drafter(kind: str, attention: str) -> SpecBlockDrafter:
    config = SpecBlockConfig.for_target(tiny_target(kind, attention).config, branching=[2, 4, 6, 4])
    # It is made while the call under test is about to sample.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SpecBlockDrafter(config).eval()

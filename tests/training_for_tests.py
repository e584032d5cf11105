# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A tiny drafter, texts and tokenizer for the tests of training, and the network's forward spelled out row by row."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import torch
from conftest import VOCAB, tiny_target
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specblock_hf import SpecBlockConfig, SpecBlockDrafter
from specblock_hf.data.examples import Example
from specblock_hf.drafters.common.cache import GraphCache
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.target_batch import TargetBatch


ALPHABET = f"_?{string.ascii_lowercase}0123"
DRAFT_VOCAB = 24
assert len(ALPHABET) == VOCAB


def char_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each of 32 characters; `?` stands for all others, `0` ends a prompt, `3` is EOS and padding."""
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(ALPHABET)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '0' }}{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", eos_token="3", pad_token="3", chat_template=template
    )


def tiny_drafter(seed: int = 1, dtype: torch.dtype = torch.float32, **overrides) -> SpecBlockDrafter:
    """A drafter for the tiny Llama target with random weights and a random draft vocabulary."""
    fields = {
        "draft_vocab_size": DRAFT_VOCAB,
        "rank_top_k": 12,
        "rank_hidden_size": 16,
        "feature_layers": [0, 2, 4],
        "initializer_range": 0.3,
        "root_width": 4,
        "branching": [2, 3, 2, 1],
    }
    torch.manual_seed(seed)
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(tiny_target("llama").config, **(fields | overrides)))
    drafter.set_draft_vocabulary(torch.randperm(VOCAB)[: drafter.config.draft_vocab_size])
    if drafter.config.markov_rank:  # which a new drafter has not learned yet
        drafter.markov_head.markov_w2.weight.data.normal_(std=2.0)
    return drafter.to(dtype).eval()


def logits_below(drafter: SpecBlockDrafter, state: torch.Tensor, slot: int, before: int) -> torch.Tensor:
    """Logits `[draft_vocab_size]` of a slot's state `[d]` after a token, written out."""
    logits = drafter.lm_head.weight @ drafter.norm(state)
    if slot == 0 or not drafter.config.markov_rank:
        return logits
    head = drafter.markov_head
    return logits + head.markov_w2.weight @ head.markov_w1.weight[before]


def table_of(dtype: torch.dtype = torch.float32) -> TokenTable:
    """The tiny Llama target's embedding and head."""
    return TokenTable.of(tiny_target("llama", dtype=dtype))


class Told:
    """
    Texts with random features, from which pairs are cut.

    Args:
        rows (`int`): Texts.
        length (`int`): Tokens of each.
        seed (`int`, *optional*, defaults to 0): Of tokens and features.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the features.
    """

    def __init__(self, rows: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(seed)
        width = tiny_target("llama").config.hidden_size
        self.table = table_of(dtype)
        self.tokens = torch.randint(VOCAB, (rows, length), generator=generator)
        self.features = torch.randn(rows, length, 3, width, generator=generator).to(dtype)

    def pairs(self, first: Sequence[int], last: Sequence[int], rows: Sequence[int] | None = None) -> Pairs:
        """Pairs `first[r]` to `last[r] - 1` of every row (all rows if not named), padded with large numbers."""
        rows = range(len(self.tokens)) if rows is None else rows
        counts = [b - a for a, b in zip(first, last, strict=True)]
        shape = (len(rows), max(counts))
        tokens = torch.full(shape, 7)
        positions = torch.full(shape, 3)
        features = torch.full((*shape, *self.features.shape[2:]), 50.0, dtype=self.features.dtype)
        for place, (row, start, count) in enumerate(zip(rows, first, counts, strict=True)):
            tokens[place, :count] = self.tokens[row, start + 1 : start + count + 1]
            positions[place, :count] = torch.arange(start, start + count)
            features[place, :count] = self.features[row, start : start + count]
        return Pairs(tokens, tuple(features.unbind(2)), positions, torch.tensor(counts), self.table)

    def batch(self, lengths: Sequence[int] | None = None, answer_starts: Sequence[int] | None = None) -> TargetBatch:
        """All texts as a batch to train on, whole and all answer if not said otherwise; targets are the texts."""
        rows, length = self.tokens.shape
        lengths = torch.tensor([length] * rows if lengths is None else lengths)
        starts = torch.tensor([0] * rows if answer_starts is None else answer_starts)
        places = torch.arange(length)
        return TargetBatch(
            tokens=self.tokens,
            embeds=self.table.embed(self.tokens).detach(),
            features=self.features.flatten(2),
            lengths=lengths,
            top_ids=self.tokens[..., None] % DRAFT_VOCAB,
            top_probs=torch.ones(rows, length, 1),
            scored=(places >= starts[:, None]) & (places < lengths[:, None]),
        )


def naive_states(
    drafter: SpecBlockDrafter, told: Told, row: int, pair: int, path: Sequence[tuple[int, int]] = ()
) -> torch.Tensor:
    """
    The states `[K, d]` of one block, with nothing batched and every mask written cell by cell.

    Args:
        drafter ([`SpecBlockDrafter`]): The network.
        told (`Told`): The texts.
        row (`int`): Which text.
        pair (`int`): The committed pair that the block hangs on.
        path (sequence of `(int, int)`, *optional*): (cut, token) of every later block on the way, that one included.
    """
    size = drafter.config.block_size
    cache = GraphCache(drafter.config.num_hidden_layers)
    tokens = told.tokens[row : row + 1, 1 : pair + 2]
    conditions = drafter.project_features(told.features[row : row + 1, : pair + 1].flatten(2))
    hidden = drafter(told.table.embed(tokens), conditions, torch.arange(pair + 1)[None], cache=cache)[0, -1]
    block_of = [(0, p, k) for p in range(pair + 1) for k in range(size)]  # block, pair and slot of every column
    cuts: list[int] = []
    for number, (cut, token) in enumerate(path, 1):
        cuts.append(cut)
        block_of += [(number, pair, k) for k in range(size)]
        mask = torch.zeros(1, 1, size, len(block_of), dtype=torch.bool)
        for slot in range(size):
            for column, (block, at, other) in enumerate(block_of):
                if block == number:
                    mask[0, 0, slot, column] = other <= slot
                else:
                    mask[0, 0, slot, column] = at < pair or other < cuts[block]
        embed = told.table.embed(torch.tensor([[token]]))
        hidden = drafter(embed, hidden[cut - 1][None, None], torch.tensor([[pair]]), mask, cache)[0, 0]
    return hidden


def example_of(tokens: Sequence[int], answer_start: int, greedy: bool = True) -> Example:
    return Example(list(tokens), answer_start, greedy, key=f"{sum(tokens) * 2654435761 % 2**32:08x}")


def write_answers(folder: Path) -> None:
    """Answers of the tiny target in `data`, and the target with its tokenizer in `target`."""
    char_tokenizer().save_pretrained(folder / "target")
    tiny_target("llama").save_pretrained(folder / "target")
    (folder / "data").mkdir()
    with open(folder / "data" / "answers-0.jsonl", "w") as file:
        for number, tokens in enumerate(Told(24, 14).tokens.tolist()):
            file.write(json.dumps({"prompt": f"{number}ab", "answer_ids": tokens, "temperature": 0.0}) + "\n")

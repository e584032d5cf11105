# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Targets and drafters of real shapes with random weights, made so that how many drafted tokens are accepted is known
beforehand: the target counts (token + 1 follows every token), and a drafter's real tree gets the right tokens along
its first path, down to a chosen depth. Chains of targets with recurrent layers are forced in `recurrent.py`, whose
figures are in `docs/performance.md`.
"""

from __future__ import annotations

from collections import deque
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from specblock_hf import DraftingPlan, SpecBlockDrafter
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.drafter import DraftState, TreeDrafter
from specblock_hf.drafting.pairs import Pairs
from specblock_hf.drafting.plan import Limits
from specblock_hf.prepacking import PrepackedWeights
from specblock_hf.rounds_model import RoundsModel
from specblock_hf.trees.tree import DraftTree


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
TARGETS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-3.1-8b": (
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": LLAMA3_ROPE,
        },
    ),
    "qwen3-8b": (
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "smollm2-135m": (
        LlamaConfig,
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
}
"""Shapes of public models by the names that `--target` takes."""

TINY = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
"""Replaces the sizes with `--tiny`."""

SPREAD = 6.0
"""Standard deviation of a random drafter's logits: the likeliest of 32,000 tokens then gets about half of the mass, so
that trees are as deep and as narrow as a trained drafter's."""

RANK_SHARES = (0.752, 0.150, 0.041, 0.057)
"""How often the rank of the target's token falls into each bucket (section 3.2 of the SpecBlock paper). A random rank
head would always say the same, and how many blocks a tree starts depends on what it says."""


@dataclass(frozen=True)
class Candidate:
    """
    A drafter and how much its rounds draft.

    Args:
        name (`str`): In the results.
        kind (`str`): As `specblock train --drafter` calls it.
        plan ([`DraftingPlan`]): Of every round.
        fields (`dict`, *optional*): Of its configuration.
        taus (`tuple[int, ...]`, *optional*, defaults to `(4,)`): What to force in the loop.
    """

    name: str
    kind: str
    plan: DraftingPlan
    fields: dict[str, Any] = field(default_factory=dict)
    taus: tuple[int, ...] = (4,)


def shape_of(name: str, tiny: bool) -> dict[str, Any]:
    """The sizes of a target in `TARGETS`, or of a tiny one of its architecture."""
    return TARGETS[name][1] | (TINY if tiny else {})


def counting_target(
    name: str, tiny: bool, device: torch.device, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """
    A random target of a public model's shape that says token + 1 after every token, by a margin that no rounding
    bridges: its layers hardly change the state, and its head holds every token's embedding one row further down. The
    head is a matrix of its own also where the public model ties it to the embedding.
    """
    sizes = shape_of(name, tiny)
    config = TARGETS[name][0](
        **sizes, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    torch.manual_seed(0)
    with device:
        target = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    target.eval().requires_grad_(False)
    for layer in target.get_decoder().layers:
        # Not 0, with which some devices compute faster.
        layer.self_attn.o_proj.weight.mul_(1e-4)
        layer.mlp.down_proj.weight.mul_(1e-4)
    target.get_output_embeddings().weight.copy_(target.get_input_embeddings().weight.roll(1, dims=0))
    target.generation_config.pad_token_id = 0
    return target


class DrawnRanks(SpecBlockDrafter):
    """Runs its rank head and then says buckets that were drawn by `RANK_SHARES`."""

    def draw_ranks(self, count: int = 8192) -> None:
        """Draw `count` answers, to be given one after the other and then again."""
        drawn = torch.multinomial(torch.tensor(RANK_SHARES), count, replacement=True)
        self.drawn = 1e4 * torch.nn.functional.one_hot(drawn, len(RANK_SHARES)).to(self.device, self.dtype)
        self._cursor = deque([0])  # no number of the module's own, which would be part of what is captured

    def rank_logits(self, normed: torch.Tensor, top_logits: torch.Tensor) -> torch.Tensor:
        logits = super().rank_logits(normed, top_logits)
        count = logits[..., 0].numel()
        first = self._cursor.pop()
        if first + count > len(self.drawn):
            first = 0
        drawn = self.drawn[first : first + count]
        self._cursor.append(first + count)
        return logits + drawn.view_as(logits)


def random_drafter(candidate: Candidate, target: PreTrainedModel) -> TreeDrafter:
    """A drafter with random weights, of the target's dtype and on its device."""
    kind, fields = trainable_drafters()[candidate.kind]
    hidden_size = target.config.hidden_size
    if candidate.kind == "dflash":  # its head is the target's
        fields = fields | {"output_multiplier": SPREAD / (target.config.initializer_range * hidden_size**0.5)}
    config = kind.config_class.for_target(target.config, **(fields | candidate.fields))
    torch.manual_seed(1)
    with target.device:
        drafter = (DrawnRanks if candidate.kind == "specblock" else kind)(config)
    drafter.to(target.dtype).eval().requires_grad_(False)
    if candidate.kind == "specblock":
        drafter.draw_ranks()
    if candidate.kind != "dflash":
        drafter.set_draft_vocabulary(torch.arange(config.draft_vocab_size))
        drafter.lm_head.weight.normal_(std=SPREAD / hidden_size**0.5)
    return drafter


class ReplayedDrafter(TreeDrafter):
    """
    Drafts with another drafter, at its whole cost, and then writes what a counting target will say along the first
    path of the tree, so far and no further. [`DraftTree.prune`] lists that path first.

    Args:
        drafter ([`TreeDrafter`]): Drafts.
        accepted (`int`): Drafted tokens that the target shall keep; fewer where the path is shorter.
    """

    def __init__(self, drafter: TreeDrafter, accepted: int):
        self.drafter = drafter
        self.config, self.feature_layers, self.lock = drafter.config, drafter.feature_layers, drafter.lock
        self.accepted = accepted
        self.steps = torch.arange(accepted + 2, device=drafter.device)

    def check_target(self, target: PreTrainedModel) -> None:
        self.drafter.check_target(target)

    def begin(self, *args: Any, **kwargs: Any) -> DraftState:
        return self.drafter.begin(*args, **kwargs)

    def rounds_model(self, weights: PrepackedWeights | None) -> RoundsModel[Any] | None:
        return self.drafter.rounds_model(weights)

    def with_network(self, network: Any) -> TreeDrafter:
        twin = copy(self)
        twin.drafter = self.drafter.with_network(network)
        return twin

    @property
    def has_fixed_rounds(self) -> bool:
        return self.drafter.has_fixed_rounds

    def begin_fixed(self, *args: Any, **kwargs: Any) -> DraftState:
        return self.drafter.begin_fixed(*args, **kwargs)

    def deepest(self, plan: DraftingPlan) -> int:
        return self.drafter.deepest(plan)

    def extend(self, state: DraftState, pairs: Pairs) -> None:
        self.drafter.extend(state, pairs)

    def propose(self, state: DraftState, pairs: Pairs, limits: Limits) -> DraftTree:
        tree = self.drafter.propose(state, pairs, limits)
        root = tree.tokens[:, :1]
        right = (root + self.steps) % self.config.vocab_size
        # The token that would be right one step further stands nowhere.
        tokens = torch.where(tree.tokens == right[:, -1:], root, tree.tokens)
        written = min(self.accepted, tokens.shape[1] - 1)
        tokens[:, 1 : written + 1] = right[:, 1 : written + 1]
        return replace(tree, tokens=tokens)

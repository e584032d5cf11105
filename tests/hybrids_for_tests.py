# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny random targets whose layers keep a recurrent state or a window of a convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import transformers
from batches_for_tests import RowWiseDrafter
from conftest import SIZES, VOCAB
from drafters_for_tests import OracleDrafter, make_tree
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from specblock_hf.compat import RELEASE


DELTA = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# The configuration's class, and what it takes besides the sizes that all have.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", DELTA | {"linear_conv_kernel_dim": 4}),
    "qwen3_next": ("Qwen3NextConfig", DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}),
    "falcon_h1": ("FalconH1Config", _MAMBA | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_rms_norm": True}),
    "bamba": ("BambaConfig", _MAMBA | {"attn_layer_indices": [1], "num_hidden_layers": 3}),
    "granite4": (
        "GraniteMoeHybridConfig",
        _MAMBA
        | {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "num_hidden_layers": 3}
        | {"shared_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention"],
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "time_step_min": 1e-30,
            "use_mamba_kernels": False,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
}

CORE = list(HYBRIDS)

# Less is tried with these.
HYBRIDS |= {
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        DELTA | _EXPERTS | {"shared_expert_intermediate_size": 16, "linear_conv_kernel_dim": 4},
    ),
    "lfm2_moe": ("Lfm2MoeConfig", HYBRIDS["lfm2"][1] | _EXPERTS | {"num_dense_layers": 1}),
    "olmo_hybrid": (
        "OlmoHybridConfig",
        {key: value for key, value in DELTA.items() if key != "head_dim"}
        | {"linear_num_value_heads": 2, "linear_value_head_dim": 16, "pad_token_id": 0},
    ),
    "kimi_linear": (
        "KimiLinearConfig",
        {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4, "num_key_value_heads": 4}
        | {"linear_head_dim": 8, "linear_num_heads": 2, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
        | {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "pad_token_id": 0},
    ),
    "zamba2": (
        "Zamba2Config",
        {"layers_block_type": ["mamba", "hybrid", "mamba"], "num_hidden_layers": 3, "num_key_value_heads": 4}
        | {"mamba_d_state": 8, "mamba_d_conv": 4, "n_mamba_heads": 4, "mamba_ngroups": 1, "chunk_size": 8}
        | {"time_step_min": 1e-30, "use_mamba_kernels": False, "num_mem_blocks": 1, "use_mem_eff_path": False},
    ),
}

# Time steps that are bounded wherever several tokens are read and not where one is.
BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h, bounded": ("NemotronHConfig", HYBRIDS["nemotron_h"][1] | {"time_step_min": 0.5}),
    "zamba2, bounded": ("Zamba2Config", HYBRIDS["zamba2"][1] | {"time_step_min": 0.5}),
    "falcon_h1, bounded": ("FalconH1Config", HYBRIDS["falcon_h1"][1] | {"time_step_limit": (0.8, 1.5)}),
}

# 5.17 fails to decode a padded batch of Falcon-H1 without a drafter.
BATCHED = [family for family in HYBRIDS if RELEASE > (5, 17) or family != "falcon_h1"]

# Those that are refused, and why.
UNTAKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "jamba": (
        "JambaConfig",
        {"num_experts": 2, "attn_layer_offset": 1, "attn_layer_period": 2, "use_mamba_kernels": False}
        | {"pad_token_id": 0},
        "begins every forward over several tokens with an empty state",
    ),
    "mamba": ("MambaConfig", {"state_size": 4}, "begins every forward over several tokens with an empty state"),
    "minimax": (
        "MiniMaxConfig",
        {"num_local_experts": 2, "head_dim": 8},
        "keeps its state outside of transformers' cache layers",
    ),
    "rwkv": ("RwkvConfig", {}, "keeps its state outside of transformers' cache layers"),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"pad_token_id": 0, "lru_width": 32, "attention_window_size": 8},
        "keeps its state outside of transformers' cache layers",
    ),
}


@cache
def hybrid_target(family: str) -> PreTrainedModel:
    name, fields = (HYBRIDS | BOUNDED)[family]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**SIZES | fields)).eval()


def states_of(cache: Any, keys: bool = True) -> list[torch.Tensor]:
    """What the layers of a cache hold, in columns that are in use, with or without keys and values."""
    held = []
    for layer in cache.layers:
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            states = (*layer.conv_states.values(), *layer.recurrent_states.values())
            held += [state for state in states if state is not None]
        if keys and isinstance(layer, CacheLayerMixin) and layer.keys is not None:
            held += [part[:, :, : int(layer.get_seq_length())] for part in (layer.keys, layer.values)]
    return held


class ChainOracle(OracleDrafter):
    """Drafts a single path: as many right tokens as its plan says, and wrong ones behind them up to `length`."""

    def __init__(self, vocab_size: int, text: Sequence[int], plan: Callable[[int], int], length: int = 9, **kwargs):
        super().__init__(vocab_size, text, plan, siblings=False, **kwargs)
        self.length = length

    def draft(self, state, limits):
        right = super().draft(state, limits).tokens[0].tolist()
        root = state.positions()[-1] + 1
        coming = self.text[root + len(right) : root + 1 + self.length]
        tokens = right + [self._wrong(token, 1) for token in coming]
        return make_tree(tokens, range(-1, len(tokens) - 1))


def chain_oracles(outputs: torch.LongTensor, mask: torch.LongTensor, plans, **kwargs) -> RowWiseDrafter:
    """One for each row of what plain `generate()` returned."""
    starts = (mask == 0).sum(1).tolist()
    rows = zip(outputs, starts, plans, strict=True)
    return RowWiseDrafter([ChainOracle(VOCAB, text[start:].tolist(), plan, **kwargs) for text, start, plan in rows])

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Golden folders of other layouts, and small drafters as programs save them whose layouts are read and not written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from block_drafters_for_tests import block_drafter
from conftest import SIZES, tiny_target
from safetensors.torch import save_file

from specblock_hf import BlockDiffusionDrafter, Eagle3Config, Eagle3Drafter


FIXTURES = Path(__file__).parent / "fixtures" / "conformance"
SPECBLOCK_A, SPECBLOCK_B = FIXTURES / "specblock_a" / "checkpoint", FIXTURES / "specblock_b" / "checkpoint"
SAFEAILAB = FIXTURES / "eagle3" / "checkpoint_safeailab"
SPECULATORS = FIXTURES / "eagle3" / "checkpoint_speculators"
SAID = torch.tensor([0, 1, 3, 4, 6, 8, 9, 11, 14, 15, 17, 20, 21, 25, 28, 31])
"""Target ids of a draft vocabulary."""
DSPARK = {
    "predicts_from_anchor": True,
    "markov_rank": 4,
    "confidence_head": True,
    "confidence_head_with_markov": True,
}
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 6}
OF_KIND = {"dflash": {}, "dflash2": DFLASH2, "dspark": DSPARK}
CLASSES = {"dflash": "DFlashDraftModel", "dflash2": "DFlash2DraftModel", "dspark": "DSparkDraftModel"}
"""Of speculators; other projects call theirs so, too."""
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 4}


def changed_copy(folder: Path, source: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    """Copy a checkpoint to `folder` with fields of its configuration dropped or changed."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in drop} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def eagle3_drafter(**fields) -> Eagle3Drafter:
    torch.manual_seed(4)
    sizes = {name: value for name, value in SIZES.items() if name not in ("num_hidden_layers", "initializer_range")}
    sizes |= {"draft_vocab_size": 24, "head_dim": 8, "target_num_layers": 4, "feature_layers": [2, 2, 1]}
    drafter = Eagle3Drafter(Eagle3Config(**sizes | fields)).eval()
    with torch.no_grad():
        for name, weight in drafter.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return drafter


def deepspec_folder(folder: Path, **changes) -> Eagle3Drafter:
    """What DeepSpec saves of a small drafter: its own names of fields, and the target's embedding."""
    drafter = eagle3_drafter(qk_norm=True, draft_vocab_size=SIZES["vocab_size"], feature_layers=[1, 2, 3])
    config, tensors = drafter.config, drafter.state_dict()
    tensors = {name: value for name, value in tensors.items() if name not in ("d2t", "t2d")}
    tensors["embed_tokens.weight"] = tiny_target("qwen3").get_input_embeddings().weight.detach().clone()
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    written = {name: getattr(config, name) for name in names} | {
        "architectures": ["Qwen3Eagle3Model"],
        "model_type": "qwen3",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": dict(config.rope_parameters),
        "num_hidden_layers": 1,
        "draft_num_hidden_layers": 1,
        "layer_types": ["full_attention"],
        "num_target_layers": 4,
        "target_layer_ids": [0, 1, 2],
        "target_model_name_or_path": "Qwen/Qwen3-8B",
        "ttt_length": 7,
        "step_loss_decay": 0.8,
        "tie_word_embeddings": False,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written | changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return drafter


def speculators_folder(
    folder: Path, kind: str = "dflash", said: torch.Tensor | None = None, **changes
) -> BlockDiffusionDrafter:
    """What speculators saves of a small drafter, which is returned: copies of the target's tables, maybe cut."""
    drafter = block_drafter(**OF_KIND[kind], **changes.pop("fields", {}))
    config, tensors, target = drafter.config, drafter.state_dict(), tiny_target("llama")
    head = target.get_output_embeddings().weight.detach()
    tensors["embed_tokens.weight"] = target.get_input_embeddings().weight.detach().clone()
    tensors["lm_head.weight"] = (head if said is None else head[said]).clone()
    if said is not None:
        tensors["d2t"] = said - torch.arange(len(said))
        tensors["t2d"] = torch.isin(torch.arange(config.vocab_size), said)
        if kind == "dspark":
            tensors["markov_head.markov_w2.weight"] = tensors["markov_head.markov_w2.weight"][said].clone()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "rms_norm_eps", "layer_types", "sliding_window", "use_sliding_window")
    written = {
        "architectures": [CLASSES[kind]],
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "transformer_layer_config": {name: getattr(config, name) for name in (*names, *more)}
        | {"model_type": "qwen3", "rope_parameters": dict(config.rope_parameters)},
        "draft_vocab_size": config.vocab_size if said is None else len(said),
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": list(config.feature_layers),
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": False,
        "sample_from_anchor": kind == "dspark",
        "speculators_config": {"algorithm": kind, "verifier": {"name_or_path": "Qwen/Qwen3-8B", "architectures": []}},
    }
    if kind == "dspark":
        heads = {"enable_confidence_head": True, "confidence_head_with_markov": True}
        written |= {"markov_rank": config.markov_rank, "markov_head_type": "vanilla"} | heads
    if kind == "dflash2":
        written |= DFLASH2
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written | changes))
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    return drafter

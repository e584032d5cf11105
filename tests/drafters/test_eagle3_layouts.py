# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3.1 and DeepSpec's EAGLE-3: read strictly, written where a layout has the words, and drafting exactly."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SIZES, prompt_of, tiny_target
from layouts_for_tests import deepspec_folder, eagle3_drafter
from safetensors.torch import load_file, save_file
from test_loading import assert_same

from specblock_hf import AutoDrafter
from specblock_hf.drafters.layouts import layout_of, write_checkpoint


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("sglang", {"fc_norm": True}),
        ("sglang", {"norm_before_fc": True}),
        ("sglang", {"norm_output": True}),
        ("speculators", {"fc_norm": True, "norm_output": True}),
        ("speculators", {"qk_norm": True, "norm_before_residual": True}),
    ],
)
def test_a_way_there_and_back_changes_nothing(tmp_path, layout, fields):
    drafter = eagle3_drafter(**fields)
    write_checkpoint(drafter, tmp_path / "there", layout)
    target = tiny_target("llama")
    again = AutoDrafter.from_pretrained(tmp_path / "there", target=target)
    assert_same(again, drafter)
    for name in ("fc_norm", "norm_output", "qk_norm", "norm_before_residual", "norm_before_fc"):
        assert getattr(again.config, name) == getattr(drafter.config, name) == fields.get(name, False)


def test_sglangs_nested_word_is_read(tmp_path):
    drafter = eagle3_drafter(norm_before_fc=True)
    write_checkpoint(drafter, tmp_path / "there", "sglang")
    file = tmp_path / "there" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"norm_before_fc": False, "eagle_config": {"norm_before_fc": True}}))
    assert_same(AutoDrafter.from_pretrained(tmp_path / "there"), drafter)


def test_a_layout_without_the_words_is_refused(tmp_path):
    for layout, fields in {"safeailab": {"norm_output": True}, "sglang": {"qk_norm": True}}.items():
        with pytest.raises(ValueError, match=rf"^The layout {layout} has no word for this drafter's norms"):
            write_checkpoint(eagle3_drafter(**fields), tmp_path / layout, layout)
    with pytest.raises(ValueError, match=r"^The layout deepspec holds the target's embedding"):
        write_checkpoint(eagle3_drafter(qk_norm=True), tmp_path / "deepspec", "deepspec")
    assert list(tmp_path.iterdir()) == []


def test_deepspecs_eagle_3_is_read_tensor_by_tensor(tmp_path):
    drafter = deepspec_folder(tmp_path / "deepspec")
    assert layout_of(json.loads((tmp_path / "deepspec" / "config.json").read_text()), "it").name == "deepspec"
    again = AutoDrafter.from_pretrained(tmp_path / "deepspec")
    # Without a draft vocabulary it is the target's, every token in its own place.
    weights = {name: value for name, value in drafter.state_dict().items() if name not in ("d2t", "t2d")}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in weights.items())
    assert again.draft_to_target.tolist() == list(range(SIZES["vocab_size"])) and bool(again.t2d.all())
    config = again.config
    assert (config.feature_layers, config.target_num_layers, config.qk_norm, config.own_embedding) == (
        [1, 2, 3],
        4,
        True,
        False,
    )
    assert config.target_name_or_path == "Qwen/Qwen3-8B"
    again.save_pretrained(tmp_path / "ours")
    assert_same(AutoDrafter.from_pretrained(tmp_path / "ours"), again)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_deepspecs_eagle_3_leaves_the_text_alone(tmp_path, kind):
    deepspec_folder(tmp_path / "deepspec")
    target, prompt = tiny_target(kind), prompt_of(7)
    drafter = AutoDrafter.from_pretrained(tmp_path / "deepspec", target=target).eval()
    expected = target.generate(prompt, max_new_tokens=24, do_sample=False)
    assert torch.equal(target.generate(prompt, max_new_tokens=24, do_sample=False, assistant_model=drafter), expected)
    assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds


def test_what_is_not_of_one_drafter_is_refused(tmp_path):
    for number, (changes, sentence) in enumerate(
        [
            ({"num_hidden_layers": 2}, r"has 2 layers and an EAGLE-3 drafter has one"),
            ({"target_layer_ids": None}, r"lacks target_layer_ids"),
            ({"target_layer_ids": [0, 1]}, r"The target's embedding is 48 wide"),
            ({"vocab_size": 40}, r"embed_tokens\.weight of .* has the shape"),
            ({"layer_types": ["sliding_attention"], "sliding_window": 8}, r"sees 8 tokens back"),
        ]
    ):
        deepspec_folder(tmp_path / str(number), **changes)
        with pytest.raises(ValueError, match=sentence):
            AutoDrafter.from_pretrained(tmp_path / str(number))
    folder = tmp_path / "half"
    deepspec_folder(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["layers.0.self_attn.q_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing layers\.0\.self_attn\.q_norm\.weight"):
        AutoDrafter.from_pretrained(folder)

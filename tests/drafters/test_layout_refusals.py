# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Other people's layouts: what is refused, and in which words."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import tiny_target
from layouts_for_tests import SAFEAILAB, SPECBLOCK_A, SPECULATORS, changed_copy
from safetensors.torch import load_file
from test_loading import LITTLE, peak_of, rewrite

from specblock_hf import AutoDrafter


@pytest.fixture
def copy(tmp_path):
    """Copies a golden checkpoint, changes its configuration, and gives the folder."""
    return partial(changed_copy, tmp_path / "copy")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("filename", ["vocab_mapping.pt", "pytorch_model.bin"])
def test_a_file_that_would_run_code_is_refused(copy, filename, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = copy(SPECBLOCK_A)
    if filename == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / filename).write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=rf"{filename} is damaged or holds more than tensors, so it is not loaded"):
        AutoDrafter.from_pretrained(folder)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    "source", [SPECBLOCK_A, SAFEAILAB, SPECULATORS], ids=["specblock", "safeailab", "speculators"]
)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("norm.weight"), r"missing norm\.weight"),
        (lambda t: t.update({"rotary": torch.ones(3)}), r"unexpected rotary"),
        (lambda t: t.update({"lm_head.weight": torch.ones(120, 63)}), r"misshapen lm_head\.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, source, change, sentence):
    folder = copy(source)
    rewrite(folder, change)
    with pytest.raises(
        ValueError, match=rf"copy is not a complete \w+Drafter checkpoint: {sentence}\. Download it again"
    ):
        AutoDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    ("source", "changes", "sentence"),
    [
        (SAFEAILAB, {"architectures": ["LlamaForCausalLM"], "draft_vocab_size": None}, r"draft_vocab_size"),
        (SPECULATORS, {"fc_norm": True}, r"missing fc_norm\.0\.weight"),
        (SPECULATORS, {"fc_norm": True, "norm_before_fc": True}, r"norm_before_fc and fc_norm norm the same"),
        (
            SPECULATORS,
            {"transformer_layer_config": {"model_type": "qwen2"}},
            r"has qwen2 layers and only Llama's and Qwen3's",
        ),
        (SPECULATORS, {"transformer_layer_config": {"num_hidden_layers": 2}}, r"has 2 layers and an EAGLE-3 drafter"),
        (
            SAFEAILAB,
            {"layer_types": ["sliding_attention"], "sliding_window": 2048},
            r"sees 2048 tokens back and EAGLE-3 drafters see everything here",
        ),
        (
            SPECULATORS,
            {"speculators_model_type": "mtp"},
            r"is a multi-token prediction \(MTP\) drafter, which cannot be",
        ),
        (
            SPECULATORS,
            {"speculators_model_type": "peagle"},
            r"is a P-EAGLE drafter, which cannot be run here because it",
        ),
        (SPECULATORS, {"speculators_model_type": "xpress"}, r"is a XPress drafter, which cannot be run here because"),
        (SAFEAILAB, {"architectures": ["Gemma4Eagle3Model"]}, r"is a Gemma 4 EAGLE-3 drafter, which cannot be run"),
        (SPECULATORS, {"speculators_model_type": "other"}, r"is not a drafter in a known layout"),
    ],
)
def test_what_a_configuration_asks_for_in_vain(copy, source, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutoDrafter.from_pretrained(copy(source, **changes))


@pytest.mark.parametrize("field", ["draft_vocab_size", "hidden_size", "diffspec_draft_token_num", "num_hidden_layers"])
def test_a_field_that_lacks_is_named(copy, field):
    with pytest.raises(
        ValueError, match=rf"^config\.json of .*copy lacks {field}; take it from the original repository"
    ):
        AutoDrafter.from_pretrained(copy(SPECBLOCK_A, drop=(field,)))


@pytest.mark.parametrize(
    ("source", "name", "value"),
    [
        (SPECBLOCK_A, "diffspec_draft_token_num", 20_000_000),
        (SPECBLOCK_A, "num_hidden_layers", 3000),
        (SPECBLOCK_A, "hidden_size", 2**40),
        (SAFEAILAB, "vocab_size", 10**13),
        (SAFEAILAB, "head_dim", 4096),
        (SAFEAILAB, "intermediate_size", 2**20),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(copy, source, name, value):
    refused, peak = peak_of(lambda: AutoDrafter.from_pretrained(copy(source, **{name: value})))
    assert isinstance(refused, ValueError) and peak < LITTLE
    assert re.search(r"give a whole number|misshapen", str(refused))


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        (SPECULATORS, {"transformer_layer_config": [1]}),
        (SPECULATORS, {"speculators_config": None}),
        (SPECULATORS, {"eagle_aux_hidden_state_layer_ids": "all"}),
        (SAFEAILAB, {"rope_scaling": "linear"}),
        (SAFEAILAB, {"rope_theta": "large"}),
        (SAFEAILAB, {"eagle_config": 3}),
        (SPECBLOCK_A, {"rank_classes": {}}),
        (SPECBLOCK_A, {"eos_token_id": "end"}),
    ],
)
def test_fields_of_another_type_end_in_a_sentence(copy, source, changes):
    with pytest.raises(ValueError, match=r"^[^\n]{30,}\.$"):
        AutoDrafter.from_pretrained(copy(source, **changes))


def packed(folder: Path, how: str) -> None:
    """PyTorch weights that are small on the disk and large in memory, or no weights by name."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    few = torch.zeros(1)
    contents = {
        "list": list(tensors.values()),
        "nested": {"state_dict": tensors},
        "repeated": tensors | {"more": few.expand(2**28)},
        "sparse": tensors | {"more": torch.sparse_coo_tensor(size=(2**28,))},
        "zipped": tensors | {"more": torch.zeros(2**26)},
    }[how]
    torch.save(contents, path)
    if how == "zipped":
        with zipfile.ZipFile(path) as stored, zipfile.ZipFile(folder / "small", "w", zipfile.ZIP_DEFLATED) as small:
            for name in stored.namelist():
                small.writestr(name, stored.read(name))
        (folder / "small").replace(path)
    assert path.stat().st_size < 2**20


@pytest.mark.parametrize("how", ["list", "nested", "repeated", "sparse", "zipped"])
def test_small_files_that_would_be_large_in_memory_are_refused(copy, how):
    folder = copy(SAFEAILAB)
    packed(folder, how)
    refused, peak = peak_of(lambda: AutoDrafter.from_pretrained(folder))
    assert isinstance(refused, ValueError) and peak < LITTLE
    assert re.search(r"pytorch_model\.bin is damaged or holds more than tensors, so it is not loaded", str(refused))


def test_a_plain_model_is_not_a_drafter(tmp_path):
    tiny_target("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is not a drafter in a known layout \(architectures \['LlamaForCausalLM'\]"):
        AutoDrafter.from_pretrained(tmp_path)

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading is strict: nothing is missing, nothing is left over, nothing is random."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SIZES, prompt_of, tiny_target
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, PreTrainedModel

from specblock_hf import AutoDrafter, Eagle3Config, Eagle3Drafter, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.checkpoints.files import DrafterFiles


def small_drafter(kind: str = "specblock") -> SpecBlockDrafter | Eagle3Drafter:
    torch.manual_seed(4)
    sizes = {key: value for key, value in SIZES.items() if key not in ("num_hidden_layers", "initializer_range")}
    sizes |= {"draft_vocab_size": 24, "head_dim": 8, "target_num_layers": 4}
    if kind == "eagle3":
        return Eagle3Drafter(Eagle3Config(**sizes)).eval()
    return SpecBlockDrafter(SpecBlockConfig(**sizes, num_hidden_layers=2)).eval()


KINDS = ("specblock", "eagle3")


@pytest.fixture(params=KINDS)
def saved(request, tmp_path):
    """A drafter and its folder."""
    drafter = small_drafter(request.param)
    drafter.save_pretrained(tmp_path / "drafter")
    return drafter, tmp_path / "drafter"


def rewrite(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_saved_drafter_comes_back(saved):
    drafter, folder = saved
    for load in (type(drafter).from_pretrained, AutoModel.from_pretrained, AutoDrafter.from_pretrained):
        loaded = load(folder)
        assert type(loaded) is type(drafter)
        assert_same(loaded, drafter)
    assert type(AutoConfig.from_pretrained(folder)) is type(drafter.config)


@pytest.mark.parametrize("load", ["own", "auto"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("lm_head.weight"), r"missing lm_head\.weight\."),
        (lambda t: t.pop("d2t"), r"missing d2t\."),
        (lambda t: (t.pop("norm.weight"), t.pop("t2d")), r"missing norm\.weight, t2d\."),
        (lambda t: t.update({"layers.0.extra": torch.ones(2)}), r"unexpected layers\.0\.extra\."),
        (lambda t: t.update({"norm.weight": torch.ones(7)}), r"misshapen .*norm\.weight"),
        (lambda t: t.update({"d2t": torch.zeros(25, dtype=torch.long)}), r"misshapen .*d2t"),
    ],
)
def test_what_does_not_fit_is_named(saved, load, change, sentence):
    drafter, folder = saved
    rewrite(folder, change)
    loader = AutoDrafter if load == "auto" else type(drafter)
    with pytest.raises(ValueError, match=rf"^.*drafter is not a complete {type(drafter).__name__} .*{sentence}"):
        loader.from_pretrained(folder)


def test_values_that_are_not_numbers_are_named(saved):
    drafter, folder = saved

    def spoil(tensors):
        tensors["norm.weight"][3] = torch.nan

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=r"not numbers in norm\.weight, or they were never loaded; download"):
        type(drafter).from_pretrained(folder)


def test_an_unloaded_weight_cannot_hide(saved):
    """What the strict check stands on: even the loader below it leaves no random number where a tensor was missing."""
    drafter, folder = saved
    rewrite(folder, lambda tensors: tensors.pop("lm_head.weight"))
    DrafterFiles(folder).weights()
    loaded = PreTrainedModel.from_pretrained.__func__(type(drafter), folder)
    assert loaded.lm_head.weight.isnan().all()
    assert torch.equal(loaded.norm.weight, drafter.norm.weight)
    # A fresh drafter is for training and starts from numbers.
    assert not any(weight.isnan().any() for weight in type(drafter)(drafter.config).parameters())


def test_a_truncated_file_is_refused(saved):
    drafter, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^The weights of .*drafter are damaged .* download them again\.$"):
        type(drafter).from_pretrained(folder)


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved, filename):
    _, folder = saved
    (folder / filename).unlink()
    with pytest.raises(OSError, match=filename.replace(".", r"\.")):
        AutoDrafter.from_pretrained(folder)


def test_a_configuration_that_is_not_json_is_refused(saved):
    _, folder = saved
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"^config\.json of .* is not valid JSON .* download it again\.$"):
        AutoDrafter.from_pretrained(folder)


def test_several_files_of_weights(saved, tmp_path):
    drafter, _ = saved
    drafter.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert_same(AutoDrafter.from_pretrained(tmp_path / "shards"), drafter)
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name.replace(".", r"\.")):
        AutoDrafter.from_pretrained(tmp_path / "shards")


def test_a_subfolder(saved):
    drafter, folder = saved
    assert_same(AutoDrafter.from_pretrained(folder.parent, subfolder="drafter"), drafter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_as_asked_and_as_saved(saved, tmp_path, dtype):
    drafter, folder = saved
    assert AutoDrafter.from_pretrained(folder, dtype=dtype).dtype == dtype
    drafter.to(dtype).save_pretrained(tmp_path / "typed")
    assert AutoDrafter.from_pretrained(tmp_path / "typed").dtype == dtype


def test_the_target_is_checked_where_it_is_given(saved):
    _, folder = saved
    AutoDrafter.from_pretrained(folder, target=tiny_target("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_num_layers": 5}))
    with pytest.raises(ValueError, match=r"number of layers is 5"):
        AutoDrafter.from_pretrained(folder, target=tiny_target("llama"))


def test_a_loaded_drafter_drafts(saved):
    _, folder = saved
    target = tiny_target("llama")
    drafter = AutoDrafter.from_pretrained(folder, target=target).eval()
    output = target.generate(prompt_of(5), max_new_tokens=12, do_sample=False, assistant_model=drafter)
    assert torch.equal(output, target.generate(prompt_of(5), max_new_tokens=12, do_sample=False))


def test_auto_drafter_has_no_instances():
    with pytest.raises(TypeError, match=r"call AutoDrafter\.from_pretrained"):
        AutoDrafter()

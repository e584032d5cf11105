# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Loading is strict: nothing is missing, nothing is left over, nothing is random."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from block_drafters_for_tests import block_drafter
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
LITTLE = 64 * 2**20


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


def change_config(folder, **fields) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture(params=["specblock", *BASELINES, "block_diffusion"])
def any_folder(request, tmp_path):
    """A saved drafter of each kind; the same lies as `good` beside it."""
    drafter = {"specblock": small_drafter, "block_diffusion": block_drafter}.get(
        request.param, lambda: baseline(request.param)
    )()
    drafter.save_pretrained(tmp_path / "drafter")
    drafter.config.save_pretrained(tmp_path / "good")
    return tmp_path / "drafter"


def peak_of(run):
    """What it returns or raises, and how many bytes more than before were in use meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _in_use("VmRSS")
    try:
        result = run()
    except Exception as error:
        result = error
    return result, _in_use("VmHWM") - before


def _in_use(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


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


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_as_what_they_are_or_as_what_is_wanted(stored, any_folder):
    AutoDrafter.from_pretrained(any_folder).to(stored).save_pretrained(any_folder)
    loaded = {wanted: AutoDrafter.from_pretrained(any_folder, dtype=wanted) for wanted in ("auto", torch.float64)}
    assert loaded["auto"].dtype == loaded["auto"].config.dtype == stored
    assert loaded[torch.float64].dtype == torch.float64


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


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38, -2e6])
def test_values_that_are_not_numbers_are_named(saved, value):
    drafter, folder = saved

    def spoil(tensors):
        tensors["norm.weight"][3] = value

    rewrite(folder, spoil)
    with pytest.raises(ValueError, match=r"not numbers in norm\.weight, or they were never loaded; download"):
        type(drafter).from_pretrained(folder)


def test_values_that_the_asked_dtype_cannot_hold_are_named(saved):
    drafter, folder = saved

    def spoil(tensors):
        tensors["norm.weight"][3] = 7e4

    rewrite(folder, spoil)
    assert AutoDrafter.from_pretrained(folder, dtype=torch.bfloat16).norm.weight[3] == 70144
    with pytest.raises(ValueError, match=r"infinite, absurdly large or not numbers in norm\.weight"):
        AutoDrafter.from_pretrained(folder, dtype=torch.float16)


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


@pytest.mark.parametrize("content", ["[1]", "null", "3", '"text"', "[" * 100_000, "\x00", "{}"])
@pytest.mark.parametrize("load", [AutoDrafter.from_pretrained, SpecBlockDrafter.from_pretrained])
def test_a_configuration_that_is_no_object_is_refused(saved, load, content):
    _, folder = saved
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"(config\.json of .* is (not valid JSON|a JSON )|is not a ).*\.$"):
        load(folder)


@pytest.mark.parametrize("change", [{"model_type": ["specblock"]}, {"model_type": {}}, {"architectures": [3]}])
def test_a_configuration_that_names_no_model_is_refused(saved, change):
    _, folder = saved
    change_config(folder, **change)
    with pytest.raises(ValueError, match=r"^config\.json of .* names no model .* take it from the original"):
        AutoDrafter.from_pretrained(folder)


def test_a_drafter_of_another_kind_is_refused(tmp_path):
    small_drafter("eagle3").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"is not a SpecBlockDrafter checkpoint \(model_type 'eagle3'\); load it with"
    ):
        SpecBlockDrafter.from_pretrained(tmp_path)


# Nothing large is read or built for a drafter that cannot be.


@pytest.mark.parametrize(
    "sizes",
    [{"block_size": 20_000_000}, {"num_hidden_layers": 3000}, {"vocab_size": 10**13}, {"hidden_size": 10**9}],
    ids=str,
)
def test_absurd_sizes_are_refused(any_folder, sizes):
    change_config(any_folder, **sizes)
    ((name, size),) = sizes.items()
    refused, peak = peak_of(lambda: AutoDrafter.from_pretrained(any_folder))
    known = name in vars(AutoConfig.from_pretrained(any_folder.parent / "good"))
    assert peak < LITTLE
    if not known:  # a field of other kinds, which is not read
        assert type(refused).__name__.endswith("Drafter")
    else:
        assert re.match(rf"{name} is {size}; give a whole number ", str(refused))


@pytest.mark.parametrize(
    "sizes", [{"vocab_size": 2**24}, {"hidden_size": 2**17, "target_hidden_size": 2**17}], ids=str
)
def test_shapes_are_compared_before_anything_is_built(any_folder, sizes):
    change_config(any_folder, **sizes, num_attention_heads=1, num_key_value_heads=1)
    refused, peak = peak_of(lambda: AutoDrafter.from_pretrained(any_folder))
    assert isinstance(refused, ValueError) and "is not a complete" in str(refused) and "misshapen" in str(refused)
    assert peak < LITTLE


@pytest.mark.parametrize("damage", ["outside", "negative", "repeated", "unmarked", "nan", "far"])
def test_a_vocabulary_that_is_none_is_refused(any_folder, damage):
    if "d2t" not in load_file(any_folder / "model.safetensors"):
        return  # it says all that the target can

    def spoil(tensors):
        d2t = tensors["d2t"]
        if damage == "nan":
            tensors["d2t"] = torch.full_like(d2t, torch.nan, dtype=torch.float32)
        elif damage == "repeated":
            d2t[1] = d2t[0] - 1
        elif damage == "unmarked":
            tensors["t2d"][int(d2t[0])] = False
        else:
            d2t[0] = {"outside": 1000, "negative": -1, "far": 2**62}[damage]

    rewrite(any_folder, spoil)
    with pytest.raises(ValueError, match=r"^d2t and t2d of .* do not describe one draft vocabulary"):
        AutoDrafter.from_pretrained(any_folder)


# Nothing is fetched or run that a configuration names, and no file elsewhere is read.


@pytest.mark.parametrize("load", ["own", "auto", "transformers"])
def test_a_configuration_cannot_ask_for_code_or_other_files(saved, load, monkeypatch):
    drafter, folder = saved
    change_config(
        folder,
        attn_implementation="user/kernel",
        _attn_implementation="user/kernel",
        auto_map={"AutoModel": "user/code--modeling.Model", "AutoConfig": "user/code--modeling.Config"},
        transformers_weights="../elsewhere.safetensors",
        quantization_config={"quant_method": "fp8"},
        fusion_config={"patch_embeddings": True},
        experts_implementation="user/kernel",
        per_layer_config={"0": {"hidden_size": 3}},
        tie_word_embeddings=True,
        output_attentions=True,
        num_labels=10**9,
    )
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "user/model"}))
    (folder / ".metadata").write_bytes(b"of a distributed checkpoint")
    monkeypatch.setattr("huggingface_hub.file_download.http_get", pytest.fail)
    monkeypatch.setattr("socket.socket.connect", pytest.fail)
    loader = {"own": type(drafter), "auto": AutoDrafter, "transformers": AutoModel}[load]
    loaded = loader.from_pretrained(folder)
    assert_same(loaded, drafter)
    assert loaded.config._attn_implementation == "sdpa"
    assert loaded.config.to_dict() == drafter.config.to_dict() | {"_name_or_path": str(folder)}
    asked = loader.from_pretrained(folder, attn_implementation="eager", tree_budget=7)
    assert (asked.config._attn_implementation, asked.config.tree_budget) == ("eager", 7)


def in_shards(folder) -> dict[str, str]:
    """Split the weights of a folder into two files; the index's map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    return {name: f"part-{place % 2}.safetensors" for place, name in enumerate(names)}


@pytest.mark.parametrize("form", ["absolute", "above", "windows", "below", "link"])
def test_a_list_of_files_names_none_elsewhere(saved, form):
    _, folder = saved
    weight_map = in_shards(folder)
    part = folder / "part-0.safetensors"
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    part.rename(elsewhere / part.name)
    if form == "link":
        part.symlink_to(elsewhere / part.name)
    (folder / "sub").symlink_to(elsewhere)
    named = {
        "absolute": str(elsewhere / part.name),
        "above": f"../elsewhere/{part.name}",
        "windows": f"..\\elsewhere\\{part.name}",
        "below": f"sub/{part.name}",
        "link": part.name,
    }[form]
    weight_map = {key: named if value == part.name else value for key, value in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        ValueError, match=r"names '.*', which does not lie beside it, and files elsewhere are not read"
    ):
        AutoDrafter.from_pretrained(folder)


def test_a_folder_of_the_hubs_cache_is_read(saved):
    drafter, folder = saved
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": in_shards(folder)}))
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    assert_same(AutoDrafter.from_pretrained(snapshot), drafter)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "[]", "{", "null"]
)
def test_a_list_of_files_that_is_none_is_refused(saved, index):
    _, folder = saved
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"^model\.safetensors\.index\.json of .* download it again\.$"):
        AutoDrafter.from_pretrained(folder)


def test_pytorch_weights_in_this_layout_are_refused(saved):
    _, folder = saved
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has its weights in pytorch_model\.bin, and drafters in .* keep them in model\."
    ):
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


def test_variants_are_refused_and_cost_nothing(saved):
    drafter, folder = saved
    with pytest.raises(ValueError, match=r"drafter cannot hold a variant, 'fp16'; a drafter's folder holds its"):
        drafter.save_pretrained(folder, variant="fp16")
    for load in (AutoDrafter.from_pretrained, type(drafter).from_pretrained):
        with pytest.raises(ValueError, match=r"drafter cannot be read as a variant, 'fp16'; a drafter's folder"):
            load(folder, variant="fp16")
        assert_same(load(folder), drafter)


def test_auto_drafter_has_no_instances():
    with pytest.raises(TypeError, match=r"call AutoDrafter\.from_pretrained"):
        AutoDrafter()

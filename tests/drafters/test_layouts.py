# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Other people's layouts: what is read from them, and that a way there and back changes nothing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import prompt_of, tiny_target
from layouts_for_tests import SAFEAILAB, SPECBLOCK_A, SPECBLOCK_B, SPECULATORS, changed_copy
from safetensors.torch import load_file, save_file
from test_loading import assert_same, rewrite, small_drafter
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pipelines.base import load_assistant_model

from specblock_hf import AutoDrafter, Eagle3Drafter, SpecBlockConfig, SpecBlockDrafter, cli
from specblock_hf.drafters.layouts import layout_of, write_checkpoint


GOLDEN = {
    "specblock_a": SPECBLOCK_A,
    "specblock_b": SPECBLOCK_B,
    "safeailab": SAFEAILAB,
    "speculators": SPECULATORS,
}


@pytest.fixture
def copy(tmp_path):
    """Copies a golden checkpoint, changes its configuration, and gives the folder."""
    return partial(changed_copy, tmp_path / "copy")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_folders_are_read(name):
    drafter = AutoDrafter.from_pretrained(GOLDEN[name])
    assert type(drafter) is (SpecBlockDrafter if name.startswith("specblock") else Eagle3Drafter)
    tensors = load_file(GOLDEN[name] / "model.safetensors")
    tensors.pop("embed_tokens.weight", None)
    ours = drafter.state_dict()
    assert ours.keys() == {key.replace("midlayer.", "layers.0.") for key in tensors}
    for key, value in tensors.items():
        assert torch.equal(ours[key.replace("midlayer.", "layers.0.")], value), key


def test_official_configurations_are_translated():
    config = AutoDrafter.from_pretrained(SPECBLOCK_A).config
    assert (config.block_size, config.num_hidden_layers, config.draft_vocab_size, config.vocab_size) == (
        4,
        2,
        120,
        300,
    )
    assert (config.num_rank_classes, config.rms_norm_eps, config.head_dim, config.rank_top_k) == (4, 1e-5, 16, 20)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}  # where the file says nothing
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.feature_layers == [-1, -1, -1] and config.target_num_layers is None
    config = AutoDrafter.from_pretrained(SPECBLOCK_B).config
    assert (config.block_size, config.num_hidden_layers, config.head_dim, config.rms_norm_eps) == (3, 3, 8, 1e-6)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}


def test_eagle3_configurations_are_translated():
    config = AutoDrafter.from_pretrained(SAFEAILAB).config
    assert (config.num_blocks, config.beam_width, config.tree_budget) == (8, 10, 59)
    assert config.feature_layers == [-1, -1, -1] and not config.own_embedding
    config = AutoDrafter.from_pretrained(SPECULATORS).config
    assert config.feature_layers == [2, 4, 5]
    assert config.target_name_or_path == "golden/tiny-llama-8-layers"
    assert not config.own_embedding and config.rope_parameters["rope_theta"] == 10000.0


def target_config(**overrides) -> LlamaConfig:
    fields = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 12, "eos_token_id": [7, 8], "bos_token_id": 5}
    return LlamaConfig(**(fields | {"pad_token_id": 6} | overrides), name_or_path="org/target")


@pytest.mark.parametrize("folder", [SPECBLOCK_A, SAFEAILAB], ids=["specblock", "safeailab"])
def test_the_target_fills_in_what_a_layout_does_not_record(folder, tmp_path):
    drafter = AutoDrafter.from_pretrained(folder, target=target_config())
    drafter.save_pretrained(tmp_path)
    for config in (drafter.config, AutoDrafter.from_pretrained(tmp_path).config):
        assert (config.eos_token_id, config.bos_token_id, config.pad_token_id) == ([7, 8], 5, 6)
        assert (config.target_num_layers, config.feature_layers) == (12, [2, 6, 9])
        assert config.target_name_or_path == "org/target"


@pytest.mark.parametrize("layout", ["ours", "release"])
def test_a_drafter_is_put_where_its_target_begins(layout, tmp_path, monkeypatch):
    target, folder, moved = LlamaForCausalLM(target_config()), SPECBLOCK_A, []
    if layout == "ours":
        AutoDrafter.from_pretrained(folder, target=target.config).save_pretrained(folder := tmp_path)
    own = SpecBlockDrafter.to
    monkeypatch.setattr(SpecBlockDrafter, "to", lambda self, *args: moved.append(args) or own(self, *args))
    AutoDrafter.from_pretrained(folder, target=target)
    assert moved == [(target.device,)]
    AutoDrafter.from_pretrained(folder, target=target.config)
    AutoDrafter.from_pretrained(folder, target=target, device_map={"": "cpu"})
    AutoDrafter.from_pretrained(folder, target=target.to("meta"))
    assert len(moved) == 1


def test_recorded_layers_stay(copy):
    assert AutoDrafter.from_pretrained(SPECULATORS, target=target_config()).config.feature_layers == [2, 4, 5]
    nested = copy(
        SAFEAILAB,
        architectures=["LlamaForCausalLMEagle3"],
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 5, 8], "use_aux_hidden_state": True},
    )
    # SGLang's numbers are those of the layers that the states leave.
    assert AutoDrafter.from_pretrained(nested, target=target_config()).config.feature_layers == [2, 6, 9]


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, {"rope_type": "default", "rope_theta": 500000.0}),
        ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500000.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0, "rope_theta": 500000.0}),
    ],
)
def test_rope_is_what_the_file_says(copy, scaling, expected):
    folder = copy(SAFEAILAB, rope_theta=500000.0, rope_scaling=scaling)
    assert AutoDrafter.from_pretrained(folder).config.rope_parameters == expected
    folder = copy(SAFEAILAB, rope_parameters=expected, drop=("rope_theta", "rope_scaling"))
    assert AutoDrafter.from_pretrained(folder).config.rope_parameters == expected


def test_a_layer_count_that_means_the_targets_is_ignored(copy):
    folder = copy(SAFEAILAB, num_hidden_layers=40, drop=("num_key_value_heads",))
    with pytest.raises(
        ValueError, match=r"misshapen layers\.0\.self_attn\.k_proj\.weight, layers\.0\.self_attn\.v_proj"
    ):
        AutoDrafter.from_pretrained(folder)  # as many key heads as heads, where nothing is said
    assert AutoDrafter.from_pretrained(copy(SAFEAILAB, num_hidden_layers=40)).config.num_hidden_layers == 1


# Official embeddings.


@pytest.mark.parametrize("source", [SPECBLOCK_A, SAFEAILAB], ids=["specblock", "safeailab"])
def test_a_copy_of_the_targets_embedding(copy, source):
    folder = copy(source, embed_requires_grad=False)
    name = "input_layer.embed_tokens.weight" if source == SPECBLOCK_A else "embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(300, 64)}))
    assert_same(AutoDrafter.from_pretrained(folder), AutoDrafter.from_pretrained(source))
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(299, 64)}))
    with pytest.raises(ValueError, match=rf"^{name} of .* has the shape \(299, 64\) and the target's .* \(300, 64\);"):
        AutoDrafter.from_pretrained(folder)


@pytest.mark.parametrize("source", [SAFEAILAB, SPECULATORS], ids=["safeailab", "speculators"])
def test_a_trained_embedding_is_kept(copy, source):
    folder = copy(source, embed_requires_grad=True)
    rewrite(folder, lambda tensors: tensors.update({"embed_tokens.weight": torch.full((300, 64), 0.5)}))
    drafter = AutoDrafter.from_pretrained(folder)
    assert drafter.config.own_embedding and (drafter.embed_tokens.weight == 0.5).all()


def test_a_narrow_drafter_needs_its_own_embedding(copy):
    folder = copy(SAFEAILAB)

    def widen(tensors):
        tensors["fc.weight"] = torch.ones(64, 3 * 96)
        tensors["embed_tokens.weight"] = torch.ones(300, 64)

    rewrite(folder, widen)
    config = AutoDrafter.from_pretrained(folder).config
    assert (config.target_hidden_size, config.hidden_size, config.own_embedding) == (96, 64, True)
    rewrite(folder, lambda tensors: tensors.pop("embed_tokens.weight"))
    with pytest.raises(ValueError, match=r"needs own_embedding=True"):
        AutoDrafter.from_pretrained(folder)


# The draft vocabulary.


def vocabulary_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "vocab_mapping.pt", weights_only=True)


def test_the_vocabulary_may_lie_beside_the_weights(copy):
    folder = copy(SPECBLOCK_A)
    rewrite(folder, lambda tensors: (tensors.pop("d2t"), tensors.pop("t2d")))
    assert_same(AutoDrafter.from_pretrained(folder), AutoDrafter.from_pretrained(SPECBLOCK_A))
    (folder / "vocab_mapping.pt").unlink()
    with pytest.raises(ValueError, match=r"not a complete SpecBlockDrafter checkpoint: missing d2t, t2d\."):
        AutoDrafter.from_pretrained(folder)


def test_two_vocabularies_are_refused(copy):
    folder = copy(SPECBLOCK_A)
    mapping = vocabulary_of(folder)
    torch.save(mapping | {"d2t": mapping["d2t"] + 1}, folder / "vocab_mapping.pt")
    with pytest.raises(
        ValueError, match=r"^d2t differs between the weights and vocab_mapping\.pt of .*copy; download"
    ):
        AutoDrafter.from_pretrained(folder)


@pytest.mark.parametrize("damage", ["ids", "outside", "repeated", "unmarked"])
def test_a_vocabulary_that_is_none_is_refused(copy, damage):
    folder = copy(SAFEAILAB)

    def spoil(tensors):
        d2t = tensors["d2t"]
        if damage == "ids":
            tensors["d2t"] = d2t + torch.arange(len(d2t))  # ids where offsets belong
        elif damage == "outside":
            d2t[-1] = 1000
        elif damage == "repeated":
            d2t[1] = d2t[0] - 1
        else:
            tensors["t2d"][int(d2t[0])] = False

    rewrite(folder, spoil)
    with pytest.raises(
        ValueError, match=r"^d2t and t2d of .* do not describe one draft vocabulary: d2t must hold offsets"
    ):
        AutoDrafter.from_pretrained(folder)


def test_offsets_say_which_tokens_a_vocabulary_has(copy):
    folder = copy(SAFEAILAB)
    expected = AutoDrafter.from_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.pop("t2d"))
    assert_same(AutoDrafter.from_pretrained(folder), expected)
    rewrite(folder, lambda tensors: tensors["d2t"].add_(1000))
    with pytest.raises(ValueError, match=r"^d2t and t2d of .* do not describe one draft vocabulary: "):
        AutoDrafter.from_pretrained(folder)


def test_fields_of_the_configuration_are_the_callers(copy):
    folder = copy(SAFEAILAB)
    drafter = AutoDrafter.from_pretrained(folder, tree_budget=7, ignore_mismatched_sizes=False)
    assert drafter.config.tree_budget == 7
    assert_same(drafter, AutoDrafter.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"^tree_budget is -1; give a whole number from 0 to 65536\."):
        AutoDrafter.from_pretrained(folder, tree_budget=-1)
    with pytest.raises(ValueError, match=r"misshapen .*lm_head\.weight"):
        AutoDrafter.from_pretrained(folder, draft_vocab_size=8)


def test_a_full_vocabulary_needs_no_mapping(copy):
    folder = copy(SAFEAILAB, draft_vocab_size=300)

    def widen(tensors):
        tensors["lm_head.weight"] = torch.ones(300, 64)
        tensors.pop("d2t")
        tensors.pop("t2d")

    rewrite(folder, widen)
    drafter = AutoDrafter.from_pretrained(folder)
    assert drafter.draft_to_target.tolist() == list(range(300)) and drafter.t2d.all()


# Files of weights.


def test_pytorch_weights_are_read(copy):
    folder = copy(SAFEAILAB)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(AutoDrafter.from_pretrained(folder), AutoDrafter.from_pretrained(SAFEAILAB))


@pytest.mark.parametrize("source", GOLDEN.values(), ids=GOLDEN)
def test_sharded_weights_are_read(copy, source):
    folder = copy(source)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(AutoDrafter.from_pretrained(folder), AutoDrafter.from_pretrained(source))


# There and back.


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("specblock", "specblock"), ("eagle3", "safeailab"), ("eagle3", "sglang"), ("eagle3", "speculators")],
)
def test_a_drafter_comes_back_from_another_layout(kind, layout, tmp_path):
    drafter = small_drafter(kind).to(torch.bfloat16)
    drafter.set_draft_vocabulary(torch.randperm(32)[:24])
    write_checkpoint(drafter, tmp_path, layout)
    written = json.loads((tmp_path / "config.json").read_text())
    assert layout_of(written, tmp_path).name == layout
    back = AutoDrafter.from_pretrained(tmp_path, target=tiny_target("llama"))
    assert back.dtype == torch.bfloat16
    # What pipeline() asks of an assistant: the vocabulary and the special tokens of the target.
    assert load_assistant_model(tiny_target("llama"), back, None) == (back, None)
    assert_same(back, drafter)
    differing = {
        key: value for key, value in back.config.to_diff_dict().items() if drafter.config.to_dict().get(key) != value
    }
    assert differing.keys() <= {"_name_or_path", "target_name_or_path", "dtype", "architectures"}
    prompt = prompt_of(6)
    options = {"max_new_tokens": 10, "do_sample": False}
    plain = tiny_target("llama").generate(prompt, **options)
    assert torch.equal(tiny_target("llama").generate(prompt, assistant_model=back.float(), **options), plain)


@pytest.mark.parametrize(("source", "layout"), [(SPECBLOCK_A, "specblock"), (SAFEAILAB, "safeailab")])
def test_the_golden_files_are_written_as_they_were(source, layout, tmp_path):
    write_checkpoint(AutoDrafter.from_pretrained(source), tmp_path, layout)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, source))
    shared = theirs.keys() - {
        "architectures",
        "transformers_version",
        "pretraining_tp",
        "use_cache",
        "_comment_specblock",
    }
    assert {key: ours.get(key) for key in shared} == {key: theirs[key] for key in shared}
    assert layout_of(ours, tmp_path).name == layout_of(theirs, source).name == layout
    if layout == "specblock":
        assert vocabulary_of(tmp_path).keys() == vocabulary_of(source).keys()


def test_norms_and_embedding_survive_speculators(tmp_path):
    drafter = small_drafter("eagle3")
    config = type(drafter.config)(
        **drafter.config.to_dict()
        | {"norm_before_residual": True, "norm_before_fc": True, "own_embedding": True, "feature_layers": [0, 1, 4]}
    )
    drafter = Eagle3Drafter(config)
    write_checkpoint(drafter, tmp_path, "speculators")
    back = AutoDrafter.from_pretrained(tmp_path)
    assert_same(back, drafter)
    assert back.config.feature_layers == [0, 1, 4]
    for layout in ("safeailab", "sglang"):
        with pytest.raises(ValueError, match=r"does not record which states .* this drafter reads \[0, 1, 4\] of 4,"):
            write_checkpoint(drafter, tmp_path, layout)
    drafter.config.feature_layers = [2, 2, 1]
    with pytest.raises(
        ValueError, match=r"^The layout safeailab has no word for this drafter's norms; write it as spec"
    ):
        write_checkpoint(drafter, tmp_path, "safeailab")


@pytest.mark.parametrize(
    ("kind", "layout"), [("specblock", "safeailab"), ("eagle3", "specblock"), ("eagle3", "dflash")]
)
def test_a_layout_of_another_method_is_refused(kind, layout, tmp_path):
    with pytest.raises(
        ValueError, match=rf"^A {kind} drafter cannot be written in the layout {layout}; choose another"
    ):
        write_checkpoint(small_drafter(kind), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_a_markov_term_has_no_place_in_the_release_layout(tmp_path):
    config = small_drafter("specblock").config.to_dict() | {"markov_rank": 2}
    message = r"^The layout specblock has no place for this drafter's Markov term \(markov_rank=2\); keep it in our"
    with pytest.raises(ValueError, match=message):
        write_checkpoint(SpecBlockDrafter(SpecBlockConfig(**config)), tmp_path / "out", "specblock")
    assert not (tmp_path / "out").exists()


# The commands.


def test_convert(tmp_path, capsys):
    assert cli.main(["convert", str(SAFEAILAB), str(tmp_path / "spec"), "--to", "speculators"]) == 0
    assert cli.main(["convert", str(tmp_path / "spec"), str(tmp_path / "ours")]) == 0
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "safeailab"]) == 0
    assert_same(AutoDrafter.from_pretrained(tmp_path / "ours"), AutoDrafter.from_pretrained(SAFEAILAB))
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), load_file(SAFEAILAB / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert str(tmp_path / "back") in capsys.readouterr().out
    assert cli.main(["convert", str(SAFEAILAB), str(tmp_path / "x"), "--to", "specblock"]) == 2
    assert "A eagle3 drafter cannot be written in the layout specblock" in capsys.readouterr().err


def test_inspect(tmp_path, capsys):
    target = tmp_path / "target"
    target_config().save_pretrained(target)
    assert cli.main(["inspect", str(SPECULATORS), "--target", str(target)]) == 0
    output = capsys.readouterr().out
    for line in (
        "class: Eagle3Drafter",
        "layout: speculators",
        "target: golden/tiny-llama-8-layers",
        "draft vocabulary: 120 of 300 tokens (40.0%)",
        "reads hidden states: 2, 4, 5",
        f"compatible with {target}: yes",
    ):
        assert line in output
    parameters = sum(weight.numel() for weight in AutoDrafter.from_pretrained(SPECULATORS).parameters())
    assert f"parameters: {parameters:,} in float32" in output
    target_config(hidden_size=128).save_pretrained(target)
    assert cli.main(["inspect", str(SPECULATORS), "--target", str(target)]) == 1
    assert f"compatible with {target}: no. This drafter was trained for" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2

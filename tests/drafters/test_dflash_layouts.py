# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The published layouts of block-diffusion drafters: read, refused, and fetched by name; their code is never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import hub_client
import pytest
import torch
from batches_for_tests import padded_batch
from block_drafters_for_tests import block_drafter, pull_and_generate
from hub_client import Client
from hub_server import HubServer, Repo
from hybrids_for_tests import hybrid_target
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from safetensors.torch import load_file
from test_loading import assert_same, rewrite, small_drafter
from transformers import Qwen3Config

from specblock_hf import AutoDrafter, BlockDiffusionDrafter, cli
from specblock_hf.drafters.common.registry import published_layouts
from specblock_hf.drafters.layouts import layout_of, write_checkpoint


FOLDER = Path(__file__).parents[1] / "fixtures" / "conformance" / "block_drafters"
GOLDEN = {
    "full": (FOLDER / "dflash" / "full" / "checkpoint", "dflash"),
    "sliding": (FOLDER / "dflash" / "sliding" / "checkpoint", "dflash"),
    "dflash2": (FOLDER / "dflash" / "dflash2" / "checkpoint", "dflash"),
    "jetspec": (FOLDER / "jetspec" / "causal" / "checkpoint", "dflash"),
    "dspark": (FOLDER / "dspark" / "vanilla" / "checkpoint", "dspark"),
}
TRAP = 'raise RuntimeError("the repository\'s code was run")\n'


@pytest.fixture
def copy(tmp_path):
    """Copies a golden checkpoint, changes its configuration and its `dflash_config`, and gives the folder."""

    def make(name: str, drop: tuple[str, ...] = (), dflash: dict | None = None, **changes) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(GOLDEN[name][0], folder)
        config = json.loads((folder / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in drop} | changes
        if dflash is not None:
            inner = {key: value for key, value in config.get("dflash_config", {}).items() if key not in drop}
            config["dflash_config"] = inner | dflash
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "dflash.py").write_text(TRAP)
        return folder

    return make


@pytest.mark.parametrize("name", GOLDEN)
def test_every_tensor_of_a_published_checkpoint_is_taken_as_it_is(name, copy):
    folder, layout = copy(name), GOLDEN[name][1]
    assert layout_of(json.loads((folder / "config.json").read_text()), folder).name == layout
    drafter = AutoDrafter.from_pretrained(folder, trust_remote_code=True)
    assert type(drafter) is BlockDiffusionDrafter
    published = load_file(folder / "model.safetensors")
    assert published.keys() == drafter.state_dict().keys()
    assert all(torch.equal(value, drafter.state_dict()[key]) for key, value in published.items())


@pytest.mark.parametrize("name", GOLDEN)
def test_it_is_kept_in_our_layout(name, tmp_path):
    drafter = AutoDrafter.from_pretrained(GOLDEN[name][0], target=Qwen3Config.from_pretrained(FOLDER / "target"))
    drafter.save_pretrained(tmp_path)
    again = AutoDrafter.from_pretrained(tmp_path)
    assert_same(again, drafter)
    assert again.config.layer_rules == drafter.config.layer_rules
    assert differing_fields(again, drafter) == set()


def read(folder: Path, **kwargs):
    return AutoDrafter.from_pretrained(folder, **kwargs).config


def test_what_the_configurations_say(copy):
    config = read(copy("full"))
    assert (config.block_size, config.mask_token_id, config.feature_layers) == (8, 47, [2, 4, 6])
    assert (config.target_num_layers, config.target_hidden_size, config.num_predictions) == (8, 32, 7)
    assert config.rope_parameters["rope_theta"] == 1e6
    assert config.layer_rules == [(False, None)] * 3


@pytest.mark.parametrize(
    ("name", "changes", "rules"),
    [
        ("sliding", {}, [(True, 6), (True, 6), (False, None)]),
        ("sliding", {"is_causal": False}, [(False, 6), (False, 6), (False, None)]),
        ("sliding", {"is_causal": True}, [(True, 6), (True, 6), (True, None)]),
        ("sliding", {"dflash": {"causal": False, "causal_head": True}}, [(False, 6), (False, 6), (False, None)]),
        ("sliding", {"is_causal": True, "dflash": {"causal": False}}, [(True, 6), (True, 6), (True, None)]),
        ("sliding", {"use_sliding_window": False}, [(True, None), (True, None), (False, None)]),
        ("sliding", {"drop": ("use_sliding_window",)}, [(True, 6), (True, 6), (False, None)]),
        ("jetspec", {}, [(True, None)] * 3),
        ("jetspec", {"dflash": {"causal_head": False}}, [(False, None)] * 3),
        ("dspark", {}, [(False, None)] * 3),
    ],
)
def test_which_rows_a_layer_sees(copy, name, changes, rules):
    assert read(copy(name, **changes)).layer_rules == rules


def test_fields_are_found_where_they_are(copy):
    """Inside `dflash_config` first, then at the top, then by the rule of the published code."""
    config = read(copy("sliding", drop=("block_size",), block_size=5, dflash={}, eos_token_id=3))
    assert (config.block_size, config.eos_token_id) == (5, 3)


def test_what_no_field_says_follows_from_the_published_code(copy):
    config = read(copy("full", drop=("block_size", "target_layer_ids"), dflash={}))
    assert (config.block_size, config.feature_layers) == (16, [2, 4, 6])


def test_numbers_of_the_configuration(copy):
    dflash = {"input_embedding_scale": 0.5, "output_multiplier": 0.25, "final_logit_softcapping": 30.0}
    config = read(copy("full", dflash=dflash))
    assert [getattr(config, name) for name in dflash] == [0.5, 0.25, 30.0]


def test_the_target_fills_in_what_is_not_recorded(copy):
    target = Qwen3Config.from_pretrained(FOLDER / "target")
    target.eos_token_id, target.pad_token_id, target.vocab_size = 5, 6, 60
    folder = copy("full")
    config = read(folder, target=target)
    assert (config.eos_token_id, config.pad_token_id, config.vocab_size) == (5, 6, 60)
    assert read(folder).vocab_size == 48


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("full", {"drop": ("hidden_size", "head_dim")}, r"^config\.json of .* lacks hidden_size, head_dim; take it"),
        ("full", {"drop": ("mask_token_id",), "dflash": {}}, r"^config\.json of .* lacks mask_token_id; take it"),
        ("full", {"drop": ("target_layer_ids", "num_target_layers"), "dflash": {}}, r"lacks target_layer_ids; take"),
        (
            "full",
            {"dflash": {"projector_type": "other"}},
            r"^dflash_config of .* sets projector_type, which this lib",
        ),
        ("full", {"dflash": {"use_swa": True, "attention_mode": "mla"}}, r" sets attention_mode, use_swa, which "),
        ("full", {"dflash": {"target_layer_ids": [1, 3, 7]}}, r" reads what leaves layer 7 of a target of 8 layers; "),
        ("full", {"dflash": {"target_layer_ids": [-2, 3, 5]}}, r" reads what leaves layer -2 of a target of 8 layer"),
        (
            "jetspec",
            {"rope_parameters": {"full_attention": {"rope_theta": 1}}},
            r" states no rope_theta for all layers",
        ),
        (
            "full",
            {"architectures": ["DominoDraftModel"]},
            r"^.*copy is a Domino drafter, which cannot be run here because",
        ),
        (
            "full",
            {"dflash": {"projector_type": "domino"}},
            r"^.*copy is a Domino drafter, which cannot be run here because",
        ),
        ("dspark", {"architectures": ["Gemma4DSparkModel"]}, r"is a variant of DFlash that is not known \(architec"),
        ("dspark", {"markov_head_type": "rnn"}, r"^.*copy has a Markov head of the type 'rnn'; only \"vanilla\" ones"),
    ],
)
def test_unknown_variants_are_refused(copy, name, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutoDrafter.from_pretrained(copy(name, **changes))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t.pop("fc.weight"), r"is not a complete BlockDiffusionDrafter checkpoint: missing fc\.weight\."),
        (lambda t: t.update({"layers.0.extra": torch.ones(2)}), r"unexpected layers\.0\.extra\."),
        (lambda t: t.update({"norm.weight": torch.ones(7)}), r"misshapen norm\.weight\."),
        (lambda t: t.update({"layers.0.self_attn.g_proj.weight": torch.ones(2)}), r"DFlash with gated attention, whi"),
        (lambda t: t.update({"mask_embedding": torch.ones(32)}), r"variant of DFlash with a mask that is no token, "),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, change, sentence):
    folder = copy("full")
    rewrite(folder, change)
    with pytest.raises(ValueError, match=sentence):
        AutoDrafter.from_pretrained(folder)


def test_a_dspark_without_its_heads(copy):
    """DeepSpec's own DFlash checkpoints are of this class, too."""
    folder = copy("dspark", markov_rank=0, enable_confidence_head=False)
    rewrite(folder, lambda t: [t.pop(key) for key in list(t) if key.startswith(("markov", "confidence"))])
    drafter = AutoDrafter.from_pretrained(folder)
    assert drafter.config.predicts_from_anchor and drafter.config.own_embedding
    assert drafter.config.num_predictions == 7


@pytest.mark.parametrize("name", GOLDEN)
def test_a_way_there_and_back_changes_nothing(name, tmp_path):
    folder, layout = GOLDEN[name]
    drafter = AutoDrafter.from_pretrained(folder)
    write_checkpoint(drafter, tmp_path, layout)
    written = json.loads((tmp_path / "config.json").read_text())
    published = json.loads((folder / "config.json").read_text())
    assert written["architectures"] == published["architectures"] and written["model_type"] == "qwen3"
    assert layout_of(written, tmp_path).name == layout
    again = AutoDrafter.from_pretrained(tmp_path)
    assert_same(again, drafter)
    assert again.config.layer_rules == drafter.config.layer_rules
    assert differing_fields(again, drafter) == set()


def test_all_that_the_layout_has_a_word_for_is_written(tmp_path):
    fields = {"final_logit_softcapping": 20.0, "output_multiplier": 0.5, "input_embedding_scale": 2.0}
    fields |= {"layer_types": ["sliding_attention"] * 2, "use_sliding_window": True, "sliding_window": 4}
    for causal in (None, False, True):
        drafter = block_drafter("dflash", causal=causal, target_num_layers=4, **fields)
        write_checkpoint(drafter, tmp_path, "dflash")
        again = AutoDrafter.from_pretrained(tmp_path)
        assert again.config.layer_rules == drafter.config.layer_rules == [(causal is not False, 4)] * 2
        # A tree is the reader's own affair.
        assert differing_fields(again, drafter) <= {"tree_budget", "causal"}


def differing_fields(one: BlockDiffusionDrafter, other: BlockDiffusionDrafter) -> set[str]:
    first, second = one.config.to_dict(), other.config.to_dict()
    names = (first.keys() | second.keys()) - {"_name_or_path", "transformers_version", "architectures", "dtype"}
    return {name for name in names if first.get(name) != second.get(name)}


def test_a_layout_of_another_kind_is_not_written(tmp_path):
    dflash, dspark = (AutoDrafter.from_pretrained(GOLDEN[name][0]) for name in ("full", "dspark"))
    others = published_layouts().keys() - {"dflash", "dspark"}
    refused = [(dflash, layout) for layout in ("dspark", *others)]
    for drafter, layout in (*refused, (dspark, "dflash"), (small_drafter(), "dflash")):
        with pytest.raises(ValueError, match=r"^A \w+ drafter cannot be written in the layout .*; choose another\.$"):
            write_checkpoint(drafter, tmp_path, layout)
    drafter = block_drafter(feature_layers=None)
    with pytest.raises(ValueError, match=r"^The layout dflash lists the states .*; record feature_layers\.$"):
        write_checkpoint(drafter, tmp_path, "dflash")


def test_the_commands_know_it(capsys, tmp_path):
    assert cli.main(["convert", str(GOLDEN["jetspec"][0]), str(tmp_path / "ours")]) in (0, None)
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "dflash"]) in (0, None)
    assert AutoDrafter.from_pretrained(tmp_path / "theirs").config.causal
    assert cli.main(["inspect", str(GOLDEN["jetspec"][0]), "--target", str(FOLDER / "target")]) == 0
    assert cli.main(["inspect", str(tmp_path / "ours"), "--target", str(FOLDER / "target")]) == 0
    printed = capsys.readouterr().out
    assert "layout: dflash" in printed and "layout: specblock_hf" in printed
    assert "reads hidden states: 2, 4, 6" in printed and "yes" in printed


def test_checkpoints_load_by_their_id_and_draft(tmp_path):
    """From a server that speaks the Hub's protocol, with code beside the weights that must not run."""
    records = {kind: json.loads((FOLDER / kind / "loop.json").read_text()) for kind in ("dflash", "jetspec")}
    with HubServer() as server:
        for name, (folder, _) in GOLDEN.items():
            repo = server.repos.setdefault(f"org/{name}", Repo())
            files = {path.name: path.read_bytes() for path in folder.iterdir()} | {"dflash.py": TRAP.encode()}
            repo.add("main", files)
        client = Client(server.url, tmp_path / "home")
        try:
            for name, (folder, _) in GOLDEN.items():
                pulled = client(hub_client.pull, f"org/{name}")
                expected = AutoDrafter.from_pretrained(folder).state_dict()
                assert pulled["class"] == "BlockDiffusionDrafter"
                assert all(torch.equal(pulled["weights"][key], expected[key]) for key in expected)
            for name, kind in (("full", "dflash"), ("jetspec", "jetspec"), ("dspark", "dflash")):
                text = records[kind]["plain_greedy"]
                prompt = records[kind]["prompt"]
                found = client(pull_and_generate, f"org/{name}", FOLDER / "target", prompt, len(text))
                assert found[:2] == ("BlockDiffusionDrafter", text)
                assert name == "dspark" or max(found[2]) >= 5  # two of them were trained on this very text
        finally:
            client.close()


@pytest.mark.parametrize(("variant", "layout"), [("dflash", "dflash"), ("dspark", "dspark")])
@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3.5"])
def test_a_published_drafter_of_a_hybrid_target(variant, layout, kind, tmp_path):
    target = multimodal_target(kind) if kind in MULTIMODAL else hybrid_target(kind)
    text = target.config.get_text_config()
    sizes = {"vocab_size": text.vocab_size, "target_num_layers": text.num_hidden_layers, "feature_layers": [1, 2]}
    write_checkpoint(block_drafter(variant, **sizes), tmp_path, layout)
    drafter = AutoDrafter.from_pretrained(tmp_path, target=target).eval()
    assert drafter.config.target_num_layers == text.num_hidden_layers
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 16}
    for lengths in ((7,), (4, 6)):
        batch = prompts_with_images(kind, lengths) if kind in MULTIMODAL else padded_batch(lengths)
        plain = target.generate(**batch, **options)
        assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
        assert drafter.last_statistics.drafter_calls > 0

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Any change to a good checkpoint loads or is refused in a sentence, within little memory; and what loads drafts without
an error that is not a sentence, and changes no text.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from baselines_for_tests import BASELINES, baseline
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_loading import LITTLE, peak_of, small_drafter
from training_for_tests import tiny_drafter

from specblock_hf import AutoDrafter
from specblock_hf.drafters.layouts import write_checkpoint


EXAMPLES = 25
"""Of each base; what the test found was found with thousands."""
BASES = {
    "specblock": lambda folder: tiny_drafter().save_pretrained(folder),
    **{name: lambda folder, name=name: baseline(name).save_pretrained(folder) for name in BASELINES},
    "block_diffusion": lambda folder: block_drafter("dflash2").save_pretrained(folder),
    "shards": lambda folder: tiny_drafter().save_pretrained(folder, max_shard_size="20KB"),
    "authors": lambda folder: write_checkpoint(small_drafter(), folder, "specblock"),
    "safeailab": lambda folder: write_checkpoint(small_drafter("eagle3"), folder, "safeailab"),
    "speculators": lambda folder: write_checkpoint(small_drafter("eagle3"), folder, "speculators"),
    "dflash": lambda folder: write_checkpoint(block_drafter("jetspec"), folder, "dflash"),
    "dspark": lambda folder: write_checkpoint(block_drafter("dspark"), folder, "dspark"),
}
DANGEROUS = (
    *("attn_implementation", "_attn_implementation", "auto_map", "quantization_config", "transformers_weights"),
    *("per_layer_config", "num_labels", "id2label", "fusion_config", "tie_word_embeddings", "torch_dtype", "dtype"),
    *("is_encoder_decoder", "use_cache", "output_attentions", "return_dict", "sub_configs", "_name_or_path"),
)
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**30, 2 * 10**7, 3000, 0.5, -0.5, 1e308]),
    st.sampled_from([float("nan"), float("inf")]),
    st.integers(-5, 40),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "user/kernel", "silu", "llama3", "../x", "é"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["a", "rope_theta", "0"]), inner),
    max_leaves=6,
)


@pytest.fixture(params=BASES)
def base(request, tmp_path) -> Path:
    """A good checkpoint."""
    BASES[request.param](tmp_path / "good")
    return tmp_path / "good"


@cache
def plain_text() -> list[int]:
    return tiny_target("llama").generate(prompt_of(6), max_new_tokens=10, do_sample=False)[0].tolist()


def mutate_config(draw, folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (ValueError, OSError, RecursionError):  # changed before
        return
    if not isinstance(config, dict):
        return
    for _ in range(draw(st.integers(1, 3))):
        place, names = config, [*config, *DANGEROUS]
        nested = [value for value in config.values() if isinstance(value, dict)]
        if nested and draw(st.booleans()):
            place = draw(st.sampled_from(nested))
            names = list(place) or ["a"]
        name = draw(st.sampled_from(names))
        if draw(st.integers(0, 5)) == 0:
            place.pop(name, None)
        else:
            place[name] = draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))


def mutate_tensors(draw, folder: Path) -> None:
    path = draw(st.sampled_from(sorted(folder.glob("*.safetensors")) or [folder / "nothing"]))
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return
    name = draw(st.sampled_from(sorted(tensors)))
    old = tensors.pop(name)
    what = draw(st.sampled_from(["gone", "renamed", "dtype", "shape", "value", "double"]))
    if what == "renamed":
        tensors[draw(st.sampled_from(["d2t", "x", "lm_head.weight", ""]))] = old
    elif what == "dtype":
        kinds = [torch.int8, torch.bool, torch.float16, torch.float64, torch.int64, torch.float8_e4m3fn]
        tensors[name] = old.to(draw(st.sampled_from(kinds)))
    elif what == "shape":
        tensors[name] = old.flatten()[: draw(st.integers(0, old.numel()))].clone()
    elif what == "value":
        value = draw(st.sampled_from([0.0, -3.0, 50.0, 3e38, float("nan"), float("inf")]))
        new = old.float() if draw(st.booleans()) else old.clone()
        new.view(-1)[draw(st.integers(0, max(old.numel() - 1, 0))) : draw(st.integers(0, old.numel()))] = (
            value if new.is_floating_point() or value == value and abs(value) < 1e30 else 1
        )
        tensors[name] = new
    elif what == "double":
        tensors[name], tensors["another"] = old, old.clone()
    save_file(tensors, path, metadata={"format": "pt"})


def mutate_bytes(draw, folder: Path) -> None:
    path = draw(st.sampled_from(sorted(path for path in folder.iterdir() if path.is_file())))
    content = bytearray(path.read_bytes()) or bytearray(1)
    what = draw(st.sampled_from(["gone", "cut", "flipped", "empty", "text"]))
    if what == "gone":
        path.unlink()
    elif what == "cut":
        path.write_bytes(content[: draw(st.integers(0, len(content)))])
    elif what == "flipped":
        for _ in range(draw(st.integers(1, 4))):
            # Mostly in the head, which says what the rest is.
            content[draw(st.integers(0, min(len(content), draw(st.sampled_from([16, 400, 10**9]))) - 1))] ^= draw(
                st.integers(1, 255)
            )
        path.write_bytes(content)
    else:
        path.write_text(
            "" if what == "empty" else draw(st.sampled_from(["null", "[1]", "3", "{", "[" * 200_000, "{}"]))
        )


def mutate_index(draw, folder: Path) -> None:
    names = ["/etc/passwd", "../x", "model.safetensors", "a\\b", "", ".", None, 3, {"a": 1}]
    weight_map = draw(st.one_of(VALUES, st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(names))))
    index = draw(st.sampled_from([{"weight_map": weight_map}, weight_map, {}]))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if draw(st.booleans()):
        (folder / "model.safetensors").unlink(missing_ok=True)


MUTATIONS = (mutate_config, mutate_config, mutate_tensors, mutate_bytes, mutate_index)


def test_any_change_loads_or_is_refused_in_a_sentence(base, tmp_path):
    assert run_with(AutoDrafter.from_pretrained(base)) == plain_text()

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data):
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        for mutate in data.draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=2)):
            mutate(data.draw, folder)
        loaded, peak = peak_of(lambda: AutoDrafter.from_pretrained(folder))
        assert peak < LITTLE
        if isinstance(loaded, Exception):
            assert_is_sentence(loaded)
        else:
            try:
                assert run_with(loaded) == plain_text()
            except ValueError as error:
                assert_is_sentence(error)

    check()


def assert_is_sentence(error: Exception) -> None:
    if not isinstance(error, (ValueError, OSError)):
        raise error
    text = str(error)
    assert text.endswith(".") and len(text) > 40 and "weights_only" not in text, text


def run_with(drafter) -> list[int]:
    output = tiny_target("llama").generate(
        prompt_of(6), assistant_model=copy.deepcopy(drafter).float().eval(), max_new_tokens=10, do_sample=False
    )
    return output[0].tolist()

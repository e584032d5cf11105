# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of faults that users of this and of other libraries have met, one test for each, which tells what happens now:
`pytest tests -k cases -s`. Each kind has more members, in the tests of the part that it concerns.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps

import pytest
import torch
from conftest import prompt_of, tiny_target
from serving_for_tests import FAST, GREEDY, adapted, plain, serve, trainable
from serving_for_tests import KINDS as ADAPTED
from test_copies import COPIES, in_process
from test_faults import break_it, spoil_step
from test_loading import LITTLE, change_config, peak_of, rewrite, small_drafter
from test_saving import FULL, contents, halved, room_for
from transformers import LlamaConfig, LlamaForCausalLM

from specblock_hf import AutoDrafter
from specblock_hf.adaptation import UpdateSettings
from specblock_hf.checkpoints.provenance import recorded_command


def case(number: int, fault: str) -> Callable[[Callable[..., str]], Callable[..., None]]:
    """
    Makes a test of a function that checks what happens now and returns it as the end of the printed line.

    Args:
        number (`int`): Of the case.
        fault (`str`): What once went wrong.
    """

    def decorate(check: Callable[..., str]) -> Callable[..., None]:
        @wraps(check)
        def test(*args, **kwargs) -> None:
            print(f"\n{number:2d}. {fault}: {check(*args, **kwargs)}", end="")

        return test

    return decorate


# Targets: 1 to 8.


# Drafters: 9 to 11, 14, 15, 17.


# Adaptation: 12, 13, 16, 18.


@case(12, "adaptation of every kind, of small vocabularies")
def test_adaptation_of_every_kind() -> str:
    small = LlamaConfig(**tiny_target("llama").config.to_dict() | {"vocab_size": 20})
    target = LlamaForCausalLM(small).eval()
    plain = target.generate(prompt_of(6) % 20, **GREEDY)
    for kind in ADAPTED:
        drafter = trainable(kind, target)
        settings = UpdateSettings(steps=1, drift_weight=0.1 * drafter.predicts_at_once)
        callback = adapted(drafter, every=1, settings=settings)
        for _ in range(2):
            assert torch.equal(target.generate(prompt_of(6) % 20, assistant_model=drafter, **GREEDY), plain)
        assert callback.failure is None and callback.updates == 2
    return f"{', '.join(ADAPTED)} learn with 20 tokens and the default top_k of 32, texts exact"


@case(13, "copies, pickles and forks of a drafter that adapts")
def test_copies_of_a_drafter_that_adapts() -> str:
    drafter = trainable("specblock", tiny_target("llama"))
    callback = adapted(drafter, every=1, background=True, settings=FAST)
    serve(drafter, 2)
    for way in COPIES.values():
        assert serve(way(drafter), 1) == plain(1)
    assert in_process("fork", drafter, callback, 1)[:2] == (plain(1), 0)
    drafter.remove_callback(callback)
    return f"{', '.join(COPIES)} give a drafter without callbacks; a forked child serves and takes the callback off"


@case(16, "NaN in service, in states and in checkpoints")
def test_values_that_are_not_finite(tmp_path) -> str:
    drafter = trainable("specblock", tiny_target("llama"))
    callback = adapted(drafter, every=2, settings=FAST)
    state = callback.state_dict()
    spoil_step(callback, 1, torch.nan)
    assert serve(drafter, 3) == plain(3) and callback.updates == 0 and callback.failure is not None
    assert all(bool(weight.isfinite().all()) for weight in drafter.parameters())
    state["updater"]["trained"]["norm.weight"][0] = torch.inf
    with pytest.raises(ValueError, match="this state is not finite, or absurdly large, in trained.norm.weight"):
        adapted(trainable("specblock", tiny_target("llama")), settings=FAST).load_state_dict(state)
    drafter.save_pretrained(tmp_path)
    for value in (torch.nan, torch.inf, 3e38):
        rewrite(tmp_path, lambda tensors, value=value: tensors["norm.weight"].fill_(value))
        with pytest.raises(ValueError, match=r"infinite, absurdly large or not numbers in norm\.weight"):
            AutoDrafter.from_pretrained(tmp_path)
    return "an update that ends in NaN is rolled back; states and checkpoints with NaN, infinities or 3e38 are refused"


@case(18, "adaptation's recorder, watcher or starter raises")
def test_adaptation_that_raises(monkeypatch) -> str:
    parts = ("recorder", "watcher", "starter", "training")
    for part in parts:
        drafter = trainable("specblock", tiny_target("llama"))
        callback = adapted(drafter, every=1, settings=FAST)
        with monkeypatch.context() as patch:
            break_it(callback, part, patch)
            assert serve(drafter, 2) == plain(2)
        assert "is out of memory" in str(callback.failure) and not callback.learns
    return f"{', '.join(parts)}: the answer comes, it is logged once, adaptation is off"


# Checkpoints: 19 to 23.


@case(19, "vocabularies and sizes of a checkpoint are trusted")
def test_sizes_of_a_checkpoint(tmp_path) -> str:
    small_drafter().save_pretrained(tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name, size in (("block_size", 20_000_000), ("num_hidden_layers", 3000), ("vocab_size", 2**24)):
        change_config(tmp_path, **{name: size})
        refused, peak = peak_of(lambda: AutoDrafter.from_pretrained(tmp_path))
        assert isinstance(refused, ValueError) and peak < LITTLE
        (tmp_path / "config.json").write_bytes(good["config.json"])
    for wrong in (1000, -1):
        rewrite(tmp_path, lambda tensors, wrong=wrong: tensors["d2t"].fill_(wrong))
        with pytest.raises(ValueError, match="do not describe one draft vocabulary"):
            AutoDrafter.from_pretrained(tmp_path)
    return "refused before anything is built, in less than 64 MB; d2t is checked in every layout"


@case(20, "provenance.json publishes the command line")
def test_a_published_command_line() -> str:
    typed = "specblock train --data /home/ann/answers.jsonl --token hf_secret --epochs 2 --prompt secret"
    recorded = recorded_command(typed.split())
    assert recorded == "specblock train --data answers.jsonl --epochs 2"
    return f"of `{typed}` it says `{recorded}`"


@case(21, "a checkpoint names code or files elsewhere")
def test_a_checkpoint_that_names_what_is_elsewhere(tmp_path, monkeypatch) -> str:
    drafter = small_drafter()
    drafter.save_pretrained(tmp_path / "drafter")
    change_config(tmp_path / "drafter", attn_implementation="user/kernel", auto_map={"AutoModel": "user/code--x.Y"})
    monkeypatch.setattr("socket.socket.connect", pytest.fail)
    loaded = AutoDrafter.from_pretrained(tmp_path / "drafter")
    assert loaded.config._attn_implementation == "sdpa"
    (tmp_path / "drafter" / "model.safetensors").rename(tmp_path / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(drafter.state_dict(), "../weights.safetensors")}
    (tmp_path / "drafter" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not lie beside it, and files elsewhere are not read") as refused:
        AutoDrafter.from_pretrained(tmp_path / "drafter")
    return f"code is not asked for; {str(refused.value).replace(str(tmp_path), '')}"


@case(22, "bad checkpoints end in raw errors")
def test_bad_checkpoints_end_in_sentences(tmp_path) -> str:
    small_drafter().save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    fields = {"model_type": ["x"], "tree_budget": -1, "num_blocks": "two", "root_width": 0, "architectures": [3]}
    bad = [json.dumps(good | {name: value}) for name, value in fields.items()]
    bad += ["[1]", "null", "3", json.dumps(good)[:-9]]
    for content in bad:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"^[^\n]{20,}\.$"):
            AutoDrafter.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(good))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"keep them in model\.safetensors; save it again"):
        AutoDrafter.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map with the file of every tensor"):
        AutoDrafter.from_pretrained(tmp_path)
    return f"{len(bad)} configurations, PyTorch weights and an index without weight_map: a sentence each"


@case(23, "a full disk destroys the good checkpoint")
def test_a_full_disk(tmp_path) -> str:
    drafter = small_drafter()
    drafter.save_pretrained(tmp_path)
    before = contents(tmp_path)
    for room in (0, 1000, 20_000):
        with pytest.raises(FULL), room_for(room):
            halved(drafter).save_pretrained(tmp_path)
        assert contents(tmp_path) == before
    return "whatever fits before it is full, every file of the folder is as it was"

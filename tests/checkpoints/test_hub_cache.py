# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What the Hub's client keeps: nothing is asked for twice, whatever the cache looks like, or without a connection."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import hub_client
import pytest
import torch
from hub_client import Client, ClientError
from hub_server import Fault
from safetensors.torch import load_file
from test_hub import FIXTURES, assert_pulled, flipped, store

from specblock_hf import AutoDrafter


def test_nothing_is_downloaded_twice(hub, client, folders, hub_cache):
    store(hub, "org/once", folders / "specblock")
    client(hub_client.pull, "org/once", cache_dir=hub_cache)
    assert sum(method == "GET" and path.startswith("/large/") for method, path, *_ in hub.log) == 1
    hub.log.clear()
    client(hub_client.pull, "org/once", cache_dir=hub_cache)
    assert [path for method, path, *_ in hub.log if method == "GET" and "/api/" not in path] == []
    hub.log.clear()
    client(hub_client.pull, "org/once", cache_dir=hub_cache, local_files_only=True)
    assert hub.log == []
    with pytest.raises(
        ClientError, match=r"^OSError: org/once has no config\.json, or not in the cache if the Hub may"
    ):
        client(hub_client.pull, "org/once", cache_dir=hub_cache + "2", local_files_only=True)


def share_blobs(cache: str) -> int:
    """As clients do that speak Xet: large files lie where all repositories find them, by another hash than sha256."""
    found = [blob for blob in Path(cache).glob("models--*/blobs/*") if len(blob.name) == 64]
    for blob in found:
        name = hashlib.sha256(b"xet" + blob.name.encode()).hexdigest()
        shared = Path(cache, "blobs", name[:2], name)
        shared.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(shared)
        blob.symlink_to(os.path.relpath(shared, blob.parent))
    for path in Path(cache).glob("models--*/snapshots/*/*.safetensors"):
        path.unlink()  # as if it had come just now
    return len(found)


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one", "several"])
def test_files_that_repositories_share_in_the_cache(hub, client, folders, hub_cache, size):
    client(hub_client.push, folders / "specblock", "org/shared", max_shard_size=size)
    client(hub_client.pull, "org/shared", cache_dir=hub_cache)
    assert (share_blobs(hub_cache) == 1) == (size == "5GB")
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    for _ in range(2):
        assert_pulled(client(hub_client.pull, "org/shared", cache_dir=hub_cache), drafter)


def test_a_damaged_file_that_repositories_share_is_forgotten(hub, client, folders, hub_cache):
    store(hub, "org/damaged", folders / "specblock")
    client(hub_client.pull, "org/damaged", cache_dir=hub_cache)
    share_blobs(hub_cache)
    (shared,) = Path(hub_cache, "blobs").glob("*/*")
    shared.write_bytes(flipped(shared.read_bytes()))
    with pytest.raises(ClientError, match=r"model\.safetensors of org/damaged arrived damaged: "):
        client(hub_client.pull, "org/damaged", cache_dir=hub_cache)
    assert not shared.exists()
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/damaged", cache_dir=hub_cache), drafter)


@pytest.mark.parametrize("several", [True, False], ids=["several", "pickled"])
def test_what_is_cached_whole_loads_while_the_hub_does_not_answer(hub, client, folders, hub_cache, tmp_path, several):
    if several:
        client(hub_client.push, folders / "specblock", "org/away", max_shard_size="20KB")
    else:
        golden = FIXTURES / "specblock_a" / "checkpoint"
        repo = store(hub, "org/away", golden)
        weights = load_file(golden / "model.safetensors")
        del repo.branches["main"].files["model.safetensors"]
        torch.save(weights, tmp_path / "pytorch_model.bin")
        repo.add("main", {"pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    before = client(hub_client.pull, "org/away", cache_dir=hub_cache)
    hub.faults.append(Fault(".*", 1000, status=503))
    again = client(hub_client.pull, "org/away", cache_dir=hub_cache)
    assert all(torch.equal(again["weights"][name], weight) for name, weight in before["weights"].items())


def test_offline(hub, client, folders, hub_cache, tmp_path):
    store(hub, "org/offline", folders / "eagle3")
    store(hub, "org/official", FIXTURES / "specblock_a" / "checkpoint")
    for name in ("org/offline", "org/official"):
        client(hub_client.pull, name, cache_dir=hub_cache)
    hub.log.clear()
    offline = Client(hub.url, tmp_path / "home", HF_HUB_OFFLINE="1")
    try:
        eagle3 = AutoDrafter.from_pretrained(folders / "eagle3")
        assert_pulled(offline(hub_client.pull, "org/offline", cache_dir=hub_cache), eagle3)
        assert offline(hub_client.pull, "org/official", cache_dir=hub_cache)["class"] == "SpecBlockDrafter"
        with pytest.raises(
            ClientError, match=r"^OSError: org/else has no config\.json, or not in the cache if the Hub"
        ):
            offline(hub_client.pull, "org/else", cache_dir=hub_cache)
    finally:
        offline.close()
    assert hub.log == []

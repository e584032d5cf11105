# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""A Hub server and a client of it, which take a while to start, for the tests of a file."""

from __future__ import annotations

import pytest
from hub_client import Client
from hub_server import HubServer
from test_loading import small_drafter


KINDS = ("specblock", "eagle3")


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """The server and its client."""
    with HubServer() as server:
        client = Client(server.url, tmp_path_factory.mktemp("home"))
        yield server, client
        client.close()


@pytest.fixture
def hub(running):
    """The server, as if nothing had happened yet."""
    server, _ = running
    for happened in (server.repos, server.faults, server.moved, server.log):
        happened.clear()
    return server


@pytest.fixture
def client(running):
    return running[1]


@pytest.fixture
def hub_cache(tmp_path):
    """Where to pull to, empty."""
    return str(tmp_path / "cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved drafters."""
    root = tmp_path_factory.mktemp("saved")
    for kind in KINDS:
        small_drafter(kind).save_pretrained(root / kind)
    return root

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Drafters to the Hub and back over real HTTP, with the unmodified client and all that can go wrong on the way."""

from __future__ import annotations

import json
from pathlib import Path

import hub_client
import pytest
import torch
from conftest import prompt_of, tiny_target
from hub_client import Client, ClientError
from hub_for_tests import KINDS
from hub_server import OWNER, READER, Fault, HubServer, Repo
from test_card import RESULTS
from test_loading import assert_same, small_drafter

from specblock_hf import AutoDrafter, cli
from specblock_hf.checkpoints.card import CardFacts


FIXTURES = Path(__file__).parents[1] / "fixtures" / "conformance"


def store(hub: HubServer, name: str, folder: Path, prefix: str = "", **kwargs) -> Repo:
    """Put a folder's files into a repository, past the client."""
    repo = hub.repos.setdefault(name, Repo(**kwargs))
    repo.add("main", {prefix + path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    return repo


def plain_text() -> list[int]:
    return tiny_target("llama").generate(prompt_of(6), max_new_tokens=16, do_sample=False)[0].tolist()


def assert_pulled(pulled: dict, drafter: torch.nn.Module) -> None:
    assert pulled["class"] == type(drafter).__name__
    weights = drafter.state_dict()
    assert pulled["weights"].keys() == weights.keys()
    assert all(torch.equal(pulled["weights"][name], weights[name]) for name in weights)


# There and back.


@pytest.mark.parametrize("kind", KINDS)
def test_a_pushed_drafter_comes_back_and_drafts(hub, client, folders, kind, hub_cache):
    client(hub_client.push, folders / kind, f"org/{kind}-hub")
    files = hub.repos[f"org/{kind}-hub"].branches["main"].files
    assert files.keys() == {
        "README.md",
        "config.json",
        "custom_generate/generate.py",
        "model.safetensors",
        "provenance.json",
    }
    assert files["model.safetensors"] == (folders / kind / "model.safetensors").read_bytes()
    puts = [path for method, path, status, _ in hub.log if method == "PUT" and status == 200]
    assert len(puts) == 1  # only the weights are large
    drafter = AutoDrafter.from_pretrained(folders / kind)
    pulled = client(hub_client.pull, f"org/{kind}-hub", cache_dir=hub_cache)
    assert_pulled(pulled, drafter)
    blobs = [path for path in Path(hub_cache).rglob("blobs/*") if path.is_file()]
    assert sorted(path.read_bytes() for path in blobs if path.stat().st_size > 5000) == [files["model.safetensors"]]
    assert client(hub_client.generate, f"org/{kind}-hub") == plain_text()


def test_the_class_itself_and_auto_model_load_by_id(hub, client, folders, hub_cache):
    store(hub, "org/own", folders / "specblock")
    weights = client(hub_client.pull_own, "org/own", cache_dir=hub_cache)
    expected = AutoDrafter.from_pretrained(folders / "specblock").state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("specblock_a/checkpoint", "SpecBlockDrafter"),
        ("specblock_b/checkpoint", "SpecBlockDrafter"),
        ("eagle3/checkpoint_safeailab", "Eagle3Drafter"),
        ("eagle3/checkpoint_speculators", "Eagle3Drafter"),
    ],
)
def test_golden_folders_load_by_id(hub, client, folder, kind, hub_cache):
    store(hub, "authors/golden", FIXTURES / folder)
    pulled = client(hub_client.pull, "authors/golden", cache_dir=hub_cache)
    assert_pulled(pulled, AutoDrafter.from_pretrained(FIXTURES / folder))
    assert pulled["class"] == kind


def test_several_files_of_weights(hub, client, folders, hub_cache):
    client(hub_client.push, folders / "specblock", "org/sharded", max_shard_size="20KB")
    files = hub.repos["org/sharded"].branches["main"].files
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 1 and "model.safetensors.index.json" in files
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/sharded", cache_dir=hub_cache), drafter)
    del files[shards[1]]
    with pytest.raises(ClientError, match=rf"^OSError: org/sharded has no {shards[1]}"):
        client(hub_client.pull, "org/sharded", cache_dir=hub_cache + "2")


def test_saving_can_push(hub, client, folders, tmp_path):
    client(hub_client.push_while_saving, folders / "eagle3", "org/while-saving", tmp_path / "out")
    files = hub.repos["org/while-saving"].branches["main"].files
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert b"org/while-saving" in files["README.md"]


# Where from.


def test_revision_and_subfolder(hub, client, folders, hub_cache):
    repo = store(hub, "org/several", folders / "specblock")
    first = repo.branches["main"].sha
    client(hub_client.push, folders / "eagle3", "org/several", revision="other")
    store(hub, "org/several", folders / "eagle3", prefix="inner/deep/")
    specblock, eagle3 = (AutoDrafter.from_pretrained(folders / kind) for kind in KINDS)
    assert_pulled(client(hub_client.pull, "org/several", cache_dir=hub_cache), specblock)
    assert_pulled(client(hub_client.pull, "org/several", cache_dir=hub_cache, revision="other"), eagle3)
    assert_pulled(client(hub_client.pull, "org/several", cache_dir=hub_cache, revision=first), specblock)
    assert_pulled(client(hub_client.pull, "org/several", cache_dir=hub_cache, subfolder="inner/deep"), eagle3)
    with pytest.raises(ClientError, match=r"^OSError: org/several has no revision v9; name one of its"):
        client(hub_client.pull, "org/several", cache_dir=hub_cache, revision="v9")
    with pytest.raises(ClientError, match=r"^OSError: org/several has no config\.json, .* subfolder\.$"):
        client(hub_client.pull, "org/several", cache_dir=hub_cache, subfolder="nowhere")


# Who may.


def test_a_private_repository(hub, client, folders, hub_cache):
    client(hub_client.push, folders / "specblock", "org/secret", private=True)
    assert hub.repos["org/secret"].private
    with pytest.raises(ClientError, match=r"^OSError: org/secret is neither a folder nor a Hub repository .* token="):
        client(hub_client.pull, "org/secret", cache_dir=hub_cache)
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/secret", cache_dir=hub_cache, token=READER), drafter)


def test_a_gated_repository(hub, client, folders, hub_cache):
    store(hub, "org/gated", folders / "specblock", gated=True)
    for token in (None, READER):
        with pytest.raises(
            ClientError, match=r"^OSError: org/gated is gated; accept its terms on the Hub, and pass tok"
        ):
            client(hub_client.pull, "org/gated", cache_dir=hub_cache, token=token)
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/gated", cache_dir=hub_cache, token=OWNER), drafter)


def test_names_that_do_not_exist(hub, client, hub_cache):
    with pytest.raises(
        ClientError, match=r"^OSError: org/nobody is neither a folder nor a Hub repository that can be"
    ):
        client(hub_client.pull, "org/nobody", cache_dir=hub_cache)
    with pytest.raises(
        ClientError, match=r"^OSError: not//a name is neither a folder nor a Hub repository that can be"
    ):
        client(hub_client.pull, "not//a name", cache_dir=hub_cache)


def test_a_folder_that_is_not_there_without_a_connection(tmp_path, hub_cache):
    nowhere = Client("http://127.0.0.1:9", tmp_path / "home")
    try:
        with pytest.raises(
            ClientError,
            match=r"^OSError: There is no folder model_cards/mine here, and the Hub cannot be asked for a repository "
            r"of that name \(.*\); check the path or the connection\.$",
        ):
            nowhere(hub_client.pull, "model_cards/mine", cache_dir=hub_cache)
        assert nowhere(hub_client.naps) == []
    finally:
        nowhere.close()


def test_pushing_needs_a_token(hub, client, folders):
    with pytest.raises(ClientError, match=r"(?i)^HfHubHTTPError: .*40[13]"):
        client(hub_client.push_with, folders / "specblock", "org/not-mine", READER)
    assert "org/not-mine" not in hub.repos


# What goes wrong.


def test_the_hub_is_busy_for_a_while(hub, client, folders, hub_cache):
    store(hub, "org/busy", folders / "specblock")
    hub.faults += [Fault("GET /large/", 2, status=429), Fault("HEAD .*config.json", 1, status=429)]
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/busy", cache_dir=hub_cache), drafter)
    assert [status for method, path, status, _ in hub.log if "/large/" in path and method == "GET"] == [429, 429, 200]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("pattern", ["HEAD .*config.json", "HEAD .*model.safetensors", "GET /large/"])
def test_the_hub_stays_broken(hub, client, folders, hub_cache, status, pattern):
    store(hub, "org/broken", folders / "specblock")
    hub.faults.append(Fault(pattern, 1000, status=status))
    with pytest.raises(ClientError, match=rf"^OSError: (?s:.)*org/broken(?s:.)*{status}(?s:.)*again"):
        client(hub_client.pull, "org/broken", cache_dir=hub_cache)
    hub.faults.clear()
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/broken", cache_dir=hub_cache), drafter)


def test_a_cut_connection_is_resumed(hub, client, folders, hub_cache):
    store(hub, "org/cut", folders / "specblock")
    size = (folders / "specblock" / "model.safetensors").stat().st_size
    hub.faults.append(Fault("GET /large/", 1, cut=size // 2))
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/cut", cache_dir=hub_cache), drafter)
    first, second = [entry[2:] for entry in hub.log if entry[0] == "GET" and entry[1].startswith("/large/")]
    assert first == (200, None)
    # What arrived is not asked for again.
    assert second[0] == 206 and 0 < int(second[1].removeprefix("bytes=").removesuffix("-")) <= size // 2


def test_a_connection_that_is_always_cut(hub, client, folders, hub_cache):
    store(hub, "org/cut", folders / "specblock")
    hub.faults.append(Fault("GET /large/", 1000, cut=0))
    with pytest.raises(ClientError, match=r"^OSError: .*org/cut.* try again"):
        client(hub_client.pull, "org/cut", cache_dir=hub_cache)
    hub.faults.clear()
    drafter = AutoDrafter.from_pretrained(folders / "specblock")
    assert_pulled(client(hub_client.pull, "org/cut", cache_dir=hub_cache), drafter)


def flipped(body: bytes) -> bytes:
    """A change that no size and no header shows."""
    return body[:-9] + bytes([body[-9] ^ 64]) + body[-8:]


@pytest.mark.parametrize("loader", ["pull", "pull_own"])
def test_damaged_weights_are_refused_and_forgotten(hub, client, folders, hub_cache, loader):
    store(hub, "org/damaged", folders / "specblock")
    hub.faults.append(Fault("GET /large/", 1, change=flipped))
    pull = getattr(hub_client, loader)
    with pytest.raises(
        ClientError, match=r"^OSError: model\.safetensors of org/damaged arrived damaged: its hash is not"
    ):
        client(pull, "org/damaged", cache_dir=hub_cache)
    assert not list(Path(hub_cache).rglob("*.safetensors"))
    pulled = client(pull, "org/damaged", cache_dir=hub_cache)
    expected = AutoDrafter.from_pretrained(folders / "specblock").state_dict()
    weights = pulled["weights"] if loader == "pull" else pulled
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_damaged_configuration_is_refused(hub, client, folders, hub_cache):
    store(hub, "org/damaged", folders / "specblock")
    hub.faults.append(Fault("GET .*config.json", 1, change=lambda body: body.replace(b"24", b"23")))
    with pytest.raises(ClientError, match=r"^OSError: config\.json of org/damaged arrived damaged: "):
        client(hub_client.pull, "org/damaged", cache_dir=hub_cache)
    client(hub_client.pull, "org/damaged", cache_dir=hub_cache)


def test_a_repository_without_weights(hub, client, folders, hub_cache):
    repo = store(hub, "org/empty", folders / "specblock")
    del repo.branches["main"].files["model.safetensors"]
    with pytest.raises(
        ClientError, match=r"^OSError: org/empty has neither model\.safetensors nor pytorch_model\.bin"
    ):
        client(hub_client.pull, "org/empty", cache_dir=hub_cache)


def test_an_incomplete_drafter_is_not_pushed(hub, client, folders, tmp_path):
    broken = tmp_path / "broken"
    small_drafter().save_pretrained(broken)
    (broken / "model.safetensors").write_bytes((folders / "eagle3" / "model.safetensors").read_bytes())
    assert client(hub_client.command, "push", str(broken), "org/broken") == 2
    assert "org/broken" not in hub.repos and hub.log == []


def test_an_upload_that_fails_leaves_no_half(hub, client, folders):
    hub.faults.append(Fault("PUT /large/", 1000, status=500))
    with pytest.raises(ClientError, match=r"model\.safetensors"):
        client(hub_client.push, folders / "specblock", "org/half")
    assert hub.repos["org/half"].branches["main"].files == {}


# Cards.


def test_a_card_is_made_and_then_left_alone(hub, client, folders):
    client(hub_client.push, folders / "specblock", "org/card")
    files = hub.repos["org/card"].branches["main"].files
    card = files["README.md"].decode()
    assert card.startswith("---\n") and "library_name: specblock_hf" in card and "- specblock\n" in card
    assert "pipeline_tag: text-generation" in card and "Nothing was measured" in card
    assert 'AutoDrafter.from_pretrained("org/card"' in card
    hub.repos["org/card"].add("main", {"README.md": b"---\n---\nwritten by hand"})
    client(hub_client.push, folders / "specblock", "org/card")
    assert hub.repos["org/card"].branches["main"].files["README.md"] == b"---\n---\nwritten by hand"
    client(hub_client.push, folders / "specblock", "org/card", facts=CardFacts(license="mit", results=RESULTS))
    card = hub.repos["org/card"].branches["main"].files["README.md"].decode()
    assert "license: mit" in card and "| chat | 12 | 0 | 2.35 | 0.88x |" in card
    assert "On a test machine in float32, with torch 2.13.0." in card and "Nothing was measured" not in card


@pytest.mark.parametrize("place", ["/home/secret/hub", "C:\\secret\\hub"])
def test_a_folder_of_the_hubs_cache_is_published_by_its_repositorys_name(hub, client, tmp_path, place):
    drafter = small_drafter("specblock")
    drafter.config.target_name_or_path = f"{place}/models--org--model/snapshots/0123abc"
    drafter.save_pretrained(tmp_path / "drafter")
    client(hub_client.push, tmp_path / "drafter", "org/paths")
    files = hub.repos["org/paths"].branches["main"].files
    assert json.loads(files["config.json"])["target_name_or_path"] == "org/model"
    assert b"base_model: org/model" in files["README.md"]
    assert not any(b"secret" in content for content in files.values())


def test_a_name_without_an_owner_is_no_base_model(hub, client, tmp_path):
    drafter = small_drafter("specblock")
    drafter.config.target_name_or_path = "llama-ft"  # what is left of a path
    drafter.save_pretrained(tmp_path / "drafter")
    client(hub_client.push, tmp_path / "drafter", "org/local")
    assert b"base_model" not in hub.repos["org/local"].branches["main"].files["README.md"]


@pytest.mark.parametrize("named", ["/home/somebody/secret/model", "C:\\secret\\model", "org/model", None, "here"])
def test_no_path_of_somebodys_machine_is_published(hub, client, tmp_path, named):
    if named == "here":  # it may look like an id
        named = str(tmp_path / "secret" / "model")
        (tmp_path / "secret" / "model").mkdir(parents=True)
    drafter = small_drafter("specblock")
    drafter.config.target_name_or_path = named
    drafter.save_pretrained(tmp_path / "drafter")
    client(hub_client.push, tmp_path / "drafter", "org/paths")
    files = hub.repos["org/paths"].branches["main"].files
    config = json.loads(files["config.json"])
    assert config.pop("target_name_or_path") == (named if named in ("org/model", None) else "model")
    own = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert own.pop("target_name_or_path") == named and own == config
    assert not any(b"secret" in content for content in files.values())


# The commands and the way in without a hook.


def test_a_preview_uploads_nothing(folders, capsys, monkeypatch):
    monkeypatch.setattr("specblock_hf.cli.push.publish", lambda *args, **kwargs: pytest.fail("uploaded"))
    assert cli.main(["push", str(folders / "specblock"), "org/later", "--license", "mit", "--dry-run"]) == 0
    card, listing = capsys.readouterr().out.split("\nNothing was uploaded. org/later would get:\n")
    assert "license: mit" in card and 'from_pretrained("org/later"' in card
    assert [line.split()[0] for line in listing.splitlines()] == [
        *("README.md", "config.json", "custom_generate/generate.py", "model.safetensors", "provenance.json"),
    ]
    size = (folders / "specblock" / "model.safetensors").stat().st_size
    assert f"model.safetensors            {size:>13,} bytes\n" in listing


def test_what_is_no_folder_is_not_pushed(hub, client, folders, capsys):
    store(hub, "org/there", folders / "specblock")
    assert client(hub_client.spoken, "push", "org/there", "me/copy") == (
        2,
        "specblock push: org/there is no folder, and only what lies in one is uploaded; save the drafter first, with "
        "save_pretrained or `specblock convert`.\n",
    )
    assert list(hub.repos) == ["org/there"] and hub.log == []


def test_pushing_without_a_connection(folders, tmp_path):
    nowhere = Client("http://127.0.0.1:9", tmp_path / "home")
    try:
        with pytest.raises(
            ClientError, match=r"^OSError: The Hub cannot be reached \(.*\), so that nothing was uploaded"
        ):
            nowhere(hub_client.push, folders / "specblock", "org/later")
    finally:
        nowhere.close()


def test_the_push_command(hub, client, folders, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "training.json").write_text(json.dumps({"epochs": 3}))
    options = ["--license", "mit", "--language", "en", "--dataset", "org/data", "org/more", "--message", "First"]
    options += [
        "--training",
        str(tmp_path / "training.json"),
        "--results",
        str(tmp_path / "results.json"),
        "--private",
    ]
    assert client(hub_client.command, "push", str(folders / "specblock"), "org/cli", *options) == 0
    repo = hub.repos["org/cli"]
    card = repo.branches["main"].files["README.md"].decode()
    assert repo.private and "| epochs | 3 |" in card and "Data: org/data, org/more." in card and "0.88x" in card
    assert (
        repo.branches["main"].files["model.safetensors"] == (folders / "specblock" / "model.safetensors").read_bytes()
    )
    before = repo.branches["main"]
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\nmine")
    options = ["--card", str(tmp_path / "card.md"), "--create-pr"]
    assert client(hub_client.command, "push", str(folders / "specblock"), "org/cli", *options) == 0
    assert repo.branches["main"] is before and b"mine" in repo.branches["refs/pr/1"].files["README.md"]
    golden = str(FIXTURES / "specblock_a" / "checkpoint")
    assert client(hub_client.command, "push", golden, "org/cli") == 2  # not our layout
    (tmp_path / "results.json").write_text("{")
    options = ["--results", str(tmp_path / "results.json")]
    assert client(hub_client.command, "push", str(folders / "specblock"), "org/cli", *options) == 2


def test_custom_generate_by_the_repositorys_name(hub, client, folders):
    client(hub_client.push, folders / "specblock", "org/custom")
    generate = hub.repos["org/custom"].branches["main"].files["custom_generate/generate.py"].decode()
    assert 'custom_generate="org/custom"' in generate and "$" not in generate
    output, streamed, calls = client(hub_client.custom_generate, "org/custom", do_sample=False)
    assert output == plain_text() and streamed == [*output, -1]
    # A prompt, and rounds of one token or more: plain decoding takes 16 forwards, this one no more.
    assert 2 <= calls <= 16
    with pytest.raises(
        ClientError, match=r"^ValueError: a tree drafter speeds up greedy decoding and sampling and this"
    ):
        client(hub_client.custom_generate, "org/custom", num_beams=2, do_sample=False)


def test_the_server_is_what_the_client_talks_to(hub, client, folders):
    assert_same(AutoDrafter.from_pretrained(folders / "eagle3"), small_drafter("eagle3"))
    client(hub_client.push, folders / "eagle3", "org/talk")
    assert {(method, path.split("?")[0]) for method, path, status, _ in hub.log if status == 200} >= {
        ("POST", "/api/repos/create"),
        ("POST", "/api/models/org/talk/preupload/main"),
        ("POST", "/org/talk.git/info/lfs/objects/batch"),
        ("POST", "/api/models/org/talk/commit/main"),
    }

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The right drafter for a target: found, refused or explained, from the Hub, its cache and the package's list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hub_client
import pytest
from block_drafters_for_tests import block_drafter
from conftest import prompt_of, tiny_target
from hub_client import ClientError
from hub_server import Fault, HubServer, Repo
from layouts_for_tests import DSPARK, deepspec_folder, speculators_folder
from models_for_tests import save_models, tiny_tokenizer
from test_loading import small_drafter

from specblock_hf import cli
from specblock_hf.drafters.common.registry import published_layouts
from specblock_hf.drafters.find import MOST_CHECKED
from specblock_hf.drafters.known import known_drafter, known_drafters, layouts_tested
from specblock_hf.drafters.layouts import OURS, write_checkpoint


LAYOUTS = {
    OURS: small_drafter,
    "specblock": small_drafter,
    "safeailab": lambda: small_drafter("eagle3"),
    "sglang": lambda: small_drafter("eagle3"),
    "speculators": lambda: small_drafter("eagle3"),
    "dflash": block_drafter,
    "dspark": lambda: block_drafter("dspark"),
    "specforge-dspark": lambda: block_drafter(**DSPARK),
}
READ_ONLY = {"deepspec": deepspec_folder, "speculators-dflash": speculators_folder}
"""Layouts that are written by a test alone."""
BASE = "org/base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small drafter for the tiny Llama in every layout."""
    root = tmp_path_factory.mktemp("saved")
    for layout, make in LAYOUTS.items():
        write_checkpoint(make(), root / layout, layout)
    for layout, write in READ_ONLY.items():
        write(root / layout)
    return root


def add_target(hub: HubServer, name: str, base: str | None = None, **fields) -> None:
    config = tiny_target("llama").config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | fields
    files = {"config.json": json.dumps(config).encode(), "README.md": card(base)}
    hub.repos.setdefault(name, Repo()).add("main", files)


def add_drafter(
    hub: HubServer, name: str, folder: Path, base: str | None = BASE, downloads: int = 0, **card_fields
) -> Repo:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    repo = hub.repos.setdefault(name, Repo(downloads=downloads))
    repo.add("main", files | {"README.md": card(base, **card_fields)})
    return repo


def card(base: str | None, **fields) -> bytes:
    lines = [f"base_model: {base}"] if base else []
    return "\n".join(
        ["---", *lines, *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---", ""]
    ).encode()


def weights_asked_for(hub: HubServer) -> list[str]:
    return [
        path for _, path, *_ in hub.log if path.endswith((".safetensors", ".pt", ".bin")) or path.startswith("/large/")
    ]


def test_every_layout_is_found_and_judged_without_weights(hub, client, folders, hub_cache):
    assert {layout.name for _, layout in published_layouts().values() if layout.is_writable} <= LAYOUTS.keys()
    add_target(hub, BASE)
    for count, layout in enumerate([*LAYOUTS, *READ_ONLY]):
        tags = {"tags": ["speculative-decoding"], "license": "mit"}
        add_drafter(hub, f"lab/{layout}", folders / layout, downloads=count, **tags)
    add_drafter(hub, "lab/quiet", folders / "specblock")  # neither a tag nor a name that says so
    found = client(hub_client.search, BASE, cache_dir=hub_cache)
    assert found["notes"] == () and found["rows"].keys() == {f"lab/{layout}" for layout in (*LAYOUTS, *READ_ONLY)}
    for layout, make in LAYOUTS.items():
        trained_for, kind, read, misfit, listed = found["rows"][f"lab/{layout}"]
        assert (trained_for, kind, read, misfit) == (BASE, make().config.model_type, layout, None)
        size = sum(weight.numel() * weight.element_size() for weight in make().state_dict().values())
        assert listed.licence == "mit" and (listed.size == size or layout not in (OURS, "dflash"))
    for layout, kind in {"deepspec": "eagle3", "speculators-dflash": "block_diffusion"}.items():
        assert found["rows"][f"lab/{layout}"][:4] == (BASE, kind, layout, None)
    assert found["best"] == "lab/speculators-dflash"  # the most downloaded
    assert weights_asked_for(hub) == []


def test_a_fine_tuned_and_a_quantised_copy_take_their_bases_drafter(hub, client, folders, hub_cache):
    add_target(hub, BASE)
    add_target(hub, "me/tuned", BASE)
    add_target(
        hub, "me/tuned-gptq", "me/tuned", quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}
    )
    add_drafter(hub, "lab/base-eagle3", folders / "sglang", downloads=9)
    assert client(hub_client.search, "me/tuned-gptq", cache_dir=hub_cache)["best"] == "lab/base-eagle3"
    # One of its own goes first, however little it is used.
    add_drafter(hub, "me/tuned-specblock", folders / OURS, base="me/tuned")
    found = client(hub_client.search, "me/tuned-gptq", cache_dir=hub_cache)
    assert list(found["rows"]) == ["me/tuned-specblock", "lab/base-eagle3"]
    assert [row[0] for row in found["rows"].values()] == ["me/tuned", BASE]
    name, text = client(hub_client.find_and_generate, "me/tuned-gptq", cache_dir=hub_cache)
    assert name == "me/tuned-specblock"
    assert text == tiny_target("llama").generate(prompt_of(6), max_new_tokens=16, do_sample=False)[0].tolist()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"vocab_size": 40}, r"its vocabulary is 32, that of this LlamaForCausalLM 40"),
        ({"hidden_size": 64}, r"its hidden size is 32, that of this LlamaForCausalLM 64"),
        ({"num_hidden_layers": 6}, r"its number of layers is 4, that of this LlamaForCausalLM 6"),
    ],
)
def test_a_resized_copy_is_refused_with_the_reason_and_a_way_out(hub, client, folders, hub_cache, fields, why):
    add_target(hub, BASE)
    add_target(hub, "me/resized", BASE, **fields)
    add_drafter(hub, "lab/base-specblock", folders / OURS)
    with pytest.raises(ClientError, match=rf"^ValueError: No drafter was found that fits me/resized: .*{why}.*Lookup"):
        client(hub_client.find_and_generate, "me/resized", cache_dir=hub_cache)
    assert weights_asked_for(hub) == []


def test_an_unknown_target_and_one_that_is_no_model(hub, client, hub_cache, tmp_path):
    add_target(hub, "me/unknown")
    best = client(hub_client.search, "me/unknown", cache_dir=hub_cache)["best"]
    assert best == (
        "No drafter was found that fits me/unknown: none is known; train one with `specblock train`, or pass "
        "assistant_model=LookupDrafter(target.config), which needs no training."
    )
    tiny_target("llama").config.save_pretrained(tmp_path / "folder")
    best = client(hub_client.search, str(tmp_path / "folder"), cache_dir=hub_cache)["best"]
    assert re.search(r"none is known; .*folder is a folder that names no model of the Hub; search by the name", best)
    with pytest.raises(ClientError, match=r"^OSError: .*me/nowhere"):
        client(hub_client.search, "me/nowhere", cache_dir=hub_cache)


def test_a_folder_of_the_cache_tells_its_name_and_the_hub_a_new_one(hub, client, folders, tmp_path):
    target = "Qwen/Qwen3-8B"
    folder = tmp_path / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "0123"
    tiny_target("llama").config.save_pretrained(folder)
    add_drafter(hub, "lab/qwen3-eagle3", folders / "sglang", base=target)
    found = client(hub_client.search, str(folder), cache_dir=str(tmp_path / "cache"))
    assert found["best"] == "lab/qwen3-eagle3" and found["rows"]["lab/qwen3-eagle3"][0] == target
    assert "z-lab/Qwen3-8B-DFlash-b16" in found["rows"] and found["notes"] == ()
    add_target(hub, "new/name")
    hub.moved["old/name"] = "new/name"
    add_drafter(hub, "lab/new-eagle3", folders / "sglang", base="new/name")
    assert client(hub_client.search, "old/name", cache_dir=str(tmp_path / "cache"))["best"] == "lab/new-eagle3"


def test_what_is_no_drafter_or_may_not_be_read_says_why(hub, client, folders, hub_cache):
    add_target(hub, BASE)
    add_target(hub, "me/eagle3-tuned", BASE)  # a model that is called like a drafter
    add_drafter(hub, "lab/gated-dflash", folders / "dflash").gated = True
    hub.repos["lab/gguf-eagle3"] = Repo()
    hub.repos["lab/gguf-eagle3"].add("main", {"README.md": card(BASE), "model.gguf": b"?"})
    trap = add_drafter(hub, "lab/strange-dflash", folders / "dflash")
    config = json.loads(trap.branches["main"].files["config.json"])
    code = {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "architectures": ["DFlash9DraftModel"]}
    trap.add("main", {"config.json": json.dumps(config | code).encode(), "dflash.py": b"raise RuntimeError('run')"})
    rows = client(hub_client.search, BASE, cache_dir=hub_cache)["rows"]
    for name, why in {
        "me/eagle3-tuned": "is not a drafter in a known layout",
        "lab/gated-dflash": "lab/gated-dflash is gated; accept its terms",
        "lab/gguf-eagle3": "has no config.json",
        "lab/strange-dflash": "is a variant of DFlash that is not known",
    }.items():
        assert why in rows[name][3]
    assert not any("dflash.py" in path for _, path, *_ in hub.log)


@pytest.mark.parametrize(
    "fault",
    [{"status": 429}, {"status": 500}, {"cut": 40}, {"change": lambda body: b"<html>"}],
    ids=["429", "500", "cut", "html"],
)
def test_a_hub_that_fails_leaves_the_cache_and_the_list(hub, client, folders, hub_cache, fault):
    add_target(hub, BASE)
    add_drafter(hub, "lab/base-specblock", folders / OURS)
    hub.faults.append(Fault("GET /api/models", 1000, **fault))
    found = client(hub_client.search, BASE, cache_dir=hub_cache)
    assert found["rows"] == {} and "none is known; the Hub could not be asked (" in found["best"]
    hub.faults.clear()
    assert client(hub_client.search, BASE, cache_dir=hub_cache)["best"] == "lab/base-specblock"
    hub.faults.append(Fault("GET /api/models", 1000, **fault))
    again = client(hub_client.search, BASE, cache_dir=hub_cache)
    # Its own configuration says nothing of a target.
    assert list(again["rows"]) == ["lab/base-specblock"]
    assert again["rows"]["lab/base-specblock"][3].startswith("its sizes fit, but nothing says that it is for this")


def add_named(hub: HubServer, name: str, folder: Path) -> None:
    """A drafter whose own configuration alone names its target, and that target."""
    drafter = small_drafter()
    drafter.config.target_name_or_path = BASE
    drafter.save_pretrained(folder / "named")
    add_target(hub, BASE)
    add_drafter(hub, name, folder / "named", base=None)


def test_offline_the_cache_is_searched(hub, client, folders, hub_cache, tmp_path):
    add_named(hub, "lab/named-specblock", tmp_path)
    add_drafter(hub, "lab/mute-eagle3", folders / "sglang", base=None)
    for name in ("lab/named-specblock", "lab/mute-eagle3"):
        client(hub_client.pull, name, cache_dir=hub_cache)
    client(hub_client.search, BASE, cache_dir=hub_cache)
    hub.log.clear()
    found = client(hub_client.search, BASE, cache_dir=hub_cache, local_files_only=True)
    assert list(found["rows"]) == ["lab/named-specblock", "lab/mute-eagle3"] and found["best"] == "lab/named-specblock"
    assert (
        client(hub_client.find_and_generate, BASE, cache_dir=hub_cache, local_files_only=True)[0]
        == "lab/named-specblock"
    )
    assert hub.log == []


def test_offline_a_drafter_needs_its_weights_too(hub, client, folders, hub_cache):
    target = "Qwen/Qwen3-8B"
    add_target(hub, target)
    first, second = [one for one in known_drafters() if one.target == target and one.layout in LAYOUTS][:2]
    for drafter in (first, second):
        add_drafter(hub, drafter.id, folders / drafter.layout, base=None)
    assert client(hub_client.search, target, cache_dir=hub_cache)["best"] == first.id  # reads configurations alone
    client(hub_client.pull, second.id, cache_dir=hub_cache)
    found = client(hub_client.search, target, cache_dir=hub_cache, local_files_only=True)
    assert found["best"] == second.id
    assert found["rows"][first.id][3].startswith(f"{first.id} has neither model.safetensors nor pytorch_model.bin, or")


def test_offline_other_models_of_the_cache_hide_no_drafter(hub, client, folders, hub_cache, tmp_path):
    add_named(hub, "zoe/named-specblock", tmp_path)
    for name in (BASE, "zoe/named-specblock"):
        client(hub_client.fetch_all, name, cache_dir=hub_cache)
    for number in range(MOST_CHECKED):
        snapshot = Path(hub_cache, f"models--any--model{number}", "snapshots", "0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text('{"model_type": "llama"}')
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    found = client(hub_client.search, BASE, cache_dir=hub_cache, local_files_only=True)
    assert (found["best"], found["notes"]) == ("zoe/named-specblock", ())


def test_the_list_knows_what_the_hub_does_not_say(hub, client, folders, hub_cache):
    target = "meta-llama/Llama-3.1-8B-Instruct"
    add_target(hub, target)
    add_drafter(hub, "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B", folders / "safeailab", base=None)
    found = client(hub_client.search, target, cache_dir=hub_cache)
    assert found["best"] == "yuhuili/EAGLE3-LLaMA3.1-Instruct-8B"
    others = [drafter.id for drafter in known_drafters() if drafter.target == target]
    assert set(found["rows"]) == set(others) and all(
        found["rows"][name][3] for name in others if name != found["best"]
    )


@pytest.mark.parametrize("target", ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"])
def test_small_drafters_under_real_names_are_what_the_list_says(hub, client, folders, hub_cache, target):
    add_target(hub, target)
    served = [one for one in known_drafters() if one.target == target and one.layout in {*LAYOUTS, *READ_ONLY}]
    for drafter in served:
        add_drafter(hub, drafter.id, folders / drafter.layout, base=None)
    unread = {"speculators_model_type": "peagle", "architectures": ["PEagleSpeculator"]}
    hub.repos["RedHatAI/Qwen3-8B-speculator.peagle"] = Repo()
    hub.repos["RedHatAI/Qwen3-8B-speculator.peagle"].add("main", {"config.json": json.dumps(unread).encode()})
    found = client(hub_client.search, target, cache_dir=hub_cache)
    for drafter in served:
        assert found["rows"][drafter.id] == (target, drafter.kind, drafter.layout, None, None)
    assert found["best"] == served[0].id  # of several that fit, the list's first
    if target == "Qwen/Qwen3-8B":
        assert {drafter.layout for drafter in served} >= {"specblock", "dflash", "dspark", "deepspec", "speculators"}
        assert "is a P-EAGLE drafter, which cannot be run" in found["rows"]["RedHatAI/Qwen3-8B-speculator.peagle"][3]


def test_the_list_names_kinds_and_layouts_that_there_are():
    ids = [drafter.id for drafter in known_drafters()]
    assert len(ids) == len(set(ids)) > 50
    for drafter in known_drafters():
        assert drafter.id.count("/") == drafter.target.count("/") == 1 and drafter.source
        assert not drafter.layout or drafter.layout in published_layouts(), drafter
        assert not drafter.acceptance or (1 < drafter.acceptance.tau < 20 and drafter.acceptance.date.startswith("20"))
    assert known_drafter("z-lab/qwen3-8b-dflash-b16").thinking is False


# The commands.


def test_the_page_of_known_drafters_is_what_the_command_prints(capsys):
    assert cli.main(["find"]) == 0
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text(encoding="utf-8") == capsys.readouterr().out, "run specblock find > docs/models.md"
    assert set(layouts_tested()) == {layout for layout in (*LAYOUTS, *READ_ONLY) if layout != OURS}


def test_the_find_command(hub, client, folders, tmp_path):
    add_target(hub, BASE)
    add_target(hub, "me/resized", BASE, vocab_size=40)
    tags = {"tags": ["speculative-decoding"]}
    add_drafter(hub, "lab/first-specblock", folders / OURS, downloads=1234, **tags)
    hub.repos["lab/gguf-eagle3"] = Repo()
    hub.repos["lab/gguf-eagle3"].add("main", {"README.md": card(BASE)})
    status, said = client(hub_client.spoken, "find", BASE)
    lines = said.splitlines()
    assert status == 0 and re.search(r"^fits +lab/first-specblock +specblock +specblock_hf +0\.\d MB +1,234", lines[1])
    assert re.search(r"^no +lab/gguf-eagle3 +- +-", lines[2]) and lines[3].startswith(
        "lab/gguf-eagle3: lab/gguf-eagle3 has no"
    )
    assert lines[-1] == 'drafter = AutoDrafter.from_pretrained("lab/first-specblock", target=target)'
    status, said = client(hub_client.spoken, "find", "me/resized")
    assert status == 1 and "vocabulary is 32" in said.replace("\n    ", " ") and "LookupDrafter(target.config)" in said
    status, said = client(hub_client.spoken, "find", "me/nowhere")
    assert status == 2 and "specblock find: " in said


def test_the_doctor_finds_a_drafter_and_says_how_to_use_it(hub, client, tmp_path):
    names = save_models(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %}no{% endif %}"
    tokenizer.save_pretrained(names["target"])
    config = json.loads((tmp_path / "specblock" / "config.json").read_text()) | {"thinking": False}
    (tmp_path / "specblock" / "config.json").write_text(json.dumps(config))
    add_drafter(hub, "org/tiny", tmp_path / "target", base=None)
    add_drafter(hub, "lab/tiny-specblock", tmp_path / "specblock", base="org/tiny")
    status, said = client(hub_client.spoken, "doctor", "org/tiny", "--max-new-tokens", "8", "--plan", "6", "1", "4")
    assert status in (0, 1) and said.startswith(
        "found: lab/tiny-specblock (specblock, layout specblock_hf, for org/tiny)"
    )
    assert "pass enable_thinking=False to apply_chat_template" in said and "use it here? " in said
    assert said.endswith(
        "\n\nfrom specblock_hf import AutoDrafter, JoinedDrafter, LookupDrafter\n"
        'drafter = AutoDrafter.from_pretrained("lab/tiny-specblock", target=target, dtype=target.dtype)\n'
        "drafter = JoinedDrafter(drafter, LookupDrafter(target.config))\n"
        "output = target.generate(**inputs, assistant_model=drafter)\n"
    )
    assert "pass enable_thinking=False" in client(hub_client.spoken, "find", "org/tiny")[1].replace("\n    ", " ")
    del hub.repos["lab/tiny-specblock"]
    hub.log.clear()
    status, said = client(hub_client.spoken, "doctor", "org/tiny")
    assert status == 2 and "No drafter was found that fits org/tiny: none is known" in said
    assert weights_asked_for(hub) == []

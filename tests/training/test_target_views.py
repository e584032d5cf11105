# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The target's view of a text: the same in a padded batch and from disk, and never a view of another text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import tiny_target
from training_for_tests import Told, example_of

from specblock_hf.training import target_views as features
from specblock_hf.training.target_views import FeatureStore, view_target


LAYERS, TOP = (0, 2, 4), 6


def examples():
    tokens = Told(5, 20).tokens.tolist()
    return [example_of(t[:n], s) for t, n, s in zip(tokens, (20, 9, 13, 17, 6), (4, 3, 12, 1, 2), strict=True)]


def assert_same_view(ours, theirs):
    torch.testing.assert_close(ours.features, theirs.features)
    assert torch.equal(ours.top_ids, theirs.top_ids)
    torch.testing.assert_close(ours.top_probs, theirs.top_probs)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_views_equal_one_forward_over_each_text(kind):
    target = tiny_target(kind)
    views = view_target(target, examples(), LAYERS, TOP)
    for example, view in zip(examples(), views, strict=True):
        out = target(torch.tensor([example.input_ids]), output_hidden_states=True)
        expected = torch.stack([out.hidden_states[i][0] for i in LAYERS], dim=1)
        torch.testing.assert_close(view.features, expected, rtol=1e-4, atol=1e-4)
        # The prediction of token t is made at t - 1, and only the answer's are kept.
        head = target.get_output_embeddings()(out.hidden_states[-1][0, example.answer_start - 1 : -1])
        probs = head.softmax(-1).topk(TOP)
        assert torch.equal(view.top_ids, probs.indices.int())
        torch.testing.assert_close(view.top_probs, probs.values, rtol=1e-3, atol=1e-5)
        assert len(view.top_ids) == len(example.input_ids) - example.answer_start


def test_views_from_disk(tmp_path, llama):
    texts = examples()
    store = FeatureStore(tmp_path, texts, shard_size=2)
    store.build(llama, LAYERS, TOP)
    assert len(list(tmp_path.glob("views-*.safetensors"))) == 3
    for index, view in enumerate(view_target(llama, texts, LAYERS, TOP)):
        assert_same_view(store[index], view)


def test_an_interrupted_store_goes_on_where_it_stopped(tmp_path, llama, monkeypatch):
    store = FeatureStore(tmp_path, examples(), shard_size=2)
    seen = []
    original = view_target

    def interrupted(target, chunk, *args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(len(chunk))
        return original(target, chunk, *args)

    monkeypatch.setattr(features, "view_target", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.build(llama, LAYERS, TOP)
    assert len(list(tmp_path.glob("views-*.safetensors"))) == 2
    monkeypatch.setattr(features, "view_target", lambda *args: seen.append(len(args[1])) or original(*args))
    store.build(llama, LAYERS, TOP)
    assert seen == [2, 2, 1]
    store.build(llama, LAYERS, TOP)
    assert seen == [2, 2, 1]


def test_a_folder_serves_other_runs_and_grows(tmp_path, llama, monkeypatch):
    texts = examples()
    FeatureStore(tmp_path, texts[:3], shard_size=2).build(llama, LAYERS, TOP)
    seen = []
    monkeypatch.setattr(features, "view_target", lambda *args: seen.extend(args[1]) or view_target(*args))
    FeatureStore(tmp_path, [texts[2], texts[0]]).build(llama, LAYERS, TOP)
    assert not seen
    # The same text with a longer prompt is another one, and what is given twice is looked at once.
    longer = replace(texts[1], answer_start=texts[1].answer_start + 2)
    more = [longer, texts[4], texts[1], texts[4]]
    store = FeatureStore(tmp_path, more)
    store.build(llama, LAYERS, TOP)
    assert sorted(map(id, seen)) == sorted(map(id, (longer, texts[4])))
    for index, view in enumerate(view_target(llama, more, LAYERS, TOP)):
        assert_same_view(store[index], view)


def test_processes_share_the_work(tmp_path, llama):
    texts = examples()
    stores = [FeatureStore(tmp_path, texts, shard_size=1) for _ in range(2)]
    for number, store in enumerate(stores):
        store.build(llama, LAYERS, TOP, part=(number, 2))
        assert len(list(tmp_path.glob("views-*.safetensors"))) == (3, 5)[number]
    for index, view in enumerate(view_target(llama, texts, LAYERS, TOP)):
        assert_same_view(stores[0][index], view)  # the other's were written after it had looked


def test_views_of_another_kind_are_refused(tmp_path, llama):
    texts = examples()
    FeatureStore(tmp_path, texts).build(llama, LAYERS, TOP)
    for layers, top in (((0, 1, 4), TOP), (LAYERS, TOP + 1)):
        with pytest.raises(ValueError, match="remove it or name another folder"):
            FeatureStore(tmp_path, texts).build(llama, layers, top)
    assert json.loads((tmp_path / "meta.json").read_text())["feature_layers"] == list(LAYERS)

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/draft_cost.py` on tiny shapes: what is forced holds, what is counted is right, and runs go on."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specblock_hf import Eagle3Drafter


FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def draft_cost():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield importlib.import_module("draft_cost")


@pytest.fixture(scope="module")
def target(draft_cost):
    with torch.no_grad():
        return draft_cost.counting_target("llama-3.1-8b", True, CPU, torch.float32, "sdpa")


@pytest.fixture
def bench(draft_cost, target):
    with torch.no_grad():
        yield draft_cost.Bench(target, context=12, batch_size=1, repeats=1, rounds=2, plain_tokens=4)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-8b", "smollm2-135m"])
@torch.no_grad()
def test_targets_count(draft_cost, name):
    target = draft_cost.counting_target(name, True, CPU, torch.bfloat16, "sdpa")
    ids = torch.tensor([[5, 3, 508]])
    assert target.generate(ids, do_sample=False, max_new_tokens=6)[0, 3:].tolist() == [509, 510, 511, 0, 1, 2]
    # By far, so that no rounding changes it.
    best, second = target(ids).logits[0, -1].float().topk(2).values
    assert best > 2 * second


def test_public_shapes(draft_cost):
    for name, billions in (("llama-3.1-8b", 8.03), ("qwen3-8b", 8.19)):
        with torch.device("meta"):
            kind, sizes = draft_cost.TARGETS[name]
            model = AutoModelForCausalLM.from_config(kind(**sizes, tie_word_embeddings=False))
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(billions * 1e9, rel=0.002)


def test_every_drafter_accepts_what_is_forced(draft_cost, target, bench):
    for candidate in draft_cost.CANDIDATES:
        drafter = draft_cost.random_drafter(candidate, target)
        loop = bench.loop(drafter, candidate.plan, 3, plain_ms=1.0)
        assert (loop["tau"], loop["same_text"]) == (3.0, True), candidate.name
        assert loop["speedup"] == pytest.approx(loop["tokens_per_second"] / 1000)


def test_nothing_more_is_accepted_than_what_is_forced(draft_cost, target, bench):
    candidate = draft_cost.CANDIDATES[0]

    class Right(Eagle3Drafter):
        """Drafts what the target will say."""

        def propose(self, state, pairs, limits):
            tree = super().propose(state, pairs, limits)
            return replace(tree, tokens=(tree.tokens[:, :1] + tree.depths()) % self.config.vocab_size)

    drafter = draft_cost.random_drafter(candidate, target)
    drafter.__class__ = Right
    bench.rounds = 4
    assert bench.loop(drafter, candidate.plan, 2, plain_ms=1.0)["tau"] == 2.0


def test_several_prompts(draft_cost, target):
    candidate = next(c for c in draft_cost.CANDIDATES if c.kind == "medusa")
    with torch.no_grad():
        bench = draft_cost.Bench(target, 12, 3, 1, 2)
        loop = bench.loop(draft_cost.random_drafter(candidate, target), candidate.plan, 4, plain_ms=2.0)
    assert (loop["tau"], loop["same_text"]) == (4.0, True)
    # A plain step emits three tokens in two milliseconds.
    assert loop["speedup"] == pytest.approx(loop["tokens_per_second"] / 1500)


def test_a_proposal_is_counted(draft_cost, target, bench):
    eagle, one, two = draft_cost.CANDIDATES[:3]
    costs = {
        c.name: bench.proposal(draft_cost.random_drafter(c, target), replace(c.plan, tree_budget=20))
        for c in (eagle, one, two)
    }
    assert costs[eagle.name]["forwards"] == 8 and costs[eagle.name]["rows"] == draft_cost.PAIRS + 7 * 10
    assert costs[eagle.name]["nodes"] == 20
    assert costs[one.name]["forwards"] == 1 and costs[one.name]["rows"] == draft_cost.PAIRS
    assert costs[two.name]["forwards"] == 2 and costs[two.name]["rows"] > draft_cost.PAIRS
    assert costs[one.name]["operators"] < costs[two.name]["operators"] < costs[eagle.name]["operators"]


def test_operators(draft_cost):
    a = torch.ones(3)
    assert draft_cost.operators_of(lambda: (a + a).view(1, 3).sum()) == 3
    assert draft_cost.device_work(CPU, lambda: a + a) == {}


@torch.no_grad()
def test_ranks_come_as_often_as_the_papers(draft_cost, target):
    candidate = next(c for c in draft_cost.CANDIDATES if c.kind == "specblock")
    drafter = draft_cost.random_drafter(candidate, target)
    normed, top = torch.zeros(1, 3000, 4, target.config.hidden_size), torch.zeros(1, 3000, 4, 20)
    drafter.draw_ranks(count=12000)
    said = drafter.rank_logits(normed, top).argmax(-1).flatten()
    shares = said.bincount(minlength=4) / len(said)
    torch.testing.assert_close(shares, torch.tensor([0.752, 0.150, 0.041, 0.057]), rtol=0, atol=0.02)
    assert not said.equal(drafter.rank_logits(normed[:, :5], top[:, :5]).argmax(-1).flatten())


def test_a_run_goes_on(draft_cost, tmp_path, monkeypatch, capsys):
    path = tmp_path / "cost.json"
    options = ["--tiny", "--target", "qwen3-8b", "--drafter", "eagle3", "medusa", "--device", "cpu"]
    options += ["--dtype", "float32", "--repeats", "1", "--rounds", "1", "--output", str(path)]
    monkeypatch.setattr(draft_cost, "VERIFIED", (1, 4))
    monkeypatch.setattr(draft_cost, "CANDIDATES", [replace(c, taus=(2,)) for c in draft_cost.CANDIDATES])
    assert draft_cost.main([*options, "--context", "8"]) == 0
    (unit,) = json.loads(path.read_text())["units"]
    assert (unit["target"], unit["context"], unit["batch"]) == ("qwen3-8b", 8, 1)
    assert unit["shape"]["hidden_size"] == 64 and unit["settings"]["dtype"] == "float32"
    assert unit["machine"]["torch"] == torch.__version__
    assert [row["nodes"] for row in unit["verify"]] == [1, 4] and unit["plain_ms"] and unit["plain_static_ms"]
    assert set(unit["drafters"]) == {"EAGLE-3", "Medusa"} and set(unit["ratios"]) == {"Medusa"}
    proposals = {name: figures["proposal"] for name, figures in unit["drafters"].items()}
    ratio = unit["ratios"]["Medusa"]["operators"]
    assert ratio == proposals["Medusa"]["operators"] / proposals["EAGLE-3"]["operators"] < 1
    assert "EAGLE-3" in capsys.readouterr().out
    measured = []

    def measure_all(bench, candidates, begun, keep):
        measured.append(bench.context)
        begun |= unit

    monkeypatch.setattr(draft_cost, "measure_all", measure_all)
    assert draft_cost.main([*options, "--context", "8", "10"]) == 0
    assert measured == [10]
    unit["drafters"]["Medusa"]["loops"][0]["same_text"] = False
    path.write_text(json.dumps({"units": [unit]}))
    assert draft_cost.main([*options, "--context", "8"]) == 1


def test_a_drafter_that_fails_costs_its_own_line(draft_cost, tmp_path, monkeypatch):
    path, kept = tmp_path / "cost.json", []
    options = ["--tiny", "--target", "qwen3-8b", "--context", "8", "--device", "cpu", "--dtype", "float32"]
    options += ["--repeats", "1", "--rounds", "1", "--drafter", "eagle3", "medusa", "--output", str(path)]
    propose = draft_cost.Bench.proposal

    def proposal(bench, drafter, plan):
        kept.append(path.exists() and json.loads(path.read_text())["units"][0])
        if len(kept) == 1:
            raise RuntimeError("out of memory")
        return propose(bench, drafter, plan)

    monkeypatch.setattr(draft_cost.Bench, "proposal", proposal)
    monkeypatch.setattr(draft_cost, "VERIFIED", (1,))
    monkeypatch.setattr(draft_cost, "CANDIDATES", [replace(c, taus=()) for c in draft_cost.CANDIDATES])
    assert draft_cost.main(options) == 1
    (unit,) = json.loads(path.read_text())["units"]
    assert unit["failed"] == {"EAGLE-3": "RuntimeError('out of memory')"} and set(unit["drafters"]) == {"Medusa"}
    # What was found is written at once, and measured again if nothing followed.
    assert kept[1]["failed"] == unit["failed"] and kept[1]["unfinished"] and "unfinished" not in unit
    path.write_text(json.dumps({"units": [kept[1]]}))
    assert draft_cost.main(options) == 0
    assert set(json.loads(path.read_text())["units"][0]["drafters"]) == {"EAGLE-3", "Medusa"}

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Two copies of a drafter: what an update trains, when it comes into service, how it goes back."""

from __future__ import annotations

import io
from random import Random

import pytest
import torch
from attention_for_tests import only_ours, watched_attention
from conftest import VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, WatchedLock
from serving_for_tests import GREEDY, same, weights_of
from test_windows import Record
from training_for_tests import logits_below, tiny_drafter

from specblock_hf import JoinedDrafter, LookupDrafter
from specblock_hf.adaptation import DrafterUpdater, UpdateSettings
from specblock_hf.adaptation.windows import WindowBuffer
from specblock_hf.drafters.specblock.loss import SpecBlockObjective
from specblock_hf.drafting.drafter import DraftingCallback


def filled_buffer(texts: int = 4) -> WindowBuffer:
    """What the target said in a few calls."""
    drafter, record, buffer = GarbageDrafter(VOCAB, (0, 2, 4)), Record(), WindowBuffer(2**20)
    drafter.add_callback(record)
    for seed in range(texts):
        tiny_target("llama").generate(prompt_of(6, seed), assistant_model=drafter, **GREEDY)
        for window in record.recorder.windows():
            buffer.add(window)
    return buffer


def updater_of(drafter=None, **settings) -> DrafterUpdater:
    defaults = {"learning_rate": 3e-3, "steps": 2, "averaging": 0.0, "objective": SpecBlockObjective(num_blocks=2)}
    return DrafterUpdater(drafter or tiny_drafter(), UpdateSettings(**(defaults | settings)))


def test_an_update_changes_only_the_trained_copy_until_it_is_published():
    updater, buffer = updater_of(), filled_buffer()
    before = weights_of(updater.deployed)
    updater.train("full", updater.draw(buffer))
    assert same(weights_of(updater.deployed), before)
    assert not any(torch.equal(a, b) for a, b in zip(weights_of(updater.trained), before, strict=True))
    updater.publish()
    assert same(weights_of(updater.deployed), weights_of(updater.trained))


def test_no_update_reaches_cudnn():
    buffer, updater = filled_buffer(), updater_of(drift_weight=0.1)
    steps, before = updater.draw(buffer), updater.snapshot()
    with watched_attention() as trained:
        updater.train("full", steps)
    with watched_attention() as judged:
        updater.share_kept(before, steps[0])
    assert only_ours(trained) and only_ours(judged)


def test_what_comes_into_service_is_the_average_of_all_steps():
    updater, buffer = updater_of(averaging=0.7, steps=1), filled_buffer()
    expected = weights_of(updater.deployed)
    for _ in range(3):
        updater.train("full", updater.draw(buffer))
        new = weights_of(updater.trained)
        expected = [0.7 * average + 0.3 * weight for average, weight in zip(expected, new, strict=True)]
    updater.publish()
    for deployed, weight in zip(weights_of(updater.deployed), expected, strict=True):
        torch.testing.assert_close(deployed, weight)


def test_a_head_update_leaves_everything_before_the_heads_alone():
    updater, buffer = updater_of(), filled_buffer()
    before = {name: p.detach().clone() for name, p in updater.trained.named_parameters()}
    updater.train("head", updater.draw(buffer))
    changed = {name for name, p in updater.trained.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"lm_head.weight", "rank_head.0.weight", "rank_head.2.weight"}
    updater.train("full", updater.draw(buffer))
    changed = {name for name, p in updater.trained.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys()


def test_a_head_update_brings_heads_only_into_service():
    updater, buffer = updater_of(averaging=0.7), filled_buffer()
    updater.train("full", updater.draw(buffer))
    updater.publish()
    before = {name: p.detach().clone() for name, p in updater.deployed.named_parameters()}
    updater.train("head", updater.draw(buffer))
    updater.publish()
    changed = {name for name, p in updater.deployed.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"lm_head.weight", "rank_head.0.weight", "rank_head.2.weight"}


def test_steps_under_autocast_see_the_steps_before():
    settings, steps = {"autocast": True, "drift_weight": 0.0}, filled_buffer().draw(4, 100, Random(0))
    at_once, one_by_one = updater_of(**settings), updater_of(**settings)
    loss = at_once.train("full", steps)["loss"]
    losses = [one_by_one.train("full", [step])["loss"] for step in steps]
    assert loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    assert same(weights_of(at_once.trained), weights_of(one_by_one.trained))


def test_a_service_within_one_autocast_drafts_by_what_came_into_service():
    updater, hidden = updater_of(), torch.ones(1, tiny_drafter().config.hidden_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = updater.deployed.lm_head(hidden)
        updater.restore([2 * weight for weight in updater.snapshot()])
        assert torch.equal(updater.deployed.lm_head(hidden), 2 * before)


def test_what_did_not_change_counts_as_unchanged():
    updater, buffer = updater_of(averaging=0.7), filled_buffer()
    weights = dict(updater.deployed.named_parameters())
    versions = {name: weight._version for name, weight in weights.items()}

    def changed() -> set[str]:
        return {name for name, weight in weights.items() if weight._version != versions[name]}

    updater.publish()
    updater.restore(updater.snapshot())
    assert not changed()
    updater.train("head", updater.draw(buffer))
    updater.publish()
    assert changed() == {"lm_head.weight", "rank_head.0.weight", "rank_head.2.weight"}


def test_updates_lower_the_loss_of_what_is_learned():
    objective = SpecBlockObjective(num_blocks=1)
    updater = updater_of(drift_weight=0.0, steps=8, learning_rate=5e-3, objective=objective)
    buffer = filled_buffer()
    losses = [updater.train("full", updater.draw(buffer))["loss"] for _ in range(4)]
    assert losses[-1] < 0.85 * losses[0]


def test_the_drift_starts_at_zero_and_its_weight_holds_it_down():
    def drifts(weight: float) -> list[float]:
        # One step an update: the drift is taken in its first one.
        updater, buffer = updater_of(drift_weight=weight, steps=1), filled_buffer()
        return [updater.train("full", updater.draw(buffer))["drift"] for _ in range(8)]

    first = updater_of(steps=1)
    assert first.train("full", first.draw(filled_buffer()))["drift"] == pytest.approx(0.0, abs=1e-6)
    free, held = drifts(1e-6)[-1], drifts(30.0)[-1]
    assert free > 0.1
    assert held < free / 3


@pytest.mark.parametrize("markov_rank", [0, 3])
def test_the_drift_is_the_divergence_from_the_drafter_before_deployment(markov_rank):
    updater, buffer = updater_of(tiny_drafter(markov_rank=markov_rank)), filled_buffer(1)
    updater.train("full", updater.draw(buffer))
    (windows,) = buffer.draw(1, 1000, updater.random)
    (window,) = windows
    batch_embeds, batch_features = window.embeds[None], window.features[None]
    distributions = []
    with torch.no_grad():
        for drafter in (updater.original, updater.trained):
            pairs = torch.arange(len(window))[None]
            hidden = drafter(batch_embeds, drafter.project_features(batch_features), pairs)[0]
            size, before = drafter.config.block_size, [-1, *window.tokens.tolist()]
            distributions.append(
                [
                    # The token before slot k's is that of pair i + k.
                    [logits_below(drafter, slots[k], k, before[min(i + k + 1, len(window))]) for k in range(size)]
                    for i, slots in enumerate(hidden)
                ]
            )
        distributions = [
            [[logits.log_softmax(-1) for logits in slots] for slots in distribution] for distribution in distributions
        ]
        divergences = [
            float(
                (
                    distributions[0][pair][slot].exp() * (distributions[0][pair][slot] - distributions[1][pair][slot])
                ).sum()
            )
            for pair in range(len(window))
            for slot in range(size)
            # Pair i's slot k is about the token of pair i + 1 + k.
            if pair + 1 + slot < len(window) and window.top_ids[pair + 1 + slot, 0] >= 0
        ]
        expected = sum(divergences) / len(divergences)
    assert len(divergences) <= 256
    assert updater._drift(windows).item() == pytest.approx(expected, rel=1e-4)


def test_weights_change_under_the_lock_only():
    updater, buffer = updater_of(), filled_buffer()
    updater.deployed.lock = WatchedLock()
    held = []
    parameter = updater.deployed.parameters_of("full")[0]
    copy = parameter.copy_
    parameter.copy_ = lambda new: (held.append(updater.deployed.lock.held), copy(new))[1]
    updater.train("full", updater.draw(buffer))
    assert held == []
    updater.publish()
    assert held == [1]


def test_restore_goes_back_with_all_copies():
    updater, buffer = updater_of(averaging=0.5), filled_buffer()
    good = updater.snapshot()
    for _ in range(3):
        updater.train("full", updater.draw(buffer))
        updater.publish()
    assert not same(weights_of(updater.deployed), good)
    updater.restore(good)
    for drafter in (updater.deployed, updater.trained, updater.averaged):
        assert same(weights_of(drafter), good)
    assert not updater.optimizer.state


def test_the_rate_rises_over_the_first_steps_and_again_after_a_rollback():
    updater, buffer = updater_of(learning_rate=4e-3, steps=1, warmup_steps=4, drift_weight=0.0), filled_buffer()
    before = updater.snapshot()

    def largest_move() -> float:
        old = weights_of(updater.trained)
        updater.train("full", updater.draw(buffer))
        return max(float((a - b).abs().max()) for a, b in zip(weights_of(updater.trained), old, strict=True))

    # AdamW's first step moves every weight by the rate itself.
    assert largest_move() == pytest.approx(1e-3, rel=0.01)
    for _ in range(3):
        largest_move()
    assert [group["lr"] for group in updater.optimizer.param_groups] == [4e-3]
    updater.restore(before)
    assert largest_move() == pytest.approx(1e-3, rel=0.01)


def test_the_trained_copy_is_finer_than_a_deployed_one_in_bfloat16():
    drafter, buffer = tiny_drafter(dtype=torch.bfloat16), filled_buffer()
    updater = updater_of(drafter, learning_rate=1e-6)
    before = weights_of(drafter)
    assert {p.dtype for p in updater.trained.parameters()} == {torch.float32}
    assert {p.dtype for p in updater.original.parameters()} == {torch.bfloat16}
    updater.train("full", updater.draw(buffer))
    updater.publish()
    assert {p.dtype for p in drafter.parameters()} == {torch.bfloat16}
    # A step below bfloat16's resolution is not lost: it adds up in the trained copy.
    assert not same(weights_of(updater.trained), [weight.float() for weight in before])


@pytest.mark.parametrize("autocast", [False, True])
def test_an_update_works_whatever_mode_the_caller_is_in(autocast):
    drafter = tiny_drafter()
    with torch.inference_mode():
        buffer = filled_buffer()
        updater = updater_of(drafter, autocast=autocast)
        numbers = updater.train("full", updater.draw(buffer))
        updater.publish()
    assert numbers["loss"] > 0
    assert not any(weight.is_inference() for weight in drafter.parameters())


def reloaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_restored_updater_takes_the_same_steps():
    first, buffer = updater_of(averaging=0.7), filled_buffer()
    first.train("full", first.draw(buffer))
    second = updater_of(averaging=0.7, seed=9)
    second.load_state_dict(reloaded(first.state_dict()))
    assert same(weights_of(second.deployed), weights_of(first.averaged))
    for updater in (first, second):
        updater.train("full", updater.draw(buffer))
    assert same(weights_of(second.trained), weights_of(first.trained))
    assert same(weights_of(second.averaged), weights_of(first.averaged))


def test_a_restored_updater_has_moments_of_its_own_and_its_own_settings():
    first, buffer = updater_of(), filled_buffer()
    first.train("full", first.draw(buffer))
    state, second = reloaded(first.state_dict()), updater_of(betas=(0.5, 0.6))
    second.load_state_dict(state)
    moment = state["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(second.optimizer.state_dict()["state"][0]["exp_avg"], moment)
    before = moment.clone()
    second.train("full", second.draw(buffer))
    assert torch.equal(moment, before)
    assert [group["betas"] for group in second.optimizer.param_groups] == [(0.5, 0.6)]


@pytest.mark.parametrize("saved", ["with its anchor", "without drift", "by an older version"])
def test_the_drift_is_from_the_drafter_before_the_first_deployment(saved):
    first, buffer = updater_of(drift_weight=0.0 if saved == "without drift" else 0.1), filled_buffer()
    anchor = weights_of(first.deployed)
    first.train("full", first.draw(buffer))
    first.publish()
    state, adapted = reloaded(first.state_dict()), tiny_drafter()
    if saved == "by an older version":
        del state["original"]
    adapted.load_state_dict(first.deployed.state_dict())
    second = updater_of(adapted)
    second.load_state_dict(state)
    assert same(weights_of(second.original), anchor if saved == "with its anchor" else weights_of(adapted))
    assert not same(anchor, weights_of(adapted))


def test_an_average_begins_where_a_service_without_one_was():
    first, buffer = updater_of(), filled_buffer()
    first.train("full", first.draw(buffer))
    second = updater_of(averaging=0.7)
    second.load_state_dict(reloaded(first.state_dict()))
    assert same(weights_of(second.deployed), weights_of(first.trained))


def test_the_global_generators_are_left_alone():
    updater, buffer = updater_of(), filled_buffer()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    updater.train("full", updater.draw(buffer))
    assert torch.equal(torch.rand(1), expected)


def test_of_a_joined_drafter_the_part_with_weights_learns():
    part = tiny_drafter()
    updater = updater_of(JoinedDrafter(part, LookupDrafter(tiny_target("llama").config)))
    assert updater.deployed is part


def test_the_copies_have_no_callbacks():
    drafter = tiny_drafter()
    drafter.add_callback(DraftingCallback())
    updater = updater_of(drafter)
    assert len(drafter.callbacks) == 1 and updater.trained.callbacks == updater.original.callbacks == ()


def test_a_drafter_loaded_in_inference_mode_is_refused():
    with torch.inference_mode():
        drafter = tiny_drafter()
    with pytest.raises(ValueError, match="loaded inside of torch.inference_mode"):
        updater_of(drafter)


def test_without_drift_and_average_there_are_two_copies():
    updater = updater_of(drift_weight=0.0)
    assert updater.original is None and updater.averaged is None


def test_a_drafter_without_weights_is_refused():
    with pytest.raises(ValueError, match="LookupDrafter has no weights that could learn"):
        updater_of(LookupDrafter(tiny_target("llama").config))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"learning_rate": 0.0}, {"batch_tokens": 0}, {"drift_weight": -1.0}])
def test_settings_that_cannot_train_are_refused(bad):
    with pytest.raises(ValueError, match="cannot train"):
        UpdateSettings(**bad)


@pytest.mark.parametrize("averaging", [-0.1, 1.0])
def test_an_average_that_never_moves_is_refused(averaging):
    with pytest.raises(ValueError, match="the share that an average keeps lies in"):
        UpdateSettings(averaging=averaging)


@pytest.mark.parametrize("markov_rank", [0, 3])
def test_a_snapshot_is_compared_on_the_same_texts(markov_rank):
    drafter = tiny_drafter(markov_rank=markov_rank)
    updater, buffer = updater_of(drafter, drift_weight=0.0, steps=8, learning_rate=5e-3), filled_buffer()
    windows, before = buffer.newest(3), updater.snapshot()
    assert updater.share_kept(before, windows) == 1.0
    assert updater.share_kept(before, []) is None
    old = chains(updater.deployed, windows)
    for _ in range(3):
        updater.train("full", updater.draw(buffer))
    updater.publish()
    kept = updater.share_kept(before, windows)
    new = chains(updater.deployed, windows)
    assert sum(new) > sum(old)
    assert kept == pytest.approx((1 + sum(new) / len(new)) / (1 + sum(old) / len(old)))
    assert same(weights_of(updater.deployed), weights_of(updater.trained))


def test_the_drafter_in_service_is_not_run_for_the_comparison():
    # It may be on another device than the windows that updates use.
    updater, seen = updater_of(drift_weight=0.0), []
    updater.deployed.register_forward_pre_hook(lambda module, args: seen.append(module))
    assert updater.share_kept(updater.snapshot(), filled_buffer().newest(2)) == 1.0
    assert len(seen) == 4 and not any(module is updater.deployed for module in seen)


def chains(drafter, windows) -> list[int]:
    """From every place that is followed by a token of the target, how many guesses in a row are right."""
    lengths = []
    for window in windows:
        pairs = torch.arange(len(window))[None]
        with torch.no_grad():
            hidden = drafter(window.embeds[None], drafter.project_features(window.features[None]), pairs)
        for place in range(len(window) - 1):
            right = 0
            if window.top_ids[place + 1, 0] < 0:
                continue
            for slot in range(drafter.config.block_size):
                wanted = place + 1 + slot
                if wanted == len(window):
                    break
                logits = logits_below(drafter, hidden[0, place, slot], slot, int(window.tokens[wanted - 1]))
                if drafter.draft_to_target[logits.argmax()] != window.tokens[wanted]:
                    break
                right += 1
            lengths.append(right)
    return lengths

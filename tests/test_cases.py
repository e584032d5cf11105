# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of faults that users of this and of other libraries have met, one test for each, which tells what happens now:
`pytest tests -k cases -s`. Each kind has more members, in the tests of the part that it concerns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from baselines_for_tests import baseline
from batches_for_tests import garbage, padded_batch
from conftest import SIZES, VOCAB, prompt_of, tiny_target
from drafters_for_tests import ToldDrafter, make_tree
from families_for_tests import FAMILIES, target_of
from fresh_import_for_tests import imported_afresh
from interruptions_for_tests import Broken, Ended, Listener
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from options_for_tests import BASE, refusal, same_text
from serving_for_tests import FAST, GREEDY, adapted, plain, serve, trainable
from serving_for_tests import KINDS as ADAPTED
from targets_for_tests import LIMIT, MOE_FAMILIES, OFFLOADED, ROPES, TargetKind, forget_the_past, make_target
from test_copies import COPIES, in_process
from test_faults import break_it, spoil_step
from test_loading import LITTLE, change_config, peak_of, rewrite, small_drafter
from test_saving import FULL, contents, halved, room_for
from training_for_tests import tiny_drafter
from transfers_for_tests import TwoDevices
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, Phi3Config

from specblock_hf import AutoDrafter, DraftingPlan, JoinedDrafter, LookupDrafter, SpecBlockConfig, SpecBlockDrafter
from specblock_hf.adaptation import UpdateSettings
from specblock_hf.checkpoints import provenance
from specblock_hf.checkpoints.provenance import recorded_command
from specblock_hf.compat import CACHE
from specblock_hf.drafters.common.configuration import UNRECORDED_LAYER


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


@case(1, "a call that is broken off")
def test_a_cache_after_a_call_that_was_broken_off() -> str:
    emitted = {}
    for kind in ("llama", "gemma3"):
        target, prompt = tiny_target(kind), prompt_of(11)
        cache, listener = DynamicCache(config=target.config), Listener(Ended(Broken, 9))
        with pytest.raises(Broken):
            target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=listener,
                assistant_model=garbage(1),
                **BASE | {CACHE: cache, "eos_token_id": None},
            )
        ids = torch.cat((prompt, torch.tensor([listener.tokens]), prompt_of(4, seed=1)), dim=1)
        options = BASE | {"attention_mask": torch.ones_like(ids)}
        plain = target.generate(ids, **options)
        assert torch.equal(target.generate(ids, **options, **{CACHE: cache}, assistant_model=garbage(1)), plain)
        emitted[kind] = len(listener.tokens)
    return f"after {emitted['llama']} tokens the next turn with the same cache writes plain decoding's text"


@case(2, "columns that are not the prompt's")
def test_a_prompt_that_adds_other_columns() -> str:
    said = refusal(make_target(TargetKind(wrap="prompt tuning")), padded_batch((9,)), dict)
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0} | ROPES["longrope"]
    config = Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=rope)
    same_text(AutoModelForCausalLM.from_config(config).eval(), padded_batch((100,)), dict)
    return f"Phi-3 beyond its original length writes plain decoding's text; prompt tuning: {said}"


@case(3, "rows of a forward that depend on each other")
def test_rows_that_depend_on_each_other() -> str:
    for rope in ("dynamic", "longrope"):
        kind = TargetKind(rope=rope)
        for length in (LIMIT - 7, LIMIT - 2, LIMIT + 20):
            batch, texts = padded_batch((length,)), []
            for drafter in (None, garbage(1)):
                forget_the_past(kind, make_target(kind))
                texts.append(make_target(kind).generate(**batch, **BASE, assistant_model=drafter))
            assert torch.equal(*texts)
    said = refusal(make_target(TargetKind(mode="dropout")), padded_batch((9,)), dict)
    return f"dynamic RoPE and longrope write plain decoding's text across their length; dropout: {said}"


@case(4, "what transformers adds to a multimodal call")
def test_multimodal_targets() -> str:
    for kind in MULTIMODAL:
        target = multimodal_target(kind)
        same_text(target, padded_batch((7,)), dict)
        plain = same_text(target, prompts_with_images(kind, (7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        if kind.startswith("gemma"):
            refused = refusal(target, prompts_with_images(kind, (7,)), lambda: {"prefill_chunk_size": 3})
            continue
        chunks = BASE | {"prefill_chunk_size": 3, "assistant_model": drafter}
        assert torch.equal(target.generate(**prompts_with_images(kind, (7,)), **chunks), plain)
    return (
        f"{', '.join(MULTIMODAL)}: text, a picture, and a picture with prefill_chunk_size are exact, but that "
        f"Gemma's pictures cannot be cut: {refused}"
    )


@case(5, "training flags in a saved configuration")
def test_training_flags() -> str:
    for family in MOE_FAMILIES:
        same_text(make_target(TargetKind(family, flag="output_router_logits")), padded_batch((7,)), dict)
    for flag in ("output_hidden_states", "output_attentions", "use_cache"):
        same_text(make_target(TargetKind(attention="eager", flag=flag)), padded_batch((7,)), dict)
    return f"{', '.join(MOE_FAMILIES)} with output_router_logits and Llama with three others are exact"


@case(6, "weights that are elsewhere between forwards")
def test_offloaded_weights() -> str:
    for offload in OFFLOADED:
        target = make_target(TargetKind(wrap=offload))
        plain = same_text(target, padded_batch((7,)), dict)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, feature_layers=[0, 1, 2])).eval()
        assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return f"{', '.join(OFFLOADED)}: exact"


@case(7, "ids of int32, no ids")
def test_other_ids() -> str:
    batch = padded_batch((7,))
    same_text(tiny_target("llama"), batch | {"input_ids": batch["input_ids"].int()}, dict)
    empty = torch.ones(1, 0, dtype=torch.long)
    said = refusal(tiny_target("llama"), {"input_ids": empty, "attention_mask": empty}, dict)
    return f"int32 is exact; an empty prompt: {said}"


@case(8, "a wrapped forward, a package imported afresh")
def test_wrapped_and_imported_afresh() -> str:
    same_text(make_target(TargetKind(wrap="wrapped forward")), padded_batch((7,)), dict)
    target = tiny_target("llama")
    plain = target.generate(**padded_batch((7,)), **BASE)
    old = SpecBlockDrafter(SpecBlockConfig.for_target(target.config)).eval()
    with imported_afresh() as package:
        new = package.SpecBlockDrafter(package.SpecBlockConfig.for_target(target.config)).eval()
        assert not isinstance(new, SpecBlockDrafter)
        for drafter in (old, new):
            assert torch.equal(target.generate(**padded_batch((7,)), **BASE, assistant_model=drafter), plain)
    return "both are exact, with drafters of the old package and of the new one"


# Drafters: 9 to 11, 14, 15, 17.


class TooDeep(ToldDrafter):
    """Proposes a chain of a hundred tokens whatever it is told, and calls it flat."""

    def draft(self, state, limits):
        return replace(make_tree([1] * 100, range(-1, 99)), height=1)


@case(9, "a drafter that ignores its limits at the target's last position")
def test_a_drafter_beyond_its_limits():
    target, drafter = target_of("GPT-2"), TooDeep(VOCAB)
    options = {"do_sample": False, "max_length": target.config.max_position_embeddings}
    assert torch.equal(
        target.generate(prompt_of(9), assistant_model=drafter, **options), target.generate(prompt_of(9), **options)
    )
    return f"exact to position {options['max_length']}, {drafter.last_statistics.nodes_verified} nodes in all"


@case(10, "for_target knows Llama's names only")
def test_families_with_other_names():
    for family in FAMILIES:
        target = target_of(family)
        drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config, draft_vocab_size=24)).eval()
        texts = [
            target.generate(prompt_of(7), do_sample=False, max_new_tokens=6, assistant_model=helper)
            for helper in (drafter, None)
        ]
        assert torch.equal(*texts)
    return f"drafters made and texts exact for {', '.join(FAMILIES)}"


@case(11, "a joined drafter forgets what its parts know")
def test_a_joined_drafter_asks_its_parts():
    target, medusa = tiny_target("llama"), baseline("medusa")
    medusa.config.feature_layers = [UNRECORDED_LAYER]
    joined = JoinedDrafter(medusa, LookupDrafter(target.config))
    medusa.drafting_plan = DraftingPlan(5, 1)
    options = {"do_sample": False, "max_new_tokens": 12}
    output = target.generate(prompt_of(9), assistant_model=joined, **options)
    assert torch.equal(output, target.generate(prompt_of(9), **options))
    assert joined.last_statistics.nodes_verified <= 6 * joined.last_statistics.rounds
    return f"{joined} reads layer {joined.feature_layers_for(target)[0]} of 4 and drafts by a plan set after joining"


@case(14, "Falcon in a batch on a GPU; saving where the package is not installed")
def test_falcon_on_a_device_and_a_package_without_metadata(tmp_path, monkeypatch):
    falcon, lengths = baseline("falcon_drafter"), torch.tensor([3, 0, 5])
    states = torch.randn(3, 5, falcon.config.hidden_size)
    alone = [falcon.read(states[row : row + 1, :5], states[row : row + 1])[0][0] for row in (0, 2)]
    with TwoDevices() as devices:
        together, _ = falcon.read(states, states, lengths=lengths.cpu())
    assert [transfer.kind for transfer in devices.transfers if transfer.kind == "upload"] == []
    for row, count, own in ((0, 3, alone[0]), (2, 5, alone[1])):
        torch.testing.assert_close(together[row, :count], own[:count])

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(provenance, "version", version)
    falcon.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "provenance.json").read_text())["versions"] == {}
    return "lengths and states meet on one device; saved with no versions"


@case(15, "starts without bound")
def test_free_starts():
    target, drafter = tiny_target("llama"), tiny_drafter(branching=[8, 8, 8, 8], root_width=12, max_starts=None)
    rows = {}
    for plan in (DraftingPlan(2, 3), DraftingPlan(2, 4), DraftingPlan(12, 4)):
        drafter.drafting_plan = plan
        target.generate(prompt_of(9), do_sample=False, max_new_tokens=16, assistant_model=drafter)
        statistics = drafter.last_statistics
        most = sum(max(plan.tree_budget - forward, 0) for forward in range(1, plan.num_forwards))
        assert statistics.drafter_rows <= 9 + 16 + most * statistics.rounds
        rows[plan.tree_budget, plan.num_forwards] = statistics.drafter_rows
    return ", ".join(f"{count} rows for 16 tokens by DraftingPlan{plan}" for plan, count in rows.items())


@case(17, "a drafter whose network says NaN")
def test_a_network_of_nan():
    target, drafter, calls = tiny_target("llama"), tiny_drafter(), 0
    with torch.no_grad():
        for weight in drafter.parameters():
            weight.fill_(math.nan)
    options = {"max_new_tokens": 8, "top_k": 1, "do_sample": True}  # one token has all the probability
    plain = target.generate(prompt_of(9), max_new_tokens=8, do_sample=False)
    for rule in ("walk", "token", "block"):
        drafter.drafting_plan = DraftingPlan(9, 2, draft_sampling="sampled", verification=rule)
        for sampling in (options, {"max_new_tokens": 8, "do_sample": False}):
            assert torch.equal(target.generate(prompt_of(9), assistant_model=drafter, **sampling), plain)
            calls += 1
    return f"the target's text in {calls} calls, drawn and greedy"


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

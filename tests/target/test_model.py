# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The adapter alone: what a drafter is told, how trees are scored, what is left in the cache."""

from __future__ import annotations

import pytest
import torch
from conftest import ATTENTIONS, KINDS, VOCAB, prompt_of, tiny_target
from drafters_for_tests import GarbageDrafter, OracleDrafter, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from targets_for_tests import TargetKind, make_target
from transformers import DynamicCache

from specblock_hf.compat import CACHE
from specblock_hf.target.cache import TargetCache
from specblock_hf.target.features import FeatureTaps
from specblock_hf.target.model import TargetModel
from specblock_hf.trees.verification import Walk


LAYERS = (0, 1, 2, 4)
EVERY_TARGET = pytest.mark.parametrize(
    ("kind", "attention"), [(kind, attention) for kind in KINDS for attention in ATTENTIONS]
)


def scorer_for(
    target, ids: torch.LongTensor, layers=LAYERS, mask: torch.Tensor | None = None, **kwargs
) -> TargetModel:
    """An adapter as `generate()` would set it up."""
    mask = torch.ones_like(ids) if mask is None else mask
    model_kwargs = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
        CACHE: DynamicCache(config=target.config),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    return TargetModel(target, layers, ids, model_kwargs, **kwargs)


def walk_of(nodes: list[int], tokens: list[int]) -> Walk:
    return Walk(torch.tensor([nodes]), torch.tensor([tokens]), torch.tensor([len(tokens)]), torch.tensor([False]))


def start(scorer: TargetModel, first: int) -> None:
    """Prefill, and emit `first`."""
    for _ in scorer.prefill():
        pass
    scorer.commit(walk_of([0], [first]))


@torch.no_grad()
def plain_logits(target, ids: list[int]) -> torch.Tensor:
    """Logits after the last of `ids`, by one plain forward."""
    return target(torch.tensor([ids]), use_cache=False).logits[0, -1]


@torch.no_grad()
def plain_states(target, ids: list[int], mask: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """transformers' own `hidden_states`, each `[T, d]`."""
    return tuple(h[0] for h in target(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states)


@st.composite
def trees(draw, most: int = 9):
    """Parents, tokens and a node to walk to."""
    size = draw(st.integers(1, most))
    parents = [-1] + [draw(st.integers(0, node - 1)) for node in range(1, size)]
    tokens = draw(st.lists(st.integers(0, VOCAB - 1), min_size=size, max_size=size))
    return parents, tokens, draw(st.integers(0, size - 1))


def path_to(node: int, parents: list[int]) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


@EVERY_TARGET
@settings(max_examples=8, deadline=None)
@given(drawn=st.lists(trees(), min_size=3, max_size=3))
def test_every_node_is_scored_as_its_path_alone_would_be(kind, attention, drawn):
    target = tiny_target(kind, attention)
    text = prompt_of(7)[0].tolist()
    with scorer_for(target, prompt_of(7)) as scorer, torch.no_grad():
        start(scorer, 3)
        text.append(3)
        # Later trees rest on rows that the earlier walks moved; text and trees outgrow the window of 6.
        for parents, tokens, node in drawn:
            scored = scorer.score(make_tree(tokens, parents))
            for other in range(len(parents)):
                ids = text + [tokens[step] for step in path_to(other, parents)[1:]]
                torch.testing.assert_close(scored.logits[0, other], plain_logits(target, ids), rtol=0, atol=5e-4)
            nodes = path_to(node, parents)
            emitted = [tokens[step] for step in nodes[1:]] + [7]
            scorer.commit(walk_of(nodes, emitted))
            text += emitted


def test_masks_take_the_form_that_each_backend_reads():
    tree = make_tree([1, 2, 3, 4], [-1, 0, 0, 2])
    masks = {}
    for kind, attention in (("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("gemma3", "sdpa")):
        with scorer_for(tiny_target(kind, attention), prompt_of(12)) as scorer, torch.no_grad():
            start(scorer, 3)
            scorer.score(make_tree([3], [-1]))
            root, committed = make_tree([3], [-1]), scorer._committed
            assert scorer._masks.mask(root, torch.zeros(1, 1, dtype=torch.long), committed) is None
            scorer.commit(walk_of([0], [3]))
            masks[kind, attention] = scorer._masks.mask(tree, tree.depths(), committed)
    nodes = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]).bool()
    sdpa, eager = masks["llama", "sdpa"], masks["llama", "eager"]
    assert sdpa.dtype == torch.bool and sdpa.shape == (1, 1, 4, 13 + 4)
    assert sdpa[..., :13].all() and torch.equal(sdpa[0, 0, :, 13:], nodes)
    assert torch.equal(eager, torch.where(sdpa, 0.0, torch.finfo(torch.float32).min))
    # A window of 6 stores 5 rows; a node of depth 1 no longer sees the first of them, one of depth 2 the first two.
    seen = torch.tensor([[1] * 5, [0] + [1] * 4, [0] + [1] * 4, [0, 0] + [1] * 3]).bool()
    assert torch.equal(masks["mistral", "sdpa"][0, 0], torch.cat((seen, nodes), dim=1))
    assert list(masks["gemma3", "sdpa"]) == ["sliding_attention", "full_attention"]
    assert torch.equal(masks["gemma3", "sdpa"]["sliding_attention"], masks["mistral", "sdpa"])
    assert torch.equal(masks["gemma3", "sdpa"]["full_attention"], sdpa)


def test_the_root_is_the_last_committed_token_whatever_the_tree_says(llama):
    with scorer_for(llama, prompt_of(5)) as scorer, torch.no_grad():
        start(scorer, 3)
        logits = scorer.score(make_tree([30, 4], [-1, 0])).logits[0]
    torch.testing.assert_close(logits[1], plain_logits(llama, [*prompt_of(5)[0].tolist(), 3, 4]))


@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 20])
def test_a_drafter_is_told_every_state_with_the_token_that_followed(target, chunk):
    prompt = prompt_of(12)
    plain = target.generate(prompt, max_new_tokens=30, do_sample=False)
    text = plain[0].tolist()
    for drafter in (OracleDrafter(VOCAB, text, feature_layers=LAYERS), GarbageDrafter(VOCAB, LAYERS)):
        output = target.generate(
            prompt, max_new_tokens=30, do_sample=False, assistant_model=drafter, prefill_chunk_size=chunk
        )
        assert output[0].tolist() == text
        (told,) = drafter.states
        known = len(told.tokens())  # all but what the last round emitted
        assert told.tokens() == text[1 : known + 1]
        assert told.positions() == list(range(known))
        assert (told.first_position, told.max_length) == (0, len(text))
        for layer, states in zip(range(len(LAYERS)), [plain_states(target, text)[i] for i in LAYERS], strict=True):
            torch.testing.assert_close(told.features(layer), states[:known], rtol=0, atol=5e-4)
        chunks = 1 if chunk is None else -(-12 // chunk)
        statistics = drafter.last_statistics
        assert [p.tokens.shape[1] for p in told.pairs[:chunks]] == [
            min(chunk or 12, 12 - i * (chunk or 12)) for i in range(chunks)
        ]
        assert statistics.target_calls == chunks + statistics.rounds


def test_logits_of_the_whole_prompt_do_no_harm(llama):
    plain = llama.generate(prompt_of(9), max_new_tokens=12, do_sample=False)
    # As from a target that cannot leave any out.
    options = {"logits_to_keep": 0, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(llama.generate(prompt_of(9), assistant_model=GarbageDrafter(VOCAB), **options), plain)


def test_inference_mode(target):
    text = target.generate(prompt_of(9), max_new_tokens=24, do_sample=False)[0].tolist()
    with torch.inference_mode():
        output = target.generate(
            prompt_of(9), max_new_tokens=24, do_sample=False, assistant_model=OracleDrafter(VOCAB, text)
        )
    assert output[0].tolist() == text


def test_feature_indices_mean_what_transformers_means(target):
    ids = prompt_of(6)
    with scorer_for(target, ids, layers=(4, 0, 3, 0)) as scorer, torch.no_grad():
        ((scored, pairs),) = scorer.prefill()
    states = plain_states(target, ids[0].tolist())
    for feature, index in zip(pairs.features, (4, 0, 3, 0), strict=True):
        torch.testing.assert_close(feature[0], states[index], rtol=0, atol=2e-5)
    assert scored.logits.shape == (1, 1, VOCAB)


@pytest.mark.parametrize("chunk", [None, 4])
def test_padding_on_the_left_is_invisible_to_the_drafter(target, chunk):
    prompt = prompt_of(12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), prompt), dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    plain = target.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False)
    text = plain[0, 5:].tolist()
    for drafter in (OracleDrafter(VOCAB, text, feature_layers=LAYERS), GarbageDrafter(VOCAB, LAYERS)):
        output = target.generate(
            padded,
            attention_mask=mask,
            max_new_tokens=24,
            do_sample=False,
            assistant_model=drafter,
            prefill_chunk_size=chunk,
        )
        assert torch.equal(output, plain)
        (told,) = drafter.states
        known = len(told.tokens())
        assert (told.tokens(), told.positions()) == (text[1 : known + 1], list(range(known)))
        assert all(pairs.tokens.shape[1] == int(pairs.lengths[0]) for pairs in told.pairs)
        for layer, index in enumerate(LAYERS):
            torch.testing.assert_close(
                told.features(layer), plain_states(target, text)[index][:known], rtol=0, atol=5e-4
            )


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_prompt_tokens_that_the_mask_hides_are_left_out(target, chunk):
    prompt, mask = prompt_of(12), torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False, "prefill_chunk_size": chunk}
    plain = target.generate(prompt, **options)
    drafter = GarbageDrafter(VOCAB, LAYERS)
    assert torch.equal(target.generate(prompt, **options, assistant_model=drafter), plain)
    # Nobody is told of a chunk that is hidden as a whole.
    assert all(pairs.tokens.shape[1] for pairs in drafter.states[0].pairs)
    text = prompt[mask.bool()].tolist() + plain[0, 12:].tolist()
    (told,) = drafter.states
    known = len(told.tokens())
    assert (told.tokens(), told.positions()) == (text[1 : known + 1], list(range(known)))


def test_a_prompt_of_embeddings(target):
    embeds = target.get_input_embeddings()(prompt_of(12))
    for chunk in (None, 5):
        plain = target.generate(inputs_embeds=embeds, max_new_tokens=20, do_sample=False)
        drafter = GarbageDrafter(VOCAB, LAYERS)
        output = target.generate(
            inputs_embeds=embeds, max_new_tokens=20, do_sample=False, assistant_model=drafter, prefill_chunk_size=chunk
        )
        assert torch.equal(output, plain)
        (told,) = drafter.states
        text = prompt_of(12)[0].tolist() + plain[0].tolist()
        given_embeds = torch.cat([pairs.embeds()[0] for pairs in told.pairs])
        expected = target.get_input_embeddings()(torch.tensor(text[1 : len(given_embeds) + 1]))
        torch.testing.assert_close(given_embeds, expected, rtol=0, atol=0)
        assert told.tokens()[:11] == [-1] * 11
        assert told.max_length == 12 + 20


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_cache_is_continued_and_left_as_plain_decoding_leaves_it(target, chunk):
    first, second = prompt_of(11), prompt_of(6, seed=1)

    def two_turns(assistant_model=None):
        cache = DynamicCache(config=target.config)
        options = {CACHE: cache, "do_sample": False, "max_new_tokens": 13, "return_dict_in_generate": True}
        one = target.generate(first, assistant_model=assistant_model, **options)
        ids = torch.cat((one.sequences, second), dim=1)
        return target.generate(
            ids, assistant_model=assistant_model, prefill_chunk_size=assistant_model and chunk, **options
        )

    plain = two_turns()
    text = plain.sequences[0].tolist()
    for drafter in (OracleDrafter(VOCAB, text, feature_layers=LAYERS), GarbageDrafter(VOCAB, LAYERS)):
        output = two_turns(drafter)
        assert output.sequences[0].tolist() == text
        told = drafter.states[1]
        # The first turn left all but its last token in the cache.
        assert told.first_position == 11 + 13 - 1
        known = len(told.tokens())
        assert told.positions() == list(range(23, 23 + known))
        assert told.tokens() == text[24 : 24 + known]
        cache = output[CACHE]
        assert cache.get_seq_length() == len(text) - 1
        for layer, expected in zip(cache.layers, plain[CACHE].layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=5e-4)
            torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=5e-4)
            assert not (layer.is_sliding and layer.record_past)


def test_only_new_tokens_may_be_passed_with_a_cache(llama):
    prompt, tail = prompt_of(9), prompt_of(4, seed=2)
    outputs = []
    for drafter in (None, GarbageDrafter(VOCAB)):
        cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(prompt, **{CACHE: cache})
        outputs.append(
            llama.generate(
                tail,
                attention_mask=torch.ones(1, 13, dtype=torch.long),
                **{CACHE: cache},
                max_new_tokens=12,
                do_sample=False,
                assistant_model=drafter,
            )
        )
    assert torch.equal(*outputs)


@pytest.mark.parametrize("siblings", [False, True])
def test_rows_move_only_where_there_are_holes_and_the_cache_is_cropped_once_a_round(llama, monkeypatch, siblings):
    moved, crops = [], []
    move, crop = TargetCache._move, DynamicCache.crop
    monkeypatch.setattr(
        TargetCache, "_move", lambda self, source, start: (moved.append(source), move(self, source, start))
    )
    monkeypatch.setattr(DynamicCache, "crop", lambda self, count: (crops.append(count), crop(self, count)))
    prompt = prompt_of(6)
    text = llama.generate(prompt, max_new_tokens=40, do_sample=False)[0].tolist()
    drafter = OracleDrafter(VOCAB, text, plan=lambda number: number % 3, siblings=siblings)
    llama.generate(prompt, max_new_tokens=40, do_sample=False, assistant_model=drafter)
    statistics = drafter.last_statistics
    assert len(moved) == (sum(kept > 0 for kept in statistics.accepted) if siblings else 0)
    # The prompt's one crop drops nothing.
    assert len(crops) == statistics.rounds + 1 and all(count <= 0 for count in crops)


def test_the_hooks_leave_with_the_call_even_if_it_fails(llama):
    def hooks():
        modules = [llama.get_decoder(), *llama.get_decoder().layers]
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    before = hooks()
    with pytest.raises(NotImplementedError):
        drafter = GarbageDrafter(VOCAB, LAYERS)
        drafter.draft = lambda state, limits: (_ for _ in ()).throw(NotImplementedError)
        llama.generate(prompt_of(4), max_new_tokens=4, assistant_model=drafter)
    assert hooks() == before
    with scorer_for(llama, prompt_of(4)):
        assert hooks() == before + len(LAYERS)
    assert hooks() == before


def test_the_hooks_listen_only_while_armed(llama):
    taps = FeatureTaps(llama.get_decoder(), (0, 2))
    with torch.no_grad():
        with taps.armed():
            llama(prompt_of(4))
        llama(prompt_of(9))
    assert [state.shape for state in taps.take()] == [(1, 4, 32), (1, 4, 32)]
    taps.remove()
    with pytest.raises(ValueError, match="torch.compile"):
        taps.take()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({CACHE: "static"}, r"^the rows of a batch end .* leave out .* or pass a DynamicCache\.$"),
        ({CACHE: "offloaded"}, r"^the cache is a DynamicCache whose .* that is not offloaded, or none\.$"),
        ({CACHE: "full"}, r"^the cache already holds 6 tokens, .* crop it by one token or more"),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])},
            r"^attention_mask hides the last token .* on the left",
        ),
    ],
)
def test_unsupported_inputs_end_in_one_sentence(llama, kwargs, sentence):
    from transformers import StaticCache

    inputs = {"input_ids": prompt_of(6)} | kwargs
    if kwargs.get(CACHE) == "static":
        inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
        inputs[CACHE] = StaticCache(config=llama.config, max_cache_len=20)
    elif kwargs.get(CACHE) == "offloaded":
        cache = DynamicCache(config=llama.config)
        cache.offloading = True
        inputs[CACHE] = cache
    elif kwargs.get(CACHE) == "full":
        inputs[CACHE] = cache = DynamicCache(config=llama.config)
        with torch.no_grad():
            llama(inputs["input_ids"], **{CACHE: cache})
    with pytest.raises(ValueError, match=sentence):
        llama.generate(**inputs, max_new_tokens=4, assistant_model=GarbageDrafter(VOCAB))


def test_an_input_that_is_not_passed_on_is_refused():
    target = tiny_target("gemma3")
    drafter = GarbageDrafter(VOCAB)
    with pytest.raises(ValueError, match=r"^generate\(\) got output_router_logits, which tree drafting"):
        target.generate(prompt_of(4), max_new_tokens=4, assistant_model=drafter, output_router_logits=True)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("chunk", [None, 5])
def test_states_of_layers_that_share_keys_are_those_of_the_whole_prompt(chunk, padding):
    target, layers = make_target(TargetKind("gemma4, shared keys", layers=8)), [2, 6, 8]
    prompt = torch.cat((torch.zeros(1, padding, dtype=torch.long), prompt_of(12)), dim=1)
    call = {"attention_mask": (torch.arange(12 + padding) >= padding).long()[None], "prefill_chunk_size": chunk}
    call |= {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    drafter, plain = GarbageDrafter(VOCAB, layers), target.generate(prompt, **call)
    assert torch.equal(target.generate(prompt, **call, assistant_model=drafter), plain)
    (told,) = drafter.states
    known, text = len(told.tokens()), plain[0, padding:].tolist()
    assert told.tokens() == text[1 : known + 1]
    for layer, index in enumerate(layers):
        torch.testing.assert_close(told.features(layer), plain_states(target, text)[index][:known], rtol=0, atol=5e-4)

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""EAGLE-3 in the decoding loop, and the norms and attentions that its variants have."""

from __future__ import annotations

import pytest
import torch
from conftest import SIZES, VOCAB, prompt_of, tiny_target

from specblock_hf.drafters.eagle3.configuration import Eagle3Config
from specblock_hf.drafters.eagle3.drafting import Eagle3Drafter
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits


GREEDY = {"do_sample": False}


def eagle_config(**overrides) -> Eagle3Config:
    sizes = {name: SIZES[name] for name in SIZES if name not in ("num_hidden_layers", "initializer_range")}
    fields = {"draft_vocab_size": 24, "head_dim": 8, "num_blocks": 4, "beam_width": 3, "tree_budget": 12}
    return Eagle3Config(**(sizes | fields | overrides), initializer_range=0.3)


def random_drafter(kind: type[Eagle3Drafter] = Eagle3Drafter, **overrides) -> Eagle3Drafter:
    torch.manual_seed(3)
    drafter = kind(eagle_config(**overrides)).eval()
    drafter.set_draft_vocabulary(torch.randperm(VOCAB)[: drafter.config.draft_vocab_size])
    return drafter


class OracleEagle3(Eagle3Drafter):
    """Runs its network and then lifts, at every row, the token that the target will write there."""

    text: list[int] = []

    def forward(self, token_embeds, conditions, position_ids, *args, **kwargs):
        self.rows = position_ids
        return super().forward(token_embeds, conditions, position_ids, *args, **kwargs)

    def draft_logits(self, hidden):
        normed, logits = super().draft_logits(hidden)
        rows = self.rows[:, -logits.shape[1] :]
        text = torch.tensor(self.text + [self.text[-1]] * 20)
        right = self.draft_to_target == text[rows + 2].unsqueeze(-1)
        return normed, logits + 50.0 * right.unsqueeze(2)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"norm_before_residual": True, "norm_before_fc": True},
        {"own_embedding": True},
        {"attention_bias": True},
        {"fc_norm": True, "norm_output": True},
        {"qk_norm": True},
    ],
    ids=["plain", "norms", "embedding", "bias", "3.1", "heads"],
)
def test_random_weights_leave_the_text_alone(target, overrides):
    prompt = prompt_of(7)
    drafter = random_drafter(**overrides)
    expected = target.generate(prompt, max_new_tokens=24, **GREEDY)
    output = target.generate(prompt, max_new_tokens=24, assistant_model=drafter, **GREEDY)
    assert torch.equal(output, expected)
    assert drafter.last_statistics.nodes_verified > drafter.last_statistics.rounds
    torch.manual_seed(11)
    expected = target.generate(prompt, max_new_tokens=16, do_sample=True, temperature=0.8, top_k=0)
    torch.manual_seed(11)
    output = target.generate(
        prompt, max_new_tokens=16, do_sample=True, temperature=0.8, top_k=0, assistant_model=drafter
    )
    assert torch.equal(output, expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_drafters_own_attention_backend_changes_nothing(llama, attention):
    drafter = random_drafter()
    drafter.set_attn_implementation(attention)
    pairs = Pairs(
        tokens=prompt_of(6),
        features=tuple(torch.ones(1, 6, 32).cumsum(1) * (layer + 1) for layer in range(3)),
        positions=torch.arange(6)[None],
        lengths=torch.tensor([6]),
        table=TokenTable.of(llama),
    )
    with torch.no_grad():
        tree = drafter.propose(drafter.begin(pairs.table, 1, 4), pairs, Limits((12,), (9,), num_forwards=4))
        drafter.set_attn_implementation("sdpa")
        expected = drafter.propose(drafter.begin(pairs.table, 1, 4), pairs, Limits((12,), (9,), num_forwards=4))
    assert torch.equal(tree.tokens, expected.tokens) and torch.equal(tree.parents, expected.parents)


@pytest.mark.parametrize("eos", [False, True])
def test_an_oracle_is_accepted_wherever_its_vocabulary_reaches(target, eos):
    prompt = prompt_of(7)
    text = target.generate(prompt, max_new_tokens=30, **GREEDY)[0].tolist()
    options = {"eos_token_id": text[7 + 13]} if eos else {}
    expected = target.generate(prompt, max_new_tokens=30, **options, **GREEDY)
    drafter = random_drafter(OracleEagle3, draft_vocab_size=30)
    drafter.text = text
    output = target.generate(prompt, max_new_tokens=30, assistant_model=drafter, **options, **GREEDY)
    assert torch.equal(output, expected)
    known, accepted, position, end = set(drafter.draft_to_target.tolist()), [], 7, expected.shape[1] - 1
    while position < end:
        kept = 0
        while kept < 4 and position + kept + 1 <= end and text[position + kept + 1] in known:
            kept += 1
        emitted = min(kept + 1, end - position)
        accepted.append(emitted - 1)
        position += emitted
    assert drafter.last_statistics.accepted == accepted
    assert max(accepted) == 4 or eos


@pytest.mark.parametrize("kind", [Eagle3Drafter, OracleEagle3])
def test_a_padded_batch_says_what_plain_decoding_says(target, kind):
    short, long = prompt_of(4, seed=1), prompt_of(9, seed=2)
    prompts = torch.cat([torch.nn.functional.pad(short, (5, 0)), long])
    mask = torch.tensor([[0] * 5 + [1] * 4, [1] * 9])
    options = {"attention_mask": mask, "max_new_tokens": 14, "pad_token_id": 0, **GREEDY}
    expected = target.generate(prompts, **options)
    drafter = random_drafter(kind, draft_vocab_size=30)
    drafter.text = expected[1].tolist()  # right for one of the rows, so that they do not advance together
    assert torch.equal(target.generate(prompts, assistant_model=drafter, **options), expected)
    assert drafter.last_statistics.emitted == 28


def test_layers_follow_from_the_targets_depth_where_they_are_not_recorded(llama):
    drafter = random_drafter()
    assert drafter.feature_layers == (-1, -1, -1)
    assert drafter.feature_layers_for(llama) == (2, 2, 1)
    drafter = random_drafter(target_num_layers=4)
    assert drafter.feature_layers == drafter.feature_layers_for(llama) == (2, 2, 1)
    assert random_drafter(feature_layers=[0, 3, 4]).feature_layers_for(llama) == (0, 3, 4)


def test_every_token_of_the_own_embedding_is_read(llama):
    drafter = random_drafter(own_embedding=True)
    llama_table = TokenTable.of(llama)
    state = drafter.begin(llama_table, 1, 4)
    assert state.table.embedding is drafter.embed_tokens
    assert state.table.output_head is llama.get_output_embeddings()
    with torch.no_grad():
        pairs = Pairs(
            prompt_of(5),
            tuple(torch.ones(1, 5, 32) for _ in range(3)),
            torch.arange(5)[None],
            torch.tensor([5]),
            llama_table,
        )
        limits = Limits((12,), (9,), num_forwards=4)
        before = drafter.propose(state, pairs, limits)
        drafter.embed_tokens.weight.copy_(llama.get_input_embeddings().weight)
        after = drafter.propose(drafter.begin(llama_table, 1, 4), pairs, limits)
        shared = random_drafter()
        shared.load_state_dict({k: v for k, v in drafter.state_dict().items() if k != "embed_tokens.weight"})
        expected = shared.propose(shared.begin(llama_table, 1, 4), pairs, limits)
    assert torch.equal(after.tokens, expected.tokens) and not torch.equal(before.tokens, expected.tokens)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"num_hidden_layers": 2}, r"^An EAGLE-3 drafter has one layer and num_hidden_layers is 2; "),
        ({"draft_vocab_size": 33}, r"^draft_vocab_size \(33\) is larger than the target's vocab_size \(32\); "),
        (
            {"target_hidden_size": 64},
            r"^The target's embedding is 64 wide and the drafter's states 32; .*own_embedding",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        eagle_config(**overrides)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"vocab_size": 40}, "vocabulary is 40"),
        ({"hidden_size": 64, "head_dim": 16}, "hidden size is 64"),
        ({"target_num_layers": 6}, "number of layers is 6"),
        ({"feature_layers": [2, 3, 5]}, "hidden state 5"),
    ],
)
def test_a_drafter_for_another_target_is_refused(overrides, what):
    target = tiny_target("llama")
    with pytest.raises(ValueError, match=what):
        target.generate(prompt_of(5), max_new_tokens=4, assistant_model=random_drafter(**overrides))


@torch.no_grad()
def test_the_norms_of_speculators():
    """A single row attends to itself alone, so what the layer makes of it can be written down."""
    drafter = random_drafter(norm_before_residual=True, norm_before_fc=True)
    for name, weight in drafter.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    layer, generator = drafter.layers[0], torch.Generator().manual_seed(1)
    features, token = (torch.randn(1, 1, size, generator=generator) for size in (96, 32))

    def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + drafter.config.rms_norm_eps).rsqrt() * weight

    condition = drafter.fc.weight @ norm(features, drafter.input_norm.weight)[0, 0]
    assert torch.allclose(drafter.project_features(features)[0, 0], condition, atol=1e-5)
    normed = norm(condition, layer.hidden_norm.weight)
    attended = layer.self_attn.v_proj.weight @ torch.cat([norm(token, layer.input_layernorm.weight)[0, 0], normed])
    attended = layer.self_attn.o_proj.weight @ attended.view(2, 1, 8).expand(2, 2, 8).flatten()
    hidden = normed + attended
    expected = hidden + layer.mlp(norm(hidden, layer.post_attention_layernorm.weight))
    made = drafter(token, condition[None, None], torch.tensor([[3]]))
    assert torch.allclose(made[0, 0, 0], expected, atol=1e-5)


@torch.no_grad()
def test_the_norms_of_eagle_3_1_and_of_qwen3():
    drafter = random_drafter(fc_norm=True, norm_output=True, qk_norm=True)
    for name, weight in drafter.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    layer, generator = drafter.layers[0], torch.Generator().manual_seed(1)
    features, tokens = (torch.randn(1, 2, size, generator=generator) for size in (96, 32))

    def norm(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return states * (states.square().mean(-1, keepdim=True) + drafter.config.rms_norm_eps).rsqrt() * weight

    parts = [norm(part, own.weight) for part, own in zip(features.split(32, -1), drafter.fc_norm, strict=True)]
    conditions = torch.cat(parts, -1) @ drafter.fc.weight.T
    assert torch.allclose(drafter.project_features(features), conditions, atol=1e-5)
    attention = layer.self_attn
    inputs = torch.cat([norm(tokens, layer.input_layernorm.weight), norm(conditions, layer.hidden_norm.weight)], -1)
    query = norm((inputs @ attention.q_proj.weight.T).view(2, 4, 8), attention.q_norm.weight)
    keys = norm((inputs @ attention.k_proj.weight.T).view(2, 2, 8), attention.k_norm.weight).repeat_interleave(2, 1)
    values = (inputs @ attention.v_proj.weight.T).view(2, 2, 8).repeat_interleave(2, 1)
    cos, sin = (part[0].unsqueeze(1) for part in drafter.rotary_emb(inputs, torch.tensor([[3, 4]])))
    query, keys = (part * cos + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin for part in (query, keys))
    scores = torch.einsum("qhd,khd->hqk", query, keys) / 8**0.5
    weights = scores.masked_fill(torch.ones(2, 2).triu(1).bool(), -torch.inf).softmax(-1)
    attended = torch.einsum("hqk,khd->qhd", weights, values).flatten(1) @ attention.o_proj.weight.T
    hidden = conditions + attended
    expected = norm(hidden + layer.mlp(norm(hidden, layer.post_attention_layernorm.weight)), drafter.norm.weight)
    made = drafter(tokens, conditions, torch.tensor([[3, 4]]))
    assert torch.allclose(made[:, :, 0], expected, atol=1e-5)
    normed, logits = drafter.draft_logits(made)  # which are not normed a second time
    assert torch.equal(normed, made) and torch.allclose(logits, made @ drafter.lm_head.weight.T)


def test_parameters_of_a_scope():
    drafter = random_drafter(norm_before_fc=True)
    assert [p.shape for p in drafter.parameters_of("head")] == [(24, 32)]
    assert len(drafter.parameters_of("full")) == len(list(drafter.parameters())) == 14

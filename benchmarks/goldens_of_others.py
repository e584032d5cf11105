# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Small drafters of random weights, built, saved and run by the code of the projects that lay them out, for `goldens.py`.
The projects are imported where they are needed: none of them is a dependency of this package.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel, Qwen3Config


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
FEATURES = [1, 3, 4]
"""Indices of the target's hidden states that every drafter reads."""
SAID = torch.arange(SIZES["vocab_size"])[torch.arange(SIZES["vocab_size"]) % 5 != 3][:40]
"""Target ids of a draft vocabulary."""
STEPS, BLOCK, MASK = 5, 5, 63


@dataclass(frozen=True)
class Text:
    """A text that the target has read: ids `[1, T]`, and its states `[1, T, F * d]` at `FEATURES`."""

    ids: torch.LongTensor
    features: torch.Tensor


@dataclass(frozen=True)
class Golden:
    """
    What a drafter says.

    Args:
        states (`torch.Tensor` of shape `[N, d]`): What its head reads: of EAGLE-3, all pairs and the fed-back rows.
        logits (`torch.Tensor` of shape `[N, D]`): What it makes of them, over the draft vocabulary.
        tokens (`list[int]`): Target ids that it drafts greedily behind the text.
        log_probs (`torch.Tensor` of shape `[len(tokens)]`): Of these, by the drafter.
        confidence (`torch.Tensor` of shape `[len(tokens)]`, *optional*): What DSpark's head says of them.
    """

    states: torch.Tensor
    logits: torch.Tensor
    tokens: list[int]
    log_probs: torch.Tensor
    confidence: torch.Tensor | None = None


Maker = Callable[[PreTrainedModel, Path, Text, Path], Golden]
"""Builds a drafter for a target that lies in the first folder, saves it in the second, and runs it."""


def randomise(model: nn.Module, leave: tuple[str, ...] = ()) -> None:
    """Weights that make every part count, norms included; they follow from a parameter's name and shape."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith(leave):
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                weight.normal_(0.0, 1.5 * weight.shape[1] ** -0.5, generator=generator)


def copy_tables(model: nn.Module, target: PreTrainedModel) -> None:
    """The target's embedding, and its head where the drafter has one for the whole vocabulary."""
    with torch.no_grad():
        model.embed_tokens.weight.copy_(target.get_input_embeddings().weight)


def greedy_chain(
    first: tuple[torch.Tensor, torch.Tensor],
    following: Callable[[list[int]], tuple[torch.Tensor, torch.Tensor]],
    to_target: Callable[[int], int],
) -> Golden:
    """
    Args:
        first (`tuple`): States `[n, d]` and logits `[n, D]` of the text's pairs.
        following (`Callable`): The same of the row that has read these tokens more, `[d]` and `[D]`.
        to_target (`Callable`): A row of the head to the target id that it scores.
    """
    states, logits = [first[0]], [first[1]]
    tokens: list[int] = []
    log_probs = []
    while True:
        best = logits[-1][-1].log_softmax(-1).max(-1)
        tokens.append(to_target(int(best.indices)))
        log_probs.append(best.values)
        if len(tokens) == STEPS:
            return Golden(torch.cat(states), torch.cat(logits), tokens, torch.stack(log_probs))
        state, scored = following(tokens)
        states.append(state[None])
        logits.append(scored[None])


# speculators.


def _speculators_config(kind: str, folder: Path) -> Any:
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    return SpeculatorsConfig(
        algorithm=kind,
        proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
        default_proposal_method="greedy",
        verifier=VerifierConfig.from_pretrained(str(folder)),
    )


def _finish_speculator(model: Any, restricted: bool, leave: tuple[str, ...], folder: Path) -> Any:
    """Give a model the target's tables and random weights, and save it."""
    marks = torch.isin(torch.arange(SIZES["vocab_size"]), SAID)
    if restricted:
        model.load_vocab_mappings(marks, SAID - torch.arange(len(SAID)))
    model.load_verifier_weights()
    randomise(model, leave)
    model.save_pretrained(folder)
    return model.eval()


def speculators_eagle3(layer: str, **flags: bool) -> Maker:
    """`Eagle3DraftModel` of Llama's or Qwen3's layer, with its norms."""

    def make(target: PreTrainedModel, at: Path, text: Text, folder: Path) -> Golden:
        from speculators.models.eagle3 import Eagle3SpeculatorConfig
        from speculators.models.eagle3.core import Eagle3DraftModel

        config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[layer]
        config = Eagle3SpeculatorConfig(
            transformer_layer_config=config_class(
                **SIZES, num_hidden_layers=1, pad_token_id=None, attn_implementation="eager"
            ),
            draft_vocab_size=len(SAID),
            eagle_aux_hidden_state_layer_ids=FEATURES,
            speculators_config=_speculators_config("eagle3", at),
            **flags,
        )
        model = Eagle3DraftModel(config)
        model = _finish_speculator(model, True, ("embed_tokens", "verifier_"), folder)
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        model.lm_head.register_forward_hook(lambda _, read, made: calls.append((read[0][0], made[0])))
        pairs = text.ids.shape[1] - 1

        def run(tokens: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            """Its steps; step s feeds the token behind the pair's own s places later, here a drafted one."""
            calls.clear()
            ids = torch.cat([text.ids[:, 1:], torch.tensor([tokens], dtype=torch.long)], dim=1)
            features = nn.functional.pad(text.features[:, :pairs], (0, 0, 0, len(tokens)))
            model(features, ids, torch.zeros_like(ids), ttt_steps=len(tokens) + 1)
            return calls

        def following(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            states, logits = run(tokens)[-1]
            return states[pairs - 1], logits[pairs - 1]

        return greedy_chain(run([])[0], following, lambda row: row + int(model.d2t[row]))

    return make


def speculators_block(kind: str, restricted: bool = False, **fields: Any) -> Maker:
    """`DFlashDraftModel`, `DFlash2DraftModel` and `DSparkDraftModel`, maybe with a draft vocabulary or windows."""

    def make(target: PreTrainedModel, at: Path, text: Text, folder: Path) -> Golden:
        from speculators import SpeculatorModel, SpeculatorModelConfig

        is_dspark = kind == "dspark"
        extra = {
            "dflash": {},
            "dflash2": {"conv_kernel_size": 3, "conv_group_size": 8, "selector_rank": 6, "selector_top_k": 7},
            "dspark": {"markov_rank": 6},
        }
        around = {name: fields[name] for name in ("sliding_window_non_causal", "sample_from_anchor") if name in fields}
        layer = {name: value for name, value in fields.items() if name not in around}
        config = SpeculatorModelConfig.registry[kind](
            transformer_layer_config=Qwen3Config(
                **SIZES | layer, num_hidden_layers=2, pad_token_id=None, attn_implementation="eager"
            ),
            draft_vocab_size=len(SAID) if restricted else SIZES["vocab_size"],
            block_size=BLOCK,
            aux_hidden_state_layer_ids=FEATURES,
            mask_token_id=MASK,
            speculators_config=_speculators_config(kind, at),
            **around | extra[kind],
        )
        model = SpeculatorModel.registry[kind](config)
        model = _finish_speculator(model, restricted, ("embed_tokens", "lm_head", "verifier_"), folder)
        anchor = text.ids.shape[1] - BLOCK - 1
        only = torch.zeros_like(text.ids)
        only[:, anchor] = 1
        last = text.features[..., : SIZES["hidden_size"]]  # only its loss reads it
        hidden, logits, *_ = model._backbone_forward(
            text.features, text.ids, only, last, torch.zeros_like(text.ids), max_anchors=1
        )
        skipped = int(not config.sample_from_anchor)
        hidden, logits = hidden[0, skipped:], logits[0, skipped:]

        def with_markov(before: torch.LongTensor, state: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
            return scored + model.markov_head.block_bias(prev_token_ids=before[None], hidden_states=state[None])[0, 0]

        def selected(before: torch.LongTensor, state: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
            candidates, scores = model.candidate_selector.select(scored[None], state[None], before)
            return torch.full_like(scored, -torch.inf).scatter(0, candidates[0], scores[0])

        def confidence(before: torch.LongTensor) -> torch.Tensor:
            return model.confidence_head(torch.cat([hidden, model.markov_head.prev_embeddings(before)], -1)).sigmoid()

        return block_golden(
            (hidden, logits),
            int(text.ids[0, anchor]),
            (lambda row: row + int(model.d2t[row])) if restricted else (lambda row: row),
            {"dflash": None, "dflash2": selected, "dspark": with_markov}[kind],
            confidence if is_dspark else None,
        )

    return make


def block_golden(
    block: tuple[torch.Tensor, torch.Tensor],
    anchor: int,
    to_target: Callable[[int], int],
    rescore: Callable[[torch.LongTensor, torch.Tensor, torch.Tensor], torch.Tensor] | None,
    confidence: Callable[[torch.LongTensor], torch.Tensor] | None,
) -> Golden:
    """The chain of a block's states `[N, d]` and logits `[N, D]`, which `rescore` changes behind a token."""
    states, logits = block
    tokens, log_probs = [anchor], []
    for state, scored in zip(states, logits, strict=True):
        final = scored if rescore is None else rescore(torch.tensor(tokens[-1:]), state, scored)
        best = final.log_softmax(-1).max(-1)
        tokens.append(to_target(int(best.indices)))
        log_probs.append(best.values)
    sure = None if confidence is None else confidence(torch.tensor(tokens[:-1]))
    return Golden(states, logits, tokens[1:], torch.stack(log_probs), sure)


# SpecForge.


def specforge_eagle3(**flags: bool) -> Maker:
    """`LlamaForCausalLMEagle3`."""

    def make(target: PreTrainedModel, at: Path, text: Text, folder: Path) -> Golden:
        from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3, prepare_decoder_attention_mask

        config = LlamaConfig(
            **SIZES, num_hidden_layers=1, draft_vocab_size=len(SAID), pad_token_id=None, tie_word_embeddings=False
        )
        config.update(
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [index - 1 for index in FEATURES]}} | flags
        )
        model = LlamaForCausalLMEagle3(config).eval()
        randomise(model)
        copy_tables(model, target)
        model.d2t.copy_(SAID - torch.arange(len(SAID)))
        model.t2d.copy_(torch.isin(torch.arange(SIZES["vocab_size"]), SAID))
        model.save_pretrained(folder)
        pairs = text.ids.shape[1] - 1
        positions = torch.arange(pairs)[None]
        keys: list[list[torch.Tensor]] = [[], []]
        everything = torch.ones(1, pairs, dtype=torch.bool)
        fed = model.project_hidden_states(text.features[:, :pairs])
        mask = prepare_decoder_attention_mask(everything, (1, pairs), fed, 0)

        def step(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            """Every pair's next step at once, each with the token that lies one place further."""
            nonlocal fed
            ids = torch.cat([text.ids[:, 1:], torch.tensor([tokens], dtype=torch.long)], dim=1)[:, -pairs:]
            fed = model.backbone(model.embed_input_ids(ids), fed, keys, mask, positions)
            return model.norm(fed)[0], model.compute_logits(fed)[0]

        def following(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            states, logits = step(tokens)
            return states[-1], logits[-1]

        return greedy_chain(step([]), following, lambda row: row + int(model.d2t[row]))

    return make


def specforge_block(kind: str, **fields: Any) -> Maker:
    """`DFlashDraftModel` and `DSparkDraftModel`."""

    def make(target: PreTrainedModel, at: Path, text: Text, folder: Path) -> Golden:
        from specforge.algorithms.common.dflash_family_model import create_dflash_sdpa_mask
        from specforge.modeling.draft import DFlashDraftModel, DSparkDraftModel

        is_dspark = kind == "dspark"
        block = {"mask_token_id": MASK, "target_layer_ids": [index - 1 for index in FEATURES]}
        if is_dspark:
            heads = {"markov_rank": 6, "confidence_head_alpha": 1.0, "confidence_head_with_markov": True}
            block |= heads | {"projector_type": "dspark"}
        config = Qwen3Config(
            **SIZES | fields, num_hidden_layers=2, tie_word_embeddings=False, attn_implementation="eager"
        )
        config.update({"block_size": BLOCK, "num_target_layers": 6, "dflash_config": block})
        model = (DSparkDraftModel if is_dspark else DFlashDraftModel)(config).eval()
        randomise(model)
        model.save_pretrained(folder)
        anchor = text.ids.shape[1] - BLOCK - 1
        ids = torch.tensor([[int(text.ids[0, anchor])] + [MASK] * (BLOCK - 1)])
        window = (torch.tensor([[anchor]]), torch.ones(1, 1, dtype=torch.bool), anchor, BLOCK, ids.device)
        masks = {
            "full_attention": create_dflash_sdpa_mask(*window),
            "sliding_attention": create_dflash_sdpa_mask(*window, sliding_window=config.sliding_window),
        }
        hidden = model(
            torch.arange(anchor + BLOCK)[None], masks, target.get_input_embeddings()(ids), text.features[:, :anchor]
        )[0, int(not is_dspark) :]  # the labels of its training say which row predicts what

        def with_markov(before: torch.LongTensor, state: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
            return model.markov_head.apply_step_logits(scored, token_ids=before, hidden_states=state)[0]

        return block_golden(
            (hidden, target.get_output_embeddings()(hidden)),
            int(text.ids[0, anchor]),
            lambda row: row,
            with_markov if is_dspark else None,
            (lambda before: model.predict_confidence(hidden, prev_token_ids=before).sigmoid()) if is_dspark else None,
        )

    return make


# DeepSpec.


def deepspec_eagle3() -> Maker:
    """`Qwen3Eagle3Model`, which drafts with a cache as its evaluation does."""

    def make(target: PreTrainedModel, at: Path, text: Text, folder: Path) -> Golden:
        from deepspec.modeling.eagle3.qwen3 import Qwen3Eagle3Model

        config = Qwen3Config(**SIZES, num_hidden_layers=1, tie_word_embeddings=False, attn_implementation="sdpa")
        config.update(
            {
                "architectures": ["Qwen3Eagle3Model"],
                "num_target_layers": 6,
                "target_model_name_or_path": str(at),
                "target_layer_ids": [index - 1 for index in FEATURES],
                "draft_num_hidden_layers": 1,
                "ttt_length": STEPS,
                "step_loss_decay": 0.8,
            }
        )
        model = Qwen3Eagle3Model(config).eval()
        randomise(model)
        copy_tables(model, target)
        model.save_pretrained(folder)
        pairs = text.ids.shape[1] - 1
        cache = DynamicCache()
        fed = model(text.features[:, :pairs], text.ids[:, 1:], torch.arange(pairs)[None], cache, use_cache=True)

        def following(tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
            nonlocal fed
            place = torch.tensor([[pairs + len(tokens) - 1]])
            fed = model(fed[:, -1:], torch.tensor([tokens[-1:]]), place, cache, use_cache=True)
            return model.norm(fed)[0, -1], model.compute_logits(fed)[0, -1]

        return greedy_chain((model.norm(fed)[0], model.compute_logits(fed)[0]), following, lambda row: row)

    return make

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""From prompts to a drafter that drafts, for targets with recurrent layers and multimodal ones, by the commands."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hybrids_for_tests import BATCHED, hybrid_target
from multimodal_for_tests import MULTIMODAL, multimodal_target, prompts_with_images
from training_for_tests import ALPHABET, char_tokenizer
from transformers import GenerationConfig

from specblock_hf import AutoDrafter, BlockDiffusionDrafter, Eagle3Drafter, SpecBlockDrafter, cli
from specblock_hf.data.examples import read_rows, render_prompt
from specblock_hf.regeneration import answering


TARGETS = ["qwen3_5", "lfm2", "falcon_h1", "granite4", "nemotron_h", "llava", "gemma3 with images", "qwen3.5"]
LENGTHS = (3, 4, 5, 6, 6, 7, 8, 9, 10, 12, 14, 16)
LONGEST = 12
ENDS = [ALPHABET.index(character) for character in "3h"]
GREEDY = {"do_sample": False, "eos_token_id": ENDS, "pad_token_id": 0}


def target_of(name: str):
    return multimodal_target(name) if name in MULTIMODAL else hybrid_target(name)


@pytest.fixture(scope="module", params=TARGETS)
def answered(request, tmp_path_factory):
    """A target, and a folder with it, prompts and its answers to them."""
    name = request.param
    if name == "falcon_h1" and name not in BATCHED:
        pytest.skip("this release decodes no padded batch of it")
    folder, target, rng = tmp_path_factory.mktemp("hybrid"), target_of(name), random.Random(0)
    char_tokenizer().save_pretrained(folder / "target")
    target.save_pretrained(folder / "target")
    GenerationConfig(eos_token_id=ENDS).save_pretrained(folder / "target")
    texts = ["".join(rng.choices(ALPHABET[2:26], k=length)) for length in LENGTHS]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    options = ["--target", folder / "target", "--output", folder / "answers", "--prompts", folder / "prompts.jsonl"]
    options += ["--max-new-tokens", LONGEST, "--batch-size", 5, "--dtype", "float32", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "PREFILL_TOKENS", 40)  # some batches of less than five
        assert cli.main(["regenerate", *map(str, options)]) == 0
    return name, target, folder


def test_answers_are_those_of_plain_decoding(answered):
    _, target, folder = answered
    rows, tokenizer = list(read_rows(folder / "answers")), char_tokenizer()
    assert len(rows) == len(LENGTHS) and len({len(row["answer_ids"]) for row in rows}) > 1
    for row in rows:
        ids = torch.tensor([render_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])])
        plain = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, **GREEDY)
        assert row["answer_ids"] == plain[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    ("kind", "drafter_class"),
    [("specblock", SpecBlockDrafter), ("eagle3", Eagle3Drafter), ("dflash", BlockDiffusionDrafter)],
)
def test_a_drafter_is_trained_and_drafts(answered, tmp_path, monkeypatch, capsys, kind, drafter_class):
    name, target, folder = answered
    if kind != "specblock" and name not in ("qwen3_5", "qwen3.5", "llava"):
        pytest.skip("one drafter is tried with all")
    monkeypatch.setattr(drafter_class, "plans_that_pay", ((4, 1, 0),))
    options = ["--target", folder / "target", "--data", folder / "answers", "--output", tmp_path, "--drafter", kind]
    options += ["--epochs", 2, "--batch-tokens", 60, "--learning-rate", 0.01, "--held-out", 0.3, "--log-steps", 1]
    options += ["--eval-budgets", 4, "--mixed-precision", "no", "--cpu", "--draft-vocab-size", 24]
    if kind == "specblock":
        options += ["--config", "rank_top_k=12", "rank_hidden_size=16"]
    assert cli.main(["train", *map(str, options)]) == 0, capsys.readouterr().err
    drafter = AutoDrafter.from_pretrained(tmp_path / "final", target=target).eval()
    assert isinstance(drafter, drafter_class)
    text = target.config.get_text_config()
    config = drafter.config
    assert (config.hidden_size, config.target_num_layers) == (text.hidden_size, text.num_hidden_layers)
    tau = [row[3] for row in config.acceptance]
    assert all(1 <= one <= 5 for one in tau)
    batches = [char_ids("abcdefg")]
    if name in MULTIMODAL:
        batches.append(prompts_with_images(name, (4, 4)))
    for batch in batches:
        options = GREEDY | {"eos_token_id": None, "max_new_tokens": 16}
        plain = target.generate(**batch, **options)
        assert torch.equal(target.generate(**batch, **options, assistant_model=drafter), plain)
        assert drafter.last_statistics.drafter_calls > 0


def char_ids(text: str) -> dict[str, torch.Tensor]:
    return dict(char_tokenizer()(text, return_tensors="pt", return_token_type_ids=False))

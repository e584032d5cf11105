# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model card says of a drafter, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_loading import small_drafter

from specblock_hf import AutoDrafter, SpecBlockConfig
from specblock_hf.checkpoints.card import CardFacts, model_card


RESULTS = {
    "hardware": "a test machine",
    "dtype": "float32",
    "versions": {"torch": "2.13.0"},
    "rows": [{"suite": "chat", "prompts": 12, "temperature": 0, "tau": 2.345, "speedup": 0.876}],
}


def test_a_card_says_what_it_is_told():
    drafter = small_drafter("eagle3")
    drafter.config.target_name_or_path = "org/target"
    facts = CardFacts("apache-2.0", ("en", "de"), ("org/data",), {"learning_rate": 1e-4}, RESULTS)
    card = drafter.model_card("org/name", facts)
    data = card.data.to_dict()
    assert data == {
        "library_name": "specblock_hf",
        "pipeline_tag": "text-generation",
        "base_model": "org/target",
        "base_model_relation": "adapter",
        "tags": ["speculative-decoding", "eagle3", "drafter"],
        "license": "apache-2.0",
        "datasets": ["org/data"],
        "language": ["en", "de"],
    }
    text = card.text
    parameters = sum(weight.numel() for weight in drafter.parameters())
    for part in (
        "# name\n",
        "`org/target`",
        "papers/2503.01840",
        f"| Parameters | {parameters:,} |",
        "| Draft vocabulary | 24 of 32 tokens |",
        "| Reads hidden states | 2, 2, 1 |",
        "| learning_rate | 0.0001 |",
        "Data: org/data.",
        "@article{li2025eagle3,",
    ):
        assert part in text, part
    assert "{{" not in text and "{%" not in text


@pytest.mark.parametrize("name", ["specblock-llama-3.1-8b-instruct", "specblock-qwen3-8b"])
def test_template_cards_say_that_they_are_templates(name):
    folder = Path(__file__).parents[2] / "model_cards" / name
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json"}
    card = (folder / "README.md").read_text()
    assert card == str(model_card(SpecBlockConfig.from_pretrained(folder), f"ORG/{name}", CardFacts())) + "\n"
    assert "**A template without weights.**" in card and "Nothing was measured with this drafter." in card
    with pytest.raises(OSError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        AutoDrafter.from_pretrained(folder)


@pytest.mark.parametrize(
    "lacking", ["hardware", "dtype", "versions", "rows", "suite", "tau", "speedup", "prompts", "temperature"]
)
def test_a_number_without_its_conditions_is_refused(lacking):
    results = {**RESULTS, "rows": [dict(RESULTS["rows"][0])]}
    (results["rows"][0] if lacking in results["rows"][0] else results).pop(lacking)
    with pytest.raises(
        ValueError, match=rf"^The results lack {lacking}, and a card shows no number without its condition"
    ):
        CardFacts(results=results)


@pytest.mark.parametrize("target", ["/home/somebody/models/mine", "./mine", "C:\\models\\mine", "."])
def test_a_card_shows_no_folder_of_a_machine(target):
    drafter = small_drafter("specblock")
    drafter.config.target_name_or_path = target
    card = drafter.model_card("org/name")
    assert card.data.base_model is None and "| Target | local, not on the Hub |" in card.text
    assert target == "." or target not in card.text


def test_a_card_shows_what_training_left():
    drafter = small_drafter("specblock")
    drafter.config.acceptance = [[8, 1, 0, 2.047, 2.5], [16, 2, 4, 2.5, 3.0], [60, 2, 0, 3, 3.25]]
    text = drafter.model_card("org/name", CardFacts(data="12 answers", command="specblock train --epochs 3")).text
    assert "\n12 answers.\n" in text and "\n```bash\nspecblock train --epochs 3\n```\n" in text
    rows = "| 8 | 1 | - | 2.05 | 2.50 |\n| 16 | 2 | 4 | 2.50 | 3.00 |\n| 60 | 2 | all | 3.00 | 3.25 |\n"
    assert f"| Nodes | Forwards | Starts | tau | tau with look-ups |\n|---|---|---|---|---|\n{rows}" in text
    assert "The training data is not recorded" not in text and "Nothing was measured" not in text

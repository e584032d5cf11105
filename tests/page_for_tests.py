# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
`docs/generate.md`, whose tables say what the tests of `generate()` find. Each of their files has sections of its own:
a run of it compares these with the page, or with `--write-docs` writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import unified_diff
from pathlib import Path

import pytest
from options_for_tests import DISTRIBUTION, EXACT


DOCS = Path(__file__).parents[1] / "docs" / "generate.md"
OPTIONS, IN_OUT, TARGETS = "Options", "Other ways in and out", "Targets"
Sections = dict[str, dict[str, tuple[str, str, str]]]
"""By title, what becomes of each option or target: for one prompt, for a padded batch, and the test that says so."""

NOTES = [
    "- With a continued cache the drafter's context begins with the tokens that this call reads: the",
    "  states of earlier ones are not in the cache. That may cost accepted tokens, never text. Pass the whole",
    "  conversation without a cache where acceptance matters more than the prefill.",
    "- `output_hidden_states` and `output_attentions` keep a copy for every emitted token, as plain decoding",
    "  does.",
    "- `num_assistant_tokens` and the other settings of transformers' own assistants say nothing to a tree drafter;",
    "  `drafter.drafting_plan` and `generation_config.drafting_plan` say how much it drafts.",
    "- FlexAttention reads the tree's mask as scores to add, so that no block mask is compiled for every shape of",
    "  tree. It was tried without compiling its kernel, and FlashAttention through a function that computes the",
    "  same: neither on a GPU.",
    "- During a call a `DynamicCache` is written in place, with room for up to 256 columns more than it holds;",
    "  what is handed back is an ordinary one without spare room. A round still rewrites what it shows in sliding",
    "  layers, and in a batch whose rows accept different lengths.",
    "- A row of a batch that has stopped costs neither the drafter nor the target anything; one that may emit one",
    "  more token costs the drafter nothing. Only where the cache is handed back (`return_dict_in_generate`, a",
    "  cache of one's own) the target goes on computing rows that have stopped, which stay in it.",
    "- Whatever ends a call (a streamer, criterion, processor, callback or drafter that raises, an interrupt),",
    "  a cache of one's own goes back to the last committed token: it holds the prompt and a part of what was",
    "  emitted, and whoever goes on with all that was emitted gets plain decoding's text. The rows of a batch",
    "  are at different tokens, of which nobody has been shown any, and go back to their prompts",
    "  (`tests/target/test_cache.py`).",
    "- A prompt with pictures is read in one forward, whatever `prefill_chunk_size` says. Where that changes plain",
    "  decoding's text it is refused: with Gemma, in which the tokens of a picture see each other, and with",
    "  recurrent layers and padding where `prefill_chunk_size=1` (`tests/target/test_inputs.py`).",
    "- Recurrent layers (those above, and of Zamba2, OLMo-hybrid, Kimi-Linear, the mixtures of Qwen3.5 and",
    "  LFM2) keep a state that never goes back: what was committed behind it is read again together with the",
    "  next draft, in the same forward, until all that a forward reads is kept. Where reading again has cost as",
    "  much as a forward (`tree_budget` tokens) a round goes without drafts. The windows of LFM2's convolutions",
    "  are cut like keys and values. A cache that is handed back costs up to one forward more; in a batch its",
    "  states are those after each row's last token, where plain decoding reads padding into the rows that end",
    "  early (`tests/target/test_recurrent.py`).",
    "- transformers' Mamba layers bound time steps (`time_step_limit`; Nemotron-H, Zamba2: `time_step_min`, 0.001",
    "  in released models) where they read several tokens and not where they go on by one. A drafted call reads",
    "  the prompt with bounds and the drafts without, as plain decoding reads the same tokens; a target whose",
    "  parts' `forward` accelerate has replaced is refused then. transformers decodes no padded batch of Falcon-H1",
    "  in 5.17, and wherever it reads a column of padding alone (`prefill_chunk_size=1`) that changes the states,",
    "  in which a drafted call follows it.",
    '- RoPE of the types "dynamic" and "longrope" turns all rows of a forward by the largest position in it. No',
    '  tree crosses the length at which that begins; beyond it "dynamic" is decoded without drafts. Phi-3 reads',
    "  a text again from its beginning when it crosses that length, and so does a drafted call (transformers",
    "  5.17 loses the text instead).",
    "- Quantisation that scales the activations of a whole forward together (bitsandbytes' int8, dynamic scales",
    "  per tensor) makes a token's logits depend a little on the drafts beside it: a warning says so once.",
    "- A drafter may lie on another device than its target (`tests/drafters/test_devices.py`): that nothing is",
    "  computed across devices is checked with fake tensors, and the text only where there is a GPU.",
]


@pytest.fixture(scope="module")
def ran() -> set[str]:
    """The tests of a file that this process has run, which may share them with others."""
    return set()


@pytest.fixture(autouse=True)
def note(request, ran):
    ran.add(request.node.nodeid)


def table_of(is_whole: Callable[[Sections], bool], *titles: str):
    """
    A fixture of a file's sections, filled by its tests; the page is compared with them, or written if the whole file
    ran, of which `is_whole` knows whether any row is missing.
    """

    @pytest.fixture(scope="module")
    def table(request, ran):
        sections: Sections = {title: {} for title in titles}
        failed_before = request.session.testsfailed
        yield sections
        if request.session.testsfailed > failed_before:
            return
        chosen = [item for item in request.session.items if item.path == request.path]
        whole = {item.originalname for item in chosen} >= {
            name for name in vars(request.module) if name[:5] == "test_"
        }
        whole &= is_whole(sections) and ran == {item.nodeid for item in chosen}
        if request.config.getoption("--write-docs"):
            assert whole, "--write-docs needs a run of the whole file in one process"
            DOCS.write_text(written(DOCS.read_text(), sections))
        elif differences := outdated(DOCS.read_text(), sections, whole):
            command = f"pytest {request.path.relative_to(request.config.rootpath)} --write-docs"
            pytest.fail("\n".join([f"docs/generate.md is out of date; `{command}` writes it anew:", *differences]))

    return table


def render(sections: Sections) -> str:
    return _page({title: table_rows(rows) for title, rows in sections.items()})


def written(page: str, sections: Sections) -> str:
    """A page with these of its sections as they were found."""
    lines = {}
    for part in page.split("\n## ")[1:-1]:  # the last ones are notes
        title, _, _, _, *rows = part.rstrip().splitlines()
        lines[title] = rows
    return _page(lines | {title: table_rows(rows) for title, rows in sections.items()})


def _page(tables: dict[str, list[str]]) -> str:
    lines = [
        "# What `generate(assistant_model=drafter)` accepts",
        "",
        "Written by `pytest --write-docs` of `tests/generation/test_generate_matrix.py` and of",
        "`tests/generation/test_generate_targets.py`, and checked without it: every row is compared with plain",
        "`generate()` on tiny random targets in fp32, with a drafter that knows the answer and with one that knows",
        "nothing. *exact*: the very tokens of plain decoding (sampling: under the same seed). *exact in",
        "distribution*: each token follows the target's, but a seed gives other tokens than it gives plain sampling.",
        "Anything else is the sentence of the refusal. (Distributions are enumerated in",
        "`tests/generation/test_sampled_calls.py` and `tests/generation/test_batches.py`; combinations of options",
        "are drawn in `tests/generation/test_generate_fuzz.py`.)",
    ]
    for title, rows in tables.items():
        lines += ["", f"## {title}", "", "| | one prompt | padded batch | test |", "|---|---|---|---|", *rows]
    lines += ["", "## Notes", "", *NOTES]
    return "\n".join(lines) + "\n"


def table_rows(rows: dict[str, tuple[str, str, str]]) -> list[str]:
    def line(name: str, one: str, several: str, test: str) -> str:
        same = several == one and one not in (EXACT, DISTRIBUTION)
        return f"| {name} | {one} | {'the same' if same else several} | `{test}` |"

    return [line(name, *row) for name, row in rows.items()]


def outdated(page: str, sections: Sections, whole: bool) -> list[str]:
    """How a page differs from what was found, line by line; after some of the tests, which of their rows it lacks."""
    if whole:
        return list(
            unified_diff(page.splitlines(), written(page, sections).splitlines(), "page", "tests", n=0, lineterm="")
        )
    found = [line for rows in sections.values() for line in table_rows(rows)]
    return [f"+{line}" for line in found if line not in page.splitlines()]

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Drafters of random weights as other projects save them, run by their code and by this package: states, logits, drafted
tokens and what the drafters say of these must agree.

    pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0 specforge==0.2.0
    pip install openai aiohttp loguru pydantic-settings datasets
    git clone https://github.com/deepseek-ai/DeepSpec && git -C DeepSpec checkout afdfa7c
    python benchmarks/goldens.py --deepspec DeepSpec --output benchmarks/results/goldens.json

With transformers 5.17, since speculators 0.9.0 takes none above 5.19; in an environment of its own. Without
`--deepspec` its drafters are left out. Of what the projects make, only the differences and the drafted tokens with
their log-probabilities are kept, by which the tests know the networks again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from goldens_of_others import (
    BLOCK,
    FEATURES,
    SIZES,
    STEPS,
    Golden,
    Maker,
    Text,
    deepspec_eagle3,
    randomise,
    specforge_block,
    specforge_eagle3,
    speculators_block,
    speculators_eagle3,
)
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from specblock_hf import AutoDrafter, BlockDiffusionDrafter, Eagle3Drafter
from specblock_hf.drafters.common.cache import BlockCache
from specblock_hf.drafters.layouts import layout_of
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import Limits


VERSIONS = {"speculators": "0.9.0", "specforge": "0.2.0", "deepspec": "afdfa7c"}
TOLERANCE = 1e-5
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True, "sliding_window": 6}
EAGLE_3_1 = {"fc_norm": True, "norm_output": True}


class Case(NamedTuple):
    """A drafter: whose code makes it, in which layout it is read here, and what makes it."""

    project: str
    layout: str
    make: Maker


CASES = {
    "speculators EAGLE-3, Llama": Case("speculators", "speculators", speculators_eagle3("llama")),
    "speculators EAGLE-3, norms": Case(
        "speculators", "speculators", speculators_eagle3("llama", norm_before_fc=True, norm_before_residual=True)
    ),
    "speculators EAGLE-3, Qwen3": Case(
        "speculators", "speculators", speculators_eagle3("qwen3", norm_before_residual=True)
    ),
    "speculators EAGLE-3.1": Case("speculators", "speculators", speculators_eagle3("llama", **EAGLE_3_1)),
    "speculators EAGLE-3.1, Qwen3": Case("speculators", "speculators", speculators_eagle3("qwen3", **EAGLE_3_1)),
    "speculators DFlash": Case("speculators", "speculators-dflash", speculators_block("dflash")),
    "speculators DFlash, draft vocabulary": Case(
        "speculators", "speculators-dflash", speculators_block("dflash", restricted=True)
    ),
    "speculators DFlash, windows": Case("speculators", "speculators-dflash", speculators_block("dflash", **WINDOWS)),
    "speculators DFlash, windows both ways": Case(
        "speculators", "speculators-dflash", speculators_block("dflash", sliding_window_non_causal=True, **WINDOWS)
    ),
    "speculators DFlash, from the anchor": Case(
        "speculators", "speculators-dflash", speculators_block("dflash", sample_from_anchor=True)
    ),
    "speculators DFlash 2": Case("speculators", "speculators-dflash", speculators_block("dflash2", **WINDOWS)),
    "speculators DSpark": Case("speculators", "speculators-dflash", speculators_block("dspark")),
    "speculators DSpark, draft vocabulary": Case(
        "speculators", "speculators-dflash", speculators_block("dspark", restricted=True)
    ),
    "SpecForge EAGLE-3": Case("specforge", "sglang", specforge_eagle3()),
    "SpecForge EAGLE-3, norms of features": Case("specforge", "sglang", specforge_eagle3(fc_norm=True)),
    "SpecForge DFlash": Case("specforge", "dflash", specforge_block("dflash")),
    "SpecForge DFlash, windows": Case("specforge", "dflash", specforge_block("dflash", **WINDOWS)),
    "SpecForge DSpark": Case("specforge", "specforge-dspark", specforge_block("dspark")),
    "SpecForge DSpark, windows": Case("specforge", "specforge-dspark", specforge_block("dspark", **WINDOWS)),
    "DeepSpec EAGLE-3": Case("deepspec", "deepspec", deepspec_eagle3()),
}


def make_target(folder: Path) -> PreTrainedModel:
    """A tiny target in a folder."""
    target = Qwen3ForCausalLM(Qwen3Config(**SIZES, num_hidden_layers=6, tie_word_embeddings=False)).eval()
    randomise(target)
    target.save_pretrained(folder)
    return target


def read_text(target: PreTrainedModel) -> Text:
    ids = torch.randint(0, SIZES["vocab_size"] - 1, (1, 17), generator=torch.Generator().manual_seed(3))
    states = target(ids, output_hidden_states=True).hidden_states
    return Text(ids, torch.cat([states[index] for index in FEATURES], dim=-1))


def pairs_of(target: PreTrainedModel, text: Text, last: int) -> Pairs:
    """The first `last` committed pairs."""
    features = text.features[:, :last].split(target.config.hidden_size, dim=-1)
    positions, lengths = torch.arange(last)[None], torch.tensor([last])
    return Pairs(text.ids[:, 1 : last + 1], features, positions, lengths, TokenTable.of(target))


def drafted(drafter: Any, target: PreTrainedModel, pairs: Pairs, depth: int) -> tuple[list[int], torch.Tensor]:
    """The greedy chain that a round drafts, and its log-probabilities."""
    limits = Limits(nodes=(depth,), depth=(depth,), num_forwards=depth, max_starts=1)
    tree = drafter.propose(drafter.begin(TokenTable.of(target), 1, 64), pairs, limits)
    return tree.tokens[0, 1:].tolist(), tree.log_probs[0, 1:]


def run_eagle3(drafter: Eagle3Drafter, target: PreTrainedModel, text: Text) -> Golden:
    count = text.ids.shape[1] - 1
    pairs = pairs_of(target, text, count)
    drafter.config.beam_width = 1
    tokens, log_probs = drafted(drafter, target, pairs, STEPS)
    table = drafter.own_table(TokenTable.of(target))
    cache = BlockCache(drafter.config, 1, count + STEPS, drafter.dtype, drafter.device)
    cache.seek(0, count)
    conditions = drafter.project_features(torch.cat(pairs.features, dim=-1))
    rows = [drafter(table.embed(pairs.tokens), conditions, pairs.positions, cache=cache)]
    for place, token in enumerate(tokens[:-1], start=count):
        cache.seek(place, place + 1)
        embeds = table.embed(torch.tensor([[token]]))
        rows.append(drafter(embeds, rows[-1][:, -1:, 0], torch.tensor([[place]]), cache=cache))
    states, logits = drafter.draft_logits(torch.cat(rows, dim=1)[0, :, 0])
    return Golden(states, logits, tokens, log_probs)


def run_block(drafter: BlockDiffusionDrafter, target: PreTrainedModel, text: Text) -> Golden:
    anchor, depth = text.ids.shape[1] - BLOCK - 1, drafter.config.num_predictions
    pairs = pairs_of(target, text, anchor)
    drafter.config.tree_width = 1
    tokens, log_probs = drafted(drafter, target, pairs, depth)
    state = drafter.begin(TokenTable.of(target), 1, 64)
    drafter.extend(state, pairs)
    first = text.ids[:, anchor : anchor + 1]
    block = drafter.draft_block(state, first, torch.tensor([[anchor]]), depth)
    logits = block.logits[0]
    sure = None
    if drafter.config.confidence_head:
        sure = drafter.confidence(block.hidden[0], torch.tensor([[int(first)], *([t] for t in tokens[:-1])]))[:, 0]
    return Golden(
        block.hidden[0],
        logits[:, drafter.t2d] if drafter.config.restricted_vocabulary else logits,
        tokens,
        log_probs,
        sure,
    )


def differences(theirs: Golden, ours: Golden) -> dict[str, float]:
    """The largest difference of each part, relative to 1 or the part's own size."""
    found = {}
    for name in ("states", "logits", "log_probs", "confidence"):
        one, other = getattr(theirs, name), getattr(ours, name)
        if (one is None) != (other is None) or (one is not None and one.shape != other.shape):
            found[name] = float("inf")
        elif one is not None:
            found[name] = ((one - other).abs() / one.abs().clamp_min(1)).max().item()
    return found


@torch.no_grad()
def run(case: Case, target: PreTrainedModel, text: Text, work: Path) -> dict[str, Any]:
    """Both sides of a case."""
    folder = work / "drafter"
    theirs = case.make(target, work / "target", text, folder)
    layout = layout_of(json.loads((folder / "config.json").read_text()), folder).name
    drafter = AutoDrafter.from_pretrained(folder, target=target).eval()
    ours = (run_eagle3 if isinstance(drafter, Eagle3Drafter) else run_block)(drafter, target, text)
    found = differences(theirs, ours)
    return {
        "layout": layout,
        "project": case.project,
        "version": VERSIONS[case.project],
        "largest_difference": float(f"{max(found.values()):.1e}"),
        "same_tokens": theirs.tokens == ours.tokens,
        "tokens": theirs.tokens,
        "log_probs": [round(value, 5) for value in theirs.log_probs.tolist()],
        "passed": layout == case.layout and theirs.tokens == ours.tokens and max(found.values()) <= TOLERANCE,
    }


def refuse_versions(names: Sequence[str]) -> None:
    """Say which projects are missing, or of another version."""
    for name in names:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found != VERSIONS[name]:
            raise SystemExit(f"{name} {VERSIONS[name]} is needed and {found or 'none'} is there; see --help.")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspec", type=Path, help="a checkout of DeepSpec")
    parser.add_argument("--cases", nargs="+", choices=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    names = args.cases or [name for name, case in CASES.items() if case.project != "deepspec" or args.deepspec]
    if args.deepspec:
        sys.path.insert(0, str(args.deepspec))
    refuse_versions(sorted({CASES[name].project for name in names} - {"deepspec"}))
    rows = {}
    for name in names:
        with tempfile.TemporaryDirectory() as work:
            target = make_target(Path(work) / "target")
            rows[name] = run(CASES[name], target, read_text(target), Path(work))
        print(name, rows[name])
    versions = {name: version(name) for name in ("torch", "transformers")}
    args.output.write_text(json.dumps({"versions": versions, "cases": rows}, indent=2) + "\n", encoding="utf-8")
    return int(not all(row["passed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Which trees and which rule keep most tokens when the target samples? tau of fixed and drawn trees of the same number of
nodes, verified by walk, token and block.

    python benchmarks/verification.py
    python benchmarks/verification.py --drafter FOLDER --output FILE

For every prompt the target samples a text; at every `--every`-th place of it each method drafts a tree, and the tokens
that its rule keeps of this tree are computed exactly from the target's distributions at all nodes, without a coin. All
methods thus meet the same places. Results are kept prompt by prompt; a run that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, set_seed

from specblock_hf import DraftingPlan
from specblock_hf.cli.default_target import find_default_drafter
from specblock_hf.cli.models import add_model_arguments, encode, load_models
from specblock_hf.compat import CACHE
from specblock_hf.data.suites import load_suite
from specblock_hf.devices import without_cudnn_attention
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.drafting.pairs import Pairs, TokenTable
from specblock_hf.drafting.plan import round_limits
from specblock_hf.generation.rounds.drafts import draft
from specblock_hf.trees.tree import DraftTree


sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from outcomes_for_tests import outcomes  # noqa: E402


DEFAULT_OUTPUT = Path(__file__).parent / "results" / "verification.json"
SETTINGS = ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.95})
METHODS = (
    ("topk", "walk"),
    ("sampled", "walk"),
    ("sampled", "token"),
    ("sampled", "block"),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    add_model_arguments(parser)
    parser.set_defaults(dtype="float32")
    parser.set_defaults(lookup=False)
    parser.add_argument("--budget", type=int, nargs="+", default=[12, 32], help="drafted nodes (default: 12 and 32)")
    parser.add_argument("--limit", type=int, default=15, help="prompts of each suite (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=8, help="tokens between two trees (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="JSON file (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all prompts that are not in the output yet."""
    args = parse(arguments)
    settings = {
        "target": args.target or "default",
        # A path would name the machine.
        "drafter": Path(args.drafter or find_default_drafter()).name,
        "lookup": args.lookup,
        "dtype": args.dtype,
        "budget": args.budget,
        "max_new_tokens": args.max_new_tokens,
        "every": args.every,
    }
    report = read(args.output, settings)
    # Prompt by prompt through all settings, so that an interrupted run has met them equally often.
    prompts = [
        (suite, number, text)
        for number in range(args.limit)
        for suite in ("humaneval", "mtbench")
        for text in load_suite(suite)[number : number + 1]
    ]
    done = {(row["suite"], row["number"]) for row in report["prompts"]}
    missing = [prompt for prompt in prompts if prompt[:2] not in done]
    if missing:
        target, tokenizer, drafter = load_models(args)
    for suite, number, text in tqdm(missing, desc="prompts"):
        ids = encode(tokenizer, text, target.device)
        row = {"suite": suite, "number": number, "kept": {}}
        for warpers in SETTINGS:
            set_seed(number)
            sampled = target.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=args.max_new_tokens,
                **warpers,
            )
            row["kept"][name(warpers)] = kept_along(target, drafter, sampled, ids.shape[1], warpers, args)
        report["prompts"].append(row)
        write(args.output, report)
    for setting, taus in report["summary"].items():
        print(setting)
        for method, (tau, error) in taus.items():
            print(f"  {method:<28} {tau:.3f} +- {error:.3f}")
    return 0


def name(warpers: dict[str, float]) -> str:
    return ", ".join(f"{option}={value}" for option, value in warpers.items())


@torch.no_grad()
@without_cudnn_attention
def kept_along(
    target: PreTrainedModel,
    drafter: TreeDrafter,
    ids: torch.LongTensor,
    start: int,
    warpers: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, list[float]]:
    """Expected accepted lengths of every method at the same places of one text."""
    warp = processors_of(target, warpers)
    roots = list(range(start, ids.shape[1] - 1, args.every))
    cache = DynamicCache(config=target.config)
    # The cache ends with the last root: what is later, no tree may see.
    states = target(ids[:, : roots[-1] + 1], **{CACHE: cache}, output_hidden_states=True).hidden_states
    features = tuple(states[layer] for layer in drafter.feature_layers_for(target))
    kept = {}
    for budget in args.budget:
        for sampling in dict.fromkeys(sampling for sampling, _ in METHODS):
            plan = DraftingPlan(budget, 2, max(4, budget // 4), draft_sampling=sampling)
            trees = draft_along(drafter, TokenTable.of(target), ids, features, roots, plan, warp)
            distributions = [NodeDistributions(logits, warp) for logits in score(target, cache, trees, roots)]
            for rule in (rule for other, rule in METHODS if other == sampling):
                kept[f"{budget} {sampling} {rule}"] = [
                    expected_length(tree, distribution, rule)
                    for tree, distribution in zip(trees, distributions, strict=True)
                ]
    return kept


def processors_of(target: PreTrainedModel, warpers: dict[str, float]) -> LogitsProcessorList:
    """The warpers as `generate()` makes them of its options."""
    config = target.generation_config
    options = {"do_sample": True, "top_k": 0, "num_beams": 1} | warpers
    config, _ = target._prepare_generation_config(None, **options)
    target._prepare_special_tokens(config, device=target.device)
    return target._get_logits_processor(config, input_ids_seq_length=1, logits_processor=LogitsProcessorList())


def draft_along(
    drafter: TreeDrafter,
    table: TokenTable,
    ids: torch.LongTensor,
    features: tuple[torch.Tensor, ...],
    roots: list[int],
    plan: DraftingPlan,
    warp: LogitsProcessorList,
) -> list[DraftTree]:
    """A tree below each root, from what the drafter can know there."""
    state, trees, done = drafter.begin(table, 1, ids.shape[1]), [], 0
    state.warp = lambda logits: warp(None, logits.float().flatten(0, -2)).view(logits.shape)
    limits = round_limits(plan, [ids.shape[1]])
    for root in roots:
        positions = torch.arange(done, root, device=ids.device)
        pairs = Pairs(
            tokens=ids[:, done + 1 : root + 1],
            features=tuple(feature[:, done:root] for feature in features),
            positions=positions[None],
            lengths=torch.tensor([root - done], device=ids.device),
            table=table,
        )
        trees.append(draft(drafter, state, pairs, limits))
        done = root
    return trees


def score(
    target: PreTrainedModel, cache: DynamicCache, trees: list[DraftTree], roots: list[int]
) -> list[torch.Tensor]:
    """The target's logits `[N, V]` at every node of every tree, by one forward; a tree sees the text before it."""
    width = cache.get_seq_length()
    sizes = [tree.tokens.shape[1] for tree in trees]
    mask = torch.zeros(sum(sizes), width + sum(sizes), dtype=torch.bool, device=target.device)
    first = 0
    for tree, root, size in zip(trees, roots, sizes, strict=True):
        mask[first : first + size, :root] = True
        mask[first : first + size, width + first : width + first + size] = tree.ancestors()[0]
        first += size
    logits = target(
        torch.cat([tree.tokens for tree in trees], dim=1),
        position_ids=torch.cat([tree.depths() + root for tree, root in zip(trees, roots, strict=True)], dim=1),
        attention_mask=mask[None, None],
        **{CACHE: cache},
    ).logits[0]
    cache.crop(-sum(sizes))
    return list(logits.split(sizes))


class NodeDistributions:
    """The target's distributions at the nodes of one tree, each processed once; see [`TargetDistributions`]."""

    def __init__(self, logits: torch.Tensor, warp: LogitsProcessorList):
        self._logits, self._warp = logits, warp
        self._distributions: dict[int, torch.Tensor] = {}

    def distribution(self, row: int, node: int, path: list[int]) -> torch.Tensor:
        if node not in self._distributions:
            scores = self._warp(None, self._logits[node : node + 1].float())
            self._distributions[node] = scores[0].softmax(-1, dtype=torch.float64)
        return self._distributions[node]

    def keep(self, row: int, node: int) -> None:
        pass


def expected_length(tree: DraftTree, distributions: NodeDistributions, rule: str) -> float:
    """Drafted tokens of the tree that the rule keeps on average, over its coins."""
    if rule != "walk":
        return sum(outcome.probability * (len(outcome.nodes) - 1) for outcome in outcomes(tree, distributions, rule))
    tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    reached, spelled = {(): 1.0}, {0: ()}
    for node, parent in enumerate(parents):
        if parent < 0:
            continue
        spelled[node] = (*spelled[parent], tokens[node])
        # A path drafted twice is kept once.
        reached[spelled[node]] = reached[spelled[parent]] * float(
            distributions.distribution(0, parent, [])[tokens[node]]
        )
    return sum(reached.values()) - 1


def summarise(rows: list[dict]) -> dict:
    """tau of every method with its standard error over prompts."""
    summary: dict[str, dict[str, list[float]]] = {}
    for setting in rows[0]["kept"] if rows else ():
        summary[setting] = {}
        for method in rows[0]["kept"][setting]:
            texts = [row["kept"][setting][method] for row in rows]
            means = torch.tensor([sum(text) / len(text) for text in texts], dtype=torch.float64)
            error = means.std().item() / len(means) ** 0.5 if len(means) > 1 else 0.0
            every = [kept for text in texts for kept in text]
            summary[setting][method] = [1 + sum(every) / len(every), error]
    return summary


def read(path: Path, settings: dict) -> dict:
    """The report so far.

    Raises:
        ValueError: It was made with other settings.
    """
    if not path.exists():
        return {"settings": settings, "summary": {}, "prompts": []}
    report = json.loads(path.read_text())
    if report["settings"] != settings:
        raise ValueError(f"{path} was made with other settings; remove it, or name another file with --output.")
    return report


def write(path: Path, report: dict) -> None:
    report["summary"] = {
        setting: {method: [round(value, 4) for value in pair] for method, pair in taus.items()}
        for setting, taus in summarise(report["prompts"]).items()
    }
    for row in report["prompts"]:
        row["kept"] = {
            setting: {method: [round(kept, 4) for kept in values] for method, values in methods.items()}
            for setting, methods in row["kept"].items()
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=None) + "\n")
    os.replace(partial, path)


if __name__ == "__main__":
    raise SystemExit(main())

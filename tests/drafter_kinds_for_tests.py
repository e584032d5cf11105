# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""The drafter of a random case: of every kind, sound or damaged, joined, copied, listened to."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from batches_for_tests import RowWiseDrafter
from block_drafters_for_tests import VARIANTS
from cases_for_tests import Case, Dice
from drafters_for_tests import GarbageDrafter, OracleDrafter
from hybrids_for_tests import ChainOracle
from third_parties_for_tests import ThirdPartyDrafter
from transformers import PreTrainedConfig

from specblock_hf import (
    BlockDiffusionConfig,
    BlockDiffusionDrafter,
    DraftingCallback,
    DraftingPlan,
    Eagle3Config,
    Eagle3Drafter,
    JoinedDrafter,
    LookupDrafter,
    OnlineAdaptationCallback,
    SpecBlockConfig,
    SpecBlockDrafter,
)
from specblock_hf.adaptation.updater import UpdateSettings
from specblock_hf.drafters.falcon import FalconDrafter, FalconDrafterConfig
from specblock_hf.drafters.medusa import MedusaConfig, MedusaDrafter
from specblock_hf.drafters.parallelspec import ParallelSpecConfig, ParallelSpecDrafter
from specblock_hf.drafting.drafter import TreeDrafter
from specblock_hf.generation.callbacks import JsonlTrace, StatisticsLogger, TrackerCallback


BEYOND_TEXT = [0] * 200  # so that an oracle that is asked about what nobody writes has something to say


class Trouble(RuntimeError):
    """What a part of somebody's service raises, which is no reason to lose an answer."""


class Troubled:
    """Raises whatever it is asked for."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Trouble(f"{name} of a service is out of order")

    def __call__(self) -> float:
        raise Trouble("a clock is out of order")


def make_drafter(case: Case, config: PreTrainedConfig, texts: Sequence[Sequence[int]]) -> TreeDrafter:
    """
    The drafter of a case, as the user hands it over.

    Args:
        case ([`Case`]): What was drawn.
        config ([`~transformers.PreTrainedConfig`]): The target's.
        texts (sequence of sequence of `int`): What each row of the batch will write, prompt included.
    """
    kind, plan = case.drafter, case.plan
    made = DraftingPlan(**plan.fields) if plan is not None else None
    first = _sent(_first(case, config, texts), kind.sent)
    whole = JoinedDrafter(first, LookupDrafter(config)) if kind.joined else first
    if made is not None and plan.place != "call":
        (first if plan.place == "part" else whole).drafting_plan = made
    if kind.listener:
        # Of a joined drafter it is added to the part.
        first.add_callback(_listener(kind.listener, first))
        first = _sent(first, kind.sent) if kind.sent != "saved" else first
        if not kind.joined:
            whole = first
    return whole


def _sent(drafter: TreeDrafter, how: str) -> TreeDrafter:
    """What arrives of a drafter that is copied, or sent to another process, or kept in a folder."""
    if how == "copied":
        return copy.deepcopy(drafter)
    if how == "saved":
        with tempfile.TemporaryDirectory() as folder:
            drafter.save_pretrained(folder)
            return type(drafter).from_pretrained(folder, dtype=drafter.dtype)
    return pickle.loads(pickle.dumps(drafter)) if how == "pickled" else drafter


def _first(case: Case, config: PreTrainedConfig, texts: Sequence[Sequence[int]]) -> TreeDrafter:
    kind, dice = case.drafter, Dice(case.seed)
    vocab_size, depth = config.get_text_config().vocab_size, config.get_text_config().num_hidden_layers
    layers = {
        "none": (),
        "some": tuple(dice.randint(0, depth) for _ in range(dice.randint(1, 3))),
        "unrecorded": (-1, -1, -1),
    }[kind.layers]
    if kind.name == "lookup":
        return LookupDrafter(config, dice.randint(1, 3), dice.randint(1, 8))
    if kind.name == "third party":
        return ThirdPartyDrafter(vocab_size, kind.detail, layers)
    if kind.name == "garbage":
        return RowWiseDrafter([GarbageDrafter(vocab_size, layers) for _ in texts])
    if kind.name == "oracle":
        plans = [lambda number, row=row: row[number % len(row)] for row in kind.depths]
        # Of a tree, a recurrent target follows the likeliest path only, which begins with a wrong sibling.
        made = ChainOracle if case.target.is_recurrent else OracleDrafter
        return RowWiseDrafter(
            [
                made(vocab_size, [*text, *BEYOND_TEXT], plans[row % len(plans)], feature_layers=layers)
                for row, text in enumerate(texts)
            ]
        )
    return _network(case, config, dice)


def _network(case: Case, config: PreTrainedConfig, dice: Dice) -> TreeDrafter:
    """A drafter with random weights."""
    name, vocab_size = case.drafter.name, config.get_text_config().vocab_size
    fields: dict[str, Any] = {"initializer_range": 0.3, "tree_budget": dice.choice([6, 12, 40])}
    if case.drafter.layers == "unrecorded":
        fields |= {"target_num_layers": None}
    if name in VARIANTS:
        fields |= VARIANTS[name] | {"num_hidden_layers": 2, "block_size": dice.choice([3, 5])}
        return _damaged(case, _seeded(BlockDiffusionDrafter, BlockDiffusionConfig.for_target(config, **fields)), dice)
    fields["draft_vocab_size"] = dice.choice([vocab_size, vocab_size - 8])
    network, config_class = {
        "specblock": (SpecBlockDrafter, SpecBlockConfig),
        "best first": (SpecBlockDrafter, SpecBlockConfig),
        "eagle3": (Eagle3Drafter, Eagle3Config),
        "medusa": (MedusaDrafter, MedusaConfig),
        "parallelspec": (ParallelSpecDrafter, ParallelSpecConfig),
        "falcon": (FalconDrafter, FalconDrafterConfig),
    }[name]
    if network is SpecBlockDrafter:
        fields |= {"rank_top_k": 10, "rank_hidden_size": 8, "block_size": dice.choice([1, 2, 4])}
        fields |= {"root_width": dice.choice([4, 10]), "branching": dice.choice([[2, 4, 6, 4], [2, 4, 10, 0]])}
        fields |= {"expansion": "best_first" if name == "best first" else "rank_guided"}
    drafter = _seeded(network, config_class.for_target(config, **fields))
    chosen = sorted(dice.sample(range(vocab_size), fields["draft_vocab_size"]))
    drafter.set_draft_vocabulary(torch.tensor(chosen))
    return _damaged(case, drafter, dice)


def _seeded(network: type, config: PreTrainedConfig) -> Any:
    # It may be made while the call under test is about to sample.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return network(config).eval()


def _damaged(case: Case, drafter: Any, dice: Dice) -> TreeDrafter:
    damage, weights = case.drafter.detail, list(drafter.parameters())
    spoilt = weights[dice.randrange(len(weights))]
    with torch.no_grad():
        if damage == "nan":
            spoilt.view(-1)[0] = torch.nan
        elif damage == "all nan":
            for weight in weights:
                weight.fill_(torch.nan)
        elif damage in ("inf", "huge"):
            spoilt.fill_(torch.inf if damage == "inf" else 3e38)
        elif damage.startswith("d2t") and hasattr(drafter, "d2t"):
            drafter.d2t.fill_(1_000_000 if damage == "d2t too high" else -50)
    if damage == "bfloat16":
        return drafter.to(torch.bfloat16)
    return drafter.train(damage == "train")


def _listener(name: str, drafter: TreeDrafter) -> DraftingCallback:
    if name == "log":
        return StatisticsLogger()
    if name == "tracker raises":
        return TrackerCallback(Troubled())
    if "trace" in name:
        trace = JsonlTrace(Path(tempfile.mkdtemp()) / "trace.jsonl")
        if name == "trace on a full disk":
            trace.path = Path("/dev/full")
        return trace
    settings = UpdateSettings(steps=1, drift_weight=0.0, learning_rate=1e30 if name == "adapting to nan" else 1e-3)
    more = {
        "watcher raises": {"monitor": Troubled()},
        "clock raises": {"clock": Troubled()},
        "bandit raises": {"bandit": Troubled(), "policy": "bandit"},
        "more tokens than there are": {"top_k": 10_000},
    }
    options = {"policy": "always", "every": 1, "background": False, "top_k": 8, "fresh_tokens": 0}
    return OnlineAdaptationCallback(settings=settings, **options | more.get(name, {}))

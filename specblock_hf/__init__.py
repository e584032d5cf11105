# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""SpecBlock (https://huggingface.co/papers/2605.07243) in transformers: `target.generate(assistant_model=drafter)`."""

from .compat import check_transformers


check_transformers()

from transformers import AutoConfig, AutoModel  # noqa: E402

from .adaptation import OnlineAdaptationCallback  # noqa: E402
from .calibration.calibrate import Calibration, calibrate  # noqa: E402
from .calibration.costs import CostCurves  # noqa: E402
from .drafters.auto import DRAFTERS, AutoDrafter  # noqa: E402
from .drafters.dflash.configuration import BlockDiffusionConfig  # noqa: E402
from .drafters.dflash.drafting import BlockDiffusionDrafter  # noqa: E402
from .drafters.eagle3.configuration import Eagle3Config  # noqa: E402
from .drafters.eagle3.drafting import Eagle3Drafter  # noqa: E402
from .drafters.falcon.configuration import FalconDrafterConfig  # noqa: E402
from .drafters.falcon.drafting import FalconDrafter  # noqa: E402
from .drafters.joined import JoinedDrafter  # noqa: E402
from .drafters.lookup import LookupDrafter  # noqa: E402
from .drafters.medusa.configuration import MedusaConfig  # noqa: E402
from .drafters.medusa.drafting import MedusaDrafter  # noqa: E402
from .drafters.parallelspec.configuration import ParallelSpecConfig  # noqa: E402
from .drafters.parallelspec.drafting import ParallelSpecDrafter  # noqa: E402
from .drafters.specblock.configuration import SpecBlockConfig  # noqa: E402
from .drafters.specblock.drafting import SpecBlockDrafter  # noqa: E402
from .drafting.drafter import (  # noqa: E402
    DraftingCallback,  # noqa: E402
    DraftState,
    TreeDrafter,
)
from .drafting.pairs import Pairs, TokenTable  # noqa: E402
from .drafting.plan import DraftingPlan, Limits  # noqa: E402
from .drafting.statistics import GenerationStatistics  # noqa: E402
from .generation.callbacks import JsonlTrace, StatisticsLogger, TrackerCallback  # noqa: E402
from .generation.compilation import CompiledRounds, compile_rounds  # noqa: E402
from .generation.hook import install, uninstall  # noqa: E402
from .trees.tree import DraftTree  # noqa: E402
from .trees.verification import Walk, sample_and_walk  # noqa: E402


install()
for _kind in DRAFTERS.values():
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModel.register(_kind.config_class, _kind, exist_ok=True)

__all__ = [
    "AutoDrafter",
    "BlockDiffusionConfig",
    "BlockDiffusionDrafter",
    "Calibration",
    "CompiledRounds",
    "CostCurves",
    "DraftingCallback",
    "DraftingPlan",
    "DraftState",
    "DraftTree",
    "Eagle3Config",
    "Eagle3Drafter",
    "FalconDrafter",
    "FalconDrafterConfig",
    "GenerationStatistics",
    "JoinedDrafter",
    "JsonlTrace",
    "Limits",
    "LookupDrafter",
    "MedusaConfig",
    "MedusaDrafter",
    "OnlineAdaptationCallback",
    "Pairs",
    "ParallelSpecConfig",
    "ParallelSpecDrafter",
    "SpecBlockConfig",
    "SpecBlockDrafter",
    "StatisticsLogger",
    "TokenTable",
    "TrackerCallback",
    "TreeDrafter",
    "Walk",
    "calibrate",
    "compile_rounds",
    "install",
    "sample_and_walk",
    "uninstall",
]

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""SpecBlock (https://huggingface.co/papers/2605.07243) in transformers: `target.generate(assistant_model=drafter)`."""

from .compat import check_transformers


check_transformers()

from importlib import import_module  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from .drafters.auto import AutoDrafter  # noqa: E402
from .drafters.common.registry import register_drafter  # noqa: E402
from .drafters.dflash import BlockDiffusionConfig, BlockDiffusionDrafter  # noqa: E402
from .drafters.eagle3 import Eagle3Config, Eagle3Drafter  # noqa: E402
from .drafters.joined import JoinedDrafter  # noqa: E402
from .drafters.lookup import LookupDrafter  # noqa: E402
from .drafters.specblock import SpecBlockConfig, SpecBlockDrafter  # noqa: E402
from .drafting.drafter import DraftingCallback  # noqa: E402
from .drafting.plan import DraftingPlan  # noqa: E402
from .drafting.statistics import GenerationStatistics  # noqa: E402
from .generation.hook import install, uninstall  # noqa: E402
from .old_names import find_old_name, know_old_names  # noqa: E402
from .version import __version__  # noqa: E402


if TYPE_CHECKING:
    from .adaptation.callback import OnlineAdaptationCallback
    from .calibration.calibrate import calibrate
    from .generation.compilation import compile_rounds

know_old_names()
install()

# What decoding does without is imported when somebody asks for it.
_ON_USE = {
    "OnlineAdaptationCallback": "adaptation.callback",
    "calibrate": "calibration.calibrate",
    "compile_rounds": "generation.compilation",
}

__all__ = [
    "__version__",
    "AutoDrafter",
    "BlockDiffusionConfig",
    "BlockDiffusionDrafter",
    "DraftingCallback",
    "DraftingPlan",
    "Eagle3Config",
    "Eagle3Drafter",
    "GenerationStatistics",
    "JoinedDrafter",
    "LookupDrafter",
    "OnlineAdaptationCallback",
    "SpecBlockConfig",
    "SpecBlockDrafter",
    "calibrate",
    "compile_rounds",
    "install",
    "register_drafter",
    "uninstall",
]


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(f".{_ON_USE[name]}", __name__), name)
    return find_old_name(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Where modules of release 0.1 are now. Pickles of whole models (`torch.save(drafter)`) name the modules of their
classes; with this they load, and say that they will not for ever. Goes with release 0.3.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


_PACKAGE = __package__

MOVED: dict[str, tuple[str, ...]] = {
    "auto": ("drafters.auto",),
    "callbacks": ("drafting.drafter", "generation.callbacks"),
    "compilation": ("generation.compilation",),
    "configuration_block_diffusion": ("drafters.dflash.configuration",),
    "configuration_drafter": ("drafters.common.configuration",),
    "configuration_eagle3": ("drafters.eagle3.configuration",),
    "configuration_falcon": ("drafters.falcon.configuration",),
    "configuration_medusa": ("drafters.medusa.configuration",),
    "configuration_parallelspec": ("drafters.parallelspec.configuration",),
    "configuration_specblock": ("drafters.specblock.configuration",),
    "draft_head": ("drafters.common.head",),
    "drafter": ("drafting.drafter", "drafting.plan", "drafting.pairs", "drafters.common.configuration"),
    "drafters.block_diffusion": ("drafters.dflash.drafting",),
    "drafters.block_diffusion_loss": ("drafters.dflash.loss",),
    "drafters.block_drafter": ("drafters.common.block",),
    "drafters.eagle3_loss": ("drafters.eagle3.loss",),
    "drafters.falcon_loss": ("drafters.falcon.loss",),
    "drafters.network_drafter": ("drafters.common.network",),
    "drafters.specblock_loss": ("drafters.specblock.loss",),
    "modeling_block_diffusion": ("drafters.dflash.modeling",),
    "modeling_eagle3": ("drafters.eagle3.modeling",),
    "modeling_falcon": ("drafters.falcon.modeling",),
    "modeling_medusa": ("drafters.medusa.modeling",),
    "modeling_parallelspec": ("drafters.parallelspec.modeling",),
    "modeling_specblock": ("drafters.specblock.modeling", "drafters.common.cache"),
    "path_attention": ("drafters.common.path_attention",),
    "slot_layer": ("drafters.specblock.layer", "drafters.common.cache"),
    "statistics": ("drafting.statistics",),
    "training.data": ("data.examples",),
    "training.objective": ("drafting.target_batch", "drafters.common.losses"),
    "tree": ("trees.tree",),
    "verification": ("trees.verification",),
}
"""Modules by their old name, and where their definitions are now; below the package."""


MOVED_NAMES = {
    "Calibration": "calibration.calibrate",
    "CompiledRounds": "generation.compilation",
    "CostCurves": "calibration.costs",
    "DraftState": "drafting.drafter",
    "DraftTree": "trees.tree",
    "FalconDrafter": "drafters.falcon",
    "FalconDrafterConfig": "drafters.falcon",
    "JsonlTrace": "generation.callbacks",
    "Limits": "drafting.plan",
    "MedusaConfig": "drafters.medusa",
    "MedusaDrafter": "drafters.medusa",
    "Pairs": "drafting.pairs",
    "ParallelSpecConfig": "drafters.parallelspec",
    "ParallelSpecDrafter": "drafters.parallelspec",
    "StatisticsLogger": "generation.callbacks",
    "TokenTable": "drafting.pairs",
    "TrackerCallback": "generation.callbacks",
    "TreeDrafter": "drafting.drafter",
    "Walk": "trees.verification",
    "sample_and_walk": "trees.verification",
}
"""What the package itself had, and the modules that have it."""


class OldNames(MetaPathFinder, Loader):
    """Finds a module by its old name: it looks every attribute up in the modules that it became."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == _PACKAGE and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        places = [f"{_PACKAGE}.{name}" for name in MOVED[module.__name__.partition(".")[2]]]
        warnings.warn(
            f"{module.__name__} is {' and '.join(places)} now, and its old name goes with release 0.3; save anew what "
            "was saved with it.",
            FutureWarning,
            stacklevel=2,
        )

        def find(name: str) -> Any:
            for place in map(import_module, places):
                if name in vars(place):
                    return vars(place)[name]
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        module.__getattr__ = find  # type: ignore[method-assign]


def find_old_name(name: str) -> Any:
    """
    What the package itself had by this name.

    Raises:
        AttributeError: It never had it.
    """
    if name not in MOVED_NAMES:
        raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
    place = f"{_PACKAGE}.{MOVED_NAMES[name]}"
    warnings.warn(f"import {name} from {place}; {_PACKAGE}.{name} goes with release 0.3.", FutureWarning, stacklevel=3)
    return getattr(import_module(place), name)


def know_old_names() -> None:
    """Let old names be found; calling it again does nothing."""
    if not any(type(finder).__qualname__ == OldNames.__qualname__ for finder in sys.meta_path):
        sys.meta_path.append(OldNames())

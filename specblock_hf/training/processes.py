# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What accelerate is told of a run: its processes, precision and trackers, and the module that it wraps."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from transformers import PreTrainedModel

from ..drafting.target_batch import TargetBatch
from .arguments import DrafterTrainingArguments


class ObjectiveModule(nn.Module):
    """
    A drafter whose `forward` is its objective: what accelerate wraps, so that every weight of a step is used within
    one call, whatever the drafter calls in between.

    Args:
        drafter ([`~transformers.PreTrainedModel`]): A `TreeDrafter`; its weights become `drafter.*`.
        objective (*optional*): See [`TreeDrafter.loss`].
    """

    def __init__(self, drafter: PreTrainedModel, objective: Any = None):
        super().__init__()
        self.drafter = drafter
        self.objective = objective
        self._no_split_modules = drafter._no_split_modules  # what FSDP shards one by one

    def forward(self, batch: TargetBatch, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return self.drafter.loss(batch, self.objective, progress=progress, generator=generator)


def make_accelerator(args: DrafterTrainingArguments, cpu: bool = False) -> Accelerator:
    """
    The processes, precision and trackers of a run.

    Args:
        args ([`DrafterTrainingArguments`]): For the precision and the trackers.
        cpu (`bool`, *optional*, defaults to `False`): Leave accelerators alone.

    Raises:
        ValueError: A tracker is not installed, or FSDP would have one process load the weights for all.
    """
    available = [str(tracker) for tracker in get_available_trackers()]  # members of an enumeration that are no texts
    for name in args.report_to:
        if name not in available:
            raise ValueError(f"report_to names {name!r}, which is not installed here; install it or leave it out.")
    # Before parts of the objective join, their weights have no gradient, which is an error in processes that meet.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    # While the main process measures, the others wait.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        project_dir=args.output_dir,
        kwargs_handlers=[unused, patient],
    )
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "FSDP's cpu_ram_efficient_loading leaves the target's weights zero in all processes but one, and "
            "accelerate cannot hand out a drafter's buffers with it; set fsdp_cpu_ram_efficient_loading to false, as "
            "examples/fsdp.yaml does."
        )
    if args.report_to:
        accelerator.init_trackers("specblock", config={"arguments": json.dumps(vars(args))})
    return accelerator

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""Several processes, sharded weights, trackers: what accelerate brings to the trainer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, tracking
from accelerate.commands.config import load_config_from_file
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, LoggerType
from conftest import VOCAB, tiny_target
from many_processes import ShardingAccelerator
from safetensors.torch import load_file
from test_trainer import arguments, log_of, tiny_trainer
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_for_tests import DRAFT_VOCAB, Told, example_of, tiny_drafter

from specblock_hf.drafters.common.head import DraftHead
from specblock_hf.drafters.common.registry import trainable_drafters
from specblock_hf.drafting.pairs import TokenTable
from specblock_hf.training import processes
from specblock_hf.training.batches import collate, draft_ids_of
from specblock_hf.training.processes import ObjectiveModule, make_accelerator
from specblock_hf.training.target_views import view_target
from specblock_hf.training.trainer import DrafterTrainer


ROOT = Path(__file__).parents[2]


def many_processes(folder: Path, what: str) -> None:
    script = Path(__file__).parent / "many_processes.py"
    paths = os.pathsep.join((str(script.parents[1]), os.environ.get("PYTHONPATH", "")))
    run = subprocess.run(
        [sys.executable, script, folder, what],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("what", ["command", "command-sharded"])
def test_two_processes_meet_where_one_of_them_measures(what, tmp_path):
    """`specblock train`, from the estimate before the first step to the drafter that is saved."""
    many_processes(tmp_path, what)
    rows = log_of(tmp_path / "run")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 4
    assert [row["step"] for row in rows if "tau_4" in row] == [
        step for step in steps if step % 2 == 0 or step == len(steps)
    ]
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert [row[:3] for row in config["acceptance"]] == [[2, 1, 0]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("optimizer", "rounding"), [("adamw", 1e-4), ("muon", 5e-4)])  # Muon rounds to bfloat16
def test_two_processes_train_like_one_with_twice_the_accumulation(optimizer, rounding, tmp_path):
    many_processes(tmp_path, optimizer)
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] and len(one) == 15
    assert len({row["loss"] for row in one if "loss" in row}) == 12
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"seconds_per_step", "shares"}:
            if isinstance(ours[name], float):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=2e-4), (ours["step"], name)
            else:
                assert theirs[name] == ours[name], (ours["step"], name)
    ours, theirs = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=rounding)
    before = tiny_drafter().state_dict()
    assert all((ours[name] - before[name]).abs().max() > 0.01 for name, _ in tiny_drafter().named_parameters())


def test_the_fsdp_configuration_shards_the_drafters_layers():
    config = load_config_from_file(str(ROOT / "examples" / "fsdp.yaml"))
    assert config.distributed_type == "FSDP" and config.mixed_precision == "bf16"
    fields = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    fields["fsdp_version"] = fields.pop("version")
    assert fields["cpu_ram_efficient_loading"] is False  # which accelerate's launcher takes for true otherwise
    plugin = FullyShardedDataParallelPlugin(**fields)
    module = ObjectiveModule(tiny_drafter())
    plugin.set_auto_wrap_policy(module)
    wrapped = [name for name, part in module.named_modules() if plugin.auto_wrap_policy(part, False, 0)]
    assert wrapped == ["drafter.layers.0", "drafter.layers.1"]


@pytest.fixture
def one_process():
    """A group of this process alone, for which weights are sharded as for many."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("name", trainable_drafters())
def test_sharded_layers_of_every_kind_learn_as_whole_ones(name, one_process):
    kind, form = trainable_drafters()[name]
    fields = form | ({"draft_vocab_size": DRAFT_VOCAB} if issubclass(kind, DraftHead) else {})
    torch.manual_seed(1)
    drafter = kind(kind.config_class.for_target(tiny_target("llama").config, **fields))
    target, examples = tiny_target("llama"), [example_of(tokens, 3) for tokens in Told(3, 18).tokens.tolist()]
    views, table = view_target(target, examples, drafter.feature_layers, 5), TokenTable.of(target)
    batch = collate(examples, views, table, draft_ids_of(drafter, VOCAB))

    def learned(module: ObjectiveModule) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = module(batch, 1.0, torch.Generator().manual_seed(0))["loss"]
        loss.backward()
        return loss.detach(), {name: weight.grad for name, weight in module.named_parameters()}

    module = ObjectiveModule(drafter)
    sharded = copy.deepcopy(module)
    for part in list(sharded.modules()):
        if type(part).__name__ in module._no_split_modules:
            fully_shard(part, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    (loss, gradients), (sharded_loss, sharded_gradients) = learned(module), learned(sharded)
    torch.testing.assert_close(sharded_loss, loss)
    for name, gradient in gradients.items():
        sharded_gradient = sharded_gradients[name]
        if gradient is None:
            assert sharded_gradient is None or not sharded_gradient.full_tensor().any(), name
        else:
            torch.testing.assert_close(sharded_gradient.full_tensor(), gradient)


def test_what_measures_a_sharded_drafter_gets_its_weights_alone(one_process, tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, accelerator=ShardingAccelerator(cpu=True))
    monkeypatch.delattr(DrafterTrainer, "state_dicts")  # which are the optimiser's, too
    whole, expected = trainer.whole_drafter(), tiny_drafter()
    assert whole is not trainer.drafter and type(whole) is type(expected)
    assert whole.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(whole.state_dict()[name], weight) for name, weight in expected.state_dict().items())


@pytest.mark.parametrize("loads", ["true", "false"])
def test_processes_that_would_not_load_the_target_themselves_are_refused(loads, tmp_path, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", loads)  # as the launcher does
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: sharding)
    if loads == "false":
        assert make_accelerator(arguments(tmp_path)) is sharding
        return
    with pytest.raises(ValueError, match=r"set fsdp_cpu_ram_efficient_loading to false, as examples/fsdp\.yaml does"):
        make_accelerator(arguments(tmp_path))


class ListTracker(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory, main_process_only = "list", False, True

    def __init__(self, project: str = ""):
        super().__init__()
        self.rows: list[dict] = []
        self.begun_with: list = [project]

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values: dict) -> None:
        self.begun_with.append(values)

    def log(self, values: dict, step: int | None = None) -> None:
        self.rows.append({"at": step} | values)


def test_trackers_are_told_the_numbers_of_the_log(tmp_path):
    tracker = ListTracker()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers("specblock")
    trainer = tiny_trainer(tmp_path, evaluate=lambda drafter: {"tau_8": 2.5}, eval_steps=6, accelerator=accelerator)
    trainer.train()
    rows = log_of(tmp_path)
    assert [row["at"] for row in tracker.rows] == [row["step"] for row in rows]
    for told, row in zip(tracker.rows, rows, strict=True):
        assert told.items() >= {k: v for k, v in row.items() if isinstance(v, float)}.items()
        assert all(isinstance(value, int | float) for value in told.values())
        for block, rates in enumerate(row.get("agreement", []), 1):
            assert [told[f"agreement/{block}/{slot}"] for slot in range(1, 5)] == rates
    assert sum("tau_8" in row for row in tracker.rows) == 2
    assert sum("agreement/1/1" in row for row in tracker.rows) == 6


def test_a_tracker_of_this_machine_is_named_by_its_value(tmp_path, monkeypatch):
    """accelerate lists members of an enumeration; here there is one."""
    for place in (tracking, processes):
        monkeypatch.setattr(place, "get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", ListTracker)
    args = arguments(tmp_path, report_to=["wandb"])
    (tracker,) = make_accelerator(args, cpu=True).trackers
    assert tracker.begun_with == ["specblock", {"arguments": json.dumps(vars(args))}]


def test_a_tracker_that_is_not_installed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="report_to names 'nonesuch', which is not installed here"):
        make_accelerator(arguments(tmp_path, report_to=["nonesuch"]), cpu=True)


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="a step takes at least one batch"):
        arguments(tmp_path, gradient_accumulation=0)
    with pytest.raises(ValueError, match='"no", "bf16" or "fp16"'):
        arguments(tmp_path, mixed_precision="int8")


def test_every_batch_of_a_step_is_taken_once(tmp_path):
    """By whichever process, and with the randomness of its number."""
    trainer = tiny_trainer(tmp_path, gradient_accumulation=3)
    seen, forward = [], trainer.module.forward

    def spy(batch, progress, generator):
        seen.append((batch.tokens.tolist(), generator.initial_seed()))
        return forward(batch, progress, generator)

    trainer.module.forward = spy
    trainer.step = 1
    batches = next(trainer.batches_from(1))
    trainer.train_step(batches)
    assert len(batches) == 3 == len({seed for _, seed in seen})
    assert [tokens for tokens, _ in seen] == [[trainer.examples[i].input_ids for i in batch] for batch in batches]
    assert [seed for _, seed in seen] == [trainer.seed_of(number) for number in (3, 4, 5)]
    assert json.dumps(trainer.args.__dict__)  # what a tracker is told at the start

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Everything that is worth measuring and training on one GPU, step by step, in the shape of single commands:

    tests       the tests as they are, those of `generate()` on the GPU, and the identity of real answers
    check       benchmarks/check_rounds.py: captured rounds of an 8B target, step by step and as a whole
    cost        benchmarks/draft_cost.py: targets of 8B, every drafter, forced accepted lengths
    regenerate  the default target's answers to the training prompts
    train       a drafter of each kind on them
    bench       `specblock bench` with all of these

    python benchmarks/gpu.py --output DIR --prompts train.jsonl --gsm8k test.jsonl
    python benchmarks/gpu.py --output DIR --only check cost --seconds 115
    python benchmarks/gpu.py --output DIR --only train --kinds specblock --data answers/ --train-seconds 360
    python benchmarks/gpu.py --output DIR --tiny --device cpu

With --train-seconds a run trains at the rate of the machine. Its newest weights are put into DIR once a minute, from
which another run goes on with `--init-from DIR/train-specblock.json`.

DIR/STEP.json says what each command of a step did; commands that are done are not run again, and one that was killed
or ran out of its time goes on with the next call. Small results are put beside it, large files stay in `--work`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from counting import counting_target
from draft_cost import describe_machine, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specblock_hf import SpecBlockConfig, SpecBlockDrafter


ROOT = Path(__file__).parents[1]
WATCH_SECONDS = 60  # between looks at a command that is running
PART_BYTES = 15 * 2**20  # of a file in DIR, so that it can be taken anywhere
TAIL = 15  # lines of a failed command's output that are kept
TARGETS = ("llama-3.1-8b", "qwen3-8b")

DRAFTERS = ("specblock", "eagle3", "medusa", "parallelspec", "falcon", "dflash")
OBJECTIVES = {"specblock": ["--objective", "num_blocks=2", "starts_share=0.4"]}
"""What was best for a small target on little text; see docs/training.md."""


@dataclass(frozen=True)
class Task:
    """
    One command of a step.

    Args:
        name (`str`): In the step's report.
        command (`list[str]`): Arguments of the Python interpreter.
        collect (`Callable`):
            Gets what the command printed, leaves files in DIR and returns what the report shall say, also of a command
            that failed or ran out of time.
        watch (`Callable`): Called every minute while the command runs.
    """

    name: str
    command: list[str]
    collect: Callable[[str], Any] = lambda output: None
    watch: Callable[[], Any] = lambda: None


class Runner:
    """
    Runs the tasks of a step within its time and remembers them.

    Args:
        step (`str`): Its name.
        output (`Path`): DIR.
        work (`Path`): For logs.
        device (`str`): Noted in the report.
        seconds (`float`): For all commands of the step together.
    """

    def __init__(self, step: str, output: Path, work: Path, device: str, seconds: float):
        self.step, self.path, self.logs = step, output / f"{step}.json", work / "logs"
        self.end = time.monotonic() + seconds
        self.report: dict[str, Any] = {"step": step, "tasks": {}}
        if self.path.exists():
            self.report = json.loads(self.path.read_text())
        self.report["machine"] = describe_machine(torch.device(device))

    def run(self, tasks: Sequence[Task]) -> bool:
        """Run what is not done yet; whether everything is done now."""
        for task in tasks:
            if self.report["tasks"].get(task.name, {}).get("status") == "done":
                print(f"{self.step}: {task.name} is done already", flush=True)
                continue
            row = self._run(task)
            self.report["tasks"][task.name] = row
            write(self.path, self.report)
            print(f"{self.step}: {task.name} {row['status']} after {row['seconds']:.0f} s", flush=True)
        return all(self.report["tasks"][task.name]["status"] == "done" for task in tasks)

    def _run(self, task: Task) -> dict[str, Any]:
        started = time.monotonic()
        # Without the folder of this checkout, which nobody else has.
        command = [part.replace(f"{ROOT}{os.sep}", "") for part in task.command]
        row: dict[str, Any] = {"status": "out of time", "seconds": 0.0, "command": command}
        if started >= self.end:
            return row
        self.logs.mkdir(parents=True, exist_ok=True)
        name = re.sub("[^a-z0-9]+", "-", task.name.lower())
        logs = [self.logs / f"{self.step}-{name}.{stream}" for stream in ("out", "err")]
        with logs[0].open("w") as out, logs[1].open("w") as err:
            process = subprocess.Popen([sys.executable, *task.command], stdout=out, stderr=err, cwd=ROOT)
            status = self._wait(process, task.watch)
        output, errors = (log.read_text(errors="replace") for log in logs)
        row["seconds"] = time.monotonic() - started
        if status is not None:
            row |= {"status": "failed" if status else "done", "exit": status}
        if status != 0:
            row["tail"] = (output + errors).splitlines()[-TAIL:]
        return row | {"result": task.collect(output)}

    def _wait(self, process: subprocess.Popen, watch: Callable[[], Any]) -> int | None:
        """The exit status, or `None` if the step's time ended first."""
        try:
            while (left := self.end - time.monotonic()) > WATCH_SECONDS:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(WATCH_SECONDS)
                watch()
            return process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return None
        except BaseException:
            process.kill()
            process.wait()
            raise


def tests(args: argparse.Namespace) -> list[Task]:
    """`generate()` on the device in both dtypes and with three attentions, real answers, and the whole suite."""

    def summary(output: str) -> dict[str, Any]:
        lines = output.splitlines()
        failures = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return {"summary": lines[-1] if lines else "", "failures": failures[:50]}

    def identity(output: str) -> Any:
        path = args.output / "identity.json"
        return json.loads(path.read_text())["summary"] if path.exists() else {}

    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    limits = ["1", "--max-new-tokens", "8", "--plan", "8", "2", "4"] if args.tiny else ["10"]
    answers = ["benchmarks/identity.py", "--device", args.device, "--output", str(args.output / "identity.json")]
    answers += ["--limit", *limits, *args.models, *(["--drafter", str(args.drafter)] if args.drafter else [])]
    workers = ["-n", "8"] if find_spec("xdist") else []
    whole = ["tests/trees/test_tree.py"] if args.tiny else [*workers, "tests", "-m", "not real"]
    return [
        Task("generate() on the device", [*pytest, "tests/generation/test_generation_devices.py"], summary),
        Task("identity", answers, identity),
        Task("suite", [*pytest, *whole], summary),
    ]


def check(args: argparse.Namespace) -> list[Task]:
    """Captured rounds, in one short command."""
    small = ["--tiny", "--context", "32", "--dtype", "float32", "--repeats", "1", "--rounds", "4"] if args.tiny else []
    small += ["--seconds", f"{min(args.seconds, 150):g}"]
    common = ["--device", args.device, "--output", str(args.output / "check_rounds.json"), *small]
    return [Task("captured rounds", ["benchmarks/check_rounds.py", *common], str.splitlines)]


def cost(args: argparse.Namespace) -> list[Task]:
    """A command for each target and context, and one for several prompts at once."""
    contexts = (32,) if args.tiny else (512, 4096)
    small = ["--tiny", "--dtype", "float32", "--repeats", "1", "--rounds", "1"] if args.tiny else []
    small += ["--drafter", "eagle3", "specblock"] if args.tiny else []
    common = ["--device", args.device, "--output", str(args.output / "draft_cost.json"), *small]
    units = [*product(TARGETS, contexts, (1,)), (TARGETS[0], contexts[0], 8)]
    tasks = []
    for target, context, batch in units:
        unit = ["--target", target, "--context", str(context), "--batch", str(batch)]
        name = f"{target}, context {context}, batch {batch}"
        tasks.append(Task(name, ["benchmarks/draft_cost.py", *unit, *common], str.splitlines))
    return tasks


def regenerate(args: argparse.Namespace) -> list[Task]:
    """Greedy and sampled answers, in one resumable command."""

    def collect(output: str) -> dict[str, int]:
        return pack_answers(args.work / "answers", args.output)

    options = ["--answers", f"{args.answers}", "--temperature", "1", "--greedy-share", "1"]
    options += ["--device", args.device, "--output", str(args.work / "answers"), *args.models]
    sizes = ["--batch-size", "512", "--batch-tokens", "327680"]
    if args.tiny:
        sizes = ["--max-new-tokens", "12", "--limit", "40", "--dtype", "float32"]
    prompts = ["--prompts", *map(str, args.prompts)]
    return [Task("answers", ["-m", "specblock_hf", "regenerate", *prompts, *options, *sizes], collect)]


def train(args: argparse.Namespace) -> list[Task]:
    """A command for each drafter, all on the same answers for as many epochs or seconds."""
    sizes = ["--batch-tokens", "16384", "--learning-rate", "1e-3", "--epochs", f"{args.epochs}"]
    sizes += ["--save-steps", "50" if args.train_seconds else "200", "--eval-steps", "400"]
    if args.tiny:
        sizes = ["--batch-tokens", "256", "--learning-rate", "1e-3", "--epochs", "1"]
        sizes += [] if args.init_from else ["--draft-vocab-size", "64"]
        sizes += ["--eval-examples", "2", "--held-out", "0.2", "--mixed-precision", "no", "--save-steps", "2"]
    if args.train_seconds:
        sizes += ["--max-seconds", f"{args.train_seconds}", "--eval-steps", f"{10**9}"]
    if args.init_from:
        sizes += ["--init-from", str(unpack_drafter(args.init_from, args.work / "start"))]
    sizes += ["--cpu"] if args.device == "cpu" else []
    tasks = []
    for name in args.kinds:
        folder = args.work / f"train-{name}"
        command = ["-m", "specblock_hf", "train", "--data", str(args.data), "--drafter", name, *args.models]
        command += ["--output", str(folder), *sizes, *OBJECTIVES.get(name, [])]
        pack = partial(pack_drafter, folder, args.output)
        tasks.append(Task(name, command, lambda output, pack=pack: pack(), pack))
    return tasks


def bench(args: argparse.Namespace) -> list[Task]:
    """The default drafter in batches; then it, all that were trained and transformers' own helpers side by side."""

    def collect(output: str) -> list[str]:
        made = [path for path in (args.work / "bench").glob("results.*") if path.suffix in (".json", ".md")]
        for path in made:
            shutil.copy(path, args.output / f"bench-{path.name}")
        return [line for path in made if path.suffix == ".md" for line in path.read_text().splitlines()]

    trained = {f"{name}-trained": args.work / f"train-{name}" / "final" for name in args.kinds}
    trained = {name: folder for name, folder in trained.items() if (folder / "config.json").exists()}
    methods = ["vanilla", "prompt_lookup", "lookup", *([] if args.tiny else ["specblock", "specblock+lookup"])]
    command = ["-m", "specblock_hf", "bench", "--methods", ",".join([*methods, *trained]), *args.models]
    for name, folder in trained.items():
        command += ["--drafter", f"{name}={folder}"]
    asked = ["--limit", "6", "--repeats", "1", "--dtype", "bfloat16"]
    asked += ["--suite", "humaneval,mtbench" + (",gsm8k" if args.gsm8k else "")]
    asked += ["--gsm8k", str(args.gsm8k)] if args.gsm8k else []
    if args.tiny:
        asked = ["--prompts", str(args.prompts[0]), "--limit", "1", "--repeats", "1", "--max-new-tokens", "8"]
    asked += ["--temperature", "0", "1", "--no-plots", "--device", args.device]
    batches = ["benchmarks/batches.py", "--sizes", "1", "8", "--device", args.device, "--limit", "16", *args.models]
    batches += ["--output", str(args.output / "bench-batches.json")]
    batches += ["--drafter", str(args.drafter)] if args.drafter else []
    if args.tiny:
        batches += ["--prompts", str(args.prompts[0]), "--limit", "8", "--max-new-tokens", "8", "--repeats", "1"]
    else:
        batches += ["--dtype", "bfloat16"]
    return [
        Task("batches of 1 and 8", batches, str.splitlines),
        Task("side by side", [*command, *asked, "--output", str(args.work / "bench")], collect),
    ]


STEPS: dict[str, Callable[[argparse.Namespace], list[Task]]] = {
    "tests": tests,
    "check": check,
    "cost": cost,
    "regenerate": regenerate,
    "train": train,
    "bench": bench,
}


def pack_answers(folder: Path, output: Path) -> dict[str, int]:
    """Put all answers into compressed files of 10,000 rows; how many there are, and how many tokens."""
    rows = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]
    for number, first in enumerate(range(0, len(rows), 10000)):
        with gzip.open(output / f"answers-{number}.jsonl.gz", "wt") as file:
            file.writelines(row + "\n" for row in rows[first : first + 10000])
    parsed = [json.loads(row) for row in rows]
    return {
        "answers": len(parsed),
        "greedy": sum(row["temperature"] == 0 for row in parsed),
        "tokens": sum(len(row["answer_ids"]) for row in parsed),
    }


def pack_drafter(folder: Path, output: Path) -> dict[str, Any]:
    """
    Put a drafter in training beside the report: its configuration, its log, and its newest weights in parts, which
    NAME.json lists once they are all there. A kill at any moment leaves the parts that the list names.

    Returns:
        `dict`: What NAME.json says: the parts, the last figures of the log and the tau of every plan.
    """
    name = folder.name
    checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    saved = [*checkpoints, *folder.glob("final")]
    if not saved:
        return {}
    config = json.loads((saved[-1] / "config.json").read_text())
    shutil.copy(saved[-1] / "config.json", output / f"{name}.config.json")
    shutil.copy(folder / "log.jsonl", output / f"{name}.log.jsonl")
    parts = []
    with (saved[-1] / "model.safetensors").open("rb") as weights:
        for number, part in enumerate(iter(lambda: weights.read(PART_BYTES), b"")):
            parts.append(f"{name}.{saved[-1].name}.safetensors.{number:02d}")
            (output / parts[-1]).write_bytes(part)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [row for row in log if "learning_rate" in row]
    measured = [row for row in log if any(key.startswith("tau_") for key in row)]
    packed = {
        "parts": parts,
        "last_step": steps[-1:],
        "held_out": measured[-1:],
        "acceptance": config.get("acceptance"),
    }
    write(output / f"{name}.json", packed)
    for old in output.glob(f"{name}.*.safetensors.*"):
        if old.name not in parts:
            old.unlink()
    return packed


def unpack_drafter(source: Path, folder: Path) -> Path:
    """A drafter's folder: `source` itself, or made of the parts that a NAME.json lists."""
    if source.is_dir():
        return source
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source.with_suffix(".config.json"), folder / "config.json")
    with (folder / "model.safetensors").open("wb") as weights:
        for part in json.loads(source.read_text())["parts"]:
            weights.write((source.parent / part).read_bytes())
    return folder


def make_tiny(folder: Path) -> None:
    """A tiny counting target with a tokenizer of single characters, a drafter for it, and prompts."""
    if (folder / "prompts.jsonl").exists():
        return
    target = counting_target("llama-3.1-8b", True, torch.device("cpu"), torch.float32, "sdpa")
    target.save_pretrained(folder / "target")
    size = target.config.vocab_size
    tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(size)}, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '!' }}{% endif %}"
    )
    end = chr(31 + size)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=" ", eos_token=end, pad_token=end, chat_template=template
    ).save_pretrained(folder / "target")
    drafter = SpecBlockDrafter(SpecBlockConfig.for_target(target.config))
    drafter.set_draft_vocabulary(torch.arange(size))
    drafter.save_pretrained(folder / "drafter")
    rows = [json.dumps({"prompt": f"{number:b} and {number * number}"}) + "\n" for number in range(60)]
    (folder / "prompts.jsonl").write_text("".join(rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="reports and small files; a run there goes on")
    add("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP", help="default: all, in order")
    add("--work", type=Path, default=ROOT / "runs" / "gpu", help="answers, checkpoints, logs (default: runs/gpu)")
    add("--device", default="cuda", help="default: %(default)s")
    add("--seconds", type=float, default=500, help="that a step may take (default: %(default)s)")
    add("--prompts", type=Path, nargs="+", default=[], help="JSON lines, for regenerate")
    add("--answers", type=int, default=2, help="to every prompt, one of them greedy (default: %(default)s)")
    add(
        "--data",
        type=Path,
        help="answers for train (default: those of regenerate, which runs first if there are none)",
    )
    add("--kinds", nargs="+", choices=DRAFTERS, default=DRAFTERS, help="of drafters to train (default: all)")
    add("--epochs", type=float, default=3, help="of train (default: %(default)s)")
    add("--train-seconds", type=float, default=0, help="of each training, instead of epochs")
    add("--init-from", type=Path, help="drafter that train goes on from: a folder, or NAME.json of an earlier run")
    add("--gsm8k", type=Path, help="JSON lines of GSM8K's test questions, for bench")
    add("--tiny", action="store_true", help="tiny models and few prompts, to try all steps anywhere")
    args = parser.parse_args(arguments)
    for name in ("output", "work", "data", "gsm8k", "init_from"):
        path = vars(args)[name]
        setattr(args, name, path and path.resolve())
    args.prompts, args.models, args.drafter = [path.resolve() for path in args.prompts], [], None
    if args.data and not args.data.exists():
        parser.error(f"{args.data} is not there; name the answers that train shall read.")
    args.data = args.data or args.work / "answers"
    if "train" in args.only and not args.data.exists():
        args.only = ["regenerate", *args.only]
    if "regenerate" in args.only and not args.prompts and not args.tiny:
        parser.error("regenerate needs prompts to answer; name files with --prompts.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; give --device cpu --tiny to try the steps without one.")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; 1 if something of them is not done."""
    args = parse(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.tiny:
        folder = args.work / "tiny"
        make_tiny(folder)
        args.models, args.drafter = ["--target", str(folder / "target")], folder / "drafter"
        args.prompts = [folder / "prompts.jsonl"]
    done = [
        Runner(step, args.output, args.work, args.device, args.seconds).run(STEPS[step](args))
        for step in STEPS
        if step in args.only
    ]
    return int(not all(done))


if __name__ == "__main__":
    raise SystemExit(main())

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""
Peak memory of one `generate()` call with a long context: plain, and with the drafter. Each runs in a process of its
own, whose high-water mark of resident memory is reset when the models are loaded (Linux only).

    python benchmarks/memory.py
    python benchmarks/memory.py --context 4096 --chunk 512
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import set_seed

from specblock_hf import SpecBlockDrafter
from specblock_hf.cli.default_target import DEFAULT_TARGET, find_default_drafter, load_default_target


SIDES = ("plain", "drafted")
MEGABYTE = 1e6


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, conflict_handler="resolve"
    )
    parser.add_argument("--context", type=int, default=4096, help="tokens of prompt and answer (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="of these, tokens of the answer (default: %(default)s)")
    parser.add_argument("--chunk", type=int, help="prefill_chunk_size (default: the whole prompt at once)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    output = Path(__file__).parent / "results" / "memory.json"
    parser.add_argument("--output", type=Path, default=output, help="JSON file, added to (default: %(default)s)")
    return parser.parse_args(arguments)


def resident(field: str) -> int:
    """Bytes of this process by a field of its status: `VmRSS` now, `VmHWM` at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one call and say what it took beyond the loaded models, in megabytes."""
    torch.set_num_threads(args.threads)
    target, _ = load_default_target(dtype=getattr(torch, args.dtype), progress=False)
    drafter = None
    if side == "drafted":
        drafter = SpecBlockDrafter.from_pretrained(find_default_drafter(), dtype=target.dtype).eval()
    set_seed(0)
    ids = torch.randint(target.config.vocab_size, (1, args.context - args.new))
    options = {"do_sample": False, "min_new_tokens": args.new, "max_new_tokens": args.new, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids), "assistant_model": drafter, "prefill_chunk_size": args.chunk}
    target.generate(ids[:, :8], **options | {"attention_mask": torch.ones(1, 8), "prefill_chunk_size": None})
    loaded = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    output = target.generate(ids, **options)
    peak = resident("VmHWM")
    result = {"loaded_mb": round(loaded / MEGABYTE), "call_mb": round((peak - loaded) / MEGABYTE)}
    result["answer"] = output[0, -args.new :].tolist()
    if drafter is not None:
        statistics = drafter.last_statistics
        result |= {"tau": round(statistics.tau, 2), "nodes_a_round": statistics.nodes_verified / statistics.rounds}
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    # Spawned, so that no process inherits what another one had allocated.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        sides = {side: pool.apply(measure, (side, args)) for side in SIDES}
    answers = [side.pop("answer") for side in sides.values()]
    result = {
        "target": DEFAULT_TARGET,
        "context": args.context,
        "new_tokens": args.new,
        "prefill_chunk_size": args.chunk,
        "dtype": args.dtype,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "same_answer": answers[0] == answers[1],
        **sides,
    }
    before = json.loads(args.output.read_text()) if args.output.exists() else []
    same = ("context", "new_tokens", "prefill_chunk_size", "dtype")
    kept = [old for old in before if any(old[name] != result[name] for name in same)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps([*kept, result], indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

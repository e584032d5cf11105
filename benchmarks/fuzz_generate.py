# Copyright 2026 The specblock_hf authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Compare random calls of `generate()` with plain decoding, on tiny targets in fp32, and write down how many there were.

    python benchmarks/fuzz_generate.py --examples 5000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings


SAVED_EVERY = 100  # calls, so that a run that was cut short has something to say
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cases_for_tests import cases, check  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000, help="calls to compare")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz_generate.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    mismatches: list[str] = []
    drafted = 0

    @seed(arguments.seed)
    @settings(
        max_examples=arguments.examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases())
    def compare(case: dict) -> None:
        nonlocal drafted
        counts.update(["calls", case["kind"], case["attention"], case["drafter"], f"{len(case['lengths'])} rows"])
        counts.update(list(case["options"]))
        try:
            drafted += check(case)
        except AssertionError as error:
            mismatches.append(f"{case}: {error}")
        if counts["calls"] % SAVED_EVERY == 0:
            save()

    def save() -> None:
        result = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "seed": arguments.seed,
            "mismatches": len(mismatches),
            "drafted_tokens_kept": drafted,
            "seconds": round(time.perf_counter() - start),
            "counts": dict(sorted(counts.items())),
            "first_mismatches": mismatches[:10],
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")

    start = time.perf_counter()
    compare()
    save()
    print(f"{counts['calls']} calls, {len(mismatches)} mismatches, written to {arguments.output}")


if __name__ == "__main__":
    main()

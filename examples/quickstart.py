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
"""The least there is to it: a stock model, a drafter, one argument. The text is the same as without the drafter."""

from pathlib import Path

from specblock_hf import SpecBlockDrafter
from specblock_hf.cli.default_target import load_default_target


DRAFTER = Path(__file__).parents[1] / "model_cards" / "specblock-smollm2-135m-instruct"

target, tokenizer = load_default_target()  # or AutoModelForCausalLM.from_pretrained(...)
drafter = SpecBlockDrafter.from_pretrained(DRAFTER, dtype="auto")

inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Write a Python function that reverses the words of a sentence."}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
output = target.generate(**inputs, assistant_model=drafter, max_new_tokens=128, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print()
print(drafter.last_statistics.summary())

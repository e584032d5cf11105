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
"""Which releases of transformers are taken, and that nothing of ours uses what they have deprecated."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import specblock_hf
from specblock_hf.compat import check_transformers


def test_transformers_out_of_range_is_refused_or_warned_about():
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer .* 5\.16\.2 is installed"):
        check_transformers("5.16.2")
    with pytest.warns(UserWarning, match=r"5\.25\.0\.dev0 is installed"):
        check_transformers("5.25.0.dev0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for version in ("5.17.0", "5.20.1", "5.24.4"):
            check_transformers(version)


def test_an_old_release_is_refused_before_anything_is_imported_from_it(tmp_path):
    """A transformers with a version and nothing else, as an old one lacks what the package imports."""
    old = tmp_path / "transformers"
    old.mkdir()
    (old / "__init__.py").write_text('__version__ = "4.57.1"\n')
    ours = Path(specblock_hf.__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", "import specblock_hf"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ours)))},
        capture_output=True,
        text=True,
    )
    assert found.stderr.splitlines()[-1] == (
        "ImportError: specblock_hf needs transformers 5.17 or newer because it relies on that release's caches, and "
        "4.57.1 is installed; run pip install -U transformers."
    )

# Copyright 2026 The specblock_hf authors.
# SPDX-License-Identifier: Apache-2.0
"""What is installed needs no checkout: both wheels in a folder of their own, used from an empty one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from specblock_hf import __version__


ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the packages as pip installs them; what they need is this environment's."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "specblock_command.py"):
        shutil.copy(ROOT / name, source)
    for name in ("specblock_hf", "model_cards"):  # a build leaves its traces where it is made
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        )
    options = ("install", "--no-deps", "--no-build-isolation", "--target", site)
    subprocess.run([*PIP, *options, source, source / "model_cards"], check=True, timeout=300)
    return site


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def test_the_version_is_the_metadata_s(site, tmp_path):
    (found,) = Distribution.discover(name="specblock_hf", path=[str(site)])
    assert found.version == __version__
    assert "Paper, https://arxiv.org/abs/2605.07243" in found.metadata.get_all("Project-URL")
    done = run(site, tmp_path, str(site / "bin" / "specblock"), "--version")
    assert done.stdout == f"specblock_hf {found.version}\n", done.stderr


@pytest.mark.real
def test_the_demo_needs_no_checkout(site, tmp_path):
    options = ("demo", "--prompts", "Count from one to five.", "--max-new-tokens", "12", "--plan", "8", "1", "4")
    done = run(site, tmp_path, str(site / "bin" / "specblock"), *options)
    assert done.returncode == 0 and "\nidentical: True\n" in done.stdout, done.stderr
    assert float(re.search(r"^tau: ([\d.]+)", done.stdout, re.MULTILINE)[1]) > 1
    assert list(tmp_path.iterdir()) == []

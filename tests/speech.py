"""The real WhisperX for tests: a light environment that `uv` provisions once, a small test model, and a voice.

Also a command that prints the environment's python, for running the app or a script with it:

    JNANA_WHISPERX_PYTHON=$(python -m tests.speech) JNANA_WHISPERX_MODEL=tests/fixtures/whisper_standin python app.py
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest


STAND_IN_MODEL = Path(__file__).parent / "fixtures" / "whisper_standin"
ENVIRONMENT_SCRIPT = Path(__file__).parent / "whisperx_light" / "environment.py"
# an empty cache takes 30 s on two cores if the packages are on a near server
PROVISIONING_SECONDS = 300


def whisperx_python() -> str:
    """
    The python of an environment with the real WhisperX; the first call provisions it, which takes about 30 s.

    Returns:
        `str`: path of the interpreter; that named by `JNANA_WHISPERX_PYTHON` if it is set.

    Raises:
        RuntimeError: if it can't be provisioned; the message gives the reason.
    """
    if python := os.environ.get("JNANA_WHISPERX_PYTHON"):
        return python
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise RuntimeError("uv is not installed")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment.setdefault("UV_FIND_LINKS", _find_links_of_pip())  # wheels on disk, if pip is configured to use some
    deadline = time.monotonic() + PROVISIONING_SECONDS
    output = ""
    for command in (["sync", "--script"], ["python", "find", "--script"]):
        try:
            done = subprocess.run(
                [uv, *command, str(ENVIRONMENT_SCRIPT)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=max(deadline - time.monotonic(), 1.0),
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not provisioned in {PROVISIONING_SECONDS} s") from None
        if done.returncode:
            raise RuntimeError(f"uv {' '.join(command)}: {done.stderr[-1500:]}")
        output = done.stdout.strip()
    return output


def _find_links_of_pip() -> str:
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    found = os.environ.get("PIP_FIND_LINKS") or subprocess.run(command, capture_output=True, text=True).stdout
    return ",".join(found.split())


def whisperx_python_or_skip() -> str:
    """As [`whisperx_python`]; skips the test that needs it, with the reason, where it can't be had."""
    try:
        return whisperx_python()
    except RuntimeError as error:
        pytest.skip(f"no environment with WhisperX: {error}")


def speak(text: str, path: Path, voice: str = "en-us") -> Path:
    """Let espeak-ng say `text` into a WAV file; skips the test where it is not installed."""
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed: bash .ci/system_packages.sh")
    subprocess.run(["espeak-ng", "-v", voice, "-w", str(path), text], check=True)
    return path


if __name__ == "__main__":
    print(whisperx_python())

"""A tiny checkpoint that memorised a few images of the chess demo, and the app that serves it."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from jnana import run_sft
from tests.scripts.conftest import align_options, data, one_thread, pretrained, vision  # noqa: F401  (fixtures)
from tests.speech import STAND_IN_MODEL, whisperx_python


ROOT = Path(__file__).parents[2]
PICTURES = 3
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def chess(tmp_path_factory) -> Path:
    """Images of the demo's test set, made by its script, and `chats.json` with two questions for each."""
    folder = tmp_path_factory.mktemp("chess")
    sizes = {"documents": 1, "single_images": 1, "train_images": 1, "validation_questions": 9}
    sizes |= {"test_questions": 90, "unseen_questions": 9, "test_seed": 1000}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    script = ROOT / "examples" / "chess_demo" / "make_data.py"
    subprocess.run([sys.executable, str(script), "--output_dir", str(folder), *options], check=True)
    asked: dict[str, dict[str, list[dict]]] = {}
    for record in json.loads((folder / "instruct_test.json").read_text()):
        asked.setdefault(record["image"], {})[record["category"]] = record["conversations"]
    chats, answers = [], set()
    for image, by_kind in asked.items():
        if not {"count", "top"} <= by_kind.keys():
            continue
        turns = [*by_kind["count"], {**by_kind["top"][0], "value": by_kind["top"][0]["value"].split("\n")[1]}]
        turns.append(by_kind["top"][1])
        answer = (turns[1]["value"], turns[3]["value"])
        if answer not in answers and len(chats) < PICTURES:  # different answers, so that the model needs the images
            answers.add(answer)
            chats.append({"id": image, "image": image, "conversations": turns})
    assert len(chats) == PICTURES
    (folder / "chats.json").write_text(json.dumps(chats))
    return folder


@pytest.fixture(scope="session")
def checkpoint(chess, data, vision, pretrained, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("by_heart") / "sft"
    changes = {"train_data": chess / "chats.json", "image_folder": chess / "test", "train_format": "llava_instruct"}
    changes |= {"independent_turns": "false", "max_steps": 160, "learning_rate": "3e-3", "lora_r": 0}
    changes |= {"per_device_train_batch_size": PICTURES, "optimizer": "muon", "save_strategy": "no"}
    run_sft.main(align_options(data, vision, pretrained, output_dir=folder, **changes))
    return folder


@dataclass
class RunningApp:
    """
    Args:
        address (`str`): Of its page.
        log (`Path`): What it prints.
        dawdle (`Path`): While this file is there, tokens wait until it is touched, or the answer is stopped.
        says (`Path`): While this file is there, every answer is its text.
        deaf (`str`): Why it has no speech recogniser; empty if it has one.
    """

    address: str
    log: Path
    dawdle: Path
    says: Path
    deaf: str = ""


@pytest.fixture(scope="session")
def running(checkpoint, tmp_path_factory):
    """The app in a separate process, with the real speech worker if one is available (`RunningApp`)."""
    folder = tmp_path_factory.mktemp("app")
    log, dawdle, says = folder / "app.log", folder / "dawdle", folder / "says"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("JNANA_LOGIN", None)
    (folder / "tmp").mkdir()
    environment["TMPDIR"] = str(folder / "tmp")
    deaf, speech_model = "", str(STAND_IN_MODEL)
    try:
        environment["JNANA_WHISPERX_PYTHON"] = whisperx_python()
    except RuntimeError as error:
        deaf, speech_model = f"no environment with WhisperX: {error}", "none"
    command = [
        sys.executable,
        "-m",
        "tests.app.slow_app",
        str(dawdle),
        str(says),
        "--model_name_or_path",
        str(checkpoint),
    ]
    command += ["--name", "chess", "--speech_model", speech_model, "--upload_megabytes", "2", "--visitors", "3"]
    command += ["--queue_length", "1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield RunningApp(wait_for_address(process, log), log, dawdle, says, deaf)
    finally:
        process.terminate()
        process.wait(timeout=120)
    assert not list((folder / "tmp").glob("jnana-uploads-*")), "uploads are left behind"


def wait_for_address(process: subprocess.Popen, log: Path, seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for line in log.read_text().splitlines():
            if "Running on local URL:" in line:
                return line.split()[-1]
        if process.poll() is not None:
            break
        time.sleep(0.2)
    raise AssertionError(f"the app did not start:\n{log.read_text()}")

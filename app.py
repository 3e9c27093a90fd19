"""The chat app: a picture, a typed or spoken question, the answer as it is written.

    python app.py                                            # the demo's checkpoint, once `make demo` has made one
    python app.py --model_name_or_path outputs/jnana/sft     # a full checkpoint, an adapter, a Hub id
    python app.py --speech_model small                       # spoken questions (the first time ~4 GB are downloaded)
    JNANA_LOGIN=anna:secret python app.py --host 0.0.0.0     # open to others, behind a password

The name and the layout are those that Spaces expects; there JNANA_MODEL names the model. docs/app.md has the rest.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jnana.chat.assistant import Assistant
from jnana.chat.interface import EXAMPLES, build_interface, launch_options
from jnana.chat.limits import Limits
from jnana.modeling import available_device
from jnana.processing.speech import Transcriber
from jnana.training.loading import load_model


try:
    import fcntl
except ImportError:  # Windows: what a killed app has left stays
    fcntl = None  # type: ignore[assignment]


DEMO = Path("outputs/chess_demo/sft/merged")
NO_SPEECH = (
    "Spoken questions are off here: there is no speech recogniser. Whoever runs this app can turn them on with "
    "--speech_model small."
)
UPLOADS = "jnana-uploads-"
logger = logging.getLogger("app")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help=f"default: JNANA_MODEL, else {DEMO}")
    parser.add_argument("--name", help="what the page calls the model; default: the last part of its path")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: as the checkpoint says")
    parser.add_argument(
        "--quantization",
        choices=["none", "nf4", "int8"],
        help="bits of the language model; default: an adapter's base as in training, all else as saved",
    )
    parser.add_argument("--speech_model", help="WhisperX's: small, large-v3-turbo, a folder ...; 'none' turns it off")
    parser.add_argument("--examples_folder", type=Path, default=EXAMPLES, help="pictures to click, questions in .txt")
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else this machine alone (127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else 7860 or the next free one")
    parser.add_argument("--login", help="name:password; better given as JNANA_LOGIN, which no process list shows")
    for limit in dataclasses.fields(Limits):
        text = f"limit; default: {limit.default}"
        parser.add_argument(f"--{limit.name}", type=limit.type, default=limit.default, help=text)
    return parser.parse_args(argv)


def find_model(given: str | None) -> str:
    """The flag, the environment variable, the demo's checkpoint: the first there is."""
    name = given or os.environ.get("JNANA_MODEL")
    if name:
        return name
    if not DEMO.is_dir():
        raise SystemExit(
            "No model is given, and the demo has not made one. Run `make demo` first, or name one: "
            "--model_name_or_path FOLDER_OR_HUB_ID, or JNANA_MODEL."
        )
    return str(DEMO)


def find_login(given: str | None) -> tuple[str, str] | None:
    login = given or os.environ.get("JNANA_LOGIN")
    if not login:
        return None
    name, colon, password = login.partition(":")
    if not (name and colon and password):
        raise SystemExit("The login must read name:password (--login or JNANA_LOGIN).")
    return name, password


def find_speech(model: str | None, limits: Limits) -> Transcriber | None:
    """A transcriber if one is asked for or costs no download, not yet started."""
    known = importlib.util.find_spec("whisperx") or os.environ.get("JNANA_WHISPERX_PYTHON")
    if model == "none" or not (model or known or os.environ.get("JNANA_WHISPERX_MODEL")):
        return None
    return Transcriber(model, max_seconds=limits.audio_seconds)


def load_assistant(arguments: argparse.Namespace) -> Assistant:
    try:  # what is quickly checked comes before what takes long
        limits = Limits(**{name: getattr(arguments, name) for name in vars(Limits())})
        transcriber = find_speech(arguments.speech_model, limits)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    if not arguments.examples_folder.is_dir():
        raise SystemExit(f"--examples_folder {arguments.examples_folder} is no folder.")
    path = find_model(arguments.model_name_or_path)
    device = arguments.device or str(available_device())
    try:
        # straight to its device: a quantised model cannot be moved afterwards
        model, processor = load_model(
            path, dtype=arguments.dtype, quantization=arguments.quantization, device_map={"": torch.device(device)}
        )
    except (ImportError, OSError, ValueError) as error:  # ImportError: bitsandbytes is not installed
        raise SystemExit(f"The model can't be loaded: {error}") from None
    name = arguments.name or Path(path.rstrip("/")).name
    if name == "merged":  # run_sft's folder: the run's name says more
        name = "/".join(Path(path).resolve().parts[-3:-1])
    if transcriber is not None:
        transcriber.start()
    return Assistant(model, processor, name, limits, transcriber, NO_SPEECH)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    login = find_login(arguments.login)
    assistant = load_assistant(arguments)
    logger.info(assistant.describe())
    heed_signals()
    with upload_folder() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        try:
            options: dict[str, Any] = launch_options(assistant, uploads)
            build_interface(assistant, arguments.examples_folder).launch(
                server_name=arguments.host, server_port=arguments.port, auth=login, **options
            )
        except OSError as error:  # the port is taken, the address is not this machine's
            raise SystemExit(f"The page can't be served: {error}") from None
        finally:
            if assistant.transcriber is not None:
                assistant.transcriber.close()


def heed_signals() -> None:
    """`docker stop` and a closed terminal end the app as Ctrl-C does, except where they were told not to (`nohup`)."""
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(signal.Signals[name]) is signal.SIG_DFL:
            signal.signal(signal.Signals[name], end_as_by_hand)


def end_as_by_hand(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """
    A folder that is there as long as the app; those of killed ones go first. Whose folder is locked is alive.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{UPLOADS}*") if fcntl else ():
        with contextlib.suppress(OSError), locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=UPLOADS) as folder, contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):  # gone already, or in a file system without locks, which nobody clears
                if fcntl:
                    lock.enter_context(locked(Path(folder), fcntl.LOCK_EX))
            if os.path.isdir(folder):  # else another app, as it started, took it for left before it was locked
                yield Path(folder)
                return


@contextlib.contextmanager
def locked(folder: Path, how: int) -> Iterator[None]:
    """Hold the lock of a folder itself: a link or a pipe planted in its place is neither followed nor waited for."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    main(sys.argv[1:])

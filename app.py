"""The chat app: upload an image, type or say a question, read the answer while it is written.

    python app.py                                            # the checkpoint of `make demo`
    python app.py --model_name_or_path outputs/jnana/sft     # a full checkpoint, an adapter, a Hub id
    python app.py --speech_model small                       # spoken questions (downloads about 4 GB once)
    JNANA_LOGIN=anna:secret python app.py --host 0.0.0.0     # reachable for others, with a password

Hugging Face Spaces runs a file of this name; there JNANA_MODEL names the model. docs/app.md describes all options.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import logging
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from jnana.chat.assistant import Assistant
from jnana.chat.interface import EXAMPLES, build_interface, launch_options
from jnana.chat.limits import Limits, check_decoder
from jnana.modeling import available_device
from jnana.processing.speech import Transcriber
from jnana.training.loading import load_model


try:
    import fcntl
except ImportError:  # Windows: upload directories of killed apps are not deleted
    fcntl = None  # type: ignore[assignment]


DEMO = Path("outputs/chess_demo/sft/merged")
NO_SPEECH = (
    "Spoken questions are disabled, because no speech recogniser is set up. The operator of this app can enable them "
    "with --speech_model small."
)
UPLOADS = "jnana-uploads-"
logger = logging.getLogger("app")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help=f"default: JNANA_MODEL, else {DEMO}")
    parser.add_argument("--name", help="the model's name on the page; default: the last part of its path")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: an available accelerator, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: the checkpoint's")
    parser.add_argument(
        "--quantization",
        choices=["none", "nf4", "int8"],
        help="of the language model; default: as in training for an adapter's base, else as saved",
    )
    parser.add_argument(
        "--speech_model", help="WhisperX model: small, large-v3-turbo, a directory ...; 'none' disables speech"
    )
    parser.add_argument("--examples_folder", type=Path, default=EXAMPLES, help="example images, questions in .txt")
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else 127.0.0.1 (this machine only)")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else 7860 or the next free one")
    parser.add_argument(
        "--host_names",
        help="names under which the page may be opened, separated by commas, besides localhost, addresses in numbers, "
        "this machine's name, the name given as --host and that of a Space; default: JNANA_HOST_NAMES",
    )
    parser.add_argument("--login", help="name:password; JNANA_LOGIN is safer, because process lists show options")
    for limit in dataclasses.fields(Limits):
        text = f"limit; default: {limit.default}"
        parser.add_argument(f"--{limit.name}", type=limit.type, default=limit.default, help=text)
    return parser.parse_args(argv)


def find_model(given: str | None) -> str:
    """The model of the option, else of the environment variable, else the demo's checkpoint."""
    name = given or os.environ.get("JNANA_MODEL")
    if name:
        return name
    if not DEMO.is_dir():
        raise SystemExit(
            "No model is given, and there is no checkpoint of the demo. Run `make demo` first, or give a model: "
            "--model_name_or_path DIRECTORY_OR_HUB_ID, or JNANA_MODEL."
        )
    return str(DEMO)


def find_host_names(host: str | None, given: str | None) -> set[str]:
    """The names in a request's Host header that are answered."""
    given = os.environ.get("JNANA_HOST_NAMES", "") if given is None else given
    chosen = {name.strip() for name in given.split(",") if name.strip()}
    for name in chosen:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise SystemExit(
                f"--host_names has {name!r}; give names alone, without http:// and port: chat.example.org"
            )
    others = {host or os.environ.get("GRADIO_SERVER_NAME", ""), os.environ.get("SPACE_HOST", ""), socket.gethostname()}
    return chosen | (others - {""})


def find_login(given: str | None) -> tuple[str, str] | None:
    login = given or os.environ.get("JNANA_LOGIN")
    if not login:
        return None
    name, colon, password = login.partition(":")
    if not (name and colon and password):
        raise SystemExit("The login must have the form name:password (--login or JNANA_LOGIN).")
    return name, password


def find_speech(model: str | None, limits: Limits) -> Transcriber | None:
    """An unstarted transcriber if one is requested or can be used without a download."""
    installed = importlib.util.find_spec("whisperx") or os.environ.get("JNANA_WHISPERX_PYTHON")
    if model == "none" or not (model or installed or os.environ.get("JNANA_WHISPERX_MODEL")):
        return None
    return Transcriber(model, max_seconds=limits.audio_seconds)


def load_assistant(arguments: argparse.Namespace) -> Assistant:
    try:  # checks come before the model is loaded
        limits = Limits(**{name: getattr(arguments, name) for name in vars(Limits())})
        transcriber = find_speech(arguments.speech_model, limits)
    except ValueError as error:
        raise SystemExit(f"{error}") from None
    if not arguments.examples_folder.is_dir():
        raise SystemExit(f"--examples_folder {arguments.examples_folder} is not a directory.")
    path = find_model(arguments.model_name_or_path)
    device = arguments.device or str(available_device())
    try:
        # loaded straight onto its device, because a quantised model cannot be moved afterwards
        model, processor = load_model(
            path, dtype=arguments.dtype, quantization=arguments.quantization, device_map={"": torch.device(device)}
        )
    except (ImportError, OSError, ValueError) as error:  # ImportError: bitsandbytes is not installed
        raise SystemExit(f"The model can't be loaded: {error}") from None
    name = arguments.name or Path(path.rstrip("/")).name
    if name == "merged":  # run_sft's merged model: the names of the run are more informative
        name = "/".join(Path(path).resolve().parts[-3:-1])
    if transcriber is not None:
        transcriber.start()
    return Assistant(model, processor, name, limits, transcriber, NO_SPEECH)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    login = find_login(arguments.login)
    host_names = find_host_names(arguments.host, arguments.host_names)
    try:
        check_decoder()
    except RuntimeError as error:
        raise SystemExit(f"The app can't start: {error}") from None
    assistant = load_assistant(arguments)
    logger.info(assistant.describe())
    handle_signals()
    with upload_directory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        try:
            options: dict[str, Any] = launch_options(assistant, uploads, host_names)
            build_interface(assistant, arguments.examples_folder).launch(
                server_name=arguments.host, server_port=arguments.port, auth=login, **options
            )
        except OSError as error:  # the port is in use, or the address is not of this machine
            raise SystemExit(f"The page can't be served: {error}") from None
        finally:
            if assistant.transcriber is not None:
                assistant.transcriber.close()


def handle_signals() -> None:
    """Make SIGTERM and SIGHUP end the app as Ctrl-C does, unless they are ignored already (`nohup`)."""
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        if signal.getsignal(signal.Signals[name]) is signal.SIG_DFL:
            signal.signal(signal.Signals[name], raise_keyboard_interrupt)


def raise_keyboard_interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def upload_directory() -> Iterator[Path]:
    """
    A temporary directory that is deleted when the app ends. Directories of killed apps are deleted first; a locked
    directory belongs to a running app.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{UPLOADS}*") if fcntl else ():
        with contextlib.suppress(OSError), locked(left, fcntl.LOCK_EX | fcntl.LOCK_NB):
            shutil.rmtree(left, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=UPLOADS) as folder, contextlib.ExitStack() as lock:
            with contextlib.suppress(OSError):  # deleted by another app, or the file system has no locks
                if fcntl:
                    lock.enter_context(locked(Path(folder), fcntl.LOCK_EX))
            if os.path.isdir(folder):  # another app may have deleted it while it was not locked yet: then try again
                yield Path(folder)
                return


@contextlib.contextmanager
def locked(folder: Path, operation: int) -> Iterator[None]:
    """Hold the lock of a directory. Raises OSError for anything else, such as a link or a pipe of that name."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, operation)
        yield
    finally:
        os.close(handle)


if __name__ == "__main__":
    main(sys.argv[1:])

"""The chat app: upload an image, type or say a question, read the answer while it is written.

    python app.py                                            # the checkpoint of `make demo`
    python app.py --model_name_or_path outputs/jnana/sft     # a full checkpoint, an adapter, a Hub id
    python app.py --speech_model small                       # spoken questions (downloads about 4 GB once)
    JNANA_LOGIN=anna:secret python app.py --host 0.0.0.0     # reachable for others, with a password

Hugging Face Spaces runs a file of this name; there JNANA_MODEL names the model. docs/app.md describes all options.
"""

import argparse
import contextlib
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

from jnana.chat.api import Api, find_api_key
from jnana.chat.assistant import Assistant
from jnana.chat.connections import limit_connections
from jnana.chat.interface import EXAMPLES, build_interface, launch_options
from jnana.chat.limits import Limits, check_decoder
from jnana.chat.startup import DEMO, add_options, find_host_names, load_assistant, read_limits
from jnana.processing.speech import Transcriber


try:
    import fcntl
except ImportError:  # Windows: upload directories of killed apps are not deleted
    fcntl = None  # type: ignore[assignment]


NO_SPEECH = "Spoken questions are not set up here. Please type the question."  # for visitors
UPLOADS = "jnana-uploads-"
logger = logging.getLogger("app")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", help=f"default: JNANA_MODEL, else {DEMO}")
    parser.add_argument("--speech_model", help="WhisperX model: small, large-v3-turbo, a directory; 'none': no speech")
    parser.add_argument("--examples_folder", type=Path, default=EXAMPLES, help="example images, questions in .txt")
    parser.add_argument("--host", help="default: GRADIO_SERVER_NAME, else 127.0.0.1 (this machine only)")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, else 7860 or the next free one")
    parser.add_argument("--api", action="store_true", help="also answer OpenAI clients under /v1, see --api_key")
    parser.add_argument("--login", help="name:password; JNANA_LOGIN is safer, because process lists show options")
    add_options(parser)
    return parser.parse_args(argv)


def find_login(given: str | None) -> tuple[str, str] | None:
    login = given or os.environ.get("JNANA_LOGIN", "")
    name, _, password = login.partition(":")
    if login and not (name and password):
        raise SystemExit("The login must have the form name:password (--login or JNANA_LOGIN).")
    return (name, password) if login else None


def find_speech(model: str | None, limits: Limits) -> Transcriber | None:
    """An unstarted transcriber if one is requested or can be used without a download."""
    installed = importlib.util.find_spec("whisperx") or os.environ.get("JNANA_WHISPERX_PYTHON")
    if model == "none" or not (model or installed or os.environ.get("JNANA_WHISPERX_MODEL")):
        return None
    return Transcriber(model, max_seconds=limits.audio_seconds)


def load(arguments: argparse.Namespace) -> Assistant:
    try:  # checks come before the model is loaded
        limits = read_limits(arguments)
        transcriber = find_speech(arguments.speech_model, limits)
        check_decoder()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"The app can't start: {error}") from None
    if not arguments.examples_folder.is_dir():
        raise SystemExit(f"--examples_folder {arguments.examples_folder} is not a directory.")
    assistant = load_assistant(arguments, limits, transcriber=transcriber, speech_note=NO_SPEECH)
    if transcriber is None:
        logger.info("Spoken questions are off; --speech_model small turns them on.")
    else:
        transcriber.start()
    assistant.chats.watch()
    return assistant


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    login = find_login(arguments.login)
    host_names = find_host_names(arguments.host, arguments.host_names)
    api_key = find_api_key(arguments.api_key)
    if arguments.api and login and not api_key:
        raise SystemExit("The page has a login, and the API would answer anybody. Give a key too: JNANA_API_KEY.")
    assistant = load(arguments)
    logger.info(assistant.describe())
    handle_signals()
    limit_connections()
    with upload_directory() as uploads:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        try:
            api = Api(assistant, api_key) if arguments.api else None
            options: dict[str, Any] = launch_options(assistant, uploads, host_names, api)
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
            signal.signal(signal.Signals[name], signal.default_int_handler)


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

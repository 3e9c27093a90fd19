"""A server of OpenAI's chat completions API for one checkpoint, with images as base64.

    python -m jnana.chat.serve outputs/chess_demo/sft/merged --port 8000
    JNANA_API_KEY=secret python -m jnana.chat.serve outputs/jnana/sft --host 0.0.0.0

`python app.py --api` serves the chat page and the same API from one process. docs/serving.md shows requests.
"""

import argparse
import logging
import sys

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware

from .api import Api, find_api_key
from .assistant import Assistant
from .connections import limit_connections
from .gate import Gate
from .limits import check_decoder
from .startup import add_options, find_host_names, load_assistant, read_limits


logger = logging.getLogger(__name__)
STOP_SECONDS = 5  # that a stopped server waits for its requests; container engines kill it after 10


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jnana.chat.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model_name_or_path", nargs="?", help="a full checkpoint, an adapter, a Hub id; default: as that of app.py"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1 (this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    add_options(parser)
    parser.set_defaults(queue_length=64)
    return parser.parse_args(argv)


def build_server(assistant: Assistant, host_names: set[str], key: str | None = None) -> FastAPI:
    """The server's application: the API's routes behind the gate."""
    api = Api(assistant, key)
    gate = Middleware(Gate, host_names=host_names, api_megabytes=api.body_megabytes, page=False)
    return FastAPI(routes=api.routes, middleware=[gate], openapi_url=None)


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    host_names = find_host_names(arguments.host, arguments.host_names)
    key = find_api_key(arguments.api_key)
    try:
        limits = read_limits(arguments)
        check_decoder()
    except (ValueError, RuntimeError) as error:
        raise SystemExit(f"The server can't start: {error}") from None
    assistant = load_assistant(arguments, limits)
    logger.info(assistant.describe())
    limit_connections()
    uvicorn.run(
        build_server(assistant, host_names, key),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=STOP_SECONDS,
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""What starts the chat page and the API server alike: options of the command line, host names, limits, the model."""

import argparse
import dataclasses
import os
import re
import socket
from pathlib import Path
from typing import Any

import torch

from jnana.modeling import available_device
from jnana.training.loading import load_model

from .assistant import Assistant
from .limits import Limits


DEMO = Path("outputs/chess_demo/sft/merged")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model, the host names, the API key and the limits."""
    parser.add_argument("--name", help="the model's name for visitors and clients; default: the last part of its path")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: an available accelerator, else cpu")
    parser.add_argument("--dtype", help="float32, bfloat16, float16; default: the checkpoint's")
    parser.add_argument(
        "--quantization",
        choices=["none", "nf4", "int8"],
        help="of the language model; default: as in training for an adapter's base, else as saved",
    )
    parser.add_argument(
        "--host_names",
        help="names under which the server may be reached, separated by commas, besides localhost, addresses in "
        "numbers, this machine's name, the name given as --host and that of a Space; default: JNANA_HOST_NAMES",
    )
    parser.add_argument(
        "--api_key", help="key that API clients must send; JNANA_API_KEY is safer, because process lists show options"
    )
    for limit in dataclasses.fields(Limits):
        text = f"limit; default: {limit.default}"
        parser.add_argument(f"--{limit.name}", type=limit.type, default=limit.default, help=text)


def read_limits(arguments: argparse.Namespace) -> Limits:
    """The limits of the options. Raises `ValueError` for one that is not above 0."""
    return Limits(**{name: getattr(arguments, name) for name in vars(Limits())})


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


def load_assistant(arguments: argparse.Namespace, limits: Limits, **speech: Any) -> Assistant:
    """The model of the options, ready to answer; `speech` are [`Assistant`]'s arguments for spoken questions."""
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
    return Assistant(model, processor, name, limits, **speech)

"""Train, evaluate and share small vision-language models with nothing but the stock transformers Trainer.

    from jnana import JnanaForConditionalGeneration, JnanaProcessor, load_model, load_rows, JnanaCollator

Importing `jnana` registers the model and its processor with transformers' Auto classes and loads nothing
but torch and transformers. The other public names are imported from their modules when they are first used.

The repository keeps `modeling/`, `processing/`, ... and the `run_*.py` scripts at its top level. An installed package
has them inside `jnana/`; in a clone, `__path__` below finds them beside it.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


_HERE = Path(__file__).resolve().parent
if not (_HERE / "modeling").is_dir():  # a clone: the subpackages and scripts lie beside this directory
    __path__.append(str(_HERE.parent))

from transformers import AutoProcessor  # noqa: E402  `__path__` has to be complete before the imports below

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration, JnanaModel  # noqa: E402
from jnana.processing import JnanaProcessor  # noqa: E402


if TYPE_CHECKING:
    from jnana.chat import ChatSession
    from jnana.processing.data import JnanaCollator, load_rows
    from jnana.processing.speech import Transcriber
    from jnana.training.loading import load_model


__version__ = "0.2.0.dev0"

AutoProcessor.register(JnanaConfig, JnanaProcessor, exist_ok=True)

# Public names whose modules need more than torch and transformers (datasets, peft, ...): imported on first use.
_LAZY = {
    "ChatSession": "jnana.chat",
    "JnanaCollator": "jnana.processing.data",
    "Transcriber": "jnana.processing.speech",
    "load_model": "jnana.training.loading",
    "load_rows": "jnana.processing.data",
}

__all__ = [
    "ChatSession",
    "JnanaCollator",
    "JnanaConfig",
    "JnanaForConditionalGeneration",
    "JnanaModel",
    "JnanaProcessor",
    "Transcriber",
    "load_model",
    "load_rows",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:
            if (error.name or "jnana").split(".")[0] == "jnana":
                raise
            message = f"jnana.{name} needs {error.name}, which is not installed: pip install 'jnana[train]'"
            raise ModuleNotFoundError(message, name=error.name) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

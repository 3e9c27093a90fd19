"""`transformers serve` for Jnana checkpoints: chat completions as OpenAI's clients ask for them, images as base64.

    python -m jnana.chat.serve outputs/chess_demo/sft/merged --port 8000

All of it is transformers' own server (`pip install "transformers[serving]"`), with its options. It finds a model's
class by name in tables of the classes that transformers ships, so a class from elsewhere must be entered there before
the server starts; that is all this file does. docs/serving.md shows a request.
"""

import sys

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from jnana import training  # noqa: F401  registers model and processor with the Auto classes
from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration


def main(arguments: list[str]) -> None:
    from transformers.cli.transformers import main as transformers_command

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[JnanaConfig.model_type] = JnanaForConditionalGeneration.__name__
    sys.argv = ["transformers", "serve", *arguments]
    transformers_command()


if __name__ == "__main__":
    main(sys.argv[1:])

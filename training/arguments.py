"""The options of the three training scripts, and the one function that reads them.

A recipe is a flat YAML file; every key of it may be overridden on the command line as `--key value`. The options are
the dataclasses below plus the stock `transformers.TrainingArguments`. All values, from YAML too, go through argparse
as text, so `1e-4` is a number, `no` is a word (YAML 1.1 makes it `false`), and an unknown key is refused with the
nearest known one.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from jnana.modeling import PROJECTOR_FIELDS


# What this project asks of the stock TrainingArguments unless the recipe says otherwise.
TRAINING_DEFAULTS = {
    "remove_unused_columns": "false",  # rows are images and conversations; the collator turns them into model inputs
    "label_names": ["labels"],
    "report_to": "none",
    "dataloader_pin_memory": str(torch.cuda.is_available()).lower(),  # elsewhere it only warns
    "logging_steps": "10",
    "logging_first_step": "true",
    "save_total_limit": "2",  # the last one, and the one before in case a crash truncated the last
    # accelerate would cut a packed batch of a stream into slices along dimension 0, images and rows alike
    "accelerator_config": '{"dispatch_batches": false}',
    "hub_strategy": "end",  # the scripts push by themselves (training/sharing.py)
    # no parameter is left unused (see training.stages), so no search for it in every step
    "ddp_find_unused_parameters": "false",
}


@dataclass
class ModelArguments:
    """Which model: a Jnana checkpoint, or the two backbones and the projector that joins them."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Jnana checkpoint, or an adapter folder of run_sft, to continue from."}
    )
    vision_model: str | None = field(default=None, metadata={"help": "Vision tower: Hub id or folder."})
    text_model: str | None = field(default=None, metadata={"help": "Causal language model: Hub id or folder."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer, if not the one in `text_model`. Refused if its ids are others."}
    )
    projector_type: Literal["linear", "mlp", "resblock"] | None = field(default=None)
    projector_hidden_act: str | None = field(default=None)
    projector_num_blocks: int | None = field(
        default=None, metadata={"help": "Residual blocks of a `resblock` projector."}
    )
    projector_layer_norm: bool | None = field(
        default=None, metadata={"help": "LayerNorm in front of an `mlp` projector."}
    )
    multimodal_projector_bias: bool | None = field(default=None)
    vision_feature_layer: list[int] | None = field(
        default=None, metadata={"help": "Hidden state(s) of the tower; several are concatenated."}
    )
    vision_feature_select_strategy: Literal["default", "full", "pooled"] | None = field(default=None)
    chat_template: str | None = field(
        default=None, metadata={"help": "A shipped template's name (default `jnana`), or a .jinja file."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the frozen weights; what trains is always held in float32."}
    )
    attn_implementation: str | None = field(default=None)
    trust_remote_code: bool = field(default=False)

    @property
    def projector_fields(self) -> dict[str, Any]:
        """The `JnanaConfig` fields that were given; the others keep `JnanaConfig`'s own defaults."""
        values = {name: getattr(self, name) for name in PROJECTOR_FIELDS}
        if self.vision_feature_layer is not None and len(self.vision_feature_layer) == 1:
            values["vision_feature_layer"] = self.vision_feature_layer[0]
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TextModelArguments:
    """Which language model stage 0 trains: a config from random weights, or a checkpoint to go on with."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A language model to continue from."})
    config_name_or_path: str | None = field(default=None, metadata={"help": "Take this checkpoint's config."})
    text_config: str | None = field(
        default=None, metadata={"help": "Config fields with `model_type`, as a mapping (JSON on the command line)."}
    )
    tokenizer_name_or_path: str | None = field(default=None)
    train_tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE tokenizer of this size on the corpus first."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32")
    attn_implementation: str | None = field(default=None)

    @property
    def text_config_fields(self) -> dict[str, Any]:
        return {} if self.text_config is None else json.loads(self.text_config)


@dataclass
class DataArguments:
    """Pictures and conversations, for align and sft."""

    train_data: str | None = field(default=None, metadata={"help": "A JSON file, an image folder, or a Hub data set."})
    train_format: str = field(default="auto", metadata={"help": "auto, coco_captions, llava_instruct, ..."})
    train_split: str = field(default="train")
    image_folder: str | None = field(default=None)
    eval_data: str | None = field(default=None)
    eval_format: str = field(default="auto")
    eval_split: str = field(default="train", metadata={"help": "Split of `eval_data` where it has several."})
    eval_image_folder: str | None = field(default=None, metadata={"help": "Default: `image_folder`."})
    independent_turns: bool = field(
        default=True, metadata={"help": "Each question/answer pair is a conversation of its own."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Question put before every caption."})
    answer_keywords: bool = field(
        default=False, metadata={"help": "Train answers without stop words and punctuation (phi35_pooled)."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens a row may have, image tokens included."})
    max_image_pixels: int | None = field(default=None)
    on_bad_sample: Literal["raise", "skip"] = field(default="raise")
    image_check: Literal["none", "header", "decode"] = field(
        default="header", metadata={"help": "How far every image is read in the check before training."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read while training; of several processes each reads files of its own."}
    )
    max_train_rows: int | None = field(default=None)
    max_eval_rows: int | None = field(default=None)
    packing: Literal["none", "rows", "shared_image"] = field(
        default="none",
        metadata={
            "help": "Several conversations a row, none of which sees another; with shared_image those about one image "
            "pay for it once. Exactly what `none` trains; the batch size then counts packed rows."
        },
    )
    max_row_tokens: int = field(default=1024, metadata={"help": "Tokens a packed row may have."})
    feature_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the frozen tower's features of every picture; what is missing is computed."
        },
    )
    feature_cache_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "To store them in. Default: what the tower computes in."}
    )


@dataclass
class TextDataArguments:
    """A text corpus, for stage 0."""

    train_data: str | None = field(default=None, metadata={"help": "A .txt, .jsonl or .parquet file, or a Hub id."})
    train_split: str = field(default="train")
    eval_data: str | None = field(default=None)
    eval_split: str = field(default="train")
    text_column: str = field(default="text")
    block_size: int = field(default=512, metadata={"help": "Tokens a block; the corpus is packed into such blocks."})
    streaming: bool = field(default=False)
    max_train_rows: int | None = field(default=None, metadata={"help": "Documents of the corpus."})
    packing: Literal["blocks", "rows"] = field(
        default="blocks",
        metadata={
            "help": "blocks: documents end to end, cut every block_size tokens, each sees the one before it; rows: "
            "whole documents, invisible to one another, in rows of block_size tokens."
        },
    )


@dataclass
class LoraArguments:
    """How the language model is fine-tuned in run_sft. A further round on an adapter needs none of these."""

    lora_r: int = field(default=0, metadata={"help": "Rank of the adapter; 0 trains the whole language model."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Default: twice the rank."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Default: 0."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Last names of linear layers of the language model; default `all-linear`, each of them."},
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Also write output_dir/merged, a full checkpoint."})
    lora_vision_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Of the vision tower, which gets no adapter by default: last names, or `all-linear`."},
    )
    quantization: Literal["none", "nf4", "int8"] | None = field(
        default=None,
        metadata={
            "help": "Bits of the frozen language model, by bitsandbytes; default none, or as the adapter's was."
        },
    )
    double_quantization: bool = field(default=True, metadata={"help": "nf4: quantise the quantisation constants too."})
    quantization_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "nf4: dtype of the products; default: `dtype`."}
    )
    quantization_storage_dtype: Literal["uint8", "float32", "bfloat16", "float16"] = field(
        default="uint8", metadata={"help": "nf4: dtype that the packed bits are kept as; FSDP needs that of the rest."}
    )
    merge_base: Literal["dequantized", "full"] = field(
        default="dequantized",
        metadata={"help": "merge_adapter: into the 4-bit base as trained, dequantised, or into the original weights."},
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id under which others find the local checkpoint that is fine-tuned."}
    )


@dataclass
class RateArguments:
    """Learning rates and schedules of parts, in run_sft; `learning_rate` is the language model's."""

    projector_learning_rate: float | None = field(default=None, metadata={"help": "Default: `learning_rate`."})
    projector_lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] | None = field(
        default=None, metadata={"help": "Default: `lr_scheduler_type`."}
    )
    vision_learning_rate: float | None = field(
        default=None, metadata={"help": "Of the vision tower's adapter; default: `learning_rate`."}
    )
    vision_lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] | None = field(
        default=None, metadata={"help": "Default: `lr_scheduler_type`."}
    )

    @property
    def parts(self) -> dict[str, tuple[float | None, str | None]]:
        """Rate and schedule of each part that may have its own."""
        return {
            "multi_modal_projector": (self.projector_learning_rate, self.projector_lr_scheduler_type),
            "vision_tower": (self.vision_learning_rate, self.vision_lr_scheduler_type),
        }

    @property
    def given(self) -> bool:
        """Whether any part has one of its own."""
        return any(value is not None for values in self.parts.values() for value in values)

    def rate_of(self, part: str) -> float | None:
        return self.parts.get(part, (None, None))[0]

    def schedule_of(self, part: str) -> str | None:
        return self.parts.get(part, (None, None))[1]


@dataclass
class RunArguments:
    """What happens around the stock Trainer."""

    sample_steps: int = field(default=0, metadata={"help": "Write truth and generated text every N steps; 0: never."})
    sample_count: int = field(default=4)
    sample_max_new_tokens: int = field(default=64)
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete output_dir's checkpoints and start anew instead of resuming."}
    )
    optimizer: Literal["stock", "muon"] = field(
        default="stock", metadata={"help": "stock: TrainingArguments' `optim`; muon: Muon for matrices, else AdamW."}
    )


def parse_arguments(classes: Sequence[type], argv: Sequence[str]) -> tuple:
    """Read `[recipe.yaml] [--key value ...]` into one instance of each dataclass.

    Args:
        classes (`Sequence[type]`): Dataclasses, `TrainingArguments` among them; no field name may occur twice.
        argv (`Sequence[str]`): Command line without the program's name.

    Returns:
        `tuple`: One instance of each class, in the order given.

    Raises:
        ValueError: if the recipe cannot be read, a word belongs to no option, or a key is unknown (the message names
            the nearest known key).
    """
    recipe = recipe_name(argv)
    argv = list(argv[0 if recipe is None else 1 :])
    known = sorted({f.name for cls in classes for f in dataclasses.fields(cls) if f.init})
    values: dict[str, Any] = dict(TRAINING_DEFAULTS) if TrainingArguments in classes else {}
    if recipe is not None:
        from_recipe = read_recipe(recipe)
        for key in from_recipe:
            if key not in known:
                raise ValueError(unknown_key_message(key, known, where=recipe))
        values.update(from_recipe)
    parser = HfArgumentParser(list(classes), allow_abbrev=False)
    # nargs="+" would take values that follow an option of the recipe, hence recipe first, command line after it
    *parsed, remaining = parser.parse_args_into_dataclasses(
        [*as_command_line(values), *argv], return_remaining_strings=True, look_for_args_file=False
    )
    if remaining and not remaining[0].startswith("-"):
        raise ValueError(
            f"{remaining[0]!r} belongs to no option: the recipe is the first word of the command line, and an option "
            "that takes one value was given several"
        )
    if remaining:
        key = remaining[0].lstrip("-").split("=")[0].replace("-", "_")
        raise ValueError(unknown_key_message(key, known, where="the command line"))
    return tuple(parsed)


def recipe_name(argv: Sequence[str]) -> str | None:
    """The recipe on a command line: its first word, unless that is an option already."""
    return argv[0] if argv and not argv[0].startswith("-") else None


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe file as a dict whose scalars are text; keys set to nothing or `null` are left out.

    Raises:
        ValueError: if the file does not exist, is not YAML, is not a mapping, or names a key twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {str(path)!r} is not a file; the first argument is a YAML file, or starts with `--`")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".json":  # JSON is YAML, but for the tabs that many editors indent it with
            text = text.replace("\t", " ")
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {str(path)!r} is not UTF-8 text: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {str(path)!r} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"recipe {str(path)!r} holds a {type(values).__name__}; it must be a mapping `key: value`")
    keys = [key.value for key, _ in root.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"recipe {str(path)!r} sets {key!r} {keys.count(key)} times; keep one")
    return {key: value for key, value in values.items() if value not in ("", "null", "~", [])}


def as_command_line(values: dict[str, Any]) -> list[str]:
    """`{"learning_rate": "1e-4"}` as `["--learning_rate=1e-4"]`; lists as several words, mappings as JSON."""
    words: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            words += [f"--{key}", *value]
        elif isinstance(value, dict):
            words.append(f"--{key}={json.dumps(typed(value))}")
        else:
            words.append(f"--{key}={value}")
    return words


def typed(value: Any) -> Any:
    """The scalars of a nested value as JSON types: `"1e-5"` -> 1e-05, `"true"` -> True; what is no JSON stays text."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def unknown_key_message(key: str, known: Sequence[str], where: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
    return f"unknown key {key!r} in {where}; the nearest known key is {nearest!r} (--help lists all)"

"""Checks of the options that name a model, and of those about LoRA."""

import logging

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import cached_file

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.adapters import is_adapter
from jnana.training.loading import load_config
from jnana.training.stages import adapter_targets

from .arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    TextModelArguments,
)
from .path_checks import check_source, models_read


logger = logging.getLogger(__name__)


def check_models(args: ModelArguments | TextModelArguments) -> None:
    """Check that models which are given as paths exist; other names may be Hub ids."""
    for name, value in models_read(args).items():
        if value is not None:
            check_source(
                name, value, "give a directory or a Hub id; the earlier stages of a recipe write such directories"
            )


def check_model_arguments(args: ModelArguments) -> None:
    """Check that either a checkpoint or two backbones are named.

    Raises:
        ValueError: naming the fields, their values and the remedy.
    """
    pair = (args.vision_model, args.text_model)
    if args.model_name_or_path is not None and any(pair):
        raise ValueError(
            f"model_name_or_path ({args.model_name_or_path!r}) and vision_model/text_model {pair} exclude each other; "
            "give the checkpoint to continue, or the two backbones to join"
        )
    if args.model_name_or_path is None and not all(pair):
        raise ValueError(
            f"vision_model is {args.vision_model!r} and text_model is {args.text_model!r}; give both, or a Jnana "
            "checkpoint as model_name_or_path"
        )
    if args.image_geometry == "anyres" and args.fusion == "cross_attention":
        raise ValueError(
            "image_geometry is 'anyres' and fusion is 'cross_attention', whose resampler takes one view an image; "
            "choose image_geometry crop or pad, or fusion tokens"
        )


def check_text_arguments(args: TextModelArguments) -> None:
    """Check that one model is named, and one tokenizer where the model brings none.

    Raises:
        ValueError: naming the fields and the remedy.
    """
    models = ("model_name_or_path", "config_name_or_path", "text_config")
    given = [name for name in models if getattr(args, name) is not None]
    if len(given) != 1:
        raise ValueError(f"of {', '.join(models)} exactly one must be set, but {len(given)} are set: {given}")
    if args.train_tokenizer_vocab_size is not None and args.tokenizer_name_or_path is not None:
        raise ValueError(
            f"tokenizer_name_or_path ({args.tokenizer_name_or_path!r}) and train_tokenizer_vocab_size "
            f"({args.train_tokenizer_vocab_size}) exclude each other; take a tokenizer, or train one"
        )
    if args.model_name_or_path is not None and args.train_tokenizer_vocab_size is not None:
        raise ValueError(
            f"train_tokenizer_vocab_size is {args.train_tokenizer_vocab_size}, but {args.model_name_or_path!r} has a "
            "tokenizer and was trained with it; leave it out"
        )
    if args.text_config is not None and args.text_config_fields.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"text_config: model_type is {args.text_config_fields.get('model_type')!r}; give one that transformers "
            "knows, such as phi or gpt_neox"
        )
    if args.text_config is not None and not (args.tokenizer_name_or_path or args.train_tokenizer_vocab_size):
        raise ValueError("text_config needs a tokenizer: set tokenizer_name_or_path or train_tokenizer_vocab_size")


def check_no_adapter(args: ModelArguments) -> None:
    """Check that run_align starts from backbones or a full checkpoint.

    Raises:
        ValueError: if `model_name_or_path` is an adapter.
    """
    if args.model_name_or_path is not None and is_adapter(args.model_name_or_path):
        raise ValueError(
            f"model_name_or_path {args.model_name_or_path!r} is an adapter; align from a full checkpoint "
            "(run_sft writes one with merge_adapter: true)"
        )


def check_lora(args: LoraArguments, adapter: str | None) -> None:
    """Check the options of an adapter.

    Args:
        args (`LoraArguments`): The options.
        adapter (`str`, *optional*): Directory or Hub id of the adapter that is continued, if one is.

    Raises:
        ValueError: if an option contradicts the adapter to continue, or needs an adapter and there is none.
    """
    if args.lora_r < 0 or not 0 <= (args.lora_dropout or 0) < 1:
        raise ValueError(
            f"lora_r is {args.lora_r} and lora_dropout {args.lora_dropout}; give a rank >= 0 and 0 <= p < 1"
        )
    if adapter is not None:
        check_same_adapter(args, adapter)
    elif args.lora_r == 0:
        needs_one = {"merge_adapter": args.merge_adapter, "quantization": args.quantization not in (None, "none")}
        needs_one["lora_vision_target_modules"] = bool(args.lora_vision_target_modules)
        for name, given in needs_one.items():
            if given:
                value = getattr(args, name)
                raise ValueError(
                    f"{name} is {str(value).lower() if isinstance(value, bool) else repr(value)} but lora_r is 0, so "
                    f"there is no adapter; set lora_r, or leave {name} out"
                )


def check_same_adapter(args: LoraArguments, adapter: str) -> None:
    """Check that given options are those of the adapter to continue, whose shape can't be changed.

    Raises:
        ValueError: naming the option, both values and the remedy.
    """
    config = PeftConfig.from_pretrained(adapter)
    given = {"lora_r": args.lora_r or None, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    remedy = "leave it out, or merge that adapter (run_merge.py) and start from the merged checkpoint"
    for name, value in given.items():
        present = getattr(config, {"lora_r": "r"}.get(name, name))
        if value is not None and value != present:
            raise ValueError(f"{name} is {value}, but the adapter {adapter!r} to continue has {present}; {remedy}")
    if args.lora_target_modules is None and args.lora_vision_target_modules is None:
        return
    with torch.device("meta"):
        model = JnanaForConditionalGeneration(JnanaConfig.from_pretrained(adapter))
    file = cached_file(adapter, "adapter_model.safetensors")
    with safe_open(file, framework="pt") as tensors:
        present = {
            key.split(".lora_A.")[0].removeprefix("base_model.model.") for key in tensors.keys() if ".lora_A." in key
        }
    wanted = set(adapter_targets(model, args))
    if args.lora_target_modules is None:
        wanted = {name for name in wanted if "vision_tower" in name}
        present = {name for name in present if "vision_tower" in name}
    if args.lora_vision_target_modules is None:
        present = {name for name in present if "vision_tower" not in name}
    if wanted != present:
        kinds = [sorted({name.rsplit(".", 1)[-1] for name in names}) for names in (wanted, present)]
        option = "lora_target_modules" if args.lora_target_modules is not None else "lora_vision_target_modules"
        raise ValueError(
            f"{option} names {len(wanted)} layers ({', '.join(kinds[0])}), but the adapter {adapter!r} to continue is "
            f"on {len(present)} ({', '.join(kinds[1])}); {remedy}"
        )


def limit_to_context(data_args: DataArguments, model_args: ModelArguments) -> None:
    """
    Set `max_length`, where it is not given, to the longest sequence that the language model was made for. A longer
    conversation is then cut and counted, or can't be used if its images do not fit.

    Args:
        data_args (`DataArguments`): changed in place.
        model_args (`ModelArguments`): whose config is read; no weights.
    """
    trust = {"trust_remote_code": model_args.trust_remote_code}
    if model_args.model_name_or_path is not None:
        config = load_config(model_args.model_name_or_path, **trust).text_config
    else:
        config = AutoConfig.from_pretrained(model_args.text_model, **trust).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is None:
        return
    if data_args.max_length is None:
        data_args.max_length = longest
        data_args.max_length_source = "the max_position_embeddings of the language model"
    elif data_args.max_length > longest:
        logger.warning(
            f"max_length is {data_args.max_length}, more than the max_position_embeddings {longest} of the language "
            "model, which was not trained on longer sequences"
        )

"""Checks of the arguments alone: errors that would otherwise come after the model is loaded, or after an hour."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import safe_open
from transformers import CONFIG_MAPPING, PreTrainedConfig, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import cached_file, is_bitsandbytes_available, is_liger_kernel_available

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing.data.feature_cache import KEY_FILE
from jnana.processing.data.paths import names_local_path
from jnana.training.adapters import is_adapter
from jnana.training.attention import check_attention, check_documents
from jnana.training.device_map import check_device_map
from jnana.training.distributed import sharding_of
from jnana.training.stages import adapter_targets

from .arguments import (
    LIGER_LOSS,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TextDataArguments,
    TextModelArguments,
)
from .output_checks import check_output_apart, check_trackers, models_read
from .recipes import accelerate_config


# The smallest value of options that count something.
SMALLEST = {
    "max_length": 2,
    "block_size": 2,
    "max_row_tokens": 2,
    "max_image_pixels": 1,
    "max_train_rows": 1,
    "max_eval_rows": 1,
    "sample_count": 1,
    "sample_max_new_tokens": 1,
    "sample_steps": 0,
}


def check_run(
    args: TrainingArguments,
    model_args: ModelArguments | TextModelArguments,
    data_args: DataArguments | TextDataArguments,
    run_args: RunArguments,
) -> None:
    """Check every path and every pair of options that must agree.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if isinstance(model_args, ModelArguments):
        check_model_arguments(model_args)
    else:
        check_text_arguments(model_args)
    check_models(model_args)
    check_output_apart(args.output_dir, models_read(model_args))
    check_output_dir(args.output_dir)
    check_trackers(args)
    check_data(args, data_args)
    for name, value in {**vars(data_args), **vars(run_args)}.items():
        if name in SMALLEST and value is not None and value < SMALLEST[name]:
            raise ValueError(f"{name} is {value}; it must be at least {SMALLEST[name]}, or be left out")
    if args.n_gpu > 1 and not (isinstance(model_args, ModelArguments) and model_args.device_map):
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel would split rows from their images; start with "
            f"`accelerate launch --num_processes {args.n_gpu}`, or set CUDA_VISIBLE_DEVICES to one of them"
        )
    if data_args.eval_data is None:
        if args.eval_strategy != "no":
            strategy = IntervalStrategy(args.eval_strategy).value
            raise ValueError(f"eval_strategy is {strategy!r} but eval_data is not set; give it, or `no`")
        if run_args.sample_steps > 0:
            raise ValueError(f"sample_steps is {run_args.sample_steps} but eval_data is not set; give it, or 0")
    if isinstance(data_args, TextDataArguments):
        check_documents(data_args.packing, args.accelerator_config.dispatch_batches)
    if isinstance(data_args, DataArguments):
        check_attention(model_args.attn_implementation, data_args.packing)
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor is {args.label_smoothing_factor}, but the Trainer would smooth each token's "
                "own label instead of the next token's, because it does not know this model; leave it out"
            )


def check_data(args: TrainingArguments, data_args: DataArguments | TextDataArguments) -> None:
    """Check the paths of the data, and the options that a stream needs.

    Raises:
        ValueError: naming the field, its value and the remedy.
    """
    if data_args.train_data is None:
        raise ValueError("train_data is not set; give a file, a directory or a Hub data set")
    check_source("train_data", data_args.train_data)
    if data_args.eval_data is not None:
        check_source("eval_data", data_args.eval_data)
    if isinstance(data_args, DataArguments):
        for name in ("image_folder", "eval_image_folder"):
            folder = getattr(data_args, name)
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(f"{name} {folder!r} is not a directory; give the directory that holds the images")
        check_feature_cache(data_args)
    if not data_args.streaming:
        return
    if isinstance(data_args, DataArguments) and data_args.packing != "none":
        longest = data_args.max_length
        if longest is None or longest > data_args.max_row_tokens:
            raise ValueError(
                f"a stream is packed into rows of max_row_tokens {data_args.max_row_tokens} before all of it is "
                f"measured, but max_length is {longest}; give max_length, at most max_row_tokens"
            )
    if args.max_steps <= 0:
        raise ValueError(
            f"streaming is true but max_steps is {args.max_steps}; a stream has no length, so give max_steps"
        )
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r} but streaming is true; the lengths of a "
            "stream are not known, so leave one of them out"
        )


def check_feature_cache(args: DataArguments) -> None:
    """Check the options of the feature cache.

    Raises:
        ValueError: if its directory can't be written to, or options contradict each other.
    """
    if args.feature_cache is None:
        if args.feature_cache_dtype is not None:
            raise ValueError(
                f"feature_cache_dtype is {args.feature_cache_dtype!r} but feature_cache is not set; give a directory, "
                "or leave both out"
            )
        return
    if args.streaming:
        raise ValueError(
            f"feature_cache is {args.feature_cache!r} but streaming is true: every image must be known before "
            "training. Leave one of them out"
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"feature_cache is {args.feature_cache!r}, but ZeRO-3 partitions the tower's weights over the processes "
            "while it loads them, so no process can compute features; train with "
            f"{accelerate_config('fsdp2.yaml')} or zero2.yaml, or leave it out"
        )
    folder = Path(args.feature_cache)
    if not (folder / KEY_FILE).is_file():  # a finished cache may be read-only
        check_output_dir(args.feature_cache, "feature_cache")


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


def check_output_dir(folder: str, name: str = "output_dir") -> None:
    """Create the directory and write a file in it.

    Raises:
        ValueError: naming the option and the directory.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{name} {folder!r} cannot be written to ({error.strerror}); choose another") from error


def check_source(name: str, source: str, remedy: str = "give a file, a directory or a Hub data set") -> None:
    """Check that a name which can only be a local path exists; other names may be Hub ids.

    Raises:
        ValueError: naming the option, the path and the remedy.
    """
    is_pattern = any(mark in source for mark in "*?[")
    if names_local_path(source) and not Path(source).exists() and not is_pattern:
        raise ValueError(f"{name} {source!r} does not exist; {remedy}")


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


def check_quantization(settings: dict[str, Any], device: torch.device) -> None:
    """Refuse a quantised base that bitsandbytes, or the device, cannot compute with.

    Args:
        settings (`dict`): As `jnana.training.adapters.quantization_settings` gives them.
        device (`torch.device`): The device of the run.

    Raises:
        ValueError: naming the option and the remedy.
    """
    method = settings["quantization"]
    if method == "none":
        return
    remedy = "set `quantization: none` and hold the language model in 16 bits (`dtype: bfloat16`)"
    if not is_bitsandbytes_available():
        raise ValueError(
            f"quantization is {method!r}, which needs bitsandbytes, and that is not installed: "
            f"`pip install bitsandbytes`, or {remedy}"
        )
    import bitsandbytes

    if device.type not in bitsandbytes.supported_torch_devices:
        raise ValueError(
            f"quantization is {method!r}, but the installed bitsandbytes {bitsandbytes.__version__} computes on "
            f"{sorted(bitsandbytes.supported_torch_devices)} and this run is on {device.type!r}; {remedy}"
        )
    if device.type == "cuda" and settings.get("compute_dtype") == "bfloat16":
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ValueError(
                "quantization_compute_dtype is 'bfloat16', for which this GPU "
                f"({torch.cuda.get_device_name(device)}) has no units; give `--dtype float16 --bf16 false --fp16 true`"
            )


def check_computation(
    args: TrainingArguments,
    model_args: ModelArguments | TextModelArguments,
    optimizer: str,
    quantization: str = "none",
    trains_language_model: bool = False,
) -> None:
    """Refuse options that the run's sharding, precision or kernels can't follow, and complete `accelerator_config`.

    Args:
        args (`TrainingArguments`): Of the run. Where `accelerator_config.dispatch_batches` is left open it is set to
            `False`: accelerate would cut a packed batch of a stream along dimension 0, images and rows alike.
        model_args (`ModelArguments` or `TextModelArguments`): Attention implementation and dtype.
        optimizer (`str`): `stock` or `muon`.
        quantization (`str`, defaults to `"none"`): `none`, `nf4` or `int8`.
        trains_language_model (`bool`, defaults to `False`): Whether the whole language model trains, which is then
            held in float32, whatever `dtype` says.

    Raises:
        ValueError: naming the option, its value and the remedy.
    """
    check_liger_kernel(args, model_args)
    if args.accelerator_config.dispatch_batches is None:
        args.accelerator_config.dispatch_batches = False
    elif args.accelerator_config.dispatch_batches and isinstance(model_args, ModelArguments):
        raise ValueError(
            "accelerator_config: dispatch_batches is true, with which accelerate cuts a batch along dimension 0, its "
            "images and its rows alike; leave it out"
        )
    if isinstance(model_args, ModelArguments):
        check_device_map(model_args, args, quantization)
        check_halves(model_args, args)
    sharding = sharding_of(args)
    if optimizer == "muon" and sharding is not None and sharding.startswith("zero"):
        raise ValueError(
            "optimizer is 'muon', which steps whole matrices, but DeepSpeed's ZeRO flattens all weights; start with "
            f"{accelerate_config('fsdp2.yaml')} or ddp.yaml, or set `optimizer: stock`"
        )
    if quantization == "int8" and sharding == "fsdp":
        raise ValueError(
            "quantization is 'int8', whose weights FSDP cannot shard; set `quantization: nf4`, or start with "
            f"{accelerate_config('ddp.yaml')}"
        )
    attention, dtype = model_args.attn_implementation, "float32" if trains_language_model else model_args.dtype
    if attention is not None and "flash" in attention and dtype == "float32" and not (args.bf16 or args.fp16):
        held = "the language model trains, so it is held in float32" if trains_language_model else "dtype is 'float32'"
        raise ValueError(
            f"attn_implementation is {attention!r}, which computes in 16 bits only, but {held}, and bf16 and fp16 are "
            "false; set `bf16: true`, or `attn_implementation: sdpa`"
        )
    half = args.fp16 or (dtype == "float16" and not args.bf16)
    if attention == "eager" and half and text_model_type(model_args) == "phi":
        raise ValueError(
            "attn_implementation is 'eager', which computes the attention scores of Phi in float16, where they "
            "overflow; set `attn_implementation: sdpa`, or bf16: true instead of float16"
        )


def check_halves(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Refuse frozen weights in one kind of 16 bits and computation in the other, where CLIP's first `cat` would fail.

    Raises:
        ValueError: naming both options and the remedy.
    """
    for dtype, option in (("float16", "bf16"), ("bfloat16", "fp16")):
        if model_args.dtype == dtype and getattr(args, option):
            other = {"float16": "bfloat16", "bfloat16": "float16"}[dtype]
            raise ValueError(
                f"dtype is {dtype!r} but {option} is true, which computes in {other}; set `dtype: {other}`, or "
                f"`{option}: false`"
            )


def check_liger_kernel(args: TrainingArguments, model_args: ModelArguments | TextModelArguments) -> None:
    """Refuse `use_liger_kernel` where it would change nothing, or could not run.

    Jnana's models take Liger's fused loss (`modeling/loss_jnana.py`). Of language models Liger patches those that it
    knows by `model_type`.

    Raises:
        ValueError: naming the option and the remedy.
    """
    if not args.use_liger_kernel:
        return
    if not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel is true, but liger-kernel is not installed: `pip install liger-kernel`, or leave it out"
        )
    if isinstance(model_args, ModelArguments):
        if args.device.type == "cpu":
            raise ValueError(
                "use_liger_kernel is true, but this run is on 'cpu' and Liger's kernels need a GPU; leave it out: the "
                "loss is then fused with the head by torch"
            )
        others = sorted(set(args.liger_kernel_config or ()) - {LIGER_LOSS})
        if others:
            raise ValueError(
                f"liger_kernel_config names {', '.join(others)}, but of Liger's kernels Jnana's models take only "
                f"{LIGER_LOSS}; leave the others out"
            )
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    model_type = text_model_type(model_args)
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"use_liger_kernel is true, but Liger has no kernels for model_type {model_type!r}; leave it out"
        )


def text_model_type(args: ModelArguments | TextModelArguments) -> str | None:
    """The `model_type` of the language model that the arguments name, read from a config; no weights are read."""
    if isinstance(args, ModelArguments):
        name = args.model_name_or_path or args.text_model
    else:
        name = args.model_name_or_path or args.config_name_or_path
        if name is None:
            return args.text_config_fields.get("model_type")
    if name is None:
        return None
    config = PreTrainedConfig.get_config_dict(name)[0]
    return config.get("text_config", config).get("model_type")

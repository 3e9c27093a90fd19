"""Forecasts the peak memory of a run by part, before any weights are read, and compares it with the device's.

The model is built from its config without memory, prepared as the stage does, and takes two steps on the longest rows
of the data ([`trace_step`]). Evaluation, samples and merging are not forecast.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor
from jnana.processing.data import JnanaCollator
from jnana.training.adapters import is_adapter
from jnana.training.attention import text_collator
from jnana.training.data import collator_options
from jnana.training.distributed import run_on_main_process, sharding_of, unpartitioned
from jnana.training.loading import image_fields, load_config
from jnana.training.optimizers import stock_groups, trainer_optimizer
from jnana.training.options.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PartArguments,
    RunArguments,
    TextModelArguments,
)
from jnana.training.options.recipes import accelerate_config
from jnana.training.saving.checkpoints import size_text
from jnana.training.stages import apply_stage, parameter_count, part_of
from jnana.training.text_models import text_model_config

from .memory_trace import StepMemory, TracedEightBitAdamW, TracedLinear, held_bytes, trace_step


logger = logging.getLogger(__name__)

CUDA_CONTEXT = 500_000_000  # bytes that CUDA and its libraries take of a GPU
FEWEST_WEIGHTS = 1_000_000  # a smaller model is not forecast: it fits everywhere, and tracing takes a second or more
TRACED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")  # others count as AdamW, of which none keeps more


@dataclass
class Forecast:
    """
    Peak memory of one process on one device.

    Args:
        weights (`dict[str, int]`): Bytes by what holds them: `weights bfloat16`, `weights nf4`, `adapter float32`, ...
        step (`StepMemory`): What a step holds beside them when it holds most.
        rows (`tuple[int, ...]`): Shape of the traced batch: rows and tokens.
    """

    weights: dict[str, int]
    step: StepMemory
    rows: tuple[int, ...]

    @property
    def weights_total(self) -> int:
        return sum(self.weights.values())

    @property
    def total(self) -> int:
        return self.weights_total + self.step.total

    def divided(self, shards: int) -> "Forecast":
        """The share of one of several devices that all of this is divided over."""
        weights = {name: num_bytes // shards for name, num_bytes in self.weights.items()}
        parts = {name: num_bytes // shards for name, num_bytes in self.step.parts.items()}
        return replace(self, weights=weights, step=replace(self.step, parts=parts))

    def table(self) -> str:
        """One line for each part."""
        lines = [f"memory forecast, {self.rows[0]} row(s) of {self.rows[-1]} tokens, peak in the {self.step.moment}"]
        named = {name: num_bytes for name, num_bytes in (*self.weights.items(), *self.step.parts.items()) if num_bytes}
        lines += [f"  {name:<24}{size_text(num_bytes):>12}" for name, num_bytes in named.items()]
        return "\n".join([*lines, f"  {'in all':<24}{size_text(self.total):>12}"])


def forecast_run(
    stage: str,
    training_args: TrainingArguments,
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    part_args: PartArguments,
    lora_args: LoraArguments | None = None,
    quantization: Mapping[str, Any] | None = None,
    *,
    processor: JnanaProcessor,
    rows: Dataset | IterableDataset,
    fewest_weights: int | None = None,
) -> Forecast | None:
    """
    Forecast and log the memory of run_align or run_sft; see [`check_forecast`].

    Args:
        stage (`str`): `align` or `sft`.
        training_args, model_args, data_args, run_args, part_args, lora_args: The run's.
        quantization (`Mapping`, *optional*): As for [`~jnana.training.model_setup.prepare_model`].
        processor (`JnanaProcessor`): Of the model.
        rows (`Dataset` or `IterableDataset`): The training rows.
        fewest_weights (`int`, *optional*): Models with fewer are not forecast; default: `FEWEST_WEIGHTS`.

    Returns:
        `Forecast` or `None`: `None` for a small model and, with a warning, where a step can't be traced.

    Raises:
        ValueError: if the weights alone need more memory than the device has.
    """
    config = planned_config(model_args, processor)

    def make_model() -> nn.Module:
        model = planned_model(config, model_args.dtype)
        if model_args.model_name_or_path is not None and is_adapter(model_args.model_name_or_path):
            model = get_peft_model(model, PeftConfig.from_pretrained(model_args.model_name_or_path))
        model = apply_stage(model, stage, lora_args, data_args.packing, part_args.freeze_vision_tower)
        replace_quantized(model, quantization or {}, model_args.dtype)
        return model

    def make_batch() -> dict[str, Any]:
        options = {**collator_options(data_args, training_args.output_dir), "bad_samples_file": None}
        batch = JnanaCollator(processor, **options)(longest_rows(rows, training_args.per_device_train_batch_size))
        return traceable(batch, config, data_args.feature_cache is not None)

    optimizer = partial(make_optimizer, training_args, run_args.optimizer, part_args)
    spread = model_args.device_map is not None
    return run_on_main_process(
        lambda: check_forecast(make_model, make_batch, optimizer, training_args, spread, fewest_weights)
    )


def forecast_text_run(
    training_args: TrainingArguments,
    model_args: TextModelArguments,
    run_args: RunArguments,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | IterableDataset,
    packing: str,
) -> Forecast | None:
    """As [`forecast_run`], for run_pretrain."""
    made: list[nn.Module] = []

    def make_model() -> nn.Module:
        if model_args.model_name_or_path is not None:
            config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        else:
            config = text_model_config(model_args, tokenizer)
        loading: dict[str, Any] = {"dtype": getattr(torch, model_args.dtype)}
        if model_args.attn_implementation is not None:
            loading["attn_implementation"] = model_args.attn_implementation
        made.append(apply_stage(AutoModelForCausalLM.from_config(config, **loading), "pretrain"))
        return made[-1]

    def make_batch() -> dict[str, Any]:
        with quiet():
            collator = text_collator(made[-1], packing, training_args.device)
        return collator(longest_rows(rows, training_args.per_device_train_batch_size))

    optimizer = partial(make_optimizer, training_args, run_args.optimizer, None)
    return run_on_main_process(lambda: check_forecast(make_model, make_batch, optimizer, training_args))


def check_forecast(
    make_model: Callable[[], nn.Module],
    make_batch: Callable[[], Mapping[str, Any]],
    optimizer: Callable[[nn.Module], Optimizer],
    args: TrainingArguments,
    spread: bool = False,
    fewest_weights: int | None = None,
) -> Forecast | None:
    """
    Log the forecast, and warn if the device has less.

    With FSDP and ZeRO-3 weights, gradients and the optimizer's state are divided by the number of processes; the
    layers that a process gathers while it computes are not counted. With ZeRO-1 and ZeRO-2 there is no forecast,
    because DeepSpeed's own copies depend on its settings.

    Args:
        make_model (`Callable`): Makes the model of the stage; called on the meta device.
        make_batch (`Callable`): Makes its inputs.
        optimizer (`Callable`): Makes the optimizer of a model.
        args (`TrainingArguments`): Of the run.
        spread (`bool`, *optional*, defaults to `False`): Whether one process spreads the model over its GPUs.
        fewest_weights (`int`, *optional*): As for [`forecast_run`].

    Raises:
        ValueError: if the weights alone need more memory than the device has.
    """
    sharding = sharding_of(args)
    if sharding in ("zero1", "zero2"):
        return None
    try:
        with quiet(), torch.device("meta"), unpartitioned(args, whole=True):
            model = make_model()
    except Exception as error:  # of any class: the run itself will say what is wrong
        logger.warning(f"no forecast of memory: the model can't be planned ({type(error).__name__}: {error})")
        return None
    fewest = FEWEST_WEIGHTS if fewest_weights is None else fewest_weights
    if sum(map(parameter_count, model.parameters())) < fewest:
        return None
    devices = args.n_gpu if spread else args.world_size if sharding is not None else 1
    name, available = device_memory(args.device)
    if offloads(args):
        return None
    check_weights(sum(held_bytes(model, label).values()) // devices, name, available)
    try:
        batch = make_batch()
        found = forecast(model, batch, optimizer, args)
    except Exception as error:  # of any class: what can't be traced may well train
        reason = f"{type(error).__name__}: {error}"
        logger.warning(f"no forecast of memory: a step of this model can't be traced ({reason})")
        return None
    kept = {} if sharding is None else {key: found.step.parts[key] for key in ("activations", "logits and loss")}
    added = {} if sharding is not None or args.world_size == 1 else {"DDP's buckets": found.step.parts["gradients"]}
    found = found.divided(devices)
    found = replace(found, step=replace(found.step, parts={**found.step.parts, **kept, **added}))
    logger.info(found.table())
    if available < sys.maxsize:
        judge(found, name, available, args)
    return found


def offloads(args: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed keeps weights or the optimizer's state in the memory of the host."""
    if os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() in ("1", "true"):
        return True
    plugin = args.deepspeed_plugin
    zero = plugin.deepspeed_config.get("zero_optimization", {}) if plugin is not None else {}
    devices = [zero.get(name, {}).get("device", "none") for name in ("offload_param", "offload_optimizer")]
    return any(device not in ("none", None) for device in devices)


def check_weights(num_bytes: int, name: str, available: int) -> None:
    """Refuse a run whose weights do not fit.

    Raises:
        ValueError: naming both sizes and the remedies.
    """
    if num_bytes > available:
        raise ValueError(
            f"the weights alone need {size_text(num_bytes)}, but {name} has {size_text(available)}; hold them in 16 "
            "bits (dtype: bfloat16) or in 4 (run_sft: quantization: nf4), shard them over several GPUs "
            f"({accelerate_config('fsdp2.yaml')}, or device_map: auto), or take a smaller model"
        )


def judge(found: Forecast, name: str, available: int, args: TrainingArguments) -> None:
    """Log that the peak fits, or warn that it does not, with the remedies that would help."""
    has = f"{name} has {size_text(available)}"
    if found.total <= available:
        logger.info(f"  which fits: {has}")
        return
    remedies = {
        "gradient_checkpointing: true": not args.gradient_checkpointing,
        "a smaller per_device_train_batch_size or max_row_tokens": True,
        "optim: adamw_bnb_8bit": found.step.parts["optimizer"] > found.total / 10 and "8bit" not in str(args.optim),
        "lora_r above 0 and quantization: nf4 (run_sft)": found.step.parts["gradients"] > found.total / 10,
        f"more GPUs with {accelerate_config('fsdp2.yaml')}": True,
    }
    advice = "; ".join(remedy for remedy, helps in remedies.items() if helps)
    logger.warning(f"memory: {has}, which is less than the forecast {size_text(found.total)}; it helps: {advice}")


def device_memory(device: torch.device) -> tuple[str, int]:
    """Name and bytes of the memory that the device's tensors are in; of a GPU without CUDA's own part."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory - CUDA_CONTEXT
    if not hasattr(os, "sysconf"):  # Windows
        return "this machine", sys.maxsize
    return "this machine", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def forecast(
    model: nn.Module,
    batch: Mapping[str, Any],
    optimizer: Callable[[nn.Module], Optimizer],
    training_args: TrainingArguments,
) -> Forecast:
    """
    The forecast for one process that holds the whole model.

    Args:
        model (`nn.Module`): On the meta device, after [`apply_stage`]; of no use afterwards.
        batch (`Mapping`): Its inputs.
        optimizer (`Callable`): Makes its optimizer.
        training_args (`TrainingArguments`): Of the run.
    """
    autocast = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else None
    with quiet():
        if training_args.gradient_checkpointing:
            # option and method have these names from transformers 5.23 on, the others before
            given = getattr(training_args, "activation_checkpointing_kwargs", None)
            kwargs: Any = given or training_args.gradient_checkpointing_kwargs or {"use_reentrant": False}
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({**kwargs, "preserve_rng_state": False})  # the random state has no data to be restored
        step = trace_step(
            model,
            batch,
            training_args.device,
            optimizer,
            autocast=autocast,
            accumulation_steps=training_args.gradient_accumulation_steps,
            logits_width=model.config.get_text_config().vocab_size,
        )
    return Forecast(held_bytes(model, label), step, tuple(batch["input_ids"].shape))


def label(name: str, tensor: torch.Tensor) -> str:
    """The line of the table that a weight or buffer is counted in."""
    last = name.rpartition(".")[2]
    if last.startswith(("packed_", "constants_")):
        return f"weights {last.partition('_')[2]}"
    kind = "adapter" if "lora_" in name else "weights"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {dtype}" if tensor.is_floating_point() else "buffers"


def planned_config(args: ModelArguments, processor: JnanaProcessor) -> JnanaConfig:
    """The config of the model that the arguments ask for."""
    if args.model_name_or_path is not None:
        config = load_config(args.model_name_or_path)
    else:
        trust = {"trust_remote_code": args.trust_remote_code}
        backbones = [AutoConfig.from_pretrained(name, **trust) for name in (args.vision_model, args.text_model)]
        fields = {**args.projector_fields, **image_fields(backbones[0], processor)}
        config = JnanaConfig.from_vision_text_configs(*backbones, image_token_id=processor.image_token_id, **fields)
        text = config.text_config
        text.vocab_size = max(text.vocab_size, len(processor.tokenizer))  # as `grow_embeddings`
    if args.attn_implementation is not None:
        config._attn_implementation = args.attn_implementation
    return config


def planned_model(config: JnanaConfig, dtype: str) -> JnanaForConditionalGeneration:
    """The model of a config, with weights of a dtype."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        return JnanaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)


def replace_quantized(model: nn.Module, quantization: Mapping[str, Any], dtype: str) -> None:
    """Put stand-ins in the place of the linear layers that bitsandbytes will quantise."""
    method = quantization.get("quantization", "none")
    if method == "none":
        return
    compute = getattr(torch, quantization.get("compute_dtype") or dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and part_of(name) == "language_model" and "lora_" not in name:
            parent, _, child = name.rpartition(".")
            double = quantization.get("double_quantization", True)
            stand_in = TracedLinear(module, method, double, compute)
            setattr(model.get_submodule(parent), child, stand_in)


def make_optimizer(args: TrainingArguments, name: str, part_args: PartArguments | None, model: nn.Module) -> Optimizer:
    """The optimizer that the Trainer will make, or a stand-in that keeps as much."""
    chosen = trainer_optimizer(name, model, args, part_args)
    groups = stock_groups(model, args.weight_decay) if chosen is None else chosen[1]["params"]
    groups = [group for group in groups if group["params"]]
    optim = str(getattr(args.optim, "value", args.optim))
    if name == "muon" and chosen is not None:
        return chosen[0](groups, **{key: value for key, value in chosen[1].items() if key != "params"})
    if "8bit" in optim:
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        return TracedEightBitAdamW(groups, embeddings)
    if optim not in TRACED_OPTIMIZERS:
        return AdamW(groups, fused=True)
    optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return optimizer(groups, **kwargs)


def longest_rows(rows: Dataset | IterableDataset, count: int) -> list[dict]:
    """The rows of a batch: the longest ones, of a stream the first."""
    if isinstance(rows, IterableDataset):
        return list(rows.take(count))
    if "length" not in rows.column_names:
        return [rows[index] for index in range(min(count, len(rows)))]
    lengths = rows["length"][:]
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [rows[index] for index in order[:count]]


def traceable(batch: dict[str, Any], config: JnanaConfig, stored_features: bool) -> dict[str, Any]:
    """
    A batch of [`JnanaCollator`] with the features that a cache will give.

    Args:
        batch (`dict`): The batch.
        config ([`JnanaConfig`]): The model's.
        stored_features (`bool`): Whether a feature cache gives features instead of images.
    """
    batch = dict(batch)
    if stored_features and "pixel_values" in batch:
        batch.pop("pixel_table", None)
        shape = (len(batch.pop("pixel_values")), config.num_view_features, config.vision_feature_size)
        batch["image_features"] = torch.empty(shape)
    return batch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the run itself will log about parameters and learning rates is not logged within the block."""
    loggers = [logging.getLogger(f"jnana.training.{name}") for name in ("attention", "stages", "optimizers")]
    before = [one.disabled for one in loggers]
    for one in loggers:
        one.disabled = True
    try:
        yield
    finally:
        for one, disabled in zip(loggers, before, strict=True):
            one.disabled = disabled

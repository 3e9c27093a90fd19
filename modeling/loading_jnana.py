"""Loading: the base of an adapter, and quantised language models.

run_sft saves `jnana_base.json` beside an adapter. It names the checkpoint, or the two backbones, that the adapter was
trained on, and the precision of that base. With it
`AutoModelForImageTextToText.from_pretrained(adapter_directory, trust_remote_code=True)` gives the whole model wherever
the base can be found. This file is copied into every saved checkpoint.
"""

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.utils import (
    EntryNotFoundError,
    cached_file,
    is_bitsandbytes_available,
    is_peft_available,
    logging,
)

from .configuration_jnana import PROJECTOR_FIELDS, JnanaConfig


logger = logging.get_logger(__name__)

BASE_REFERENCE = "jnana_base.json"
BASE_REFERENCE_FORMAT = 1  # the `format` of the files written now; files without the field are older and are read too

# Modules that are never quantised. transformers matches these from the start of a module's full name.
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "model.cross_attention", "lm_head"]
# The same for a bare language model, whose head GPT-NeoX calls `embed_out`.
NOT_QUANTIZED_TEXT = ["lm_head", "embed_out"]

# Arguments of `from_pretrained` about access to files. Given for an adapter, they are also used for its base.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# Arguments that select one folder of one repository; they hold for the adapter only.
REPOSITORY_ARGUMENTS = ("revision", "subfolder")


def available_device() -> torch.device:
    """
    The device that models are placed on by default.

    Returns:
        `torch.device`: The accelerator that this machine has, else the CPU. `ACCELERATE_USE_CPU=true` in the
        environment selects the CPU, as it does for `accelerate launch`.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "t", "yes", "y", "on"):
        return torch.device("cpu")
    # Without `check_available` torch names the accelerator that it was compiled for, present or not.
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def quantization_config(settings: dict[str, Any], dtype: str | torch.dtype | None = None) -> BitsAndBytesConfig | None:
    """
    The bitsandbytes configuration of a Jnana model: only linear layers of the language model are quantised.

    Args:
        settings (`dict`): `quantization` (`"none"`, `"nf4"` or `"int8"`), and for nf4 `double_quantization` (`bool`),
            `compute_dtype` and `storage_dtype` (names of dtypes).
        dtype (`str` or `torch.dtype`, *optional*): Compute dtype if `settings` has none.

    Returns:
        `BitsAndBytesConfig` or `None`: `None` for `"none"`.

    Raises:
        ImportError: If bitsandbytes is not installed.
    """
    method = settings.get("quantization", "none")
    if method == "none":
        return None
    if not is_bitsandbytes_available():
        raise ImportError(
            f"quantization is {method!r}, which needs bitsandbytes, but bitsandbytes is not installed: "
            "`pip install bitsandbytes`. Without it only `quantization: none` (16 or 32 bits a weight) is possible."
        )
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))
    compute_dtype = settings.get("compute_dtype") or dtype or "float32"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.get("double_quantization", True),
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=settings.get("storage_dtype", "uint8"),
        llm_int8_skip_modules=list(NOT_QUANTIZED),
    )


def without_parts(
    quantization: BitsAndBytesConfig | dict[str, Any] | None, skip_modules: list[str]
) -> BitsAndBytesConfig | None:
    """
    A copy of a bitsandbytes configuration by which some modules stay as they are.

    Args:
        quantization (`BitsAndBytesConfig` or `dict`, *optional*): As given to `from_pretrained`.
        skip_modules (`list[str]`): [`NOT_QUANTIZED`] for a whole model, [`NOT_QUANTIZED_TEXT`] for a language model.

    Returns:
        `BitsAndBytesConfig` or `None`: `None` for `None`.
    """
    if quantization is None:
        return None
    config = BitsAndBytesConfig(**quantization) if isinstance(quantization, dict) else copy.deepcopy(quantization)
    config.llm_int8_skip_modules = list(skip_modules)
    return config


def disable_packed_kernel(model: nn.Module) -> None:
    """
    Keep 4-bit layers on the path whose products are exact and have gradients, on every CPU.

    On a CPU with AVX512-BF16, bitsandbytes (0.50) repacks a layer's weight at the first forward in eval mode whose
    input needs no gradient. From then on it multiplies in bfloat16, by a kernel that has no backward: logits change by
    3e-3, training after an evaluation computes wrong gradients, and a layer narrower than a block raises. Without the
    kernel a layer is dequantised at each forward, as on other CPUs. The price is speed: on those CPUs generating with
    4-bit weights takes as long as on a CPU without AVX512-BF16. GPUs and int8 weights do not use the kernel.

    Args:
        model (`nn.Module`): Changed in place. Without 4-bit layers, or with those of a bitsandbytes that has no such
            kernel, nothing changes.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def adopt_quantization(model: Any, language_model: Any, skip_modules: list[str]) -> None:
    """
    Copy the quantisation attributes of a language model of 4 or 8 bits to the model that contains it, because Trainer,
    PEFT and `dequantize` read them there.

    Args:
        model (`PreTrainedModel`): The model that contains `language_model`; changed in place.
        language_model (`PreTrainedModel`): As `from_pretrained` loaded it, quantised.
        skip_modules (`list[str]`): Names, in `model`, of the modules that are not quantised.
    """
    disable_packed_kernel(language_model)
    quantizer = language_model.hf_quantizer
    quantizer.quantization_config.llm_int8_skip_modules = skip_modules
    for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(language_model, name):
            setattr(model, name, getattr(language_model, name))
    if hasattr(language_model, "hf_device_map"):
        model.hf_device_map = {"": next(iter(language_model.hf_device_map.values()))}
    model.config.quantization_config = quantizer.quantization_config
    model.config.dtype = language_model.dtype
    if hasattr(language_model.config, "quantization_config"):
        del language_model.config.quantization_config


def grow_embeddings(model: Any, rows: int) -> None:
    """
    Give the embedding at least `rows` rows; a larger one (Phi-2: 51,200 for 50,295 tokens) is left unchanged.

    New rows are the mean of the old ones, so that the base of an adapter can be built again exactly. The row of the
    image token is scaled by 17/16, which makes it unique: given `inputs_embeds` without ids, the model finds the image
    tokens by that row.

    Args:
        model ([`JnanaForConditionalGeneration`]): Changed in place.
        rows (`int`): At least as many as the tokenizer has entries.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    old = embedding.weight.shape[0]
    if rows <= old:
        return
    with torch.no_grad():
        mean_in, mean_out = embedding.weight.mean(0), head.weight.mean(0)
        mean_bias = None if head.bias is None else head.bias.mean()
        model.resize_token_embeddings(rows, mean_resizing=False)
        model.get_output_embeddings().weight[old:] = mean_out
        model.get_input_embeddings().weight[old:] = mean_in
        if model.config.image_token_id >= old:
            model.get_input_embeddings().weight[model.config.image_token_id] = mean_in * (17 / 16)
        if mean_bias is not None:
            model.get_output_embeddings().bias[old:] = mean_bias


def read_base_reference(path: str | Path, **hub_arguments: Any) -> dict[str, Any] | None:
    """
    Read `jnana_base.json`, which names the base that the adapter in `path` was trained on.

    Args:
        path (`str` or `Path`): Directory or Hub id.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... as for `from_pretrained`.

    Returns:
        `dict` or `None`: `names` (`model`, or `vision_model` and `text_model`; local ones as existing directories),
        `projector_fields`, `quantization` (settings of [`quantization_config`]) and `dtype`. `None` if `path` has no
        `jnana_base.json`, hence is not an adapter of run_sft.

    Raises:
        ValueError: If the base was a directory that does not exist any more, or the file has a newer format.
    """
    file = _find_file(path, BASE_REFERENCE, **hub_arguments)
    if file is None:
        return None
    reference = json.loads(file.read_text(encoding="utf-8"))
    written_as = reference.pop("format", BASE_REFERENCE_FORMAT)
    if written_as > BASE_REFERENCE_FORMAT:
        raise ValueError(
            f"{BASE_REFERENCE} of the adapter {str(path)!r} has format {written_as}, and this version of jnana reads "
            f"formats up to {BASE_REFERENCE_FORMAT}: update jnana, or load the directory with `trust_remote_code=True`"
        )
    names, published = reference["names"], reference.pop("base_model_id", None)
    folder = Path(path) / (hub_arguments.get("subfolder") or "")
    for key, relative_path in reference.pop("relative_paths").items():  # local bases; the other names are Hub ids
        beside = folder / relative_path
        if relative_path and beside.is_dir():
            names[key] = str(beside)
        elif published is not None:
            names[key] = published
        elif not Path(names[key]).is_dir():
            raise ValueError(
                f"the adapter {str(path)!r} was trained on {key} {names[key]!r}, which is not a directory here; bring "
                f"it back, or correct {BASE_REFERENCE} in the directory of the adapter"
            )
    return {"quantization": {"quantization": "none"}, "dtype": None, **reference}


def _find_file(path: str | Path, file: str, subfolder: str | None = None, **hub_arguments: Any) -> Path | None:
    """The local path of a file of a directory or a Hub repository, `None` if it has no such file."""
    if Path(path).is_dir():
        local = Path(path) / (subfolder or "") / file
        return local if local.is_file() else None
    try:
        return Path(cached_file(str(path), file, subfolder=subfolder or "", **hub_arguments))
    except OSError as error:
        # The repository is there without the file. cached_file() raises that directly, and from EntryNotFoundError if
        # the file is not in the cache and the Hub can't be asked.
        if isinstance(error.__cause__, EntryNotFoundError) or (error.__cause__ is None and error.errno is None):
            return None
        raise


def model_type_of(path: str | Path, **hub_arguments: Any) -> str | None:
    """`str` or `None`: The `model_type` in the config.json of a checkpoint; `None` if it has none."""
    file = _find_file(path, "config.json", **hub_arguments)
    return None if file is None else json.loads(file.read_text(encoding="utf-8")).get("model_type")


def held_dtype(stored: torch.dtype | None) -> torch.dtype | None:
    """
    The dtype that weights are held in where nobody chose one: the one they are stored in, but bfloat16 for float16,
    whose range activations of language models can exceed.
    """
    return torch.bfloat16 if stored == torch.float16 else stored


@contextmanager
def explain_missing_safetensors(name: str | Path) -> Iterator[None]:
    """Add the remedy to the error of a `from_pretrained(name, use_safetensors=True)` that finds no such file."""
    try:
        yield
    except OSError as error:
        if ".safetensors" not in str(error):
            raise
        raise OSError(
            f"{name} has no weights in safetensors, and pickled ones (pytorch_model.bin) are not read. If you trust "
            f"them, convert them once: `AutoModel.from_pretrained({str(name)!r}, use_safetensors=False)"
            ".save_pretrained(directory)`, with the class that the checkpoint needs, and its tokenizer or image "
            "processor saved beside it."
        ) from error


def weights_fingerprint(name: str | Path, **hub_arguments: Any) -> str | None:
    """
    A digest of a checkpoint's weights as they are stored, independent of the precision they are loaded in.

    Args:
        name (`str` or `Path`): Directory or Hub id.
        **hub_arguments: `token`, `cache_dir`, ... as for `from_pretrained`.

    Returns:
        `str` or `None`: Digest of the lengths of the files and of 1,024 blocks of each (4 MB at most). `None` if there
        are no safetensors files, or they can't be reached.
    """

    def find(file: str) -> Path | None:
        try:
            return _find_file(name, file, **hub_arguments)
        except OSError:  # no connection, no access: without a digest nothing is compared
            return None

    names = ["model.safetensors"]
    index = find("model.safetensors.index.json")
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    digest = hashlib.sha256()
    for file in map(find, names):
        if file is None:
            return None
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as stream:
            for start in range(0, size, max(size // 1024, 4096)):
                stream.seek(start)
                digest.update(stream.read(4096))
    return digest.hexdigest()


def check_base(reference: dict[str, Any], **hub_arguments: Any) -> None:
    """Warn if a base does not have the weights that the adapter was trained on: its answers would be wrong."""
    for key, trained_on in reference.get("fingerprints", {}).items():
        name = reference["names"][key]
        if weights_fingerprint(name, **hub_arguments) not in (trained_on, None):
            logger.warning(
                f"the weights of {key} {name!r} have changed since the adapter was trained on them, so its answers "
                f"may be wrong: restore the old weights, or name the right base in {BASE_REFERENCE}. (The same "
                "weights saved again, in other files or another dtype, also cause this warning; it is then harmless.)"
            )


def load_base(model_class: Any, reference: dict[str, Any], config: JnanaConfig, **kwargs: Any) -> Any:
    """
    Load the model that an adapter was trained on, without the adapter.

    Args:
        model_class (`type`): [`JnanaForConditionalGeneration`].
        reference (`dict`): The return value of [`read_base_reference`].
        config ([`JnanaConfig`]): The config in the directory of the adapter.
        **kwargs: For `from_pretrained`. Without `dtype` or `quantization_config` the base gets the precision that it
            had while the adapter was trained; `quantization_config=None` asks for full precision.

    Returns:
        [`JnanaForConditionalGeneration`]: The base; its projector and the blocks of cross-attention in float32, the
        dtype in which they are trained.
    """
    kwargs = {name: value for name, value in kwargs.items() if value is not None or name == "quantization_config"}
    kwargs.setdefault("dtype", reference["dtype"] or "auto")
    if "quantization_config" not in kwargs:
        compute_dtype = None if kwargs["dtype"] == "auto" else kwargs["dtype"]
        kwargs["quantization_config"] = quantization_config(reference["quantization"], compute_dtype)
    if kwargs["quantization_config"] is None:
        del kwargs["quantization_config"]
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs and name != "force_download"}
    check_base(reference, **where)
    names = reference["names"]
    if "model" in names:
        model = model_class.from_pretrained(names["model"], **kwargs)
        if model.config.tokenizer_fingerprint is None:  # a published checkpoint, whose config has none
            model.config.tokenizer_fingerprint = config.tokenizer_fingerprint
        model.config.image_end_token_id = config.image_end_token_id  # training changes IDEFICS's own
    else:
        fields = {name: getattr(config, name) for name in PROJECTOR_FIELDS}
        fields |= {name: getattr(config, name) for name in ("image_token_id", "image_size", "image_grid_pinpoints")}
        model = model_class.from_vision_text_pretrained(names["vision_model"], names["text_model"], **fields, **kwargs)
        for part in (model.config.vision_config, model.config.text_config):
            part.name_or_path = ""  # saved in config.json, it would publish the name of a directory of this machine
        model.config.tokenizer_fingerprint = config.tokenizer_fingerprint
        grow_embeddings(model, config.text_config.vocab_size)
    model.model.multi_modal_projector.float()
    if model.config.fusion == "cross_attention":
        model.model.cross_attention.float()
    return model


def load_adapter_base(
    model_class: Any, path: str, reference: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """
    An adapter's base with the generation config of the adapter's folder, ready for the adapter.

    Everything that loads an adapter goes through here: [`load_adapted`] and `jnana.load_model`.

    Args:
        model_class (`type`): [`JnanaForConditionalGeneration`].
        path (`str`): Folder or Hub id of the adapter.
        reference (`dict`): As [`read_base_reference`] gives it.
        kwargs (`dict`): As given to `from_pretrained`.

    Returns:
        `tuple`: The base, and those of `kwargs` that say where the adapter's own files are.
    """
    kwargs = dict(kwargs)
    from_hub = {name: kwargs[name] for name in (*HUB_ARGUMENTS, *REPOSITORY_ARGUMENTS) if kwargs.get(name) is not None}
    config = kwargs.pop("config", None)
    if not isinstance(config, JnanaConfig):
        config = JnanaConfig.from_pretrained(path, **from_hub)
    # The repository arguments are the adapter's, and trust was given to the adapter's code, not to its base's.
    for name in (*REPOSITORY_ARGUMENTS, "code_revision", "trust_remote_code", "adapter_kwargs", "_from_auto"):
        kwargs.pop(name, None)
    model = load_base(model_class, reference, config, **kwargs)
    adapter_config = _find_file(path, "adapter_config.json", **from_hub)
    if adapter_config is not None:
        # Parts that the adapter holds whole, projector or tower. They are trained in float32, and PEFT would round
        # them to the dtype of the base.
        for name in json.loads(adapter_config.read_text(encoding="utf-8")).get("modules_to_save") or []:
            model.model.get_submodule(name).float()
    model.generation_config = GenerationConfig.from_pretrained(path, **from_hub)
    return model, from_hub


def load_adapted(model_class: Any, path: str, reference: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    """
    See [`JnanaForConditionalGeneration.from_pretrained`], for the directory of an adapter: base, adapter and trained
    projector as one model.
    """
    kwargs = dict(kwargs)
    with_info = kwargs.pop("output_loading_info", False)
    model, from_hub = load_adapter_base(model_class, path, reference, kwargs)
    if is_peft_available():  # without this line transformers would demand PEFT of every reader of a checkpoint
        from peft import load_peft_weights, set_peft_model_state_dict
    # The files are looked up here because `load_adapter` of transformers 5.20 ignores `subfolder`. It is the one
    # adapter method that takes the PEFT releases that exist: `add_adapter` of transformers 5.24 demands PEFT 0.22.
    files = [_find_file(path, name, **from_hub) for name in ("adapter_config.json", "adapter_model.safetensors")]
    if None in files:
        raise ValueError(f"the adapter {path!r} lacks adapter_config.json or adapter_model.safetensors; save it again")
    folder = str(files[0].parent)  # type: ignore[union-attr]  # checked
    model.load_adapter(folder)
    # It rounds an adapter to the dtype of the base, though the adapter was trained in float32.
    adapter = {name: p for name, p in model.named_parameters() if ".lora_" in name or ".modules_to_save." in name}
    for parameter in adapter.values():
        parameter.data = parameter.data.float()
    weights = load_peft_weights(folder, device=str(model.device))
    prefix = "base_model.model."  # of the names in a `PeftModel`, by which adapters are saved
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    expected = {name.replace(".default.", ".").replace(".modules_to_save.", ".") for name in adapter}
    missing, unexpected = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
    if missing:
        raise ValueError(f"the adapter {path!r} lacks weights: {missing[:3]}, ...; save it again")
    set_peft_model_state_dict(model, weights)
    model.requires_grad_(False)
    model.eval()
    info = {"missing_keys": set(), "unexpected_keys": set(unexpected), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if with_info else model


def quantized_weight_count(weight: nn.Parameter) -> int:
    """`int`: How many numbers a weight holds; bitsandbytes packs two of 4 bits into a byte."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return state.shape.numel()
    if type(weight).__name__ == "Params4bit":
        return weight.numel() * 2 * weight.element_size()
    return weight.numel()

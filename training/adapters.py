"""What lies beside an adapter: the record of its base, the code and config that make the folder load by itself.

PEFT saves the adapter's weights; `jnana.modeling.loading_jnana`, which travels with every checkpoint,
reads the record.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.peft_utils import find_adapter_config_file

from jnana.modeling import BASE_REFERENCE, read_base_reference, weights_fingerprint

from .arguments import LoraArguments, ModelArguments


def is_adapter(path: str) -> bool:
    """Whether `path` is an adapter folder (or an adapter repository on the Hub; offline, one in the cache)."""
    return find_adapter_config_file(path) is not None


def adapter_reference(path: str) -> dict[str, Any]:
    """The base of the adapter `path`; see [`read_base_reference`].

    Raises:
        ValueError: if the adapter was not written by run_sft, or its base is a folder that is not there any more.
    """
    reference = read_base_reference(path)
    if reference is None:
        raise ValueError(f"the adapter {path!r} has no {BASE_REFERENCE}, so its base is unknown; run_sft writes one")
    return reference


def quantization_settings(args: LoraArguments, model_args: ModelArguments) -> dict[str, Any]:
    """How the base is held in this run: as the options say or, continuing an adapter, as it was held before.

    Raises:
        ValueError: if the options contradict the adapter that is continued.
    """
    wanted: dict[str, Any] = {"quantization": args.quantization or "none"}
    if args.quantization == "nf4":
        wanted["double_quantization"] = args.double_quantization
        wanted["storage_dtype"] = args.quantization_storage_dtype
    compute_dtype = {"compute_dtype": args.quantization_compute_dtype or model_args.dtype}
    path = model_args.model_name_or_path
    if path is None or not is_adapter(path):
        return wanted if wanted["quantization"] != "nf4" else {**wanted, **compute_dtype}
    present = adapter_reference(path)["quantization"]
    if args.quantization is not None:
        for name, value in wanted.items():
            if present.get(name) != value and name != "storage_dtype":
                raise ValueError(
                    f"{name} is {value!r}, but the adapter {path!r} to continue was trained with "
                    f"{present.get(name)!r}; leave it out, or merge that adapter (run_merge.py) and start from the "
                    "merged checkpoint"
                )
    return {**present, **compute_dtype} if present["quantization"] == "nf4" else present


def base_reference(args: ModelArguments, lora_args: LoraArguments | None = None) -> dict[str, Any]:
    """What an adapter trained with these arguments rests on, as [`write_base_reference`] writes it.

    Either one Jnana checkpoint (`model`), or a pair built on the spot (`vision_model`, `text_model`), whose projector
    needs no checkpoint of its own as the adapter folder holds the trained one.
    """
    lora_args = lora_args or LoraArguments()
    held = {"quantization": quantization_settings(lora_args, args), "dtype": args.dtype}
    if args.model_name_or_path is None:
        names = {"vision_model": args.vision_model, "text_model": args.text_model}
        reference = {"names": names, "projector_fields": args.projector_fields}
    elif is_adapter(args.model_name_or_path):  # a further round on the same adapter: its base is the old one's
        reference = adapter_reference(args.model_name_or_path)
    else:
        reference = {"names": {"model": args.model_name_or_path}, "projector_fields": {}}
    if lora_args.base_model_id is not None:
        reference["base_model_id"] = lora_args.base_model_id
    return {**reference, **held}


def with_fingerprints(reference: dict[str, Any]) -> dict[str, Any]:
    """`reference` with a digest of the base's weights, so that another base under its name is noticed."""
    if "fingerprints" in reference:  # a further round's: the base is the first one's
        return reference
    found = {key: weights_fingerprint(name) for key, name in reference["names"].items()}
    return {**reference, "fingerprints": {key: digest for key, digest in found.items() if digest is not None}}


def write_base_reference(reference: dict[str, Any], folder: str | Path, published: bool = False) -> None:
    """Write `reference` beside an adapter, with the way from the adapter's folder to a local base.

    `published` keeps this machine's folders out of it: of a local base it names the Hub id given as `base_model_id`,
    or else the last part, and the way only if the base lies close by.
    """
    names = dict(reference["names"])
    relative = {key: os.path.relpath(name, folder) for key, name in names.items() if Path(name).is_dir()}
    if published:
        names = {key: Path(name).name if key in relative else name for key, name in names.items()}
        relative = {key: way if Path(way).parts.count("..") <= 2 else "" for key, way in relative.items()}
    if "base_model_id" in reference and "model" in names:
        names["model"] = reference["base_model_id"]
    text = json.dumps({**reference, "names": names, "relative_paths": relative}, indent=2, sort_keys=True)
    (Path(folder) / BASE_REFERENCE).write_text(text + "\n", encoding="utf-8")


def complete_adapter_folder(
    model: PeftModel, reference: dict[str, Any], folder: str | Path, published: bool = False
) -> None:
    """Put beside an adapter what it takes to load it without this package: base record, configs and code.

    Args:
        model (`PeftModel`): The adapted model.
        reference (`dict`): As [`base_reference`] gives it.
        folder (`str` or `Path`): Where the adapter was saved.
        published (`bool`, defaults to `False`): As for [`write_base_reference`].
    """
    inner = model.get_base_model()
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the base's affair, and in the base record
    config.architectures = [type(inner).__name__]
    config.save_pretrained(folder)
    custom_object_save(inner, folder)
    inner.generation_config.save_pretrained(folder)
    write_base_reference(reference, folder, published)

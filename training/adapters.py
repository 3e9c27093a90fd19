"""Writes the files beside an adapter: the record of its base, and the code and configs with which the folder loads.

PEFT saves the adapter's weights. `jnana.modeling.loading_jnana`, which is copied into every checkpoint, reads the
record.
"""

import copy
import json
import os
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils.peft_utils import find_adapter_config_file

from jnana.modeling import BASE_REFERENCE, BASE_REFERENCE_FORMAT, read_base_reference, weights_fingerprint

from .options.arguments import LoraArguments, ModelArguments


def is_adapter(path: str, **hub_arguments: Any) -> bool:
    """Whether `path` is an adapter folder, or an adapter repository on the Hub (offline: one in the cache).

    Args:
        path (`str`): Folder or Hub id.
        **hub_arguments: `revision`, `subfolder`, `token`, `cache_dir`, ... as for `from_pretrained`.
    """
    return find_adapter_config_file(path, **hub_arguments) is not None


def adapter_reference(path: str, **hub_arguments: Any) -> dict[str, Any]:
    """The base of the adapter `path`; arguments and result as for [`read_base_reference`].

    Raises:
        ValueError: if the adapter was not written by run_sft, or its base is a folder that is not there any more.
    """
    reference = read_base_reference(path, **hub_arguments)
    if reference is None:
        raise ValueError(f"the adapter {path!r} has no {BASE_REFERENCE}, so its base is unknown; run_sft writes one")
    return reference


def quantization_settings(args: LoraArguments, model_args: ModelArguments) -> dict[str, Any]:
    """How this run holds the base: as the options say or, when an adapter is continued, as it was held before.

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
    """The base of an adapter trained with these arguments, in the form that [`write_base_reference`] writes.

    The base is one Jnana checkpoint (`model`), or two backbones that the run joins (`vision_model`, `text_model`). The
    latter's projector needs no checkpoint: the adapter folder holds the trained one.
    """
    lora_args = lora_args or LoraArguments()
    held = {"quantization": quantization_settings(lora_args, args), "dtype": args.dtype}
    if args.model_name_or_path is None:
        names = {"vision_model": args.vision_model, "text_model": args.text_model}
        reference = {"names": names, "projector_fields": args.projector_fields}
    elif is_adapter(args.model_name_or_path):  # a further round on an adapter, whose base stays the same
        reference = adapter_reference(args.model_name_or_path)
    else:
        reference = {"names": {"model": args.model_name_or_path}, "projector_fields": {}}
    if lora_args.base_model_id is not None:
        reference["base_model_id"] = lora_args.base_model_id
    return {**reference, **held}


def with_fingerprints(reference: dict[str, Any]) -> dict[str, Any]:
    """`reference` with digests of the base's weights, by which other weights under the same name are noticed."""
    if "fingerprints" in reference:  # of the first round, whose base this is
        return reference
    found = {key: weights_fingerprint(name) for key, name in reference["names"].items()}
    return {**reference, "fingerprints": {key: digest for key, digest in found.items() if digest is not None}}


def write_base_reference(reference: dict[str, Any], folder: str | Path, published: bool = False) -> None:
    """Write `reference` beside an adapter, with relative paths to local bases.

    Args:
        reference (`dict`): As [`base_reference`] gives it.
        folder (`str` or `Path`): Of the adapter.
        published (`bool`, defaults to `False`): Leave out this machine's folders: a local base is named by its Hub id
            (`base_model_id`) or the last part of its path, and a relative path is kept only if it is short.
    """
    names = dict(reference["names"])
    relative = {key: os.path.relpath(name, folder) for key, name in names.items() if Path(name).is_dir()}
    if published:
        names = {key: Path(name).name if key in relative else name for key, name in names.items()}
        relative = {key: path if Path(path).parts.count("..") <= 2 else "" for key, path in relative.items()}
    if "base_model_id" in reference and "model" in names:
        names["model"] = reference["base_model_id"]
    record = {**reference, "format": BASE_REFERENCE_FORMAT, "names": names, "relative_paths": relative}
    text = json.dumps(record, indent=2, sort_keys=True)
    (Path(folder) / BASE_REFERENCE).write_text(text + "\n", encoding="utf-8")


def complete_adapter_folder(
    model: PeftModel, reference: dict[str, Any], folder: str | Path, published: bool = False
) -> None:
    """Write the files with which an adapter loads without this package: base record, configs and code.

    Args:
        model (`PeftModel`): The adapted model.
        reference (`dict`): As [`base_reference`] gives it.
        folder (`str` or `Path`): Of the adapter.
        published (`bool`, defaults to `False`): As for [`write_base_reference`].
    """
    inner = model.get_base_model()
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the base and is in the base's record
    config.architectures = [type(inner).__name__]
    config.save_pretrained(folder)
    custom_object_save(inner, folder)
    inner.generation_config.save_pretrained(folder)
    write_base_reference(reference, folder, published)


class BaseReferenceCallback(TrainerCallback):
    """Writes beside each adapter checkpoint its base's record and the code, so that every `checkpoint-N` loads."""

    def __init__(self, reference: dict[str, Any]):
        self.reference = reference

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            complete_adapter_folder(model, self.reference, folder, published=args.push_to_hub)

"""Records the options and the data of a run, and refuses to resume it with others.

The Trainer resumes with whatever options it is given: some are ignored (the learning rate is read from the
checkpoint), some mix two recipes in one run (data, packing, seed), some end in an error inside torch (parts that
train). So a run writes `recipe_record.json` into its output directory when it starts to train, and compares when it
resumes.
"""

import dataclasses
import enum
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import TrainingArguments

from jnana.processing.data.files import remove_unfinished, write_whole
from jnana.processing.data.rows import TOKEN_FEATURES

from .arguments import RunArguments
from .sources import is_list, source_entries


logger = logging.getLogger(__name__)

RECORD_FILE = "recipe_record.json"
RECORD_FORMAT = 1
SHARDS = "shards of a stream: "  # begins the fingerprint of a stream
SAMPLED_ROWS = 256  # of the training data, for its fingerprint

# Options that change neither the weights nor the order of the data. All others must stay as they were.
FREE_PREFIXES = ("ddp_", "do_", "eval_", "hub_", "log_", "logging_", "push_", "sample_", "save_", "torch_", "trackio_")
FREE = {
    *("accelerator_config", "activation_checkpointing", "activation_checkpointing_kwargs", "allow_changed"),
    *("attn_implementation", "auto_find_batch_size", "base_model_id", "batch_eval_metrics", "bf16_full_eval"),
    *("dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_persistent_workers"),
    *("data_cache", "dataloader_pin_memory", "dataloader_prefetch_factor", "dataset_num_proc", "debug", "deepspeed"),
    *("device_map", "disable_tqdm"),
    *("enable_jit_checkpoint", "feature_cache", "fp16_full_eval", "fsdp", "fsdp_config", "full_determinism"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "greater_is_better", "ignore_data_skip"),
    *("image_check", "include_for_metrics", "include_num_input_tokens_seen", "label_names", "liger_kernel_config"),
    *("load_best_model_at_end", "local_rank", "max_eval_rows", "merge_adapter", "merge_base"),
    *("metric_for_best_model", "output_dir", "overwrite_output_dir", "parallelism_config"),
    *("per_device_eval_batch_size", "prediction_loss_only", "project", "remove_unused_columns", "report_to"),
    *("restore_callback_states_from_checkpoint", "resume_from_checkpoint", "run_name", "skip_memory_metrics"),
    *("tf32", "trust_remote_code", "use_cache", "use_cpu", "use_liger_kernel"),
}
# Only a constant learning rate does not depend on the planned number of steps.
LENGTH = ("max_steps", "num_train_epochs")
CONSTANT_SCHEDULES = ("constant", "constant_with_warmup")
PROCESSES = "num_processes"  # not an option of the scripts: `accelerate launch` has it
PRECISION = "mixed_precision"  # also from accelerate's file
# The optimizer and the schedule are restored with the checkpoint, these values too, so that new ones have no effect.
RESTORED = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "projector_learning_rate")
RESTORED += ("vision_learning_rate",)


def recipe_options(*arguments: Any) -> dict[str, Any]:
    """The options of a run that decide its weights, as JSON holds them.

    Args:
        arguments: The parsed dataclasses, [`TrainingArguments`] among them.
    """
    options: dict[str, Any] = {}
    for of_class in arguments:
        for name in (field.name for field in dataclasses.fields(of_class) if field.init):
            if not is_free(name):
                value = getattr(of_class, name)
                options[name] = source_entries(name, value) if name == "train_data" and is_list(value) else value
        if isinstance(of_class, TrainingArguments):
            options[PROCESSES] = of_class.world_size
            options[PRECISION] = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if not options.get("streaming"):  # the rows of a stream are dealt out to the workers
        options.pop("dataloader_num_workers", None)
    return json.loads(json.dumps(options, default=_as_text))


def is_free(name: str) -> bool:
    """Whether an option may change when a run is resumed."""
    return name in FREE or name.startswith(FREE_PREFIXES)


def allowed_changes(run_args: RunArguments) -> set[str]:
    """The names in `allow_changed`, separated by spaces or commas."""
    return {name for names in run_args.allow_changed or () for name in names.split(",") if name}


def check_same_recipe(checkpoint: str | None, options: dict[str, Any], run_args: RunArguments) -> None:
    """Check that a run is resumed with the options that it was started with.

    Args:
        checkpoint (`str`, *optional*): The checkpoint to resume from.
        options (`dict`): [`recipe_options`] of this start.
        run_args (`RunArguments`): `allow_changed`.

    Raises:
        ValueError: naming each option that differs, both values, and the remedies; or a name in `allow_changed` that
            is not an option.
    """
    known, allowed = {*options, *LENGTH, "dataloader_num_workers"}, allowed_changes(run_args)
    restored = sorted(allowed & set(RESTORED))
    if restored:
        raise ValueError(
            f"allow_changed names {', '.join(restored)}, which a resumed run reads from its checkpoint, so that "
            "another value has no effect; give the run's own value, or start a new run from its weights "
            "(model_name_or_path)"
        )
    wrong = sorted(allowed - known)
    if wrong:
        raise ValueError(f"allow_changed names {', '.join(wrong)}, which is not an option that has to stay the same")
    if checkpoint is None:
        return
    record = read_record(checkpoint)
    if record is None:
        logger.warning(
            f"{Path(checkpoint).parent} has no {RECORD_FILE} (a run of an older version), so that changed options are "
            "not noticed; resume with the options that the run was started with"
        )
        return
    saved = record["options"]
    if options.get("lr_scheduler_type") in CONSTANT_SCHEDULES:
        allowed |= set(LENGTH)
    shared = [name for name in options if name in saved]
    changed = [name for name in shared if not _same(saved[name], options[name])]
    for name in changed:
        if name in allowed:
            logger.info(f"{name} was {_shown(saved[name])} and is {_shown(options[name])} from here on")
    refused = [name for name in changed if name not in allowed]
    if refused:
        differences = "; ".join(
            f"{name} {_shown(saved[name])}, this run has {_shown(options[name])}" for name in refused
        )
        text = f"{checkpoint} was trained with {differences}. {_remedy(refused)}"
        if set(refused) & set(LENGTH):
            text += f" The learning rate depends on the length of the run: {_last_rate(checkpoint)}."
        raise ValueError(text)


def check_same_data(checkpoint: str, fingerprint: str, run_args: RunArguments) -> None:
    """Check that a run is resumed with the training data that it was started with.

    Args:
        checkpoint (`str`): The checkpoint to resume from.
        fingerprint (`str`): [`data_fingerprint`] of the training data.
        run_args (`RunArguments`): `train_data` in its `allow_changed` permits other data.

    Raises:
        ValueError: naming the numbers of rows and the remedies.
    """
    saved = (read_record(checkpoint) or {}).get("data")
    if saved is None or saved == fingerprint or "train_data" in allowed_changes(run_args):
        return
    if saved.startswith(SHARDS) and fingerprint.startswith(SHARDS):
        before, now = saved.removeprefix(SHARDS), fingerprint.removeprefix(SHARDS)
        raise ValueError(
            f"{checkpoint} was trained on a stream of other shards of train_data: {before}, now {now}. "
            f"{_remedy(['train_data'])}"
        )
    before, now = (text.partition(":")[0] for text in (saved, fingerprint))
    what = f"{before} rows, now {now}" if before != now else f"{before} rows, some of which have changed"
    raise ValueError(f"{checkpoint} was trained on other rows of train_data: {what}. {_remedy(['train_data'])}")


def data_fingerprint(rows: Dataset | IterableDataset) -> str:
    """A text that is equal for equal training data: the number of rows and a digest of rows at equal distances.

    Images count by file name. Of a stream, whose rows nobody has read yet, the number of its shards is all there is:
    it tells added files, but not changed ones.

    Args:
        rows (`Dataset` or `IterableDataset`): The training rows, after checks and packing.
    """
    if isinstance(rows, IterableDataset):
        return f"{SHARDS}{rows.num_shards}"
    digest = hashlib.sha256()
    for index in sorted({index * len(rows) // SAMPLED_ROWS for index in range(SAMPLED_ROWS)}):
        digest.update(json.dumps(_without_directories(rows[index]), sort_keys=True, default=_as_text).encode())
    return f"{len(rows)}:{digest.hexdigest()}"


def write_record(
    output_dir: str,
    options: dict[str, Any],
    fingerprint: str | None,
    save_total_limit: int | None = None,
    manifests_after: int = 0,
) -> None:
    """Write the record of a run that starts to train; one process calls this.

    Args:
        output_dir (`str`): Of the run.
        options (`dict`): [`recipe_options`].
        fingerprint (`str`, *optional*): [`data_fingerprint`] of the training data.
        save_total_limit (`int`, *optional*): As the user gave it; the Trainer is not told.
        manifests_after (`int`, defaults to 0): The last step of which a version without manifests may have written a
            checkpoint; 0 for a run that starts anew. What the record says already stays.
    """
    path = Path(output_dir) / RECORD_FILE
    if manifests_after > 0:
        manifests_after = (read_record(str(path)) or {}).get("manifests_after", manifests_after)
    record = {
        "format": RECORD_FORMAT,
        "options": options,
        "data": fingerprint,
        "save_total_limit": save_total_limit,
        "manifests_after": manifests_after,
    }
    remove_unfinished(path)  # the run holds the directory
    write_whole(path, json.dumps(record, indent=1, ensure_ascii=False).encode())


def read_record(checkpoint: str) -> dict[str, Any] | None:
    """The record of the run that wrote `checkpoint`, or `None` if it wrote none that this version reads."""
    path = Path(checkpoint).parent / RECORD_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["format"] == RECORD_FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shown(value: Any) -> str:
    return "not given" if value is None else repr(value)


def _remedy(names: Sequence[str]) -> str:
    allowed = [name for name in names if name not in RESTORED]
    allow = f"`--allow_changed {' '.join(allowed)}` to go on with the new ones, " if allowed == list(names) else ""
    return f"Give the run's own values, or {allow}another output_dir, or overwrite_output_dir: true to start anew."


def _last_rate(checkpoint: str) -> str:
    """The learning rate that was logged last before a checkpoint, in words."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    last = f"it was {rates[-1]:.3g} at step {state['global_step']}" if rates else f"step {state['global_step']}"
    return f"{last}, and would jump to the new schedule's value there"


def _same(saved: Any, value: Any) -> bool:
    """Equal values, or two spellings of one path; in lists of sources too."""
    if saved == value:
        return True
    if isinstance(saved, dict) and isinstance(value, dict):
        return saved.keys() == value.keys() and all(_same(saved[key], value[key]) for key in saved)
    if isinstance(saved, list) and isinstance(value, list):
        return len(saved) == len(value) and all(map(_same, saved, value))
    paths = isinstance(saved, str) and isinstance(value, str) and os.path.exists(saved) and os.path.exists(value)
    return paths and os.path.samefile(saved, value)


def _without_directories(value: Any) -> Any:
    """A row in which each image is its file name, or the size of its bytes: data sets may be moved. Its tokens, which
    follow from the rest, are left out."""
    if isinstance(value, dict):
        return {
            key: os.path.basename(item) if key == "path" and item else _without_directories(item)
            for key, item in value.items()
            if key not in TOKEN_FEATURES
        }
    if isinstance(value, (list, tuple)):
        return [_without_directories(item) for item in value]
    return f"{len(value)} bytes" if isinstance(value, bytes) else value


def _as_text(value: Any) -> str:
    return str(value.value) if isinstance(value, enum.Enum) else str(value)

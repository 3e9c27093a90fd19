"""Finding the checkpoint to go on from after a run was cut off.

A run killed while it wrote leaves a folder `checkpoint-N` with half a file in it. The Trainer would take it for the
last checkpoint and stop with an error, or worse, start from half the weights. So each folder is opened before it is
trusted, and a broken one is passed over for the one before.
"""

import json
import logging
import re
import shutil
import struct
import zipfile
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jnana.modeling.loading_jnana import quantized_weight_count

from .optimizers import MuonWithAdamW


logger = logging.getLogger(__name__)


def checkpoint_to_resume(output_dir: str, resume_from_checkpoint: str | None, overwrite: bool = False) -> str | None:
    """Decide where training starts.

    Args:
        output_dir (`str`): The run's folder.
        resume_from_checkpoint (`str`, *optional*): A folder named by the user; it must be whole.
        overwrite (`bool`, defaults to `False`): Start anew. The run's old checkpoints must then be deleted (see
            [`delete_checkpoints`]), or the next automatic resume would find them.

    Returns:
        `str` or `None`: The checkpoint folder to hand to `Trainer.train`, `None` to start from the beginning.

    Raises:
        ValueError: if the named checkpoint is not whole, or both options are given.
    """
    if overwrite and resume_from_checkpoint:
        raise ValueError(
            f"overwrite_output_dir is true and resume_from_checkpoint is {resume_from_checkpoint!r}; give only one"
        )
    if overwrite:
        return None
    if resume_from_checkpoint and resume_from_checkpoint.lower() not in ("true", "auto", "last"):
        problem = checkpoint_problem(Path(resume_from_checkpoint))
        if problem:
            raise ValueError(f"resume_from_checkpoint {resume_from_checkpoint!r} cannot be used: {problem}")
        return resume_from_checkpoint
    for folder in list_checkpoints(output_dir):
        problem = checkpoint_problem(folder)
        if problem is None:
            logger.info(f"resuming from {folder} (overwrite_output_dir: true would start anew)")
            return str(folder)
        logger.warning(f"{folder} is passed over: {problem}")
    if resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint is {resume_from_checkpoint!r}, but {output_dir!r} holds no whole checkpoint-N; "
            "leave it out to start from the beginning"
        )
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The `checkpoint-N` folders of a run, the latest first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [folder for folder in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)]
    return sorted(numbered, key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)


def delete_checkpoints(output_dir: str) -> None:
    for folder in list_checkpoints(output_dir):
        logger.info(f"deleting {folder}, as overwrite_output_dir is true")
        shutil.rmtree(folder)


def checkpoint_problem(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or `None` if it is whole.

    The Trainer writes `trainer_state.json` last, so a folder without it was cut off. Tensor files are checked by their
    own tables of contents, without reading the tensors.
    """
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or incomplete"
    weights = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{index.name} is incomplete"
        missing = sorted(shards - {file.name for file in weights})
        if missing:
            return f"{missing[0]} is missing"
    # FSDP writes pytorch_model_fsdp.bin and optimizer.bin, or a folder for each, complete when it has its .metadata;
    # DeepSpeed writes global_stepN, complete when `latest` names it
    shards = [path for name in ("pytorch_model_fsdp_*", "optimizer_*") for path in sorted(folder.glob(name))]
    deepspeed = sorted(folder.glob("global_step*"))
    if not weights and not shards and not deepspeed and not (folder / "pytorch_model_fsdp.bin").is_file():
        return "it holds no weights"
    for file in weights:
        if not safetensors_is_whole(file):
            return f"{file.name} is truncated"
    saved_by_torch = [*folder.glob("*.pt"), *folder.glob("*.pth"), *folder.glob("*.bin")]
    for file in sorted(saved_by_torch):
        if not zipfile.is_zipfile(file):
            return f"{file.name} is truncated"
    for path in shards:
        if path.is_dir() and not (path / ".metadata").is_file():
            return f"{path.name} is incomplete"
    if deepspeed and not (folder / "latest").is_file():
        return "`latest` is missing"
    optimizers = ("optimizer.pt", "optimizer.bin", "optimizer_0")
    if not deepspeed and not any((folder / name).exists() for name in optimizers):
        return "optimizer.pt is missing (was it saved with save_only_model?)"
    return None


def safetensors_is_whole(file: Path) -> bool:
    """Whether the file is as long as its header says: 8 bytes of length, the JSON header, then the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            return False
        header_size = struct.unpack("<Q", start)[0]
        if 8 + header_size > size:
            return False
        try:
            header = json.loads(stream.read(header_size))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return size == 8 + header_size + max(ends, default=0)


# Numbers that an optimizer of the Trainer's surely keeps for each weight that trains. Of others nothing is counted.
NUMBERS_KEPT = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), 2),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), 1),
    **dict.fromkeys(("rmsprop", "adagrad"), 1),
}


def check_disk_space(trainer: Trainer, merge: bool = False) -> None:
    """Refuse a run whose first checkpoint surely cannot fit, before it trains; warn where all it will keep may not.

    Args:
        trainer (`Trainer`): Of the run.
        merge (`bool`, defaults to `False`): Whether `output_dir/merged` is written at the end.

    Raises:
        ValueError: naming `output_dir`, what a checkpoint takes, what is free, and checkpoints that are not whole.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if not args.should_save:
        return
    weights = weights_size(trainer)
    checkpoint = weights if args.save_only_model else weights + resuming_size(trainer)
    # what is there already is written over: checkpoints that were cut off, and final files
    present = list_checkpoints(args.output_dir)
    broken = [] if args.save_only_model else [path for path in present if checkpoint_problem(path)]
    final = max(weights - bytes_of(folder.glob("*.safetensors")), 0)
    merged = max(merged_size(trainer.model) - bytes_of(folder.glob("merged/*")), 0) if merge else 0
    free, held = shutil.disk_usage(folder).free, sum(bytes_of(path.rglob("*")) for path in broken)
    # the new checkpoint is written before the oldest goes
    whole = len(present) - len(broken)
    kept = whole if args.save_total_limit is None else args.save_total_limit
    new = 0 if str(args.save_strategy.value) == "no" else max(kept + 1 - whole, 1)
    first, wanted = checkpoint if new else final, checkpoint * new + final + merged
    room = f"output_dir {args.output_dir!r} has {size(free)} free"
    if broken:
        names = ", ".join(path.name for path in broken)
        room += f", and {size(held)} in checkpoints that are not whole and may be deleted ({names})"
    if free + held < first:
        what = f"one checkpoint ({size(weights)} of weights, the rest the optimizer's)" if new else "the final weights"
        raise ValueError(f"{room}, but needs at least {size(first)} for {what}; make room, or choose another")
    if free + held < wanted:
        last = f"the final weights, and {size(merged)} for the merged model" if merge else "and the final weights"
        logger.warning(
            f"{room}; the run may need {size(wanted)} (at least {size(checkpoint)} a checkpoint, save_total_limit "
            f"{args.save_total_limit}, one more while it is written, {last})"
        )


def weights_size(trainer: Trainer) -> int:
    """Bytes of the weights that a checkpoint holds: an adapter's and what trains beside it, or all."""
    adapter = isinstance(trainer.model, PeftModel)
    held = [p for p in trainer.model.parameters() if p.requires_grad or not adapter]
    if trainer.is_deepspeed_enabled:  # in 16 bits, whatever the model was loaded in
        return sum(count(p) * min(p.element_size(), 2) for p in held)
    return sum(count(p) * p.element_size() for p in held)


def resuming_size(trainer: Trainer) -> int:
    """Bytes that a checkpoint holds at least beside the weights, so that training can go on: the optimizer's, mostly.

    ZeRO's own copies of the weights are not counted: how many there are is up to its stage and settings.
    """
    deepspeed, fsdp = trainer.accelerator.state.deepspeed_plugin, trainer.is_fsdp_enabled
    chosen, arguments = trainer.optimizer_cls_and_kwargs or (None, {})
    copy = 0
    if fsdp and "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        copy = weights_size(trainer)  # once more, in FSDP's own form
    if deepspeed is not None and "optimizer" in deepspeed.deepspeed_config:
        return copy  # not the recipe's optimizer
    if chosen is MuonWithAdamW:  # a momentum for hidden matrices, AdamW's two numbers for the others
        groups = arguments["params"]
        return copy + sum(count(p) * (4 if group["muon"] else 8) for group in groups for p in group["params"])
    name = trainer.args.optim.value
    trained = sum(count(p) for p in trainer.model.parameters() if p.requires_grad)
    return copy + trained * NUMBERS_KEPT.get(name, 0) * (1 if "8bit" in name else 4)


def merged_size(model: PeftModel) -> int:
    """Bytes of the whole model in full precision, about: the adapter's own weights are counted in."""
    base = model.get_base_model()
    return sum(map(count, base.parameters())) * base.dtype.itemsize


def count(parameter: nn.Parameter) -> int:
    """How many numbers a weight stands for, packed in 4 bits or cut over the processes as it may be."""
    return getattr(parameter, "ds_numel", None) or quantized_weight_count(parameter)


def bytes_of(paths) -> int:
    """Bytes of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def size(num_bytes: float) -> str:
    """Bytes as people read them: `75 kB`, `1.2 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= step:
            return f"{num_bytes / step:,.0f} {unit}" if num_bytes >= 10 * step else f"{num_bytes / step:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"

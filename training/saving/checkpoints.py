"""The checkpoints of a run on disk: which one to resume from, which are broken, and whether the next ones fit.

A run killed while it writes leaves a directory `checkpoint-N` with incomplete files. The Trainer would take it for the
last checkpoint and stop with an error, or start from half of the weights. So each checkpoint is verified before it is
used, and a broken one is skipped for the one before it.

A checkpoint of this version is complete when it has a manifest (`manifests.py`), which is written last and by which
changed bytes are noticed too. One of an older version is judged by the names and sizes of its files.
"""

import json
import logging
import re
import shutil
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path

from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from jnana.training.options.recipe_record import read_record
from jnana.training.stages import parameter_count

from .manifests import MANIFEST, PassingProblem, manifest_problem


logger = logging.getLogger(__name__)

DELETED = f"deleted-{PREFIX_CHECKPOINT_DIR}-"  # a checkpoint is renamed so before its files are deleted
ADAMW_BYTES = 8  # two float32 values for each trained parameter


def checkpoint_to_resume(output_dir: str, resume_from_checkpoint: str | None, overwrite: bool = False) -> str | None:
    """Decide where training starts.

    Args:
        output_dir (`str`): The run's directory.
        resume_from_checkpoint (`str`, *optional*): A directory named by the user; the checkpoint must be complete.
        overwrite (`bool`, defaults to `False`): Start anew. The run's old checkpoints must then be deleted (see
            [`delete_checkpoints`]), or the next automatic resume would find them.

    Returns:
        `str` or `None`: The checkpoint directory for `Trainer.train`, `None` to start from the beginning.

    Raises:
        ValueError: if the named checkpoint is not complete, both options are given, or there are checkpoints but none
            that can be resumed from. A run that was killed while it wrote its first one starts anew.
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
    lost: list[str] = []
    for folder in list_checkpoints(output_dir):
        problem = checkpoint_problem(folder)
        if problem is None:
            logger.info(f"resuming from {folder} (overwrite_output_dir: true would start anew)")
            return str(folder)
        logger.warning(f"{folder} is skipped: {problem}")
        if not is_unfinished(folder):
            lost.append(f"{folder.name}: {problem}")
    if lost:
        raise ValueError(
            f"output_dir {output_dir!r} has checkpoints, but none to resume from ({'; '.join(lost)}). To start from "
            "the beginning give another output_dir, or overwrite_output_dir: true, which deletes them"
        )
    if resume_from_checkpoint:
        raise ValueError(
            f"resume_from_checkpoint is {resume_from_checkpoint!r}, but {output_dir!r} has no complete checkpoint-N; "
            "leave it out to start from the beginning"
        )
    return None


def list_checkpoints(output_dir: str) -> list[Path]:
    """The `checkpoint-N` directories of a run, the latest first."""
    folders = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = [folder for folder in folders if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)]
    return sorted(numbered, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step of a `checkpoint-N`."""
    return int(folder.name.rsplit("-", 1)[1])


def delete_checkpoints(output_dir: str) -> None:
    """Delete every `checkpoint-N` of a run."""
    for folder in list_checkpoints(output_dir):
        logger.info(f"deleting {folder}, as overwrite_output_dir is true")
        remove_checkpoint(folder)
    remove_leftovers(output_dir)


def remove_leftovers(output_dir: str) -> None:
    """Delete the rest of checkpoints whose deletion was interrupted."""
    for folder in Path(output_dir).glob(f"{DELETED}*"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint; its new name says so, should the deletion be interrupted."""
    target = folder.with_name(f"{DELETED}{step_of(folder)}")
    shutil.rmtree(target, ignore_errors=True)
    try:
        folder.rename(target)
    except OSError:  # on Windows a file in it is open
        target = folder
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / "trainer_state.json").unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)


def is_unfinished(folder: Path) -> bool:
    """Whether the run wrote manifests and was ended before it had written this checkpoint's."""
    if (folder / MANIFEST).is_file():
        return False
    numbered = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", folder.name)
    after = (read_record(str(folder)) or {}).get("manifests_after")
    return numbered is not None and after is not None and step_of(folder) > after


def checkpoint_problem(folder: Path, read: bool = True, with_optimizer: bool = True) -> str | None:
    """Why a checkpoint cannot be resumed from, or `None` if it is complete.

    A manifest is written last, so a directory without it is incomplete if its run writes manifests. In those of older
    versions `trainer_state.json` is last, and tensor files are checked by the sizes in their headers.

    Args:
        folder (`Path`): `checkpoint-N`.
        read (`bool`, defaults to `True`): Read all files and compare their digests; `False` compares sizes.
        with_optimizer (`bool`, defaults to `True`): Whether one without an optimizer has a problem.
    """
    if not folder.is_dir():
        return "the directory does not exist"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return "trainer_state.json is missing or incomplete"
    except OSError as error:
        return PassingProblem(f"trainer_state.json cannot be read ({error.strerror})")
    if is_unfinished(folder):
        return f"it was not finished ({MANIFEST} is missing)"
    if (folder / MANIFEST).is_file():
        problem = manifest_problem(folder, read)
        if problem:
            return problem
    weights = sorted(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"{index.name} is incomplete"
        missing = sorted(shards - {file.name for file in weights})
        if missing:
            return f"{missing[0]} is missing"
    # FSDP writes pytorch_model_fsdp.bin and optimizer.bin, or a directory for each, complete when it has .metadata;
    # DeepSpeed writes global_stepN, complete when `latest` names it
    shards = [path for name in ("pytorch_model_fsdp_*", "optimizer_*") for path in sorted(folder.glob(name))]
    deepspeed = sorted(folder.glob("global_step*"))
    if not weights and not shards and not deepspeed and not (folder / "pytorch_model_fsdp.bin").is_file():
        return "the directory holds no weights"
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
    if with_optimizer and not deepspeed and not any((folder / name).exists() for name in optimizers):
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


def check_disk_space(trainer: Trainer, merge: bool = False) -> None:
    """Raise if the weights of the first checkpoint do not fit on the disk; warn if all that the run keeps may not.

    The error counts weights only, which are surely written. The warning adds what AdamW keeps for each trained
    parameter; most other optimizers keep less. Copies of the weights that FSDP and DeepSpeed add are not counted.

    Args:
        trainer (`Trainer`): The run's.
        merge (`bool`, defaults to `False`): Whether `output_dir/merged` is written at the end.

    Raises:
        ValueError: naming `output_dir`, the bytes needed and free, and broken checkpoints that may be deleted.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if not args.should_save:
        return
    weights, checkpoint = weights_size(trainer), checkpoint_size(trainer)
    # broken checkpoints and the final files of an earlier start are deleted or overwritten
    present = list_checkpoints(args.output_dir)
    broken = [] if args.save_only_model else [path for path in present if checkpoint_problem(path, read=False)]
    final = max(weights - bytes_of(folder.glob("*.safetensors")), 0)
    merged = max(merged_size(trainer.model) - bytes_of(folder.glob("merged/*")), 0) if merge else 0
    free, held = shutil.disk_usage(folder).free, sum(bytes_of(path.rglob("*")) for path in broken)
    # a new checkpoint is written before the oldest is deleted
    complete = len(present) - len(broken)
    kept = complete if args.save_total_limit is None else args.save_total_limit
    new = 0 if args.save_strategy == "no" else max(kept + 1 - complete, 1)
    first, wanted = weights if new else final, checkpoint * new + final + merged
    room = f"output_dir {args.output_dir!r} has {size_text(free)} free"
    if broken:
        names = ", ".join(path.name for path in broken)
        room += f", and {size_text(held)} in broken checkpoints that may be deleted ({names})"
    if free + held < first:
        what = "the weights of one checkpoint" if new else "the final weights"
        raise ValueError(f"{room}, but needs at least {size_text(first)} for {what}; make room, or choose another")
    if free + held < wanted:
        last = f"the final weights, and {size_text(merged)} for the merged model" if merge else "and the final weights"
        logger.warning(
            f"{room}; the run may need {size_text(wanted)} (about {size_text(checkpoint)} a checkpoint, "
            f"save_total_limit {args.save_total_limit}, one more while it is written, {last})"
        )


def weights_size(trainer: Trainer) -> int:
    """Bytes of the weights in a checkpoint: the trained parameters of an adapter, or all parameters."""
    adapter = isinstance(trainer.model, PeftModel)
    held = [p for p in trainer.model.parameters() if p.requires_grad or not adapter]
    if trainer.is_deepspeed_enabled:  # in 16 bits, whatever the model was loaded in
        return sum(parameter_count(p) * min(p.element_size(), 2) for p in held)
    return sum(parameter_count(p) * p.element_size() for p in held)


def checkpoint_size(trainer: Trainer) -> int:
    """Bytes of a checkpoint with AdamW's state."""
    trained = sum(parameter_count(p) for p in trainer.model.parameters() if p.requires_grad)
    return weights_size(trainer) + (0 if trainer.args.save_only_model else trained * ADAMW_BYTES)


def merged_size(model: PeftModel) -> int:
    """Bytes of the merged model, about: the adapter's own weights are counted too."""
    base = model.get_base_model()
    return sum(map(parameter_count, base.parameters())) * base.dtype.itemsize


def bytes_of(paths: Iterable[Path]) -> int:
    """Bytes of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def size_text(num_bytes: float) -> str:
    """A number of bytes with a unit: `75 kB`, `1.2 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= step:
            return f"{num_bytes / step:,.0f} {unit}" if num_bytes >= 10 * step else f"{num_bytes / step:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"

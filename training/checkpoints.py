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

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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

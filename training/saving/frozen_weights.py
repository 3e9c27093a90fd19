"""Checkpoints of a stage with frozen weights: what trains is written each time, the rest once.

A `checkpoint-N` holds two files of weights and their index, as transformers writes a large model. The frozen file is
written with the first checkpoint of a run; the later ones hold a hard link to it, which takes no space and no time. So
each checkpoint is whole for every reader: `from_pretrained` in any process, the Trainer's resume and
`load_best_model_at_end`, the Hub. Where there are no hard links, the file is written each time.
"""

import contextlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Trainer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


logger = logging.getLogger(__name__)

FROZEN_FILES = "frozen_files"  # in the index's metadata


class SharedFrozenWeights:
    """Saves a model in `checkpoint-N` directories of one run, with its frozen weights linked to one file.

    Args:
        model (`PreTrainedModel`): With `requires_grad` set for the stage.
        checkpoint (`str`, *optional*): The checkpoint that the run resumes from, with which it shares the frozen file.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: str | None = None):
        self.model = model
        self.original = model.save_pretrained
        self.source = None if checkpoint is None else Path(checkpoint)

    def save(self, save_directory: str, is_main_process: bool = True, **kwargs: Any) -> None:
        """`save_pretrained`, by which the Trainer saves."""
        folder = Path(save_directory)
        if not re.fullmatch(r"checkpoint-\d+", folder.name) or kwargs.get("state_dict") is not None:
            self.original(save_directory, is_main_process=is_main_process, **kwargs)
            return
        if not is_main_process:
            return
        kwargs.pop("state_dict", None)
        folder.mkdir(parents=True, exist_ok=True)
        for file in [*folder.glob("model*.safetensors"), folder / SAFE_WEIGHTS_INDEX_NAME]:
            file.unlink(missing_ok=True)  # of a broken checkpoint; writing into a link would change all of them
        state = self.model.state_dict()
        names = frozen_names(self.model)
        trained = {name: tensor for name, tensor in state.items() if name not in names}
        self.original(save_directory, is_main_process=True, state_dict=trained, **kwargs)
        parts = list(folder.glob("model*.safetensors"))
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            shared = self.linked(Path(temporary), names)
            if not shared:
                frozen = {name: tensor for name, tensor in state.items() if name in names}
                self.original(temporary, is_main_process=True, state_dict=frozen, **kwargs)
                shared = sorted(Path(temporary).glob("model*.safetensors"))
            join(folder, sorted(parts), shared)
        self.source = folder

    def linked(self, folder: Path, names: set[str]) -> list[Path]:
        """Links in `folder` to the frozen files of the last checkpoint; none if it has none, or can't be linked to."""
        if self.source is None:
            return []
        links = []
        with contextlib.suppress(OSError, ValueError, KeyError):
            index = json.loads((self.source / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
            files = index["metadata"][FROZEN_FILES]
            held = {name for name, file in index["weight_map"].items() if file in files}
            if held and held <= names and not (names & set(index["weight_map"])) - held:
                for file in files:
                    os.link(self.source / file, folder / file)
                    links.append(folder / file)
                return links
        return []


def frozen_names(model: PreTrainedModel) -> set[str]:
    """The names in the state dict of all parameters that do not train, tied ones included."""
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if not weight.requires_grad}


def join(folder: Path, trained: list[Path], frozen: list[Path]) -> None:
    """Move files of weights into one directory under the names of shards, and write their index."""
    files = [*trained, *frozen]
    targets = [folder / f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    weight_map, size = {}, 0
    for file, target in zip(files, targets, strict=True):
        os.replace(file, target)
        size += target.stat().st_size
        with safe_open(target, framework="pt") as tensors:
            weight_map |= dict.fromkeys(tensors.keys(), target.name)
    metadata = {"total_size": size, FROZEN_FILES: [target.name for target in targets[len(trained) :]]}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def shared_frozen_weights(trainer: Trainer, checkpoint: str | None = None) -> Iterator[None]:
    """Within the block, checkpoints of a model with frozen weights share their file.

    Adapters hold nothing frozen, and FSDP and DeepSpeed write the weights themselves.

    Args:
        trainer (`Trainer`): Of the run.
        checkpoint (`str`, *optional*): What the run resumes from.
    """
    model = trainer.model
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    offloaded = any(weight.is_meta for weight in model.parameters())  # by a device_map; transformers gathers them
    if not isinstance(model, PreTrainedModel) or sharded or offloaded or not frozen_names(model):
        yield
        return
    model.save_pretrained = SharedFrozenWeights(model, checkpoint).save  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.save_pretrained  # of this object; the class keeps its own


def shares_frozen_weights(folder: str | Path) -> bool:
    """Whether the weights of a checkpoint lie in files that train and files that do not."""
    try:
        index = json.loads((Path(folder) / SAFE_WEIGHTS_INDEX_NAME).read_text(encoding="utf-8"))
        return FROZEN_FILES in index["metadata"]
    except (OSError, ValueError, KeyError):
        return False


def checkpoint_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint with shared frozen weights, by name."""
    tensors = {}
    for file in sorted(Path(folder).glob("model-*.safetensors")):
        tensors |= load_file(file)
    return tensors


def copy_whole_weights(folder: str | Path, target: str | Path) -> None:
    """Write all weights of a checkpoint with shared frozen weights as one file, as at the end of a run."""
    save_file(checkpoint_tensors(folder), Path(target) / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

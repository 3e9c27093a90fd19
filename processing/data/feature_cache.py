"""Vision features of a frozen tower, computed once and kept on disk: the format, and how it is read.

A cache is a folder that holds

    cache.json                  what the features depend on besides the picture: the tower's weights, the image
                                processor's settings, layers, strategy, dtype, and their shape
    features-*.safetensors      `features` (num_images, num_image_tokens, vision_feature_size) and `digests`
                                (num_images, 32), the SHA-256 of each image file's bytes
    files.jsonl                 which file had which digest, with the size and time of change it had then

Features are found by the bytes of the picture, so a picture that occurs twice is stored once, one that is renamed is
found again, and one that changed is not. To spare reading each file in every epoch, a file whose size and time of
change are as noted is taken to hold the bytes it held then; any other is read and hashed. (So a file exchanged for
another of the same size *and* time goes unnoticed. Embedded pictures are always hashed.)

Parts are memory-mapped, never read whole; each is written under another name and renamed when it is complete, so that
what has a part's name is a whole part. Nothing is pickled. `training/feature_cache.py` builds caches: that needs the
model.
"""

import hashlib
import json
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .images import load_image, read_image_bytes
from .rows import BadSampleError, bad_sample


FORMAT = 1
KEY_FILE = "cache.json"
FILES_FILE = "files.jsonl"
PART_PATTERN = "features-*.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class FeatureCache:
    """
    Looks up vision features; can be sent to dataloader workers. For [`JnanaCollator`] it stands in for `PixelImages`.

    Args:
        folder (`str` or `Path`): a cache that `jnana.training.feature_cache` wrote.

    Attributes:
        made_with (`dict`): what the features depend on besides the picture.
        shape (`tuple[int, int]`): (num_image_tokens, vision_feature_size).
        dtype (`torch.dtype`): of the stored features.

    Raises:
        ValueError: if the folder is no such cache, or a part of it is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.made_with = read_key(self.folder)
        self.shape: tuple[int, int] = tuple(self.made_with["shape"])  # type: ignore[assignment]
        self.dtype = DTYPES[self.made_with["dtype"]]
        self.refresh()

    def refresh(self) -> None:
        """Read the list of stored pictures anew, after parts were added."""
        self._open_parts: dict[str, Any] = {}
        self._places: dict[bytes, tuple[str, int]] = {}
        for path in sorted(self.folder.glob(PART_PATTERN)):
            part = self._open(path.name)
            stored = part.get_slice("features").get_shape()[1:]
            if tuple(stored) != self.shape:
                raise ValueError(
                    f"feature_cache {str(self.folder)!r}: {path.name} holds features of shape {tuple(stored)}, but "
                    f"{KEY_FILE} says {self.shape}. Delete the folder; the next run builds it anew"
                )
            digests = part.get_tensor("digests").numpy()
            for row, digest in enumerate(digests):
                self._places.setdefault(digest.tobytes(), (path.name, row))
        self._files = _read_files(self.folder / FILES_FILE)

    def __len__(self) -> int:
        """The number of pictures stored."""
        return len(self._places)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open_parts": {}}  # a worker maps the files by itself

    def known_digest(self, path: str) -> bytes | None:
        """The digest of a file that is as it was when it was hashed; `None` if it is not, or was never seen."""
        noted = self._files.get(path)
        return noted[2] if noted is not None and noted[:2] == file_stamp(path) else None

    def digest(self, image: dict, source: str = "image") -> bytes:
        """
        The digest of an image's bytes.

        Args:
            image (`dict`): a row's reference, `{"path": str | None, "bytes": bytes | None}`.
            source (`str`, *optional*): file and record that refer to it, for the error.

        Raises:
            BadSampleError: if it can't be read.
        """
        if image["bytes"] is not None or not image["path"]:
            return image_digest(read_image_bytes(image, source=source))
        path = os.path.abspath(image["path"]) if "://" not in image["path"] else image["path"]
        digest = self.known_digest(path)
        if digest is None:
            stamp = file_stamp(path)  # before reading: if the file changes meanwhile, it will be hashed again
            digest = image_digest(read_image_bytes(image, source=source))
            if stamp is not None:
                self._files[path] = (*stamp, digest)
        return digest

    def key(self, image: dict) -> Hashable:
        """What two references to one image have in common; with the next three, the collator's door to pictures."""
        return image["bytes"] if image["bytes"] is not None else image["path"]

    def load(self, image: dict, source: str = "image") -> torch.Tensor:
        """
        An image's features.

        Args:
            image (`dict`): a row's reference.
            source (`str`, *optional*): file and record that refer to it, for the error.

        Returns:
            `torch.Tensor` of shape `(num_image_tokens, vision_feature_size)`.

        Raises:
            BadSampleError: if it can't be read, or is not stored.
        """
        digest = self.digest(image, source)
        if digest not in self._places:
            raise self._not_stored(image, source)
        part, row = self._places[digest]
        return self._open(part).get_slice("features")[row]

    def blank(self) -> torch.Tensor:
        """Features for a batch without a good row."""
        return torch.zeros(self.shape, dtype=self.dtype)

    def stack(self, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Args:
            images (`list[torch.Tensor]`): as [`~FeatureCache.load`] gave them.

        Returns:
            `dict[str, torch.Tensor]`: the model's `image_features`
                `(num_images, num_image_tokens, vision_feature_size)`; of no images too, which tells the model that
                other processes have stored features, so that it does not run the tower to keep up with them.
        """
        return {"image_features": torch.stack(images) if images else torch.empty(0, *self.shape, dtype=self.dtype)}

    def _not_stored(self, image: dict, source: str) -> BadSampleError:
        load_image(image, source=source)  # a file that is broken says so itself
        name = f"image {image['path']!r}" if image["path"] else "embedded image"
        return bad_sample(
            source,
            f"{name} is not in the feature cache {str(self.folder)!r}; it changed after the cache was built.",
            "Start the run again: it adds what is missing.",
        )

    def _open(self, part: str) -> Any:
        """A part, memory-mapped; its header says how long the file must be."""
        if part not in self._open_parts:
            path = self.folder / part
            try:
                self._open_parts[part] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"feature_cache {str(self.folder)!r}: {part} is truncated or corrupt ({error}). Delete that file "
                    "and start the run again: it computes its pictures anew"
                ) from error
        return self._open_parts[part]


def image_digest(data: bytes) -> bytes:
    """SHA-256 of an image file's bytes (32 `bytes`)."""
    return hashlib.sha256(data).digest()


def read_key(folder: str | Path) -> dict[str, Any]:
    """
    What the features in a cache depend on besides the picture.

    Raises:
        ValueError: if the folder is not a cache of this format.
    """
    path = Path(folder) / KEY_FILE
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"feature_cache {str(folder)!r} is not a feature cache: no readable {KEY_FILE} in it"
        ) from error
    if key.get("format") != FORMAT:
        raise ValueError(
            f"feature_cache {str(folder)!r} has format {key.get('format')}, this version reads {FORMAT}; give another "
            "folder, or delete this one"
        )
    return key


def write_key(folder: str | Path, key: dict[str, Any]) -> None:
    """Begin a cache: its folder and `cache.json`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    unfinished = Path(folder) / f".{KEY_FILE}.{os.getpid()}"
    unfinished.write_text(json.dumps(key, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(unfinished, Path(folder) / KEY_FILE)


def key_differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """
    In what two keys differ.

    Args:
        stored (`dict`): the cache's.
        wanted (`dict`): the run's.

    Returns:
        `list[str]`: one text a field, with both values; nested fields as `image_processor.size`.
    """
    differences = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += key_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append(f"{prefix}{name} is {old!r} in the cache, {new!r} in this run")
    return differences


def write_part(folder: str | Path, digests: list[bytes], features: torch.Tensor) -> Path:
    """
    Add features to a cache, all or none of them.

    Args:
        folder (`str` or `Path`): the cache.
        digests (`list[bytes]`): of the images' bytes.
        features (`torch.Tensor` of shape `(num_images, num_image_tokens, vision_feature_size)`): in the same order.

    Returns:
        `Path`: the new part, named after what it holds.
    """
    name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    path = Path(folder) / PART_PATTERN.replace("*", name)
    unfinished = Path(folder) / f".{path.name}.{os.getpid()}"
    flat = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
    with open(unfinished, "wb") as file:  # not `save_file`, whose files no other user may read
        file.write(save({"features": features.contiguous(), "digests": flat}))
        file.flush()
        os.fsync(file.fileno())  # the name must not come to the disk before the contents
    os.replace(unfinished, path)
    return path


def delete_unfinished(folder: str | Path) -> None:
    """Delete what a killed process left half written; only while no other process writes here."""
    for path in Path(folder).glob(f".{PART_PATTERN}.*"):
        path.unlink(missing_ok=True)


def note_files(folder: str | Path, noted: list[tuple[str, tuple[int, int], bytes]]) -> None:
    """
    Note the digests of files; several processes may do so at once.

    Args:
        folder (`str` or `Path`): the cache.
        noted (`list[tuple[str, tuple[int, int], bytes]]`): absolute path, (size, time of change) when it was read,
            digest.
    """
    lines = [
        json.dumps({"path": path, "size": stamp[0], "mtime_ns": stamp[1], "sha256": digest.hex()}) + "\n"
        for path, stamp, digest in noted
    ]
    descriptor = os.open(Path(folder) / FILES_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # a leading line break, because a killed process may have left half a line; one write, so that none mix
        os.write(descriptor, ("\n" + "".join(lines)).encode("utf-8"))
    finally:
        os.close(descriptor)


def file_stamp(path: str) -> tuple[int, int] | None:
    """Size in bytes and time of change in nanoseconds; `None` if there is no such file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _read_files(path: Path) -> dict[str, tuple[int, int, bytes]]:
    files: dict[str, tuple[int, int, bytes]] = {}
    if not path.is_file():
        return files
    with open(path, encoding="utf-8") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
                files[entry["path"]] = (entry["size"], entry["mtime_ns"], bytes.fromhex(entry["sha256"]))
            except (ValueError, KeyError, TypeError):
                continue  # a line that a killed process did not finish
    return files


def weights_digest(module: torch.nn.Module, values_per_tensor: int | None = None) -> str:
    """
    SHA-256 over the names, dtypes, shapes and values of a module's tensors as they are in memory, in hexadecimal.

    It differs from `weights_fingerprint` in `modeling/loading_jnana.py`, which reads a checkpoint's files and is the
    same in whatever dtype the weights are then loaded.

    Args:
        module (`torch.nn.Module`): Any model or part of one.
        values_per_tensor (`int`, *optional*): Read about this many values of each tensor, evenly spaced, which is
            faster for a large model; default: all.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):  # settings of a quantised layer
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.is_meta:  # FSDP loads the weights on one process only
            return "not loaded on this process"
        values = tensor.detach().reshape(-1)
        if values_per_tensor is not None:
            values = values[:: max(1, values.numel() // values_per_tensor)]
        digest.update(values.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()

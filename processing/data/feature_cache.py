"""Format and reader of the feature cache: the vision features of a frozen tower, computed once and kept on disk.

A cache is a directory with these files:

    cache.json                  the cache key: all that the features depend on besides the image (the tower's weights,
                                the image processor's settings, layers, strategy, dtype), and their shape
    features-*.safetensors      `features` (num_views, num_view_features, vision_feature_size) and `digests`
                                (num_images, 32), the SHA-256 of each image file's bytes; where images are cut into
                                tiles also `num_views` (num_images,) and `image_sizes` (num_images, 2), their (height,
                                width) in pixels
    files.jsonl                 the digest of each image file, with its size and modification time when it was hashed

An image is one view, or with `image_grid_pinpoints` several: the whole image and its tiles. Features are looked up by
the bytes of the image. So an image that occurs twice is stored once, a renamed image is
found, and a changed one is not. To avoid reading each file in every epoch, the stored digest is used for a file whose
size and modification time are unchanged; any other file is read and hashed. (A file replaced by another of the same
size *and* time is therefore not noticed. Embedded images are always hashed.)

The feature files are called parts. They are memory-mapped, never read whole. Each part is written under a temporary
name and renamed when it is complete, so a file with a part's name is complete. Nothing is pickled.
`training/feature_cache.py` builds caches, which needs the model.
"""

import hashlib
import json
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .files import file_stamp, write_whole
from .images import load_image, read_image_bytes
from .records import read_json_lines
from .rows import BadSampleError, bad_sample


FORMAT = 1
KEY_FILE = "cache.json"
FILES_FILE = "files.jsonl"
PART_PATTERN = "features-*.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class StoredImage:
    """
    An image as the cache has it.

    Args:
        features (`torch.Tensor` of shape `(num_views, num_view_features, vision_feature_size)`): of all its views.
        size (`tuple[int, int]`, *optional*): (height, width) of the image in pixels; not stored where an image is one
            view.
    """

    features: torch.Tensor
    size: tuple[int, int] | None = None


class FeatureCache:
    """
    Loads images for the collator, as stored vision features. Has the methods of `PixelImages`; can be pickled and sent
    to dataloader workers.

    Args:
        folder (`str` or `Path`): a cache that `jnana.training.feature_cache` wrote.

    Attributes:
        made_with (`dict`): the cache key, see [`read_key`].
        shape (`tuple[int, int]`): (num_view_features, vision_feature_size).
        dtype (`torch.dtype`): of the stored features.

    Raises:
        ValueError: if the directory is not a feature cache, or a part is truncated.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.made_with = read_key(self.folder)
        self.shape: tuple[int, int] = tuple(self.made_with["shape"])  # type: ignore[assignment]
        self.dtype = DTYPES[self.made_with["dtype"]]
        self.refresh()

    def refresh(self) -> None:
        """Read the list of stored images again, after parts were added."""
        self._open_parts: dict[str, Any] = {}
        # Of each image the part, the rows in it (from, up to), and the size
        self._stored: dict[bytes, tuple[str, int, int, tuple[int, int] | None]] = {}
        for path in sorted(self.folder.glob(PART_PATTERN)):
            part = self._open(path.name)
            stored = part.get_slice("features").get_shape()[1:]
            if tuple(stored) != self.shape:
                raise ValueError(
                    f"feature_cache {str(self.folder)!r}: {path.name} holds features of shape {tuple(stored)}, but "
                    f"{KEY_FILE} has shape {self.shape}. Delete the directory; the next run builds it again"
                )
            digests = part.get_tensor("digests").numpy()
            counts, sizes = [1] * len(digests), [None] * len(digests)
            if self.has_tiles:
                counts = part.get_tensor("num_views").tolist()
                sizes = [tuple(size) for size in part.get_tensor("image_sizes").tolist()]
            row = 0
            for digest, count, size in zip(digests, counts, sizes, strict=True):
                self._stored.setdefault(digest.tobytes(), (path.name, row, row + count, size))
                row += count
        self._files = _read_files(self.folder / FILES_FILE)

    @property
    def has_tiles(self) -> bool:
        """Whether images are cut into tiles, so that they have several views."""
        return self.made_with.get("image_grid_pinpoints") is not None

    def __len__(self) -> int:
        """The number of stored images."""
        return len(self._stored)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._stored

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open_parts": {}}  # each worker maps the files itself

    def known_digest(self, path: str) -> bytes | None:
        """The stored digest of a file, or `None` if the file has changed since or was never hashed."""
        entry = self._files.get(path)
        return entry[2] if entry is not None and entry[:2] == file_stamp(path) else None

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
            stamp = file_stamp(path)  # taken before reading, so that a file that changes meanwhile is hashed again
            digest = image_digest(read_image_bytes(image, source=source))
            if stamp is not None:
                self._files[path] = (*stamp, digest)
        return digest

    def key(self, image: dict) -> Hashable:
        """A key that is equal for two references to one image."""
        return image["bytes"] if image["bytes"] is not None else image["path"]

    def load(self, image: dict, source: str = "image") -> StoredImage:
        """
        An image's features.

        Args:
            image (`dict`): a row's reference.
            source (`str`, *optional*): file and record that refer to it, for the error.

        Returns:
            `StoredImage`: the features of all its views, and where images are cut into tiles its size.

        Raises:
            BadSampleError: if the image can't be read or has no stored features.
        """
        digest = self.digest(image, source)
        if digest not in self._stored:
            raise self._not_stored(image, source)
        part, start, end, size = self._stored[digest]
        return StoredImage(self._open(part).get_slice("features")[start:end], size)

    def size(self, image: StoredImage) -> tuple[int, int] | None:
        """(height, width) in pixels of an image from [`~FeatureCache.load`]; `None` where an image is one view."""
        return image.size

    def blank(self, size: tuple[int, int], num_views: int) -> StoredImage:
        """
        Zeros, of the type that [`~FeatureCache.load`] returns.

        Args:
            size (`tuple[int, int]`): (height, width) in pixels.
            num_views (`int`): the number of views that an image of this size has.
        """
        return StoredImage(torch.zeros(num_views, *self.shape, dtype=self.dtype), size if self.has_tiles else None)

    def stack(self, images: list[StoredImage]) -> dict[str, Any]:
        """
        The model inputs of the images of a batch.

        Args:
            images (`list[StoredImage]`): from [`~FeatureCache.load`].

        Returns:
            `dict[str, Any]`: `image_features` `(num_views, num_view_features, vision_feature_size)`, and where images
                are cut into tiles `image_sizes`, a list of (height, width) in pixels. Without images the features
                have no entries but are present: they tell the model that other processes have stored features too, so
                that it need not run the tower to stay in step with them.
        """
        if not images:
            return {"image_features": torch.empty(0, *self.shape, dtype=self.dtype)}
        inputs = {"image_features": torch.cat([image.features for image in images])}
        if self.has_tiles:
            inputs["image_sizes"] = [image.size for image in images]
        return inputs

    def _not_stored(self, image: dict, source: str) -> BadSampleError:
        load_image(image, source=source)  # raises the more specific error of a broken file
        name = f"image {image['path']!r}" if image["path"] else "embedded image"
        return bad_sample(
            source,
            f"{name} is not in the feature cache {str(self.folder)!r}; it changed after the cache was built.",
            "Start the run again: it adds missing images.",
        )

    def _open(self, part: str) -> Any:
        """A part, memory-mapped. safetensors compares the file's size with its header."""
        if part not in self._open_parts:
            path = self.folder / part
            try:
                self._open_parts[part] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"feature_cache {str(self.folder)!r}: {part} is truncated or corrupt ({error}). Delete that file "
                    "and start the run again: it computes the images in it again"
                ) from error
        return self._open_parts[part]


def image_digest(data: bytes) -> bytes:
    """SHA-256 of an image file's bytes (32 `bytes`)."""
    return hashlib.sha256(data).digest()


def read_key(folder: str | Path) -> dict[str, Any]:
    """
    The cache key: all that the features in a cache depend on besides the image.

    Raises:
        ValueError: if the directory is not a cache of this format.
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
            "directory, or delete this one"
        )
    return key


def write_key(folder: str | Path, key: dict[str, Any]) -> None:
    """Create a cache: the directory and its `cache.json`."""
    write_whole(Path(folder) / KEY_FILE, (json.dumps(key, indent=2, sort_keys=True) + "\n").encode())


def key_differences(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """
    The differences between two cache keys.

    Args:
        stored (`dict`): of the cache.
        wanted (`dict`): of the run.

    Returns:
        `list[str]`: one text for each field that differs, with both values; nested fields as `image_processor.size`.
    """
    differences = []
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += key_differences(old, new, f"{prefix}{name}.")
        elif old != new:
            differences.append(f"{prefix}{name} is {old!r} in the cache, {new!r} in this run")
    return differences


def write_part(folder: str | Path, digests: list[bytes], images: list[StoredImage]) -> Path:
    """
    Add features to a cache as one part. A killed process leaves no incomplete part.

    Args:
        folder (`str` or `Path`): the cache.
        digests (`list[bytes]`): of the images' bytes.
        images (`list[StoredImage]`): in the same order, with their sizes where they are cut into tiles.

    Returns:
        `Path`: the new part, named by a hash of the digests.
    """
    name = hashlib.sha256(b"".join(digests)).hexdigest()[:16]
    path = Path(folder) / PART_PATTERN.replace("*", name)
    unfinished = Path(folder) / f".{path.name}.{os.getpid()}"
    flat = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
    tensors = {"features": torch.cat([image.features for image in images]), "digests": flat}
    sizes = [image.size for image in images if image.size is not None]
    if sizes:
        tensors["num_views"] = torch.tensor([len(image.features) for image in images])
        tensors["image_sizes"] = torch.tensor(sizes)
    try:
        with open(unfinished, "wb") as file:  # `save_file` creates files that other users can't read
            file.write(save(tensors))
            file.flush()
            os.fsync(file.fileno())  # the content must be on disk before the file is renamed
    except OSError:
        unfinished.unlink(missing_ok=True)  # a full disk needs the room
        raise
    os.replace(unfinished, path)
    return path


def delete_unfinished(folder: str | Path) -> None:
    """Delete the temporary files of killed processes. No other process may be writing to the cache."""
    for path in Path(folder).glob(f".{PART_PATTERN}.*"):
        path.unlink(missing_ok=True)


def append_file_digests(folder: str | Path, digests: list[tuple[str, tuple[int, int], bytes]]) -> None:
    """
    Store the digests of files. Several processes may append at once.

    Args:
        folder (`str` or `Path`): the cache.
        digests (`list[tuple[str, tuple[int, int], bytes]]`): absolute path, (size, modification time) when the file
            was read, digest.
    """
    lines = [
        json.dumps({"path": path, "size": stamp[0], "mtime_ns": stamp[1], "sha256": digest.hex()}) + "\n"
        for path, stamp, digest in digests
    ]
    descriptor = os.open(Path(folder) / FILES_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        # Starts with a line break, because a killed process may have left an incomplete line. A single write, which
        # the operating system does not interleave with others.
        os.write(descriptor, ("\n" + "".join(lines)).encode("utf-8"))
    finally:
        os.close(descriptor)


def _read_files(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Size, modification time and digest of each file in `files.jsonl`."""
    files: dict[str, tuple[int, int, bytes]] = {}
    for entry in read_json_lines(path, torn="skip"):
        try:
            files[entry["path"]] = (entry["size"], entry["mtime_ns"], bytes.fromhex(entry["sha256"]))
        except (ValueError, KeyError, TypeError):
            continue  # the incomplete line of a killed process can also be valid JSON, such as a number
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

"""Builds the cache of a frozen tower's features before training: the tower encodes each image once.

The cache's format, and how the collator reads it, are in `processing/data/feature_cache.py`. This module does what
needs the model: it identifies the weights that the features come from and computes missing features. It may be killed
at any time: finished parts stay, and the next start computes the rest. The processes of one run share the work; a
second run that wants the same directory waits until the first run has finished.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import TrainingArguments

from jnana.modeling import normalize_pixels
from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, PixelImages, check_image
from jnana.processing.data.feature_cache import (
    DTYPES,
    FORMAT,
    KEY_FILE,
    FeatureCache,
    StoredImage,
    append_file_digests,
    delete_unfinished,
    file_stamp,
    image_digest,
    key_differences,
    read_key,
    weights_digest,
    write_key,
    write_part,
)
from jnana.processing.data.images import MAX_IMAGE_PIXELS, read_image_bytes
from jnana.processing.data.rows import iterate_rows, viewed_rows

from .distributed import ProcessGroup, process_group
from .options.arguments import DataArguments
from .saving.checkpoints import size_text
from .saving.interruption import full_disk_error, is_full_disk


logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
BATCH_SIZE = 32  # views
# A part is written when it has this size or age, so that a kill costs little work.
PART_BYTES = 256 * 1024 * 1024
PART_SECONDS = 120.0


@dataclass
class ImageLocation:
    """The data set, the row and the image's index in that row, and the number of views that the tower encodes."""

    data_set: int
    row: int
    index: int
    num_views: int = 1


def prepare_feature_cache(
    args: DataArguments,
    model: nn.Module,
    processor: JnanaProcessor,
    data: list[Dataset | None],
    training_args: TrainingArguments,
) -> FeatureCache | None:
    """
    The feature cache of a run, complete for every image of its data.

    Args:
        args (`DataArguments`): `feature_cache`, `feature_cache_dtype`, `on_bad_sample`, `max_image_pixels`.
        model (`PreTrainedModel` or `PeftModel`): After [`apply_stage`], before the Trainer has wrapped it.
        processor (`JnanaProcessor`): Its image processor prepares the images.
        data (`list[Dataset]`): Training and validation data (rows, conversations or packed rows), or `None`.
        training_args (`TrainingArguments`): Device, precision, processes, dataloader workers.

    Returns:
        `FeatureCache` or `None`: `None` without `feature_cache`.

    Raises:
        ValueError: If the tower trains, the directory holds features of another tower, image processor or choice of
            layers, the disk is too small, or the processes don't share the directory.
        BadSampleError: With `on_bad_sample="raise"`, if an image can't be read.
    """
    if args.feature_cache is None:
        return None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    check_frozen(base.model.vision_tower)
    key = feature_key(base, processor, training_args, args.feature_cache_dtype, args.jpeg_draft)
    builder = _Builder(
        args, base.model, processor, [viewed_rows(rows) for rows in data if rows is not None], training_args
    )
    with process_group() as group:
        return builder.run(key, group)


def check_frozen(tower: nn.Module) -> None:
    """Check that the tower is frozen.

    Raises:
        ValueError: naming the number of its trainable parameters, and the remedy.
    """
    trainable = sum(parameter.requires_grad for parameter in tower.parameters())
    if trainable:
        raise ValueError(
            f"feature_cache is set, but {trainable} parameters of the vision tower train, so that its features change "
            "with every step; leave feature_cache out, or freeze the tower"
        )


def feature_key(
    model: nn.Module,
    processor: JnanaProcessor,
    args: TrainingArguments,
    dtype: str | None = None,
    jpeg_draft: bool = False,
) -> dict[str, Any]:
    """
    All that features depend on besides the image, as it is written to `cache.json`.

    Args:
        model (`JnanaForConditionalGeneration`): Its tower and its config's choice of layers.
        processor (`JnanaProcessor`): Its image processor's settings.
        args (`TrainingArguments`): Whether the tower computes under autocast.
        dtype (`str`, *optional*): Of the stored features; default: the dtype that the tower computes in.
        jpeg_draft (`bool`, *optional*, defaults to `False`): As in [`PixelImages`].

    Returns:
        `dict`: plain JSON values.
    """
    config, tower = model.config, model.model.vision_tower
    own = str(tower.dtype).removeprefix("torch.")
    lower = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    settings = json.loads(processor.image_processor.to_json_string())
    return {
        **({"jpeg_draft": True} if jpeg_draft else {}),  # caches of older versions have no such entry
        "format": FORMAT,
        "vision_tower": config.vision_config.model_type,
        "vision_tower_weights": weights_digest(tower),
        "image_processor": {**settings, "class": type(processor.image_processor).__name__},
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_prefix_tokens": config.num_prefix_tokens,
        "image_grid_pinpoints": config.image_grid_pinpoints,
        "computed_in": own if lower is None else f"{own}, autocast to {lower}",
        "dtype": dtype or lower or own,
        "shape": [config.num_view_features, config.vision_feature_size],
    }


class _Builder:
    """Fills one cache for one run; see [`prepare_feature_cache`]."""

    def __init__(self, args: DataArguments, model: nn.Module, processor: JnanaProcessor, data, training_args):
        self.folder = Path(args.feature_cache)  # type: ignore[arg-type]
        self.model, self.processor, self.data = model, processor, data
        self.skip = args.on_bad_sample == "skip"
        self.images = PixelImages(
            processor,
            args.max_image_pixels or MAX_IMAGE_PIXELS,
            normalize_on_device=True,
            jpeg_draft=args.jpeg_draft,
        )
        self.device = training_args.device
        self.num_workers = training_args.dataloader_num_workers
        lower = torch.bfloat16 if training_args.bf16 else torch.float16
        enabled = training_args.bf16 or training_args.fp16
        self.autocast = lambda: torch.autocast(self.device.type, dtype=lower, enabled=enabled)

    def run(self, key: dict[str, Any], group: ProcessGroup) -> FeatureCache:
        """
        Complete the cache.

        Raises:
            OSError: If the disk is full; features that were written stay.
        """
        try:
            return self.complete(key, group)
        except OSError as error:
            if not is_full_disk(error):
                raise
            kept = "The features in it are complete and stay"
            remedy = f"{kept}; make room, and start the same command again: it computes the rest"
            raise full_disk_error("feature_cache", self.folder, "for more features", remedy) from error

    def complete(self, key: dict[str, Any], group: ProcessGroup) -> FeatureCache:
        keys = group.gather(key)
        key = keys[0]
        if group.rank == 0:
            self.begin(key)
        group.wait()
        cache = FeatureCache(self.folder)
        locations, problems = self.find_images(cache, group)
        self.report_problems(problems)
        # The processes agree on one answer: another run may add images between their looks.
        if any(group.gather(any(digest not in cache for digest in locations))):
            with self.lock() if group.rank == 0 else contextlib.nullcontext():
                if group.rank == 0:
                    delete_unfinished(self.folder)
                    cache.refresh()  # another run may have added some while this one waited
                missing = group.gather([digest for digest in locations if digest not in cache])[0]
                self.check_space(key, [locations[digest].num_views for digest in missing], len(locations))
                # FSDP may load the weights on some processes only; these compute the features
                builders = [rank for rank, own in enumerate(keys) if own == key]
                if group.rank in builders:
                    mine = missing[builders.index(group.rank) :: len(builders)]
                    problems = self.build({digest: locations[digest] for digest in mine}, key, group.rank == 0)
                else:
                    problems = []
                problems = [problem for some in group.gather(problems) for problem in some]
            cache.refresh()
            lost = sum(digest not in cache for digest in missing) - len(problems)
            if lost > 0:
                raise ValueError(
                    f"feature_cache {str(self.folder)!r}: {lost} images that other processes computed are not "
                    "there; give a directory that all processes share"
                )
            self.report_problems(problems)
        logger.info(f"feature_cache {str(self.folder)!r}: {len(locations):,} different images of this run are in it")
        return cache

    def begin(self, key: dict[str, Any]) -> None:
        """Create the directory and its key file, or compare the key that is there."""
        if not (self.folder / KEY_FILE).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.lock():
                others = {path.name for path in self.folder.iterdir()} - {LOCK_FILE, KEY_FILE}
                if others - {name for name in others if name.startswith(f".{KEY_FILE}.")}:
                    raise ValueError(
                        f"feature_cache {str(self.folder)!r} holds other files ({sorted(others)[0]!r}, ...) and no "
                        f"{KEY_FILE}; give a new directory"
                    )
                if not (self.folder / KEY_FILE).is_file():
                    write_key(self.folder, key)
        differences = key_differences(read_key(self.folder), key)
        if differences:
            raise ValueError(
                f"feature_cache {str(self.folder)!r} does not fit this run: {'; '.join(differences)}. Give another "
                "directory, or delete this one to have it built anew"
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs from writing to the directory; the lock of a killed run is free."""
        lock = FileLock(self.folder / LOCK_FILE)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info(f"feature_cache {str(self.folder)!r} is being built by another run; waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def find_images(self, cache: FeatureCache, group: ProcessGroup) -> tuple[dict[bytes, ImageLocation], list[str]]:
        """Every different image of the run by its digest, and the problems of images that can't be read."""
        locations: dict[bytes, ImageLocation] = {}
        problems: list[str] = []
        noted: list[tuple[str, tuple[int, int], bytes]] = []
        for number, (location, image, source) in enumerate(self.references(group.rank == 0)):
            if number % group.size != group.rank:
                continue
            try:
                path = os.path.abspath(image["path"]) if image["bytes"] is None and image["path"] else None
                stamp = None if path is None or cache.known_digest(path) is not None else file_stamp(path)
                digest = cache.digest(image, source)
                if path is not None and stamp is not None:
                    noted.append((path, stamp, digest))
                if cache.has_tiles and digest not in cache:
                    size = check_image(image, source=source, max_image_pixels=self.images.max_image_pixels)
                    location.num_views = self.processor.count_views(size)
                locations.setdefault(digest, location)
            except BadSampleError as error:
                problems.append(str(error))
        if noted and os.access(self.folder, os.W_OK):
            append_file_digests(self.folder, noted)
        merged: dict[bytes, ImageLocation] = {}
        for some in group.gather(locations):
            merged = {**some, **merged}
        return merged, [problem for some in group.gather(problems) for problem in some]

    def references(self, progress: bool) -> Iterator[tuple[ImageLocation, dict, str]]:
        """Every image reference of the run; each path once."""
        seen: set[str] = set()
        with tqdm(total=sum(map(len, self.data)), desc="Finding images", unit="row", disable=not progress) as bar:
            for number, rows in enumerate(self.data):
                for index, row in enumerate(iterate_rows(rows)):
                    bar.update()
                    for index_in_row, image in enumerate(row["images"]):
                        if image["bytes"] is None and image["path"]:
                            if image["path"] in seen:
                                continue
                            seen.add(image["path"])
                        yield ImageLocation(number, index, index_in_row), image, row["source"]

    def report_problems(self, problems: list[str]) -> None:
        """Log images that can't be read, or raise with `on_bad_sample="raise"`."""
        if not problems:
            return
        listed = "\n".join(f"  {problem}" for problem in problems[:10])
        rest = f"\n  ... and {len(problems) - 10} more" if len(problems) > 10 else ""
        if not self.skip:
            raise BadSampleError(
                f"{len(problems)} images can't be read (on_bad_sample='skip' skips their rows):\n{listed}{rest}"
            )
        logger.warning(f"{len(problems)} images can't be read; their rows are skipped:\n{listed}{rest}")

    def check_space(self, key: dict[str, Any], missing: list[int], wanted: int) -> None:
        """
        Log the size that the cache will have, and raise if the disk is too small for it.

        Args:
            key (`dict`): The cache key.
            missing (`list[int]`): The number of views of each image that is to be computed.
            wanted (`int`): The number of different images of the run.
        """
        each = DTYPES[key["dtype"]].itemsize * key["shape"][0] * key["shape"][1]
        need, free = sum(missing) * each, shutil.disk_usage(self.folder).free
        views = "" if key["image_grid_pinpoints"] is None else f"{sum(missing):,} views of "
        logger.info(
            f"feature_cache {str(self.folder)!r}: {len(missing):,} of {wanted:,} different images are to be computed, "
            f"{views}{key['shape'][0]} x {key['shape'][1]} {key['dtype']} or {size_text(each)} each, "
            f"{size_text(need)} in all; {size_text(free)} are free"
        )
        if need > 0.98 * free:
            raise ValueError(
                f"feature_cache {str(self.folder)!r} needs {size_text(need)} for {len(missing):,} images, but only "
                f"{size_text(free)} are free there; give a directory on a larger disk, set feature_cache_dtype: "
                "bfloat16, or leave it out"
            )

    @torch.no_grad()
    def build(self, locations: dict[bytes, ImageLocation], key: dict[str, Any], progress: bool) -> list[str]:
        """Compute this process's share; returns the problems of images that can't be used."""
        tower = self.model.vision_tower
        was_training = tower.training
        tower.to(self.device).eval()
        items = _Images(locations, self.data, self.images)
        most_views = max(map(self.processor.count_views, key["image_grid_pinpoints"] or [None]))
        loader = DataLoader(items, max(1, BATCH_SIZE // most_views), num_workers=self.num_workers, collate_fn=_collate)
        problems: list[str] = []
        digests: list[bytes] = []
        stored: list[StoredImage] = []
        num_bytes, begun = 0, time.monotonic()
        with tqdm(total=len(items), desc="Computing features", unit="image", disable=not progress) as bar:
            for good, pixel_values, bad in loader:
                problems += bad
                if good:
                    pixel_values = pixel_values.to(self.device)
                    if self.images.views.table is not None:
                        pixel_values = normalize_pixels(pixel_values, self.images.views.table)
                    with self.autocast():
                        features = self.model.get_vision_features(pixel_values)[1]
                    features = features.to("cpu", DTYPES[key["dtype"]])
                    num_bytes += features.nbytes
                    images = zip(good, features.split([image.num_views for image in good]), strict=True)
                    for image, views in images:
                        digests.append(image.digest)
                        stored.append(StoredImage(views, image.size))
                full = num_bytes >= PART_BYTES
                if digests and (full or time.monotonic() - begun > PART_SECONDS or (bad and not self.skip)):
                    write_features(self.folder, digests, stored)
                    digests, stored, num_bytes, begun = [], [], 0, time.monotonic()
                if bad and not self.skip:
                    self.report_problems(bad)
                bar.update(len(good) + len(bad))
        if digests:
            write_features(self.folder, digests, stored)
        tower.train(was_training)
        return problems


def write_features(folder: Path, digests: list[bytes], images: list[StoredImage]) -> None:
    """Add features to a cache; on a disk that becomes full, as many as it has room for.

    Args:
        folder, digests, images: As for [`write_part`].

    Raises:
        OSError: If they can't all be written.
    """
    try:
        write_part(folder, digests, images)
    except OSError as error:
        if not is_full_disk(error) or len(digests) == 1:
            raise
        half = len(digests) // 2
        write_features(folder, digests[:half], images[:half])
        write_features(folder, digests[half:], images[half:])


@dataclass
class _Encoded:
    """An image that enters the tower: its digest, its number of views, and its size where it has several."""

    digest: bytes
    num_views: int
    size: tuple[int, int] | None


class _Images(torch.utils.data.Dataset):
    """What the tower needs of each image, or the problem of one that can't be used; decoded in dataloader workers."""

    def __init__(self, locations: dict[bytes, ImageLocation], data: list[Dataset], images: PixelImages):
        self.items = list(locations.items())
        self.data, self.images = data, images

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[_Encoded, torch.Tensor] | str:
        digest, location = self.items[index]
        row = self.data[location.data_set][location.row]
        image, source = row["images"][location.index], row["source"]
        try:
            data = read_image_bytes(image, source=source)
            if image_digest(data) != digest:
                raise BadSampleError(f"{source}: image {image['path']!r} changed while the feature cache was built.")
            loaded = self.images.load({"path": image["path"], "bytes": data}, source)
        except BadSampleError as error:
            return str(error)
        inputs = self.images.stack([loaded])
        views = inputs["pixel_values"]
        size = self.images.size(loaded) if "image_sizes" in inputs else None
        return _Encoded(digest, len(views), size), views


def _collate(
    items: list[tuple[_Encoded, torch.Tensor] | str],
) -> tuple[list[_Encoded], torch.Tensor | None, list[str]]:
    """The good images, the views of all of them `(num_views, channels, height, width)`, and the others' problems."""
    good = [item for item in items if not isinstance(item, str)]
    problems = [item for item in items if isinstance(item, str)]
    return [image for image, _ in good], torch.cat([views for _, views in good]) if good else None, problems

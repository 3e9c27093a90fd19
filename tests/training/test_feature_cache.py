"""The cache of a frozen tower's features: equal to the tower's, computed once per image, checked against the run."""

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from multiprocessing import get_context

import pillow_heif
import pytest
import torch
from filelock import FileLock
from PIL import Image
from transformers import TrainingArguments

from jnana.modeling import JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, FeatureCache, JnanaCollator, load_image, read_bad_samples
from jnana.processing.data import feature_cache as cache_format
from jnana.processing.data.feature_cache import StoredImage, weights_digest
from jnana.processing.data.rows import caption_conversation, make_row, message, rows_to_dataset, text_part
from jnana.training import feature_cache
from jnana.training.feature_cache import prepare_feature_cache
from jnana.training.options.arguments import DataArguments
from tests.tiny import save_tiny_text, save_tiny_vision


COLOURS = ["red", "green", "blue", "white", "black", "orange"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model with a frozen tower and its processor. Shared: tests restore what they change."""
    folder = tmp_path_factory.mktemp("pair")
    backbones = str(save_tiny_vision(folder / "vision")), str(save_tiny_text(folder / "text"))
    processor = JnanaProcessor.from_vision_text_pretrained(*backbones)
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(
        *backbones, image_token_id=processor.image_token_id, vision_feature_layer=[-2, -1]
    )
    model.model.vision_tower.requires_grad_(False)
    return model, processor


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in COLOURS:
        image = Image.new("RGB", (40, 30), colour)
        image.putpixel((3, 4), (1, 2, 3))
        image.save(folder / f"{colour}.png")
    return folder


def reference(path) -> dict:
    return {"path": str(path), "bytes": None}


def rows_of(references):
    return rows_to_dataset(
        make_row(
            [image], [caption_conversation(text * (number + 1), None) for text in ("a ", "cat ")], f"record {number}"
        )
        for number, image in enumerate(references)
    )


def rows_in(folder):
    return rows_of([reference(folder / f"{colour}.png") for colour in COLOURS])


def build(pair, rows, folder, evaluation=None, training=None, **options) -> FeatureCache:
    args = DataArguments(feature_cache=str(folder), **options)
    training_args = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, **(training or {}))
    return prepare_feature_cache(args, *pair, [rows, evaluation], training_args)


def features(cache, path) -> torch.Tensor:
    """The stored features of an image that is one view."""
    (views,) = cache.load(reference(path)).features
    return views


def towers_own(pair, path) -> torch.Tensor:
    model, processor = pair
    pixels = processor.image_processor(load_image(str(path)), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.model.get_vision_features(pixels)[1][0]


def computed(monkeypatch, pair) -> list[int]:
    """The number of images in each later call of the tower."""
    counts = []
    original = type(pair[0].model).get_vision_features

    def counting(self, pixel_values, *args, **kwargs):
        counts.append(len(pixel_values))
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(pair[0].model), "get_vision_features", counting)
    return counts


def build_and_die(pair, rows, folder):
    """Fill a cache in a process that `kill -9` ends while the tower encodes the fourth image."""
    left = [3]
    original = type(pair[0].model).get_vision_features

    def dying(self, *args):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args)

    type(pair[0].model).get_vision_features = dying
    build(pair, rows, folder)


class TestContents:
    def test_features_are_the_towers_own(self, pair, pictures, tmp_path):
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        assert len(cache) == 6 and cache.shape == (4, 64) and cache.dtype == torch.float32
        for colour in COLOURS:
            path = pictures / f"{colour}.png"
            torch.testing.assert_close(features(cache, path), towers_own(pair, path), rtol=1e-6, atol=1e-6)
        red, green = (cache.load(reference(pictures / f"{colour}.png")) for colour in ("red", "green"))
        assert (red.features - green.features).abs().max() > 1e-2  # the control: pictures differ
        inputs = cache.stack([red, green])
        assert inputs.keys() == {"image_features"} and red.size is None
        assert torch.equal(inputs["image_features"], torch.cat([red.features, green.features]))

    def test_one_image_is_stored_once(self, pair, pictures, tmp_path, monkeypatch):
        counts = computed(monkeypatch, pair)
        shutil.copy(pictures / "red.png", pictures / "copy.png")
        embedded = {"path": None, "bytes": (pictures / "red.png").read_bytes()}
        rows = rows_of([reference(pictures / "red.png"), reference(pictures / "copy.png"), embedded])
        cache = build(pair, rows, tmp_path / "cache", evaluation=rows_in(pictures))
        assert sum(counts) == len(cache) == 6
        assert torch.equal(cache.load(embedded).features[0], features(cache, pictures / "red.png"))

    def test_heic(self, pair, pictures, tmp_path, monkeypatch):
        """Decoded once; stored features need no decoder."""
        heic = pictures / "photo.heic"
        pillow_heif.from_pillow(Image.open(pictures / "red.png")).save(heic)
        rows = rows_of([reference(heic), reference(pictures / "red.png")])
        cache = build(pair, rows, tmp_path / "cache")
        expected = towers_own(pair, heic)
        monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
        torch.testing.assert_close(features(cache, heic), expected, rtol=1e-6, atol=1e-6)
        with pytest.raises(
            ImportError, match="record 0: image '.*photo.heic' is an HEIC image, which needs pillow-heif"
        ):
            build(pair, rows, tmp_path / "another")

    def test_dtype(self, pair, pictures, tmp_path):
        cache = build(pair, rows_in(pictures), tmp_path / "cache", feature_cache_dtype="bfloat16")
        path = pictures / "red.png"
        assert torch.equal(features(cache, path), towers_own(pair, path).bfloat16())

    def test_under_autocast_as_in_training(self, pair, pictures, tmp_path):
        cache = build(pair, rows_in(pictures), tmp_path / "cache", training={"bf16": True})
        with torch.autocast("cpu", torch.bfloat16):
            expected = towers_own(pair, pictures / "red.png")
        exact = towers_own(pair, pictures / "red.png")
        stored = features(cache, pictures / "red.png")
        assert stored.dtype == torch.bfloat16 and torch.equal(stored, expected.bfloat16())
        assert not torch.equal(stored, exact.bfloat16())

    def test_reads_files_only_when_they_changed(self, pair, pictures, tmp_path, monkeypatch):
        build(pair, rows_in(pictures), tmp_path / "cache")
        cache = FeatureCache(tmp_path / "cache")
        expected = features(cache, pictures / "red.png")
        os.utime(pictures / "green.png", ns=(1, 1))
        read = []
        original = cache_format.read_image_bytes
        monkeypatch.setattr(
            cache_format, "read_image_bytes", lambda image, **kwargs: read.append(image) or original(image, **kwargs)
        )
        assert torch.equal(features(cache, pictures / "red.png"), expected) and not read
        cache.load(reference(pictures / "green.png"))
        cache.load(reference(pictures / "green.png"))
        assert len(read) == 1  # another time of change: hashed again, once

    def test_goes_to_workers(self, pair, pictures, tmp_path):
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        path = pictures / "red.png"
        assert torch.equal(features(pickle.loads(pickle.dumps(cache)), path), features(cache, path))


@pytest.mark.parametrize("packing", ["none", "shared_image"])
class TestTraining:
    def loss_and_gradients(self, model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        named = model.named_parameters()
        return loss.detach(), {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    def test_same_loss_and_gradients(self, pair, pictures, tmp_path, packing):
        model, processor = pair
        rows = rows_in(pictures)
        cache = build(pair, rows, tmp_path / "cache")
        batch = JnanaCollator(processor, packing=packing)(list(rows))
        cached = JnanaCollator(processor, packing=packing, images=cache)(list(rows))
        assert "pixel_values" in batch and "pixel_values" not in cached
        assert cached["image_features"].shape == (6, 4, 64)  # each image once for its two conversations
        loss, gradients = self.loss_and_gradients(model, batch)
        cached_loss, cached_gradients = self.loss_and_gradients(model, cached)
        torch.testing.assert_close(cached_loss, loss, rtol=1e-6, atol=0)
        assert gradients.keys() == cached_gradients.keys() and any("projector" in name for name in gradients)
        for name, gradient in gradients.items():
            assert (cached_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
        # the control: two pictures change places
        cached["image_features"] = cached["image_features"][[1, 0, 2, 3, 4, 5]]
        _, wrong = self.loss_and_gradients(model, cached)
        name = next(name for name in gradients if "projector" in name)
        assert (wrong[name] - gradients[name]).norm() > 1e-4 * gradients[name].norm()

    def test_text_alone_trains_as_without_a_cache(self, pair, pictures, tmp_path, packing):
        """Its features have no rows, so that with several processes the model knows the other processes' features."""
        model, processor = pair
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        chat = [message("user", text_part("what?")), message("assistant", text_part("red"))]
        rows = [make_row([], [chat], "text")]
        cached = JnanaCollator(processor, packing=packing, images=cache)(rows)
        assert cached["image_features"].shape == (0, 4, 64) and "image_indices" not in cached
        loss, gradients = self.loss_and_gradients(model, JnanaCollator(processor, packing=packing)(rows))
        cached_loss, cached_gradients = self.loss_and_gradients(model, cached)
        assert torch.equal(loss, cached_loss) and gradients.keys() == cached_gradients.keys()
        assert gradients and not any("projector" in name for name in gradients)

    def test_bad_images_are_skipped_as_without_a_cache(self, pair, pictures, tmp_path, packing):
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        (pictures / "green.png").write_bytes(b"no image")
        options = {"packing": packing, "images": cache, "bad_samples_file": tmp_path / "bad.jsonl"}
        collator = JnanaCollator(pair[1], on_bad_sample="skip", **options)
        assert len(collator(list(rows_in(pictures)))["image_features"]) == 5
        (problem,) = read_bad_samples(tmp_path / "bad.jsonl")
        assert "record 1" in problem and "not an image of a known format" in problem
        # a batch without a good row
        substitute = JnanaCollator(pair[1], on_bad_sample="skip", **options)([rows_in(pictures)[1]])
        assert substitute["image_features"].eq(0).all()


class TestChangedAndBadImages:
    def test_a_changed_image_raises_then_is_added(self, pair, pictures, tmp_path, monkeypatch):
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        before = features(cache, pictures / "red.png")
        Image.new("RGB", (40, 30), "purple").save(pictures / "red.png")
        with pytest.raises(BadSampleError, match=r"record 0: image .*red.png' is not in the feature cache"):
            cache.load(reference(pictures / "red.png"), "record 0")
        counts = computed(monkeypatch, pair)
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        assert counts == [1] and len(cache) == 7
        assert not torch.equal(features(cache, pictures / "red.png"), before)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda path: path.unlink(), "does not exist"),
            (lambda path: path.write_bytes(b"no image"), "not an image of a known format"),
            (lambda path: path.write_bytes(path.read_bytes()[:-40]), "truncated or corrupt"),
        ],
        ids=["missing", "text", "truncated"],
    )
    def test_bad_images(self, pair, pictures, tmp_path, spoil, message, caplog):
        spoil(pictures / "blue.png")
        with pytest.raises(BadSampleError, match=f"record 2: image .*blue.png' .*{message}"):
            build(pair, rows_in(pictures), tmp_path / "cache")
        with caplog.at_level(logging.WARNING):
            cache = build(pair, rows_in(pictures), tmp_path / "cache", on_bad_sample="skip")
        assert len(cache) == 5 and message in caplog.text
        with pytest.raises(BadSampleError, match=f"somewhere: image .*blue.png' .*{message}"):
            cache.load(reference(pictures / "blue.png"), "somewhere")


class TestKeys:
    def refused(self, pair, pictures, tmp_path, message, **options):
        with pytest.raises(ValueError, match=message) as error:
            build(pair, rows_in(pictures), tmp_path / "cache", **options)
        assert "Give another directory, or delete this one" in str(error.value)

    def test_other_weights(self, pair, pictures, tmp_path):
        build(pair, rows_in(pictures), tmp_path / "cache")
        weight = next(pair[0].model.vision_tower.parameters())
        old = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1e-3
        self.refused(pair, pictures, tmp_path, "vision_tower_weights is '[0-9a-f]{64}' in the cache, '[0-9a-f]{64}'")
        with torch.no_grad():
            weight.copy_(old)
        assert len(build(pair, rows_in(pictures), tmp_path / "cache")) == 6  # the control

    def test_other_settings(self, pair, pictures, tmp_path, monkeypatch):
        build(pair, rows_in(pictures), tmp_path / "cache")
        with monkeypatch.context() as patch:
            patch.setattr(pair[1].image_processor, "image_mean", [0.5, 0.5, 0.5])
            self.refused(pair, pictures, tmp_path, r"image_processor.image_mean is \[0.48.* in the cache, \[0.5")
        with monkeypatch.context() as patch:
            patch.setattr(pair[0].config, "vision_feature_layer", [-1, -2])
            self.refused(pair, pictures, tmp_path, r"vision_feature_layer is \[-2, -1\] in the cache, \[-1, -2\]")
        self.refused(
            pair, pictures, tmp_path, "dtype is 'float32' in the cache, 'float16'", feature_cache_dtype="float16"
        )
        training = {"bf16": True}
        self.refused(
            pair, pictures, tmp_path, "computed_in is 'float32' in the cache, 'float32, auto", training=training
        )

    def test_weights_digest_sees_dtype_and_names(self):
        layer = torch.nn.Linear(2, 2)
        digests = {weights_digest(layer), weights_digest(torch.nn.Sequential(layer))}
        digests.add(weights_digest(layer.to(torch.bfloat16)))
        assert len(digests) == 3 and weights_digest(layer) in digests

    def test_a_digest_of_some_values(self):
        """Faster, so evenly spaced values stand for each tensor; small tensors are read whole."""
        large, small = torch.nn.Linear(100, 100), torch.nn.Linear(3, 3)
        digest, exact = weights_digest(large, 10), weights_digest(large)
        assert weights_digest(small, 100) == weights_digest(small)
        with torch.no_grad():
            large.weight[0, 1] += 1  # the second value; every thousandth is read
        assert weights_digest(large, 10) == digest and weights_digest(large) != exact
        with torch.no_grad():
            large.weight[0, 0] += 1
        assert weights_digest(large, 10) != digest

    def test_a_tower_that_trains(self, pair, pictures, tmp_path):
        parameter = next(pair[0].model.vision_tower.parameters()).requires_grad_(True)
        try:
            with pytest.raises(ValueError, match="1 parameters of the vision tower train.*freeze the tower"):
                build(pair, rows_in(pictures), tmp_path / "cache")
        finally:
            parameter.requires_grad_(False)

    def test_a_folder_of_something_else(self, pair, pictures, tmp_path):
        with pytest.raises(ValueError, match="holds other files .'black.png'.*give a new directory"):
            build(pair, rows_in(pictures), pictures)

    def test_another_format(self, pair, pictures, tmp_path):
        build(pair, rows_in(pictures), tmp_path / "cache")
        file = tmp_path / "cache" / "cache.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": 0}))
        with pytest.raises(ValueError, match="has format 0, this version reads 1"):
            build(pair, rows_in(pictures), tmp_path / "cache")


class TestDisk:
    @pytest.mark.parametrize("keep", [4, -1], ids=["header", "last byte"])
    def test_truncated_part(self, pair, pictures, tmp_path, monkeypatch, keep):
        build(pair, rows_in(pictures), tmp_path / "cache")
        (part,) = (tmp_path / "cache").glob("features-*.safetensors")
        part.write_bytes(part.read_bytes()[:keep])
        with pytest.raises(ValueError, match=f"{part.name} is truncated or corrupt.*Delete that file"):
            build(pair, rows_in(pictures), tmp_path / "cache")
        part.unlink()  # the remedy
        counts = computed(monkeypatch, pair)
        assert len(build(pair, rows_in(pictures), tmp_path / "cache")) == 6 and counts == [6]

    def test_size_is_printed_and_a_full_disk_refused_first(self, pair, pictures, tmp_path, monkeypatch, caplog):
        counts = computed(monkeypatch, pair)
        usage = shutil.disk_usage(tmp_path)
        with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
            patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=6_000))
            with pytest.raises(ValueError, match="needs 6.1 kB for 6 images, but only 6.0 kB are free"):
                build(pair, rows_in(pictures), tmp_path / "cache")
        assert counts == [] and "6 of 6 different images are to be computed, 4 x 64 float32" in caplog.text

    def test_killed_builds_go_on(self, pair, pictures, tmp_path, monkeypatch):
        """`kill -9` while the tower encodes the fourth image: three are kept, three computed."""
        monkeypatch.setattr(feature_cache, "BATCH_SIZE", 1)
        monkeypatch.setattr(feature_cache, "PART_BYTES", 1)
        process = get_context("fork").Process(target=build_and_die, args=(pair, rows_in(pictures), tmp_path / "cache"))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        half = tmp_path / "cache" / ".features-0.safetensors.123"
        half.write_bytes(b"half a part")
        counts = computed(monkeypatch, pair)
        cache = build(pair, rows_in(pictures), tmp_path / "cache")
        assert len(cache) == 6 and len(counts) == 3 and not half.exists()
        for colour in COLOURS:
            path = pictures / f"{colour}.png"
            torch.testing.assert_close(features(cache, path), towers_own(pair, path), rtol=1e-6, atol=1e-6)

    def test_a_disk_that_becomes_full_loses_nothing_that_fits(self, pair, pictures, tmp_path, monkeypatch):
        """There is room for four of six images, which are computed together."""
        folder, original = tmp_path / "cache", cache_format.save

        def limited(tensors) -> bytes:
            if len(FeatureCache(folder)) + len(tensors["digests"]) > 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(tensors)

        with monkeypatch.context() as patch:
            patch.setattr(cache_format, "save", limited)
            with pytest.raises(OSError, match="feature_cache .*/cache' has no room for more features .*start the"):
                build(pair, rows_in(pictures), folder)
        assert len(FeatureCache(folder)) == 4 and not list(folder.glob(".features-*"))
        counts = computed(monkeypatch, pair)
        assert len(build(pair, rows_in(pictures), folder)) == 6 and counts == [2]

    def test_another_error_of_the_disk_is_not_explained_as_a_full_one(self, pair, pictures, tmp_path, monkeypatch):
        def broken(tensors) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(cache_format, "save", broken)
        with pytest.raises(OSError, match="Input/output error"):
            build(pair, rows_in(pictures), tmp_path / "cache")

    def test_a_second_run_waits_for_the_first(self, pair, pictures, tmp_path, monkeypatch):
        cache = build(pair, rows_in(pictures).select(range(2)), tmp_path / "cache")
        counts = computed(monkeypatch, pair)
        first = FileLock(tmp_path / "cache" / feature_cache.LOCK_FILE, thread_local=False)
        first.acquire()
        result = []
        second = threading.Thread(
            target=lambda: result.append(build(pair, rows_in(pictures), tmp_path / "cache")), daemon=True
        )
        second.start()
        time.sleep(0.5)
        assert second.is_alive() and not counts
        # the first run adds a part meanwhile
        missing = reference(pictures / "blue.png")
        cache_format.write_part(tmp_path / "cache", [cache.digest(missing)], [StoredImage(torch.zeros(1, 4, 64))])
        first.release()
        second.join(30)
        assert counts == [3] and len(result[0]) == 6  # what the first one added is not computed again

    def test_a_complete_cache_may_be_read_only(self, pair, pictures, tmp_path):
        build(pair, rows_in(pictures), tmp_path / "cache")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
        build(pair, rows_in(pictures), tmp_path / "cache")
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before

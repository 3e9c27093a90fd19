"""The feature cache with images that are cut into tiles: an entry holds all views of an image."""

import logging
import pickle
import shutil
import signal
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from jnana.processing.data import BadSampleError, FeatureCache, JnanaCollator
from jnana.processing.data.feature_cache import StoredImage, write_part
from jnana.processing.data.rows import rows_to_dataset
from jnana.training import feature_cache
from jnana.training.saving.checkpoints import size_text
from tests.modeling.packed import assert_same_batch, difference, loss_and_gradients
from tests.tiles import KINDS, SIZES, row, rows_of, save_pictures, tile_pair
from tests.training.test_feature_cache import build, build_and_die, computed, reference


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Models with frozen towers and their processors. Shared: tests restore what they change."""
    found = {kind: tile_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    for model, _ in found.values():
        model.model.vision_tower.requires_grad_(False)
    return found


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    return save_pictures(tmp_path / "pictures")


@pytest.fixture
def rows(paths):
    return rows_to_dataset(rows_of(paths))


def all_views(processor) -> int:
    return sum(processor.count_views(size) for size in SIZES)


def towers_own(pair, path) -> torch.Tensor:
    model, processor = pair
    pixels = processor.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model.model.get_vision_features(pixels[0])[1]


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_all_views_of_an_image(pairs, paths, rows, tmp_path, kind):
    pair = pairs[kind]
    cache = build(pair, rows, tmp_path / "cache")
    assert len(cache) == 6 and cache.has_tiles and cache.made_with["image_grid_pinpoints"]
    config = pair[0].config
    assert cache.shape == (config.num_view_features, config.vision_feature_size)
    counts = set()
    for path, size in zip(paths, SIZES, strict=True):
        stored = cache.load(reference(path))
        assert stored.size == size and len(stored.features) == pair[1].count_views(size)
        torch.testing.assert_close(stored.features, towers_own(pair, path), rtol=1e-5, atol=1e-5)
        counts.add(len(stored.features))
    assert len(counts) > 1
    again = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "cache"))).load(reference(paths[0]))
    assert torch.equal(again.features, cache.load(reference(paths[0])).features) and again.size == SIZES[0]
    inputs = cache.stack([cache.load(reference(path)) for path in paths])
    assert inputs["image_sizes"] == SIZES
    assert len(inputs["image_features"]) == all_views(pair[1])
    assert cache.stack([]).keys() == {"image_features"}


@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_loss_and_gradients(pairs, rows, tmp_path, kind, packing):
    model, processor = pairs[kind]
    cache = build(pairs[kind], rows, tmp_path / "cache")
    items = list(rows) if packing == "none" else [{"groups": list(rows)[:3]}, {"groups": list(rows)[3:]}]
    batch = JnanaCollator(processor, packing=packing)(items)
    cached = JnanaCollator(processor, packing=packing, images=cache)(items)
    assert batch.keys() - {"pixel_values"} == cached.keys() - {"image_features"}
    names = cached.keys() - {"image_features"}
    assert_same_batch({n: batch[n] for n in names}, {n: cached[n] for n in names})
    expected = loss_and_gradients(model, [batch])
    assert difference(loss_and_gradients(model, [cached]), expected) < 1e-5
    # the control: two views of an image change places
    cached["image_features"][[0, 1]] = cached["image_features"][[1, 0]]
    assert difference(loss_and_gradients(model, [cached]), expected) > 1e-3


def test_skipped_rows_and_the_blank_image(pairs, paths, rows, tmp_path):
    _, processor = pairs["llava_next"]
    cache = build(pairs["llava_next"], rows, tmp_path / "cache")
    collator = JnanaCollator(processor, on_bad_sample="skip", images=cache)
    paths[2].write_bytes(b"no image")
    blank = collator([row([paths[2]], ["yes"])])
    assert blank["image_sizes"] == [(32, 32)] and blank["image_features"].eq(0).all()
    assert len(blank["image_features"]) == processor.count_views((32, 32))
    assert (blank["input_ids"] == processor.image_token_id).sum() == processor.count_image_tokens((32, 32))
    batch = collator([row([paths[2]], ["yes"]), row([paths[1]], ["no"])])
    assert batch["image_sizes"] == [SIZES[1]]


def test_text_alone_trains_as_without_a_cache(pairs, rows, tmp_path):
    model, processor = pairs["llava_next"]
    cache = build(pairs["llava_next"], rows, tmp_path / "cache")
    text = [row([], ["a photograph"])]
    batches = [JnanaCollator(processor, images=images)(text) for images in (None, cache)]
    assert len(batches[1]["image_features"]) == 0 and "image_sizes" not in batches[1]
    expected, found = (loss_and_gradients(model, [batch]) for batch in batches)
    assert found[0] == expected[0] and difference(found, expected) == 0


def test_few_views_enter_the_tower_at_once(pairs, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", 10)
    counts = computed(monkeypatch, pairs["llava_next"])
    build(pairs["llava_next"], rows, tmp_path / "cache")
    assert sum(counts) == all_views(pairs["llava_next"][1]) and max(counts) <= 10 and len(counts) == 3
    build(pairs["llava_next"], rows, tmp_path / "cache")
    assert len(counts) == 3


def test_the_forecast_counts_views(pairs, rows, tmp_path, monkeypatch, caplog):
    pair = pairs["llava_next"]
    counts = computed(monkeypatch, pair)
    usage, views = shutil.disk_usage(tmp_path), all_views(pair[1])
    each = 4 * 32 * 4  # bytes of a view
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=views * each - 1))
        with pytest.raises(ValueError, match=f"needs {size_text(views * each)} for 6 images, but only"):
            build(pair, rows, tmp_path / "cache")
        assert not counts and f"6 of 6 different images are to be computed, {views} views of 4 x 32" in caplog.text
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=int(views * each / 0.98) + 1))
        build(pair, rows, tmp_path / "cache")
    parts = sum(path.stat().st_size for path in (tmp_path / "cache").glob("features-*"))
    assert views * each < parts < views * each + 1000


def test_other_resolutions_are_another_cache(pairs, rows, tmp_path, monkeypatch):
    model, processor = pairs["llava_next"]
    build(pairs["llava_next"], rows, tmp_path / "cache")
    fewer = processor.image_grid_pinpoints[:3]
    monkeypatch.setattr(processor.image_processor, "image_grid_pinpoints", fewer)
    monkeypatch.setattr(model.config, "image_grid_pinpoints", fewer)
    with pytest.raises(ValueError, match=r"image_grid_pinpoints is \[\[24, 48\].* in the cache, \[\[24, 48\]"):
        build(pairs["llava_next"], rows, tmp_path / "cache")


def test_the_projector_is_not_part_of_the_key(tmp_path):
    """Projectors that join patches read the features of the same tower from the same cache."""
    paths = save_pictures(tmp_path / "pictures")
    rows = rows_to_dataset(rows_of(paths))
    for kind in ("avg_pool", "pixel_shuffle", "mlp"):
        pair = tile_pair(tmp_path, kind)
        pair[0].model.vision_tower.requires_grad_(False)
        if kind == "avg_pool":
            tower = pair[0].model.vision_tower.state_dict()
        pair[0].model.vision_tower.load_state_dict(tower)
        assert len(build(pair, rows, tmp_path / "cache")) == 6
    assert len(list((tmp_path / "cache").glob("features-*"))) == 1


def test_bad_images(pairs, paths, rows, tmp_path, caplog):
    paths[3].write_bytes(b"no image")  # known before the forecast
    paths[4].write_bytes(paths[4].read_bytes()[:-60])  # found when it is decoded
    with pytest.raises(BadSampleError, match="1 images can't be read.*\n.*not an image of a known format"):
        build(pairs["llava_next"], rows, tmp_path / "cache")
    with caplog.at_level(logging.WARNING):
        cache = build(pairs["llava_next"], rows, tmp_path / "cache", on_bad_sample="skip")
    assert len(cache) == 4 and "truncated or corrupt" in caplog.text and "known format" in caplog.text


def test_killed_builds_go_on(pairs, paths, rows, tmp_path, monkeypatch):
    """`kill -9` while the tower encodes the fourth image: three are kept, three computed."""
    pair = pairs["llava_next"]
    monkeypatch.setattr(feature_cache, "BATCH_SIZE", 1)
    monkeypatch.setattr(feature_cache, "PART_BYTES", 1)
    process = get_context("fork").Process(target=build_and_die, args=(pair, rows, tmp_path / "cache"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    counts = computed(monkeypatch, pair)
    cache = build(pair, rows, tmp_path / "cache")
    assert len(cache) == 6 and len(counts) == 3
    for path, size in zip(paths, SIZES, strict=True):
        stored = cache.load(reference(path))
        torch.testing.assert_close(stored.features, towers_own(pair, path), rtol=1e-5, atol=1e-5)
        assert stored.size == size


def test_parts_of_images_of_one_view_have_the_format_of_0_1(tmp_path):
    """Features and digests alone, one row an image."""
    images = [StoredImage(torch.ones(1, 4, 8)), StoredImage(torch.zeros(1, 4, 8))]
    path = write_part(tmp_path, [b"a" * 32, b"b" * 32], images)
    with safe_open(path, framework="pt") as part:
        assert set(part.keys()) == {"features", "digests"}
        assert part.get_tensor("features").mean((1, 2)).tolist() == [1, 0]
    path = write_part(tmp_path, [b"a" * 32], [StoredImage(torch.ones(3, 4, 8), (20, 30))])
    with safe_open(path, framework="pt") as part:  # the control
        assert set(part.keys()) == {"features", "digests", "num_views", "image_sizes"}

"""`feature_cache` in a recipe: the same run, and training never calls the tower."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModel

from jnana import run_align, run_sft
from jnana.processing.data import FeatureCache, read_json_lines
from jnana.processing.data.feature_cache import StoredImage, write_part
from tests.scripts.conftest import align_options, sft_options
from tests.scripts.launching import finish, launch
from tests.scripts.test_processes import assert_same_run


@pytest.fixture
def tower_batches(monkeypatch) -> list[int]:
    """Pictures of every batch that a CLIP gets."""
    sizes = []
    original = CLIPVisionModel.forward

    def counting(self, pixel_values, *args, **kwargs):
        if pixel_values.device.type != "meta":
            sizes.append(len(pixel_values))
        return original(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(CLIPVisionModel, "forward", counting)
    return sizes


def test_align(data, vision, pretrained, aligned, tmp_path, tower_batches):
    """`aligned` was trained without a cache, by the same options."""
    options = {"feature_cache": tmp_path / "cache", "save_strategy": "no"}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "cached", **options))
    assert_same_run(tmp_path / "cached", aligned)
    assert tower_batches == [16]
    # the control: features that are not the tower's
    cache = FeatureCache(tmp_path / "cache")
    digests = list(cache._stored)
    (part,) = (tmp_path / "cache").glob("features-*")
    part.unlink()
    write_part(tmp_path / "cache", digests, [StoredImage(torch.randn(1, *cache.shape)) for _ in digests])
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "wrong", **options))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "wrong", aligned)


def test_sft_packed(data, aligned, tmp_path, tower_batches):
    common = {"packing": "shared_image", "max_row_tokens": 128, "per_device_train_batch_size": 2, "max_steps": 3}
    common |= {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "plain", **common))
    tower_batches.clear()
    cached = {"feature_cache": tmp_path / "cache", "output_dir": tmp_path / "cached"}
    run_sft.main(sft_options(data, aligned, **cached, **common))
    assert tower_batches == [16]  # training and validation pictures, each once
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("cached", "plain"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=2e-6, msg=name)
    assert any(tensor.abs().max() > 0 for name, tensor in theirs.items() if "lora_B" in name)


def test_two_processes_share_the_work(data, vision, pretrained, aligned, tmp_path):
    options = {"feature_cache": tmp_path / "cache", "per_device_train_batch_size": 4, "save_strategy": "no"}
    arguments = align_options(data, vision, pretrained, output_dir=tmp_path / "two", **options)
    output = finish(launch("run_align.py", arguments, processes=2))
    assert "2 process(es)" in output and output.count("16 of 16 different images are to be computed") == 1
    assert len(list((tmp_path / "cache").glob("features-*"))) == 2  # a part of each
    assert len(FeatureCache(tmp_path / "cache")) == 16
    assert_same_run(tmp_path / "two", aligned)


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory) -> Path:
    """The pictures in six sizes, so that they have different numbers of tiles."""
    folder = tmp_path_factory.mktemp("photos")
    for number, path in enumerate(sorted((data / "images").glob("*.png"))):
        size = [(24, 24), (77, 31), (20, 90), (48, 48), (60, 61), (24, 40)][number % 6]
        Image.open(path).resize(size).save(folder / path.name)
    return folder


@pytest.mark.parametrize("packing", ["none", "shared_image"])
def test_tiles(data, vision, pretrained, photos, tmp_path, tower_batches, packing):
    """Images cut into tiles, with validation, samples and grouping by length: one run in both ways."""
    options = {"image_geometry": "anyres", "image_folder": photos, "packing": packing, "max_row_tokens": 100}
    options |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "group_by_length", "max_steps": 4}
    options |= {"eval_data": data / "captions.json", "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    options |= {"sample_steps": 4, "sample_count": 2, "sample_max_new_tokens": 4}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "plain", **options))
    tower_batches.clear()
    cached = {"feature_cache": tmp_path / "cache", "output_dir": tmp_path / "cached"}
    run_align.main(align_options(data, vision, pretrained, **cached, **options))
    assert_same_run(tmp_path / "cached", tmp_path / "plain")
    samples = [list(read_json_lines(tmp_path / name / "samples.jsonl")) for name in ("cached", "plain")]
    assert samples[0] == samples[1] and len(samples[0]) == 4
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert weights["model.multi_modal_projector.image_newline"].shape == (64,)
    cache = FeatureCache(tmp_path / "cache")
    references = [{"path": str(path), "bytes": None} for path in photos.iterdir()]
    images = [cache.load(image) for image in references]
    views = sum(len(image.features) for image in images)
    # The cache encoded each view once; besides, each sample is encoded whenever it is written.
    assert views > 3 * 16 and sum(tower_batches[:3]) == views and len(tower_batches) == 3 + 4
    for part in (tmp_path / "cache").glob("features-*"):
        part.unlink()
    wrong = [StoredImage(image.features.roll(1, 0), image.size) for image in images]  # the control: views in disorder
    write_part(tmp_path / "cache", [cache.digest(image) for image in references], wrong)
    run_align.main(align_options(data, vision, pretrained, **{**cached, "output_dir": tmp_path / "wrong"}, **options))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "wrong", tmp_path / "plain")

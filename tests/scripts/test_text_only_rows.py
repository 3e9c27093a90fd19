"""run_align.py with conversations that have no image: they would train nothing, and end the run in mid-training."""

import json
import re

import pytest

from jnana import run_align
from jnana.processing.data import read_json_lines
from tests.scripts.conftest import align_options
from tests.scripts.forked import run_forked, succeed
from tests.scripts.test_processes import losses_of
from tests.scripts.test_resume import assert_same_weights


PACKINGS = ["none", "rows", "shared_image"]


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory):
    """Eight records about images, and in front of, between and behind them four without; and the former alone."""
    folder = tmp_path_factory.mktemp("mixed")
    about = json.loads((data / "instruct.json").read_text())[:8]
    turns = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "It is 4."}]
    alone = [{"id": f"text {number}", "conversations": turns} for number in range(4)]
    (folder / "mixed.json").write_text(json.dumps([*alone[:2], *about[:4], alone[2], *about[4:], alone[3]]))
    (folder / "about.json").write_text(json.dumps(about))
    return folder


def arguments(data, vision, pretrained, file, output, packing, **changes) -> list[str]:
    """One row a step, so that packed or not some steps would consist of text alone."""
    values = {"train_data": file, "output_dir": output, "packing": packing, "save_strategy": "no", "max_steps": 4}
    values |= {"per_device_train_batch_size": 1, "max_length": 96}
    values |= {} if packing == "none" else {"max_row_tokens": 96}
    return align_options(data, vision, pretrained, **{**values, **changes})


@pytest.mark.parametrize("packing", PACKINGS)
def test_they_are_refused_by_name_before_a_model_is_loaded(
    data, vision, pretrained, mixed, tmp_path, packing, monkeypatch
):
    monkeypatch.setattr(run_align, "prepare_model", lambda *args: pytest.fail("a model was loaded before the check"))
    with pytest.raises(ValueError, match="4 of 12 rows can't be used") as error:
        run_align.main(arguments(data, vision, pretrained, mixed / "mixed.json", tmp_path, packing))
    for number, record in enumerate((0, 1, 6, 11)):
        assert f"mixed.json, record {record} (id text {number}): " in str(error.value)
    assert str(error.value).count("without an image, which trains nothing in run_align") == 4


@pytest.mark.parametrize("packing", PACKINGS)
def test_skipped_they_change_nothing(data, vision, pretrained, mixed, tmp_path, packing):
    """The run is that of the other rows alone, in one process."""
    for name, changes in (("mixed", {"on_bad_sample": "skip"}), ("about", {})):
        words = arguments(data, vision, pretrained, mixed / f"{name}.json", tmp_path / name, packing, **changes)
        run_align.main(words)
    assert_same_weights(tmp_path / "mixed", tmp_path / "about")
    assert losses_of(tmp_path / "mixed").tolist() == losses_of(tmp_path / "about").tolist()
    listed = list(read_json_lines(tmp_path / "mixed" / "bad_samples.jsonl", "skip"))
    found = [re.search(r"mixed.json, record (\d+) \(id text", line["problem"])[1] for line in listed]
    assert found == ["0", "1", "6", "11"]


def test_skipped_in_two_processes(data, vision, pretrained, mixed, tmp_path):
    """Packed, and a step of either process could have been text alone."""
    for name, changes in (("mixed", {"on_bad_sample": "skip"}), ("about", {})):
        words = arguments(data, vision, pretrained, mixed / f"{name}.json", tmp_path / name, "shared_image", **changes)
        assert "2 process(es)" in succeed(run_forked("run_align", words, tmp_path / "log", processes=2))
    assert_same_weights(tmp_path / "mixed", tmp_path / "about")


@pytest.mark.parametrize("packing", ["none", "shared_image"])
def test_in_a_stream(data, vision, pretrained, mixed, tmp_path, packing):
    """Its rows are seen while it trains: raised for by name, or left out."""
    file, changes = mixed / "mixed.json", {"streaming": "true", "per_device_train_batch_size": 4}
    whole_buffer = {**changes, "max_steps": 100}  # packed rows of 256 records come before those that can't be used
    with pytest.raises(ValueError, match=r"mixed.json, record \d+ .*without an image, which trains nothing"):
        run_align.main(arguments(data, vision, pretrained, file, tmp_path / "raised", packing, **whole_buffer))
    changes["on_bad_sample"] = "skip"
    run_align.main(arguments(data, vision, pretrained, file, tmp_path / "left out", packing, **changes))
    assert all(0 < loss < 20 for loss in losses_of(tmp_path / "left out").tolist())

"""A finished run that was moved: started again, continued and evaluated at its new place, or refused in one line."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from jnana import run_evaluate, run_sft
from tests.scripts.conftest import options, sft_options


# The first of three checkpoints is the best, and the last is kept beside it
BEST = {"max_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "learning_rate": "1e-2"}
BEST |= {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "greater_is_better": "true"}
BEST |= {"save_total_limit": 1, "merge_adapter": "false"}
ADAPTER = "adapter_model.safetensors"


def sft(place, run, **changes) -> None:
    run_sft.main(sft_options(place / "data", place / "align", output_dir=run, **{**BEST, **changes}))


def evaluate(place, run, output) -> dict:
    values = {"eval_data": place / "data" / "instruct.json", "image_folder": place / "data" / "images"}
    values |= {"max_rows": 2, "max_new_tokens": 2, "num_workers": 0, "max_examples": 0, "blind": "false"}
    run_evaluate.main(options(model_name_or_path=run, output_dir=output, **values))
    results = json.loads((output / "results.json").read_text())
    return {name: results[name] for name in ("splits", "model_fingerprint")}


@pytest.fixture(scope="module")
def finished(aligned, data, tmp_path_factory):
    """The run with its base and its data in one directory, and what it answered there."""
    here = tmp_path_factory.mktemp("moved") / "here"
    shutil.copytree(aligned, here / "align", ignore=shutil.ignore_patterns("checkpoint-*"))
    shutil.copytree(data, here / "data")
    sft(here, here / "sft")
    assert sorted(path.name for path in (here / "sft").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    return here, evaluate(here, here / "sft", here / "before")


@pytest.fixture
def moved(finished, tmp_path):
    """A copy elsewhere, while the place that its files name is gone."""
    here, before = finished
    there = tmp_path / "there"
    shutil.copytree(here, there)
    away = here.with_name("away")
    here.rename(away)
    yield there, before, away
    away.rename(here)


def test_moved_with_its_base_and_data(moved, capsys):
    there, before, _ = moved
    final = (there / "sft" / ADAPTER).read_bytes()
    assert evaluate(there, there / "sft", there / "after") == before
    with pytest.raises(ValueError) as refused:
        sft(there, there / "sft")
    said = str(refused.value)
    assert "\n" not in said and "checkpoint-3 was trained with model_name_or_path " in said
    typed = said.split("`--allow_changed ")[1].split("`")[0]
    assert {"model_name_or_path", "train_data", "image_folder"} == set(typed.split())
    (there / "sft" / ADAPTER).unlink()
    capsys.readouterr()
    sft(there, there / "sft", allow_changed=typed.replace(" ", ","))
    assert "is the end of this run: nothing is trained" in capsys.readouterr().out
    assert (there / "sft" / ADAPTER).read_bytes() == final  # of the best checkpoint, whose old path the state holds
    last = load_file(there / "sft" / "checkpoint-3" / ADAPTER)
    assert any((last[name] != tensor).any() for name, tensor in load_file(there / "sft" / ADAPTER).items())


def test_moved_alone(moved, finished, tmp_path, capsys):
    """Its base and its data have stayed where they were."""
    there, before, away = moved
    here, _ = finished
    here.mkdir()
    for name in ("align", "data"):
        shutil.copytree(away / name, here / name)
    try:
        shutil.move(there / "sft", tmp_path / "alone")
        shutil.rmtree(there)
        assert evaluate(here, tmp_path / "alone", tmp_path / "after") == before
        capsys.readouterr()
        sft(here, tmp_path / "alone")
        assert "is the end of this run: nothing is trained" in capsys.readouterr().out
        sft(here, tmp_path / "alone", max_steps=4, allow_changed="max_steps")
        assert f"resuming from {tmp_path / 'alone' / 'checkpoint-3'} " in capsys.readouterr().out
        state = json.loads((tmp_path / "alone" / "trainer_state.json").read_text())
        assert state["global_step"] == 4
        assert state["best_model_checkpoint"] == str(tmp_path / "alone" / "checkpoint-1")
    finally:
        shutil.rmtree(here)


def test_moved_without_its_base(moved, tmp_path):
    there, _, _ = moved
    shutil.move(there / "sft", tmp_path / "alone")
    with pytest.raises(ValueError, match="is not a directory here; bring it back, or correct jnana") as said:
        evaluate(there, tmp_path / "alone", tmp_path / "after")
    assert "\n" not in str(said.value)


def test_the_best_checkpoint_was_not_moved_along(moved):
    there, _, _ = moved
    shutil.rmtree(there / "sft" / "checkpoint-1")
    changes = {"allow_changed": "model_name_or_path,train_data,image_folder"}
    with pytest.raises(ValueError, match="best checkpoint .*checkpoint-1' does not exist, nor .*; put it back"):
        sft(there, there / "sft", **changes)

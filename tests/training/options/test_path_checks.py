"""A run never writes over the model that it reads, wherever links lead; trackers and the context are checked first."""

import json
from types import SimpleNamespace

import pytest
from transformers import TrainerState, TrainingArguments

from jnana import run_evaluate, run_merge
from jnana.training.data import prepare_options
from jnana.training.options.arguments import DataArguments, ModelArguments
from jnana.training.options.model_checks import limit_to_context
from jnana.training.options.option_checks import check_trackers
from jnana.training.options.path_checks import check_output_apart
from jnana.training.run import MovedRunCallback, moved_checkpoint
from tests.tiny import save_tiny_text


@pytest.fixture
def model(tmp_path):
    """A base, and an adapter on it, in directories of one parent; and a link to the base."""
    base, adapter = tmp_path / "runs" / "base", tmp_path / "runs" / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    (base / "config.json").write_text("{}")
    reference = {"names": {"model": str(base)}, "relative_paths": {"model": "../base"}, "projector_fields": {}}
    (adapter / "jnana_base.json").write_text(json.dumps(reference))
    (adapter / "adapter_config.json").write_text("{}")
    (tmp_path / "link").symlink_to(base)
    return tmp_path


REFUSED = {
    "runs/base": "is the directory of",
    "runs": "contains",
    ".": "contains",
    "link": "is the directory of",
    "runs/base/checkpoint-4": "lies in 'checkpoint-4'",
    "link/checkpoint-4/x": "lies in 'checkpoint-4'",
    "runs/base/config.json/x": "lies in 'config.json'",
    "runs/base/merged": "lies in 'merged'",
    "runs/base/../base": "is the directory of",
}


@pytest.mark.parametrize("output", REFUSED)
@pytest.mark.parametrize("name", ["runs/base", "runs/adapter", "link"])
def test_an_output_over_a_model_or_its_base(model, output, name):
    with pytest.raises(ValueError, match=f"output_dir .* {REFUSED[output]}.*; give another directory"):
        check_output_apart(str(model / output), {"model_name_or_path": str(model / name)})


@pytest.mark.parametrize("output", ["runs/other", "other", "runs/base2", "runs/base/round2", "runs/base/round2/x"])
@pytest.mark.parametrize("name", ["runs/base", "runs/adapter", "link", "a/hub_id", None])
def test_an_output_beside_a_model(model, output, name):
    check_output_apart(str(model / output), {"model_name_or_path": name and str(model / name)})


def test_the_directories_of_the_run_itself(model):
    for own in ("merged", "evaluate"):
        output, models = str(model / "runs" / "adapter" / own), {"model_name_or_path": str(model / "runs" / "adapter")}
        check_output_apart(output, models, allowed=own)
        with pytest.raises(ValueError, match=f"lies in '{own}'"):
            check_output_apart(output, models)


@pytest.mark.parametrize("output", ["runs/base", "link", "runs", "runs/adapter"])
def test_a_merge_over_its_base(model, output):
    before = (model / "runs" / "base" / "config.json").read_bytes()
    adapter = str(model / "runs" / "adapter")
    with pytest.raises(ValueError, match="output_dir .* would be overwritten"):
        run_merge.main([f"--model_name_or_path={adapter}", f"--output_dir={model / output}"])
    assert (model / "runs" / "base" / "config.json").read_bytes() == before


def test_results_over_a_model(model):
    (model / "a.json").write_text("[]")
    folder = str(model / "runs" / "base")
    with pytest.raises(ValueError, match="output_dir .* is the directory of"):
        run_evaluate.main(
            [f"--model_name_or_path={folder}", f"--eval_data={model / 'a.json'}", f"--output_dir={folder}"]
        )


def test_trackers_that_are_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("jnana.training.options.option_checks.get_available_reporting_integrations", lambda: ["wandb"])
    check_trackers(TrainingArguments(output_dir=tmp_path, report_to=["wandb"]))
    check_trackers(TrainingArguments(output_dir=tmp_path, report_to="none"))
    with pytest.raises(ValueError, match="report_to names 'tensorboard', .*pip install tensorboard`, or .*none"):
        check_trackers(TrainingArguments(output_dir=tmp_path, report_to=["wandb", "tensorboard"]))


def test_max_length_defaults_to_the_context(tmp_path, caplog):
    save_tiny_text(tmp_path, "llama")
    longest = json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"]
    model_args = ModelArguments(vision_model="clip", text_model=str(tmp_path))
    for given, expected in ((None, longest), (longest - 1, longest - 1), (longest + 1, longest + 1)):
        data_args = DataArguments(max_length=given)
        assert "max_position_embeddings" not in caplog.text
        limit_to_context(data_args, model_args)
        assert data_args.max_length == expected
        said = None if given else "the max_position_embeddings of the language model"
        assert prepare_options(data_args, str(tmp_path)).max_length_source == said
    assert f"max_length is {longest + 1}, more than the max_position_embeddings {longest}" in caplog.text


def test_the_best_checkpoint_of_a_run_that_was_moved(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=True)
    state = TrainerState(best_model_checkpoint="/elsewhere/checkpoint-2")
    with pytest.raises(ValueError, match="best checkpoint '/elsewhere/checkpoint-2' does not exist, nor"):
        moved_checkpoint(state, args)
    (tmp_path / "checkpoint-2").mkdir()
    MovedRunCallback().on_train_begin(args, state, None)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    MovedRunCallback().on_train_begin(args, state, None)  # and stays
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-2")

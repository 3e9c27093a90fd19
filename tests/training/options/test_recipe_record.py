"""The record of a run: which options may change when it is resumed, and what is said of the others."""

import json
import logging

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from jnana.training.options.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PartArguments,
    RunArguments,
)
from jnana.training.options.recipe_record import (
    FREE,
    PROCESSES,
    check_same_data,
    check_same_recipe,
    data_fingerprint,
    is_free,
    recipe_options,
    write_record,
)


def options_of(tmp_path, **changes) -> dict:
    data_names = ("packing", "max_length", "streaming", "jpeg_draft")
    data = {name: changes.pop(name) for name in data_names if name in changes}
    model = ModelArguments(image_backend=changes.pop("image_backend", "pil"))
    training = TrainingArguments(output_dir=str(tmp_path / "out"), **{"max_steps": 6, "report_to": "none", **changes})
    return recipe_options(model, DataArguments(train_data="rows.json", **data), RunArguments(), training)


@pytest.fixture
def checkpoint(tmp_path):
    """Step 3 of a run with the default options and a cosine schedule."""
    folder = tmp_path / "out" / "checkpoint-3"
    folder.mkdir(parents=True)
    state = {"global_step": 3, "log_history": [{"step": 2, "learning_rate": 4e-5}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    write_record(str(tmp_path / "out"), options_of(tmp_path, lr_scheduler_type="cosine"), "9:abc")
    return str(folder)


def check(checkpoint, tmp_path, *allowed, **changes):
    changes = {"lr_scheduler_type": "cosine", **changes}
    check_same_recipe(checkpoint, options_of(tmp_path, **changes), RunArguments(allow_changed=list(allowed)))


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"max_grad_norm": 0.5}, "max_grad_norm 1.0, this run has 0.5"),
        ({"optim": "sgd"}, "optim 'adamw_torch_fused', this run has 'sgd'"),
        ({"seed": 7}, "seed 42, this run has 7"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps 1, this run has 4"),
        ({"packing": "rows"}, "packing 'none', this run has 'rows'"),
        ({"max_length": 99}, "max_length not given, this run has 99"),
        ({"jpeg_draft": True}, "jpeg_draft False, this run has True"),
        ({"image_backend": "torchvision"}, "image_backend 'pil', this run has 'torchvision'"),
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type 'cosine', this run has 'linear'"),
    ],
)
def test_a_changed_option_is_named_with_both_values_and_can_be_allowed(checkpoint, tmp_path, changes, difference):
    name = next(iter(changes))
    with pytest.raises(ValueError) as raised:
        check(checkpoint, tmp_path, **changes)
    text = str(raised.value)
    assert f"was trained with {difference}. " in text and f"`--allow_changed {name}`" in text
    check(checkpoint, tmp_path, name, **changes)
    with pytest.raises(ValueError, match=name):  # another name allows another option only
        check(checkpoint, tmp_path, "prompt", **changes)


def test_all_differences_are_named_at_once(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"seed 42, this run has 1\. .*--allow_changed max_grad_norm seed`") as raised:
        check(checkpoint, tmp_path, max_grad_norm=0.5, seed=1)
    assert "trained with max_grad_norm 1.0, this run has 0.5; " in str(raised.value)
    check(checkpoint, tmp_path, "max_grad_norm,seed", max_grad_norm=0.5, seed=1)


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_values_that_the_checkpoint_restores_cannot_be_changed(checkpoint, tmp_path, name):
    """torch reads them with the optimizer's state, so that a new value would be logged and not used."""
    with pytest.raises(
        ValueError, match=f"{name} .*, this run has 0.3. Give the run's own values, or another output_dir"
    ):
        check(checkpoint, tmp_path, **{name: 0.3})
    with pytest.raises(ValueError, match=f"allow_changed names {name}, which a resumed run reads from its checkpoint"):
        check(checkpoint, tmp_path, name, **{name: 0.3})


def test_the_remedy_can_be_typed(checkpoint, tmp_path):
    """Also where the number of processes differs, which is no option of the scripts."""
    options = {**options_of(tmp_path, lr_scheduler_type="cosine", seed=1), PROCESSES: 2}
    with pytest.raises(ValueError) as raised:
        check_same_recipe(checkpoint, options, RunArguments())
    typed = str(raised.value).split("`--allow_changed ")[1].split("`")[0].split()
    check_same_recipe(checkpoint, options, RunArguments(allow_changed=typed))


def test_a_longer_run_changes_the_rate_unless_that_is_constant(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"max_steps 6, this run has 9.* it was 4e-05 at step 3, and would jump"):
        check(checkpoint, tmp_path, max_steps=9)
    check(checkpoint, tmp_path, "max_steps", max_steps=9)
    write_record(str(tmp_path / "out"), options_of(tmp_path, lr_scheduler_type="constant"), None)
    check(checkpoint, tmp_path, lr_scheduler_type="constant", max_steps=9)


def test_what_does_not_matter_may_change(checkpoint, tmp_path):
    check(checkpoint, tmp_path, logging_steps=3, save_steps=2, eval_steps=5, dataloader_num_workers=3, use_cpu=True)


def test_the_workers_of_a_stream_and_the_processes_matter(checkpoint, tmp_path):
    assert "dataloader_num_workers" in options_of(tmp_path, streaming=True)
    assert "dataloader_num_workers" not in options_of(tmp_path)
    options = {**options_of(tmp_path, lr_scheduler_type="cosine"), PROCESSES: 2}
    with pytest.raises(ValueError, match="num_processes 1, this run has 2"):
        check_same_recipe(checkpoint, options, RunArguments())


def test_names_that_are_no_option_are_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="allow_changed names learning_rates, which is not an option"):
        check(checkpoint, tmp_path, "learning_rates")


def test_a_run_of_an_older_version_resumes_with_a_warning(tmp_path, checkpoint, caplog):
    (tmp_path / "out" / "recipe_record.json").unlink()
    with caplog.at_level(logging.WARNING):
        check(checkpoint, tmp_path, learning_rate=1.0)
    assert "has no recipe_record.json" in caplog.text


def test_two_spellings_of_a_path_are_equal(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("rows.json", "other.json"):
        (tmp_path / name).write_text("[]")
    run = RunArguments()
    options = options_of(tmp_path, lr_scheduler_type="cosine")
    check_same_recipe(checkpoint, {**options, "train_data": str(tmp_path / "rows.json")}, run)
    with pytest.raises(ValueError, match="train_data 'rows.json', this run has 'other.json'"):
        check_same_recipe(checkpoint, {**options, "train_data": "other.json"}, run)


def rows(answer: str = "a cat", folder: str = "here", count: int = 600) -> Dataset:
    chat = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return Dataset.from_list(
        [{"images": [{"path": f"{folder}/{i}.png", "bytes": None}], "chat": chat} for i in range(count)]
    )


def test_the_fingerprint_of_data_follows_its_text_and_not_its_directory(checkpoint):
    first = data_fingerprint(rows())
    assert first == data_fingerprint(rows(folder="there")) and first.startswith("600:")
    assert first != data_fingerprint(rows("a dog")) and first != data_fingerprint(rows(count=599))


def test_of_a_stream_the_shards_are_compared(checkpoint, tmp_path):
    """Nobody has read its rows; an added file shows in the number of shards."""
    four, five = (data_fingerprint(rows().to_iterable_dataset(num_shards=n).repeat(None)) for n in (4, 5))
    write_record(str(tmp_path / "out"), options_of(tmp_path, lr_scheduler_type="cosine"), four)
    check_same_data(checkpoint, four, RunArguments())
    with pytest.raises(ValueError, match=r"a stream of other shards of train_data: 4, now 5. .*changed train_data`"):
        check_same_data(checkpoint, five, RunArguments())
    check_same_data(checkpoint, five, RunArguments(allow_changed=["train_data"]))


def test_other_data_is_refused_unless_allowed(checkpoint):
    with pytest.raises(ValueError, match=r"on other rows of train_data: 9 rows, now 8. .*--allow_changed train_data`"):
        check_same_data(checkpoint, "8:abc", RunArguments())
    with pytest.raises(ValueError, match="9 rows, some of which have changed"):
        check_same_data(checkpoint, "9:def", RunArguments())
    check_same_data(checkpoint, "9:def", RunArguments(allow_changed=["train_data"]))
    check_same_data(checkpoint, "9:abc", RunArguments())


MATTERS = """learning_rate weight_decay train_data image_folder packing seed gradient_accumulation_steps lora_dropout
chat_template dtype quantization vision_model text_model model_name_or_path lora_r lora_target_modules optimizer optim
projector_learning_rate per_device_train_batch_size max_length independent_turns""".split()


def test_what_was_mixed_or_ignored_is_recorded(tmp_path):
    """Each option with which a run was once resumed without a word, or ended inside torch."""
    classes = (ModelArguments, DataArguments, LoraArguments, PartArguments, RunArguments)
    given = [DataArguments(train_data="rows.json") if of is DataArguments else of() for of in classes]
    recorded = recipe_options(*given, TrainingArguments(output_dir=str(tmp_path), report_to="none"))
    assert set(MATTERS) <= recorded.keys() and PROCESSES in recorded
    assert "logging_steps" not in recorded  # the control


def test_every_free_option_exists():
    """A misspelt name would protect nothing."""
    import dataclasses

    from jnana.training.options import arguments

    classes = [value for value in vars(arguments).values() if dataclasses.is_dataclass(value)]
    known = {field.name for of_class in (*classes, TrainingArguments) for field in dataclasses.fields(of_class)}
    assert FREE <= known
    assert is_free("save_steps") and is_free("logging_steps") and not is_free("learning_rate")


def test_it_shows_the_limit_and_from_where_on_checkpoints_have_manifests(tmp_path):
    def written(*values) -> tuple:
        write_record(str(tmp_path), {}, None, *values)
        record = json.loads((tmp_path / "recipe_record.json").read_text())
        return record["save_total_limit"], record["manifests_after"]

    assert written(3, 4) == (3, 4)  # begun by an older version, resumed from step 4
    assert written(None, 8) == (None, 4)  # resumed once more, from a checkpoint with a manifest
    assert written(2) == (2, 0)  # started anew
    assert written(2, 6) == (2, 0)

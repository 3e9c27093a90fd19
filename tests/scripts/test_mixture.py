"""run_sft.py with several sources: images beside chats without any, on one process and on two, interrupted and not."""

import json
import shutil
from functools import partial

import pytest
import torch
import yaml
from safetensors.torch import load_file

from jnana import run_inspect, run_sft
from tests.scripts.conftest import sft_options
from tests.scripts.faults import kill
from tests.scripts.forked import run_forked, succeed
from tests.scripts.sharding import CONFIGURED, launch_environment, shard_on_cpu, watch_imageless
from tests.scripts.test_sharded import history


PACKED = {"packing": "shared_image", "max_row_tokens": 100}


@pytest.fixture(scope="module")
def sources(data, tmp_path_factory) -> list[dict]:
    """16 images with two questions each, and 24 chats about nothing to see."""
    folder = tmp_path_factory.mktemp("mixture")
    colours = ("white", "black", "red", "blue")
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"what is {colours[number % 4]} and {number}?"},
                {"role": "assistant", "content": f"{colours[number % 4]} on {colours[(number + 1) % 4]}"},
            ]
        }
        for number in range(24)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    photos = {"name": "photos", "data": str(data / "instruct.json"), "image_folder": str(data / "images")}
    return [photos, {"name": "chats", "data": str(folder / "chats.jsonl"), "format": "dataset"}]


def options(data, aligned, sources, output, weights=(2, 1), **changes) -> list[str]:
    mixture = [{**source, "weight": weight} for source, weight in zip(sources, weights, strict=True)]
    given = {"train_data": json.dumps(mixture), "eval_data": json.dumps(sources), "independent_turns": "false"}
    return sft_options(data, aligned, **{**given, "output_dir": output, "save_total_limit": 10, **changes})


def entries(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def logged(folder, name: str) -> list[float]:
    return [entry[name] for entry in entries(folder) if name in entry]


@pytest.mark.parametrize("changes", [{}, PACKED, {**PACKED, "lora_r": 0}], ids=["none", "packed", "whole model"])
def test_the_loss_of_each_source(data, aligned, sources, tmp_path, changes):
    """Without learning, the losses of an epoch with all rows are those of the validation on the same rows."""
    one_epoch = {"max_steps": -1, "num_train_epochs": 1, "logging_steps": 100, "logging_first_step": "false"}
    still = {"learning_rate": 0, "eval_strategy": "epoch", "save_strategy": "no", "per_device_train_batch_size": 6}
    recipe = tmp_path / "sft.yaml"
    recipe.write_text(yaml.safe_dump({"train_data": sources, "eval_data": sources}))
    words = options(data, aligned, sources, tmp_path / "run", **one_epoch, **still, **changes)
    run_sft.main([str(recipe), *(word for word in words if "_data=" not in word)])
    (epoch,) = [entry for entry in entries(tmp_path / "run") if "train_runtime" in entry]
    assert (epoch["samples_photos"], epoch["samples_chats"]) == (16, 24)
    assert epoch["share_photos"] + epoch["share_chats"] == pytest.approx(1)
    for name in ("photos", "chats"):
        assert epoch[f"loss_{name}"] == pytest.approx(*logged(tmp_path / "run", f"eval_{name}_loss"), rel=1e-4)
    assert epoch["loss_photos"] != pytest.approx(epoch["loss_chats"], rel=2e-3)  # the control
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- trained on `photos`: `instruct.json`, split `train`\n- trained on `chats`: `chats.jsonl`" in card
    assert "| validation loss of chats, step" in card and "| tokens of photos since then |" in card


def test_weights_and_seed(data, aligned, sources, tmp_path, capsys):
    """What an epoch has is said before it starts; another share is another run."""
    changes = {"max_steps": 3, "save_steps": 3, **PACKED}
    run_sft.main(options(data, aligned, sources, tmp_path / "a", **changes))
    said = capsys.readouterr().out
    assert "an epoch has 24 rows: photos 16 of 16 rows (66.7%), 16 conversations" in said
    assert "chats 8 of 24 rows (33.3%)" in said
    assert "every epoch has the same rows (8 of 24 of chats)" in said
    run_sft.main(options(data, aligned, sources, tmp_path / "b", **changes))
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    capsys.readouterr()
    with pytest.raises(
        ValueError, match="was trained with train_data .*'weight': 2.*'weight': 3.*--allow_changed train_data"
    ):
        run_sft.main(options(data, aligned, sources, tmp_path / "a", weights=(3, 1), **changes))
    changes |= {"max_steps": 4, "allow_changed": "train_data,max_steps"}
    run_sft.main(options(data, aligned, sources, tmp_path / "a", weights=(3, 1), **changes))
    assert "train_data was [{" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [PACKED, {"streaming": "true", "shuffle_buffer": 8}], ids=["packed", "streams"])
def test_killed_and_resumed_to_the_byte(data, aligned, sources, tmp_path, changes):
    changes = {"lora_dropout": 0.3, "max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, **changes}
    words = partial(options, data, aligned, sources, **changes)
    succeed(run_forked("run_sft", words(tmp_path / "whole"), tmp_path / "log"))
    (ended,) = run_forked(
        "run_sft", words(tmp_path / "run"), tmp_path / "log", prepare=partial(kill, "on_step_begin", 3)
    )
    assert ended.code == -9 and not (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-2'} " in succeed(
        run_forked("run_sft", words(tmp_path / "run"), tmp_path / "log")
    )
    ours, theirs = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole"))
    assert ours == theirs
    assert (tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors").read_bytes() != theirs  # the control
    names = ("loss", "loss_photos", "loss_chats", "tokens_photos", "samples_chats")
    ours, theirs = (
        [[entry.get(name) for name in names] for entry in entries(tmp_path / run) if "loss" in entry]
        for run in ("run", "whole")
    )
    assert ours == theirs and len(ours) == 6


SIZES = {"max_steps": 4, "save_steps": 4, "lora_r": 0, "adam_epsilon": "1e-3", "learning_rate": "1e-2"}
SIZES |= {"eval_strategy": "steps", "eval_steps": 4, "per_device_eval_batch_size": 1}


@pytest.fixture(scope="module")
def one(data, aligned, sources, tmp_path_factory):
    output = tmp_path_factory.mktemp("one") / "run"
    words = options(data, aligned, sources, output, **SIZES, per_device_train_batch_size=2)
    succeed(run_forked("run_sft", words, output.parent / "log"))
    return output


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_one_of_two_processes_without_an_image(data, aligned, sources, one, tmp_path, how):
    """The same run as one process, with the same losses of each source; nobody waits for ever."""
    words = options(data, aligned, sources, tmp_path / "run", **SIZES, per_device_train_batch_size=1)
    given = {"processes": 2, "prepare": watch_imageless}
    if how == "fsdp2":
        words.append(CONFIGURED)
        given |= {"prepare": shard_on_cpu, "environment": launch_environment("fsdp2.yaml", 2)}
    ended = run_forked("run_sft", words, tmp_path / "log", **given)
    succeed(ended)
    counts = [each.output.count("a batch without an image") for each in ended]
    assert max(counts) > 0 and sum(counts) < 2 * SIZES["max_steps"] and counts[0] != counts[1], counts
    ours, theirs = load_file(tmp_path / "run" / "model.safetensors"), load_file(one / "model.safetensors")
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=5e-6, msg=name)
    for name in ("loss", "loss_photos", "loss_chats", "tokens_photos", "tokens_chats", "eval_photos_loss"):
        assert len(history(one, name))
        torch.testing.assert_close(history(tmp_path / "run", name), history(one, name), rtol=2e-5, atol=0)


def test_inspection_counts_by_source(data, aligned, sources, tmp_path, capsys):
    words = options(data, aligned, sources, tmp_path / "run", num_processes=2, **PACKED)
    run_inspect.main([word for word in words if "lora" not in word])
    said = capsys.readouterr().out
    assert "train photos: " in said and "train chats: " in said and "eval chats: " in said
    assert "an epoch of 2 sources\n  photos 16 of 16 rows (66.7%)" in said and "  chats 8 of 24 rows (33.3%)" in said
    found = json.loads((tmp_path / "run" / "inspection" / "inspection.json").read_text())
    assert (found["train photos"]["rows"], found["train chats"]["rows"]) == (16, 24)
    assert found["epoch"]["sources"]["chats"]["rows"] == 8
    shutil.rmtree(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train_data": '[{"data": "a.json"'}, "train_data is not valid JSON"),
        ({"train_data": '[{"weight": 1}]'}, "train_data, source 0 has no `data`"),
        ({"train_data": '[{"data": "a/b.json"}]'}, "train_data, source 'b': 'a/b.json' does not exist"),
        ({"train_data": '[{"data": "a", "wieght": 1}]'}, "unknown key 'wieght'; the nearest known key is 'weight'"),
        ({"train_data": '[{"data": "a", "weight": 0}]'}, "weight is 0; it must be a number above 0"),
        ({"train_data": '[{"data": "a", "samples": 1.5}]'}, "samples is 1.5; it must be a whole number from 1 on"),
        ({"train_data": '[{"data": "a", "weight": 1, "samples": 1}]'}, "weight 1 and samples 1; give one of them"),
        ({"train_data": '[{"data": "a"}, {"data": "a"}]'}, "train_data: sources 0 and 1 are both named 'a'"),
        ({"eval_data": '[{"data": "a", "weight": 1}]'}, "'weight' is of train_data; of validation data every row"),
        ({"train_data": '{"a": "a.json"}'}, 'train_data is a mapping; give a list of sources: .{"name": "a", "data"'),
        ({"train_data": '[{"data": "a", "weight": NaN}]'}, "weight is NaN; it must be a number above 0"),
        (
            {"train_data": '["a", {"data": "b", "format": "llava"}]'},
            "source 1: format is 'llava'; it must be one of auto",
        ),
        ({"train_format": "coco"}, "train_format is 'coco'; it must be one of auto"),
        ({"metric_for_best_model": "eval_chat_loss"}, "give one of eval_photos_loss, eval_chats_loss"),
        ({"shuffle_buffer": 8}, "shuffle_buffer is 8 but streaming is false"),
        (
            {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": "true"},
            "give one of eval_photos_loss",
        ),
    ],
)
def test_what_is_refused(data, aligned, sources, tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        run_sft.main(options(data, aligned, sources, tmp_path / "run", **change))

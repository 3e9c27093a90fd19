"""An interrupted and restarted run ends with the weights of an uninterrupted one; broken checkpoints are skipped."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from jnana import run_align, run_pretrain, run_sft
from jnana.processing.data import read_json_lines
from jnana.training.saving.frozen_weights import checkpoint_tensors
from tests.scripts.conftest import PRETRAIN, align_options, options, sft_options
from tests.scripts.launching import kill_at, launch


def assert_same_weights(folder, reference, name="model.safetensors"):
    ours, theirs = load_file(folder / name), load_file(reference / name)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def cut(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_kill_9_and_start_again(pretrained, data, tmp_path, capsys):
    """A real process, killed by SIGKILL after its second checkpoint, with samples and validation switched on."""
    output = tmp_path / "killed"
    corpus = data / "corpus.txt"
    samples = {"eval_data": corpus, "sample_steps": 6, "sample_count": 1, "eval_strategy": "steps", "eval_steps": 6}
    arguments = options(**PRETRAIN, train_data=corpus, output_dir=output, **samples)
    process = launch("run_pretrain.py", [*arguments, "--save_total_limit=10"])
    kill_at(process, output / "checkpoint-8")
    # wherever exactly the kill came, make it the worst moment: step 12 half written, step 8 broken too
    shutil.rmtree(output / "checkpoint-12", ignore_errors=True)
    (output / "model.safetensors").unlink(missing_ok=True)
    shutil.copytree(output / "checkpoint-8", output / "checkpoint-12")
    cut(output / "checkpoint-12" / "model.safetensors")
    run_pretrain.main(arguments)
    said = capsys.readouterr().out
    assert "checkpoint-12 is skipped: model.safetensors is truncated" in said
    assert f"resuming from {output / 'checkpoint-8'}" in said
    assert_same_weights(output, pretrained)
    assert [line["step"] for line in list(read_json_lines(output / "samples.jsonl", "skip"))] == [0, 6, 12]


def test_a_resume_that_lost_its_optimizer_would_differ(pretrained, data, tmp_path):
    """The control for the test above: the same steps with a fresh optimizer give other weights."""
    start = pretrained / "checkpoint-8"
    output = tmp_path / "fresh"
    changes = {
        key: value for key, value in PRETRAIN.items() if key not in ("text_config", "train_tokenizer_vocab_size")
    }
    run_pretrain.main(
        options(
            **{**changes, "max_steps": 4}, model_name_or_path=start, train_data=data / "corpus.txt", output_dir=output
        )
    )
    with pytest.raises(AssertionError):
        assert_same_weights(output, pretrained)


def test_align_and_adapter_resume(data, vision, pretrained, aligned, tuned, tmp_path):
    """The last checkpoint of each run is broken, so both resume from the one before."""
    shutil.copytree(aligned, tmp_path / "align")
    cut(tmp_path / "align" / "checkpoint-6" / "optimizer.pt")
    (tmp_path / "align" / "model.safetensors").unlink()
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align"))
    assert_same_weights(tmp_path / "align", aligned)

    shutil.copytree(tuned, tmp_path / "sft")
    cut(tmp_path / "sft" / "checkpoint-6" / "adapter_model.safetensors")
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    run_sft.main(sft_options(data, aligned, output_dir=tmp_path / "sft"))
    assert_same_weights(tmp_path / "sft", tuned, "adapter_model.safetensors")


def test_a_finished_run_stays_as_it_is(data, vision, pretrained, aligned, tmp_path, capsys):
    """The stock Trainer takes one step too many from the last checkpoint of a run."""
    shutil.copytree(aligned, tmp_path / "align")
    (tmp_path / "align" / "model.safetensors").unlink()
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align"))
    assert "is the end of this run: nothing is trained" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "align", aligned))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_finished_run_keeps_its_best_weights(data, vision, pretrained, tmp_path, capsys):
    """Its last checkpoint holds other weights."""
    output = tmp_path / "align"
    captions = {"eval_data": data / "captions.json", "eval_image_folder": data / "images", "eval_strategy": "steps"}
    best = {"load_best_model_at_end": "true", "metric_for_best_model": "loss", "greater_is_better": "true"}
    arguments = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "save_total_limit": 5, **captions, **best}
    run_align.main(align_options(data, vision, pretrained, output_dir=output, **arguments))
    weights = (output / "model.safetensors").read_bytes()
    last, final = checkpoint_tensors(output / "checkpoint-3"), load_file(output / "model.safetensors")
    assert any(not torch.equal(final[name], tensor) for name, tensor in last.items())
    (output / "model.safetensors").unlink()
    run_align.main(align_options(data, vision, pretrained, output_dir=output, **arguments))
    assert "is the end of this run: nothing is trained" in capsys.readouterr().out
    assert (output / "model.safetensors").read_bytes() == weights


def steps_of(folder) -> list[int]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in history if "loss" in entry]


def test_a_finished_run_goes_on_when_more_is_asked_for(data, vision, pretrained, tmp_path, capsys):
    """By epochs, of two steps each, and by steps; a finished run trains nothing."""
    output = tmp_path / "align"
    ways = [
        ({"num_train_epochs": 1.5}, 3),
        ({"num_train_epochs": 1.5}, 3),  # finished
        ({"num_train_epochs": 2}, 4),  # of as many epochs, rounded up
        ({"max_steps": 4}, 4),  # finished
        ({"max_steps": 5}, 5),
        ({"num_train_epochs": 2}, 5),  # finished
    ]
    steps = 0
    for changes, wanted in ways:
        options = {"max_steps": -1, "save_steps": 1, "save_total_limit": 1, **changes}
        options["allow_changed"] = "max_steps,num_train_epochs"
        run_align.main(align_options(data, vision, pretrained, output_dir=output, **options))
        said = capsys.readouterr().out
        assert ("is the end of this run: nothing is trained" in said) == (wanted == steps), changes
        assert (f"resuming from {output / f'checkpoint-{steps}'} " in said) == (steps > 0)
        assert steps_of(output) == list(range(1, wanted + 1))
        steps = wanted


def test_other_data_is_refused_and_an_allowed_change_trains(data, vision, pretrained, tmp_path, capsys):
    captions = json.loads((data / "captions.json").read_text())
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(captions))
    changes = {"output_dir": tmp_path / "align", "train_data": file, "max_steps": 2, "save_steps": 1}
    run_align.main(align_options(data, vision, pretrained, **changes))
    shutil.rmtree(tmp_path / "align" / "checkpoint-2")
    file.write_text(json.dumps({**captions, "annotations": captions["annotations"][:-1]}))
    with pytest.raises(ValueError, match="checkpoint-1 was trained on other rows of train_data"):
        run_align.main(align_options(data, vision, pretrained, **changes))
    file.write_text(json.dumps(captions))
    changes |= {"max_grad_norm": "0.5", "allow_changed": "max_grad_norm"}
    capsys.readouterr()
    run_align.main(align_options(data, vision, pretrained, **changes))
    assert "max_grad_norm was 1.0 and is 0.5 from here on" in capsys.readouterr().out
    record = json.loads((tmp_path / "align" / "recipe_record.json").read_text())
    assert record["options"]["max_grad_norm"] == 0.5 and record["format"] == 1


def test_overwriting_starts_anew(data, vision, pretrained, aligned, tmp_path):
    shutil.copytree(aligned, tmp_path / "align")
    changes = {"overwrite_output_dir": "true", "max_steps": 2}
    run_align.main(align_options(data, vision, pretrained, output_dir=tmp_path / "align", **changes))
    assert [path.name for path in (tmp_path / "align").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_stream_resumes_exactly(data, tmp_path):
    """A streamed corpus has no length; the batches already trained on are skipped."""
    corpus = data / "corpus.txt"
    arguments = {**PRETRAIN, "train_data": corpus, "streaming": "true", "logging_steps": 1}
    run_pretrain.main(options(**arguments, output_dir=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-12")
    run_pretrain.main(options(**arguments, output_dir=tmp_path / "again"))
    assert_same_weights(tmp_path / "again", tmp_path / "whole")

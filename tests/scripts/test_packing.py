"""The stage scripts with packed rows: the same steps as without, however batches are cut, interrupted or spread."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from jnana import run_align, run_pretrain, run_sft
from tests.scripts.conftest import align_options, options, sft_options
from tests.scripts.forked import run_forked, succeed
from tests.scripts.test_processes import assert_same_run, losses_of
from tests.scripts.test_resume import assert_same_weights


# Every step is the whole data set, so that one layout's steps are another's
ALL = {"max_row_tokens": 44, "adam_epsilon": "1e-3", "save_strategy": "no", "logging_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def captions(data, tmp_path_factory):
    """Six pictures with one to five captions of one to eight words, two of them alike."""
    folder = tmp_path_factory.mktemp("captions")
    coco = json.loads((data / "captions.json").read_text())
    images = coco["images"][:6]
    texts = [["white"] * (1 + (3 * i + j) % 8) for i in range(6) for j in range(1 + i % 5)]
    owners = [i for i in range(6) for _ in range(1 + i % 5)]
    annotations = [
        {"id": n, "image_id": images[owner]["id"], "caption": " ".join([*text, "on", "black"][:8])}
        for n, (owner, text) in enumerate(zip(owners, texts, strict=True))
    ]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "captions.json", len(annotations)


def layout(data, vision, pretrained, file, folder, batch, **changes) -> list[str]:
    """Three steps over all of the data, and the loss of validation at the end."""
    changes = {"train_data": file, "eval_data": file, "eval_strategy": "steps", "eval_steps": 3, **ALL, **changes}
    changes |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": 3, "output_dir": folder}
    return align_options(data, vision, pretrained, **changes)


@pytest.fixture(scope="module")
def runs(data, vision, pretrained, captions, tmp_path_factory):
    """A folder with the same run in four layouts: `none`, `rows`, and the eight rows of a shared image as 8x1, 1x8."""
    folder = tmp_path_factory.mktemp("layouts")
    file, count = captions
    for name, batch, changes in (
        ("none", count, {}),
        ("rows", 64, {"packing": "rows"}),
        ("8x1", 8, {"packing": "shared_image"}),
        ("1x8", 1, {"packing": "shared_image", "gradient_accumulation_steps": 8}),
    ):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run_align.main(layout(data, vision, pretrained, file, folder / name, batch, **changes))
        if "x" in name:
            assert " 8 packed rows" in said.getvalue() and "saved)" in said.getvalue()
    return folder


@pytest.mark.parametrize("name", ["rows", "8x1", "1x8"])
def test_align_is_the_same_run_in_every_layout(runs, name):
    assert_same_run(runs / name, runs / "none")
    assert eval_loss(runs / name) == pytest.approx(eval_loss(runs / "none"), rel=1e-5)


def test_two_processes_with_four_rows_each_are_one_with_eight(data, vision, pretrained, captions, runs, tmp_path):
    arguments = layout(data, vision, pretrained, captions[0], tmp_path / "two", 4, packing="shared_image")
    assert "2 process(es), distributed" in succeed(run_forked("run_align", arguments, tmp_path / "log", processes=2))
    assert_same_run(tmp_path / "two", runs / "none")
    assert eval_loss(tmp_path / "two") == pytest.approx(eval_loss(runs / "none"), rel=1e-5)


def eval_loss(folder) -> float:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return next(entry["eval_loss"] for entry in history if "eval_loss" in entry)


def test_without_the_count_of_tokens_it_differs(data, vision, pretrained, captions, runs, tmp_path, monkeypatch):
    """The control: each packed row weighing the same."""
    monkeypatch.setattr(Trainer, "_get_num_items_in_batch", lambda *args: None)
    changes = {"packing": "shared_image", "gradient_accumulation_steps": 8}
    run_align.main(layout(data, vision, pretrained, captions[0], tmp_path, 1, **changes))
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path, runs / "8x1")


def test_lora_is_the_same_run(data, aligned, tmp_path):
    changes = {**ALL, "lora_r": 4, "independent_turns": "true", "max_train_rows": 5}
    for packing, batch in (("none", 10), ("shared_image", 64)):
        run_sft.main(
            sft_options(
                data,
                aligned,
                **changes,
                packing=packing,
                per_device_train_batch_size=batch,
                output_dir=tmp_path / packing,
            )
        )
    torch.testing.assert_close(losses_of(tmp_path / "shared_image"), losses_of(tmp_path / "none"), rtol=1e-5, atol=0)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("shared_image", "none"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_packed_run_resumes_exactly(data, vision, pretrained, tmp_path, streaming):
    changes = {"packing": "shared_image", "max_row_tokens": 48, "max_length": 40, "streaming": streaming}
    changes |= {"per_device_train_batch_size": 1, "max_steps": 6, "save_steps": 3, "save_total_limit": 5}

    def run(name, **more):
        run_align.main(align_options(data, vision, pretrained, **{**changes, **more}, output_dir=tmp_path / name))

    run("whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-6")
    run("again")
    assert_same_weights(tmp_path / "again", tmp_path / "whole")
    if streaming == "false":  # the control: another seed packs and shuffles otherwise
        run("other", seed=1)
        with pytest.raises(AssertionError):
            assert_same_weights(tmp_path / "other", tmp_path / "whole")


def test_what_cannot_be_packed_is_refused_at_once(data, vision, pretrained, tmp_path):
    changes = {"packing": "shared_image", "output_dir": tmp_path}
    with pytest.raises(ValueError, match="max_row_tokens is 8, but a conversation of data row 0 has"):
        run_align.main(align_options(data, vision, pretrained, **changes, max_row_tokens=8))
    with pytest.raises(ValueError, match="max_row_tokens 1024 before all of it is measured, but max_length is None"):
        run_align.main(align_options(data, vision, pretrained, **changes, streaming="true"))
    with pytest.raises(SystemExit):
        run_align.main([*align_options(data, vision, pretrained, output_dir=tmp_path), *options(packing="images")])


def test_documents_of_stage_0_are_trained_alone(data, pretrained, tmp_path):
    """The loss of a step over all rows is that of the documents one by one (the Trainer keeps no cache)."""
    texts = [line * n for n in (1, 2, 3) for line in ("what is the top? ", "red on blue ")]
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    changes = {"model_name_or_path": pretrained, "train_data": tmp_path / "corpus.txt", "block_size": 48}
    changes |= {"eval_data": tmp_path / "corpus.txt", "eval_strategy": "steps", "sample_steps": 1, "sample_count": 1}
    changes |= {"packing": "rows", "per_device_train_batch_size": 64, "max_steps": 1, "learning_rate": 0}
    run_pretrain.main(options(**changes, output_dir=tmp_path / "run", logging_steps=1, save_strategy="no"))
    model = AutoModelForCausalLM.from_pretrained(pretrained)
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    total = count = 0
    for text in texts:
        ids = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert losses_of(tmp_path / "run").item() == pytest.approx(total / count, rel=1e-5)
    assert eval_loss(tmp_path / "run") == pytest.approx(total / count, rel=1e-5)

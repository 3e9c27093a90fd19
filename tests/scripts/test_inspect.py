"""run_inspect.py on data with every fault that it looks for, and on data with none."""

import json
import shutil

import pytest
from PIL import Image

from jnana import run_inspect
from jnana.evaluation.inspection import histogram
from tests.scripts.conftest import options


def record(name: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{name}.png", "conversations": turns}


@pytest.fixture
def faulty(tmp_path):
    """Twelve images and a copy of one; a repeated record; a question with one answer; a bad record; a leak."""
    folder = tmp_path / "faulty"
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(12):
        # the 13th colour is the validation image of the control
        Image.new("RGB", (20 + number, 24), (20 * number, 30, 90)).save(folder / "images" / f"{number}.png")
        records += [record(str(number), "is it a picture?", "yes"), record(str(number), "number?", f"it is {number}")]
    Image.new("RGB", (20, 24), (255, 255, 0)).save(folder / "images" / "other.png")
    clean = [one for one in records if one["conversations"][1]["value"] != "yes"]
    (folder / "clean.json").write_text(json.dumps(clean))
    (folder / "clean_eval.json").write_text(json.dumps([record("other", "number?", "none")]))
    shutil.copy(folder / "images" / "0.png", folder / "images" / "copy.png")
    records += [records[1], record("copy", "colour?", "red"), record("missing", "number?", "9")]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "eval.json").write_text(json.dumps([record("copy", "number?", "0"), record("other", "number?", "none")]))
    return folder


def inspect(pretrained, vision, faulty, tmp_path, train="train.json", evaluation="eval.json", **changes) -> dict:
    output = tmp_path / "output"
    values = {
        "vision_model": vision,
        "text_model": pretrained,
        "train_data": faulty / train,
        "eval_data": faulty / evaluation,
        "image_folder": faulty / "images",
        "output_dir": output,
        "packing": "shared_image",
        "max_row_tokens": 128,
        **changes,
    }
    run_inspect.main(options(**values))
    return json.loads((output / "inspection" / "inspection.json").read_text())


def titles(figures: dict) -> str:
    return "\n".join(finding["title"] for finding in figures["findings"])


def test_every_fault_is_found(pretrained, vision, faulty, tmp_path, capsys):
    found = inspect(pretrained, vision, faulty, tmp_path, tokens_per_second=1000)
    train = found["train"]
    assert (train["rows"], train["rows_that_cannot_be_used"], train["different_images"]) == (27, 1, 12)
    assert titles(train).splitlines() == [
        "Rows that can't be used: 1",
        "Images in several rows, and encoded once for each: 12",
        "Conversations that repeat another one, with the same images: 1",
        "Questions with the same answer for every image: 1",
    ]
    assert titles(found["eval"]) == "Validation images that are trained on too: 1"
    assert "copy" in found["eval"]["findings"][0]["examples"][0]
    said = capsys.readouterr().out
    assert "LOOK: Questions with the same answer for every image: 1" in said and "minutes at 1,000 tokens/s" in said
    assert "[[ it is 0" in said
    page = (tmp_path / "output" / "inspection" / "index.html").read_text()
    assert page.count("<article>") == 26 + 2 and page.count('src="data:image') == 26 + 2
    assert "<mark> it is 3" in page


def test_clean_data_has_no_findings(pretrained, vision, faulty, tmp_path):
    found = inspect(pretrained, vision, faulty, tmp_path, train="clean.json", evaluation="clean_eval.json")
    assert found["train"]["findings"] == found["eval"]["findings"] == []


def test_a_leak_of_an_image_that_is_alone_in_its_size(pretrained, vision, faulty, tmp_path):
    """Files of a size that no other has are not read; here two sources have one of that size each."""
    shutil.copy(faulty / "images" / "7.png", faulty / "images" / "leak.png")
    (faulty / "leak.json").write_text(json.dumps([record("leak", "number?", "7")]))
    found = inspect(pretrained, vision, faulty, tmp_path, train="clean.json", evaluation="leak.json")
    assert titles(found["eval"]) == "Validation images that are trained on too: 1"


def listed(faulty, **changes) -> str:
    return json.dumps([{"data": str(faulty / "clean.json"), "image_folder": str(faulty / "images"), **changes}])


def said_of(text: str, start: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip().startswith(start)]


def test_a_list_of_one_source(pretrained, vision, faulty, tmp_path, capsys):
    """The steps of an epoch are those of the same path without a list, or those of its drawn or repeated rows."""
    plain = inspect(pretrained, vision, faulty, tmp_path, train="clean.json")
    steps = said_of(capsys.readouterr().out, "an epoch")
    assert len(steps) == 1 and f"{plain['train']['tokens_of_an_epoch']:,} tokens and" in steps[0]
    one = inspect(pretrained, vision, faulty, tmp_path, train_data=listed(faulty))
    assert said_of(capsys.readouterr().out, "an epoch") == steps and "epoch" not in one
    figures = ("rows", "tokens_of_an_epoch", "sequences_of_an_epoch", "findings")
    assert [one["train clean"][name] for name in figures] == [plain["train"][name] for name in figures]
    assert titles(one["eval"]) == titles(plain["eval"]) != ""

    twice = inspect(pretrained, vision, faulty, tmp_path, train_data=listed(faulty, repeat=2))
    said = said_of(capsys.readouterr().out, "an epoch")
    assert said[0] == "an epoch of 1 source" and f"{twice['epoch']['tokens']:,} tokens and" in said[1]
    assert twice["epoch"]["sources"]["clean"]["rows"] == 2 * plain["train"]["rows"]
    # The figures of the source itself count each row once.
    assert [twice["train clean"][name] for name in figures] == [plain["train"][name] for name in figures]


def test_the_first_rows_of_a_stream(pretrained, vision, faulty, tmp_path, capsys):
    records = json.loads((faulty / "clean.json").read_text())
    (faulty / "stream.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    changes = {"train": "stream.jsonl", "streaming": "true", "stream_rows": 5, "max_length": 128, "max_steps": 3}
    found = inspect(pretrained, vision, faulty, tmp_path, evaluation="clean_eval.json", **changes)
    assert found["train"]["rows"] == found["train"]["conversations"] == 5
    assert found["train"]["rows_that_cannot_be_used"] == 0
    assert "is a stream: its first 5 rows are looked at" in capsys.readouterr().out


def test_the_supervised_share_is_the_collators(pretrained, vision, faulty, tmp_path):
    """Tokens with a label over all tokens, counted in the batches that a run would train on."""
    from jnana.processing.data import JnanaCollator, load_rows
    from jnana.training.model_setup import prepare_processor
    from jnana.training.options.arguments import ModelArguments

    found = inspect(pretrained, vision, faulty, tmp_path, train="clean.json", packing="none")
    processor = prepare_processor(ModelArguments(vision_model=str(vision), text_model=str(pretrained)))
    batch = JnanaCollator(processor)(list(load_rows(faulty / "clean.json", image_folder=faulty / "images")))
    share = (batch["labels"] != -100).sum() / batch["attention_mask"].sum()
    assert found["train"]["supervised_share"] == pytest.approx(share.item(), abs=1e-6)
    assert found["train"]["tokens_of_an_epoch"] == batch["attention_mask"].sum()


def test_nothing_of_the_data_becomes_markup(pretrained, vision, faulty, tmp_path):
    evil = [record("1", "<script>alert(1)</script>", "<img src=x>")]
    (faulty / "evil.json").write_text(json.dumps(evil))
    inspect(pretrained, vision, faulty, tmp_path, train="evil.json")
    page = (tmp_path / "output" / "inspection" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "<img src=x" not in page


@pytest.mark.parametrize("values", [[5], [1, 2], list(range(100))])
def test_a_histogram_holds_every_value(values):
    bars = histogram(values)
    assert sum(bar["count"] for bar in bars) == len(values)
    assert max(bar["share"] for bar in bars) == 1

"""Answering questions about images that are cut into tiles: batches of images of many sizes, and samples of a run."""

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from jnana.evaluation import QuestionSet, answer_questions
from jnana.evaluation.contact_sheet import write_contact_sheet
from jnana.evaluation.prompts import PromptCollator, prompt_length
from jnana.processing.data import images as images_module
from jnana.processing.data.images import read_image_bytes
from jnana.training.loading import load_model
from jnana.training.monitoring import SamplesCallback, samples_from_rows, samples_page
from tests.evaluation.test_generation import OPTIONS, one_by_one, predictions
from tests.tiles import KINDS, SIZES, row, save_pictures, tile_pair
from tests.tiny import save_tiny_llava


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict:
    """Models with their processors. Shared: tests restore what they change."""
    return {kind: tile_pair(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def paths(tmp_path):
    return save_pictures(tmp_path / "pictures")


def rows_about(paths) -> list[dict]:
    """Questions about one image, about two or none, and about one image twice."""
    rows = [row([path], ["yes"], f"is there a {path.stem}?", f"record {path.stem}") for path in paths]
    rows.append(row([paths[1], paths[2]], ["no"], "what do you see?", "record two"))
    rows.append(row([], ["no"], "what do you see?", "record none"))
    rows.append(row([paths[4], paths[4]], ["no"], "how many pieces?", "record twice"))
    return rows


def whole_inputs(questions, processor, blind):
    """The inputs of all questions in one batch, each asked alone."""
    return PromptCollator(questions, processor, blind)([[index] for index in range(len(questions))]).prompts[0].inputs


@pytest.mark.parametrize("kind", KINDS)
def test_batches_answer_as_single_questions_do(pairs, paths, kind, monkeypatch):
    model, processor = pairs[kind]
    questions = QuestionSet(rows_about(paths))
    expected = one_by_one(model, processor, questions)
    for batch_size in (1, 4, 9):
        records = answer_questions(model, processor, questions, **{**OPTIONS, "batch_size": batch_size})
        assert predictions(records) == expected
    assert len(set(expected)) > 3
    # the control: the images of a batch change places
    original = PromptCollator.__call__

    def shuffling(self, batch):
        made = original(self, batch)
        inputs = made.prompts[0].inputs
        for name in ("pixel_values", "image_sizes"):
            inputs[name] = inputs[name].roll(1, 0)
        return made

    monkeypatch.setattr(PromptCollator, "__call__", shuffling)
    assert predictions(answer_questions(model, processor, questions, **{**OPTIONS, "batch_size": 9})) != expected


def test_a_stock_checkpoint_answers_as_transformers_does(tmp_path, paths):
    """Loaded by `load_model`, in batches; transformers' own class and processor one question at a time."""
    folder = save_tiny_llava(tmp_path / "model")
    model, processor = load_model(str(folder), dtype="float32")
    questions = QuestionSet(rows_about(paths))
    records = answer_questions(model, processor, questions, **{**OPTIONS, "batch_size": 5})
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    stock.generation_config.suppress_tokens = [model.config.image_token_id]
    assert predictions(records) == one_by_one(stock, AutoProcessor.from_pretrained(folder), questions)


def test_questions_with_large_images_come_first(pairs, paths):
    _, processor = pairs["llava_next"]
    questions = QuestionSet(rows_about(paths))
    lengths = [prompt_length(questions, question, processor) for question in questions.questions]
    inputs = whole_inputs(questions, processor, blind=False)
    tokens = inputs["attention_mask"].sum(1).tolist()
    images = (inputs["input_ids"] == processor.image_token_id).sum(1).tolist()
    assert images == [processor.count_image_tokens(size) for size in SIZES] + [36, 0, 48]
    assert sorted(range(9), key=lambda i: -lengths[i])[:2] == sorted(range(9), key=lambda i: -tokens[i])[:2]
    paths[4].write_bytes(b"no image")
    assert prompt_length(questions, questions.questions[4], processor) < lengths[4]  # `answer_questions` reports it


def test_images_of_one_size_are_not_opened_for_it(pairs, paths, monkeypatch):
    _, processor = pairs["llava_next"]
    questions = QuestionSet(rows_about(paths))
    monkeypatch.setattr(images_module, "_open", None)
    with pytest.raises(TypeError):  # the control
        prompt_length(questions, questions.questions[0], processor)
    monkeypatch.setattr(type(processor), "image_grid_pinpoints", None)
    assert prompt_length(questions, questions.questions[0], processor) > 0


def test_blind_and_bad_images(pairs, paths):
    model, processor = pairs["llava_next"]
    questions = QuestionSet(rows_about(paths))
    seen, blind = (whole_inputs(questions, processor, blind) for blind in (False, True))
    for name in ("input_ids", "image_sizes"):
        assert torch.equal(seen[name], blind[name])
    assert not torch.equal(seen["pixel_values"], blind["pixel_values"])
    expected = predictions(answer_questions(model, processor, questions, **OPTIONS))
    paths[0].write_bytes(b"no image")
    records = answer_questions(model, processor, questions, **OPTIONS)
    assert predictions(records) == [None, *expected[1:]] and "known format" in records[0]["error"]


def test_samples_of_a_run_and_a_contact_sheet(pairs, paths, tmp_path):
    model, processor = pairs["llava_next"]
    rows = rows_about(paths)
    samples = samples_from_rows(rows, processor, 9)
    callback = SamplesCallback(samples, processor.decode, 1, 8)

    class Arguments:
        device, bf16, fp16 = torch.device("cpu"), False, False

    questions = QuestionSet(rows)
    texts = [callback.generate(model, sample, Arguments) for sample in samples]
    ends = processor.tokenizer.eos_token
    assert [text.replace(ends, "").strip() for text in texts] == one_by_one(model, processor, questions)
    assert [tuple(sample.inputs["image_sizes"][0].tolist()) for sample in samples[:6]] == SIZES
    assert samples_page(samples, []).count("<img") == 6 + 2 + 2
    records = answer_questions(model, processor, questions, **OPTIONS)
    sheet = write_contact_sheet(tmp_path / "sheet.png", questions, records)
    assert Image.open(sheet).width > 100 and read_image_bytes({"path": str(sheet), "bytes": None})

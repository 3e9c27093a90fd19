"""Answering a test set: answers do not depend on batching, interruptions or the number of processes."""

import io
import json
import os

import pytest
import torch
from PIL import Image

from jnana.evaluation import QuestionSet, answer_questions, model_fingerprint
from jnana.evaluation.prompts import PromptCollator
from jnana.processing.data import load_rows
from jnana.training.loading import load_model
from tests.evaluation.conftest import QUESTIONS, save_tiny_checkpoint, write_test_set


OPTIONS = {"batch_size": 4, "max_new_tokens": 8, "num_workers": 0, "progress_bar": False}


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_model(str(checkpoint))


@pytest.fixture
def count_generate(loaded, monkeypatch):
    """Counts the questions in each `generate` call; raises from call number `stop` on."""
    model, asked, stop = loaded[0], [], [None]
    generate = type(model).generate

    def counting(self, *args, **kwargs):
        if stop[0] is not None and len(asked) >= stop[0]:
            raise KeyboardInterrupt
        asked.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate", counting)
    return asked, stop


def predictions(records):
    return [record["prediction"] for record in records]


def one_by_one(model, processor, questions, **padding):
    """The answers by a plain loop over the questions: without batches, and without padding or with a wrong one."""
    answers = []
    for question in questions.questions:
        messages = questions.messages_with_images(question, questions.images(question))
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **padding
        )
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def test_batches_answer_as_single_questions_do(loaded, test_set):
    model, processor = loaded
    questions = QuestionSet(load_rows(str(test_set)))
    records = answer_questions(model, processor, questions, **OPTIONS)
    assert [record["question"] for record in records] == [question for question, _, _ in QUESTIONS]
    assert [record["references"] for record in records] == [[answer] for _, answer, _ in QUESTIONS]
    assert [record["category"] for record in records] == [category for _, _, category in QUESTIONS]
    assert all("record" in record["source"] for record in records)
    assert predictions(records) == one_by_one(model, processor, questions)
    # the control: padding on the right changes the answers
    wrong = {"processor_kwargs": {"padding": "max_length", "max_length": 64, "padding_side": "right"}}
    assert predictions(records) != one_by_one(model, processor, questions, **wrong)


def test_workers_and_batch_size_change_nothing(loaded, test_set):
    rows = load_rows(str(test_set))
    alone = answer_questions(*loaded, rows, **{**OPTIONS, "batch_size": 1})
    shared = answer_questions(*loaded, rows, **{**OPTIONS, "batch_size": 3, "num_workers": 2})
    assert alone == shared


def test_longest_questions_are_asked_first(loaded, test_set, count_generate, monkeypatch):
    lengths = []
    call = PromptCollator.__call__

    def noting(self, batch):
        made = call(self, batch)
        lengths.extend(made.prompts[0].inputs["attention_mask"].sum(1).tolist())
        return made

    monkeypatch.setattr(PromptCollator, "__call__", noting)
    answer_questions(*loaded, load_rows(str(test_set)), **OPTIONS)
    assert count_generate[0] == [4, 2]
    assert lengths[0] == max(lengths) and lengths[-1] == min(lengths) and len(set(lengths)) > 1


def test_blind_inputs_are_grey_pictures_of_the_same_size(loaded, test_set):
    questions = QuestionSet(load_rows(str(test_set)))
    sizes = [questions.images(question)[0].size for question in questions.questions]
    grey = [questions.images(question, blind=True)[0] for question in questions.questions]
    assert [image.size for image in grey] == sizes and len(set(sizes)) > 1
    assert all(image.getcolors() == [(image.width * image.height, (128, 128, 128))] for image in grey)

    def pixels(blind):
        return PromptCollator(questions, loaded[1], blind)([[0], [1]]).prompts[0].inputs["pixel_values"]

    assert torch.equal(pixels(True)[0], pixels(True)[1])
    assert not torch.equal(pixels(False)[0], pixels(False)[1])
    records = answer_questions(*loaded, questions, blind=True, **OPTIONS)
    assert all(record["blind"] for record in records)


def test_evaluation_mode_and_back(loaded, test_set):
    model, processor = loaded
    questions = QuestionSet(load_rows(str(test_set)))
    expected = predictions(answer_questions(model, processor, questions, **OPTIONS))
    modes = []
    handle = model.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    model.train()
    try:
        assert predictions(answer_questions(model, processor, questions, **OPTIONS)) == expected
        assert model.training and modes and not any(modes)
    finally:
        handle.remove()
        model.eval()


def test_complete_says_whether_the_model_ended_the_answer(loaded, test_set):
    model, processor = loaded
    rows = load_rows(str(test_set))
    bias, end = model.get_output_embeddings().bias, processor.tokenizer.eos_token_id
    kept = bias.detach().clone()
    found = []
    for push in (1e4, -1e4):
        with torch.no_grad():
            bias[end] = push
        try:
            found.append(answer_questions(model, processor, rows, **OPTIONS))
        finally:
            with torch.no_grad():
                bias.copy_(kept)
    assert all(record["complete"] and record["prediction"] == "" for record in found[0])
    assert not any(record["complete"] for record in found[1])


@pytest.mark.parametrize("damage", ["missing", "truncated", "too large", "no picture"])
def test_a_bad_picture_costs_one_question_only(loaded, test_set, damage):
    expected = predictions(answer_questions(*loaded, load_rows(str(test_set)), **OPTIONS))
    options = dict(OPTIONS)
    picture = test_set.parent / "1.png"
    if damage == "missing":
        picture.unlink()
    elif damage == "truncated":
        noise = Image.effect_noise((64, 64), 50).convert("RGB")
        buffer = io.BytesIO()
        noise.save(buffer, "PNG")
        picture.write_bytes(buffer.getvalue()[:2000])
    elif damage == "too large":
        Image.new("RGB", (300, 300)).save(picture)
        options["max_image_pixels"] = 40 * 40
    else:
        records = json.loads(test_set.read_text())
        del records[1]["image"]
        test_set.write_text(json.dumps(records))
    records = answer_questions(*loaded, load_rows(str(test_set)), **options)
    assert records[1]["prediction"] is None
    assert "record 1" in records[1]["error"]
    assert [text for text in predictions(records) if text is not None] == [*expected[:1], *expected[2:]]


def test_a_full_disk_leaves_the_mode_of_the_model(loaded, test_set, tmp_path, monkeypatch):
    model, processor = loaded
    rows = load_rows(str(test_set))

    fsync = os.fsync

    def full(file):
        if model.training:
            return fsync(file)
        raise OSError("no space left on device")  # when the first answers are written

    monkeypatch.setattr(os, "fsync", full)
    model.train()
    try:
        with pytest.raises(OSError, match="no space") as caught:
            answer_questions(model, processor, rows, predictions_file=tmp_path / "predictions.jsonl", **OPTIONS)
        # although the error keeps the frame that answered
        assert caught.value.__traceback__ is not None and model.training
    finally:
        model.eval()


def test_an_interrupted_run_goes_on_where_it_stopped(loaded, test_set, tmp_path, count_generate):
    asked, stop = count_generate
    rows, file = load_rows(str(test_set)), tmp_path / "out" / "predictions.jsonl"
    expected = answer_questions(*loaded, rows, **OPTIONS)
    assert asked == [4, 2]

    asked.clear()
    stop[0] = 1
    with pytest.raises(KeyboardInterrupt):
        answer_questions(*loaded, rows, predictions_file=file, **OPTIONS)
    assert len(file.read_text().splitlines()) == 4
    with file.open("a") as lines:
        lines.write('{"source": "test.json, rec')  # as after a kill during a write

    asked.clear()
    stop[0] = None
    assert answer_questions(*loaded, rows, predictions_file=file, **OPTIONS) == expected
    assert asked == [2]
    assert [json.loads(line) for line in file.read_text().splitlines()] == expected

    asked.clear()
    assert answer_questions(*loaded, rows, predictions_file=file, **OPTIONS) == expected
    assert asked == []


def test_answers_of_another_run_are_never_taken(loaded, test_set, tmp_path, count_generate):
    asked, _ = count_generate
    model, processor = loaded
    file = tmp_path / "predictions.jsonl"

    def questions_asked(**changes):
        asked.clear()
        answer_questions(
            model, processor, load_rows(str(test_set)), **OPTIONS, **{"predictions_file": file, **changes}
        )
        return sum(asked)

    assert questions_asked() == 6 and questions_asked() == 0
    assert questions_asked(blind=True) == 6 and questions_asked() == 6  # a file holds one run

    for colour in ("red", "blue"):  # replaced under its old name; the second file has the same size
        Image.new("RGB", (40, 40), colour).save(test_set.parent / "3.png", compress_level=0)
        assert questions_asked() == 1
    records = json.loads(test_set.read_text())
    records[4]["conversations"][1]["value"] = "one"
    test_set.write_text(json.dumps(records))
    assert questions_asked() == 1

    weight = model.model.multi_modal_projector.state_dict()
    name = next(iter(weight))
    kept = weight[name].clone()
    weight[name].add_(1e-3)
    try:
        assert questions_asked() == 6
    finally:
        weight[name].copy_(kept)


def test_an_unreadable_picture_is_tried_again(loaded, test_set, tmp_path, count_generate):
    options = {**OPTIONS, "predictions_file": tmp_path / "predictions.jsonl"}
    Image.new("RGB", (300, 300)).save(test_set.parent / "1.png")
    first = answer_questions(*loaded, load_rows(str(test_set)), max_image_pixels=40 * 40, **options)
    assert "error" in first[1]
    count_generate[0].clear()
    second = answer_questions(*loaded, load_rows(str(test_set)), **options)
    assert count_generate[0] == [1] and second[1]["prediction"] is not None and "error" not in second[1]


def test_fingerprint(loaded, checkpoint, tmp_path):
    again, _ = load_model(str(checkpoint))
    assert model_fingerprint(again) == model_fingerprint(loaded[0])
    assert model_fingerprint(again.to(torch.bfloat16)) != model_fingerprint(loaded[0])
    other, _ = load_model(str(save_tiny_checkpoint(tmp_path, seed=1)))
    assert model_fingerprint(other) != model_fingerprint(loaded[0])


def part(kind, text=None):
    return {"type": kind, "text": text}


def turn(role, *parts):
    return {"role": role, "content": list(parts)}


def row(conversations, images=(), categories=None, answers=None):
    return {
        "images": list(images),
        "conversations": conversations,
        "categories": categories or [None] * len(conversations),
        "answers": answers or [[] for _ in conversations],
        "source": "test.json, record 0",
    }


def test_captions_of_one_picture_are_one_question():
    conversations = [
        [turn("user", part("text", "What is it?")), turn("assistant", part("text", answer))]
        for answer in ("a cat", "cats")
    ]
    conversations.append([turn("user", part("text", "Where?")), turn("assistant", part("text", "here"))])
    questions = QuestionSet([row(conversations, categories=["what", "what", "where"])]).questions
    assert [(q.text, q.references, q.category) for q in questions] == [
        ("What is it?", ["a cat", "cats"], "what"),
        ("Where?", ["here"], "where"),
    ]


def test_every_turn_is_asked_after_the_true_ones():
    conversation = [
        turn("user", part("text", "What is it?")),
        turn("assistant", part("text", "a cat")),
        turn("user", part("text", "Which colour?")),
        turn("assistant", part("text", "black")),
    ]
    first, second = QuestionSet([row([conversation], categories=["colour"], answers=[["black", "dark"]])]).questions
    assert (first.text, first.history, first.references, first.category) == ("What is it?", "", ["a cat"], None)
    assert second.history == "user: What is it?\nassistant: a cat"
    assert (second.text, second.references, second.category) == ("Which colour?", ["black", "dark"], "colour")


def test_the_same_record_twice_is_asked_twice():
    conversation = [turn("user", part("text", "What?")), turn("assistant", part("text", "this"))]
    questions = QuestionSet([row([conversation]), row([conversation])]).questions
    assert len({question.key for question in questions}) == 2


def test_no_question_is_an_error():
    with pytest.raises(ValueError, match="holds no question"):
        QuestionSet([row([])])
    with pytest.raises(ValueError, match="no answer"):
        QuestionSet([row([[turn("user", part("text", "What?"))]])])


def test_a_stream_is_a_test_set_too(loaded, tmp_path):
    path = write_test_set(tmp_path / "data")
    stream = load_rows(str(path), streaming=True)
    assert answer_questions(*loaded, stream, **OPTIONS) == answer_questions(*loaded, load_rows(str(path)), **OPTIONS)


@pytest.mark.parametrize("name", ["batch_size", "max_new_tokens"])
def test_options_below_one_are_refused(loaded, test_set, name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        answer_questions(*loaded, load_rows(str(test_set)), **{**OPTIONS, name: 0})


def test_other_picture_or_generation_settings_are_another_run(checkpoint, test_set, tmp_path, count_generate):
    asked, _ = count_generate
    model, processor = load_model(str(checkpoint))
    options = {**OPTIONS, "predictions_file": tmp_path / "predictions.jsonl"}

    def questions_asked():
        asked.clear()
        answer_questions(model, processor, load_rows(str(test_set)), **options)
        return sum(asked)

    assert questions_asked() == 6 and questions_asked() == 0
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert questions_asked() == 6 and questions_asked() == 0
    model.generation_config.repetition_penalty = 1.5
    assert questions_asked() == 6 and questions_asked() == 0
    processor.chat_template = processor.chat_template.replace("end of question:", "end:")
    assert questions_asked() == 6 and questions_asked() == 0

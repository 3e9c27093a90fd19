"""A `resblock` projector fitted by an `mlp`: how near it comes on images it has not seen, and what answers survive."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jnana import load_rows, run_sft
from jnana.evaluation import QuestionSet
from jnana.export import Agreement, ExportFailedError, ExportOptions, distil_projector, export_model
from jnana.export.comparison import ChatsOfQuestions, answering, ask
from jnana.processing.data import load_image
from jnana.training.loading import load_model
from tests.export.models import save_model
from tests.scripts.tiny_data import make_data


def images(count: int = 60) -> list[Image.Image]:
    """Smooth images, whose features lie close together as those of photographs of one kind do."""
    random = np.random.default_rng(5)
    coarse = [random.integers(0, 256, (3, 3, 3), dtype=np.uint8) for _ in range(count)]
    return [Image.fromarray(values).resize((24, 24), Image.Resampling.BICUBIC) for values in coarse]


def chats(pictures) -> list:
    return [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "which?"}]}]
        for picture in pictures
    ]


@pytest.fixture(scope="module")
def resblock(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("resblock")
    return save_model(folder, projector_type="resblock", vision_feature_layer=-2)


def test_the_fit_is_near_on_images_that_it_has_not_seen(resblock):
    model, processor = load_model(resblock)
    teacher = model.model.multi_modal_projector
    report = distil_projector(model, processor, images(), steps=400)
    assert report.images == 60 and report.vectors == 54 * 4  # every tenth image is held out
    assert report.relative_error < report.least_squares_error and report.relative_error < 0.2
    assert model.config.projector_type == "mlp" and model.model.multi_modal_projector is not teacher
    pixels = processor.image_processor(images(62)[60:], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        features = model.model.get_vision_features(pixels)[1]
        ours, expected = model.model.multi_modal_projector.project(features), teacher.project(features)
    assert (ours - expected).norm() < 0.3 * expected.norm()


def test_more_images_and_steps_come_nearer(resblock):
    errors = []
    for count, steps in ((20, 0), (20, 200), (200, 400)):
        model, processor = load_model(resblock)
        errors.append(distil_projector(model, processor, images(count), steps=steps).relative_error)
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("to", ["llava", "gguf"])
def test_a_distilled_export(resblock, tmp_path, caplog, to):
    options = ExportOptions(to, distill=True, distill_steps=400, max_new_tokens=1)
    with caplog.at_level("INFO", "jnana.export"):
        agreement = export_model(resblock, tmp_path / "out", options, chats(images(40)), images(200))
    assert agreement.answers == 40 and agreement.same_answers >= 38 and agreement.max_logit_difference > 1e-4
    assert "relative error" in caplog.text
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{1 - agreement.same_answers / 40:.1%} of the answers changed" in card
    if to == "llava":
        config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
        assert config["model_type"] == "llava"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[str, Path]:
    """A model with a `resblock` projector that has learnt the colours of small pictures, and its data."""
    folder = tmp_path_factory.mktemp("trained")
    data = make_data(folder / "data")
    path = save_model(folder, projector_type="resblock", vision_feature_layer=-2, text_initializer_range=0.02)
    options = {"model_name_or_path": path, "train_data": data / "instruct.json", "image_folder": data / "images"}
    options |= {"output_dir": folder / "sft", "lora_r": 0, "max_steps": 150, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 16, "learning_rate": "3e-3"}
    run_sft.main([f"--{name}={value}" for name, value in options.items()])
    return str(folder / "sft"), data


@pytest.mark.parametrize("to", ["llava", "gguf"])
def test_a_trained_model_keeps_its_answers(trained, tmp_path, to):
    """Whole answers, most of them right, of all questions that it was trained on; with no steps of the fit they go."""
    path, data = trained
    rows = load_rows(str(data / "instruct.json"), image_folder=str(data / "images"))
    questions = QuestionSet(rows)
    pictures = [load_image(image) for row in rows for image in row["images"]]
    options = ExportOptions(to, distill=True, distill_steps=400, max_new_tokens=8)
    agreement = export_model(path, tmp_path / "out", options, ChatsOfQuestions(questions), pictures)
    assert agreement.answers == 32 and agreement.same_answers >= 31
    model, processor = load_model(path)
    found = ask(answering(model, processor, processor, 8), ChatsOfQuestions(questions))[1]
    answers = [processor.decode(ids, skip_special_tokens=True).strip() for ids in found]
    right = [answer in question.references for answer, question in zip(answers, questions.questions, strict=True)]
    assert len(set(answers)) >= 4 and sum(right) >= 28


def test_a_bad_fit_is_not_written(resblock, tmp_path):
    """Two images and no training: the least squares fit of 4 vectors."""
    noise = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), dtype=np.uint8)
    options = ExportOptions("llava", distill=True, distill_steps=0, max_new_tokens=8)
    with pytest.raises(ExportFailedError, match="at least 95% of the answers must survive"):
        export_model(resblock, tmp_path / "out", options, chats(images(20)), [Image.fromarray(n) for n in noise])
    assert not (tmp_path / "out").exists()


def test_refusals(resblock, tmp_path):
    options = ExportOptions("llava", distill=True)
    with pytest.raises(ValueError, match="at least two images"):
        export_model(resblock, tmp_path / "out", options, chats(images(1)), images(1))
    mlp = save_model(tmp_path / "mlp", projector_type="mlp")
    with pytest.raises(ValueError, match="distill replaces a projector of type resblock.*'mlp'"):
        export_model(mlp, tmp_path / "out", options)


@pytest.mark.parametrize(
    "agreement, distilled, passes",
    [
        (Agreement(0.0, 20, 20), False, True),
        (Agreement(2e-4, 20, 20), False, False),
        (Agreement(0.0, 20, 19), False, False),
        (Agreement(float("inf"), 20, 20), False, False),
        (Agreement(3.0, 20, 19), True, True),
        (Agreement(0.0, 20, 18), True, False),
    ],
)
def test_limits(agreement, distilled, passes):
    if passes:
        agreement.check(distilled)
    else:
        with pytest.raises(ExportFailedError, match="nothing was written"):
            agreement.check(distilled)

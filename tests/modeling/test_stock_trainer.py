"""The stock Trainer with no setting of ours evaluates our model as it evaluates stock LLaVA.

Each test runs both classes, LLaVA as the control, on the same batches.
"""

import pytest
import torch
from accelerate.utils import is_compiled_module
from transformers import EarlyStoppingCallback, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from jnana.modeling import JnanaForConditionalGeneration
from tests.tiny import IMAGE_SIZE, save_tiny_llava


CLASSES = [JnanaForConditionalGeneration, LlavaForConditionalGeneration]
ROWS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny_llava(tmp_path_factory.mktemp("llava"), "llava"))


def load(model_class, folder):
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    model.model.vision_tower.requires_grad_(False)
    return model


def rows(model) -> list[dict[str, torch.Tensor]]:
    """An image of four tokens, a question and an answer, as any collator of LLaVA makes them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(ROWS):
        ids = torch.randint(2, 290, (12,), generator=generator)
        ids[1:5] = model.config.image_token_id
        labels = ids.clone()
        labels[:6] = -100
        pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return made


def make_trainer(model, output_dir, **options) -> Trainer:
    hooks = {name: options.pop(name) for name in ("compute_metrics", "callbacks") if name in options}
    hooks |= {name: options.pop(name) for name in ("preprocess_logits_for_metrics",) if name in options}
    args = TrainingArguments(
        output_dir=str(output_dir),
        **{"use_cpu": True, "report_to": "none", "per_device_eval_batch_size": 4, "max_steps": 2, **options},
    )
    data = rows(model)
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, **hooks)


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_trainer_finds_labels_and_nothing_else(model_class):
    assert find_labels(model_class) == ["labels"]


def test_evaluate_reports_the_same_loss(folder, tmp_path):
    losses = [make_trainer(load(of, folder), tmp_path).evaluate()["eval_loss"] for of in CLASSES]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    model = load(CLASSES[0], folder)
    model.lm_head.weight.data *= 0.9  # the control
    assert make_trainer(model, tmp_path).evaluate()["eval_loss"] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("model_class", CLASSES)
def test_metrics_get_logits_and_labels(model_class, folder, tmp_path):
    seen = {}

    def best(logits, labels):
        logits = logits[0] if isinstance(logits, tuple) else logits
        seen["logits"] = logits.shape
        return logits.argmax(-1)

    def compute_metrics(prediction):
        seen["labels"], seen["predictions"] = prediction.label_ids.shape, prediction.predictions.shape
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    hooks = {"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": best}
    model = load(model_class, folder)
    if model_class is LlavaForConditionalGeneration:  # whose `image_outputs` the Trainer of 5.24 can't gather
        model.config.keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    trainer = make_trainer(model, tmp_path, **hooks)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_accuracy"} <= metrics.keys()
    assert seen["logits"][:2] == (2, 12) and seen["labels"] == seen["predictions"] == (ROWS, 12)
    assert trainer.predict(rows(trainer.model)).metrics["test_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_best_model_is_found_by_its_loss(model_class, folder, tmp_path):
    """`load_best_model_at_end`, early stopping and `eval_on_start` need `eval_loss`."""
    trainer = make_trainer(
        load(model_class, folder),
        tmp_path,
        callbacks=[EarlyStoppingCallback(1)],
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1e-3,
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and trainer.state.best_metric == min(losses[1:]) < losses[0]


def logged_losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


EVERY_STEP = {"logging_steps": 1, "learning_rate": 1e-2, "max_steps": 3}


def test_prediction_loss_only(folder, tmp_path):
    losses = []
    for of in CLASSES:
        trainer = make_trainer(load(of, folder), tmp_path, prediction_loss_only=True)
        predicted = trainer.predict(rows(trainer.model))
        assert predicted.predictions is None and predicted.label_ids is None
        losses.append(trainer.evaluate()["eval_loss"])
        assert losses[-1] == predicted.metrics["test_loss"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_noise_on_the_embeddings(folder, tmp_path):
    """`neftune_noise_alpha`: the same noise gives the same losses, and others than no noise."""
    noisy, plain = (
        [logged_losses(make_trainer(load(of, folder), tmp_path, **EVERY_STEP, **noise)) for of in CLASSES]
        for noise in ({"neftune_noise_alpha": 50.0}, {})
    )
    assert noisy[0] == pytest.approx(noisy[1], rel=1e-4) and plain[0] == pytest.approx(plain[1], rel=1e-4)
    assert noisy[0] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.parametrize("model_class", CLASSES)
def test_the_batch_size_that_fits_is_found(model_class, folder, tmp_path):
    """`auto_find_batch_size`, on a machine whose memory holds two rows."""
    model, sizes = load(model_class, folder), []

    def use_memory(module, arguments, inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(use_memory, with_kwargs=True)
    trainer = make_trainer(model, tmp_path, auto_find_batch_size=True, per_device_train_batch_size=4)
    trainer.train()
    assert sizes[0] == 4 and sizes[-2:] == [2, 2] and trainer.state.global_step == 2


def test_a_compiled_model(folder, tmp_path):
    """`torch_compile`; the backend that runs the traced graph as it is spares the test a C++ compiler."""
    one, compiled = {**EVERY_STEP, "max_steps": 1}, {"torch_compile": True, "torch_compile_backend": "eager"}
    trainers = [make_trainer(load(of, folder), tmp_path, **one, **compiled) for of in CLASSES]
    losses = [logged_losses(trainer) for trainer in trainers]
    assert all(is_compiled_module(trainer.model_wrapped) for trainer in trainers)
    plain = make_trainer(load(CLASSES[0], folder), tmp_path, **one)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(
        logged_losses(plain), rel=1e-4
    )
    assert not is_compiled_module(plain.model_wrapped)


@pytest.mark.parametrize("model_class", CLASSES)
def test_metrics_get_inputs_and_losses(model_class, folder, tmp_path):
    """`include_for_metrics`, with the collator that the Trainer itself chooses."""
    seen = {}

    def compute_metrics(prediction):
        seen["inputs"], seen["losses"] = prediction.inputs, prediction.losses
        return {"rows": len(prediction.inputs)}

    model = load(model_class, folder)
    if model_class is LlavaForConditionalGeneration:  # as above
        model.config.keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    trainer = make_trainer(model, tmp_path, compute_metrics=compute_metrics, include_for_metrics=["inputs", "loss"])
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == ROWS and seen["losses"].mean() == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert (seen["inputs"] == torch.stack([row["input_ids"] for row in rows(model)]).numpy()).all()


def test_label_smoothing_of_the_stock_trainer_compares_unshifted_labels(folder, tmp_path):
    """Why a recipe may not set `label_smoothing_factor`: even next to no smoothing gives another loss."""
    still = {**EVERY_STEP, "learning_rate": 0.0}
    losses = [
        logged_losses(make_trainer(load(of, folder), tmp_path, label_smoothing_factor=1e-6, **still))[0]
        for of in CLASSES
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    right = logged_losses(make_trainer(load(CLASSES[0], folder), tmp_path, **still))[0]
    assert losses[0] != pytest.approx(right, rel=1e-4), "transformers shifts the labels now: allow smoothing"

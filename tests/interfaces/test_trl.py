"""TRL's SFT and DPO trainers with their defaults, beside a stock LLaVA."""

import json
import os
import subprocess
import sys

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from transformers import AutoModelForImageTextToText

from tests.interfaces.conftest import picture
from tests.tiny import LLAVA_TEMPLATES


trl = pytest.importorskip("trl")

MESSAGE = List({"role": Value("string"), "content": Value("string")})
ON_CPU = {"bf16": False}  # TRL's default, bfloat16, wants a GPU
ANSWERS = ["a white king", "a black rook", "a cat on a mat", "a dog"]


def rows(columns: dict[str, list]) -> Dataset:
    data = {"images": [[picture(seed)] for seed in range(len(ANSWERS))], **columns}
    return Dataset.from_dict(data, Features({"images": List(ImageFeature()), **dict.fromkeys(columns, MESSAGE)}))


def question() -> list[dict]:
    return [{"role": "user", "content": "what is this?"}]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def messages() -> Dataset:
    return rows({"messages": [question() + answer(text) for text in ANSWERS]})


def settings(kind, folder, **changes):
    return kind(output_dir=str(folder), **{"max_steps": 2, "per_device_train_batch_size": 2, **ON_CPU, **changes})


READ = """
import json, sys
assert not any(name.split(".")[0] == "jnana" for name in sys.modules)
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
from PIL import Image
chat = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (30, 40))}]}]
inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
print(json.dumps(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist()))
assert "jnana" not in sys.modules
"""


@pytest.mark.client("TRL: SFTTrainer", note="defaults; the saved folder answers without this package")
def test_sft_with_the_defaults(stock, ours, tmp_path):
    for side in (stock, ours):
        name = type(side.model).__name__
        args = trl.SFTConfig(output_dir=str(tmp_path / name), **ON_CPU)
        trainer = trl.SFTTrainer(str(side.folder), args=args, train_dataset=messages(), eval_dataset=messages())
        assert type(trainer.model) is type(side.model)
        before_loss = trainer.evaluate()["eval_loss"]
        before = {key: weight.detach().clone() for key, weight in trainer.model.named_parameters()}
        trainer.train()
        changed = {key for key, weight in trainer.model.named_parameters() if not torch.equal(weight, before[key])}
        assert any("multi_modal_projector" in key for key in changed)
        assert any("language_model" in key for key in changed)
        assert trainer.evaluate()["eval_loss"] < before_loss
        trainer.save_model()
    folder = tmp_path / "JnanaForConditionalGeneration"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    ran = subprocess.run(
        [sys.executable, "-P", "-c", READ, str(folder)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert len(json.loads(ran.stdout.splitlines()[-1])) > 4


@pytest.mark.client("TRL: SFTTrainer, prompt and completion", note="")
def test_prompt_and_completion(stock, ours, tmp_path):
    data = rows({"prompt": [question() for _ in ANSWERS], "completion": [answer(text) for text in ANSWERS]})
    losses = []
    for side in (stock, ours):
        # One template for both: ours ends its answers with a token of their own.
        args = settings(
            trl.SFTConfig,
            tmp_path / type(side.model).__name__,
            chat_template_path=str(LLAVA_TEMPLATES["llava"]),
        )
        losses.append(trl.SFTTrainer(str(side.folder), args=args, train_dataset=data).train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.client("TRL: SFTTrainer, assistant_only_loss", note="stock LLaVA's chat template marks no answers")
def test_assistant_only_loss_takes_the_generation_blocks(ours, tmp_path):
    trainers = [
        trl.SFTTrainer(
            str(ours.folder),
            args=settings(trl.SFTConfig, tmp_path / str(only), assistant_only_loss=only),
            train_dataset=messages(),
        )
        for only in (True, False)
    ]
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in trainers]
    supervised = [int((batch["labels"] != -100).sum()) for batch in batches]
    assert 0 < supervised[0] < supervised[1]
    texts = [
        ours.processor.decode(ids[labels != -100])
        for ids, labels in zip(batches[0]["input_ids"], batches[0]["labels"], strict=True)
    ]
    assert all(any(known in text for known in ANSWERS) and "what" not in text for text in texts)
    trainers[0].train()


@pytest.mark.client("TRL: DPOTrainer", note="")
def test_dpo(stock, ours, tmp_path):
    data = rows(
        {
            "prompt": [question() for _ in ANSWERS],
            "chosen": [answer(text) for text in ANSWERS],
            "rejected": [answer("no") for _ in ANSWERS],
        }
    )
    losses = []
    for side in (stock, ours):
        args = settings(trl.DPOConfig, tmp_path / type(side.model).__name__)
        trainer = trl.DPOTrainer(str(side.folder), args=args, train_dataset=data)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def letters(completions, **kwargs) -> list[float]:
    """A reward: how many of the answer's characters are letters."""
    return [float(sum(character.isalpha() for character in answer[0]["content"])) for answer in completions]


@pytest.mark.client("TRL: GRPOTrainer", note="the images of the prompt are kept for the loss")
def test_grpo(stock, ours, tmp_path):
    """Equal logits and the same random numbers give the same sampled answers, rewards and losses."""
    found = []
    for side in (stock, ours):
        sizes = {"num_generations": 2, "max_completion_length": 4, "learning_rate": 1e-2}
        args = settings(trl.GRPOConfig, tmp_path / type(side.model).__name__, **sizes, logging_steps=1)
        data = rows({"prompt": [question() for _ in ANSWERS]})
        trainer = trl.GRPOTrainer(str(side.folder), reward_funcs=letters, args=args, train_dataset=data)
        before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "reward" in entry]
        assert len(logged) == 2 and all(entry["completions/mean_length"] > 0 for entry in logged)
        assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
        found.append(logged[0])
    for name in ("reward", "reward_std", "loss", "grad_norm"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3, abs=1e-6), name
    assert found[0]["reward_std"] > 0 and found[0]["grad_norm"] > 0  # the control: it is not nothing that is equal


@pytest.mark.client("TRL: RewardTrainer", note="refused: a classification head does not exist")
def test_reward_modelling_is_refused(stock, ours, tmp_path):
    """Stock LLaVA has no classification head either; ours says which class to use."""
    data = rows({"chosen": [question() + answer("yes")] * 4, "rejected": [question() + answer("no")] * 4})
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        trl.RewardTrainer(str(stock.folder), args=settings(trl.RewardConfig, tmp_path), train_dataset=data)
    with pytest.raises(ValueError, match="it has no classification head"):
        trl.RewardTrainer(str(ours.folder), args=settings(trl.RewardConfig, tmp_path), train_dataset=data)


def test_the_folder_is_found_by_its_auto_map(ours):
    model = AutoModelForImageTextToText.from_pretrained(ours.folder)
    assert trl.trainer.utils.create_model_from_path(str(ours.folder)).__class__ is type(model)

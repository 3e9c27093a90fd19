"""The card wins over the Trainer's own, on a push too; nothing of this machine is in it."""

import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from jnana.training.arguments import ModelArguments, TextDataArguments, TextModelArguments, read_recipe
from jnana.training.cards import is_hub_id, model_origins, public_name, use_our_card
from tests.tiny import tiny_text_config, tiny_tokenizer


class FakeHub:
    """Takes the place of the Hub: creates no repository and remembers what would be uploaded."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, repo_id, **kwargs):
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, repo_id, folder_path, **kwargs):
        card = ModelCard.load(f"{folder_path}/README.md").content
        self.uploads.append((repo_id, card, kwargs["ignore_patterns"]))

    def __getattr__(self, name):
        raise AssertionError(f"the Hub was asked for {name}")


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(output_dir=tmp_path / "my-model", report_to="none", hub_model_id="me/my-model")
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    trainer = Trainer(model=model, args=args, processing_class=tiny_tokenizer())
    trainer.state.log_history = [
        {"step": 1, "loss": 5.0},
        {"step": 7, "loss": 2.25},
        {"step": 7, "eval_loss": 2.5},
        {"step": 7, "train_runtime": 61.0},
    ]
    trainer.state.global_step = 7
    return trainer


def test_stock_trainer_writes_another(trainer, tmp_path):
    """The control: without us the README is the Trainer's."""
    trainer.create_model_card()
    assert "Jnana" not in (tmp_path / "my-model" / "README.md").read_text()


def test_a_push_uploads_our_card(trainer, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    corpus = tmp_path / "secret place" / "corpus.txt"
    use_our_card(
        trainer, "pretrain", TextModelArguments(), TextDataArguments(train_data=str(corpus)), "a/b/tiny/x.yaml"
    )
    trainer.push_to_hub()
    ((repository, card, ignored),) = hub.uploads
    assert repository == "me/my-model"
    assert "pipeline_tag: text-generation" in card and "library_name: transformers" in card
    for line in (
        "| training loss, step 1 | 5.0000 |",
        "| training loss, step 7 | 2.2500 |",
        "| validation loss, step 7 | 2.5000 |",
        "| recipe | tiny/x.yaml |",
        "| steps | 7 |",
        '"me/my-model"',
    ):
        assert line in card, line
    assert str(tmp_path) not in card and "secret place" not in card and "`corpus.txt`" in card
    assert "checkpoint-*" in ignored


def test_names_that_may_be_shown(tmp_path):
    assert is_hub_id("microsoft/phi-2") and not is_hub_id("./outputs/align") and not is_hub_id("/a/b")
    assert public_name("/home/someone/models/align") == "align"
    assert public_name("microsoft/phi-2") == "microsoft/phi-2"
    arguments = ModelArguments(vision_model="openai/clip-vit-base-patch32", text_model=str(tmp_path))
    assert model_origins(arguments) == [None, "openai/clip-vit-base-patch32", str(tmp_path)]


SYSTEMS = ("era_capstone", "jnana", "llava_chess", "phi35_pooled", "visualize_this")


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_recipes_card_names_the_models_that_the_recipe_joins(system):
    root = Path(__file__).parents[2]
    recipe = next(file for file in (root / f"recipes/{system}/{s}.yaml" for s in ("align", "sft")) if file.is_file())
    joined = read_recipe(recipe)
    card = ModelCard.load(root / f"model_cards/{system}.md")
    assert card.data.base_model == [joined["vision_model"], joined["text_model"]]
    assert card.data.pipeline_tag == "image-text-to-text" and "Not measured here: " in card.text
    for link in re.findall(r"\]\(([^)]+)\)", card.text):
        assert (root / "model_cards" / link).exists(), link


def test_every_system_has_a_card():
    cards = {file.stem for file in (Path(__file__).parents[2] / "model_cards").glob("*.md")}
    assert cards == {*SYSTEMS, "README", "template"}

"""A run writes and pushes our card, not the Trainer's; it names no local path and its code runs."""

import re
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from jnana.processing.data.mixture import DataSource
from jnana.training.cards import (
    EvaluationResult,
    add_evaluation_results,
    describe_figures,
    describe_source,
    model_origins,
    public_name,
    remove_evaluation_results,
    set_name_in_usage,
    write_model_card,
)
from jnana.training.options.arguments import ModelArguments, TextDataArguments, TextModelArguments
from jnana.training.options.recipes import read_recipe
from jnana.training.run import finish_run
from tests.tiny import tiny_text_config, tiny_tokenizer


SPEED = {
    "tokens_per_second": 3456.7,
    "samples_per_second": 12.34,
    "padding_share": 0.0625,
    "data_wait_share": 0.015,
    "mfu": 0.312,
    "peak_memory_gb": 21.4,
}


@pytest.fixture
def trainer(tmp_path):
    args = TrainingArguments(output_dir=tmp_path / "my-model", report_to="none", hub_model_id="me/my-model")
    model = AutoModelForCausalLM.from_config(tiny_text_config())
    trainer = Trainer(model=model, args=args, processing_class=tiny_tokenizer())
    trainer.state.log_history = [
        {"step": 1, "loss": 5.0},
        {"step": 7, "loss": 2.25},
        {"step": 7, "eval_loss": 2.5},
        {"step": 7, "tokens_per_second": 1.0},  # of the last steps only
        {"step": 7, "train_runtime": 61.0, **SPEED},
    ]
    trainer.state.global_step = 7
    return trainer


def test_the_speed_of_the_whole_run_is_in_the_figures(trainer):
    figures = dict(describe_figures(trainer.state.log_history, 7))
    assert figures["speed since then"] == (
        "3,457 tokens/s, 12.3 samples/s, 6.2% padding, 1.5% of the time waiting for data, MFU 31.2%, peak memory 21 GB"
    )
    assert "speed since then" not in dict(describe_figures(trainer.state.log_history[:-1], 7))


def test_shares_of_sources_are_written_out():
    described = [
        describe_source(source, mixed=True)
        for source in (
            DataSource("a.json", name="a", split="train", samples=1_234_567),
            DataSource("b.json", name="b", split="train", weight=0.25, repeat=4),
        )
    ]
    assert described == [
        "`a`: `a.json`, split `train`, rows an epoch 1,234,567",
        "`b`: `b.json`, split `train`, weight 0.25, each row up to 4 times an epoch",
    ]


def test_stock_trainer_writes_another(trainer, tmp_path):
    """The control: without us the README is the Trainer's."""
    trainer.create_model_card()
    assert "Jnana" not in (tmp_path / "my-model" / "README.md").read_text()


def test_a_push_uploads_our_card(trainer, tmp_path, monkeypatch):
    """The card as the Hub gets it, at the end of a run with push_to_hub."""
    uploads = []
    repository = type("Repository", (), {"repo_id": "me/my-model"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: repository)
    monkeypatch.setattr(
        HfApi,
        "upload_folder",
        lambda self, repo_id, folder_path, **kwargs: uploads.append(
            (repo_id, (Path(folder_path) / "README.md").read_text(), kwargs["allow_patterns"])
        ),
    )
    corpus = tmp_path / "secret place" / "corpus.txt"
    trainer.save_model()
    trainer.args.push_to_hub, trainer.hub_model_id = True, "me/my-model"
    arguments = TextModelArguments(), TextDataArguments(train_data=str(corpus))
    finish_run(trainer, "pretrain", *arguments, "a/b/tiny/x.yaml")
    ((repository, card, names),) = uploads
    assert repository == "me/my-model" and "README.md" in names
    assert "pipeline_tag: text-generation" in card and "library_name: transformers" in card
    for line in (
        "| training loss, step 1 | 5.0000 |",
        "| training loss, step 7 | 2.2500 |",
        "| validation loss, step 7 | 2.5000 |",
        "| recipe | tiny/x.yaml |",
        "| steps | 7 |",
        'from_pretrained("me/my-model")',
    ):
        assert line in card, line
    assert str(tmp_path) not in card and "secret place" not in card and "`corpus.txt`" in card


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def test_the_cards_code_runs_where_it_says(trainer, tmp_path, monkeypatch, capsys):
    """In the parent directory of a checkpoint that is not on the Hub; a push names the Hub id instead."""
    trainer.args.hub_model_id = None
    trainer.save_model()
    write_model_card(trainer, "pretrain", TextModelArguments(), TextDataArguments(train_data="corpus.txt"))
    file = tmp_path / "my-model" / "README.md"
    code = code_of(file.read_text())
    assert "parent directory" in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("Once")
    set_name_in_usage(file, "me/other")
    code = code_of(file.read_text())
    assert code.count('from_pretrained("me/other"') == 2 and "my-model" not in code and "directory" not in code
    set_name_in_usage(file, "renamed")
    code = code_of(file.read_text())
    assert code.count('from_pretrained("renamed"') == 2 and code.count("parent directory") == 1
    with pytest.raises(OSError):  # the control: another name loads nothing
        exec(code, {})


class TestEvaluationResults:
    @pytest.fixture
    def card(self, trainer, tmp_path):
        write_model_card(trainer, "pretrain", TextModelArguments(), TextDataArguments(train_data="corpus.txt"))
        return tmp_path / "my-model" / "README.md"

    @staticmethod
    def result(value: float, split: str = "test", metric: str = "exact_match") -> EvaluationResult:
        return EvaluationResult("me/questions", split, metric, value, (value - 0.1, value + 0.05), 1234)

    def test_results_reach_metadata_and_text(self, card):
        before = ModelCard.load(card)
        add_evaluation_results(card, [self.result(0.625), self.result(0.5, split="unseen")])
        after = ModelCard.load(card)
        first, second = after.data.eval_results
        assert (first.dataset_type, first.dataset_split, first.metric_type) == ("me/questions", "test", "exact_match")
        assert first.metric_value == 0.625 and second.metric_value == 0.5
        assert first.metric_args == {"num_questions": 1234, "interval_95": [0.525, 0.675]}
        assert after.data.model_name == "my-model" and after.data.tags == before.data.tags
        assert "| me/questions, test | exact_match | 62.5% | 52.5% to 67.5% | - | - | 1,234 |" in after.text
        assert before.text.partition("## Use")[2] == after.text.partition("## Use")[2]

    def test_baselines_and_points(self, card):
        """Scores that are no shares are shown as they are; baselines and prompt are recorded where they are known."""
        points = EvaluationResult("MME", "release", "sum", 1510.72, (1450.0, 1571.5), 2374, 800.0, None, False, "Say?")
        add_evaluation_results(card, [points])
        after = ModelCard.load(card)
        assert after.data.eval_results[0].metric_args == {
            "num_questions": 2374,
            "interval_95": [1450.0, 1571.5],
            "blind": 800.0,
            "prompt": "Say?",
        }
        assert "| MME, release | sum | 1510.7 | 1450 to 1571.5 | 800 | - | 2,374 |" in after.text

    def test_a_new_evaluation_replaces_the_old_one(self, card):
        add_evaluation_results(card, [self.result(0.6), self.result(0.4, metric="vqa_accuracy")])
        add_evaluation_results(card, [self.result(0.7)])
        card = ModelCard.load(card)
        values = {found.metric_type: found.metric_value for found in card.data.eval_results}
        assert values == {"exact_match": 0.7, "vqa_accuracy": 0.4} and len(card.data.eval_results) == 2
        assert card.text.count("## Evaluation") == 1 and "| 70.0% |" in card.text and "| 60.0% |" not in card.text
        assert card.text.count("## Use") == card.text.count("## Limits") == 1

    def test_a_card_without_our_sections(self, tmp_path):
        (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# Some model\n\nText.\n")
        add_evaluation_results(tmp_path / "README.md", [self.result(0.6)])
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.model_name == "Some model" and "Text.\n\n## Evaluation" in card.text

    def test_another_models_results_are_removed(self, card):
        """A merged model gets the adapter's card; its scores would be those of another model."""
        before = ModelCard.load(card)
        add_evaluation_results(card, [self.result(0.6)])
        copied = ModelCard.load(card)
        assert copied.data.eval_results and "## Evaluation" in copied.text  # the control
        remove_evaluation_results(copied)
        assert not copied.data.eval_results and "model-index" not in copied.data.to_yaml()
        assert "62.5" not in copied.text and copied.text.split() == before.text.split()

    def test_no_card(self, tmp_path):
        with pytest.raises(ValueError, match="README.md' does not exist; give the README.md of a checkpoint"):
            add_evaluation_results(tmp_path / "README.md", [self.result(0.6)])


def test_names_that_may_be_shown(tmp_path):
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

"""Recipes and overrides: types, precedence, and every wrong key or value refused with the remedy."""

from pathlib import Path

import pytest
from transformers import TrainingArguments

from jnana.training.options.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    PartArguments,
    RunArguments,
    TextDataArguments,
    TextModelArguments,
)
from jnana.training.options.recipes import parse_arguments, read_recipe


RECIPES = Path(__file__).parents[3] / "recipes"
CLASSES = (ModelArguments, DataArguments, LoraArguments, PartArguments, RunArguments, TrainingArguments)
CLASSES_OF = {
    "pretrain": (TextModelArguments, TextDataArguments, RunArguments, TrainingArguments),
    "align": (ModelArguments, DataArguments, RunArguments, TrainingArguments),
    "sft": CLASSES,
}


def write(folder: Path, text: str) -> str:
    (folder / "recipe.yaml").write_text(text)
    return str(folder / "recipe.yaml")


def test_types_come_out_right(tmp_path):
    recipe = write(
        tmp_path,
        f"""
output_dir: {tmp_path}/out
learning_rate: 1e-4
eval_strategy: no
save_strategy: "no"
independent_turns: true
vision_feature_layer: [-2, -5]
lora_target_modules: [q_proj, k_proj]
lr_scheduler_kwargs: {{num_cycles: 2}}
warmup_steps: 0.1
prompt: "- what?"
attn_implementation: null
""",
    )
    model, data, lora, *_, training = parse_arguments(CLASSES, [recipe])
    assert training.learning_rate == 1e-4
    assert training.eval_strategy == training.save_strategy == "no"
    assert data.independent_turns is True
    assert model.projector_fields == {"vision_feature_layer": [-2, -5]}
    assert lora.lora_target_modules == ["q_proj", "k_proj"]
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.warmup_steps == 0.1
    assert data.prompt == "- what?"
    assert model.attn_implementation is None


def test_our_defaults_stand_below_the_recipe(tmp_path):
    training = parse_arguments(CLASSES, ["--output_dir", str(tmp_path)])[-1]
    assert training.remove_unused_columns is False
    assert training.report_to == []
    assert training.label_names == ["labels"]
    assert training.logging_nan_inf_filter is False  # transformers' default reads the loss of every micro-batch
    assert training.accelerator_config.dispatch_batches is False
    recipe = write(tmp_path, f"logging_steps: 3\noutput_dir: {tmp_path}")
    assert parse_arguments(CLASSES, [recipe])[-1].logging_steps == 3


def test_command_line_beats_recipe(tmp_path):
    recipe = write(tmp_path, f"learning_rate: 1e-4\nvision_feature_layer: -1\noutput_dir: {tmp_path}")
    model, *_, training = parse_arguments(CLASSES, [recipe, "--learning_rate", "2e-5", "--vision_feature_layer", "-2"])
    assert training.learning_rate == 2e-5
    assert model.projector_fields == {"vision_feature_layer": -2}
    model, *_ = parse_arguments(CLASSES, [recipe])
    assert model.projector_fields == {"vision_feature_layer": -1}


@pytest.mark.parametrize("word", [["null"], ["~"], None])
def test_null_on_the_command_line_takes_an_option_out_of_the_recipe(tmp_path, word):
    text = "output_dir: out\nlora_vision_target_modules: [q_proj, v_proj]\nmax_length: 77\nlora_r: 5\nreport_to: all"
    recipe = write(tmp_path, text)
    options = ["lora_vision_target_modules", "max_length", "lora_r", "report_to"]
    given = [w for key in options for w in ((f"--{key}", *word) if word else (f"--{key.replace('_', '-')}=null",))]
    _, data, lora, *_, training = parse_arguments(CLASSES, [recipe, *given, "--seed", "3"])
    assert lora.lora_vision_target_modules is None and data.max_length is None and training.seed == 3
    assert lora.lora_r == LoraArguments().lora_r and training.report_to == []  # their defaults
    _, data, lora, *_, training = parse_arguments(CLASSES, [recipe])  # negative control
    assert lora.lora_vision_target_modules == ["q_proj", "v_proj"] and data.max_length == 77 and lora.lora_r == 5


def test_null_among_several_values_is_a_value(tmp_path):
    given = ["--output_dir", "out", "--lora_target_modules", "null", "q_proj", "null"]
    assert parse_arguments(CLASSES, given)[2].lora_target_modules == ["null", "q_proj", "null"]
    with pytest.raises(ValueError, match="'lora_targets'"):
        parse_arguments(CLASSES, ["--output_dir", "out", "--lora_targets", "null"])


def test_nested_numbers_of_a_text_config(tmp_path):
    recipe = write(tmp_path, "text_config:\n  model_type: phi\n  layer_norm_eps: 1e-5\n  qk_layernorm: false")
    (arguments,) = parse_arguments((TextModelArguments,), [recipe])
    assert arguments.text_config_fields == {"model_type": "phi", "layer_norm_eps": 1e-5, "qk_layernorm": False}


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("learning_rte: 1e-4", [], r"unknown key 'learning_rte' in .*recipe.yaml; .* 'learning_rate'"),
        ("seed: 1", ["--lora_rang", "8"], r"unknown key 'lora_rang' in the command line; .* 'lora_r"),
        ("seed: 1", ["--learning_rat=8"], r"unknown key 'learning_rat' .* 'learning_rate'"),  # no abbreviations
        ("seed: 1\nseed: 2", [], r"sets 'seed' 2 times"),
        ("seed: [1", [], r"is not valid YAML"),
        ("- seed", [], r"holds a list; it must be a mapping"),
        ("seed: 1", ["--seed", "1", "2"], r"'2' belongs to no option; give the recipe as the first argument"),
        ("seed: [1, 2]", [], r"'2' belongs to no option; .* one value to an option that takes one"),
    ],
)
def test_refused_with_the_remedy(tmp_path, text, argv, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(CLASSES, [write(tmp_path, text), *argv])


def test_a_recipe_behind_the_options(tmp_path):
    with pytest.raises(ValueError, match="recipe.yaml' belongs to no option; give the recipe as the first argument"):
        parse_arguments(CLASSES, ["--seed", "1", write(tmp_path, "seed: 1")])


def test_a_recipe_in_json_with_tabs(tmp_path):
    (tmp_path / "recipe.json").write_text('{\n\t"seed":\t7,\n\t"lora_target_modules": ["q_proj", "fc1"]\n}\n')
    _, _, lora, *_, training = parse_arguments(CLASSES, [str(tmp_path / "recipe.json")])
    assert training.seed == 7 and lora.lora_target_modules == ["q_proj", "fc1"]
    with pytest.raises(ValueError, match="is not valid YAML"):  # the control: YAML itself forbids them
        parse_arguments(CLASSES, [write(tmp_path, "seed:\n\t7")])


def test_a_recipe_in_another_encoding(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes("prompt: Größe?".encode("latin-1"))
    with pytest.raises(ValueError, match="recipe.yaml' is not UTF-8 text"):
        parse_arguments(CLASSES, [str(tmp_path / "recipe.yaml")])


def test_a_recipe_that_is_not_there():
    with pytest.raises(ValueError, match="'recipes/none.yaml' is not a file"):
        parse_arguments(CLASSES, ["recipes/none.yaml"])


@pytest.mark.parametrize("argv", [["--learning_rate", "fast"], ["--projector_type", "cubic"]])
def test_a_value_that_does_not_parse(argv, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(CLASSES, argv)
    assert argv[0] in capsys.readouterr().err


@pytest.mark.parametrize("stage", list(CLASSES_OF))
def test_every_recipe_is_understood(stage):
    recipes = sorted(RECIPES.glob(f"*/{stage}*.yaml"))
    assert len(recipes) >= 3
    for recipe in recipes:
        arguments = parse_arguments(CLASSES_OF[stage], [str(recipe), "--bf16", "false"])
        assert str(arguments[-1].output_dir).startswith("outputs")
        assert read_recipe(recipe)["train_data"]

"""Lists of sources: in a recipe as on the command line, each value by its field; what is wrong is named at once."""

import dataclasses
import json

import pytest
from transformers import TrainingArguments

from jnana.processing.data.mixture import DataSource
from jnana.processing.data.prepared_rows import PrepareOptions
from jnana.training.options.arguments import DataArguments, TextDataArguments
from jnana.training.options.option_checks import check_best_model, check_data
from jnana.training.options.recipe_record import recipe_options
from jnana.training.options.recipes import parse_arguments
from jnana.training.options.sources import is_list, parse_sources, sources_of


def arguments_of(tmp_path, text: str, *words: str) -> DataArguments:
    (tmp_path / "recipe.yaml").write_text(text)
    return parse_arguments((DataArguments,), [str(tmp_path / "recipe.yaml"), *words])[0]


@pytest.fixture
def training(tmp_path):
    def make(**changes) -> TrainingArguments:
        return TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, **changes)

    return make


# ---------------------------------------------------------------------- the forms of a list


@pytest.mark.parametrize(
    "given",
    [
        "[a.jsonl, p.jsonl]",
        "\n  - a.jsonl\n  - p.jsonl",
        "[{data: a.jsonl}, p.jsonl]",
        "\n- {data: a.jsonl, weight: null}\n- {data: p.jsonl, name: ~}",
    ],
)
def test_paths_alone_are_sources(tmp_path, given):
    args = arguments_of(tmp_path, f"train_data: {given}")
    assert [(source.data, source.name) for source in sources_of(args)] == [("a.jsonl", "a"), ("p.jsonl", "p")]


def test_paths_alone_on_the_command_line(tmp_path):
    args = arguments_of(tmp_path, "eval_data: e.json", '--train_data=["a.jsonl","p.jsonl"]')
    assert [source.data for source in sources_of(args)] == ["a.jsonl", "p.jsonl"]
    assert [source.data for source in sources_of(args, evaluation=True)] == ["e.json"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[0-9].tar", False),
        ("[ab]{1,2}.jsonl", False),
        ("{a}.json", False),
        ("a.json", False),
        (None, False),
        ("[]", True),
        ('["a"]', True),
        (' [ {"data": "a"', True),
    ],
)
def test_a_pattern_is_no_list(value, expected):
    assert is_list(value) is expected
    assert expected or value is None or sources_of(DataArguments(train_data=value))[0].data == value


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (
            "{photos: a.json, chat: b.jsonl}",
            [{"name": "photos", "data": "a.json"}, {"name": "chat", "data": "b.jsonl"}],
        ),
        ("{data: a.json, weight: 2}", [{"data": "a.json", "weight": 2}]),
        ("{photos: {data: a.json, weight: 2}}", [{"name": "photos", "data": "a.json", "weight": 2}]),
    ],
)
@pytest.mark.parametrize("option", ["train_data", "eval_data"])
def test_a_mapping_is_refused_with_the_list(tmp_path, training, option, given, meant):
    args = arguments_of(tmp_path, f"{option}: {given}")
    with pytest.raises(ValueError) as error:
        check_data(training(), dataclasses.replace(args, train_data=args.train_data or str(tmp_path)))
    message = f"{option} is a mapping; give a list of sources: "
    assert str(error.value).startswith(message)
    assert json.loads(str(error.value).removeprefix(message)) == meant


def test_a_text_corpus_is_one_source(training):
    for value, words in (
        ('["a.txt", "b.txt"]', "is a list of sources, but"),
        ('{"a": "a.txt"}', "is a mapping; give"),
    ):
        with pytest.raises(ValueError, match=f"train_data {words}"):
            check_data(training(), TextDataArguments(train_data=value))


# ---------------------------------------------------------------------- values by field


@pytest.mark.parametrize("name", ["1e3", "007", "1_000", "true", "0x1f", "NaN"])
def test_a_name_that_looks_like_a_number(tmp_path, name):
    args = arguments_of(tmp_path, f"train_data: [{{data: {name}, name: {name}, split: {name}}}]")
    (source,) = sources_of(args)
    assert (source.data, source.name, source.split) == (name, name, name)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("weight", ".5", 0.5),
        ("weight", "1e-1", 0.1),
        ("weight", "3", 3),
        ("samples", "10_000", 10_000),
        ("samples", "1e2", 100),
        ("repeat", "2", 2),
        ("independent_turns", "no", False),
        ("independent_turns", "True", True),
        ("text_column", "1", "1"),
    ],
)
def test_values_have_the_type_of_their_field(tmp_path, key, text, value):
    (source,) = sources_of(arguments_of(tmp_path, f"train_data: [{{data: a.json, {key}: {text}}}]"))
    found = getattr(source, key)
    assert found == value and isinstance(found, type(value) if key != "weight" else float)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        *(
            ("weight", text, "must be a number above 0")
            for text in ("NaN", "Infinity", "-1", "0", "1e999", "[1]", "many")
        ),
        *(("samples", text, "must be a whole number from 1 on") for text in ("1.5", "inf", "0", "nan", "true")),
        ("repeat", "0", "must be a whole number from 1 on"),
        ("independent_turns", "maybe", "must be true or false"),
        ("format", "llava_instuct", "must be one of auto, .* The nearest is 'llava_instruct'"),
        ("name", "[a]", "give one text"),
    ],
)
@pytest.mark.parametrize("how", ["recipe", "command line"])
def test_values_that_are_refused(tmp_path, key, text, words, how):
    args = arguments_of(tmp_path, f"train_data: [{{data: a.json, {key}: {text}}}]")
    if how == "command line":
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = [text.strip("[]")] if text.startswith("[") else text
        args = DataArguments(train_data=json.dumps([{"data": "a.json", key: value}]))
    with pytest.raises(ValueError, match=f"^train_data, source 0: {key} is .*{words}"):
        sources_of(args)


@pytest.mark.parametrize("option", ["train_format", "eval_format"])
def test_a_format_that_does_not_exist(tmp_path, training, option):
    (tmp_path / "a.json").write_text("[]")
    given = {"train_data": str(tmp_path / "a.json"), "eval_data": str(tmp_path / "a.json")}
    check_data(training(), DataArguments(**given, **{option: "llava_instruct"}))  # the control
    with pytest.raises(ValueError, match=f"{option} is 'coco'; it must be one of .*nearest is 'coco_captions'"):
        check_data(training(), DataArguments(**given, **{option: "coco"}))


def test_a_name_that_the_log_uses():
    with pytest.raises(ValueError, match="source 1 is named 'per_second', but the log has tokens_per_second and"):
        parse_sources("train_data", '["a.json", {"data": "b.json", "name": "per_second"}]')
    assert len(parse_sources("train_data", '["a.json", {"data": "b.json", "name": "per_minute"}]')) == 2


def test_a_recipe_and_a_command_line_are_one_run(tmp_path, training):
    recipe = arguments_of(tmp_path, "train_data: [{data: a.json, weight: 1e0, samples: null}, {data: b, weight: .5}]")
    line = DataArguments(train_data='[{"data": "a.json", "weight": 1}, {"weight": 0.5, "data": "b"}]')
    other = DataArguments(train_data='[{"data": "a.json", "weight": 1}, {"weight": 0.4, "data": "b"}]')
    found, same, changed = (recipe_options(args, training())["train_data"] for args in (recipe, line, other))
    assert found == same == [{"data": "a.json", "weight": 1}, {"data": "b", "weight": 0.5}]
    assert found != changed


def test_options_of_one_source():
    run = PrepareOptions(prompt="what?", independent_turns=True)
    own = DataSource("a", text_column="sentence", prompt="which?", independent_turns=False).options(run)
    assert (own.text_column, own.prompt, own.independent_turns) == ("sentence", "which?", False)
    others = DataSource("b").options(run)
    assert (others.text_column, others.prompt, others.independent_turns) == (None, "what?", True)


# ---------------------------------------------------------------------- the best checkpoint


@pytest.mark.parametrize(
    ("data", "metric", "words"),
    [
        (
            '["a.json", "b.json"]',
            "loss",
            "a list, whose sources have a loss each; give one of eval_a_loss, eval_b_loss",
        ),
        ('["a.json", "b.json"]', "eval_c_loss", "give one of eval_a_loss, eval_b_loss"),
        ('["a.json", "b.json"]', "eval_loss", "give one of eval_a_loss, eval_b_loss"),
        ("a.json", "eval_a_loss", "a single source; give eval_loss"),
        ('["a.json", "b.json"]', "b_loss", None),
        ('["a.json", "b.json"]', "eval_a_loss", None),
        ("a.json", "loss", None),
        ("a.json", "eval_loss", None),
        ("a.json", "eval_image_gain", None),
        (None, "a_loss", None),
    ],
)
def test_the_loss_of_the_best_checkpoint(training, data, metric, words):
    args, data_args = training(metric_for_best_model=metric), DataArguments(train_data="a.json", eval_data=data)
    if words is None:
        check_best_model(args, data_args)
        return
    with pytest.raises(ValueError, match=f"metric_for_best_model is '{metric}', but eval_data is .*{words}"):
        check_best_model(args, data_args)

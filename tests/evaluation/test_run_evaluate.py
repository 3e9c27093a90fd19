"""run_evaluate.py with command line arguments: its files, its errors, the model card, adapters, and two processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from jnana import run_evaluate
from jnana.evaluation import find_card
from jnana.evaluation.arguments import EvaluationArguments
from jnana.training.adapters import complete_adapter_folder
from jnana.training.loading import load_model
from tests.evaluation.conftest import QUESTIONS, write_test_set


ROOT = Path(__file__).parents[2]
QUICK = ["--max_new_tokens", "6", "--batch_size", "4", "--num_workers", "0"]


def call(**options):
    run_evaluate.main([*QUICK, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
    return json.loads((Path(options["output_dir"]) / "results.json").read_text())


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_models_own_answers_as_truth_score_full_marks(checkpoint, test_set, tmp_path, capsys):
    out = tmp_path / "out"
    results = call(model_name_or_path=checkpoint, eval_data=test_set, output_dir=out)
    assert results["splits"]["test"]["overall"]["exact_match"] == 0.0
    for name in ("report.html", "examples.png", "predictions.jsonl", "predictions_blind.jsonl"):
        assert (out / name).stat().st_size > 0
    printed = capsys.readouterr().out
    assert "exact match" in printed and str(out / "report.html") in printed

    answers = [record["prediction"] for record in lines(out / "predictions.jsonl")]
    questions = [(text, answer, category) for (text, _, category), answer in zip(QUESTIONS, answers, strict=True)]
    questions[0] = (questions[0][0], "something else", questions[0][2])
    own = write_test_set(tmp_path / "own", questions)
    overall = call(model_name_or_path=checkpoint, eval_data=own, output_dir=tmp_path / "own_out", blind="false")[
        "splits"
    ]["test"]["overall"]
    assert (overall["exact_match"], overall["blind"]) == (pytest.approx(5 / 6), None)
    assert not (tmp_path / "own_out" / "predictions_blind.jsonl").exists()


def test_recipe_with_two_test_sets(checkpoint, tmp_path):
    write_test_set(tmp_path / "a")
    write_test_set(tmp_path / "b", QUESTIONS[:3])
    for name in "ab":  # images not beside the JSON file
        (tmp_path / name / "test.json").rename(tmp_path / f"{name}.json")
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text(
        f"model_name_or_path: {checkpoint}\n"
        f"eval_data: {{held_out: {tmp_path}/a.json, unseen: {tmp_path}/b.json}}\n"
        f"image_folder: {{held_out: {tmp_path}/a, unseen: {tmp_path}/b}}\n"
        f"output_dir: {tmp_path}/out\nblind: false\nnum_workers: 0\nmax_new_tokens: 50\n"
    )
    run_evaluate.main([str(recipe), "--max_rows", "2", "--max_new_tokens", "4"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: split["overall"]["n"] for name, split in results["splits"].items()} == {"held_out": 2, "unseen": 2}
    assert results["settings"]["max_new_tokens"] == 4
    for name in ("held_out", "unseen"):
        assert len(lines(tmp_path / "out" / name / "predictions.jsonl")) == 2
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_adapter_answers_as_itself(checkpoint, test_set, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, processor = load_model(str(checkpoint))
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*(q_proj|v_proj|dense)",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    adapted = get_peft_model(model, config)
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    processor.save_pretrained(adapter)
    complete_adapter_folder(adapted, {"names": {"model": str(checkpoint)}, "projector_fields": {}}, adapter)

    base = call(model_name_or_path=checkpoint, eval_data=test_set, output_dir=tmp_path / "base", blind="false")
    tuned = call(model_name_or_path=adapter, eval_data=test_set, output_dir=tmp_path / "tuned", blind="false")
    assert base["model_fingerprint"] != tuned["model_fingerprint"]
    answers = [
        [record["prediction"] for record in lines(tmp_path / name / "predictions.jsonl")] for name in ("base", "tuned")
    ]
    assert answers[0] != answers[1]


def test_scores_reach_the_card_of_a_local_checkpoint(checkpoint, test_set, tmp_path):
    model = tmp_path / "my-model"
    shutil.copytree(checkpoint, model)
    without_card = call(model_name_or_path=model, eval_data=test_set, output_dir=tmp_path / "out", blind="false")
    assert not (model / "README.md").exists()

    card = "---\npipeline_tag: image-text-to-text\ntags: [jnana]\n---\n\n# My model\n\nText of its author.\n"
    (model / "README.md").write_text(card)
    for options in ({"update_card": "false"}, {"max_rows": 2}):
        call(model_name_or_path=model, eval_data=test_set, output_dir=tmp_path / "none", blind="false", **options)
        assert (model / "README.md").read_text() == card
    call(model_name_or_path=model, eval_data=test_set, output_dir=tmp_path / "out", blind="false")
    written = ModelCard.load(model / "README.md")
    overall = without_card["splits"]["test"]["overall"]
    by_metric = {result.metric_type: result for result in written.data.eval_results}
    assert by_metric.keys() == {"exact_match", "vqa_accuracy"}
    for metric, result in by_metric.items():
        interval = [round(end, 4) for end in overall[f"{metric}_interval"]]
        assert (result.dataset_type, result.dataset_split) == ("test.json", "test")
        assert result.metric_value == round(overall[metric], 4)
        majority = round(overall["majority"][metric], 4)
        assert result.metric_args == {"num_questions": 6, "interval_95": interval, "majority": majority}
    assert "Text of its author." in written.text and str(tmp_path) not in written.text
    assert written.data.tags == ["jnana"]


def test_no_card_is_found_on_the_hub_or_in_its_cache(tmp_path, monkeypatch):
    (tmp_path / "someone" / "model").mkdir(parents=True)
    card = tmp_path / "someone" / "model" / "README.md"
    card.write_text("# Card")
    monkeypatch.chdir(tmp_path)
    assert find_card(EvaluationArguments(model_name_or_path="someone/model")) == Path("someone/model/README.md")
    card.write_text("---\ntags: [jnana\n---\n# Card")
    with pytest.raises(ValueError, match="invalid metadata; correct it, or pass --update_card false"):
        find_card(EvaluationArguments(model_name_or_path="someone/model"))
    (tmp_path / "blob").write_text("# Card")
    card.unlink()
    card.symlink_to(tmp_path / "blob")  # as the Hub's cache has it
    assert find_card(EvaluationArguments(model_name_or_path="someone/model")) is None
    assert find_card(EvaluationArguments(model_name_or_path="someone/other")) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle_name_or_path": "x"}, "nearest known key is 'model_name_or_path'"),
        ({"eval_data": "nowhere/test.json"}, "eval_data 'nowhere/test.json' does not exist"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path './nowhere' does not exist"),
        ({"image_folder": "nowhere"}, "image_folder 'nowhere' is not a directory"),
        ({"image_folder": '{"other": "."}'}, r"image_folder names \['other'\], eval_data \['test'\]"),
        ({"eval_data": '{"test": "a.json"'}, "eval_data .* is not valid JSON"),
        ({"eval_data": '{"a/b": "x.json", "c": "y.json"}'}, "names a test set 'a/b'"),
        ({"eval_data": '{"a": 1}'}, "must map names to paths"),
        ({"eval_data": '["a.json", "b.json"]'}, "must map names to paths"),
        ({"batch_size": "0"}, "batch_size is 0; it must be at least 1"),
        ({"max_new_tokens": "-1"}, "max_new_tokens is -1"),
        ({"max_rows": "0"}, "max_rows is 0"),
        ({"num_workers": "-1"}, "num_workers is -1"),
        ({"eval_format": "coco"}, "format='coco'"),
        ({"output_dir": None}, "output_dir is not set"),
        ({"model_name_or_path": None}, "model_name_or_path is not set"),
        ({"eval_data": None}, "eval_data is not set"),
        ({"output_dir": "/proc/nowhere"}, "output_dir '/proc/nowhere' cannot be written to"),
    ],
)
def test_refused_before_the_model_is_loaded(checkpoint, test_set, tmp_path, monkeypatch, changes, message):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_evaluate, "load_model", load)
    options = {"model_name_or_path": checkpoint, "eval_data": test_set, "output_dir": tmp_path / "out"}
    with pytest.raises(AssertionError, match="the model was loaded"):  # the control: valid arguments reach the loader
        call(**options)
    options = {name: value for name, value in {**options, **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_one_test_set_may_be_named():
    args = EvaluationArguments(eval_data='{"unseen": "x.json"}', output_dir="out")
    assert args.test_sets == {"unseen": "x.json"} and args.folder_of("unseen") == Path("out")
    assert EvaluationArguments(eval_data="x.json", image_folder="pictures").image_folders == {"test": "pictures"}


def test_two_processes_answer_as_one(checkpoint, test_set, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    records = json.loads(test_set.read_text())
    for number, record in enumerate(records[:5]):  # three questions about an image, two about another, one
        record["image"] = f"{number % 2}.png"
    test_set.write_text(json.dumps(records))
    expected = call(model_name_or_path=checkpoint, eval_data=test_set, output_dir=one)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", "run_evaluate.py", *QUICK]
    command += ["--model_name_or_path", str(checkpoint), "--eval_data", str(test_set), "--output_dir", str(two)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 processes" in done.stdout
    assert done.stdout.count("5 of 6 questions were asked behind a prefix that was read once") == 2  # seen, and blind
    assert done.stdout.count("95 % interval") == 1  # one table, not one for each process
    for name in ("predictions.jsonl", "predictions_blind.jsonl"):
        assert lines(two / name) == lines(one / name)
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    assert json.loads((two / "results.json").read_text())["splits"] == expected["splits"]

"""The demo's recipes and its runner: known options only, and a table that shows the results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from jnana.evaluation.arguments import EvaluationArguments
from jnana.training.options.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    TextDataArguments,
    TextModelArguments,
)
from jnana.training.options.recipes import parse_arguments


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "chess_demo"
CLASSES = {
    "pretrain": (TextModelArguments, TextDataArguments, RunArguments, TrainingArguments),
    "align": (ModelArguments, DataArguments, RunArguments, TrainingArguments),
    "sft": (ModelArguments, DataArguments, LoraArguments, RunArguments, TrainingArguments),
    "evaluate": (EvaluationArguments,),
}


@pytest.fixture
def run_demo(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    import run_demo

    return run_demo


@pytest.mark.parametrize("stage", list(CLASSES))
def test_recipes_hold_known_options_and_so_do_the_runners_commands(stage, run_demo, tmp_path):
    jobs = {job.name: job for part in run_demo.demo_stages(tmp_path, 3, 2) for job in part.jobs}
    command = jobs[stage].command
    recipe = next(word for word in command if word.endswith(".yaml"))
    parsed = parse_arguments(CLASSES[stage], [str(ROOT / recipe), *command[command.index(recipe) + 1 :]])
    assert any(str(tmp_path) in str(part) for part in parsed)


@pytest.mark.parametrize("variant", ["whole", "tiles"])
def test_the_comparison_with_tiles_runs_known_options(variant, run_demo, tmp_path):
    import tiles

    jobs = {job.name: job for part in tiles.tile_stages(tmp_path / "demo", tmp_path, 3) for job in part.jobs}
    for stage in ("align", "sft", "evaluate"):
        command = jobs[f"{stage}_{variant}"].command
        recipe = next(word for word in command if word.endswith(".yaml"))
        first = parse_arguments(CLASSES[stage], [str(ROOT / recipe), *command[command.index(recipe) + 1 :]])[0]
        if stage == "align":
            assert first.image_geometry == {"whole": "crop", "tiles": "anyres"}[variant]
        else:
            assert str(first.model_name_or_path).startswith(str(tmp_path / variant))


def test_every_document_of_the_corpus_is_one_block(run_demo):
    import corpus
    import make_data
    import numpy as np

    from jnana.processing.data import train_tokenizer

    recipe = yaml.safe_load((ROOT / "recipes" / "chess_demo" / "pretrain.yaml").read_text(encoding="utf-8"))
    texts = list(corpus.documents(np.random.default_rng(0), 1500))
    tokenizer = train_tokenizer(texts, recipe["train_tokenizer_vocab_size"])
    lengths = {len(tokenizer(text)["input_ids"]) + 1 for text in texts}  # with the closing token
    assert lengths == {recipe["block_size"]} == {corpus.BLOCK_SIZE}
    documents = make_data.parse_arguments(["--output_dir", "unused"]).documents
    # Streamed in order: the steps reach the end of the curriculum exactly once.
    assert documents == recipe["max_steps"] * recipe["per_device_train_batch_size"]


def job(run_demo, name: str, program: str):
    return run_demo.Job(name, [sys.executable, "-c", program], 1)


def test_a_complete_stage_is_not_run_again(run_demo, tmp_path):
    mark = tmp_path / "mark"
    program = f"open({str(mark)!r}, 'a').write('x')"
    stages = [run_demo.Stage("one", [job(run_demo, "one", program)])]
    run_demo.run_all(stages, tmp_path / "out")
    run_demo.run_all(stages, tmp_path / "out")
    assert mark.read_text() == "x"


def test_what_comes_after_a_stage_that_ran_is_run_again(run_demo, tmp_path):
    mark = tmp_path / "mark"
    second = run_demo.Stage("two", [job(run_demo, "two", f"open({str(mark)!r}, 'a').write('x')")])
    for program in ("pass", "pass # another command"):
        run_demo.run_all([run_demo.Stage("one", [job(run_demo, "one", program)]), second], tmp_path / "out")
    assert mark.read_text() == "xx"


def test_a_stage_that_fails_says_which_and_shows_its_log(run_demo, tmp_path):
    stage = run_demo.Stage("bad", [job(run_demo, "bad", "raise SystemExit('the reason')")])
    with pytest.raises(SystemExit, match=r"(?s)the reason.*'bad' failed"):
        run_demo.run_all([stage], tmp_path / "out")
    assert not (tmp_path / "out" / "done" / "bad.json").exists()


def test_fresh_deletes_nothing_that_is_not_the_demos(tmp_path):
    (tmp_path / "precious.txt").write_text("keep")
    command = [sys.executable, str(DEMO / "run_demo.py"), "--fresh", "--output_dir", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "is not a directory of this demo" in result.stderr
    assert (tmp_path / "precious.txt").read_text() == "keep"


def test_the_table_shows_both_splits_by_type(run_demo):
    def scores(right: float, n: int) -> dict:
        return {"n": n, "exact_match": right, "blind": {"exact_match": 0.25}, "majority": {"exact_match": 0.3}}

    split = {"overall": scores(0.9, 40), "categories": {"count": scores(0.95, 20), "top": scores(0.85, 20)}}
    seen_only = {"overall": scores(0.8, 20), "categories": {"top": scores(0.8, 20)}}
    table = run_demo.accuracy_table(json.loads(json.dumps({"splits": {"test": split, "unseen": seen_only}})))
    assert ["count", "95.0", "25.0", "30.0", "-", "-", "-", "20", "+", "0"] in [
        line.split() for line in table.splitlines()
    ]
    assert table.splitlines()[-1].split() == ["all", "90.0", "25.0", "30.0", "80.0", "25.0", "30.0", "40", "+", "20"]

"""run_evaluate.py with a benchmark: its scores, its server's file, the model card, and options that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from jnana import run_evaluate
from jnana.evaluation.benchmarks import BENCHMARKS
from tests.evaluation.benchmarks.official_files import MAKERS, write_json


QUICK = ["--max_new_tokens", "4", "--batch_size", "4", "--num_workers", "0"]

# What the model is made to answer, question by question in the order of the files, and the main score of that.
ANSWERS = {
    "vqav2": (["Yes.", "3", "Dark red"], (1 + 0.6 + 1) / 3),
    "gqa": (["No.", "Polar bear."], 1 / 2),
    "textvqa": (["Dakota", "anne"], 1 / 2),
    "textvqa_ocr": (["nous les gosses", "Ann's"], (0.3 + 1) / 2),
    "pope": (["Yes", "No", "Yes", "Yes", "No, none.", "no"], 4 / 6),
    "scienceqa": (["B. steadiness", "Vermont"], 1 / 2),
    "mme": (["Yes", "No", "Yes", "Yes", "No", "No"], 4 / 6),
    "coco_captions": (["a red ball lies on the street", "two dogs"], None),
}


@pytest.fixture
def answering(monkeypatch):
    """Makes the model give these answers to the questions of the files, in their order; blind it says `nothing`."""

    def prepare(answers):
        def answer(model, processor, questions, batch_size, max_new_tokens, blind=False, **options):
            given = ["nothing"] * len(questions) if blind else answers
            records = [
                {
                    "source": question.source,
                    "category": question.category,
                    "history": "",
                    "question": question.text,
                    "references": question.references,
                    "prediction": text,
                    "complete": True,
                    "key": f"{int(blind)}-{question.key}",
                }
                for question, text in zip(questions.questions, given, strict=True)
            ]
            file = Path(options["predictions_file"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(record) + "\n" for record in records))
            return records

        monkeypatch.setattr("jnana.evaluation.results.answer_questions", answer)

    return prepare


def options_of(name, folder):
    files = MAKERS[name](folder)
    options = ["--benchmark", name, "--questions_file", str(files.questions)]
    for option, path in (("image_folder", files.images), ("annotations_file", files.annotations)):
        options += [] if path is None else [f"--{option}", str(path)]
    return options + (["--ocr_file", str(files.ocr)] if name == "textvqa_ocr" else [])


def run(checkpoint, out, options, *more):
    run_evaluate.main([*QUICK, "--model_name_or_path", str(checkpoint), "--output_dir", str(out), *options, *more])
    return json.loads((out / "results.json").read_text())["splits"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_given_answers_score_as_computed_by_hand(name, checkpoint, answering, tmp_path, capsys):
    answers, expected = ANSWERS[name]
    answering(answers)
    (summary,) = run(checkpoint, tmp_path / "out", options_of(name, tmp_path / "files")).values()
    main = summary["measures"][0]["name"]
    if expected is not None:
        assert summary["overall"][main] == pytest.approx(expected)
    assert summary["overall"]["n"] == len(answers)
    for place in (summary["overall"], summary["overall"]["blind"], summary["overall"]["majority"]):
        for measure in summary["measures"]:
            assert measure["name"] in place and measure["name"] in summary["definitions"]
    low, high = summary["overall"][f"{main}_interval"]
    assert low <= summary["overall"][main] <= high
    assert summary["overall"]["blind"][main] < summary["overall"][main]
    assert summary["benchmark"]["prompt"] == BENCHMARKS[name].prompt
    captions = name == "coco_captions"  # which LLaVA-1.5 was not evaluated on
    source = "LLaVA-1.5's training on TextCaps, without its line of OCR tokens" if captions else "LLaVA-1.5"
    assert summary["benchmark"]["prompt_of"] == source
    printed = capsys.readouterr().out
    assert summary["measures"][0]["label"] in printed and repr(BENCHMARKS[name].prompt) in printed
    assert "LLaVA" not in name and (tmp_path / "out" / "report.html").stat().st_size > 0


SERVER_FILES = {
    "vqav2": {
        "vqav2_results.json": [
            {"question_id": 42000, "answer": "yes"},
            {"question_id": 42001, "answer": "3"},
            {"question_id": 7000, "answer": "dark red"},
        ]
    },
    "gqa": {
        "gqa_predictions.json": [
            {"questionId": "201", "prediction": "no"},
            {"questionId": "202", "prediction": "polar bear"},
        ]
    },
    "textvqa": {
        "textvqa_results.json": [
            {"question_id": 34602, "answer": "Dakota"},
            {"question_id": 34603, "answer": "anne"},
        ]
    },
    "pope": {
        "pope_popular_answers.jsonl": [
            {"question": "Is there a thing1 in the image?", "answer": "Yes"},
            {"question": "Is there a thing2 in the image?", "answer": "No"},
        ],
        "pope_random_answers.jsonl": [
            {"question": "Is there a thing1 in the image?", "answer": "Yes"},
            {"question": "Is there a thing2 in the image?", "answer": "Yes"},
            {"question": "Is there a thing3 in the image?", "answer": "No, none."},
            {"question": "Is there a thing4 in the image?", "answer": "no"},
        ],
    },
    "scienceqa": {
        "scienceqa_results.json": {
            "results": {"5": 1, "11": -1},
            "outputs": {"5": "B. steadiness", "11": "Vermont"},
        }
    },
    "coco_captions": {
        "captions_results.json": [
            {"image_id": 9, "caption": "a red ball lies on the street"},
            {"image_id": 4, "caption": "two dogs"},
        ]
    },
}


@pytest.mark.parametrize("name", SERVER_FILES)
def test_files_for_servers(name, checkpoint, answering, tmp_path):
    answering(ANSWERS[name][0])
    (summary,) = run(checkpoint, tmp_path / "out", options_of(name, tmp_path / "files")).values()
    expected = SERVER_FILES[name]
    assert summary["benchmark"]["server_files"] == [f"server/{file}" for file in expected]
    for file, content in expected.items():
        text = (tmp_path / "out" / "server" / file).read_text()
        assert (list(map(json.loads, text.splitlines())) if file.endswith("l") else json.loads(text)) == content


def test_mme_files_for_its_program(checkpoint, answering, tmp_path):
    answering(["Yes", "no, it\tis\nnot", *ANSWERS["mme"][0][2:]])
    (summary,) = run(checkpoint, tmp_path / "out", options_of("mme", tmp_path / "files")).values()
    assert summary["benchmark"]["server_files"] == ["server/mme/code_reasoning.txt", "server/mme/existence.txt"]
    assert (tmp_path / "out" / "server" / "mme" / "code_reasoning.txt").read_text() == (
        "0020.png\tIs a python code shown in the picture? Please answer yes or no.\tYes\tYes\n"
        "0020.png\tIs a c++ code shown in the picture? Please answer yes or no.\tNo\tno, it is not\n"
    )


def test_a_test_split_without_answers_gives_the_servers_file_and_no_scores(checkpoint, answering, tmp_path, capsys):
    answering(ANSWERS["vqav2"][0])
    options = options_of("vqav2", tmp_path / "files")
    where = options.index("--annotations_file")
    summary = run(checkpoint, tmp_path / "out", [*options[:where], *options[where + 2 :]])["vqav2"]
    assert summary["scored"] is False and summary["n"] == 3 and "overall" not in summary
    assert json.loads((tmp_path / "out" / "server" / "vqav2_results.json").read_text())[0]["answer"] == "yes"
    assert not (tmp_path / "out" / "predictions_blind.jsonl").exists()
    assert "no scores, because its files hold no answers" in capsys.readouterr().out
    scored = run(checkpoint, tmp_path / "scored", options)["vqav2"]  # the control
    assert "overall" in scored and (tmp_path / "scored" / "predictions_blind.jsonl").exists()


def test_scores_reach_the_card_by_split(checkpoint, answering, tmp_path):
    model = tmp_path / "my-model"
    shutil.copytree(checkpoint, model)
    (model / "README.md").write_text("---\ntags: [jnana]\n---\n\n# My model\n")
    answering(ANSWERS["pope"][0])
    summary = run(model, tmp_path / "out", options_of("pope", tmp_path / "files"))["pope"]
    card = ModelCard.load(model / "README.md")
    found = {(result.dataset_split, result.metric_type): result for result in card.data.eval_results}
    splits, names = ("popular", "random", "all splits"), ("accuracy", "precision", "recall", "f1", "yes_share")
    assert found.keys() == {(split, name) for split in splits for name in names}
    f1, random = found["random", "f1"], summary["categories"]["random"]
    assert f1.dataset_name == "POPE" and f1.metric_value == round(random["f1"], 4)
    assert f1.metric_args == {
        "num_questions": 4,
        "interval_95": [round(end, 4) for end in random["f1_interval"]],
        "blind": round(random["blind"]["f1"], 4),
        "majority": round(random["majority"]["f1"], 4),
        "prompt": BENCHMARKS["pope"].prompt,
    }
    assert str(tmp_path) not in card.content


def test_points_in_the_card(checkpoint, answering, tmp_path):
    model = tmp_path / "my-model"
    shutil.copytree(checkpoint, model)
    (model / "README.md").write_text("# My model\n")
    answering(ANSWERS["mme"][0])
    run(model, tmp_path / "out", options_of("mme", tmp_path / "files"), "--blind", "false")
    text = (model / "README.md").read_text()
    # code reasoning 200; existence 50 + 0 and 50 + 0
    assert "| MME, MME_Benchmark_release_version | sum | 250 | " in text
    assert "| MME, MME_Benchmark_release_version | accuracy | 66.7% | " in text


def test_the_model_itself_answers_a_benchmark(checkpoint, tmp_path):
    """Nothing stands in for the model here: the questions go through the processor and `generate`."""
    options = options_of("vqav2", tmp_path / "files")
    summary = run(checkpoint, tmp_path / "out", options)["vqav2"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["question"].splitlines()[1] for line in lines] == [
        "Answer the question using a single word or phrase."
    ] * 3
    assert summary["overall"]["n"] == 3 and (tmp_path / "out" / "examples.png").stat().st_size > 0
    # its own answers as those of all ten people, but for the last question
    own = json.loads((tmp_path / "out" / "server" / "vqav2_results.json").read_text())
    own[2]["answer"] = "something else"
    annotations = tmp_path / "files" / "v2_mscoco_val2014_annotations.json"
    content = json.loads(annotations.read_text())
    for annotation, answer in zip(content["annotations"], own, strict=True):
        for person in annotation["answers"]:
            person["answer"] = answer["answer"]
    write_json(annotations, content)
    again = run(checkpoint, tmp_path / "again", options, "--annotations_file", str(annotations))["vqav2"]
    assert again["overall"]["vqa_accuracy"] == pytest.approx(2 / 3)


def test_a_mapping_of_image_folders(checkpoint, answering, tmp_path):
    """`image_folder` may map the benchmark's name to its directory, as with other test sets."""
    answering(ANSWERS["vqav2"][0])
    options = options_of("vqav2", tmp_path / "files")
    where = options.index("--image_folder") + 1
    options[where] = json.dumps({"vqav2": options[where]})
    assert run(checkpoint, tmp_path / "out", options)["vqav2"]["overall"]["n"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "vqa"}, "benchmark is 'vqa'; it must be one of vqav2, gqa, textvqa, textvqa_ocr, pope"),
        ({"benchmark": None}, "questions_file is set without benchmark; set benchmark to one of vqav2, gqa"),
        (
            {"benchmark": None, "questions_file": None, "annotations_file": None},
            "eval_data is not set; give it in the recipe or as --eval_data",
        ),
        ({"questions_file": None}, "questions_file is not set; give it in the recipe or as --questions_file"),
        ({"questions_file": "nowhere.json"}, "questions_file 'nowhere.json' does not exist; give the official file"),
        ({"annotations_file": "nowhere.json"}, "annotations_file 'nowhere.json' does not exist"),
        ({"image_folder": None}, r"image_folder is not set; benchmark vqav2 needs it \(docs/benchmarks.md\)"),
        ({"image_folder": "nowhere"}, "image_folder 'nowhere' is not a directory"),
        (
            {"image_folder": '{"test": "x"}'},
            r"image_folder names \['test'\], benchmark \['vqav2'\]; use the same",
        ),
        ({"eval_format": "llava_instruct"}, "eval_format is set, but benchmark vqav2 does not read it; remove eval_f"),
        ({"independent_turns": "false"}, "independent_turns is set, but benchmark vqav2 does not read it; remove ind"),
        (
            {"benchmark": "textvqa_ocr", "annotations_file": None},
            "ocr_file is not set; benchmark textvqa_ocr",
        ),
        ({"ocr_file": "x.jsonl"}, "ocr_file is set, but benchmark vqav2 does not read it; remove ocr_file"),
        ({"eval_split": "val"}, "eval_split is set, but benchmark vqav2 does not read it"),
        ({"prompt": "What?"}, "prompt is set, but benchmark vqav2 does not read it"),
        ({"eval_data": "x.json"}, "eval_data is set, but benchmark vqav2 does not read it"),
        (
            {"eval_data": "x.json", "benchmark": None},
            "questions_file is set without benchmark; set",
        ),
    ],
)
def test_refused_before_the_model_is_loaded(checkpoint, tmp_path, monkeypatch, changes, message):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(run_evaluate, "load_model", load)
    words = options_of("vqav2", tmp_path / "files")
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}

    def call(options):
        run(checkpoint, tmp_path / "out", [word for name, value in options.items() for word in (f"--{name}", value)])

    with pytest.raises(AssertionError, match="the model was loaded"):  # the control: valid arguments reach the loader
        call(options)
    with pytest.raises(ValueError, match=message):
        call({name: value for name, value in {**options, **changes}.items() if value is not None})

"""The official files of each benchmark: what is asked, of which image, with which references; and broken files."""

import copy
import dataclasses
import json

import pytest

from jnana.evaluation.benchmarks import BENCHMARKS, BenchmarkQuestions
from tests.evaluation.benchmarks.official_files import (
    COCO_CAPTIONS,
    GQA_QUESTIONS,
    MAKERS,
    SCIENCEQA_PROBLEMS,
    TEXTVQA_DATA,
    TEXTVQA_OCR,
    VQAV2_ANNOTATIONS,
    VQAV2_QUESTIONS,
    write_json,
    write_lines,
)


SHORT = "\nAnswer the question using a single word or phrase."


def read(name, folder):
    return BenchmarkQuestions(name, MAKERS[name](folder))


def asked(questions):
    return [question.text for question in questions.questions]


def test_vqav2(tmp_path):
    questions = read("vqav2", tmp_path)
    assert asked(questions) == [record["question"] + SHORT for record in VQAV2_QUESTIONS["questions"]]
    assert [question.references for question in questions.questions] == [
        ["yes"] * 10,
        ["2"] * 8 + ["3"] * 2,
        ["red"] * 2 + ["dark-red"] * 8,
    ]
    assert [question.category for question in questions.questions] == ["yes/no", "number", "other"]
    assert [question.details["question_id"] for question in questions.questions] == [42000, 42001, 7000]
    # the two questions about image 42 share a row, so that its prefix can be read once
    assert [question.row for question in questions.questions] == [0, 0, 1] and len(questions.rows) == 2
    assert [questions.images(question)[0].size for question in questions.questions] == [(30, 28)] * 3
    first = questions.questions[0].messages
    assert [part["type"] for part in first[0]["content"]] == ["image", "text"] and first[0]["role"] == "user"
    assert len({question.key for question in questions.questions}) == 3


def test_vqav2_of_a_test_split_has_no_scores(tmp_path):
    files = MAKERS["vqav2"](tmp_path)
    subset = {**VQAV2_QUESTIONS, "data_subtype": "test-dev2015"}
    write_json(files.questions, subset)
    for path in list(files.images.iterdir()):
        path.rename(files.images / path.name.replace("val2014", "test2015"))
    questions = BenchmarkQuestions("vqav2", dataclasses.replace(files, annotations=None))
    assert not questions.scored and len(questions) == 3
    assert questions.rows[0]["images"][0]["path"].endswith("COCO_test2015_000000000042.jpg")


def test_images_with_the_short_names_of_2017(tmp_path):
    files = MAKERS["vqav2"](tmp_path)
    for path in list(files.images.iterdir()):
        path.rename(files.images / path.name.removeprefix("COCO_val2014_"))
    assert BenchmarkQuestions("vqav2", files).rows[0]["images"][0]["path"].endswith("/000000000042.jpg")


def test_gqa(tmp_path):
    questions = read("gqa", tmp_path)
    assert asked(questions) == ["Is the sky dark?" + SHORT, "Which animal is it?" + SHORT]
    assert [question.references for question in questions.questions] == [["yes"], ["polar bear"]]
    assert [(question.category, question.details["open"]) for question in questions.questions] == [
        ("verify", False),
        ("query", True),
    ]


def test_textvqa_with_and_without_ocr_tokens(tmp_path):
    without, given = read("textvqa", tmp_path), read("textvqa_ocr", tmp_path)
    assert asked(without) == ["What is the brand of this camera?" + SHORT, "Whose shop is it?" + SHORT]
    assert asked(given) == [record["text"] for record in TEXTVQA_OCR]  # as LLaVA asked it, letter by letter
    assert asked(without)[0] != asked(given)[0]
    capitals = changed(TEXTVQA_DATA, "what does UPS mean?", "data", 0, "question")
    files = MAKERS["textvqa"](tmp_path)
    write_json(files.questions, capitals)
    assert asked(BenchmarkQuestions("textvqa", files))[0] == "What does UPS mean?" + SHORT  # the first letter alone
    assert [question.references for question in given.questions] == [
        record["answers"] for record in TEXTVQA_DATA["data"]
    ]
    assert without.describe()["prompt"] != given.describe()["prompt"]
    assert "OCR" in given.describe()["title"] and "OCR" not in without.describe()["title"]


def test_pope(tmp_path):
    questions = read("pope", tmp_path)
    assert [question.category for question in questions.questions] == ["popular"] * 2 + ["random"] * 4
    assert asked(questions)[0] == "Is there a thing1 in the image?" + SHORT
    assert [question.references for question in questions.questions[2:]] == [["yes"], ["no"], ["yes"], ["no"]]
    files = MAKERS["pope"](tmp_path)
    one = BenchmarkQuestions("pope", dataclasses.replace(files, questions=files.questions / "coco_pope_random.json"))
    assert [question.category for question in one.questions] == ["random"] * 4


def test_scienceqa_with_images_only(tmp_path):
    questions = read("scienceqa", tmp_path)
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert asked(questions) == [
        "Context: A parachute was tested.\nWhich could the test show?\nA. damage\nB. steadiness\nC. swinging" + letter,
        "What is the name of the colony?\nA. Maryland\nB. Vermont" + letter,
    ]
    assert [question.references for question in questions.questions] == [["B"], ["B"]]
    assert [question.category for question in questions.questions] == ["natural science", "social science"]
    assert [question.details["choices"] for question in questions.questions] == [3, 2]
    files = dataclasses.replace(MAKERS["scienceqa"](tmp_path), split="val")
    assert [question.details["question_id"] for question in BenchmarkQuestions("scienceqa", files).questions] == ["12"]


def test_mme(tmp_path):
    questions = read("mme", tmp_path)
    assert asked(questions)[:2] == [
        "Is a python code shown in the picture?" + SHORT,
        "Is a c++ code shown in the picture?" + SHORT,
    ]
    assert [question.category for question in questions.questions] == ["code_reasoning"] * 2 + ["existence"] * 4
    assert [question.references for question in questions.questions] == [["yes"], ["no"]] * 3
    assert len(questions.rows) == 3  # two questions about each image


def test_mme_in_the_directories_of_the_release(tmp_path):
    """MME_Benchmark_release_version/ holds MME_Benchmark/ with the tasks, and eval_tool/ with files of its own."""
    files = MAKERS["mme"](tmp_path)
    direct = BenchmarkQuestions("mme", files)
    tasks = files.questions.rename(tmp_path / "MME_Benchmark")
    release = tmp_path / "MME_Benchmark_release_version"
    release.mkdir()
    tasks.rename(release / "MME_Benchmark")
    answers = release / "eval_tool" / "Your_Results"
    answers.mkdir(parents=True)
    for file in (answers / "existence.txt", release / "eval_tool" / "readme.txt"):
        file.write_text("no questions")
    questions = BenchmarkQuestions("mme", files)
    assert asked(questions) == asked(direct) and len(questions.rows) == len(direct.rows) == 3
    assert "/MME_Benchmark/code_reasoning/images/0020.png" in questions.rows[0]["images"][0]["path"]
    (release / "eval_tool").rename(release / "MME_Benchmark" / "eval_tool")  # beside the tasks
    assert asked(BenchmarkQuestions("mme", files)) == asked(direct)
    (release / "MME_Benchmark" / "eval_tool").rename(release / "MME_Benchmark" / "tool")  # the control
    with pytest.raises(ValueError, match="readme.txt, line 1: a question, a tab and Yes or No are needed"):
        BenchmarkQuestions("mme", files)


def test_coco_captions(tmp_path):
    questions = read("coco_captions", tmp_path)
    assert asked(questions) == ["Provide a one-sentence caption for the provided image."] * 2
    assert questions.questions[0].references == ["A red ball lies on the street.", "A ball on a street"]
    assert [question.details["question_id"] for question in questions.questions] == [9, 4]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_keys_do_not_depend_on_how_many_questions_are_asked(name, tmp_path):
    files = MAKERS[name](tmp_path)
    every = BenchmarkQuestions(name, files).questions
    first = BenchmarkQuestions(name, files, max_rows=1).questions
    assert [question.key for question in first] == [every[0].key]
    assert len({question.key for question in every}) == len(every)


def without(content, *path):
    """A copy with one field removed; `path` leads to it."""
    changed = copy.deepcopy(content)
    place = changed
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return changed


def changed(content, value, *path):
    """A copy with one field replaced."""
    copied = without(content, *path)
    place = copied
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return copied


BROKEN = {
    "not JSON": ("vqav2", "questions", "{'a': 1}", r"questions.json, line 1, column 2: not valid JSON"),
    "a list": ("gqa", "questions", "[]", "holds a list, not an object; questions_file takes testdev_balanced"),
    "the files swapped": (
        "vqav2",
        "questions",
        VQAV2_ANNOTATIONS,
        "has no records under 'questions'; questions_file takes v2_OpenEnded",
    ),
    "a question without id": (
        "vqav2",
        "questions",
        without(VQAV2_QUESTIONS, "questions", 1, "question_id"),
        "questions.json, question 1: the field 'question_id' is missing; the record has image_id, question",
    ),
    "an id that is a text": (
        "vqav2",
        "questions",
        changed(VQAV2_QUESTIONS, "42", "questions", 1, "image_id"),
        "question 1: the field 'image_id' is '42'; it must be a whole number",
    ),
    "an empty question": (
        "vqav2",
        "questions",
        changed(VQAV2_QUESTIONS, " ", "questions", 2, "question"),
        "question 2: the field 'question' is empty",
    ),
    "an id twice": (
        "vqav2",
        "questions",
        changed(VQAV2_QUESTIONS, 42000, "questions", 1, "question_id"),
        "two records have the id 42000",
    ),
    "annotations of another split": (
        "vqav2",
        "annotations",
        without(VQAV2_ANNOTATIONS, "annotations", 1),
        r"annotations.json has no answers to 1 of 3 questions \(first: question 42001\); give the annotations",
    ),
    "nine answers": (
        "vqav2",
        "annotations",
        without(VQAV2_ANNOTATIONS, "annotations", 2, "answers", 0),
        "annotation 2: 9 answers; VQA accuracy is defined for those of 10 people",
    ),
    "an answer without text": (
        "vqav2",
        "annotations",
        without(VQAV2_ANNOTATIONS, "annotations", 0, "answers", 3, "answer"),
        "annotation 0, answer 3: the field 'answer' is missing",
    ),
    "an answer that is a number": (
        "textvqa",
        "questions",
        changed(TEXTVQA_DATA, 7, "data", 1, "answers", 2),
        r"data\[1\]: answers\[2\] is 7; it must be a text",
    ),
    "GQA without image": (
        "gqa",
        "questions",
        without(GQA_QUESTIONS, "202", "imageId"),
        "question '202': the field 'imageId'",
    ),
    "GQA with some answers": (
        "gqa",
        "questions",
        without(GQA_QUESTIONS, "202", "answer"),
        r"has no answers to 1 of 2 questions \(first: testdev_balanced_questions.json, question 202\)",
    ),
    "OCR tokens of other questions": (
        "textvqa_ocr",
        "ocr",
        TEXTVQA_OCR[:1],
        r"ocr.jsonl lacks 1 of 2 questions \(first: question 34603\)",
    ),
    "OCR file of another form": (
        "textvqa_ocr",
        "ocr",
        changed(TEXTVQA_OCR, "OCR: a\nWhat?", 1, "text"),
        "ocr.jsonl, line 2: the text is not a question, a line 'Reference OCR token: ...'",
    ),
    "an answer beyond the choices": (
        "scienceqa",
        "questions",
        changed(SCIENCEQA_PROBLEMS, 2, "11", "answer"),
        "problem '11': the answer 2 is none of 2 choices",
    ),
    "another split": (
        "scienceqa",
        "questions",
        {"12": SCIENCEQA_PROBLEMS["12"]},
        r"no question with an image in split 'test' \(splits: val\); set eval_split",
    ),
    "an image without captions": (
        "coco_captions",
        "questions",
        without(COCO_CAPTIONS, "annotations", 1),
        r"has no captions of 1 of 2 images \(first: image 4\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_clear_error(case, tmp_path):
    name, place, content, message = BROKEN[case]
    files = MAKERS[name](tmp_path)
    BenchmarkQuestions(name, files)  # the control: the files as they were
    path = getattr(files, place)
    if isinstance(content, str):
        path.write_text(content)
    elif place == "ocr":
        write_lines(path, content)
    else:
        write_json(path, content)
    with pytest.raises(ValueError, match=message) as raised:
        BenchmarkQuestions(name, files)
    assert "\n" not in str(raised.value)


def test_broken_files_that_are_no_json(tmp_path):
    files = MAKERS["pope"](tmp_path / "pope")
    labels = files.questions / "coco_pope_random.json"
    lines = [json.loads(line) for line in labels.read_text().splitlines()]
    write_lines(labels, [*lines[:2], {**lines[2], "label": "maybe"}])
    with pytest.raises(ValueError, match="coco_pope_random.json, line 3: the label is 'maybe'; it must be yes or no"):
        BenchmarkQuestions("pope", files)
    with pytest.raises(ValueError, match="is a directory without coco_pope_random.json"):
        BenchmarkQuestions("pope", dataclasses.replace(files, questions=files.images))

    files = MAKERS["mme"](tmp_path / "mme")
    text = files.questions / "existence" / "000000006040.txt"
    right = text.read_text()
    for broken, message in (
        (right.replace("\t", " "), "000000006040.txt, line 1: a question, a tab and Yes or No are needed"),
        (right.splitlines()[0], "000000006040.txt: 1 questions; accuracy"),
        (right.replace("Yes", "Sure"), "000000006040.txt, line 1: the answer is 'Sure'; it must be yes or no"),
    ):
        text.write_text(broken)
        with pytest.raises(ValueError, match=message):
            BenchmarkQuestions("mme", files)
    with pytest.raises(ValueError, match="is not a directory; give the directory that holds existence/, count/, "):
        BenchmarkQuestions("mme", dataclasses.replace(files, questions=text))
    empty = files.questions / "code_reasoning" / "images"
    with pytest.raises(
        ValueError, match=r"no directory with question files \(\*.txt\); give the directory that holds"
    ):
        BenchmarkQuestions("mme", dataclasses.replace(files, questions=empty))


def test_two_files_of_one_split_are_not_merged(tmp_path):
    files = MAKERS["pope"](tmp_path)
    other = files.questions / "coco_pope_random.json"
    other.with_name("aokvqa_pope_random.json").write_text(other.read_text())
    with pytest.raises(
        ValueError, match="two files of split 'random', aokvqa_pope_random.json and coco_pope_random.json; give a dir"
    ):
        BenchmarkQuestions("pope", files)


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("vqav2", "questions", r"questions_file '.*' is a directory; questions_file takes the file v2_OpenEnded_msco"),
        ("vqav2", "annotations", r"annotations_file '.*' is a directory; annotations_file takes the file v2_mscoco_"),
        ("gqa", "questions", "is a directory; questions_file takes the file testdev_balanced_questions.json"),
        ("textvqa", "questions", "is a directory; questions_file takes the file TextVQA_0.5.1_val.json"),
        ("textvqa_ocr", "ocr", "is a directory; ocr_file takes the file llava_textvqa_val_v051_ocr.jsonl"),
        ("scienceqa", "questions", "is a directory; questions_file takes the file ScienceQA's problems.json"),
        ("coco_captions", "questions", "is a directory; questions_file takes the file captions_val2014.json"),
    ],
)
def test_a_directory_in_the_place_of_a_file(name, place, message, tmp_path):
    files = MAKERS[name](tmp_path)
    with pytest.raises(ValueError, match=message):
        BenchmarkQuestions(name, dataclasses.replace(files, **{place: tmp_path}))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_missing_images_are_counted_before_anything_is_asked(name, tmp_path):
    files = MAKERS[name](tmp_path)
    images = [reference["path"] for row in BenchmarkQuestions(name, files).rows for reference in row["images"]]
    gone = sorted(images)[0]
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of {len(images)} images do not exist \(first: .*as image_folder"):
        BenchmarkQuestions(name, files)

"""Reads the official files of each benchmark into a list of questions.

Every error names the file, the record and the field, and comes before a model is loaded.
"""

import re
from pathlib import Path
from typing import Any

from jnana.processing.data.records import read_json_lines

from .files import (
    BenchmarkFiles,
    Item,
    check_answered,
    check_no_directory,
    check_unique,
    coco_image,
    list_in,
    read_list,
    read_object,
    texts_of,
    value_of,
)


PEOPLE = 10  # who answered each question of VQAv2 and TextVQA
LETTERS = "ABCDE"
YES_NO = ("yes", "no")
MME_REMINDER = "Please answer yes or no."
MME_TASKS = "give the directory that holds existence/, count/, ... (MME_Benchmark), or the one above it"
OCR_PROMPT = re.compile(
    r"(?P<question>.+)\n(?P<ocr>Reference OCR token:.*\n)?Answer the question using a single word or phrase\."
)


def read_vqav2(files: BenchmarkFiles) -> list[Item]:
    """VQAv2: `v2_OpenEnded_mscoco_*_questions.json` and `v2_mscoco_*_annotations.json`."""
    expected = "v2_OpenEnded_mscoco_val2014_questions.json"
    content = read_object(files.questions, "questions_file", expected)
    records = list_in(content, "questions", files.questions, "questions_file", expected)
    # the questions of test-dev are part of test2015, whose images they use
    subset = value_of(content, "data_subtype", str, str(files.questions)).replace("test-dev", "test")
    annotated = {} if files.annotations is None else _vqav2_annotations(files.annotations)
    items, missing = [], []
    for index, record in enumerate(records):
        source = f"{files.questions}, question {index}"
        question_id = value_of(record, "question_id", int, source)
        references, category = annotated.get(question_id, ([], None))
        if files.annotations is not None and not references:
            missing.append(question_id)
        items.append(
            Item(
                source=f"{files.questions.name}, question {question_id}",
                question_id=question_id,
                image=coco_image(files.images, subset, value_of(record, "image_id", int, source)),
                fields={"question": value_of(record, "question", str, source)},
                references=references,
                category=category,
            )
        )
    check_unique([item.question_id for item in items], files.questions)
    if files.annotations is not None:
        check_answered(missing, len(items), files.annotations)
    return items


def _vqav2_annotations(path: Path) -> dict[int, tuple[list[str], str]]:
    """Question id -> the ten answers and the answer type."""
    found = {}
    for index, record in enumerate(
        read_list(path, "annotations", "annotations_file", "v2_mscoco_val2014_annotations.json")
    ):
        source = f"{path}, annotation {index}"
        answers = [
            value_of(answer, "answer", str, f"{source}, answer {number}", may_be_empty=True)
            for number, answer in enumerate(value_of(record, "answers", list, source))
        ]
        _check_ten(answers, source)
        found[value_of(record, "question_id", int, source)] = (answers, value_of(record, "answer_type", str, source))
    return found


def _check_ten(answers: list[str], source: str) -> None:
    if len(answers) != PEOPLE:
        raise ValueError(f"{source}: {len(answers)} answers; VQA accuracy is defined for those of {PEOPLE} people")


def read_gqa(files: BenchmarkFiles) -> list[Item]:
    """GQA: `testdev_balanced_questions.json`, an object of questions by id."""
    expected = "testdev_balanced_questions.json"
    items = []
    for question_id, record in read_object(files.questions, "questions_file", expected).items():
        source = f"{files.questions}, question {question_id!r}"
        types = record.get("types") if isinstance(record, dict) else None
        structure = types.get("structural") if isinstance(types, dict) else None
        image_id = value_of(record, "imageId", str, source)
        items.append(
            Item(
                source=f"{files.questions.name}, question {question_id}",
                question_id=question_id,
                image=files.images / f"{image_id}.jpg",
                fields={"question": value_of(record, "question", str, source)},
                references=[value_of(record, "answer", str, source)] if "answer" in record else [],
                category=structure,
                details={"open": None if structure is None else structure == "query"},
            )
        )
    if not items:
        raise ValueError(f"{files.questions} holds no questions; questions_file takes {expected}")
    return items


def read_textvqa(files: BenchmarkFiles) -> list[Item]:
    """TextVQA: `TextVQA_0.5.1_val.json`."""
    items = []
    for index, record in enumerate(read_list(files.questions, "data", "questions_file", "TextVQA_0.5.1_val.json")):
        source = f"{files.questions}, data[{index}]"
        question_id = value_of(record, "question_id", int, source)
        answers = texts_of(record, "answers", source) if "answers" in record else []
        if answers:
            _check_ten(answers, source)
        image_id = value_of(record, "image_id", str, source)
        question = value_of(record, "question", str, source)
        items.append(
            Item(
                source=f"{files.questions.name}, question {question_id}",
                question_id=question_id,
                image=files.images / f"{image_id}.jpg",
                # LLaVA's question file has a capital letter where the official one has none
                fields={"question": question[:1].upper() + question[1:], "ocr": ""},
                references=answers,
                details={"image_id": image_id},
            )
        )
    check_unique([item.question_id for item in items], files.questions)
    return items


def read_textvqa_ocr(files: BenchmarkFiles) -> list[Item]:
    """TextVQA with the OCR tokens that LLaVA-1.5 was given: also `llava_textvqa_val_v051_ocr.jsonl`."""
    assert files.ocr is not None  # checked with the arguments
    check_no_directory(files.ocr, "ocr_file", "llava_textvqa_val_v051_ocr.jsonl")
    prompts = {}
    for number, record in enumerate(read_json_lines(files.ocr), start=1):
        source = f"{files.ocr}, line {number}"
        image_id, text = value_of(record, "question_id", str, source), value_of(record, "text", str, source)
        prompt = OCR_PROMPT.fullmatch(text.strip())
        if prompt is None:
            raise ValueError(
                f"{source}: the text is not a question, a line 'Reference OCR token: ...' and a line 'Answer the "
                "question using a single word or phrase.'; ocr_file takes LLaVA's llava_textvqa_val_v051_ocr.jsonl"
            )
        prompts[image_id, prompt["question"].lower()] = prompt
    items, missing = read_textvqa(files), []
    for item in items:
        found = prompts.get((item.details["image_id"], item.fields["question"].lower()))
        if found is None:
            missing.append(item.question_id)
        else:
            item.fields = {"question": found["question"], "ocr": found["ocr"] or ""}
    if missing:
        raise ValueError(
            f"{files.ocr} lacks {len(missing)} of {len(items)} questions (first: question {missing[0]}); give the OCR "
            "tokens of the same questions"
        )
    return items


def read_pope(files: BenchmarkFiles) -> list[Item]:
    """POPE: `coco_pope_random.json`, `..._popular.json`, `..._adversarial.json`: one of them, or their directory."""
    paths = _files_in(files.questions, "*_pope_*.json*", "coco_pope_random.json, coco_pope_popular.json, ...")
    items: list[Item] = []
    file_of: dict[str, Path] = {}
    for path in paths:
        split = path.stem.partition("_pope_")[2] or path.stem
        if split in file_of:
            raise ValueError(
                f"{files.questions} holds two files of split {split!r}, {file_of[split].name} and {path.name}; give a "
                "directory of one image source, such as output/coco"
            )
        file_of[split] = path
        records = list(read_json_lines(path))
        for index, record in enumerate(records, start=1):
            source = f"{path}, line {index}"
            question = value_of(record, "text", str, source)
            question_id = value_of(record, "question_id", (int, str), source)
            items.append(
                Item(
                    source=f"{path.name}, question {question_id}",
                    question_id=question_id,
                    image=files.images / value_of(record, "image", str, source),
                    fields={"question": question},
                    references=[_yes_or_no(value_of(record, "label", str, source), source, "label")],
                    category=split,
                    details={"asked": question},
                )
            )
        if not records:
            raise ValueError(f"{path} holds no questions; questions_file takes coco_pope_random.json or its directory")
        check_unique([item.question_id for item in items[-len(records) :]], path)
    return items


def read_scienceqa(files: BenchmarkFiles) -> list[Item]:
    """ScienceQA-IMG: the questions of `problems.json` that have an image, of one split."""
    problems = read_object(files.questions, "questions_file", "ScienceQA's problems.json")
    items = []
    for problem_id, problem in problems.items():
        source = f"{files.questions}, problem {problem_id!r}"
        if value_of(problem, "split", str, source) != files.split or not problem.get("image"):
            continue
        choices = texts_of(problem, "choices", source)
        right = value_of(problem, "answer", int, source)
        if not 0 <= right < len(choices) <= len(LETTERS):
            raise ValueError(f"{source}: the answer {right} is none of {len(choices)} choices (five at most)")
        context = problem.get("hint") or ""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        image = Path(problem_id, value_of(problem, "image", str, source))
        items.append(
            Item(
                source=f"{files.questions.name}, problem {problem_id}",
                question_id=problem_id,
                image=_scienceqa_image(files, image),
                fields={
                    "context": f"Context: {context}\n" if context else "",
                    "question": value_of(problem, "question", str, source),
                    "choices": "\n".join(lines),
                },
                references=[LETTERS[right]],
                category=problem.get("subject"),
                details={"choices": len(choices)},
            )
        )
    if not items:
        splits = ", ".join(sorted({str(problem["split"]) for problem in problems.values()})) or "no"
        raise ValueError(
            f"{files.questions} has no question with an image in split {files.split!r} (splits: {splits}); set "
            "eval_split"
        )
    return items


def _scienceqa_image(files: BenchmarkFiles, image: Path) -> Path:
    """The image in the directory of its split, as ScienceQA has it, or in the given directory itself."""
    below = files.images / str(files.split) / image
    return below if below.is_file() else files.images / image


def read_mme(files: BenchmarkFiles) -> list[Item]:
    """MME, or a set of its form: a directory for each task, with a text file for each image: `question<TAB>Yes`.

    The files of an image lie side by side, or in `questions_answers_YN/` and `images/`. The unpacked release has the
    tasks in `MME_Benchmark/`, beside its `eval_tool/`.
    """
    if not files.questions.is_dir():
        raise ValueError(f"questions_file {str(files.questions)!r} is not a directory; {MME_TASKS}")
    items = []
    images = _mme_tasks(files.images)
    for task in sorted(path for path in _mme_tasks(files.questions).iterdir() if path.is_dir()):
        if task.name == "eval_tool":
            continue
        for path in sorted([*task.glob("*.txt"), *task.glob("questions_answers_YN/*.txt")]):
            image = _mme_image(images / task.name, path.stem)
            for question, answer in _mme_questions(path):
                items.append(
                    Item(
                        source=f"{task.name}/{path.name}",
                        question_id=f"{task.name}/{image.name}",
                        image=image,
                        # LLaVA-1.5 asked with its own request for a short answer instead
                        fields={"question": question.replace(MME_REMINDER, "").strip()},
                        references=[answer],
                        category=task.name,
                        details={"asked": question, "image_id": f"{task.name}/{path.stem}", "file": image.name},
                    )
                )
    if not items:
        raise ValueError(f"{files.questions} has no directory with question files (*.txt); {MME_TASKS}")
    return items


def _mme_tasks(folder: Path) -> Path:
    """The directory of the tasks: in the unpacked release `MME_Benchmark/` below the given one."""
    below = folder / "MME_Benchmark"
    return below if below.is_dir() else folder


def _mme_questions(path: Path) -> list[tuple[str, str]]:
    """The two questions about an image, each with `yes` or `no`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        question, tab, answer = line.rpartition("\t")
        if not tab or not question.strip():
            raise ValueError(f"{path}, line {number}: a question, a tab and Yes or No are needed, not {line!r:.60}")
        questions.append((question, _yes_or_no(answer, f"{path}, line {number}", "answer")))
    if len(questions) != 2:
        raise ValueError(
            f"{path}: {len(questions)} questions; accuracy+ is defined for two questions about each image"
        )
    return questions


def _mme_image(folder: Path, stem: str) -> Path:
    found = [
        path
        for place in (folder, folder / "images")
        for path in sorted(place.glob(f"{stem}.*"))
        if path.suffix != ".txt"
    ]
    return found[0] if found else folder / f"{stem}.jpg"


def read_coco_captions(files: BenchmarkFiles) -> list[Item]:
    """COCO captions: `captions_val2014.json`; one question for each image, all its captions as references."""
    expected = "captions_val2014.json"
    content = read_object(files.questions, "questions_file", expected)
    captions: dict[Any, list[str]] = {}
    for index, record in enumerate(content.get("annotations") or []):
        source = f"{files.questions}, annotations[{index}]"
        caption = value_of(record, "caption", str, source)
        captions.setdefault(value_of(record, "image_id", int, source), []).append(caption)
    items, missing = [], []
    for index, record in enumerate(list_in(content, "images", files.questions, "questions_file", expected)):
        source = f"{files.questions}, images[{index}]"
        image_id = value_of(record, "id", int, source)
        if captions and image_id not in captions:
            missing.append(image_id)
        items.append(
            Item(
                source=f"{files.questions.name}, image {image_id}",
                question_id=image_id,
                image=files.images / value_of(record, "file_name", str, source),
                fields={},
                references=captions.get(image_id, []),
            )
        )
    check_unique([item.question_id for item in items], files.questions)
    if missing:
        raise ValueError(
            f"{files.questions} has no captions of {len(missing)} of {len(items)} images (first: image {missing[0]}); "
            "remove these images or add their captions"
        )
    return items


def _yes_or_no(value: str, source: str, name: str) -> str:
    text = value.strip().lower()
    if text not in YES_NO:
        raise ValueError(f"{source}: the {name} is {value!r:.40}; it must be yes or no")
    return text


def _files_in(path: Path, pattern: str, expected: str) -> list[Path]:
    """The file itself, or the files in a directory."""
    if not path.is_dir():
        return [path]
    found = sorted(path.glob(pattern))
    if not found:
        raise ValueError(f"questions_file {str(path)!r} is a directory without {expected}")
    return found

"""Small files in the official form of each benchmark, made by hand."""

import json
from pathlib import Path

from PIL import Image

from jnana.evaluation.benchmarks import BENCHMARKS, BenchmarkFiles


def image(path: Path, size: tuple[int, int] = (30, 28)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (40, 90, 200)).save(path)
    return path


def write_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def people(*answers: str) -> list[dict]:
    """Ten annotators' answers, from (answer, times) written as `"answer*times"`."""
    expanded = [text for answer in answers for text in [answer.split("*")[0]] * int(answer.split("*")[1])]
    return [
        {"answer_id": number, "answer": text, "answer_confidence": "yes"}
        for number, text in enumerate(expanded, start=1)
    ]


VQAV2_QUESTIONS = {
    "info": {"version": "2.0"},
    "task_type": "Open-Ended",
    "data_type": "mscoco",
    "data_subtype": "val2014",
    "questions": [
        {"image_id": 42, "question": "Is there a dog?", "question_id": 42000},
        {"image_id": 42, "question": "How many dogs are there?", "question_id": 42001},
        {"image_id": 7, "question": "What colour is the ball?", "question_id": 7000},
    ],
}
VQAV2_ANNOTATIONS = {
    "data_subtype": "val2014",
    "annotations": [
        {"question_id": 42000, "image_id": 42, "answer_type": "yes/no", "answers": people("yes*10")},
        {"question_id": 42001, "image_id": 42, "answer_type": "number", "answers": people("2*8", "3*2")},
        {"question_id": 7000, "image_id": 7, "answer_type": "other", "answers": people("red*2", "dark-red*8")},
    ],
}


def vqav2(folder: Path) -> BenchmarkFiles:
    for number in (42, 7):
        image(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    return BenchmarkFiles(
        questions=write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", VQAV2_QUESTIONS),
        annotations=write_json(folder / "v2_mscoco_val2014_annotations.json", VQAV2_ANNOTATIONS),
        ocr=None,
        images=folder / "val2014",
        split=None,
    )


GQA_QUESTIONS = {
    "201": {
        "imageId": "n1",
        "question": "Is the sky dark?",
        "answer": "yes",
        "fullAnswer": "Yes, the sky is dark.",
        "isBalanced": True,
        "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
    },
    "202": {
        "imageId": "n1",
        "question": "Which animal is it?",
        "answer": "polar bear",
        "isBalanced": True,
        "types": {"detailed": "categoryThis", "semantic": "cat", "structural": "query"},
    },
}


def gqa(folder: Path) -> BenchmarkFiles:
    image(folder / "images" / "n1.jpg")
    return BenchmarkFiles(
        write_json(folder / "testdev_balanced_questions.json", GQA_QUESTIONS), None, None, folder / "images", None
    )


TEXTVQA_DATA = {
    "dataset_type": "val",
    "dataset_version": "0.5.1",
    "data": [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": ["dakota"] * 8 + ["nous les gosses", "dakota digital"],
        },
        {
            "question": "whose shop is it?",
            "image_id": "0054c91397f2fe05",
            "question_id": 34603,
            "answers": ["ann's"] * 4 + ["anns"] * 6,
        },
    ],
}
TEXTVQA_OCR = [
    {
        "question_id": "003a8ae2ef43b901",
        "image": "003a8ae2ef43b901.jpg",
        "text": "What is the brand of this camera?\nReference OCR token: DAKOTA, DIGITAL\n"
        "Answer the question using a single word or phrase.",
        "category": "default",
    },
    {
        "question_id": "0054c91397f2fe05",
        "image": "0054c91397f2fe05.jpg",
        "text": "Whose shop is it?\nAnswer the question using a single word or phrase.",
        "category": "default",
    },
]


def textvqa(folder: Path) -> BenchmarkFiles:
    for record in TEXTVQA_DATA["data"]:
        image(folder / "train_images" / f"{record['image_id']}.jpg")
    return BenchmarkFiles(
        questions=write_json(folder / "TextVQA_0.5.1_val.json", TEXTVQA_DATA),
        annotations=None,
        ocr=write_lines(folder / "llava_textvqa_val_v051_ocr.jsonl", TEXTVQA_OCR),
        images=folder / "train_images",
        split=None,
    )


POPE_LABELS = {"random": ["yes", "no", "yes", "no"], "popular": ["yes", "no"]}


def pope(folder: Path) -> BenchmarkFiles:
    for split, labels in POPE_LABELS.items():
        records = [
            {
                "question_id": number,
                "image": f"COCO_val2014_{number % 2:012d}.jpg",
                "text": f"Is there a thing{number} in the image?",
                "label": label,
            }
            for number, label in enumerate(labels, start=1)
        ]
        write_lines(folder / "coco" / f"coco_pope_{split}.json", records)
    write_json(folder / "coco" / "coco_ground_truth_objects.json", {"not": "questions"})
    for number in range(2):
        image(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    return BenchmarkFiles(folder / "coco", None, None, folder / "val2014", None)


def problem(question: str, choices: list[str], answer: int, **more) -> dict:
    fields = {"hint": "", "image": "image.png", "split": "test", "subject": "natural science", "grade": "grade4"}
    return {"question": question, "choices": choices, "answer": answer, "lecture": "", **fields, **more}


SCIENCEQA_PROBLEMS = {
    "4": problem(
        "Which figure of speech is it?", ["chiasmus", "apostrophe"], 1, image=None, subject="language science"
    ),
    "5": problem(
        "Which could the test show?", ["damage", "steadiness", "swinging"], 1, hint="A parachute was tested."
    ),
    "11": problem("What is the name of the colony?", ["Maryland", "Vermont"], 1, subject="social science"),
    "12": problem("Which is a solid?", ["air", "stone"], 1, split="val"),
}


def scienceqa(folder: Path) -> BenchmarkFiles:
    image(folder / "images" / "test" / "5" / "image.png")
    image(folder / "images" / "11" / "image.png")  # without the directory of the split
    image(folder / "images" / "val" / "12" / "image.png")
    return BenchmarkFiles(
        write_json(folder / "problems.json", SCIENCEQA_PROBLEMS), None, None, folder / "images", "test"
    )


def mme(folder: Path) -> BenchmarkFiles:
    release = folder / "MME_Benchmark_release_version"
    for stem, word in (("000000006040", "dog"), ("000000006041", "cat")):
        image(release / "existence" / f"{stem}.jpg")
        (release / "existence" / f"{stem}.txt").write_text(
            f"Is there a {word} in this image? Please answer yes or no.\tYes\n"
            f"Is there a {word}fish in this image? Please answer yes or no.\tNo\n"
        )
    image(release / "code_reasoning" / "images" / "0020.png")
    (release / "code_reasoning" / "questions_answers_YN").mkdir()
    (release / "code_reasoning" / "questions_answers_YN" / "0020.txt").write_text(
        "Is a python code shown in the picture? Please answer yes or no.\tYes\n"
        "Is a c++ code shown in the picture? Please answer yes or no.\tNo"
    )
    return BenchmarkFiles(release, None, None, release, None)


COCO_CAPTIONS = {
    "images": [
        {"id": 9, "file_name": "COCO_val2014_000000000009.jpg"},
        {"id": 4, "file_name": "COCO_val2014_000000000004.jpg"},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "caption": "A red ball lies on the street."},
        {"id": 2, "image_id": 4, "caption": "A man holds two dogs."},
        {"id": 3, "image_id": 9, "caption": "A ball on a street"},
    ],
}


def coco_captions(folder: Path) -> BenchmarkFiles:
    for record in COCO_CAPTIONS["images"]:
        image(folder / "val2014" / record["file_name"])
    return BenchmarkFiles(
        write_json(folder / "captions_val2014.json", COCO_CAPTIONS), None, None, folder / "val2014", None
    )


MAKERS = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "textvqa_ocr": textvqa,
    "pope": pope,
    "scienceqa": scienceqa,
    "mme": mme,
    "coco_captions": coco_captions,
}
assert MAKERS.keys() == BENCHMARKS.keys()

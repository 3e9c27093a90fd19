"""lmms-eval's requests, answered as stock transformers answers them.

The tests run on the installed lmms-eval, where there is one, else on `lmms_eval_light.py`. The last one needs the
real package, and packages that it imports. It pins versions that don't fit beside ours, so it is kept apart:

    pip install --target .lmms-eval --no-deps lmms-eval==0.7.3 loguru pytz sacrebleu tenacity pytablewriter \
        portalocker tabulate colorama lxml dataproperty mbstrdecoder pathvalidate tabledata tcolorpy typepy chardet \
        decord
    PYTHONPATH=.lmms-eval python -m pytest tests/evaluation/test_lmms_eval.py
"""

import configparser
import importlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from jnana.processing.data import BadSampleError
from tests.evaluation import lmms_eval_light
from tests.tiles import picture, save_pictures
from tests.tiny import save_tiny_llava


ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
MODULE = "jnana.evaluation.lmms_eval_model"
SIZES = [(24, 24), (31, 77), (90, 20)]
ASKED = ["is there a dog?", "how many pieces are there on the board?", "what do you see in this picture?", "yes?"]
SETTINGS = {"max_new_tokens": 8, "temperature": 0, "top_p": 1.0, "num_beams": 1, "until": ["\n\n"]}


@pytest.fixture
def adapter(monkeypatch):
    """The module of the adapter."""
    if not INSTALLED:
        lmms_eval_light.install(monkeypatch)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


@pytest.fixture(params=["llava", "llava_next"])
def folder(request, tmp_path):
    path = save_tiny_llava(tmp_path / "model", request.param)
    processor = AutoProcessor.from_pretrained(path)
    # a trained model does not write image tokens
    GenerationConfig(suppress_tokens=[processor.image_token_id], eos_token_id=0, bos_token_id=0).save_pretrained(path)
    return path


def chat_of(document):
    """As lmms-eval's tasks make it."""
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


def documents():
    """Four questions about an image, decoded anew for each, two about another, one about both, one without."""
    images = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    asked = [([images[0].copy()], question) for question in ASKED]
    asked += [([images[1].copy()], question) for question in ASKED[:2]]
    asked += [(images[:2], ASKED[1]), ([], ASKED[2])]
    return [{"images": images, "question": question} for images, question in asked]


def requests_of(adapter, count, settings=SETTINGS, chat_of=chat_of):
    metadata = {"task": "board", "doc_id": 0, "repeats": 1}
    return [
        adapter.Instance("generate_until", ("context", chat_of, dict(settings), number, "board", "test"), 0, metadata)
        for number in range(count)
    ]


def answers_of(model, requests):
    """Text and number of tokens of each answer."""
    return [(answer.text, answer.token_counts.output_tokens) for answer in model.generate_until(requests)]


def stock_answers(folder, asked):
    """The same of transformers' own classes, one by one, as lmms-eval's model `llava_hf` asks them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    end, texts = processor.tokenizer.eos_token_id, []
    for document in asked:
        text = processor.apply_chat_template(chat_of(document), tokenize=False, add_generation_prompt=True)
        inputs = processor(images=document["images"] or None, text=text, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=end, eos_token_id=end)
        made = output[:, inputs["input_ids"].shape[1] :]
        texts.append((processor.tokenizer.batch_decode(made, skip_special_tokens=True)[0], made.shape[1]))
    return texts


def load(adapter, folder, **more):
    return adapter.JnanaLmms.create_from_arg_string(
        f"pretrained={folder},dtype=float32", {"device": "cpu", "max_batch_size": None, **more}
    )


@pytest.mark.parametrize("batch_size", ["1", "5"])
def test_answers_are_those_of_stock_llava(adapter, folder, batch_size):
    model = load(adapter, folder, batch_size=batch_size)
    asked = documents()
    model.task_dict["board"] = {"test": asked}
    seen = []
    model.model.model.vision_tower.register_forward_hook(lambda _, args, kwargs, out: seen.append(1), with_kwargs=True)
    found = answers_of(model, requests_of(adapter, len(asked)))
    assert found == stock_answers(folder, asked)
    assert len(set(found)) > 4 and len(seen) < sum(len(document["images"]) for document in asked)
    # the control: another image under one question
    asked[0]["images"], asked[4]["images"] = asked[4]["images"], asked[0]["images"]
    assert answers_of(model, requests_of(adapter, len(asked))) != found


def test_an_error_leaves_the_mode_of_the_model(adapter, folder):
    model = load(adapter, folder, batch_size="2")
    model.task_dict["board"] = {"test": documents()}
    model.model.train()

    def full(*given):
        raise OSError("no space left on device")

    model.cache_hook.add_partial = full
    with pytest.raises(OSError, match="no space") as caught:
        model.generate_until(requests_of(adapter, 6))
    assert caught.value.__traceback__ is not None and model.model.training  # although the error keeps its frame


class Documents(list):
    """Documents that count how often they are read."""

    reads = 0

    def __getitem__(self, number):
        self.reads += 1
        return super().__getitem__(number)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_documents_are_read_once_before_the_first_answer(adapter, folder, monkeypatch, share_prefix):
    model = load(adapter, folder, batch_size="4", share_prefix=share_prefix)
    asked = Documents(documents()[:6])
    model.task_dict["board"] = {"test": asked}
    read, answer, digests = [], adapter.generate_answers, []

    def noting(*given, **options):
        answers = answer(*given, **options)
        read.append(asked.reads)  # lengths are known, nothing is answered yet
        return answers

    digest = adapter.hashlib.sha256
    monkeypatch.setattr(adapter, "generate_answers", noting)
    monkeypatch.setattr(adapter.hashlib, "sha256", lambda data: digests.append(data) or digest(data))
    requests = requests_of(adapter, 6)
    questions = adapter.RequestedQuestions([request.args for request in requests], model.task_dict, share_prefix)
    assert asked.reads == 6 and len(digests) == 6 * share_prefix
    sizes = [questions.image_sizes(question) for question in questions.questions]
    assert sizes == [[SIZES[0]]] * 4 + [[SIZES[1]]] * 2
    asked.reads = 0
    answers_of(model, requests)
    assert read == [6]
    assert asked.reads == (8 if share_prefix else 12)  # and once for each prefix, or for each question


def test_a_truncated_image_is_named(adapter, folder):
    model = load(adapter, folder)
    file = io.BytesIO()
    picture(300, 300, seed=1).save(file, "PNG")
    asked = documents()
    asked[2]["images"] = [Image.open(io.BytesIO(file.getvalue()[:500]))]  # opened, not decoded
    model.task_dict["board"] = {"test": asked}
    with pytest.raises(BadSampleError, match="board, test 2: an image of 300x300 can't be decoded: .*Replace it"):
        answers_of(model, requests_of(adapter, 4))


def test_settings_of_each_request_count(adapter, folder):
    model = load(adapter, folder, batch_size="4")
    model.task_dict["board"] = {"test": documents()}
    requests = requests_of(adapter, 6)
    requests[1].arguments[2]["max_new_tokens"] = 2
    long = answers_of(model, requests_of(adapter, 6))
    partial = []
    model.cache_hook.add_partial = lambda *given: partial.append(given)
    mixed = answers_of(model, requests)
    assert mixed[:1] + mixed[2:] == long[:1] + long[2:]
    assert long[1][0].startswith(mixed[1][0]) and (mixed[1][1], long[1][1]) == (2, 8)
    assert sorted(given[2] for given in partial) == sorted(text for text, _ in mixed)
    assert {given[0] for given in partial} == {"generate_until"}


def test_settings(adapter):
    assert adapter.read_settings({}) == (1024, {"do_sample": False, "num_beams": 1})
    sampled = {"max_new_tokens": 5, "temperature": 0.5, "top_p": None, "num_beams": None}
    assert adapter.read_settings(sampled) == (5, {"do_sample": True, "num_beams": 1, "temperature": 0.5})
    assert adapter.read_settings({"temperature": 0, "num_beams": 3})[1] == {"do_sample": False, "num_beams": 3}
    assert adapter.cut_off("a\n\nb ASSISTANT: c", ["\n\n", "ASSISTANT:"]) == "a\n\nb "
    assert adapter.cut_off("a b", None) == adapter.cut_off("a b", "") == "a b"
    assert adapter.cut_off("a b", "b") == "a "


def test_what_it_cannot_ask_is_named(adapter, folder, tmp_path):
    with pytest.raises(ValueError, match="no pretrained; give --model_args pretrained="):
        adapter.JnanaLmms()
    with pytest.raises(ValueError, match="model_args has max_frames, which jnana does not take"):
        adapter.JnanaLmms(pretrained=str(folder), max_frames=3)
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        adapter.JnanaLmms(pretrained=str(folder), batch_size="auto")
    model = load(adapter, folder)
    model.task_dict["board"] = {"test": documents()}

    def with_video(document):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(ValueError, match="board, test 0: the question has a part of type 'video'"):
        answers_of(model, requests_of(adapter, 1, chat_of=with_video))
    for name in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(NotImplementedError):
            getattr(model, name)([])
    missing = str(tmp_path / "missing.png")
    model.task_dict["board"]["test"][3]["images"] = [missing]
    with pytest.raises(ValueError, match="board, test 3"):
        answers_of(model, requests_of(adapter, 4))


def test_images_as_files(adapter, folder, tmp_path):
    model = load(adapter, folder)
    asked = documents()
    model.task_dict["board"] = {"test": asked}
    expected = answers_of(model, requests_of(adapter, 6))
    paths = save_pictures(tmp_path / "pictures", SIZES)
    for document, path in zip(asked, [paths[0]] * 4 + [paths[1]] * 2, strict=False):
        document["images"] = [str(path)]
    assert answers_of(model, requests_of(adapter, 6)) == expected


def test_the_entry_point_names_the_class(adapter):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["lmms_eval.models"].strip().partition(" = ")
    module, function = target.split(":")
    found = getattr(importlib.import_module(module), function)()
    assert name == found.model_id == "jnana" and found.simple_class_path is None
    module, _, kind = found.chat_class_path.rpartition(".")
    assert getattr(importlib.import_module(module), kind) is adapter.JnanaLmms and not adapter.JnanaLmms.is_simple


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
task: board
test_split: test
output_type: generate_until
doc_to_visual: !function board.visual
doc_to_text: !function board.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function board.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""

FUNCTIONS = """
from PIL import Image



def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def score(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def test_the_installed_package_writes_the_same_predictions(folder, tmp_path):
    """`python -m lmms_eval --model jnana`, found by the entry point, beside `--model llava_hf` on the same weights."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: see the top of this file")
    paths = save_pictures(tmp_path / "pictures", SIZES)
    records = [
        {"image": str(path), "question": question, "answer": "yes"}
        for path, count in zip(paths, (4, 2, 1), strict=True)
        for question in ASKED[:count]
    ]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "tasks" / "board.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    (tmp_path / "tasks" / "board.py").write_text(FUNCTIONS)
    # what the wheel of this package puts beside its code
    metadata = tmp_path / "path" / "jnana-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: jnana\nVersion: 0\n")
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    entry = setup["options.entry_points"]["lmms_eval.models"].strip()
    (metadata / "entry_points.txt").write_text(f"[lmms_eval.models]\n{entry}\n")

    def predictions(model, *arguments):
        out = tmp_path / model
        command = [sys.executable, "-m", "lmms_eval", "--model", model, *arguments, "--tasks", "board"]
        command += ["--include_path", str(tmp_path / "tasks"), "--log_samples", "--output_path", str(out)]
        path = os.pathsep.join([str(metadata.parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        (file,) = out.rglob("*samples*board*.jsonl")
        return file.read_text()

    ours = predictions("jnana", "--model_args", f"pretrained={folder},dtype=float32", "--batch_size", "4")
    stock = f"pretrained={folder},dtype=float32,device_map=cpu"
    assert ours == predictions("llava_hf", "--model_args", stock, "--device", "cpu")
    lines = [json.loads(line) for line in ours.splitlines()]
    assert len(lines) == len(records) and len({line["filtered_resps"] for line in lines}) > 3

"""Recordings in chats: transcribed before the template is rendered; training data use stored transcripts."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from jnana import run_transcribe
from jnana.processing import transcribe_chat
from jnana.processing.data import BadSampleError, JnanaCollator, StoredTranscripts, check_rows, load_rows
from jnana.processing.speech import Transcriber, TranscriptionError
from tests.modeling.packed import assert_same_batch


STAND_IN = Path(__file__).with_name("stand_in_worker.py")


@dataclass
class Heard:
    text: str


class Listener:
    """A transcriber that returns given transcripts and records its inputs."""

    def __init__(self, **words: str):
        self.words, self.asked = words, []

    def transcribe(self, recording, sampling_rate=None) -> Heard:
        self.asked.append((recording, sampling_rate))
        return Heard(self.words.get(str(recording), " words "))


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def audio(path: str) -> dict:
    return {"type": "audio", "path": path}


IMAGE = {"type": "image", "image": Image.new("RGB", (24, 24), "red")}


def user(*parts: dict) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


# ---------------------------------------------------------------------- chats


@pytest.mark.parametrize("template", ["jnana", "era_capstone", "visualize_this", "phi35_pooled", "llava_chess"])
def test_a_spoken_question_reads_as_the_typed_one(processors, template):
    """Image, speech and text in any mix: ids and pixels equal those of the same words typed."""
    processor = processors[template]
    listener = Listener(q="What is this?", twice="Is it red?")
    pairs = [
        (user(IMAGE, audio("q")), user(IMAGE, text("What is this?"))),
        (user(IMAGE, audio("q"), text("Be short.")), user(IMAGE, text("What is this? Be short."))),
        (user(audio("q")), user(text("What is this?"))),
        (user(text("Look:"), audio("q"), audio("twice")), user(text("Look: What is this? Is it red?"))),
        (
            [*user(IMAGE, audio("q")), {"role": "assistant", "content": "A field."}, *user(audio("twice"))],
            [
                *user(IMAGE, text("What is this?")),
                {"role": "assistant", "content": "A field."},
                *user(text("Is it red?")),
            ],
        ),
    ]
    kwargs = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for spoken, typed in pairs:
        given = [dict(part) for part in spoken[0]["content"]]
        heard = processor.apply_chat_template(spoken, transcriber=listener, **kwargs)
        read = processor.apply_chat_template(typed, **kwargs)
        assert heard.keys() == read.keys()
        assert all((heard[name] == read[name]).all() for name in read)
        assert spoken[0]["content"] == given, "the caller's chat was changed"
        other = processor.apply_chat_template(spoken, transcriber=Listener(q="Where?"), **kwargs)
        assert other["input_ids"].shape != read["input_ids"].shape or (other["input_ids"] != read["input_ids"]).any()
    batch = processor.apply_chat_template([spoken for spoken, _ in pairs], transcriber=listener)
    assert batch == processor.apply_chat_template([typed for _, typed in pairs])


def test_speech_can_spell_no_control_token(processor):
    listener = Listener(q="<image> <|endoftext|>")
    spoken = processor.apply_chat_template(user(audio("q")), transcriber=listener, tokenize=True, return_dict=True)
    ids = spoken["input_ids"][0]
    assert processor.image_token_id not in ids and processor.tokenizer.eos_token_id not in ids


def test_samples_and_their_rate_reach_the_transcriber():
    samples, listener = np.zeros(8), Listener()
    for part, expected in (
        ({"audio": samples}, (samples, None)),
        ({"audio": samples, "sampling_rate": 8_000}, (samples, 8_000)),
        ({"audio": {"array": samples, "sampling_rate": 44_100, "path": None}}, (samples, 44_100)),
        ({"audio": "q.wav", "path": None}, ("q.wav", None)),
        ({"path": Path("q.wav")}, (Path("q.wav"), None)),
    ):
        [message] = transcribe_chat(user({"type": "audio", **part}), listener)
        assert message["content"] == [text("words")]
        assert listener.asked[-1][0] is expected[0] or listener.asked[-1] == expected
        assert listener.asked[-1][1] == expected[1]


def test_chats_without_speech_are_left_alone():
    chat = [{"role": "system", "content": "short"}, *user(IMAGE, text("a"), text("b"))]
    assert transcribe_chat(chat, None) is chat


def test_silence_and_missing_transcribers_are_errors(processor):
    silent = Listener(q="  ")
    assert transcribe_chat(user(IMAGE, audio("q"), text("What?")), silent)[0]["content"] == [IMAGE, text("What?")]
    for chat in (user(audio("q")), user(IMAGE, audio("q")), user(audio("q"), text(" "))):
        with pytest.raises(ValueError, match="No speech was heard"):
            processor.apply_chat_template(chat, transcriber=silent)
    with pytest.raises(ValueError, match="transcriber=None"):
        processor.apply_chat_template(user(audio("q")))
    with pytest.raises(ValueError, match="local file under 'path'"):
        transcribe_chat(user({"type": "audio", "url": "https://example.org/q.wav"}), Listener())


def test_saved_processors_hear_as_well(processor, tmp_path):
    """The code that travels with a checkpoint has the hook, and not the worker."""
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*transcription*")) and not list(tmp_path.glob("*worker*"))
    encoding = tmp_path / "chat_encoding_jnana.py"
    if encoding.is_file():
        assert "def transcribe_chat" in encoding.read_text()
    folder = Path(run_transcribe.__file__).parent / "processing"
    sources = [path.read_text() for path in folder.glob("*_jnana.py")]
    imports = {name for source in sources for name in re.findall(r"^from \.(\w+) import", source, re.MULTILINE)}
    assert imports == {"chat_encoding_jnana", "chat_formats_jnana", "image_geometry_jnana"}


# ---------------------------------------------------------------------- training data


@pytest.fixture
def spoken(tmp_path, pictures) -> Path:
    """A data file with spoken questions; the stand-in "hears" the text that a recording's file holds."""
    (tmp_path / "sounds").mkdir()
    for name, words in {"0": "What colour is it?", "1": "And this?", "silent": "\n"}.items():
        (tmp_path / "sounds" / f"{name}.wav").write_text(words)
    answer = {"role": "assistant", "content": "Red."}
    records = [
        {"images": ["pictures/0.png"], "messages": [*user({"type": "image"}, audio("sounds/0.wav")), answer]},
        {"images": ["pictures/1.png"], "messages": [*user(audio("sounds/1.wav"), text("Be short.")), answer]},
        {
            "images": ["pictures/1.png"],
            "audios": ["sounds/0.wav", "sounds/1.wav"],
            "messages": [*user({"type": "audio"}), answer, *user({"type": "audio"}), answer],
        },
        {"images": ["pictures/0.png"], "messages": [*user(audio("sounds/silent.wav"), text("What is it?")), answer]},
        {"images": ["pictures/0.png"], "messages": [*user(text("Typed?")), answer]},
    ]
    path = tmp_path / "spoken.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def transcribe(path: Path, monkeypatch, *arguments: str, started: list | None = None) -> int:
    """`run_transcribe.py` with the stand-in worker."""

    def make(model, **options):
        transcriber = Transcriber(model, python=sys.executable, worker_script=STAND_IN, **options)
        start = transcriber._ensure_started
        transcriber._ensure_started = lambda: (started is not None and started.append(model), start())
        return transcriber

    monkeypatch.setattr(run_transcribe, "Transcriber", make)
    monkeypatch.setattr(sys, "argv", ["run_transcribe.py", str(path), *arguments])
    return run_transcribe.main()


def questions(path: Path, **options) -> list[list[str]]:
    """The texts of every row's user messages."""
    return [
        [part["text"] for m in row["conversations"][0] if m["role"] == "user" for part in m["content"] if part["text"]]
        for row in load_rows(path, **options)
    ]


EXPECTED = [
    ["What colour is it?"],
    ["And this?", " Be short."],
    ["What colour is it?", "And this?"],
    ["What is it?"],
    ["Typed?"],
]


def test_rows_hold_the_words_that_were_transcribed_once(spoken, monkeypatch, processor, caplog):
    started: list = []
    assert transcribe(spoken, monkeypatch, "--model", "small", started=started) == 0
    assert "silent.wav: no speech found" in caplog.text
    assert len(started) == 3  # one for each recording, not for each mention
    assert questions(spoken) == questions(spoken, streaming=True) == EXPECTED
    assert questions(spoken, format="dataset") == EXPECTED

    report = check_rows(load_rows(spoken), processor, progress=False)
    assert report.num_rows == 5 and not report.problems
    rows = list(load_rows(spoken))
    typed = spoken.with_name("typed.jsonl")
    records = [json.loads(line) for line in spoken.read_text().splitlines()]
    for record, words in zip(records, EXPECTED, strict=True):
        asked = [m for m in record["messages"] if m["role"] == "user"]
        for m, said in zip(asked, [words[0] + "".join(words[1:])] if len(asked) == 1 else words, strict=True):
            m["content"] = [*[p for p in m["content"] if p["type"] == "image"], text(said)]
    typed.write_text("\n".join(json.dumps(record) for record in records))
    batches = [JnanaCollator(processor)(data) for data in (rows, list(load_rows(typed)))]
    assert_same_batch(*batches)


def test_transcripts_are_made_again_only_for_new_sound_or_another_model(spoken, monkeypatch):
    transcribe(spoken, monkeypatch, "--model", "small")
    file = StoredTranscripts(spoken).file
    file.write_text(file.read_text().replace("What colour is it?", "Corrected?"))
    started: list = []
    assert transcribe(spoken, monkeypatch, "--model", "small", started=started) == 0
    assert not started and questions(spoken)[0] == ["Corrected?"]

    (spoken.parent / "sounds" / "1.wav").write_text("And that one?")
    with pytest.raises(BadSampleError, match="sounds/1.wav has changed"):
        list(map(str, check(spoken)))
    assert transcribe(spoken, monkeypatch, "--model", "small", started=started) == 0
    assert len(started) == 1 and questions(spoken)[1] == ["And that one?", " Be short."]
    transcribe(spoken, monkeypatch, "--model", "base", started=started)
    assert len(started) == 4 and questions(spoken)[0] == ["What colour is it?"]


def check(path: Path) -> list:
    from jnana.processing.data.checks import check_row

    return [check_row(row) for row in load_rows(path)]


def test_recordings_without_transcripts_are_bad_samples(spoken, processor, monkeypatch):
    with pytest.raises(BadSampleError) as caught:
        check_rows(load_rows(spoken), processor, progress=False)
    assert "4 of 5 rows" in str(caught.value) and "spoken.jsonl, record 0" in str(caught.value)
    assert f"python run_transcribe.py {spoken}" in str(caught.value)

    (spoken.parent / "sounds" / "1.wav").write_text("error")
    assert transcribe(spoken, monkeypatch) == 1
    report = check_rows(load_rows(spoken), processor, on_bad_sample="skip", progress=False)
    assert report.kept_indices == [0, 3, 4]


def test_only_silence_is_a_bad_sample(spoken, processor, monkeypatch):
    records = [json.loads(line) for line in spoken.read_text().splitlines()]
    records[3]["messages"][0]["content"] = [audio("sounds/silent.wav")]
    spoken.write_text("\n".join(json.dumps(record) for record in records))
    transcribe(spoken, monkeypatch)
    report = check_rows(load_rows(spoken), processor, on_bad_sample="skip", progress=False)
    assert report.kept_indices == [0, 1, 2, 4] and "No speech was heard" in report.problems[0]


def test_parquet_files_and_what_can_not_be_transcribed(spoken, monkeypatch, tmp_path, caplog):
    records = [json.loads(line) for line in spoken.read_text().splitlines()]
    for record in records:
        record.setdefault("audios", [])
        for m in record["messages"]:
            m["content"] = [text(m["content"])] if isinstance(m["content"], str) else m["content"]
    parquet = tmp_path / "spoken.parquet"
    datasets.Dataset.from_list(records).to_parquet(parquet)
    assert transcribe(parquet, monkeypatch) == 0
    assert questions(parquet) == questions(parquet, streaming=True) == EXPECTED

    assert transcribe(spoken, monkeypatch, "--model", "ends") == 1 and "could not be started" in caplog.text
    (tmp_path / "sounds" / "0.wav").unlink()
    assert transcribe(spoken, monkeypatch) == 1 and "sounds/0.wav: does not exist" in caplog.text
    typed = tmp_path / "typed.jsonl"
    typed.write_text(json.dumps({"messages": user(text("Typed?"))}))
    assert transcribe(typed, monkeypatch) == 1 and "nothing to transcribe" in caplog.text


def test_a_transcriber_needs_no_recording_of_its_own(spoken):
    """Looking up a transcript starts no worker; a value that is not a path has no transcript."""
    with pytest.raises(TranscriptionError, match="has no transcript"):
        StoredTranscripts(spoken).transcribe(np.zeros(3))


@pytest.mark.parametrize("end", ['{"audio": "sounds/1.wav", "te', ""])
def test_a_transcript_file_may_end_anywhere(spoken, monkeypatch, end):
    """Cut off by a full disk or a kill, or saved by an editor that leaves out the last line's end."""
    transcribe(spoken, monkeypatch, "--model", "small")
    file = StoredTranscripts(spoken).file
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:1] + [end or lines[1].replace("And this?", "And what is this?")]))
    assert len(StoredTranscripts(spoken).records) == (1 if end else 2)
    assert transcribe(spoken, monkeypatch, "--model", "small") == 0
    assert len(file.read_text().splitlines()) == 3
    assert questions(spoken)[1][0] == ("And this?" if end else "And what is this?")
    file.write_text("half\n" + file.read_text())  # the control: damage in the middle is an error
    with pytest.raises(ValueError, match="line 1, column 1: not valid JSON"):
        StoredTranscripts(spoken)


def test_what_can_not_start_is_not_started_for_every_recording(spoken, monkeypatch, caplog):
    started: list = []
    assert transcribe(spoken, monkeypatch, "--model", "ends", started=started) == 1
    assert len(started) == 3 and "could not be started" in caplog.text
    records = [json.loads(line) for line in spoken.read_text().splitlines()]
    records[0]["messages"].insert(0, "no message")
    many = [{**records[0], "messages": [*user(audio(f"sounds/{name}.wav"))]} for name in range(6)]
    for name in range(6):
        (spoken.parent / "sounds" / f"{name}.wav").write_text("again")
    spoken.write_text("\n".join(json.dumps(record) for record in [*many, records[0], {"messages": "none"}]))
    started.clear()
    assert transcribe(spoken, monkeypatch, "--model", "ends", started=started) == 1
    assert len(started) == 3


def test_files_that_can_not_be_read_are_one_line(spoken, monkeypatch, caplog):
    assert transcribe(spoken.with_name("none.jsonl"), monkeypatch) == 1 and "none.jsonl does not exist" in caplog.text
    spoken.write_text("{")
    assert transcribe(spoken, monkeypatch) == 1 and "not valid JSON" in caplog.text

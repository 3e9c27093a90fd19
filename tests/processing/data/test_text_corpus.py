"""Text corpora: reading, tokenizers independent of the hash seed, packing without losing a token."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from jnana.processing.data import load_text, pack_blocks, tokenizer_fingerprint, train_tokenizer
from tests.processing.data.test_shards import add
from tests.tiny import CORPUS


DOCUMENTS = [f"{line} {number}" for number in range(40) for line in CORPUS] + [
    "a <|endoftext|> b <|pad|>",
    "日本語 🙂",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 320)


def write(folder: Path, kind: str) -> Path:
    data = datasets.Dataset.from_dict({"text": DOCUMENTS, "other": list(range(len(DOCUMENTS)))})
    path = folder / f"corpus.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS))
    elif kind == "jsonl":
        data.to_json(path)
    elif kind == "parquet":
        data.to_parquet(path)
    else:
        data.save_to_disk(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "disk"])
@pytest.mark.parametrize("streaming", [False, True])
def test_every_source_gives_the_documents(tmp_path, kind, streaming):
    corpus = load_text(write(tmp_path, kind), streaming=streaming)
    assert isinstance(corpus, datasets.IterableDataset) == streaming
    assert [row["text"] for row in corpus] == DOCUMENTS
    assert list(next(iter(corpus))) == ["text"]
    assert len(list(load_text(write(tmp_path, kind), streaming=streaming, max_rows=5))) == 5


def test_a_document_may_have_several_lines(tmp_path):
    (tmp_path / "a.txt").write_text("\n\none\ntwo\n\n\n  \nthree\n")
    assert list(load_text(tmp_path / "a.txt")["text"]) == ["one\ntwo", "three"]


def test_a_name_in_capitals_and_windows_line_ends(tmp_path):
    (tmp_path / "A.TXT").write_bytes("\ufeffone\r\ntwo\r\n\r\nthree\r\n".encode())
    assert list(load_text(tmp_path / "A.TXT")["text"]) == ["one\ntwo", "three"]


@pytest.mark.parametrize("streaming", [False, True])
def test_text_of_another_encoding_or_format_raises(tmp_path, streaming):
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes(b'{"text": "caf\xe9"}\n')
        with pytest.raises(ValueError, match=f"{name} is not UTF-8 text"):
            list(load_text(tmp_path / name, streaming=streaming))
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="a.json': text files read are .txt, .jsonl, .parquet"):
        load_text(tmp_path / "a.json", streaming=streaming)
    with pytest.raises(FileNotFoundError, match="./nowhere"):
        load_text("./nowhere", streaming=streaming)


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.txt"):
        load_text(tmp_path / "gone.txt")
    with pytest.raises(ValueError, match="no column 'body'; it has .'text', 'other'.. Set text_column"):
        load_text(write(tmp_path, "parquet"), text_column="body")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="bad.jsonl, line 2, column"):
        load_text(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(ValueError, match="bad.jsonl, record 1: no text under 'text'"):
        load_text(tmp_path / "bad.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "disk", "folder"])
@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (7, "7"), (["a"], r"\['a'\]")])
def test_what_is_no_text_is_named(tmp_path, kind, value, shown, streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    texts = ["a", None, "c"] if value is None else [value] * 3
    record = 1 if value is None else 0
    path = tmp_path / f"corpus.{kind}"
    table = pa.table({"text": texts})
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind == "disk":
        datasets.Dataset(table).save_to_disk(path)
    else:
        path.mkdir(exist_ok=True) if kind == "folder" else None
        pa.parquet.write_table(table, path / "a.parquet" if kind == "folder" else path)
    with pytest.raises(
        ValueError, match=f"corpus.{kind}, record {record}: {shown} is not a text. Remove the record, or"
    ):
        list(load_text(path, streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_was_cut_off_or_is_missing_is_named(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = write(tmp_path, "parquet")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="corpus.parquet is not a whole parquet file .* Copy or write it again"):
        list(load_text(path, streaming=streaming))
    saved = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(saved)
    with pytest.raises(ValueError, match="saved: no split 'train'; it has test. Set train_split or eval_split"):
        load_text(saved, streaming=streaming)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="folder: .*split.* Set train_split or eval_split"):
        list(load_text(tmp_path / "folder", split="dev", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_documents_in_archives(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "corpus"
    folder.mkdir()
    files = {"a.txt": "one", "a.json": '{"body": "two"}', "b.txt": "three", "b.json": '{"body": 4}'}
    with tarfile.open(folder / "train.tar", "w") as archive:
        for name, text in files.items():
            add(archive, name, text.encode())
    assert [row["text"] for row in load_text(folder, text_column="txt", streaming=streaming)] == ["one", "three"]
    with pytest.raises(ValueError, match="train.tar, sample b: no text 'body'. Remove the sample, or set text_column"):
        list(load_text(folder, text_column="body", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_half_characters_do_no_harm(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    assert [row["text"] for row in load_text(tmp_path / "a.jsonl", streaming=streaming)] == ["a ? b"]


@pytest.mark.parametrize("odd", ["9" * 5000, "[" * 100_000])
def test_json_that_python_refuses(tmp_path, odd):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "n": ' + odd + "}\n")
    with pytest.raises(ValueError, match="a.jsonl, line 2"):
        load_text(tmp_path / "a.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_blocks_joined_are_exactly_the_documents(tmp_path, tokenizer, streaming):
    blocks = list(pack_blocks(load_text(write(tmp_path, "jsonl"), streaming=streaming), tokenizer, 37))
    expected = []
    for text in DOCUMENTS:
        expected += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        expected.append(tokenizer.eos_token_id)
    assert all(len(block["input_ids"]) == 37 for block in blocks)
    joined = [index for block in blocks for index in block["input_ids"]]
    assert joined == expected[: len(joined)]
    assert len(expected) - len(joined) < 37  # an incomplete block is dropped
    assert joined.count(tokenizer.pad_token_id) == 0
    for block in blocks:
        assert block["labels"] == [-100, *block["input_ids"][1:]]
    closed = tokenizer.decode(joined).split("<|endoftext|>")
    assert closed[0] == DOCUMENTS[0] and closed[1] == DOCUMENTS[1]


def test_impossible_block_sizes_raise(tmp_path, tokenizer):
    corpus = load_text(write(tmp_path, "jsonl"))
    with pytest.raises(ValueError, match="block_size=1 must be at least 2"):
        pack_blocks(corpus, tokenizer, 1)
    with pytest.raises(ValueError, match="shorter than one block of block_size=1000000"):
        pack_blocks(corpus, tokenizer, 1_000_000)


def test_the_tokenizer_is_like_gpt2(tokenizer):
    assert len(tokenizer) == 320
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.bos_token == tokenizer.unk_token == tokenizer.eos_token
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", 1)
    for text in ("  two  spaces\n\ttab", "日本語 🙂 é", "a king"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_tokenizer_is_the_same_under_any_hash_seed():
    code = (
        "from jnana.processing.data import tokenizer_fingerprint, train_tokenizer\n"
        "from tests.processing.data.test_text_corpus import DOCUMENTS\n"
        "print(hash('a'), tokenizer_fingerprint(train_tokenizer(DOCUMENTS, 320)))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[3],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    outputs = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][0] != outputs[1][0]  # the control: hash seeds differ
    assert outputs[0][1] == outputs[1][1] == tokenizer_fingerprint(train_tokenizer(DOCUMENTS, 320))


def test_a_corpus_without_order_raises():
    with pytest.raises(TypeError, match="texts is a set.*PYTHONHASHSEED"):
        train_tokenizer(set(DOCUMENTS), 320)
    with pytest.raises(ValueError, match="vocab_size=200 must be at least 258"):
        train_tokenizer(DOCUMENTS, 200)

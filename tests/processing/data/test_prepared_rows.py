"""Rows prepared once: the batches of raw rows, in any number of processes, from the cache, and after every fault."""

import errno
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from jnana.modeling.packed_layout_jnana import PackedLayout
from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    BadSampleError,
    JnanaCollator,
    PrepareOptions,
    check_rows,
    data_cache,
    encoding,
    flatten_conversations,
    images,
    load_rows,
    packed_rows,
    plan_rows,
    prepare,
    prepared_rows,
)
from jnana.processing.data.prepared_rows import RowPreparation
from jnana.processing.data.progress import Progress, duration
from jnana.processing.data.rows import viewed_rows
from jnana.processing.image_geometry_jnana import set_image_geometry


WORDS = ("a", "rook", "king", "of", "the", "white", "queen", "<|endoftext|>", "éa", "12")
PACKINGS = ("none", "rows", "shared_image")
NUM_IMAGES = 7
CHANGING_EVENTS = {f"os.{name}" for name in ("mkdir", "remove", "rename", "rmdir", "link", "symlink", "truncate")}


@pytest.fixture
def records(tmp_path) -> Path:
    """LLaVA records about images of several shapes, some of several turns, one without an image."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(NUM_IMAGES):
        Image.new("RGB", (40 + 30 * number, 30 + 7 * number), (30 * number, 90, 40)).save(folder / f"{number}.png")
    found = []
    for number in range(25):
        turns = []
        for turn in range(number % 4 + 1):
            question, answer = [
                " ".join(WORDS[(number * k + turn) % len(WORDS)] for k in range(2 + turn)) for _ in "qa"
            ]
            turns += [
                {"from": "human", "value": f"{question} {turn}?"},
                {"from": "gpt", "value": f"{answer} {number}"},
            ]
        found.append({"id": str(number), "image": f"{number % NUM_IMAGES}.png", "conversations": turns})
    del found[11]["image"]
    path = folder / "records.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture
def tiled(processor) -> JnanaProcessor:
    """A processor that cuts images into tiles, so that the number of image tokens depends on the size."""
    return JnanaProcessor(
        set_image_geometry(processor.image_processor, "anyres"),
        processor.tokenizer,
        patch_size=processor.patch_size,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=processor.chat_template,
    )


@pytest.fixture
def processes(monkeypatch):
    """Sets the number of processes, small blocks for small data."""

    def choose(number: int) -> None:
        monkeypatch.setattr(encoding, "BLOCK_ROWS", 3)
        monkeypatch.setattr(encoding, "ROWS_A_PROCESS", 1)
        monkeypatch.setattr(encoding, "usable_cores", lambda: number)

    return choose


def options_for(tmp_path: Path, **changed) -> PrepareOptions:
    values = {"data_cache": tmp_path / "cache", "max_row_tokens": 300, "seed": 0, "progress": False}
    return PrepareOptions(**{**values, **changed})


def raw(source, processor: JnanaProcessor, options: PrepareOptions) -> datasets.Dataset:
    """The reference: rows as text, measured before training and tokenised by the collator."""
    rows = load_rows(source, independent_turns=options.independent_turns)
    report = check_rows(rows, processor, max_length=options.max_length, progress=False)
    if options.packing == "none":
        return flatten_conversations(rows)
    shared = report.shared if options.packing == "shared_image" else None
    plan = plan_rows(report.lengths, shared, options.max_row_tokens, max_length=options.max_length, seed=options.seed)
    return packed_rows(rows, plan)


def batches(rows, processor: JnanaProcessor, options: PrepareOptions) -> list[dict]:
    collator = JnanaCollator(processor, **options.for_collator)
    items = list(rows)
    return [collator(items[start : start + 3]) for start in range(0, len(items), 3)]


def same(left: list[dict], right: list[dict]) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and a.counts == b.counts and all(_equal(a[name], b[name]) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def _equal(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, PackedLayout):
        return vars(left).keys() == vars(right).keys() and all(
            _equal(value, vars(right)[name]) for name, value in vars(left).items()
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left == right


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def forbid_tokenising(monkeypatch) -> None:
    def forbidden(*args, **kwargs):
        raise AssertionError("rendered or tokenised again")

    monkeypatch.setattr(JnanaProcessor, "encode_chats", forbidden)


# ---------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("geometry", ["crop", "anyres"])
def test_batches_are_those_of_raw_rows(records, processor, tiled, tmp_path, processes, packing, geometry, monkeypatch):
    """In this process, in one, two and four workers, cold and from the cache, cut to `max_length` or not."""
    chosen = tiled if geometry == "anyres" else processor
    for changed in ({} if geometry == "anyres" else {"max_length": 60}, {"independent_turns": False}):
        options = options_for(tmp_path, packing=packing, max_row_tokens=3000, **changed)
        reference = batches(raw(records, chosen, options), chosen, options)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        assert same(batches(prepare(records, chosen, options), chosen, options), reference)
        for number in (2, 4):
            shutil.rmtree(tmp_path / "cache")
            processes(number)
            assert same(batches(prepare(records, chosen, options), chosen, options), reference)
        with monkeypatch.context() as patch:
            forbid_tokenising(patch)
            warm = prepare(records, chosen, options)
        assert same(batches(warm, chosen, options), reference)
        loader = torch.utils.data.DataLoader(
            warm, 3, collate_fn=JnanaCollator(chosen, **options.for_collator), num_workers=2
        )
        assert same(list(loader), reference)


def test_another_token_is_noticed_by_the_comparison(records, processor, tmp_path):
    """The control of the test above."""
    options = options_for(tmp_path)
    rows = list(prepare(records, processor, options))
    reference = batches(rows, processor, options)
    rows[5]["token_ids"][0][-2] += 1
    assert not same(batches(rows, processor, options), reference)


def test_the_collator_neither_renders_nor_tokenises_prepared_rows(records, processor, tmp_path, monkeypatch):
    options = options_for(tmp_path, packing="shared_image")
    rows = list(prepare(records, processor, options))
    collator = JnanaCollator(processor, **options.for_collator)
    first = collator(rows[:1])  # compares the tokens of one conversation
    forbid_tokenising(monkeypatch)
    assert same([collator(rows[:1])], [first])
    with pytest.raises(AssertionError, match="tokenised again"):  # the control: raw rows
        collator(list(load_rows(records))[:1])


def test_rows_of_another_processor_are_refused(records, processors, tmp_path):
    options = options_for(tmp_path)
    rows = list(prepare(records, processors["jnana"], options))
    with pytest.raises(ValueError, match=r"records.json, record 0 .*was tokenised by another processor"):
        JnanaCollator(processors["vicuna"])(rows[:2])


def test_prepared_and_raw_rows_share_a_batch(records, processor, tmp_path):
    prepared = list(prepare(records, processor, options_for(tmp_path)))
    plain = list(flatten_conversations(load_rows(records)))
    mixed = [(prepared if index % 2 else plain)[index] for index in range(8)]
    assert same([JnanaCollator(processor)(mixed)], [JnanaCollator(processor)(plain[:8])])


def test_other_sources_are_prepared_in_memory(records, processor, tmp_path, processes):
    """Embedded images are not copied into the cache; their rows are tokenised once a start."""
    rows = load_rows(records)
    held = [
        {
            "image": {"path": None, "bytes": Path(row["images"][0]["path"]).read_bytes()} if row["images"] else None,
            "messages": [
                {"role": message["role"], "content": "".join(p["text"] for p in message["content"] if p["text"])}
                for message in row["conversations"][0]
            ],
        }
        for row in rows
    ]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
        }
    )
    source = datasets.Dataset.from_list(held, features=features)
    options = options_for(tmp_path, packing="rows")
    reference = batches(raw(source, processor, options), processor, options)
    for number in (1, 3):
        processes(number)
        prepared = prepare(source, processor, options)
        assert same(batches(prepared, processor, options), reference)
        assert "token_ids" in viewed_rows(prepared)[0]
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("changing", ["{{ strftime_now('%d %b %Y') }}", "{{ ['a', 'b'] | random }}"])
def test_a_template_that_renders_differently_every_day_is_rendered_by_the_collator(
    records, processor, tmp_path, changing
):
    dated = JnanaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=12, chat_template=changing + processor.chat_template
    )
    rows = prepare(records, dated, options_for(tmp_path))
    assert "token_ids" not in rows[0] and entries(tmp_path / "cache") == []
    assert "token_ids" in prepare(records, processor, options_for(tmp_path))[0]  # the control


def test_an_encoder_can_be_sent_to_a_worker(records, processor):
    """As Windows and macOS send it."""
    rows = load_rows(records)
    encoder = encoding.RowEncoder(rows, processor)
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy(range(5)).columns.equals(encoder(range(5)).columns)
    assert copy(list(rows)).columns.equals(encoder(list(rows)).columns)


def test_a_killed_worker_is_explained(records, processor, tmp_path, processes, monkeypatch):
    processes(2)
    monkeypatch.setattr(encoding, "check_block", lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match="one of the 2 processes .* was killed.*dataset_num_proc: 1"):
        prepare(records, processor, options_for(tmp_path))


# ---------------------------------------------------------------------- the key


def _another_record(records: Path, processor: JnanaProcessor) -> JnanaProcessor:
    content = records.read_text()
    records.write_text(content.replace("rook", "pawn", 1))
    return processor


def _another_template(records: Path, processor: JnanaProcessor) -> JnanaProcessor:
    template = processor.chat_template.replace("caption image:", "picture:")
    return JnanaProcessor(processor.image_processor, processor.tokenizer, patch_size=12, chat_template=template)


def _another_tokenizer(records: Path, processor: JnanaProcessor) -> JnanaProcessor:
    tokenizer = pickle.loads(pickle.dumps(processor.tokenizer))
    tokenizer.add_tokens(["rook"])
    return JnanaProcessor(processor.image_processor, tokenizer, patch_size=12, chat_template=processor.chat_template)


def _another_geometry(records: Path, processor: JnanaProcessor) -> JnanaProcessor:
    return JnanaProcessor(
        set_image_geometry(processor.image_processor, "pad"),
        processor.tokenizer,
        patch_size=12,
        chat_template=processor.chat_template,
    )


def _another_backend(records: Path, processor: JnanaProcessor) -> JnanaProcessor:
    """As if torchvision resized the images: it is saved in the same words as Pillow's."""
    image_processor = pickle.loads(pickle.dumps(processor.image_processor))
    double = type("CLIPImageProcessor", (type(image_processor),), {"backend": "torchvision"})
    image_processor.__class__ = double
    return JnanaProcessor(image_processor, processor.tokenizer, patch_size=12, chat_template=processor.chat_template)


CHANGES = [_another_record, _another_template, _another_tokenizer, _another_geometry, _another_backend]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_makes_a_new_entry(records, processor, tmp_path, change: Callable):
    start = JnanaProcessor(
        processor.image_processor, processor.tokenizer, patch_size=12, chat_template=processor.chat_template
    )
    options = options_for(tmp_path)
    prepare(records, start, options)
    prepare(records, start, options)  # the control
    assert len(entries(tmp_path / "cache")) == 1
    changed = change(records, start)
    rows = prepare(records, changed, options)
    assert len(entries(tmp_path / "cache")) == 2
    assert same(batches(rows, changed, options), batches(raw(records, changed, options), changed, options))


def test_options_that_matter_make_a_new_entry_and_others_do_not(records, processor, tmp_path):
    for different in ({"max_length": 60}, {"image_check": "decode"}, {"independent_turns": False}, {"max_rows": 9}):
        before = len(entries(tmp_path / "cache"))
        prepare(records, processor, options_for(tmp_path, **different))
        assert len(entries(tmp_path / "cache")) == before + 1
    for same_rows in ({"packing": "rows"}, {"seed": 7}, {"on_bad_sample": "skip"}, {"num_proc": 1}):
        prepare(records, processor, options_for(tmp_path, max_rows=9, **same_rows))
    assert len(entries(tmp_path / "cache")) == before + 1


def test_a_replaced_image_is_noticed(records, tiled, tmp_path, caplog):
    """Its number of tiles, and so of tokens, may be another."""
    options = options_for(tmp_path)
    before = prepare(records, tiled, options)["length"][:]
    Image.new("RGB", (300, 20), "red").save(records.parent / "3.png")
    rows = prepare(records, tiled, options)
    assert "prepared anew, because" in caplog.text and "3.png' has changed" in caplog.text
    assert rows["length"][:] != before and len(entries(tmp_path / "cache")) == 1
    assert same(batches(rows, tiled, options), batches(raw(records, tiled, options), tiled, options))
    (records.parent / "3.png").unlink()
    with pytest.raises(BadSampleError, match="3.png' does not exist"):
        prepare(records, tiled, options)


def test_small_files_are_kept_only_where_a_directory_is_named(records, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    options = options_for(tmp_path, data_cache=None)
    prepare(records, processor, options)
    assert not (tmp_path / "hub").exists()
    monkeypatch.setattr(prepared_rows, "KEPT_BYTES", 100)
    prepare(records, processor, options)
    assert len(entries(tmp_path / "hub" / "jnana")) == 1


def test_nothing_is_written_beside_the_data(records, processor, tmp_path):
    before = entries(records.parent)
    prepare(records, processor, options_for(tmp_path))
    assert entries(records.parent) == before


def test_a_data_folder_that_can_only_be_read(records, processor, tmp_path, processes):
    """Every attempt to change something in it is denied, for root too."""
    processes(2)
    folder, options = str(records.parent), options_for(tmp_path)

    def deny(event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in CHANGING_EVENTS) and any(str(argument).startswith(folder) for argument in args):
            raise OSError(errno.EROFS, "Read-only file system")

    def start() -> None:
        sys.addaudithook(deny)  # of this child alone
        for change in (lambda: open(records, "a"), lambda: os.mkdir(records.parent / "cache")):  # the control
            try:
                change()
            except OSError as error:
                assert error.errno == errno.EROFS
            else:
                raise AssertionError("it can be written")
        assert len(prepare(records, processor, options)) > 25

    for _ in ("cold", "warm"):
        assert os.waitpid(in_a_fork(start), 0)[1] == 0
    assert len(entries(tmp_path / "cache")) == 1


# ---------------------------------------------------------------------- faults


def _flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))


DAMAGE = {
    "a flipped byte": lambda folder: _flip(next(folder.glob("rows-*")), 4000),
    "cut off": lambda folder: os.truncate(next(folder.glob("rows-*")), 5000),
    "gone": lambda folder: next(folder.glob("images-*")).unlink(),
    "not JSON": lambda folder: (folder / "prepared.json").write_text("{"),
    "other JSON": lambda folder: (folder / "prepared.json").write_text('{"files": {"rows": {"name": "x"}}}'),
    "a list": lambda folder: (folder / "prepared.json").write_text("[1]"),
    "another report": lambda folder: (folder / "prepared.json").write_text(
        (folder / "prepared.json").read_text().replace('"num_truncated": 0', '"num_truncated": 4')
    ),
    "of another key": lambda folder: (folder / "prepared.json").write_text(
        (folder / "prepared.json").read_text().replace('"max_length": null', '"max_length": 7')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_built_anew(records, processor, tmp_path, caplog, damage):
    options = options_for(tmp_path)
    reference = batches(prepare(records, processor, options), processor, options)
    (folder,) = (tmp_path / "cache").iterdir()
    DAMAGE[damage](folder)
    caplog.set_level(logging.INFO)
    assert same(batches(prepare(records, processor, options), processor, options), reference)
    lines = [record.message for record in caplog.records if "prepared anew" in record.message]
    assert len(lines) == 1 and str(folder) in lines[0]
    assert len(list(folder.glob("*.arrow"))) == 2
    caplog.clear()
    prepare(records, processor, options)
    assert "uses the rows that were prepared" in caplog.text


def _kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


MOMENTS = ("before the first row", "between two blocks", "the rows' file", "the images' file", "the last file")


def in_a_fork(function: Callable[[], object]) -> int:
    """Run a function in a copy of this process; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_leaves_nothing_that_is_used(records, processor, tmp_path, processes, monkeypatch, moment):
    options = options_for(tmp_path)
    reference = batches(raw(records, processor, options), processor, options)
    processes(1)

    def killed() -> None:
        if moment == "before the first row":
            encoding.check_block = _kill
        elif moment == "between two blocks":
            calls = iter(range(100))
            check = encoding.check_block
            encoding.check_block = lambda *args: _kill() if next(calls) == 2 else check(*args)
        else:
            calls, number = iter(range(100)), MOMENTS.index(moment) - 2
            sync = os.fsync
            os.fsync = lambda file: _kill() if next(calls) == number else sync(file)
        prepare(records, processor, options)

    assert os.waitpid(in_a_fork(killed), 0)[1] == signal.SIGKILL
    (folder,) = (tmp_path / "cache").iterdir()
    assert not (folder / "prepared.json").exists()
    assert same(batches(prepare(records, processor, options), processor, options), reference)
    assert len(list(folder.glob("*.arrow"))) == 2


def test_two_runs_that_start_at_once_build_it_once(records, processor, tmp_path, processes):
    processes(1)
    options, counted = options_for(tmp_path), tmp_path / "blocks.txt"
    check = encoding.check_block

    def count(*args):
        with counted.open("a") as file:
            file.write("block\n")
        return check(*args)

    def run() -> None:
        encoding.check_block = count
        assert len(prepare(records, processor, options)) > 25

    children = [in_a_fork(run) for _ in range(3)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(counted.read_text().split()) == 9  # 25 rows in blocks of 3


def test_a_file_that_changes_while_it_is_read_is_not_kept(records, processor, tmp_path, monkeypatch):
    check = encoding.check_block

    def change(*args):
        records.write_text(records.read_text().replace("rook", "pawn"))
        return check(*args)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "check_block", change)
        with pytest.raises(ValueError, match="records.json changed while it was read"):
            prepare(records, processor, options_for(tmp_path))
    assert list((tmp_path / "cache").glob("*/prepared.json")) == []
    assert len(prepare(records, processor, options_for(tmp_path))) > 25  # the control


def test_a_full_disk_is_explained(records, processor, tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ValueError, match="data_cache '.*cache': the disk is full.*another directory: data_cache"):
            prepare(records, processor, options_for(tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    assert list(folder.glob("*.arrow")) == []
    assert len(prepare(records, processor, options_for(tmp_path))) > 25  # the control


def test_a_cache_that_can_not_be_written_is_explained(records, processor, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="data_cache '.*cache' can't be written .*data_cache: DIR"):
        prepare(records, processor, options_for(tmp_path))


# ---------------------------------------------------------------------- rows that are left out


def test_rows_left_out_are_listed_with_their_kinds_from_the_cache_too(records, processor, tmp_path, caplog, processes):
    content = json.loads(records.read_text())
    content[2]["image"], content[9]["conversations"] = "gone.png", []
    content[20]["conversations"][0]["value"] = "rook " * 100
    records.write_text(json.dumps(content))
    caplog.set_level(logging.INFO)
    for number, listing in ((3, tmp_path / "cold.jsonl"), (1, tmp_path / "warm.jsonl")):
        processes(number)
        options = options_for(tmp_path, on_bad_sample="skip", bad_samples_file=listing, max_length=60)
        caplog.clear()
        rows = prepare(records, processor, options)
        assert "22 of 25 rows" in caplog.text
        assert "; 3 rows are left out (image 1, conversation 1, length 1)" in caplog.text
        lines = [json.loads(line) for line in listing.read_text().splitlines()]
        assert [line["kind"] for line in lines] == ["image", "conversation", "length"]
        assert [line["problem"].split(" (")[0] for line in lines] == [
            f"records.json, record {number}" for number in (2, 9, 20)
        ]
        assert len(viewed_rows(rows)) == 22
    with pytest.raises(BadSampleError, match="3 of 25 rows can't be used"):  # from the cache too
        prepare(records, processor, options_for(tmp_path, max_length=60))


def test_decoded_images_are_kept(records, processor, tmp_path, monkeypatch):
    broken = records.parent / "4.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    options = options_for(tmp_path, image_check="decode", on_bad_sample="skip")
    assert len(viewed_rows(prepare(records, processor, options))) == 25 - 2
    forbid_tokenising(monkeypatch)
    assert len(viewed_rows(prepare(records, processor, options))) == 25 - 2


# ---------------------------------------------------------------------- progress


def test_a_log_file_gets_a_line_every_30_seconds(caplog):
    caplog.set_level(logging.INFO)
    now = [0.0]
    with Progress(1000, "Preparing rows", clock=lambda: now[0]) as bar:
        assert bar.in_lines  # pytest's stderr is no terminal
        for second in range(0, 80, 10):
            now[0] = float(second)
            bar.update(100)
    assert [record.message for record in caplog.records] == [
        "Preparing rows: 400 of 1,000 at 13 rows/s, 45 seconds left",
        "Preparing rows: 700 of 1,000 at 12 rows/s, 25 seconds left",
    ]


def test_durations_in_words():
    found = [duration(seconds) for seconds in (0, 1.9, 59, 60, 7300, 90_000 * 3)]
    assert found == ["0 seconds", "1 second", "59 seconds", "1 minute", "2 hours", "3 days"]


def test_the_key_names_all_that_matters(records, processor, tmp_path):
    prepare(records, processor, options_for(tmp_path))
    (folder,) = (tmp_path / "cache").iterdir()
    key = json.loads((folder / "prepared.json").read_text())["key"]
    assert key["format"] == data_cache.FORMAT and set(key["code"]) == {*data_cache.PACKAGES, "jnana.processing"}
    assert {"tokenizer.json", "chat_template.jinja"} <= set(key["processor"])
    assert list(key["files"]) == [str(records)]


# ---------------------------------------------------------------------- killed builders, other machines


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux")
def test_the_workers_of_a_killed_builder_end(records, processor, tmp_path, processes, monkeypatch):
    """They hold its lock, if the library of locks lets them inherit it."""
    processes(2)
    monkeypatch.setattr(encoding, "WATCH_SECONDS", 0.05)
    started = tmp_path / "workers.txt"

    def wait(*args):
        with started.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60)

    def build() -> None:
        encoding.check_block = wait
        prepare(records, processor, options_for(tmp_path))

    child = in_a_fork(build)
    deadline = time.monotonic() + 60
    while not started.exists() or len(set(started.read_text().split())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    workers = [int(number) for number in set(started.read_text().split())]
    while any(_runs(worker) for worker in workers):
        assert time.monotonic() < deadline, "the workers outlive their parent"
        time.sleep(0.05)
    processes(1)
    assert len(prepare(records, processor, options_for(tmp_path))) > 25  # the lock is free


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_another_machines_images_do_not_take_the_rows_away(records, processor, tmp_path, caplog):
    """Two machines share the cache and have the images, with other times, on disks of their own."""
    options = options_for(tmp_path)
    preparation = RowPreparation(records, processor, options)
    first = preparation.run()
    os.utime(records.parent / "0.png", (1, 1))
    caplog.set_level(logging.INFO)
    second = RowPreparation(records, processor, options).run()
    assert "0.png' has changed" in caplog.text and second.file != first.file
    assert len(preparation.rows_of(first)[0]) == len(preparation.rows_of(second)[0]) > 0


def test_an_image_that_could_not_be_read_for_a_moment(records, processor, tmp_path, monkeypatch, caplog):
    options = options_for(tmp_path, on_bad_sample="skip")
    opened = images.Image.open

    def fail(file, *args, **kwargs):
        if "0.png" in str(getattr(file, "name", file)):
            raise OSError(errno.EIO, "Input/output error")
        return opened(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", fail)
        fewer = RowPreparation(records, processor, options).run()
        caplog.set_level(logging.INFO)
        assert RowPreparation(records, processor, options).run().file == fewer.file  # the control: it fails still
    assert fewer.report.unreadable
    whole = RowPreparation(records, processor, options).run()
    assert "could not be used, and can be now" in caplog.text and not whole.report.unreadable


def test_a_default_cache_that_cannot_be_written_stops_no_run(records, processor, tmp_path, monkeypatch, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(prepared_rows, "KEPT_BYTES", 0)
    monkeypatch.setattr(prepared_rows, "default_data_cache", lambda: blocked / "jnana")
    assert len(prepare(records, processor, options_for(tmp_path, data_cache=None))) > 25
    assert "prepared at every start" in caplog.text
    with pytest.raises(ValueError, match="name another directory: data_cache"):
        prepare(records, processor, options_for(tmp_path, data_cache=blocked / "jnana"))


def test_records_that_datasets_reads_are_not_kept(records, processor, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for image in records.parent.glob("*.png"):
        shutil.copy(image, folder)
    lines = [json.dumps({"file_name": "0.png", "text": f"a rook {number}"}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = prepare(folder, processor, options_for(tmp_path, format="dataset", needs_images=True))
    assert len(rows) > 0 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("share", "cores"), [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1)])
def test_the_share_of_a_container_counts(tmp_path, monkeypatch, share, cores):
    (tmp_path / "cpu.max").write_text(share)
    monkeypatch.setattr(encoding, "CPU_SHARE", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert encoding.usable_cores() == cores

"""Several sources in one run: shares, draws without replacement, packing, streams; one source is as it was."""

import json
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from jnana.processing.data import JnanaCollator, PrepareOptions, prepare
from jnana.processing.data.mixture import DataSource, draw, rows_an_epoch, source_names
from jnana.processing.data.prepared_rows import StreamReaders
from jnana.processing.data.streams import describe_fewest, parts_are_dealt


SIZES = {"photos": 60, "chat": 45, "rare": 12}


@pytest.fixture
def files(tmp_path):
    """Three files of text-only chats; the photos have an image and two questions."""
    made = {}
    for name, size in SIZES.items():
        records = []
        for number in range(size):
            turns = [("human", f"what is {name} {number}?"), ("gpt", f"it is {number}" + " yes" * (number % 5))]
            record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
            if name == "photos":
                record["image"] = f"{number % 2}.png"
                record["conversations"] += [{"from": "human", "value": "and then?"}, {"from": "gpt", "value": "more"}]
            records.append(record)
        made[name] = tmp_path / f"{name}.jsonl"
        made[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    return made


@pytest.fixture
def options(pictures):
    def make(**changes) -> PrepareOptions:
        given = {"image_folder": pictures, "packing": "none", "max_length": 60, "max_row_tokens": 80, "seed": 0}
        return PrepareOptions(**{**given, "progress": False, "num_proc": 1, **changes})

    return make


def groups(rows) -> list[list[dict]]:
    return [item.get("groups") or [item] for item in rows]


def drawn(rows) -> Counter:
    """How often an epoch has each data row, by source and record; a row counts by its first question."""
    first = [row for item in groups(rows) for row in item if "conversation 1" not in row["source"]]
    return Counter((row["origin"], row["source"].split(" (")[0].split(", conversation")[0]) for row in first)


def by_source(rows) -> Counter:
    found: Counter = Counter()
    for (origin, _), number in drawn(rows).items():
        found[origin] += number
    return found


# ---------------------------------------------------------------------- one source


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_one_source_is_as_it_was(files, options, processor, packing, streaming):
    """Equal items and equal batches; the control draws fewer rows."""
    given = options(packing=packing, streaming=streaming)
    alone, listed = (
        prepare(files["photos"], processor, given),
        prepare([DataSource(files["photos"])], processor, given),
    )
    assert list(alone) == list(listed)
    collator = JnanaCollator(processor, **given.for_collator)
    ours, theirs = (collator(list(islice(rows, 5))) for rows in (listed, alone))
    assert ours.counts == theirs.counts and ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else name != "labels"
    assert "origin" not in groups(listed)[0][0]
    if not streaming:
        fewer = prepare([DataSource(files["photos"], samples=59)], processor, given)
        assert list(fewer) != list(alone)


# ---------------------------------------------------------------------- shares


@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_shares_of_an_epoch(files, options, processor, packing):
    """Within 0.5 % (and a row), without replacement, until the first source is exhausted."""
    weights = {"photos": 5, "chat": 4, "rare": 1}
    sources = [DataSource(files[name], weight=weight) for name, weight in weights.items()]
    rows = prepare(sources, processor, options(packing=packing))
    found = by_source(rows)
    total = sum(found.values())
    assert found["chat"] == SIZES["chat"]  # 45 / 0.4 = 112 rows; the others have enough
    for name, weight in weights.items():
        assert abs(found[name] - total * weight / 10) < 1 + 0.005 * total
    assert set(drawn(rows).values()) == {1}
    everything = by_source(prepare([DataSource(files[name]) for name in weights], processor, options()))
    assert everything == SIZES  # the control: without weights all rows


def test_shares_are_exact_at_real_sizes():
    """COCO beside LLaVA-Instruct beside a small set that repeats."""
    sizes, given = [118_287, 157_712, 4_000], [0.3, 0.6, 0.1]
    sources = [DataSource(f"{n}.json", weight=weight, repeat=4) for n, weight in enumerate(given)]
    numbers = rows_an_epoch(sources, sizes)
    assert numbers[2] == 16_000 and sum(numbers) == 160_000
    assert max(abs(number / sum(numbers) - weight) for number, weight in zip(numbers, given, strict=True)) < 1e-5
    plain = [size / sum(sizes) for size in sizes]
    assert max(abs(share - weight) for share, weight in zip(plain, given, strict=True)) > 0.05  # the control


def test_samples_and_repeats(files, options, processor):
    sources = [DataSource(files["photos"], samples=20), DataSource(files["rare"], repeat=3)]
    rows = prepare(sources, processor, options())
    assert by_source(rows) == {"photos": 20, "rare": 36}
    assert {number for (origin, _), number in drawn(rows).items() if origin == "rare"} == {3}
    with pytest.raises(ValueError, match="'rare' has 12 usable rows, but samples is 30.*`repeat: 3`"):
        prepare([DataSource(files["photos"]), DataSource(files["rare"], samples=30)], processor, options())


def test_no_row_is_drawn_again_before_all_were():
    for number in (0, 1, 5, 7, 12, 21):
        counts = np.bincount(draw(7, number, "a", 0), minlength=7)
        assert counts.sum() == number and counts.max() - counts.min() <= 1
    assert (draw(100, 30, "a", 0) != draw(100, 30, "b", 0)).any()


def test_a_draw_depends_on_the_seed_and_its_own_source(files, options, processor):
    def of_photos(seed: int, *others: str) -> set:
        sources = [DataSource(files["photos"], samples=20), *(DataSource(files[name]) for name in others)]
        found = drawn(prepare(sources, processor, options(seed=seed)))
        return {record for origin, record in found if origin == "photos"}

    assert of_photos(0, "chat") == of_photos(0, "chat") == of_photos(0, "rare", "chat")
    assert of_photos(0, "chat") != of_photos(1, "chat")


def test_what_is_refused(files, options, processor):
    photos, chat = DataSource(files["photos"], weight=1), DataSource(files["chat"])
    for sources, words in (
        ([photos, chat], "source 'chat' has no weight, but others have"),
        ([photos, photos], "sources 0 and 1 are both named 'photos'"),
        ([DataSource("a.json", name="a b")], "source 0 is named 'a b'"),
        (
            [DataSource(files["rare"], weight=1), DataSource(files["chat"], weight=1e-3)],
            "less than one of the 12 rows",
        ),
        ([], "the list of sources is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(sources, processor, options())
    assert source_names([DataSource("data/*.tar"), DataSource("user/set")]) == ["source_0", "set"]


# ---------------------------------------------------------------------- packing, counts, cache


@pytest.mark.parametrize("packing", ["rows", "shared_image"])
def test_sources_share_a_packed_row_or_only_a_batch(files, options, processor, packing):
    sources = [DataSource(files["photos"]), DataSource(files["chat"])]
    for mix, most in (("row", 2), ("batch", 1)):
        rows = prepare(sources, processor, options(packing=packing, mix=mix, max_row_tokens=160))
        assert max(len({row["origin"] for row in item}) for item in groups(rows)) == most
        assert by_source(rows) == {"photos": 60, "chat": 45}
    with pytest.raises(ValueError, match="mix='column' must be one of row, batch"):
        prepare(sources, processor, options(mix="column"))


@pytest.mark.parametrize("packing", ["none", "rows", "shared_image"])
def test_a_batch_is_counted_by_source(files, options, processor, packing):
    given = options(packing=packing)
    rows = prepare([DataSource(files["photos"]), DataSource(files["chat"])], processor, given)
    collator = JnanaCollator(processor, **given.for_collator, sources=["photos", "chat", "absent"])
    items = [rows[0], rows[len(rows) // 2], rows[-1]]
    batch = collator(items)
    counts = batch.counts
    assert [source.name for source in counts.sources] == ["photos", "chat", "absent"]
    for name in ("conversations", "tokens", "supervised"):
        assert sum(getattr(source, name) for source in counts.sources) == getattr(counts, name)
    wanted = Counter(row["origin"] for item in groups(items) for row in item for _ in row["conversations"])
    assert {source.name: source.conversations for source in counts.sources if source.conversations} == wanted
    assert sum(number for _, number in counts.label_sources) == counts.supervised == len(batch["logit_positions"])
    for index, source in enumerate(counts.sources):
        assert sum(number for of, number in counts.label_sources if of == index) == source.supervised
    assert JnanaCollator(processor, **given.for_collator)(items).counts.sources == ()  # the control


def test_each_source_is_kept_by_itself(files, options, processor, tmp_path):
    cache = tmp_path / "cache"
    sources = [DataSource(files["photos"]), DataSource(files["chat"])]

    def entries() -> set[str]:
        return {path.name for path in cache.iterdir()}

    prepare(sources, processor, options(data_cache=cache))
    both = entries()
    assert len(both) == 2
    prepare(
        [DataSource(files["chat"], weight=1), DataSource(files["rare"], weight=2)],
        processor,
        options(data_cache=cache),
    )
    assert len(entries() - both) == 1  # the chat was found
    files["rare"].write_text(files["rare"].read_text().replace("rare 3", "rare three"))
    before = entries()
    prepare([DataSource(files["chat"]), DataSource(files["rare"])], processor, options(data_cache=cache))
    assert len(entries() - before) == 1


# ---------------------------------------------------------------------- streams


def test_a_mixture_of_streams(files, options, processor):
    """A local JSON Lines stream beside a data set, drawn by weights; each starts over when it ends."""
    rare = datasets.load_dataset("json", data_files=str(files["rare"]), split="train")
    sources = [DataSource(files["photos"], weight=3), DataSource(rare, name="rare", weight=1)]
    given = options(streaming=True)
    stream = prepare(sources, processor, given)
    assert isinstance(stream, datasets.IterableDataset)
    rows = list(islice(stream, 2000))
    found = Counter(row["origin"] for row in rows)
    photos = found["photos"] / 2  # two conversations a row
    assert abs(photos / (photos + found["rare"]) - 0.75) < 0.04  # three standard deviations
    numbers = Counter(row["source"] for row in rows)
    assert max(numbers.values()) - min(numbers.values()) <= max(numbers.values()) // 2  # no row is forgotten
    assert list(islice(prepare(sources, processor, given), 200)) == rows[:200]
    assert list(islice(prepare(sources, processor, options(streaming=True, seed=1)), 200)) != rows[:200]
    assert list(islice(stream.skip(120), 80)) == rows[120:200]  # as a resumed run skips


@pytest.mark.parametrize("packing", ["rows", "shared_image"])
def test_a_packed_mixture_of_streams(files, options, processor, packing):
    sources = [DataSource(files["photos"], weight=1), DataSource(files["chat"], weight=1)]
    given = options(packing=packing, streaming=True)
    items = list(islice(prepare(sources, processor, given), 12))
    assert {row["origin"] for item in groups(items) for row in item} == {"photos", "chat"}
    counts = JnanaCollator(processor, **given.for_collator, sources=["photos", "chat"])(items).counts
    assert sum(source.supervised for source in counts.sources) == counts.supervised
    with pytest.raises(ValueError, match="mix is 'batch', but rows of a stream are packed as they come"):
        prepare(sources, processor, options(packing=packing, streaming=True, mix="batch"))
    with pytest.raises(ValueError, match="source 'photos' has `samples` or `repeat`"):
        prepare([DataSource(files["photos"], samples=3), sources[1]], processor, given)
    with pytest.raises(ValueError, match="source 'photos' has no weight"):
        prepare([DataSource(files["photos"]), sources[1]], processor, given)


def test_a_source_without_rows_ends_before_it_starts(files, options, processor):
    """In a mixture it would be waited for, for ever."""
    nothing = datasets.IterableDataset.from_generator(
        no_rows, features=datasets.Features({"text": datasets.Value("string")}), gen_kwargs={"parts": [0, 1]}
    )
    sources = [DataSource(files["photos"], weight=1), DataSource(nothing, name="nothing", weight=1)]
    with pytest.raises(ValueError, match="source 'nothing' has no rows; correct its `data` or `split`"):
        next(iter(prepare(sources, processor, options(streaming=True))))
    with pytest.raises(ValueError, match="source 'source_0' has no rows"):
        prepare(nothing, processor, options(streaming=True, endless=True))
    sources[1] = DataSource(files["chat"], weight=1)  # the control
    assert next(iter(prepare(sources, processor, options(streaming=True))))


def no_rows(parts):
    yield from ()


def of_process(stream, process: int, processes: int, number: int) -> list[dict]:
    """What accelerate gives a process of a stream with enough parts."""
    return list(islice(stream.shard(num_shards=processes, index=process), number))


@pytest.mark.parametrize("changes", [{}, {"shuffle_buffer": 8}], ids=["in order", "shuffled"])
def test_processes_draw_sources_of_their_own(files, options, processor, changes):
    """Otherwise all processes of a step would train on one source. The shares hold for each, and for all together."""
    sources = [DataSource(files["rare"], weight=1), DataSource(files["chat"], weight=1)]

    def read(process: int, processes: int = 2, number: int = 600) -> list[dict]:
        given = options(streaming=True, readers=StreamReaders(process, processes), **changes)
        return of_process(prepare(sources, processor, given), process, processes, number)

    found = [read(process) for process in (0, 1)]
    drawn_sources = [[row["origin"] for row in rows] for rows in found]
    same = sum(ours == theirs for ours, theirs in zip(*drawn_sources, strict=True)) / 600
    assert abs(same - 0.5) < 0.07  # as two independent draws
    for origins in (*drawn_sources, drawn_sources[0] + drawn_sources[1]):
        assert abs(Counter(origins)["rare"] / len(origins) - 0.5) < 0.06
    seen = [{(row["origin"], row["source"]) for row in rows} for rows in found]
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == SIZES["rare"] + SIZES["chat"]  # each row is of one
    assert read(1) == found[1]  # as a resumed run reads it again
    assert [row["origin"] for row in read(1, 2, 50)] != [row["origin"] for row in read(1, 13, 50)]


def test_processes_that_read_all_parts_read_the_same(files, options, processor):
    """There accelerate takes each process's batches out of one sequence."""
    sources = [DataSource(files["rare"], weight=1), DataSource(files["chat"], weight=1)]

    def read(process: int, processes: int) -> list[dict]:
        given = options(streaming=True, readers=StreamReaders(process, processes))
        return list(islice(prepare(sources, processor, given), 100))

    assert read(0, 13) == read(7, 13) and read(0, 12 - 1) != read(7, 12 - 1)  # 12 rows are 12 parts
    assert parts_are_dealt(13, StreamReaders(0, 12)) and not parts_are_dealt(11, StreamReaders(0, 12))


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
@pytest.mark.parametrize("buffer", [16, 1000], ids=["small", "large"])
def test_each_pass_has_another_order(files, options, processor, mixed, buffer):
    """And all its rows, each once, before any comes again, with a buffer smaller and larger than the source."""
    given = options(streaming=True, shuffle_buffer=buffer, endless=True)
    others = [DataSource(files["rare"], weight=1)] if mixed else []
    sources = [DataSource(files["chat"], weight=1), *others]
    stream, size = prepare(sources, processor, given), SIZES["chat"]
    rows = list(islice(stream, (2 if mixed else 1) * 6 * size))
    names = [row["source"] for row in rows if row["source"].startswith("chat") or "chat.jsonl" in row["source"]]
    passes = [names[start : start + size] for start in range(0, len(names) - size, size)]
    assert len(passes) > 3
    assert all(len(set(each)) == size for each in passes)
    assert len({tuple(each) for each in passes}) == len(passes)
    if buffer > size:  # not only from pass to pass: each pass mixes the whole source
        places = np.array([[each.index(name) for name in passes[0]] for each in passes[1:]])
        assert abs(np.corrcoef(np.arange(size), places[0])[0, 1]) < 0.5
    assert list(islice(stream.skip(size + 7), size)) == rows[size + 7 : 2 * size + 7]  # as a resumed run skips
    plain = prepare([DataSource(files["chat"])], processor, options(streaming=True, endless=True))
    names = [row["source"] for row in islice(plain, 2 * size)]
    assert names[:size] == names[size:]  # the control: without a buffer, the order of the file


def test_a_source_of_few_parts_is_named(files, options, processor, caplog):
    one = datasets.Dataset.from_list([{"text": f"a {number}"} for number in range(9)]).to_iterable_dataset()
    sources = [DataSource(files["chat"], weight=1), DataSource(one, name="narrow", weight=1)]
    prepare(sources, processor, options(streaming=True, readers=StreamReaders(0, 2, 4)))
    assert (
        "source 'narrow' has 1 part (files), so the mixture has no more, and each of the 2 processes reads all rows "
        "of all sources and 1 of the 4 dataloader workers of a process read; write it as at least 8 files"
    ) in caplog.text
    caplog.clear()
    prepare(sources, processor, options(streaming=True, readers=StreamReaders(0, 1, 1)))
    assert not caplog.text  # the control
    assert describe_fewest({"a": 64, "b": 8}, StreamReaders(0, 2, 4)) is None
    assert "1 of the 2 dataloader" in describe_fewest({"a": 64, "b": 3}, StreamReaders(0, 2, 2))


def test_a_stream_is_shuffled_by_a_buffer(files, options, processor):
    def names(**changes) -> list[str]:
        rows = prepare(files["chat"], processor, options(streaming=True, **changes))
        return [row["source"] for row in islice(rows, SIZES["chat"])]

    plain, shuffled = names(), names(shuffle_buffer=16)
    assert plain != shuffled and len(set(shuffled)) == len(plain)
    assert shuffled == names(shuffle_buffer=16) != names(shuffle_buffer=16, seed=1)

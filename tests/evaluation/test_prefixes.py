"""The prefix of an image is read once for all questions about it, and each is answered as if it were asked alone."""

import random
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from jnana.evaluation import QuestionSet, answer_questions, generation
from jnana.evaluation.prefixes import (
    cache_of_rows,
    length_limit,
    read_prefix,
    shared_prefix_length,
    sharing_problem,
)
from jnana.evaluation.prompts import PromptCollator, plan_batches
from jnana.modeling import CACHE_NAME
from jnana.processing import JnanaProcessor
from jnana.processing.data.rows import IMAGE_PART, make_row, message, text_part
from jnana.training.loading import load_model
from jnana.training.model_setup import build_pair
from tests.evaluation.test_generation import OPTIONS, one_by_one, predictions
from tests.modeling.test_cross_attention import FIELDS, open_gates
from tests.tiles import row, save_pictures, tile_pair
from tests.tiny import save_tiny_llava, save_tiny_text, save_tiny_vision, tiny_text_config


FAMILIES = ["phi", "phi3", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
ASKED = [
    "is there a dog?",
    "how many pieces are there on the board?",
    "what do you see in this picture?",
    "is there a white king?",
    "is it a cat on a mat or the quick brown fox?",
    "yes?",
]
SIZES = [(24, 24), (31, 77), (90, 20), (48, 48)]  # (height, width); the first three are asked about several times
EXACT = 1e-4  # of the logits in float32


def make_pair(folder, family="llama", layers=2, window=256, **fields):
    """A pair whose random answers depend on what it reads."""
    vision = save_tiny_vision(folder / "vision")
    more = {"sliding_window": window} if family == "phi3" else {}
    text = save_tiny_text(folder / "text", family, initializer_range=0.2, num_hidden_layers=layers, **more)
    size = {"vision_feature_select_strategy": "default"}
    if fields.get("projector_type") == "perceiver":
        size["tokens_per_view"] = 1 if fields["fusion"] == "cross_attention" else fields["projector_num_latents"]
    processor = JnanaProcessor.from_vision_text_pretrained(vision, text, chat_template="jnana", **size)
    torch.manual_seed(0)
    model = build_pair(str(vision), str(text), processor, **fields).eval()
    return (open_gates(model) if fields.get("fusion") == "cross_attention" else model), processor


def rows_about(paths) -> list[dict]:
    """As POPE has it, a row for each question: six, three and two questions about an image, one, and one without."""
    rows = [
        row([path], ["yes"], question, f"record {path.stem} {number}")
        for path, count in zip(paths, (6, 3, 2, 1), strict=True)
        for number, question in enumerate(ASKED[:count])
    ]
    random.Random(0).shuffle(rows)
    rows.append(row([], ["no"], ASKED[2], "record without image"))
    user, answer = message("user", IMAGE_PART, text_part(ASKED[0])), message("assistant", text_part("no"))
    chat = [user, answer, message("user", text_part(ASKED[1])), message("assistant", text_part("two"))]
    return [*rows, make_row([{"path": str(paths[1]), "bytes": None}], [chat], "record of two turns")]


@pytest.fixture
def paths(tmp_path):
    return save_pictures(tmp_path / "pictures", SIZES)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("pair"))


def count_images(model) -> list[int]:
    """Images that the vision tower gets, call by call."""
    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return seen


def answer_logits(model, processor, batch, spoil=lambda prompts, cache: None):
    """Question -> the logits of each token of its answer (of six), and these tokens."""
    found = {}
    prefix = None if batch.prefix is None else read_prefix(model, batch.prefix)
    for prompts in batch.prompts:
        inputs = dict(prompts.inputs)
        if prompts.rows is not None:
            inputs[CACHE_NAME] = cache_of_rows(prefix, prompts.rows)
        spoil(inputs, prefix)
        made = model.generate(
            **inputs,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(made.logits, dim=1)
        for position, index in enumerate(prompts.indices):
            found[index] = (logits[position], made.sequences[position, -6:].tolist())
    return found


def compare(one, other) -> tuple[float, bool]:
    """The largest difference of logits, and whether all tokens are equal."""
    assert one.keys() == other.keys()
    return (
        max((one[index][0] - other[index][0]).abs().max().item() for index in one),
        all(one[index][1] == other[index][1] for index in one),
    )


@pytest.mark.parametrize("kind", [*FAMILIES, "cross_attention", "llava_next", "pixel_shuffle"])
def test_logits_and_tokens_are_those_of_single_questions(tmp_path, paths, kind):
    if kind in FAMILIES:
        model, processor = make_pair(tmp_path, kind)
    elif kind == "cross_attention":
        model, processor = make_pair(tmp_path, layers=3, **FIELDS)
    else:
        model, processor = tile_pair(tmp_path / "model", kind)
    questions = QuestionSet(rows_about(paths))
    collator = PromptCollator(questions, processor, False, batch_size=16)
    (batch, *rest) = plan_batches(questions, range(len(questions)), processor, 16, share_prefix=True)
    with torch.inference_mode():
        made = collator(batch)
        assert made.prefix is not None and len(batch) == len(made.prefix["input_ids"]) > 1
        shared = answer_logits(model, processor, made)
        alone = {}
        for index in shared:
            alone |= answer_logits(model, processor, collator([[index]]))
        difference, equal = compare(shared, alone)
        assert difference <= EXACT and equal
        assert len({str(tokens) for _, tokens in alone.values()}) > 3

        # the controls: the prefix of another image; padding that is attended to; a position too many
        def other_image(inputs, prefix):
            inputs[CACHE_NAME] = cache_of_rows(prefix, (made.prompts[0].rows + 1) % len(batch))

        def padding_seen(inputs, prefix):
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])

        def shifted(inputs, prefix):
            mask = inputs["attention_mask"]
            columns = torch.arange(mask.shape[1])
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + (columns >= prefix.get_seq_length())

        for spoil in (other_image, padding_seen, shifted):
            assert compare(answer_logits(model, processor, made, spoil), alone)[0] > 100 * EXACT, spoil


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_answers_are_those_of_single_questions(pair, paths, batch_size):
    model, processor = pair
    questions = QuestionSet(rows_about(paths))
    expected = one_by_one(model, processor, questions)
    options = {**OPTIONS, "batch_size": batch_size}
    seen = count_images(model)
    assert predictions(answer_questions(model, processor, questions, **options)) == expected
    assert sum(seen) == len(paths)  # each image once, whatever the size of a batch
    seen.clear()
    assert predictions(answer_questions(model, processor, questions, share_prefix=False, **options)) == expected
    assert sum(seen) == len(questions) - 1  # one has no image
    assert len(set(expected)) > 4


def test_workers_blind_images_and_resuming(pair, paths, tmp_path):
    questions = QuestionSet(rows_about(paths))
    for blind in (False, True):
        options = {**OPTIONS, "blind": blind}
        expected = answer_questions(*pair, questions, share_prefix=False, **options)
        file = tmp_path / f"{blind}.jsonl"
        assert answer_questions(*pair, questions, predictions_file=file, **{**options, "num_workers": 1}) == expected
        lines = file.read_text().splitlines()
        file.write_text("\n".join(lines[:7]) + "\n")
        assert answer_questions(*pair, questions, predictions_file=file, **options) == expected
        assert sorted(file.read_text().splitlines()) == sorted(lines)


def test_a_broken_image_is_reported_for_each_of_its_questions(pair, paths):
    questions = QuestionSet(rows_about(paths))
    expected = predictions(answer_questions(*pair, questions, **OPTIONS))
    paths[0].write_bytes(b"no image")
    records = answer_questions(*pair, questions, **OPTIONS)
    broken = [question.source for question in questions.questions if paths[0].stem in question.source]
    assert len(broken) == 6
    assert [record["source"] for record in records if record["prediction"] is None] == broken
    assert all(record["source"] in record["error"] for record in records if record["prediction"] is None)
    kept = [text for record, text in zip(records, expected, strict=True) if record["prediction"] is not None]
    assert [text for text in predictions(records) if text is not None] == kept


def test_an_image_behind_the_question_is_read_for_each(pair, paths):
    model, processor = pair
    answer = message("assistant", text_part("yes"))
    chats = [[message("user", text_part(question), IMAGE_PART), answer] for question in ASKED]
    questions = QuestionSet([make_row([{"path": str(paths[0]), "bytes": None}], chats, "record")])
    made = PromptCollator(questions, processor, False)([list(range(6))])
    assert made.prefix is None and [len(prompts.indices) for prompts in made.prompts] == [6]
    records = answer_questions(model, processor, questions, **OPTIONS)
    assert predictions(records) == one_by_one(model, processor, questions)


def test_a_row_longer_than_the_window_is_read_whole(tmp_path, paths, monkeypatch):
    model, processor = make_pair(tmp_path, "phi3", window=24)  # shorter than the prompts
    questions = QuestionSet(rows_about(paths))
    text = model.config.text_config
    seen = count_images(model)
    expected = one_by_one(model, processor, questions)
    seen.clear()
    assert predictions(answer_questions(model, processor, questions, **OPTIONS)) == expected
    assert sum(seen) == len(questions) - 1
    with monkeypatch.context() as patch:  # the control: sharing it all the same
        patch.setattr(generation, "length_limit", lambda text: None)
        assert predictions(answer_questions(model, processor, questions, **OPTIONS)) != expected
    limits = [length_limit(text)]
    text.sliding_window = None
    limits.append(length_limit(text))
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic"}
    limits.append(length_limit(text))
    assert limits == [24, text.original_max_position_embeddings, text.max_position_embeddings]
    assert length_limit(tiny_text_config("llama")) is None


def test_what_shares_no_prefix_is_named(pair, tmp_path, paths, monkeypatch):
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model, processor = pair
    assert sharing_problem(model, processor) is None
    lora = get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    assert sharing_problem(lora, processor) is None
    lora.unload()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert "PROMPT_TUNING puts vectors" in sharing_problem(tuned, processor)
    for name, value in (
        ("use_cache", False),
        ("cache_implementation", "static"),
        ("cache_implementation", "dynamic"),
        ("no_repeat_ngram_size", 2),
    ):
        assert f"{name} is {value!r}" in sharing_problem(model, processor, {name: value})
        monkeypatch.setattr(model.generation_config, name, value)
        assert f"{name} is {value!r}" in sharing_problem(model, processor)
        assert sharing_problem(model, processor, {name: None}) is None  # what a call is given comes first
        monkeypatch.undo()
    monkeypatch.setattr(model.config, "image_end_token_id", processor.tokenizer.pad_token_id)
    assert "image_end_token_id is the padding token" in sharing_problem(model, processor)
    monkeypatch.setattr(model.config, "image_end_token_id", processor.tokenizer.eos_token_id)
    assert processor.tokenizer.eos_token_id != processor.tokenizer.pad_token_id
    assert sharing_problem(model, processor) is None
    monkeypatch.undo()
    stock = SimpleNamespace(config=SimpleNamespace(model_type="llava"), generation_config=model.generation_config)
    assert "a llava model" in sharing_problem(stock, processor)
    llava = load_model(str(save_tiny_llava(tmp_path / "llava")))[0]
    assert sharing_problem(llava, processor) is None  # loaded as ours
    assert "not a JnanaProcessor; load it with `load_model`" in sharing_problem(model, processor.tokenizer)


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam sample"),
        ({"prompt_lookup_num_tokens": 3}, "assisted generation"),
        ({"assistant_early_exit": 1}, "assisted generation"),
        ({"assistant_model": object()}, "assisted generation"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
    ],
)
def test_only_greedy_search_and_sampling_go_on_from_a_prefix(pair, settings, mode):
    assert f"{mode} does not go on" in sharing_problem(*pair, settings)
    for settings in ({}, {"do_sample": False, "num_beams": 1}, {"do_sample": True, "temperature": 0.5, "top_k": 4}):
        assert sharing_problem(*pair, settings) is None


# A random model writes tokens that are not in its prompt: the biases make it repeat two of it across the prefix's end.
@pytest.mark.parametrize(
    "settings",
    [{"cache_implementation": "dynamic"}, {"prompt_lookup_num_tokens": 3}, {"no_repeat_ngram_size": 2}],
    ids=str,
)
def test_settings_that_a_prefix_would_change_give_the_answers_of_single_questions(pair, paths, monkeypatch, settings):
    model, processor = pair
    asked = ["is there a dog?", "is there a cat on a mat or the quick brown fox?", "is there a white king?"]
    questions = QuestionSet([row([paths[0]], ["yes"], text, f"record {text}") for text in asked])
    made = PromptCollator(questions, processor, False)([[0, 1, 2]])
    pad, length = processor.tokenizer.pad_token_id, made.prefix["input_ids"].shape[1]
    ids = made.prompts[0].inputs["input_ids"]
    behind = next(row for row in ids if row[length] == pad)[length:]
    last, first = int(ids[0, length - 1]), int(behind[behind != pad][0])
    for name, value in {**settings, "sequence_bias": [[[last], 500.0], [[last, first], 2000.0]]}.items():
        if name != "sequence_bias" or "no_repeat_ngram_size" in settings:
            monkeypatch.setattr(model.generation_config, name, value)
    options = {**OPTIONS, "batch_size": 1 if "prompt_lookup_num_tokens" in settings else 4}
    expected = predictions(answer_questions(model, processor, questions, share_prefix=False, **options))
    assert predictions(answer_questions(model, processor, questions, **options)) == expected
    # the control: sharing it all the same
    monkeypatch.setattr(generation, "sharing_problem", lambda *given: None)
    try:
        assert predictions(answer_questions(model, processor, questions, **options)) != expected
    except ValueError as error:
        assert "Passing both `cache_implementation`" in str(error)


def test_one_copy_of_the_prefix_is_alive_at_a_time(pair, paths, monkeypatch):
    model, processor = pair
    questions = QuestionSet([row([paths[0]], ["yes"], f"is there a dog {n}?", f"record {n}") for n in range(16)])
    (batch,) = plan_batches(questions, range(16), processor, 4, share_prefix=True)
    made = PromptCollator(questions, processor, False, batch_size=4)(batch)
    caches, alive = [], []
    cached = generation.cache_of_rows

    def noting(prefix, rows):
        if not caches:
            caches.append(weakref.ref(prefix))
        copied = cached(prefix, rows)
        caches.append(weakref.ref(copied))
        return copied

    generate = type(model).generate

    def counting(self, *args, **kwargs):
        alive.append([number for number, cache in enumerate(caches) if cache() is not None])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(generation, "cache_of_rows", noting)
    monkeypatch.setattr(type(model), "generate", counting)
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": 4}
    answers = generation._answer_batch(model, processor, made, options)
    assert len(answers) == 16 and all(answer.shared for answer in answers.values())
    assert alive == [[0, 1], [0, 2], [0, 3], [4]]  # 0 is the prefix's own
    assert all(CACHE_NAME not in prompts.inputs for prompts in made.prompts)


def test_an_adapter_shares_it_too(pair, paths):
    from peft import LoraConfig, get_peft_model

    model, processor = pair
    config = LoraConfig(target_modules=r".*language_model.*\.[qv]_proj", init_lora_weights=False)
    questions = QuestionSet(rows_about(paths))
    base = predictions(answer_questions(model, processor, questions, **OPTIONS))
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    try:
        expected = one_by_one(adapted, processor, questions)
        assert predictions(answer_questions(adapted, processor, questions, **OPTIONS)) == expected != base
    finally:
        adapted.unload()


def test_the_prefix_holds_every_image_and_leaves_a_token():
    image = 9
    assert shared_prefix_length([[1, image, 2, 3], [1, image, 2, 4, 5]], image) == 3
    assert shared_prefix_length([[1, image, 2], [1, image, 2]], image) == 2
    assert shared_prefix_length([[1, image, 2], [1, image, 2, 5]], image) == 2
    assert shared_prefix_length([[1, 2, image], [1, 3, image]], image) == 0
    assert shared_prefix_length([[1, image], [1, image]], image) == 0  # the token left is of the image


@pytest.mark.parametrize("seed", range(5))
def test_each_question_is_in_one_batch_of_one_process(seed):
    rng = random.Random(seed)
    asked = [
        SimpleNamespace(messages=["x" * rng.randrange(1, 99)], image_key=rng.choice(["", *"abcdefgh"]))
        for _ in range(rng.randrange(1, 80))
    ]
    questions = SimpleNamespace(questions=asked)
    for share in (True, False):
        processes = rng.randrange(1, 5)
        batches = plan_batches(questions, range(len(asked)), None, 5, share, processes)
        most = -(-len(asked) // processes)  # of a batch
        assert sorted(index for batch in batches for group in batch for index in group) == list(range(len(asked)))
        for batch in batches:
            assert sum(map(len, batch)) <= min(5, most) or len(batch) == 1
            assert max(map(len, batch)) <= min(20, most)
            for group in batch:
                keys = {asked[index].image_key for index in group}
                assert len(group) == 1 or (share and len(keys) == 1 and keys != {""})
        longest = [max(len(asked[i].messages[0]) for group in batch for i in group) for batch in batches]
        assert longest == sorted(longest, reverse=True)
        pieces = Counter(asked[group[0]].image_key for batch in batches for group in batch)
        asked_about = Counter(question.image_key for question in asked)
        if share:  # an image's prefix is read once
            assert all(pieces[key] == 1 for key in pieces if key and asked_about[key] <= min(20, most))


def test_a_large_group_is_cut_for_processes_and_interruptions():
    def sizes(groups, processes, batch_size=16):
        asked = [SimpleNamespace(messages=["x"], image_key=str(key)) for key, n in enumerate(groups) for _ in range(n)]
        questions = SimpleNamespace(questions=asked)
        batches = plan_batches(questions, range(len(asked)), None, batch_size, True, processes)
        return [sorted(len(group) for batch in batches[p::processes] for group in batch) for p in range(processes)]

    assert sizes([100, 100], 4) == [[50], [50], [50], [50]]
    assert sizes([40], 2, batch_size=4) == [[10, 10], [10, 10]]  # three pieces would leave a process idle
    assert sizes([66, *[6] * 100], 4)[0][-1] == 33  # others keep them busy
    assert sizes([1000], 1) == [[62] * 8 + [63] * 8]  # at most 64
    assert sizes([10], 4) == [[2], [3], [2], [3]]
    assert sizes([6, 6], 1, batch_size=1) == [[6, 6]]  # small batches leave a prefix worth its reading
    assert sizes([40], 1, batch_size=1) == [[13, 13, 14]]
    assert sizes([3, 3], 1) == [[3, 3]]


def test_processes_share_the_questions_about_an_image(pair, paths):
    questions = QuestionSet([row([paths[0]], ["yes"], f"is there a dog {n}?", f"record {n}") for n in range(40)])
    found = [
        list(generation.generate_answers(*pair, questions, range(40), batch_size=4, max_new_tokens=1, part=(rank, 2)))
        for rank in range(2)
    ]
    # as many on each, and no more than 16 lost by an interruption
    assert [sum(map(len, batches)) for batches in found] == [20, 20]
    assert max(len(batch) for batches in found for batch in batches) <= 16
    assert all(answer.shared for batches in found for batch in batches for answer in batch.values())


def test_a_template_sees_the_images(tmp_path, paths):
    model, processor = make_pair(tmp_path)
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}{% if p['image'] is defined %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    questions = QuestionSet(rows_about(paths))
    expected = one_by_one(model, processor, questions)
    seen = count_images(model)
    assert predictions(answer_questions(model, processor, questions, **OPTIONS)) == expected
    assert sum(seen) == len(paths)  # each of them shared


def test_processes_with_other_files_are_refused(monkeypatch):
    state = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(generation, "gather_object", lambda digest: digest * 2)
    generation._check_same_questions(["a", "b"], state)
    monkeypatch.setattr(generation, "gather_object", lambda digest: [*digest, "other"])
    with pytest.raises(ValueError, match="different test sets.*give every machine the same files"):
        generation._check_same_questions(["a", "b"], state)


def test_beams_are_asked_whole(pair, paths):
    model, processor = pair
    questions = QuestionSet(rows_about(paths))
    options = {"batch_size": 4, "max_new_tokens": 4, "decoding": {"num_beams": 2}}
    found = {}
    for answers in generation.generate_answers(model, processor, questions, range(6), **options):
        found |= answers
    assert sorted(found) == list(range(6)) and not any(answer.shared for answer in found.values())

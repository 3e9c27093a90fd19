"""The kept cache changes only the time: equal answers, equal keys and values, and each image is encoded once."""

import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from jnana.chat import ChatSession, ContextFullError
from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError
from jnana.training.loading import load_model
from tests.modeling.pairs import FAMILIES, join
from tests.tiny import save_tiny_llava, save_tiny_text, save_tiny_vision


QUESTIONS = ["what do you see?", "how many pieces are there?", "which piece is at the top?"]
TOLERANCE = 1e-5  # float32, relative to the largest value
LONG_ROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 60,
    },
    "original_max_position_embeddings": 60,
}


@pytest.fixture(scope="module")
def processor(tmp_path_factory) -> JnanaProcessor:
    folder = tmp_path_factory.mktemp("backbones")
    return JnanaProcessor.from_vision_text_pretrained(
        save_tiny_vision(folder / "vision"), save_tiny_text(folder / "text")
    )


def build(tmp_path, processor, family="phi", **text_changes):
    return join(tmp_path, family, text_changes=text_changes, image_token_id=processor.image_token_id)


@pytest.fixture(scope="module")
def model(tmp_path_factory, processor):
    return build(tmp_path_factory.mktemp("model"), processor)


def picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (30, 24), colour)
    image.paste("white", (0, 0, 10, 10))
    return image


def talk(session: ChatSession) -> list[str]:
    """Three questions about one image, one about two more images, and one without an image."""
    answers = [list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=8))]
    answers += [list(session.ask(question, max_new_tokens=8)) for question in QUESTIONS[1:]]
    answers.append(list(session.ask(QUESTIONS[0], [picture("blue"), picture("red")], max_new_tokens=8)))
    answers.append(list(session.ask("why?", max_new_tokens=8)))
    return [answer[-1] for answer in answers]


class Reading:
    """Counts the images and the longest sequence that the model processes."""

    def __init__(self, model):
        self.images, self.longest = 0, 0
        self.hooks = [
            model.model.vision_tower.register_forward_hook(self.see, with_kwargs=True),
            model.model.language_model.register_forward_hook(self.read, with_kwargs=True),
        ]

    def see(self, module, args, kwargs, output):
        pixel_values = args[0] if args else kwargs["pixel_values"]
        self.images += len(pixel_values)

    def read(self, module, args, kwargs, output):
        self.longest = max(self.longest, kwargs["inputs_embeds"].shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def largest_difference(one: ChatSession, other: ChatSession) -> float:
    """Largest difference of keys and values over the common length, relative to the largest value."""
    length = min(one.cached_tokens, other.cached_tokens)
    worst = 0.0
    for mine, theirs in zip(one._cache.layers, other._cache.layers, strict=True):
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            a, b = a[..., :length, :], b[..., :length, :]
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def reread(session: ChatSession) -> ChatSession:
    """Another session that answers the same last question with an empty cache."""
    other = ChatSession(session.model, session.processor)
    other.messages, other._images = session.messages, session._images
    list(other.retry(max_new_tokens=8))
    return other


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_answers_and_values_as_without_a_cache(tmp_path, processor, family):
    model = build(tmp_path, processor, family)
    kept, anew = ChatSession(model, processor), ChatSession(model, processor, keep_cache=False)
    assert talk(kept) == talk(anew)
    assert kept.messages == anew.messages
    assert kept.last_turn.cached_tokens > 100 and anew.last_turn.cached_tokens == 0
    assert largest_difference(kept, reread(kept)) < TOLERANCE


def test_images_in_tiles(tmp_path):
    """LLaVA-1.6: each image has its own number of tokens and views."""
    model, processor = load_model(str(save_tiny_llava(tmp_path, "llava_next")))
    kept, anew = ChatSession(model, processor), ChatSession(model, processor, keep_cache=False)
    images = [Image.new("RGB", size, "red") for size in ((60, 24), (30, 70), (24, 24))]
    for session in (kept, anew):
        list(session.ask(QUESTIONS[0], images[:1], max_new_tokens=4))
        with Reading(model) as second:
            list(session.ask(QUESTIONS[1], images[1:], max_new_tokens=4))
        views = [processor.count_views(size) for size in ((24, 60), (70, 30), (24, 24))]
        assert second.images == (sum(views[1:]) if session is kept else sum(views))
        list(session.ask("why?", max_new_tokens=4))
    assert kept.messages == anew.messages
    assert kept.last_turn.prompt_tokens == anew.last_turn.prompt_tokens
    assert largest_difference(kept, reread(kept)) < TOLERANCE


def test_a_sliding_window_shorter_than_the_chat(tmp_path, processor):
    model = build(tmp_path, processor, "phi3", sliding_window=12)
    assert talk(ChatSession(model, processor)) == talk(ChatSession(model, processor, keep_cache=False))


def test_the_length_at_which_phi3_changes_its_rotary_embedding(tmp_path, processor, monkeypatch):
    """Within the chat, between two turns and in the middle of an answer."""
    model = build(tmp_path, processor, "phi3", sliding_window=None, **LONG_ROPE)
    kept, anew = ChatSession(model, processor), ChatSession(model, processor, keep_cache=False)
    expected = talk(anew)
    assert talk(kept) == expected
    assert kept.last_turn.cached_tokens > 60  # above the limit the cache is reused again
    monkeypatch.setattr(ChatSession, "_rotary_embedding_changes", lambda *_: False)
    with pytest.raises(Exception):  # noqa: B017  # the control: pixel values are missing after transformers discards the cache
        talk(ChatSession(model, processor))


def test_a_picture_is_seen_once_and_a_chat_read_once(model, processor):
    session, anew = ChatSession(model, processor), ChatSession(model, processor, keep_cache=False)
    list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=4))
    list(anew.ask(QUESTIONS[0], [picture("red")], max_new_tokens=4))
    with Reading(model) as second:
        list(session.ask(QUESTIONS[1], max_new_tokens=4))
    turn = session.last_turn
    assert second.images == 0
    assert second.longest == turn.prompt_tokens - turn.cached_tokens < 30
    assert session.cached_tokens == turn.prompt_tokens + turn.new_tokens - 1
    with Reading(model) as without:  # the control
        list(anew.ask(QUESTIONS[1], max_new_tokens=4))
    assert without.images == 1
    assert without.longest == anew.last_turn.prompt_tokens
    with Reading(model) as third:
        list(session.ask(QUESTIONS[1], [picture("blue")], max_new_tokens=4))
    assert third.images == 1  # only the new image


def swap_picture(session: ChatSession) -> str:
    """The same chat about another image."""
    list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=8))
    session.messages, session._images = [], []
    return list(session.ask(QUESTIONS[0], [picture("blue")], max_new_tokens=8))[-1]


def test_another_picture_with_the_same_tokens_is_read(model, processor, monkeypatch):
    fresh = list(ChatSession(model, processor).ask(QUESTIONS[0], [picture("blue")], max_new_tokens=8))[-1]
    assert swap_picture(ChatSession(model, processor)) == fresh
    monkeypatch.setattr(ChatSession, "_keys", lambda self, ids, images: list(ids))  # the control: ids alone
    assert swap_picture(ChatSession(model, processor)) != fresh


def change_history(session: ChatSession) -> str:
    """The second question after the first answer was changed."""
    list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=8))
    session.messages[-1] = {"role": "assistant", "content": [{"type": "text", "text": "a cat on a mat"}]}
    return list(session.ask(QUESTIONS[1], max_new_tokens=8))[-1]


def test_the_cache_is_cut_where_the_chat_differs(model, processor, monkeypatch):
    anew = change_history(ChatSession(model, processor, keep_cache=False))
    session = ChatSession(model, processor)
    assert change_history(session) == anew
    assert 0 < session.last_turn.cached_tokens < session.last_turn.prompt_tokens
    # the control: the whole cache is reused
    monkeypatch.setattr(ChatSession, "_common_length", lambda self, keys: min(len(keys) - 1, len(self._cached_keys)))
    assert change_history(ChatSession(model, processor)) != anew


def test_retry_reads_one_token_and_answers_the_same(model, processor):
    session = ChatSession(model, processor)
    first = list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=8))
    messages = session.messages
    with Reading(model) as reading:
        assert list(session.retry(max_new_tokens=8)) == first
    assert session.messages == messages
    assert reading.images == 0 and reading.longest == 1


def test_a_prompt_that_ends_in_a_picture_is_never_cut_in_it(model, processor):
    session = ChatSession(model, processor)
    keys = session._keys([5, 6, *[processor.image_token_id] * 4], [session.prepare(picture("red"))])
    session._cached_keys = keys
    assert session._common_length(keys) == 2  # not 5, which would split the image


def test_stopped_answers_stay_and_the_chat_goes_on(model, processor):
    session = ChatSession(model, processor)
    answer = session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=150)
    read = [next(answer) for _ in range(3)]
    session.stop()
    read += list(answer)
    assert session.last_turn.finish_reason == "stopped"
    assert 3 <= session.last_turn.new_tokens < 150
    assert session.messages[-1]["content"][0]["text"].startswith(read[2].rstrip("\ufffd"))
    answer = session.ask(QUESTIONS[1], max_new_tokens=150)
    next(answer)
    answer.close()  # the reader closes the stream
    assert len(session.messages) == 4 and session.last_turn.new_tokens < 150
    anew = ChatSession(model, processor, keep_cache=False)
    anew.messages, anew._images = session.messages, session._images
    assert list(session.ask("why?", max_new_tokens=6)) == list(anew.ask("why?", max_new_tokens=6))


def test_one_answer_at_a_time(model, processor):
    session = ChatSession(model, processor)
    answer = session.ask(QUESTIONS[0], max_new_tokens=100)
    next(answer)
    for refused in (lambda: next(session.ask("why?")), session.clear, session.forget_cache):
        with pytest.raises(RuntimeError, match="still being answered"):
            refused()
    answer.close()
    session.clear()
    assert session.messages == [] and session.cached_tokens == 0


def test_a_failed_answer_leaves_the_chat_as_it_was(model, processor, monkeypatch):
    session = ChatSession(model, processor)
    list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=4))
    messages = session.messages
    with monkeypatch.context() as patch:
        patch.setattr(model, "generate", lambda **_: (_ for _ in ()).throw(MemoryError("no room")))
        with pytest.raises(MemoryError, match="no room"):
            list(session.ask(QUESTIONS[1]))
    assert session.messages == messages and session.cached_tokens == 0
    anew = ChatSession(model, processor, keep_cache=False)
    anew.messages, anew._images = session.messages, session._images
    assert list(session.ask("why?", max_new_tokens=6)) == list(anew.ask("why?", max_new_tokens=6))


def test_a_chat_ends_at_the_models_length(model, processor):
    session = ChatSession(model, processor)
    limit = model.config.text_config.max_position_embeddings  # 256
    with pytest.raises(ContextFullError, match="reads at most 256. Clear the chat"):
        session.ask("why? " * 200)
    assert session.messages == []
    question = "a king and a rook " * 16
    prompt = len(processor.encode_chat([{"role": "user", "content": [{"type": "text", "text": question.strip()}]}]))
    assert limit - 150 < prompt < limit
    model.generation_config.eos_token_id, ends = -1, model.generation_config.eos_token_id
    try:
        list(session.ask(question, max_new_tokens=200))
        assert session.last_turn.new_tokens == limit - prompt
        assert session.last_turn.finish_reason == "context"
        session.clear()
        list(session.ask("why?", max_new_tokens=5))
        assert session.last_turn.finish_reason == "length"
    finally:
        model.generation_config.eos_token_id = ends


def test_refusals_name_the_value(model, processor, tmp_path):
    session = ChatSession(model, processor)
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            session.ask("why?", **options)
    with pytest.raises(ValueError, match="neither a question nor an image"):
        session.ask("  ")
    with pytest.raises(ValueError, match="nothing has been asked"):
        session.retry()
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(BadSampleError, match="text.png"):
        session.ask("why?", [picture("red"), tmp_path / "text.png"])
    assert session.messages == []


def test_sampling_is_random_only_when_asked_for(model, processor):
    session = ChatSession(model, processor)
    greedy = list(session.ask(QUESTIONS[0], [picture("red")], max_new_tokens=8))
    assert all(list(session.retry(max_new_tokens=8)) == greedy for _ in range(3))
    drawn = {list(session.retry(max_new_tokens=8, temperature=2.0))[-1] for _ in range(5)}
    assert len(drawn) > 1
    narrow = list(session.retry(max_new_tokens=8, temperature=2.0, top_p=1e-6))
    assert narrow == greedy  # only the likeliest token remains


def test_adapters_talk_too(tmp_path, processor):
    base = build(tmp_path, processor)
    plain = talk(ChatSession(base, processor))
    adapter = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|fc1)", init_lora_weights=False)
    model = get_peft_model(base, adapter)
    kept = talk(ChatSession(model, processor))
    assert kept == talk(ChatSession(model, processor, keep_cache=False))
    assert kept != plain  # the adapter changes the answers


def test_streams_may_be_read_in_another_thread(model, processor):
    session, read = ChatSession(model, processor), []
    thread = threading.Thread(target=lambda: read.extend(session.ask(QUESTIONS[0], max_new_tokens=4)))
    thread.start()
    thread.join()
    assert len(read) == session.last_turn.new_tokens
    assert 0 < session.last_turn.seconds_to_first_token <= session.last_turn.seconds
    assert not torch.is_inference_mode_enabled()


def test_stop_counts_from_the_question_on(model, processor):
    session = ChatSession(model, processor)
    assert len(list(session.ask(QUESTIONS[0], max_new_tokens=8))) > 1  # the control
    answer = session.retry(max_new_tokens=8)
    session.stop()  # before a token is asked for
    assert len(list(answer)) == 1 and session.last_turn.finish_reason == "stopped"
    assert len(list(session.retry(max_new_tokens=8))) > 1  # the next one is not stopped

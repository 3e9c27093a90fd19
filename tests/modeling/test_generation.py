"""Generation: batches, caches, beams, sampling, embeddings, several images, and what must not be generated."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, GenerationMixin

from jnana.modeling import CACHE_NAME, JnanaForConditionalGeneration, normalize_pixels
from tests.modeling.pairs import FAMILIES, IMAGE, greedy_by_hand, join, pictures, text_ids, with_images


NUM_TOKENS = 4  # image tokens of a tiny tower by `default`
PAD = 1


@pytest.fixture
def model(tmp_path):
    return join(tmp_path)


def generate(model, ids, images=None, new=6, **kwargs):
    """The new tokens only; greedy by default, and never stopped by a random end of text."""
    given = {} if images is None else {"pixel_values": images}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **given, **kwargs}
    return model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_generation_by_hand(tmp_path, family):
    model = join(tmp_path, family)
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    expected = greedy_by_hand(model, ids, images)
    assert torch.equal(generate(model, ids, images), expected)
    assert torch.equal(generate(model, ids, images, use_cache=False), expected)
    assert not torch.equal(generate(model, ids, images.flip(0)), expected)  # negative control: images matter


def test_bytes_and_their_table(model):
    ids, levels = with_images(text_ids(), NUM_TOKENS), pictures(2).mul(40).add(128).clamp(0, 255).to(torch.uint8)
    table = torch.linspace(-2, 2, 256).repeat(3, 1)
    expected = generate(model, ids, normalize_pixels(levels, table))
    assert torch.equal(generate(model, ids, levels, pixel_table=table), expected)
    assert not torch.equal(generate(model, ids, levels, pixel_table=-table), expected)  # the control
    with pytest.raises(ValueError, match="`pixel_values` are bytes"):
        generate(model, ids, levels)


@pytest.mark.parametrize("family", ["phi", "llama", "qwen2"])
def test_static_cache_equals_dynamic(tmp_path, family):
    model = join(tmp_path, family)
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    expected = generate(model, ids, images)
    assert torch.equal(generate(model, ids, images, cache_implementation="static"), expected)


def test_chunked_prefill_equals_one_prefill(model):
    """Releases before 5.23 can't split images between chunks, so that a text is used there."""
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    if Version(transformers.__version__) < Version("5.23"):
        ids, images = text_ids(), None
    assert torch.equal(generate(model, ids, images, prefill_chunk_size=3), generate(model, ids, images))


def test_left_padded_batch_equals_rows_one_by_one(model):
    long, short = with_images(text_ids(1, 12), NUM_TOKENS), with_images(text_ids(1, 7, seed=9), NUM_TOKENS)
    padding = long.shape[1] - short.shape[1]
    ids = torch.cat([long, torch.cat([torch.full((1, padding), PAD), short], dim=1)])
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    images = pictures(2)
    batch = generate(model, ids, images, attention_mask=mask)
    assert torch.equal(batch[:1], generate(model, long, images[:1]))
    assert torch.equal(batch[1:], generate(model, short, images[1:]))
    # Negative control: without the mask the padding is read.
    logits = model(ids, pixel_values=images).logits
    assert not torch.allclose(logits[1, -1], model(short, pixel_values=images[1:]).logits[0, -1], atol=1e-4)


def test_rows_with_no_one_and_several_images(model):
    """Images are given row after row; the middle row has none."""
    texts = text_ids(3, 6)
    image = torch.full((1, NUM_TOKENS), IMAGE)
    rows = [
        torch.cat([image, texts[:1], image], dim=1),
        texts[1:2],
        torch.cat([texts[2:, :3], image, texts[2:, 3:]], dim=1),
    ]
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=PAD) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    images = pictures(3)
    single = [
        generate(model, rows[0], images[:2]),
        generate(model, rows[1]),
        generate(model, rows[2], images[2:]),
    ]
    assert torch.equal(generate(model, ids, images, attention_mask=mask), torch.cat(single))
    assert not torch.equal(generate(model, rows[0], images[:2].flip(0)), single[0])  # order counts
    beams = generate(model, ids, images, attention_mask=mask, num_beams=3)
    assert torch.equal(beams[:1], generate(model, rows[0], images[:2], num_beams=3))
    assert torch.equal(beams[2:], generate(model, rows[2], images[2:], num_beams=3))


def test_sampling_and_several_answers(model):
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    torch.manual_seed(0)
    answers = generate(model, ids, images, do_sample=True, num_return_sequences=3)
    assert answers.shape == (6, 6) and len({tuple(row.tolist()) for row in answers}) > 2


def test_embeddings_instead_of_ids(model):
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    embeds = model.get_input_embeddings()(ids)
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
    }
    expected = generate(model, ids, images, new=5)
    assert torch.equal(model.generate(inputs_embeds=embeds, pixel_values=images, **settings), expected)
    with torch.no_grad():  # with the images already in their places, as an application may do it
        vectors = torch.cat(model.get_image_features(images).pooler_output)
        joined = embeds.masked_scatter((ids == IMAGE).unsqueeze(-1), vectors)
    assert torch.equal(model.generate(inputs_embeds=joined, **settings), expected)
    assert not torch.equal(model.generate(inputs_embeds=joined.flip(0), **settings), expected)


@pytest.mark.parametrize("beams", [1, 2])
def test_precomputed_features_instead_of_pixels(model, beams):
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    expected = generate(model, ids, images, num_beams=beams)
    with torch.no_grad():
        features = model.model.get_vision_features(images)[1]
        encoded = {"image": model.get_image_features(images)}
    assert torch.equal(generate(model, ids, num_beams=beams, image_features=features), expected)
    assert torch.equal(generate(model, ids, num_beams=beams, mm_encoder_outputs=encoded), expected)
    assert not torch.equal(generate(model, ids, num_beams=beams, image_features=features.flip(0)), expected)


@pytest.mark.parametrize("shape", [(4, 32), (1, 4, 31)])
def test_features_of_another_shape_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"`image_features` has shape \(.*num_views, num_view_features, 32\)"):
        model(input_ids=torch.tensor([[IMAGE] * 4 + [5]]), image_features=torch.zeros(shape))


def test_images_are_encoded_once(model):
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    generate(model, with_images(text_ids(), NUM_TOKENS), pictures(2), num_beams=2)
    assert len(calls) == 1


def test_no_pixels_once_the_cache_is_filled(model):
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    cache = model(ids, pixel_values=images, use_cache=True)[CACHE_NAME]
    kwargs = {CACHE_NAME: cache, "pixel_values": images, "use_cache": True, "next_sequence_length": 1}
    assert "pixel_values" not in model.prepare_inputs_for_generation(ids, **kwargs)
    assert "pixel_values" in model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)


def test_next_turn_goes_on_from_the_cache(model):
    first, images = with_images(text_ids(1), NUM_TOKENS), pictures(1)
    out = model.generate(
        input_ids=first,
        pixel_values=images,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    second = torch.cat([out.sequences, text_ids(1, 5, seed=8)], dim=1)
    expected = generate(model, second, images)
    assert torch.equal(generate(model, second, past_key_values=out[CACHE_NAME]), expected)


def test_an_image_token_is_never_generated(model):
    ids, images = with_images(text_ids(), NUM_TOKENS), pictures(2)
    with torch.no_grad():
        model.lm_head.bias[IMAGE] = 100.0
    assert model.generation_config.suppress_tokens == [IMAGE]
    assert not (generate(model, ids, images) == IMAGE).any()
    assert (generate(model, ids, images, suppress_tokens=None) == IMAGE).any()  # negative control


def test_generation_settings_of_the_language_model_are_kept(tmp_path):
    bare = join(tmp_path, "phi")
    bare.model.language_model.config.eos_token_id = 0
    assert bare.generation_config.eos_token_id == 0
    bare.save_pretrained(tmp_path / "pair")
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    assert loaded.generation_config.suppress_tokens == [IMAGE] and loaded.generation_config.eos_token_id == 0


def test_phi3_reads_anew_where_its_rotary_embedding_changes(tmp_path, monkeypatch):
    """Phi-3.5's LongRoPE: beyond the original length all positions are embedded otherwise, so the cache is stale."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    changes = {
        "rope_parameters": {**rope, "original_max_position_embeddings": 16},
        "original_max_position_embeddings": 16,
        "max_position_embeddings": 64,
        "sliding_window": None,
    }
    model = join(tmp_path, "phi3", text_changes=changes)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = text_ids(2, 12)
    expected = generate(bare, ids, new=10, suppress_tokens=[IMAGE])
    assert torch.equal(generate(model, ids, new=10), expected)
    ids, images = with_images(text_ids(2, 8), NUM_TOKENS), pictures(2)
    by_hand = greedy_by_hand(model, ids, images, new=10)
    assert torch.equal(generate(model, ids, images, new=10), by_hand)
    # Negative control: transformers' general way keeps the stale cache.
    general = GenerationMixin.prepare_inputs_for_generation
    monkeypatch.setattr(JnanaForConditionalGeneration, "prepare_inputs_for_generation", general)
    assert not torch.equal(generate(model, ids, images, new=10), by_hand)

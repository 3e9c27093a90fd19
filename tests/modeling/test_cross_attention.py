"""Cross-attention: exact with closed gates, one image a token, kept in the cache, and the same in every row layout."""

import copy
import io
import math

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, CLIPVisionConfig, PhiConfig
from transformers.models.idefics.processing_idefics import image_attention_mask_for_packed_input_ids

from jnana.modeling import (
    CACHE_NAME,
    JnanaConfig,
    JnanaForConditionalGeneration,
    cross_attention_jnana,
    image_slots_jnana,
)
from jnana.modeling.cross_attention_jnana import HOOKS_ARE_CHECKPOINTED
from jnana.modeling.image_slots_jnana import STATES_NAME, find_positions, find_visible_images
from tests.modeling.packed import batches, difference, loss_and_gradients
from tests.modeling.pairs import FAMILIES, IMAGE, VOCAB_ROWS, greedy_by_hand, join, pictures, text_config, text_ids
from tests.tiny import tiny_vision_config


FIELDS = {
    "fusion": "cross_attention",
    "cross_layer_interval": 2,
    "projector_type": "perceiver",
    "projector_num_latents": 3,
    "projector_depth": 2,
    "projector_num_heads": 2,
    "projector_head_dim": 8,
}
PAD = 1
EXACT = 5e-5  # wide weights and open gates round more than the rows of test_packed_attention.py


def make(folder, family: str = "phi", opened: bool = True, layers: int = 3, **fields) -> JnanaForConditionalGeneration:
    """Three layers and two blocks, before the first and the last; `opened`: the gates let much through."""
    given = dict(FIELDS, **{key: value for key, value in fields.items() if key != "text_changes"})
    changes = {"num_hidden_layers": layers, **fields.get("text_changes", {})}
    if family == "qwen2":
        changes = {"layer_types": ["full_attention"] * layers, **changes}
    return (
        open_gates(join(folder, family, text_changes=changes, **given))
        if opened
        else join(folder, family, text_changes=changes, **given)
    )


def open_gates(model):
    with torch.no_grad():
        for layer in model.model.cross_attention.layers:
            layer.attention_gate.fill_(1.0)
            layer.mlp_gate.fill_(0.5)
            for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
                projection.weight.normal_(std=0.2)
    return model


def rows_with(*places: tuple[int, ...], length: int = 14, seed: int = 3) -> torch.Tensor:
    """Token ids, one row for each tuple of the columns where an image token stands."""
    ids = text_ids(len(places), length, seed)
    for row, columns in enumerate(places):
        ids[row, list(columns)] = IMAGE
    return ids


IDS = rows_with((2,), (), (0, 4, 9))  # one image, none, three
IMAGES = 4


def generate(model, ids, images=None, new=6, **kwargs):
    given = {} if images is None else {"pixel_values": images}
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **given, **kwargs}
    return model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, **settings)[:, ids.shape[1] :]


# ---------------------------------------------------------------------- a fresh model is its language model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_models_logits_with_images_are_the_bare_models_bit_for_bit(tmp_path, family):
    model = make(tmp_path, family, opened=False)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    with torch.no_grad():
        expected = bare(IDS, attention_mask=mask).logits  # the same ids, each with a row in the embedding
        assert torch.equal(model(IDS, pixel_values=pictures(IMAGES), attention_mask=mask).logits, expected)
        # Negative control: a gate that is hardly open is seen.
        model.model.cross_attention.layers[1].attention_gate.fill_(1e-3)
        assert not torch.equal(model(IDS, pixel_values=pictures(IMAGES), attention_mask=mask).logits, expected)


def test_the_language_models_weights_keep_their_names(tmp_path):
    model = make(tmp_path)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert model.model.language_model.state_dict().keys() == bare.base_model.state_dict().keys()
    assert {name for name, _ in model.model.named_children()} == {
        "vision_tower",
        "multi_modal_projector",
        "language_model",
        "cross_attention",
    }
    assert "JnanaCrossAttentionLayer" in model._no_split_modules
    # The language model alone runs as it did, although the hooks are there.
    with torch.no_grad():
        states = model.model.language_model(IDS).last_hidden_state
        assert torch.equal(states, bare.eval().base_model(IDS).last_hidden_state)


@pytest.mark.parametrize(
    ("interval", "layers", "blocks"), [(1, 3, [0, 1, 2]), (2, 3, [0, 2]), (4, 3, [0]), (2, 4, [0, 2])]
)
def test_blocks_stand_before_every_nth_layer(tmp_path, interval, layers, blocks):
    model = make(tmp_path, cross_layer_interval=interval, layers=layers)
    assert len(model.model.cross_attention.layers) == len(blocks)
    ran = []
    for index, block in enumerate(model.model.cross_attention.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(f"block {index}"))
    for index, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(f"layer {index}"))
    model(IDS, pixel_values=pictures(IMAGES))
    expected = []
    for index in range(layers):
        expected += [f"block {blocks.index(index)}"] if index in blocks else []
        expected.append(f"layer {index}")
    assert ran == expected


@pytest.mark.parametrize("how", ["joined", "from_config", "a checkpoint without"])
def test_fresh_gates_are_closed_and_norms_are_one(tmp_path, how):
    from safetensors.torch import load_file, save_file

    model = make(tmp_path, opened=False)
    if how == "from_config":
        model = JnanaForConditionalGeneration(model.config)
    if how == "a checkpoint without":
        open_gates(model).save_pretrained(tmp_path / "pair")
        weights = load_file(tmp_path / "pair" / "model.safetensors")
        kept = {name: weight for name, weight in weights.items() if ".cross_attention." not in name}
        assert len(kept) == len(weights) - 2 * 13
        save_file(kept, tmp_path / "pair" / "model.safetensors", metadata={"format": "pt"})
        model = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    for name, parameter in model.model.cross_attention.named_parameters():
        if "gate" in name.split(".")[-1]:
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.1 < parameter.std() < 0.3, name  # the text config's `initializer_range`, 0.2


@pytest.mark.parametrize(("inner", "millions"), [(None, 776), (2560, 304)])
def test_what_the_blocks_add_to_phi_2(inner, millions):
    """On the meta device; the figures are in docs/cross_attention.md."""
    sizes = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 32}
    clip = CLIPVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    fields = {"fusion": "cross_attention", "projector_type": "perceiver", "cross_attention_intermediate_size": inner}
    config = JnanaConfig.from_vision_text_configs(clip, PhiConfig(**sizes, vocab_size=51200), **fields)
    with torch.device("meta"):
        blocks = cross_attention_jnana.JnanaCrossAttention(config)
    assert len(blocks.layers) == 8
    assert round(sum(parameter.numel() for parameter in blocks.parameters()) / 1e6) == millions


# ---------------------------------------------------------------------- which image a token attends to


class _EndTokenizer:
    eos_token_id = 7

    def convert_tokens_to_ids(self, token):
        return IMAGE


@pytest.mark.parametrize("seed", range(20))
def test_the_image_of_a_token_is_the_one_that_idefics_processor_marks(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, 12, (4, 30), generator=generator)  # many end tokens
    ids[torch.rand(ids.shape, generator=generator) < 0.1] = IMAGE
    marked, _ = image_attention_mask_for_packed_input_ids(ids, _EndTokenizer(), "pt")
    images, ends = (find_positions(ids == token, 0, 30) for token in (IMAGE, _EndTokenizer.eos_token_id))
    visible = find_visible_images(torch.arange(30), images, ends)
    numbers = torch.where(visible.any(-1), visible.long().argmax(-1), -1)
    assert (visible.sum(-1) <= 1).all() and torch.equal(numbers, marked)
    without_ends = find_visible_images(torch.arange(30), images, ends[:, :0])  # negative control
    assert not torch.equal(without_ends, visible)


@pytest.mark.parametrize(("end", "reach"), [(None, range(4, 9)), (11, range(4, 7))])
def test_only_tokens_from_an_image_to_the_next_depend_on_it(tmp_path, end, reach):
    """Of the input of the first layer, behind the first block: later layers pass everything on to later tokens."""
    model = make(tmp_path, image_end_token_id=end)
    ids = IDS.clone()
    ids[2, 6] = 11
    states = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: states.append(args[0]))
    images = pictures(IMAGES)
    changed = images.clone()
    changed[2] = images[3]  # the second image of the last row
    with torch.no_grad():
        for given in (images, changed):
            model(ids, pixel_values=given)
    differs = (states[0] != states[1]).any(-1)
    assert not differs[:2].any() and differs[2].nonzero().flatten().tolist() == list(reach)


def test_a_row_without_images_does_not_depend_on_the_batch(tmp_path):
    model = make(tmp_path)
    with torch.no_grad():
        together = model(IDS, pixel_values=pictures(IMAGES)).logits
        torch.testing.assert_close(model(IDS[1:2]).logits, together[1:2], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model(IDS[:1], pixel_values=pictures(IMAGES)[:1]).logits, together[:1], atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            model(IDS[2:], pixel_values=pictures(IMAGES)[1:]).logits, together[2:], atol=1e-5, rtol=1e-5
        )
        other = model(IDS[2:], pixel_values=pictures(IMAGES)[1:].flip(0)).logits
        assert not torch.allclose(other, together[2:], atol=1e-2)  # negative control


def test_every_way_to_give_images_gives_the_same_logits(tmp_path):
    model = make(tmp_path)
    images = pictures(IMAGES)
    with torch.no_grad():
        expected = model(IDS, pixel_values=images)
        encoded = model.get_image_features(images)
        features = model.model.get_vision_features(images)[1]
        assert [vectors.shape for vectors in encoded.pooler_output] == [(1, 3 * 32)] * IMAGES
        for given in ({"image_features": features}, {"mm_encoder_outputs": {"image": encoded}}):
            assert torch.equal(model(IDS, **given).logits, expected.logits)
        embeds = model.get_input_embeddings()(IDS)
        assert torch.equal(model(inputs_embeds=embeds, pixel_values=images).logits, expected.logits)
    assert expected.image_hidden_states.shape == (IMAGES, 3, 32)


def test_an_image_used_twice_has_its_keys_computed_once(tmp_path):
    model = make(tmp_path)
    images, order = pictures(2), torch.tensor([0, 1, 0, 1])
    seen = []
    model.model.cross_attention.layers[0].k_proj.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    with torch.no_grad():
        logits = model(IDS, pixel_values=images, image_indices=order).logits
        torch.testing.assert_close(logits, model(IDS, pixel_values=images[order]).logits, atol=1e-5, rtol=1e-5)
        assert seen == [2, 4]
        assert not torch.allclose(model(IDS, pixel_values=images[[0, 1, 1, 0]]).logits, logits, atol=1e-2)


def test_image_and_text_counts_must_agree(tmp_path):
    model = make(tmp_path)
    with pytest.raises(ValueError, match="4 image tokens .* 3 vectors, 1 an image"):
        model(IDS, pixel_values=pictures(3))
    with pytest.raises(ValueError, match="4 image tokens .* 0 vectors"):
        model(IDS)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        model(IDS, pixel_values=pictures(2), image_indices=torch.tensor([0, 1, 2, 0]))


def test_the_image_token_needs_a_row_in_the_embedding(tmp_path):
    model = make(tmp_path, image_token_id=VOCAB_ROWS)
    ids = IDS.masked_fill(IDS == IMAGE, VOCAB_ROWS)
    with pytest.raises(ValueError, match="`image_token_id` is 320, but the embedding has 320 rows"):
        model(ids, pixel_values=pictures(IMAGES))
    model.resize_token_embeddings(VOCAB_ROWS + 1)
    assert model(ids, pixel_values=pictures(IMAGES)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "sum"}, "`fusion` is 'sum'; choose one of tokens, cross_attention"),
        ({"fusion": "cross_attention"}, "`projector_type` is 'mlp'.*Set `projector_type: perceiver`"),
        ({**FIELDS, "cross_layer_interval": 0}, "`cross_layer_interval` is 0"),
        ({**FIELDS, "cross_attention_gate": "none"}, "`cross_attention_gate` is 'none'"),
        ({**FIELDS, "image_grid_pinpoints": [[24, 48]]}, "`image_grid_pinpoints`.*`fusion: cross_attention`"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        JnanaConfig(vision_config=tiny_vision_config(), text_config=text_config("phi"), **fields)


# ---------------------------------------------------------------------- generation


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_generation_by_hand(tmp_path, family):
    model = make(tmp_path, family)
    images = pictures(IMAGES)
    expected = greedy_by_hand(model, IDS, images)
    computed = []
    for block in model.model.cross_attention.layers:
        block.k_proj.register_forward_hook(lambda *_: computed.append(1))
    assert torch.equal(generate(model, IDS, images), expected)
    assert len(computed) == 2  # keys once for each block, in the first of six steps
    assert torch.equal(generate(model, IDS, images, cache_implementation="static"), expected)
    assert not torch.equal(generate(model, IDS, images.flip(0)), expected)  # negative control: images matter


def test_beams_samples_and_chunks(tmp_path):
    model = make(tmp_path)
    images = pictures(IMAGES)
    beams = generate(model, IDS, images, num_beams=3)
    for row, own in ((0, images[:1]), (1, None), (2, images[1:])):
        assert torch.equal(beams[row : row + 1], generate(model, IDS[row : row + 1], own, num_beams=3))
    assert generate(model, IDS, images, do_sample=True, num_return_sequences=2).shape == (6, 6)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="generate can't split images there")
@pytest.mark.parametrize("size", [1, 3, 5])
def test_a_prompt_read_in_chunks_gives_the_same_answers(tmp_path, size):
    model = make(tmp_path)
    images = pictures(IMAGES)
    assert torch.equal(generate(model, IDS, images, prefill_chunk_size=size), generate(model, IDS, images))
    assert not torch.equal(generate(model, IDS, images.flip(0), prefill_chunk_size=size), generate(model, IDS, images))


def test_left_padded_batch_equals_rows_one_by_one(tmp_path):
    model = make(tmp_path)
    long, short = rows_with((3,), length=12), rows_with((1, 4), length=7)
    ids = torch.cat([long, torch.cat([torch.full((1, 5), PAD), short], dim=1)])
    mask = (torch.arange(12)[None] >= torch.tensor([[0], [5]])).long()
    images = pictures(3)
    answers = generate(model, ids, images, attention_mask=mask)
    assert torch.equal(answers[:1], generate(model, long, images[:1]))
    assert torch.equal(answers[1:], generate(model, short, images[1:]))


@pytest.mark.parametrize("end", [None, 11])
def test_a_cache_continues_with_old_and_new_images(tmp_path, end):
    """Token by token, with a second image on the way, and again from a cache that was cropped."""
    model = make(tmp_path, image_end_token_id=end)
    ids = rows_with((2, 9), (4, 9))
    ids[1, 6] = 11  # behind it no image, until the second one
    images = pictures(4)
    with torch.no_grad():
        expected = model(ids, pixel_values=images).logits
        start = model(ids[:, :5], pixel_values=images[[0, 2]], use_cache=True)
        cache = getattr(start, CACHE_NAME)
        for column in range(5, 14):
            new = {"pixel_values": images[[1, 3]]} if column == 9 else {}
            logits = model(ids[:, column : column + 1], **{CACHE_NAME: cache}, **new).logits
            torch.testing.assert_close(logits[:, 0], expected[:, column], atol=1e-4, rtol=1e-4)
        assert getattr(cache, STATES_NAME).keys[0].shape == (2, 4, 2, 3, 16)
        for kept, rest in ((6, 8), (13, 1)):
            cropped = copy.deepcopy(cache)
            cropped.crop(kept - 14)
            new = {"pixel_values": images[[1, 3]]} if kept < 9 else {}
            logits = model(ids[:, kept:], **{CACHE_NAME: cropped}, **new).logits
            torch.testing.assert_close(logits, expected[:, -rest:], atol=1e-4, rtol=1e-4)
            assert getattr(cropped, STATES_NAME).keys[0].shape[2] == 2
        # Negative control: without the images in the cache.
        delattr(cache, STATES_NAME)
        cache.crop(-1)
        logits = model(ids[:, -1:], **{CACHE_NAME: cache}).logits
        assert not torch.allclose(logits[:, 0], expected[:, -1], atol=1e-2)


def test_the_end_token_changes_what_follows(tmp_path):
    model = make(tmp_path)
    ids = rows_with((2,))
    ids[0, 6] = 11
    with torch.no_grad():
        without = model(ids, pixel_values=pictures(1)).logits
        model.config.image_end_token_id = 11
        with_end = model(ids, pixel_values=pictures(1)).logits
    assert torch.equal(with_end[:, :7], without[:, :7])
    assert (with_end[:, 7:] - without[:, 7:]).abs().max() > 0.1


# ---------------------------------------------------------------------- training


def training_batch():
    labels = IDS.masked_fill(IDS == IMAGE, -100)
    return {"input_ids": IDS, "pixel_values": pictures(IMAGES), "labels": labels}


def train_blocks_only(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("multi_modal_projector" in name or "cross_attention" in name)
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**training_batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("family", ["phi", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, family, use_reentrant, frozen):
    model = make(tmp_path, family).train()
    if frozen:
        train_blocks_only(model)
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()  # as the Trainer and PEFT do for reentrant checkpointing
    calls = []
    for block in model.model.cross_attention.layers:
        block.down_proj.register_forward_pre_hook(lambda *_: calls.append(1))
    if use_reentrant and HOOKS_ARE_CHECKPOINTED:
        with pytest.raises(ValueError, match="`use_reentrant` is True"):
            gradients(model)
        return
    actual = gradients(model)
    assert len(calls) == 4  # both blocks ran again for the backward pass
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_all_blocks_and_the_resampler_get_gradients_in_a_fresh_model(tmp_path):
    """At closed gates only the gates do; after one step everything."""
    model = train_blocks_only(make(tmp_path, opened=False))
    first = gradients(model)
    nonzero = {name for name, gradient in first.items() if gradient.any()}
    assert nonzero == {name for name in first if name.endswith("_gate")} and len(nonzero) == 4
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(gradient.any() for gradient in gradients(model).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_layout_trains_the_same(tmp_path, family):
    model = make(tmp_path, family)
    alone = loss_and_gradients(model, batches("single", 1))
    assert len([name for name in alone[1] if "cross_attention" in name]) == 26
    for how in ("padded", "rows", "shared_image", "blocks", "one group per batch"):
        assert difference(loss_and_gradients(model, batches(how, 1)), alone) < EXACT, how


def test_packed_rows_without_segments_or_one_image_a_token_are_seen(tmp_path, monkeypatch):
    """Negative controls: tokens that see images of other conversations, and tokens that see all their images."""
    model = make(tmp_path)
    alone = loss_and_gradients(model, batches("single", 1))

    def across(columns, images, ends, segment_ids=None, branch_ids=None):
        return find_visible_images(columns, images, ends)

    def every(columns, images, ends, segment_ids=None, branch_ids=None):
        return (images[:, None] <= columns[None, :, None]).expand(-1, -1, images.shape[1])

    assert difference(loss_and_gradients(model, batches("shared_image", 1)), alone) < EXACT
    for wrong, how in ((across, "shared_image"), (every, "padded")):
        monkeypatch.setattr(image_slots_jnana, "find_visible_images", wrong)
        assert difference(loss_and_gradients(model, batches(how, 1)), alone) > 100 * EXACT


def spread(latents: torch.Tensor) -> float:
    return (latents - latents.mean(0)).abs().max().item()


def trained_spread(model) -> float:
    model = train_blocks_only(copy.deepcopy(model))
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**training_batch()).loss.backward()
        optimizer.step()
    return spread(model.model.multi_modal_projector.resampler.latents)


def test_latents_differ_after_training_and_equal_ones_stay_equal(tmp_path):
    model = make(tmp_path)
    latents = model.model.multi_modal_projector.resampler.latents
    assert trained_spread(model) > 0.01
    with torch.no_grad():
        latents.fill_(1.0)  # negative control: how transformers' Idefics2 starts them
    assert spread(latents) == 0 and trained_spread(model) < 1e-6


def test_blocks_in_float32_beside_a_frozen_language_model_in_bfloat16(tmp_path):
    exact, rough = make(tmp_path), make(tmp_path)
    rough.to(torch.bfloat16)
    rough.model.multi_modal_projector.float()
    rough.model.cross_attention.float()
    train_blocks_only(rough)
    expected = exact(**training_batch()).loss.item()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = rough(**training_batch()).loss
        loss.backward()
        assert abs(loss.item() - expected) < 0.05 * expected
    assert {p.grad.dtype for p in rough.parameters() if p.grad is not None} == {torch.float32}
    with torch.no_grad():
        for layer in rough.model.cross_attention.layers:
            layer.attention_gate.zero_(), layer.mlp_gate.zero_()
        closed = rough(IDS, pixel_values=pictures(IMAGES)).logits
        bare = rough.lm_head(rough.model.language_model(IDS).last_hidden_state)
    assert torch.equal(closed, bare)  # in bfloat16 too


def test_a_random_start_sits_near_the_logarithm_of_the_vocabulary():
    config = JnanaConfig(
        vision_config=tiny_vision_config(), text_config=text_config("phi"), image_token_id=IMAGE, **FIELDS
    )
    torch.manual_seed(0)
    loss = JnanaForConditionalGeneration(config)(**training_batch()).loss.item()
    assert abs(loss - math.log(VOCAB_ROWS)) < 0.1


# ---------------------------------------------------------------------- what others do with the model


def test_copies_and_pickles_use_their_own_blocks(tmp_path):
    model = make(tmp_path)
    images = pictures(IMAGES)
    buffer = io.BytesIO()
    torch.save(model, buffer)  # before the first call, at which transformers itself adds hooks that can't be pickled
    buffer.seek(0)
    with torch.no_grad():
        expected = model(IDS, pixel_values=images).logits
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(IDS, pixel_values=images).logits, expected)
            twin.model.cross_attention.layers[0].attention_gate.zero_()
            assert not torch.equal(twin(IDS, pixel_values=images).logits, expected)
            assert torch.equal(model(IDS, pixel_values=images).logits, expected)


def test_saving_and_loading(tmp_path):
    model = make(tmp_path, cross_attention_gate="vector", cross_attention_qk_norm=False, image_end_token_id=11)
    model.save_pretrained(tmp_path / "pair")
    loaded, info = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = model(IDS, pixel_values=pictures(IMAGES)).logits
        assert torch.equal(loaded(IDS, pixel_values=pictures(IMAGES)).logits, expected)


def test_compiles_as_one_graph(tmp_path):
    model = make(tmp_path)
    inputs = training_batch()
    model(**inputs)  # transformers hooks the tower's layers at the first call, under a lock that dynamo cannot trace
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs, use_cache=False).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5
        )

"""Packed rows give the loss and gradients of separate conversations; wrong masks, positions or labels are found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from jnana.modeling import CACHE_NAME, modeling_jnana
from jnana.modeling.packed_attention_jnana import create_packed_mask
from tests.modeling.packed import batch, batches, conversations, difference, find_labels, loss_and_gradients
from tests.modeling.pairs import FAMILIES, join, pictures


WINDOW = 8  # shorter than a conversation, and much shorter than a row
CHANGES = {
    "phi3": {"sliding_window": WINDOW},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
}
EXACT = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Pairs that train whole: tower, projector, language model; made when first asked for."""
    made = {}

    def of(family: str, attention: str = "sdpa"):
        if family not in made:
            changes = {"text_changes": CHANGES[family]} if family in CHANGES else {}
            made[family] = join(tmp_path_factory.mktemp(family), family, **changes)
        made[family].set_attn_implementation(attention)
        return made[family]

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_trains_the_same(models, family):
    model = models(family)
    alone = loss_and_gradients(model, batches("single"))
    assert len(alone[1]) > 40
    for how in ("padded", "rows", "shared_image", "blocks", "one group per batch"):
        assert difference(loss_and_gradients(model, batches(how)), alone) < EXACT, how


def test_padding_that_is_learned_is_seen(models):
    """Negative control of `blocks`: most of its positions are padding, and a label at one of them is detected."""
    model = models("phi")
    alone = loss_and_gradients(model, batches("single"))
    [inputs] = batches("blocks")
    padding = inputs["segment_ids"] < 0
    assert inputs["input_ids"].shape == (2, 128) and padding.float().mean() > 0.3
    inputs["shift_labels"][-1, -1] = 1
    find_labels(inputs)
    assert padding[-1, -1] and difference(loss_and_gradients(model, [inputs]), alone) > 100 * EXACT


def test_qwen_has_layers_of_both_kinds(models):
    assert set(models("qwen2").config.text_config.layer_types) == {"full_attention", "sliding_attention"}


@pytest.mark.parametrize("family", ["phi", "phi3", "qwen2"])
def test_eager_attention_and_checkpointing_change_nothing(models, family):
    alone = loss_and_gradients(models(family), batches("single"))
    model = models(family, "eager")
    assert difference(loss_and_gradients(model, batches("shared_image")), alone) < EXACT
    model = models(family).train()
    model.gradient_checkpointing_enable()
    try:
        assert difference(loss_and_gradients(model, batches("shared_image")), alone) < EXACT
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("how", ["frozen", "lora", "full"])
def test_dropout_of_a_frozen_language_model_changes_nothing(tmp_path, how):
    """In training mode, Phi-2's `resid_pdrop` of 0.1 in the config. Trained in full (the control), rows differ."""
    model = join(tmp_path, text_changes={"resid_pdrop": 0.1})
    if how != "full":
        model.model.language_model.requires_grad_(False)
    if how == "lora":
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=r".*language_model.*\.(q_proj|fc1)")
        model = get_peft_model(model, config)
    model.train()
    alone = loss_and_gradients(model, batches("single"))
    found = difference(loss_and_gradients(model, batches("shared_image")), alone)
    assert (found < EXACT) == (how != "full") and found < 1e3


def test_features_instead_of_pixels(models):
    model = models("phi")
    alone = loss_and_gradients(model, batches("single"))
    alone[1].update({name: None for name in list(alone[1]) if "vision_tower" in name})
    [inputs] = batches("shared_image")
    with torch.no_grad():
        features = model.model.get_vision_features(inputs.pop("pixel_values"))[1]
    ours = loss_and_gradients(model, [{**inputs, "image_features": features}])
    theirs = alone[0], {name: gradient for name, gradient in alone[1].items() if gradient is not None}
    assert difference(ours, theirs) < EXACT


def test_logits_only_where_there_is_a_label(models):
    model = models("phi")
    [inputs] = batches("shared_image")
    some = loss_and_gradients(model, [inputs])
    whole = {name: value for name, value in inputs.items() if name != "logit_positions"}
    assert difference(some, loss_and_gradients(model, [whole])) < EXACT
    assert model(**inputs).logits.shape == (int((inputs["shift_labels"] != -100).sum()), 320)
    assert model(**whole).logits.shape == (*inputs["input_ids"].shape, 320)
    only_labels = {name: value for name, value in inputs.items() if name != "shift_labels"}
    assert difference(loss_and_gradients(model, [only_labels]), some) < EXACT
    mask = {**whole, "logits_to_keep": inputs["shift_labels"] != -100}
    assert difference(loss_and_gradients(model, [mask]), some) == 0
    with pytest.raises(ValueError, match="Give `logits_to_keep` or `logit_positions`, not both"):
        model(**mask, logit_positions=inputs["logit_positions"])


# ---------------------------------------------------------------------- every mistake is seen


def off_by_one_branch(inputs):
    """Each branch sees the one before it."""
    branches = inputs["branch_ids"]
    inputs["branch_ids"] = torch.where(branches > 0, (branches + 1) // 2, branches)


def positions_not_restarted(inputs):
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])


def branch_point_untrained(inputs):
    """As if the prefix had kept the branch point: nothing predicts the first token of a branch's answer."""
    branches, labels = inputs["branch_ids"], inputs["shift_labels"]
    starts = (branches > 0) & (branches != torch.nn.functional.pad(branches, (1, 0))[:, :-1])
    inputs["shift_labels"] = torch.where(starts, -100, labels)
    find_labels(inputs)


def label_over_a_border(inputs):
    """The end of each branch predicts the beginning of the next."""
    ids, segments = inputs["input_ids"], inputs["segment_ids"]
    labels = torch.where(segments >= 0, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100), -100)
    ends = inputs["branch_ids"] != torch.nn.functional.pad(inputs["branch_ids"][:, 1:], (0, 1))
    inputs["shift_labels"] = torch.where(ends & (inputs["branch_ids"] > 0), labels, inputs["shift_labels"])
    find_labels(inputs)


def images_mixed_up(inputs):
    inputs["image_indices"] = inputs["image_indices"].flip(0)


@pytest.mark.parametrize(
    "mistake",
    [off_by_one_branch, positions_not_restarted, branch_point_untrained, label_over_a_border, images_mixed_up],
)
@pytest.mark.parametrize("family", ["phi", "phi3"])
def test_a_mistake_is_seen(models, family, mistake):
    model = models(family)
    alone = loss_and_gradients(model, batches("single"))
    [inputs] = batches("shared_image")
    mistake(inputs)
    assert difference(loss_and_gradients(model, [inputs]), alone) > 1e-3


@pytest.mark.parametrize("family", ["phi3", "mistral", "qwen2"])
def test_a_window_counted_in_places_is_seen(models, family, monkeypatch):
    model = models(family)
    alone = loss_and_gradients(model, batches("single"))

    def counting_places(config, embeds, segments, branches, positions):
        places = torch.arange(positions.shape[1]).expand_as(positions)
        return create_packed_mask(config, embeds, segments, branches, places)

    monkeypatch.setattr(modeling_jnana, "create_packed_mask", counting_places)
    assert difference(loss_and_gradients(model, batches("shared_image")), alone) > 1e-3


# ---------------------------------------------------------------------- inputs that contradict one another


def test_padding_gives_no_nan(models):
    """Rows of which a half is padding, in the forms that eager and sdpa take."""
    groups = conversations()
    inputs = batch([[groups[3]], groups], "shared_image")
    for attention in ("eager", "sdpa"):
        model = models("phi3", attention)
        hidden = model.model(**{k: v for k, v in inputs.items() if "label" not in k and "logit" not in k})[0]
        assert hidden.isfinite().all()
        _, gradients = loss_and_gradients(model, [inputs])
        assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_incomplete_or_contradicting_inputs_are_refused(models):
    model = models("phi")
    [inputs] = batches("shared_image")
    for name in ("segment_ids", "branch_ids", "position_ids"):
        with pytest.raises(ValueError, match=f"`position_ids` together; missing: {name}"):
            model(**{key: value for key, value in inputs.items() if key != name})
    with pytest.raises(ValueError, match=r"`branch_ids` has shape \(2, 3\); give \(2, "):
        model(**{**inputs, "branch_ids": inputs["branch_ids"][:, :3]})
    with pytest.raises(ValueError, match="`attention_mask` or `segment_ids`, not both"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    cache = model(input_ids=torch.tensor([[5, 6]]), use_cache=True)[CACHE_NAME]
    with pytest.raises(ValueError, match="leave out the cache"):
        model(**inputs, past_key_values=cache)


def test_attention_that_cannot_follow_the_mask_is_refused(models, monkeypatch):
    model = models("phi")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(
        ValueError, match="'flash_attention_2' does not support.*sdpa, flex_attention, eager.*packing: n"
    ):
        model(**batches("shared_image")[0])


def test_images_that_places_show(models):
    model = models("phi")
    groups = conversations()
    inputs = batch([[groups[0]]], "none")  # five captions of one image
    assert inputs["pixel_values"].shape[0] == 1
    repeated = {**inputs, "pixel_values": pictures(1).repeat(5, 1, 1, 1)}
    del repeated["image_indices"]
    assert torch.allclose(model(**inputs).logits, model(**repeated).logits, atol=1e-5)
    with pytest.raises(Exception, match=r"`image_indices` \[0, 0, 0, 0, 1\] must be from 0 to 0"):
        model(**{**inputs, "image_indices": torch.tensor([0, 0, 0, 0, 1])})
    with pytest.raises(ValueError, match=r"`image_indices` has shape \(5,\) for 0 images"):
        model(**{name: value for name, value in inputs.items() if name != "pixel_values"})
    with pytest.raises(Exception, match="20 image tokens"):
        model(**{**inputs, "image_indices": torch.tensor([0, 0])})


@pytest.mark.parametrize("family", ["phi", "phi3", "qwen2"])
def test_flex_attention_follows_the_same_mask(models, family, monkeypatch):
    """Forward and uncompiled, as a CPU has no backward pass of it: the block mask, and the way it takes."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
    from transformers import masking_utils
    from transformers.integrations import flex_attention as integration

    [inputs] = batches("shared_image")
    with torch.no_grad():
        expected = models(family)(**inputs)
    monkeypatch.setattr(
        masking_utils,
        "create_block_mask",
        lambda *args, **given: create_block_mask(*args, **{**given, "_compile": False}),
    )
    taken = []

    def uncompiled(query, key, value, training=False, **given):
        taken.append(given["block_mask"])
        return flex_attention(query, key, value, **given)

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    model = models(family)
    model.model.language_model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        found = model(**inputs)
        off_by_one_branch(inputs)
        wrong = model(**inputs)
    models(family, "sdpa")
    assert len(taken) == 4 and all(isinstance(mask, BlockMask) for mask in taken)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert abs(found.loss - expected.loss) < EXACT * expected.loss < abs(wrong.loss - expected.loss)

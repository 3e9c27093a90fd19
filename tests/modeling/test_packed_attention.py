"""Packed rows give the loss and gradients of separate conversations; wrong masks, positions or labels are found."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface

from jnana.modeling import CACHE_NAME, packed_kernels_jnana, packed_layout_jnana
from jnana.modeling import packed_attention_jnana as packed_attention
from jnana.modeling.packed_layout_jnana import PackedLayout, make_mask, pieces_in
from tests.modeling.packed import (
    batch,
    batches,
    conversations,
    difference,
    find_labels,
    loss_and_gradients,
    with_layout,
)
from tests.modeling.pairs import FAMILIES, join, pictures, text_ids
from tests.modeling.test_packed_layout import flash_double, varlen_double


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
    assert model.model.language_model.config._attn_implementation == "jnana_packed"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_of_a_gpu_trains_the_same(models, family, monkeypatch):
    """By a double of `varlen_attn`, and with the layout that the collator makes; checkpointed too."""
    monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", varlen_double)
    monkeypatch.setattr(packed_kernels_jnana, "takes", lambda query: True)
    model = models(family)
    alone = loss_and_gradients(model, batches("single"))
    model.model.language_model.set_attn_implementation("jnana_packed_varlen")
    packed = [with_layout(inputs) for inputs in batches("shared_image") + batches("rows")]
    monkeypatch.setattr(PackedLayout, "from_ids", lambda *ids: pytest.fail("the layout is given"))
    for inputs in packed:
        assert difference(loss_and_gradients(model, [inputs]), alone) < EXACT
    model.train().gradient_checkpointing_enable()
    try:
        assert difference(loss_and_gradients(model, packed[:1]), alone) < EXACT
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_one_to_eight_branches(models):
    model = models("qwen2")
    captions = conversations()[0]
    for count in range(1, 9):
        group = [*captions, *captions[:3]][:count]
        alone = loss_and_gradients(model, [batch([[[one]]], "none") for one in group])
        assert difference(loss_and_gradients(model, [batch([[group]], "shared_image")]), alone) < EXACT, count


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


def another_groups_prefix(inputs):
    """The last branch of a row attends to the prefix of another group."""
    layout = with_layout(inputs)["packed_layout"]
    pieces = pieces_in(layout.table)
    last = max(n for n, piece in enumerate(pieces) if piece.row == 1 and piece.prefix_length)
    other = next(piece for piece in pieces if piece.row == 1 and piece.prefix_start != pieces[last].prefix_start)
    pieces[last] = pieces[last]._replace(prefix_start=other.start, prefix_length=other.length)
    inputs["packed_layout"] = PackedLayout(pieces, layout.shape)


def images_mixed_up(inputs):
    inputs["image_indices"] = inputs["image_indices"].flip(0)


@pytest.mark.parametrize(
    "mistake",
    [
        off_by_one_branch,
        another_groups_prefix,
        positions_not_restarted,
        branch_point_untrained,
        label_over_a_border,
        images_mixed_up,
    ],
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

    def counting_places(call, window, device):
        places = tuple((start, end - start) for start, end in call.keys)
        return make_mask(call._replace(positions=places), window, device)

    monkeypatch.setattr(packed_layout_jnana, "make_mask", counting_places)
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


def test_attention_that_cannot_compute_packed_rows_is_refused(models, monkeypatch):
    model = models("phi")
    monkeypatch.setattr(model.config.text_config, "_attn_implementation_internal", "kernels-community/flash-attn2")
    with pytest.raises(
        ValueError, match="'kernels-community/flash-attn2' does not support.*sdpa, jnana_packed.*packing: none"
    ):
        model(**batches("shared_image")[0])


def test_what_a_family_may_not_ask_for_is_refused(models):
    layer = models("phi").model.language_model.layers[0].self_attn
    states = [torch.randn(1, 1, 4, 8) for _ in range(3)]
    layout = PackedLayout.from_ids(*(torch.tensor([ids]) for ids in ([0] * 4, [0] * 4, [0, 1, 2, 3])))
    attend = AttentionInterface()["jnana_packed"]
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"PhiAttention gives its attention `{name}`.*packing: none"):
            attend(layer, *states, None, packed_layout=layout, **{name: torch.ones(1)})
        attend(layer, *states, None, packed_layout=layout, **{name: None})
    with pytest.raises(ValueError, match="PhiAttention does not hand `packed_layout` on"):
        attend(layer, *states, torch.zeros(1, 1, 1, 1))


def test_flash_attention_where_it_is_asked_for(models, monkeypatch):
    """By a double; rows that are not packed go to transformers' own function."""
    model = models("phi3")
    [inputs] = batches("shared_image")
    expected = model(**inputs)
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    AttentionInterface.register("flash_attention_2", lambda *args, **kwargs: ("transformers' own", None))
    packed_attention.extend_flash_attention.cache_clear()
    config = model.model.language_model.config
    monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(packed_kernels_jnana, "takes", lambda query: True)
    with pytest.raises(ValueError, match="'flash_attention_2', whose package is not installed. Leave it out"):
        model(**inputs)
    monkeypatch.setitem(packed_kernels_jnana.FLASH_FUNCTIONS, 2, flash_double)
    torch.testing.assert_close(model(**inputs).logits, expected.logits, rtol=1e-4, atol=1e-4)
    attend = AttentionInterface()["flash_attention_2"]
    assert attend(model, None, None, None, None)[0] == "transformers' own"
    positions_not_restarted(inputs)
    with pytest.raises(ValueError, match="need a mask, which 'flash_attention_2' does not take"):
        model(**inputs)
    packed_attention.extend_flash_attention.cache_clear()


def test_tokens_that_are_not_in_pieces_get_a_mask(models):
    """A prefix in two parts, with a branch in between, which attends to the first."""
    ids = {"segment_ids": [0, 0, 0, 0], "branch_ids": [0, 1, 0, 2], "position_ids": [0, 1, 1, 2]}
    inputs = {name: torch.tensor(values).repeat_interleave(10).expand(2, 40) for name, values in ids.items()}
    inputs["input_ids"] = text_ids(2, 40)
    found = models("phi3")(**inputs).logits
    torch.testing.assert_close(found, models("phi3", "eager")(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_other_rows_are_as_before(models, tmp_path):
    """Text, padded text and generation after packed rows; the name of the attention is not saved."""
    model = models("llama")
    ids, mask = text_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}

    def answers():
        generated = model.generate(**given, max_new_tokens=4, do_sample=False, pad_token_id=1)
        return model(ids).logits, model(**given).logits, generated

    expected = answers()
    model(**batches("shared_image")[0])
    assert model.model.language_model.config._attn_implementation == "jnana_packed"
    assert all(ours.equal(theirs) for ours, theirs in zip(answers(), expected, strict=True))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()


def test_a_new_layout_is_not_compiled_again(models):
    """As one graph: the first lengths, then any."""
    language_model = models("llama").model.language_model
    packed_attention.set_packed_attention(language_model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def run(embeds, inputs):
        given = {"position_ids": inputs["position_ids"], "packed_layout": inputs["packed_layout"], "use_cache": False}
        return language_model(inputs_embeds=embeds, attention_mask=torch.zeros(1, 1, 1, 1), **given)[0]

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    for seed in range(6):
        groups = conversations(seed)
        inputs = with_layout(batch([groups[: 1 + seed % 4]], "shared_image"))
        embeds = torch.randn(1, inputs["input_ids"].shape[1], 64, requires_grad=True)
        results = []
        for function in (run, compiled):
            output = function(embeds, inputs)
            results += [output, *torch.autograd.grad(output.square().sum(), embeds)]
        torch.testing.assert_close(results[2:], results[:2], rtol=1e-4, atol=1e-3)
    torch.compiler.reset()
    assert len(graphs) == 2


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
    with pytest.raises(ValueError, match="20 image tokens .* the images give 0 vectors"):
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

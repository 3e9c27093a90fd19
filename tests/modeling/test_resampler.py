"""The perceiver resampler: IDEFICS's with the same weights, and fresh latents that tell themselves apart."""

import copy

import pytest
import torch
from transformers.models.idefics.configuration_idefics import IdeficsConfig, IdeficsVisionConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration, JnanaPreTrainedModel
from jnana.modeling.resampler_jnana import JnanaPerceiverResampler
from tests.modeling.pairs import IMAGE, join, pictures, text_config, text_ids, with_images
from tests.tiny import tiny_vision_config


RESAMPLER = {
    "projector_type": "perceiver",
    "projector_num_latents": 3,
    "projector_depth": 2,
    "projector_num_heads": 2,
    "projector_head_dim": 8,
}
RENAMED = {
    ".0.context_layer_norm.": ".attention.context_norm.",
    ".0.latents_layer_norm.": ".attention.latents_norm.",
    ".0.q_layer_norm.": ".attention.q_norm.",
    ".0.k_layer_norm.": ".attention.k_norm.",
    ".0.output_proj.": ".attention.o_proj.",
    ".0.": ".attention.",
    ".1.ln.": ".mlp_norm.",
    ".1.fc.": ".fc1.",
    ".1.c_proj.": ".fc2.",
    "layer_norm.": "norm.",
}


def rename(name: str) -> str:
    name = name.removeprefix("blocks.")
    number, _, rest = name.partition(".")
    if not number.isdigit():
        return name.replace("layer_norm.", "norm.")
    rest = f".{rest}"
    old = next(old for old in RENAMED if rest.startswith(old))
    return f"layers.{number}{rest.replace(old, RENAMED[old], 1)}"


@pytest.mark.parametrize("qk_layer_norm", [True, False])
def test_output_and_gradients_equal_idefics_resampler(qk_layer_norm):
    torch.manual_seed(0)
    config = IdeficsConfig(
        vision_config=IdeficsVisionConfig(embed_dim=32), perceiver_config={"qk_layer_norms_perceiver": qk_layer_norm}
    )
    theirs = IdeficsPerceiverResampler(config, embed_dim=32, depth=2, n_heads=4, head_dim=12, n_latents=5)
    ours = JnanaPerceiverResampler(32, 5, 2, 4, 12, qk_layer_norm, "relu")
    ours.init_weights()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    features = torch.randn(3, 7, 32)
    fresh = ours(features)
    ours.load_state_dict({rename(name): weight for name, weight in theirs.state_dict().items()})
    expected, actual = theirs(features), ours(features)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(fresh, expected, atol=0.1)  # negative control: other weights
    weights = torch.randn_like(expected)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {rename(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_an_image_takes_as_many_tokens_as_there_are_latents(tmp_path):
    model = join(tmp_path, **RESAMPLER)
    assert model.config.num_image_tokens == model.config.image_seq_length == 3
    assert model.config.num_view_features == 4
    ids, images = with_images(text_ids(), 3), pictures(2)
    with torch.no_grad():
        logits = model(ids, pixel_values=images).logits
        features = model.model.get_vision_features(images)[1]
        assert torch.equal(model(ids, image_features=features).logits, logits)
        assert not torch.equal(model(ids, pixel_values=images.flip(0)).logits, logits)
        with pytest.raises(ValueError, match="3 an image"):
            model(with_images(text_ids(), 4), pixel_values=images)
    model.save_pretrained(tmp_path / "pair")
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    with torch.no_grad():
        assert torch.equal(loaded(ids, pixel_values=images).logits, logits)


@pytest.mark.parametrize("field", ["projector_num_latents", "projector_depth", "projector_num_heads"])
def test_a_number_of_zero_is_refused(field):
    with pytest.raises(ValueError, match=f"`{field}` is 0"):
        JnanaConfig(vision_config=tiny_vision_config(), text_config=text_config("phi"), **{field: 0})


def is_drawn_from_the_right_normal(latents: torch.Tensor) -> bool:
    return abs(latents.mean().item()) < 0.002 and abs(latents.std().item() - 0.02) < 0.002


def test_fresh_latents_are_drawn_however_the_model_is_made(tmp_path, monkeypatch):
    """The text config's `initializer_range` is 0.2 here, which is what transformers would draw an embedding from."""
    from safetensors.torch import load_file, save_file

    fields = {**RESAMPLER, "projector_num_latents": 64}
    text_changes = {"initializer_range": 0.2}
    joined = join(tmp_path, text_changes=text_changes, **fields)
    config = JnanaConfig.from_vision_text_configs(
        tiny_vision_config(), text_config("phi", **text_changes), image_token_id=IMAGE, **fields
    )
    joined.save_pretrained(tmp_path / "pair")
    weights = load_file(tmp_path / "pair" / "model.safetensors")
    name = "model.multi_modal_projector.resampler.latents"
    kept = weights.pop(name)
    save_file(weights, tmp_path / "pair" / "model.safetensors", metadata={"format": "pt"})

    def load():
        return JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")

    made = {"joined": joined, "from_config": JnanaForConditionalGeneration(config), "a checkpoint without": load()}
    drawn = {how: model.get_parameter(name) for how, model in made.items()}
    assert all(is_drawn_from_the_right_normal(latents) for latents in drawn.values()), drawn
    assert not torch.equal(drawn["a checkpoint without"], kept)
    # Negative control: without our `_init_weights` the latents stay what they were in memory.
    monkeypatch.setattr(JnanaPerceiverResampler, "init_weights", lambda self: None)
    assert not is_drawn_from_the_right_normal(load().get_parameter(name))
    monkeypatch.undo()
    # A checkpoint with latents keeps them.
    save_file({**weights, name: kept}, tmp_path / "pair" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load().get_parameter(name), kept)
    assert issubclass(JnanaForConditionalGeneration, JnanaPreTrainedModel)


def spread(latents: torch.Tensor) -> float:
    return (latents - latents.mean(0)).abs().max().item()


def train(model, steps: int = 5) -> float:
    """Trains the projector, and returns the spread of what the resampler gives the language model."""
    model = copy.deepcopy(model)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=1e-2)
    ids, images = with_images(text_ids(), model.config.num_image_tokens), pictures(2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, pixel_values=images, labels=ids).loss.backward()
        optimizer.step()
    return spread(model.model.multi_modal_projector.resampler.latents)


def test_latents_differ_after_training(tmp_path):
    model = join(tmp_path, **RESAMPLER)
    latents = model.model.multi_modal_projector.resampler.latents
    assert spread(latents) > 0.01 and train(model) > 0.01
    # Latents that start equal: in a row of tokens their positions tell them apart.
    with torch.no_grad():
        latents.fill_(1.0)
    assert spread(latents) == 0 and train(model) > 0

"""Joining changes nothing: the language model's logits, the tower's features and LLaVA's logits are exact."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPModel,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration, JnanaPreTrainedModel
from tests.modeling.pairs import FAMILIES, IMAGE, join, pictures, save_text, save_vision, text_ids, with_images
from tests.tiny import tiny_text_config, tiny_vision_config


@pytest.mark.parametrize("family", FAMILIES)
def test_text_only_logits_are_the_bare_models_bit_for_bit(tmp_path, family):
    model = join(tmp_path, family)
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = text_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected, logits = bare(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
        assert torch.equal(logits, expected)
        # Negative control: the smallest change to the head is seen.
        model.lm_head.weight[0, 0] += 1e-2
        assert not torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_phis_head_bias_is_what_stock_llava_loses(tmp_path):
    model = join(tmp_path, "phi")
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    ids = text_ids()
    with torch.no_grad():
        expected = bare(ids).logits
        assert torch.equal(model(ids).logits, expected)
        model.lm_head.bias.zero_()
        assert (model(ids).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt_neox", "phi", "llama"])
def test_tied_heads_stay_tied(tmp_path, family):
    model = join(tmp_path, family, text_changes={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "pair")
    for tied in (model, JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")):
        assert tied.config.tie_word_embeddings
        assert tied.lm_head.weight is tied.get_input_embeddings().weight
    bare = AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    with torch.no_grad():
        assert torch.equal(tied.eval()(text_ids()).logits, bare(text_ids()).logits)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(), "final_logit_softcapping=30.0"),
        (Cohere2Config(), "logit_scale=0.0625"),
        (GraniteConfig(logits_scaling=8.0), "logits_scaling=8.0"),
        (GPT2Config(), "not been shown"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_other_families_are_refused_by_name(config, reason):
    with torch.device("meta"), pytest.raises(ValueError, match=reason) as error:
        JnanaForConditionalGeneration(JnanaConfig(vision_config=tiny_vision_config(), text_config=config))
    assert repr(config.model_type) in str(error.value) and "phi3" in str(error.value)


def test_refusal_comes_before_weights_are_read(tmp_path):
    save_vision(tmp_path / "vision")
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(tmp_path / "text")  # no weights there at all
    with pytest.raises(ValueError, match="'gpt2'"):
        JnanaForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))


@pytest.mark.parametrize("kind", ["clip", "clip_full", "siglip", "dinov2"])
@pytest.mark.parametrize(("layer", "strategy"), [(-1, "default"), (-2, "full"), ([1, -1], "default"), (0, "full")])
def test_vision_features_are_the_bare_towers(tmp_path, kind, layer, strategy):
    model = join(tmp_path, vision=kind, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    bare = AutoModel.from_pretrained(tmp_path / "vision").eval()
    tower = bare.vision_model if kind == "clip_full" else bare
    images = pictures(3)
    prefix = 0 if kind == "siglip" else 1
    with torch.no_grad():
        states = tower(images, output_hidden_states=True).hidden_states
        layers = [layer] if isinstance(layer, int) else layer
        expected = torch.cat([states[i][:, prefix if strategy == "default" else 0 :] for i in layers], dim=-1)
        features = model.model.get_vision_features(images)[1]
        assert features.shape == (3, model.config.num_image_tokens, model.config.vision_feature_size)
        assert torch.equal(features, expected)
        assert not torch.equal(model.model.get_vision_features(images.flip(0))[1], expected)  # negative control


def test_pooled_features_are_clips_own_embedding(tmp_path):
    model = join(tmp_path, vision="clip_full", vision_feature_select_strategy="pooled", projector_layer_norm=True)
    clip = CLIPModel.from_pretrained(tmp_path / "vision").eval()
    images = pictures(2)
    with torch.no_grad():
        features = model.model.get_vision_features(images)[1]
        assert torch.equal(features, clip.get_image_features(images).pooler_output.unsqueeze(1))
        clip.visual_projection.weight += 0.01
        assert not torch.equal(features, clip.get_image_features(images).pooler_output.unsqueeze(1))
    assert features.shape == (2, 1, 16) and model.config.num_image_tokens == 1


def test_pooled_siglip_is_siglips_own_embedding(tmp_path):
    model = join(tmp_path, vision="siglip", vision_feature_select_strategy="pooled")
    bare = AutoModel.from_pretrained(tmp_path / "vision").eval()
    with torch.no_grad():
        features = model.model.get_vision_features(pictures(2))[1]
        assert torch.equal(features, bare(pictures(2)).pooler_output.unsqueeze(1))


def test_pooled_without_a_projection_in_the_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="lacks .* weights.*must hold CLIP's projection"):
        join(tmp_path, vision="clip", vision_feature_select_strategy="pooled")


@pytest.mark.parametrize("layer", [-2, [-2, -1]])
def test_logits_equal_stock_llava_with_the_same_weights(tmp_path, layer):
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=layer,
    )
    torch.manual_seed(0)
    llava = LlavaForConditionalGeneration(config).eval()
    model = JnanaForConditionalGeneration(
        JnanaConfig.from_vision_text_configs(
            config.vision_config, config.text_config, image_token_id=IMAGE, vision_feature_layer=layer
        )
    ).eval()
    ids, images = with_images(text_ids(), 4), pictures(2)
    with torch.no_grad():
        assert not torch.allclose(
            model(ids, pixel_values=images).logits, llava(ids, pixel_values=images).logits, atol=1e-3
        )  # negative control: other weights
        model.load_state_dict(llava.state_dict())  # strict: names are LLaVA's too
        expected = llava(ids, pixel_values=images, labels=ids)
        actual = model(ids, pixel_values=images, labels=ids)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["phi", "gpt_neox"])
@pytest.mark.parametrize(("vision", "strategy"), [("clip", "default"), ("clip_full", "pooled"), ("dinov2", "full")])
def test_a_joined_pair_holds_exactly_the_two_checkpoints(tmp_path, family, vision, strategy):
    model = join(tmp_path, family, vision, vision_feature_select_strategy=strategy)
    model.save_pretrained(tmp_path / "pair")
    bare_text = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    bare_vision = AutoModel.from_pretrained(tmp_path / "vision")
    for pair in (model, JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")):
        _assert_same(pair.model.language_model, bare_text.base_model)
        _assert_same(pair.lm_head, bare_text.get_output_embeddings())
        if strategy == "pooled":
            _assert_same(pair.model.vision_tower.vision_model, bare_vision.vision_model)
            _assert_same(pair.model.vision_tower.visual_projection, bare_vision.visual_projection)
        else:
            _assert_same(pair.model.vision_tower, bare_vision)
        _assert_same(pair.model.multi_modal_projector, model.model.multi_modal_projector)
    with pytest.raises(AssertionError):  # negative control
        _assert_same(pair.lm_head, type(pair.lm_head)(64, 320))


def test_a_language_model_with_its_own_code_is_refused(tmp_path):
    import json

    save_vision(tmp_path / "vision")
    save_text(tmp_path / "text")
    config_file = tmp_path / "text" / "config.json"
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "auto_map": auto_map}))
    code = "from transformers import PhiForCausalLM\n\n\nclass OwnForCausalLM(PhiForCausalLM):\n    pass\n"
    (tmp_path / "text" / "modeling_own.py").write_text(code)
    folders = str(tmp_path / "vision"), str(tmp_path / "text")
    with pytest.raises(ValueError, match="loaded by its own code .* Leave out `trust_remote_code`"):
        JnanaForConditionalGeneration.from_vision_text_pretrained(*folders, trust_remote_code=True)
    JnanaForConditionalGeneration.from_vision_text_pretrained(*folders, trust_remote_code=False)


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_at_random(tmp_path):
    from safetensors.torch import load_file, save_file

    save_vision(tmp_path / "vision")
    save_text(tmp_path / "text")
    weights = load_file(tmp_path / "vision" / "model.safetensors")
    weights.pop(next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight")))
    save_file(weights, tmp_path / "vision" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="vision checkpoint .* lacks 1 weights .*fc1"):
        JnanaForConditionalGeneration.from_vision_text_pretrained(str(tmp_path / "vision"), str(tmp_path / "text"))


def test_weights_that_nothing_reads_may_be_missing(tmp_path):
    """As the pooler in many ViT checkpoints."""
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ViTModel(ViTConfig(**sizes, image_size=24, patch_size=12), add_pooling_layer=False).save_pretrained(
        tmp_path / "vision"
    )
    save_text(tmp_path / "text")
    folders = str(tmp_path / "vision"), str(tmp_path / "text")
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(*folders, image_token_id=IMAGE)
    assert model(with_images(text_ids(), 4), pixel_values=pictures(2)).logits.isfinite().all()
    with pytest.raises(ValueError, match="pooler"):
        JnanaForConditionalGeneration.from_vision_text_pretrained(*folders, vision_feature_select_strategy="pooled")


def test_registers_are_dropped_with_the_cls_token(tmp_path):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=12, num_register_tokens=3
    )
    torch.manual_seed(0)
    Dinov2WithRegistersModel(config).save_pretrained(tmp_path / "vision")
    save_text(tmp_path / "text")
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(
        str(tmp_path / "vision"), str(tmp_path / "text"), image_token_id=IMAGE
    )
    with torch.no_grad():
        outputs, features = model.model.get_vision_features(pictures(2))
    assert features.shape == (2, 4, 32) and torch.equal(features, outputs.hidden_states[-1][:, 4:])


def test_missing_tower_weights_are_initialised_as_the_tower_does_it(tmp_path, monkeypatch):
    """As in transformers' own code, not by torch's defaults: CLIP's `fc1` gets a standard deviation of 1/8 here."""
    from safetensors.torch import load_file, save_file

    model = join(tmp_path)
    model.save_pretrained(tmp_path / "pair")
    weights = load_file(tmp_path / "pair" / "model.safetensors")
    name = "model.vision_tower.encoder.layers.1.mlp.fc1.weight"
    weights.pop(name)
    save_file(weights, tmp_path / "pair" / "model.safetensors", metadata={"format": "pt"})
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    width = AutoConfig.from_pretrained(tmp_path / "vision").hidden_size
    assert loaded.get_parameter(name).std().item() == pytest.approx((2 * width) ** -0.5, rel=0.1)
    # Negative control: what transformers does with custom code.
    monkeypatch.setattr(JnanaPreTrainedModel, "initialize_weights", PreTrainedModel.initialize_weights)
    loaded = JnanaForConditionalGeneration.from_pretrained(tmp_path / "pair")
    assert loaded.get_parameter(name).std().item() != pytest.approx((2 * width) ** -0.5, rel=0.1)


def _assert_same(module: torch.nn.Module, other: torch.nn.Module) -> None:
    weights, others = module.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)

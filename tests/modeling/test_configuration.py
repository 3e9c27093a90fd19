"""Token counts, field checks, and counting full-size models without their weights."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    SiglipVisionConfig,
    SwinConfig,
)

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from tests.tiny import tiny_text_config, tiny_vision_config


VIT_B32 = CLIPVisionConfig()
PHI_2 = PhiConfig(
    vocab_size=51200,
    hidden_size=2560,
    intermediate_size=10240,
    num_hidden_layers=32,
    num_attention_heads=32,
    partial_rotary_factor=0.4,
)
PHI_35_MINI = Phi3Config(
    vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_hidden_layers=32, num_attention_heads=32
)


@pytest.mark.parametrize(
    ("vision", "default", "full"),
    [
        (VIT_B32, 49, 50),
        (CLIPVisionConfig(image_size=336, patch_size=14), 576, 577),
        (SiglipVisionConfig(image_size=224, patch_size=16), 196, 196),
        (Dinov2Config(image_size=518, patch_size=14), 1369, 1370),
        (Dinov2WithRegistersConfig(image_size=224, patch_size=14, num_register_tokens=4), 256, 261),
        (CLIPVisionConfig(image_size=(72, 36), patch_size=12), 18, 19),
    ],
)
def test_image_tokens(vision, default, full):
    for strategy, expected in (("default", default), ("full", full), ("pooled", 1)):
        config = JnanaConfig(vision_config=vision, vision_feature_select_strategy=strategy)
        assert config.image_seq_length == config.num_image_tokens == expected


def test_a_full_clip_config_gives_its_vision_part_and_its_projection():
    clip = CLIPConfig(projection_dim=123, vision_config={"hidden_size": 96})
    config = JnanaConfig.from_vision_text_configs(clip, tiny_text_config(), vision_feature_select_strategy="pooled")
    assert config.vision_config.model_type == "clip_vision_model" and config.vision_config.hidden_size == 96
    assert config.vision_feature_size == config.vision_config.projection_dim == 123
    assert clip.vision_config.projection_dim != 123  # the given config is left alone


def test_fingerprint_and_tying_come_from_the_language_model():
    text = tiny_text_config("qwen2", tokenizer_fingerprint="300:abc")
    config = JnanaConfig.from_vision_text_configs(tiny_vision_config(), text)
    assert config.tokenizer_fingerprint == "300:abc" and config.tie_word_embeddings
    assert JnanaConfig.from_vision_text_configs(tiny_vision_config(), tiny_text_config()).tokenizer_fingerprint is None


def test_round_trip(tmp_path):
    config = JnanaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config("gpt_neox"),
        image_token_id=310,
        projector_type="resblock",
        projector_num_blocks=2,
        vision_feature_layer=[-2, -1],
        tokenizer_fingerprint="300:abc",
    )
    config.auto_map = {
        "AutoModel": "someone/somewhere--modeling_jnana.JnanaModel"
    }  # as loading from the Hub leaves it
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is JnanaConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"]["AutoModel"] == "modeling_jnana.JnanaModel"
    assert JnanaConfig().to_dict() == JnanaConfig.from_dict(JnanaConfig().to_dict()).to_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projector_type": "mpl"}, "`projector_type` is 'mpl'; choose one of linear, mlp, resblock"),
        ({"vision_feature_select_strategy": "cls"}, "`vision_feature_select_strategy` is 'cls'"),
        ({"projector_num_blocks": 0}, "`projector_num_blocks` is 0"),
        ({"projector_num_blocks": "2"}, "`projector_num_blocks` is '2'"),
        ({"vision_feature_layer": "-1"}, "`vision_feature_layer` is '-1'"),
        ({"vision_feature_layer": 4}, "`vision_feature_layer` is 4; the tower has 4 hidden states"),
        ({"vision_feature_layer": []}, "`vision_feature_layer`"),
        ({"image_token_id": -1}, "`image_token_id` is -1"),
        ({"text_config": {"model_type": "nothing"}}, "`text_config.model_type` is 'nothing'"),
        ({"vision_config": SwinConfig()}, "`vision_config.model_type` is 'swin'.*num_prefix_tokens"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        JnanaConfig(**{"vision_config": tiny_vision_config(), "text_config": tiny_text_config(), **fields})


def test_bad_fields_are_named_when_the_model_is_built():
    for fields, message in (
        ({"image_seq_length": 7}, "`image_seq_length` is 7, but this tower gives 4"),
        ({"projector_hidden_act": "gleu"}, "`projector_hidden_act` is 'gleu'"),
    ):
        config = JnanaConfig(vision_config=tiny_vision_config(), text_config=tiny_text_config(), **fields)
        with torch.device("meta"), pytest.raises(ValueError, match=message):
            JnanaForConditionalGeneration(config)


def _count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_full_size_models_are_counted_on_the_meta_device():
    """Phi-2 and CLIP ViT-B/32 as systems 1 and 4 have them; the language models' counts are their published ones."""
    with torch.device("meta"):
        jnana = JnanaForConditionalGeneration(
            JnanaConfig.from_vision_text_configs(VIT_B32, PHI_2, projector_type="resblock")
        )
        pooled = JnanaForConditionalGeneration(
            JnanaConfig.from_vision_text_configs(
                CLIPConfig(),
                PHI_35_MINI,
                projector_layer_norm=True,
                vision_feature_select_strategy="pooled",
                image_token_id=32011,
            )
        )
    assert _count(jnana.model.language_model) + _count(jnana.lm_head) == 2_779_683_840
    assert _count(jnana.model.vision_tower) == 87_456_000
    assert _count(jnana.model.multi_modal_projector) == 768 * 2560 + 2560 + 2 * 2560 + 2 * (2560 * 2560 + 2560)
    assert _count(pooled.model.language_model) + _count(pooled.lm_head) == 3_821_079_552
    assert _count(pooled.model.vision_tower) == 87_456_000 + 768 * 512
    assert _count(pooled.model.multi_modal_projector) == 1024 + 512 * 3072 + 3072 + 3072 * 3072 + 3072
    assert all(parameter.is_meta for parameter in pooled.parameters())
    # System 4's trainable count is LoRA r=64 on four matrices a layer, and this projector.
    width, mlp = 3072, 8192
    lora = 32 * 64 * ((width + 3 * width) + (width + width) + (width + 2 * mlp) + (mlp + width))
    assert lora + _count(pooled.model.multi_modal_projector) == 111_680_512


def test_published_count_of_llava_1_5_7b():
    """Stock LLaVA-1.5-7B: 7,063,427,072 parameters, its embedding resized to 32,064 rows."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        model = JnanaForConditionalGeneration(
            JnanaConfig.from_vision_text_configs(vision, LlamaConfig(vocab_size=32064), image_token_id=32000)
        )
    assert _count(model) == 7_063_427_072

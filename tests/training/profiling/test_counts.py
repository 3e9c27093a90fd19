"""Full-size parameter counts of the five systems, on the meta device, from the recipe files that would train them."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, TrainingArguments

from jnana.modeling import (
    JnanaConfig,
    JnanaForConditionalGeneration,
    jnana_config_from_idefics,
    jnana_config_from_llava,
)
from jnana.training.options.arguments import DataArguments, LoraArguments, ModelArguments, PartArguments, RunArguments
from jnana.training.options.recipes import parse_arguments
from jnana.training.stages import apply_stage, count_parameters


ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "tests" / "fixtures" / "configs"
CLASSES = (ModelArguments, DataArguments, LoraArguments, PartArguments, RunArguments, TrainingArguments)


def hub_config(name: str):
    """The committed shapes of a Hub checkpoint; the recipes name the Hub id."""
    return AutoConfig.from_pretrained(CONFIGS / name.replace("/", "--"))


def read(recipe: str):
    """The model and LoRA arguments of an align or sft recipe."""
    is_align = recipe.endswith(("align.yaml", "pretrain.yaml"))
    classes = tuple(c for c in CLASSES if c not in (LoraArguments, PartArguments)) if is_align else CLASSES
    arguments = parse_arguments(classes, [str(ROOT / "recipes" / recipe), "--bf16", "false", "--output_dir", "unused"])
    lora = next((a for a in arguments if isinstance(a, LoraArguments)), LoraArguments())
    return arguments[0], lora


def meta_pair(args: ModelArguments) -> JnanaForConditionalGeneration:
    config = JnanaConfig.from_vision_text_configs(
        hub_config(args.vision_model), hub_config(args.text_model), **args.projector_fields
    )
    with torch.device("meta"):
        return JnanaForConditionalGeneration(config)


def counts(pair_recipe: str, sft_recipe: str, rows: int | None = None):
    """Parts of the model that `pair_recipe` builds, as `sft_recipe` trains it."""
    model = meta_pair(read(pair_recipe)[0])
    if rows is not None:
        with torch.device("meta"):
            model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.device("meta"):
        model = apply_stage(model, "sft", read(sft_recipe)[1])
    return count_parameters(model)


def test_jnana_adapter_on_phi2():
    # The builders' total has no image encoder and no projector, and an embedding cut to the tokenizer's 50,295 entries
    part = counts("jnana/align.yaml", "jnana/sft.yaml", rows=50_295)
    trainable = part["language_model"].trainable
    assert trainable == 94_371_840
    assert part["language_model"].total + part["lm_head"].total == 2_869_421_175
    assert f"{trainable / 2_869_421_175:.3%}" == "3.289%"  # they cut it off to 3.288
    assert part["lm_head"].trainable == part["vision_tower"].trainable == 0


def test_jnana_counts_follow_the_recipe(tmp_path):
    """The control: another rank gives another count, so the numbers do come from the recipe file."""
    text = (ROOT / "recipes/jnana/sft.yaml").read_text().replace("lora_r: 64", "lora_r: 32")
    (tmp_path / "sft.yaml").write_text(text)
    part = counts("jnana/align.yaml", str(tmp_path / "sft.yaml"), rows=50_295)
    assert part["language_model"].trainable == 94_371_840 // 2


def test_jnana_keeps_phi2s_own_rows():
    """Our recipe leaves the 51,200 rows as they are: the image and pad tokens fit without resizing."""
    part = counts("jnana/align.yaml", "jnana/sft.yaml")
    assert part["language_model"].total + part["lm_head"].total == 2_869_421_175 + (51_200 - 50_295) * (2 * 2560 + 1)


def test_phi35_pooled_adapter_and_projector():
    part = counts("phi35_pooled/sft.yaml", "phi35_pooled/sft.yaml")
    trainable = part["language_model"].trainable + part["multi_modal_projector"].trainable
    assert trainable == 111_680_512
    total = part["language_model"].total + part["lm_head"].total + part["multi_modal_projector"].total
    assert total == 3_932_760_064  # the image encoder, whose embeddings they stored, is not in it
    assert part["multi_modal_projector"].total == 2 * 512 + (512 * 3072 + 3072) + (3072 * 3072 + 3072)


def lora_weights(rank: int, *shapes: tuple[int, int]) -> int:
    """Weights of an adapter on linear layers of these (in, out) sizes."""
    return sum(rank * (wide + narrow) for wide, narrow in shapes)


@pytest.mark.parametrize(("feature_layer", "tower_layers"), [(-2, 23), (-1, 24)])
def test_llava_chess_adapts_the_tower_too(feature_layer, tower_layers):
    """CLIP ViT-L/336 read at its second last hidden state: its 24th layer would get no gradient, so no adapter."""
    args, lora = read("llava_chess/align.yaml")[0], read("llava_chess/sft.yaml")[1]
    assert args.vision_feature_layer == [-2]
    args.vision_feature_layer = [feature_layer]  # -1 is the control: there the last layer is adapted as well
    with torch.device("meta"):
        part = count_parameters(apply_stage(meta_pair(args), "sft", lora))
    tower = lora_weights(64, *[(1024, 1024)] * 4, (1024, 4096), (4096, 1024))
    text = lora_weights(64, *[(4096, 4096)] * 4, *[(4096, 11008)] * 2, (11008, 4096))
    assert part["vision_tower"].trainable == tower_layers * tower == tower_layers * 1_179_648
    assert part["language_model"].trainable == 32 * text == 159_907_840
    assert part["multi_modal_projector"].trainable == 20_979_712 and part["lm_head"].trainable == 0
    share = sum(count.trainable for count in part.values()) / sum(count.total for count in part.values())
    assert 0.028 < share < 0.03  # the builder's "about 4 %" names neither rank nor language model


PUBLISHED = {  # trainable, total: the table of recipes/llava_chess/README.md
    "llava_1_5_7b": (208_019_456, 7_250_466_816),
    "llava_1_6_mistral_7b": (215_887_872, 7_761_651_712),
    "llava_1_6_34b": (577_393_664, 35_270_735_872),
    "idefics_9b": (1_720_389_392, 9_089_587_472),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_llava_chess_from_published_assistants(name):
    args, lora = read(f"llava_chess/{name}.yaml")
    if name == "idefics_9b":
        config = jnana_config_from_idefics(hub_config(args.model_name_or_path), 32_001)
    else:
        config = jnana_config_from_llava(hub_config(args.model_name_or_path))
    with torch.device("meta"):
        part = count_parameters(apply_stage(JnanaForConditionalGeneration(config), "sft", lora))
    found = sum(count.trainable for count in part.values()), sum(count.total for count in part.values())
    assert found == PUBLISHED[name]
    text = (ROOT / "recipes" / "llava_chess" / "README.md").read_text(encoding="utf-8")
    assert all(f"{number:,}" in text for number in found)


@pytest.mark.parametrize(
    ("system", "projector"),
    [
        ("era_capstone", 768 * 2560 + 2560),
        ("jnana", 768 * 2560 + 2560 + 2 * 2560 + 2 * (2560 * 2560 + 2560)),
        ("visualize_this", 768 * 2560 + 2560 + 2 * (2 * 2560 + 2 * (2560 * 2560 + 2560))),
        ("llava_chess", 1024 * 4096 + 4096 + 4096 * 4096 + 4096),
    ],
)
def test_align_trains_the_projector_alone(system, projector):
    model = apply_stage(meta_pair(read(f"{system}/align.yaml")[0]), "align")
    part = count_parameters(model)
    assert part["multi_modal_projector"].trainable == part["multi_modal_projector"].total == projector
    assert sum(count.trainable for count in part.values()) == projector


@pytest.mark.parametrize(("system", "tokens"), [("jnana", 49), ("era_capstone", 49), ("llava_chess", 576)])
def test_tokens_an_image(system, tokens):
    args = read(f"{system}/align.yaml")[0]
    config = JnanaConfig.from_vision_text_configs(
        hub_config(args.vision_model), hub_config(args.text_model), **args.projector_fields
    )
    assert config.num_image_tokens == tokens

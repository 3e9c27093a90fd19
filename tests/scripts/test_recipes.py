"""Every recipe of the five systems runs, with only sizes and paths overridden."""

from pathlib import Path

import pytest

from jnana import ChatSession, run_align, run_pretrain, run_sft
from jnana.training.adapters import adapter_reference
from jnana.training.loading import load_model
from jnana.training.options.recipes import read_recipe
from tests.modeling.tiny_idefics import save_tiny_idefics
from tests.scripts.conftest import options
from tests.tiny import save_tiny_llava, save_tiny_text, save_tiny_vision


RECIPES = Path(__file__).parents[2] / "recipes"
TEXT = {"microsoft/phi-2": "phi", "microsoft/Phi-3.5-mini-instruct": "phi3", "lmsys/vicuna-7b-v1.5": "llama"}
FEWER = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "bf16": "false",
    "dtype": "float32",
    "save_steps": 1,
    "sample_max_new_tokens": 3,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A stand-in for each Hub checkpoint that the recipes name."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_vision(folder / "clip", "clip_full")
    for kind in TEXT.values():
        save_tiny_text(folder / kind, kind)
    save_tiny_text(folder / "gpt_neox", "gpt_neox")
    return folder


def overrides(recipe: dict, data: Path, tiny: Path, previous: Path | None) -> dict:
    """Sizes and paths only: everything else is the recipe's."""
    values = dict(FEWER)
    if "vision_model" in recipe:
        values |= {"vision_model": tiny / "clip", "text_model": tiny / TEXT[recipe["text_model"]]}
    if "model_name_or_path" in recipe:
        values["model_name_or_path"] = previous
    sources = {"coco_captions": "captions.json", "llava_instruct": "instruct.json", "imagefolder": "photos"}
    for which in ("train", "eval"):
        if f"{which}_data" in recipe:
            values[f"{which}_data"] = data / sources[recipe[f"{which}_format"]]
    for name in ("image_folder", "eval_image_folder"):
        if name in recipe:
            values[name] = data / "images"
    if "lora_r" in recipe:
        values["lora_r"] = 2
    if "eval_data" in recipe:
        values |= {"sample_steps": 1, "max_eval_rows": 2}
    return values


@pytest.mark.parametrize("system", ["jnana", "era_capstone", "visualize_this", "phi35_pooled", "llava_chess"])
def test_align_and_sft(system, data, tiny, tmp_path):
    previous = None
    for stage in ("align", "sft", "sft_round2"):
        path = RECIPES / system / f"{stage}.yaml"
        if not path.is_file():
            continue
        recipe = read_recipe(path)
        output = tmp_path / stage
        script = run_align if stage == "align" else run_sft
        script.main([str(path), *options(**overrides(recipe, data, tiny, previous), output_dir=output)])
        assert f"{system}/{stage}.yaml" in (output / "README.md").read_text()
        previous = output
    model, processor = load_model(str(previous))
    assert model.config.image_seq_length == (1 if system == "phi35_pooled" else 4)
    assert (previous / "merged" / "model.safetensors").is_file() == (system != "phi35_pooled")
    reference = adapter_reference(str(previous))
    assert reference["quantization"]["quantization"] == ("none" if system == "llava_chess" else "nf4")
    tower = [name for name, _ in model.named_parameters() if "vision_tower" in name and "lora_" in name]
    assert (len(tower) > 0) == (system == "llava_chess")


PUBLISHED = {
    "llava_1_5_7b": lambda folder: save_tiny_llava(folder, "llava"),
    "llava_1_6_mistral_7b": lambda folder: save_tiny_llava(folder, "llava_next", "mistral"),
    "llava_1_6_34b": lambda folder: save_tiny_llava(folder, "llava_next", "llama"),
    "idefics_9b": save_tiny_idefics,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_from_a_published_assistant(name, data, tmp_path):
    """From a tiny checkpoint that transformers saved to a merged model, its photographs described before and after."""
    PUBLISHED[name](tmp_path / "published")
    path, output = RECIPES / "llava_chess" / f"{name}.yaml", tmp_path / "sft"
    recipe = read_recipe(path)
    values = overrides(recipe, data, tmp_path, tmp_path / "published")
    # The photographs to test on are described before training and after it.
    run_sft.main([str(path), *options(**values, output_dir=output)])
    page = (output / "samples.html").read_text(encoding="utf-8")
    assert page.count("<tr><td>0</td>") == page.count("<tr><td>1</td>") == 2
    model, processor = load_model(str(output / "merged"))
    assert (processor.image_grid_pinpoints is not None) == ("1_6" in name)
    assert model.config.fusion == ("cross_attention" if "idefics" in name else "tokens")
    adapted, _ = load_model(str(output))
    tower = [weight for weight, _ in adapted.named_parameters() if "vision_tower" in weight and "lora_" in weight]
    assert (len(tower) > 0) == ("llava" in name)
    session = ChatSession(model, processor)
    photo = next((data / "photos").glob("*.png"))
    assert isinstance(list(session.ask(recipe["prompt"], [photo], max_new_tokens=3))[-1], str)


@pytest.mark.parametrize("system", ["jnana", "era_capstone"])
def test_pretrain(system, data, tiny, tmp_path):
    path = RECIPES / system / "pretrain.yaml"
    recipe = read_recipe(path)
    values = {**FEWER, "tokenizer_name_or_path": tiny / "phi", "train_data": data / "corpus.txt", "block_size": 16}
    if "text_config" in recipe:
        small = {"model_type": recipe["text_config"]["model_type"], "hidden_size": 32, "intermediate_size": 64}
        values["text_config"] = str({**small, "num_hidden_layers": 1, "num_attention_heads": 2}).replace("'", '"')
    else:
        values["config_name_or_path"] = tiny / "gpt_neox"
    run_pretrain.main([str(path), *options(**values, output_dir=tmp_path)])
    assert (tmp_path / "model.safetensors").is_file()

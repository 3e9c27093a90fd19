"""The memory tables in the docs, without activations, are those of the models."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from jnana.modeling import JnanaForConditionalGeneration, jnana_config_from_llava
from jnana.training.options.arguments import LoraArguments, TextModelArguments
from jnana.training.options.recipes import as_command_line, parse_arguments, read_recipe
from jnana.training.saving.checkpoints import ADAMW_BYTES
from jnana.training.stages import apply_stage, describe_parameters, parameter_count
from jnana.training.text_models import text_model_config
from tests.tiny import tiny_tokenizer
from tests.training.saving.test_disk_space import model_of


RECIPES = Path(__file__).parents[3] / "recipes"


def training_memory(model: nn.Module, shards: int = 1) -> dict[str, int]:
    """Bytes of weights, gradients and AdamW's state of each process, with all three divided over the processes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": sum(ADAMW_BYTES * parameter_count(parameter) for parameter in trained),
    }
    return {name: num_bytes // shards for name, num_bytes in parts.items()}


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_it_is_what_the_tensors_take(kind):
    model = model_of(kind)
    said = training_memory(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [leaf for leaf in tree_leaves(optimizer.state_dict()["state"]) if torch.is_tensor(leaf) and leaf.ndim > 0]
    assert said["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert said["gradients"] == sum(parameter.grad.nbytes for parameter in trained)
    assert said["optimizer"] == sum(tensor.nbytes for tensor in state)
    if kind == "adapter":  # the control: the frozen weights count once
        assert said["gradients"] < said["weights"] / 2


def test_the_table_of_stage_0():
    """Phi-2 from random weights as `recipes/jnana/pretrain.yaml` trains it, on the meta device."""
    (args, _) = parse_arguments(
        [TextModelArguments, TrainingArguments], known(RECIPES / "jnana" / "pretrain.yaml", "text_config")
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_model_config(args, tiny_tokenizer()))
    apply_stage(model, "pretrain")
    table = (RECIPES / "jnana" / "README.md").read_text().partition("## Memory of stage 0")[2]
    assert f"{sum(p.numel() for p in model.parameters()):,} weights" in table
    rows = re.findall(r"^\| .*?on 4.*? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    assert len(rows) == 2
    for row, shards in zip(rows, (1, 4), strict=True):
        parts = list(training_memory(model, shards).values())
        assert row == tuple(f"{num_bytes / 1e9:.1f}" for num_bytes in (*parts, sum(parts)))
    whole, sharded = (sum(training_memory(model, shards).values()) for shards in (1, 4))
    assert sharded < 24e9 / 2 < 24e9 < whole  # FSDP2 leaves half of a GPU of 24 GB for activations; DDP does not fit


FIXTURES = Path(__file__).parents[2] / "fixtures" / "configs"
LORA = {
    "lora_r": 64,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
ON_TOWER = {**LORA, "lora_vision_target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]}


def test_the_table_of_llava():
    """docs/what_trains.md: the published checkpoints in bfloat16, on the meta device."""
    text = (Path(__file__).parents[3] / "docs" / "what_trains.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    ways = [
        ("llava-v1.6-mistral-7b-hf", LoraArguments(**LORA), True),
        ("llava-v1.6-mistral-7b-hf", LoraArguments(**ON_TOWER), True),
        ("llava-v1.6-mistral-7b-hf", LoraArguments(**LORA), False),
        ("llava-v1.6-mistral-7b-hf", None, False),
        ("llava-v1.6-34b-hf", LoraArguments(**ON_TOWER), True),
    ]
    for row, (name, lora, freeze) in zip(rows, ways, strict=True):
        config = jnana_config_from_llava(AutoConfig.from_pretrained(FIXTURES / f"llava-hf--{name}"))
        with torch.device("meta"):
            model = JnanaForConditionalGeneration(config).to(torch.bfloat16)
            model = apply_stage(model, "sft", lora, freeze_vision_tower=freeze)
        parts = list(training_memory(model).values())
        assert row == tuple(f"{num_bytes / 1e9:.1f}" for num_bytes in (*parts, sum(parts)))
        if lora is not None and not freeze:
            assert describe_parameters(model, "sft") in text
    shards = training_memory(model, 8)
    assert (
        f"| FSDP2 | {sum(shards.values()) / 1e9:.1f} GB |" in (RECIPES.parent / "docs" / "distributed.md").read_text()
    )


def known(recipe: Path, key: str) -> list[str]:
    """A command line with one option of a recipe."""
    return as_command_line({key: read_recipe(recipe)[key], "tokenizer_name_or_path": "x"})

"""The files of recipes/accelerate: accelerate reads each file, all fields are known, and the layers to wrap exist."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.training.options.arguments import LoraArguments
from jnana.training.stages import apply_stage
from tests.scripts.sharding import CONFIGS, launch_environment
from tests.tiny import tiny_text_config, tiny_vision_config


KINDS = {
    "one_gpu": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "several_nodes": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def unknown_fields(file: Path) -> set[str]:
    """Fields of the file's engine section that `accelerate launch` would pass by in silence."""
    content = yaml.safe_load(file.read_text())
    options = {action.dest for action in launch_command_parser()._actions}
    return {key for name in ("fsdp_config", "deepspeed_config") for key in content.get(name, {})} - options


def test_every_file_is_listed():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    file = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(file))  # raises for a field it does not know
    assert config.distributed_type == KINDS[name]
    assert config.num_processes % config.num_machines == 0
    assert not unknown_fields(file)


def test_a_misspelt_field_is_noticed(tmp_path):
    """The control for both ways of looking."""
    text = (CONFIGS / "fsdp2.yaml").read_text()
    (tmp_path / "top.yaml").write_text(text.replace("num_machines", "num_machine"))
    with pytest.raises(ValueError, match="num_machine"):
        load_config_from_file(str(tmp_path / "top.yaml"))
    (tmp_path / "inner.yaml").write_text(text.replace("fsdp_version", "fsdp_versoin"))
    assert unknown_fields(tmp_path / "inner.yaml") == {"fsdp_versoin"}


WAYS = {
    "no adapter": None,
    "adapter": {"lora": LoraArguments(lora_r=2)},
    "on the tower too": {"lora": LoraArguments(lora_r=2, lora_vision_target_modules=["all-linear"])},
    "whole tower": {"lora": LoraArguments(lora_r=2), "freeze_vision_tower": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_fsdp2_wraps_our_layers(vision, way, monkeypatch):
    """From `_no_split_modules`: CLIP's own list also names its text half, which the tower does not hold."""
    for key, value in launch_environment("fsdp2.yaml", 2).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    config = JnanaConfig.from_vision_text_configs(tiny_vision_config(vision), tiny_text_config("phi"))
    model = JnanaForConditionalGeneration(config)
    if WAYS[way] is not None:
        model = apply_stage(model, "sft", **WAYS[way])
    plugin.set_auto_wrap_policy(model)
    wrapped = {cls.__name__ for cls in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert "PhiDecoderLayer" in wrapped
    assert {"clip": "CLIPEncoderLayer", "siglip": "SiglipEncoderLayer", "dinov2": "Dinov2Layer"}[vision] in wrapped
    assert wrapped <= {type(module).__name__ for module in model.modules()}

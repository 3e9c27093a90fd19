"""FSDP2 and ZeRO on CPUs: the variables of `accelerate launch --config_file`, and how the tests enable FSDP2 there."""

import os
from pathlib import Path

from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from jnana.modeling import JnanaModel


CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
# stock: the process group that `shard_on_cpu` prepared is used instead of a new one
CONFIGURED = '--accelerator_config={"use_configured_state": true, "dispatch_batches": false}'


def launch_environment(name: str, processes: int) -> dict[str, str]:
    """The environment variables that `accelerate launch` itself sets for one of our configuration files."""
    command = ["--config_file", str(CONFIGS / name), "--num_processes", str(processes), "--mixed_precision", "no"]
    options, defaults, _ = _validate_launch_command(launch_command_parser().parse_args([*command, "script.py"]))
    options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    made = prepare_deepspeed_cmd_env(options)[1] if options.use_deepspeed else prepare_multi_gpu_env(options)
    return {key: value for key, value in made.items() if os.environ.get(key) != value}


def shard_on_cpu() -> None:
    """Set the distributed type of GPUs, because accelerate otherwise trains with DDP on CPUs without a message."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    watch_imageless()


def use_deepspeed() -> None:
    """DeepSpeed over gloo alone: its own module for one machine takes a minute to compile, and waits actively."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    watch_imageless()


def watch_imageless() -> None:
    """Print a line whenever this process has a batch without an image."""
    original = JnanaModel._encode_blank_image

    def touch(self, *given):
        print("a batch without an image" if self.training else "evaluated without an image")
        return original(self, *given)

    JnanaModel._encode_blank_image = touch

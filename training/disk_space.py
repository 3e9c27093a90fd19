"""Room for what a run writes, counted before it trains: what its checkpoints hold at least, and the final files."""

import logging
import shutil
from pathlib import Path

from peft import PeftModel
from torch import nn
from transformers import Trainer

from jnana.modeling.loading_jnana import quantized_weight_count

from .checkpoints import checkpoint_problem, list_checkpoints
from .optimizers import MuonWithAdamW


logger = logging.getLogger(__name__)

# Numbers that an optimizer of the Trainer's surely keeps for each weight that trains. Of others nothing is counted.
NUMBERS_KEPT = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit"), 2),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), 2),
    **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"), 1),
    **dict.fromkeys(("rmsprop", "adagrad"), 1),
}


def check_disk_space(trainer: Trainer, merge: bool = False) -> None:
    """Refuse a run whose first checkpoint surely cannot fit, before it trains; warn where all it will keep may not.

    Args:
        trainer (`Trainer`): Of the run.
        merge (`bool`, defaults to `False`): Whether `output_dir/merged` is written at the end.

    Raises:
        ValueError: naming `output_dir`, what a checkpoint takes, what is free, and checkpoints that are not whole.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if not args.should_save:
        return
    weights = weights_size(trainer)
    checkpoint = weights if args.save_only_model else weights + resuming_size(trainer)
    # what is there already is written over: checkpoints that were cut off, and final files
    present = list_checkpoints(args.output_dir)
    broken = [] if args.save_only_model else [path for path in present if checkpoint_problem(path)]
    final = max(weights - bytes_of(folder.glob("*.safetensors")), 0)
    merged = max(merged_size(trainer.model) - bytes_of(folder.glob("merged/*")), 0) if merge else 0
    free, held = shutil.disk_usage(folder).free, sum(bytes_of(path.rglob("*")) for path in broken)
    # the new checkpoint is written before the oldest goes
    whole = len(present) - len(broken)
    kept = whole if args.save_total_limit is None else args.save_total_limit
    new = 0 if str(args.save_strategy.value) == "no" else max(kept + 1 - whole, 1)
    first, wanted = checkpoint if new else final, checkpoint * new + final + merged
    room = f"output_dir {args.output_dir!r} has {size(free)} free"
    if broken:
        names = ", ".join(path.name for path in broken)
        room += f", and {size(held)} in checkpoints that are not whole and may be deleted ({names})"
    if free + held < first:
        what = f"one checkpoint ({size(weights)} of weights, the rest the optimizer's)" if new else "the final weights"
        raise ValueError(f"{room}, but needs at least {size(first)} for {what}; make room, or choose another")
    if free + held < wanted:
        last = f"the final weights, and {size(merged)} for the merged model" if merge else "and the final weights"
        logger.warning(
            f"{room}; the run may need {size(wanted)} (at least {size(checkpoint)} a checkpoint, save_total_limit "
            f"{args.save_total_limit}, one more while it is written, {last})"
        )


def weights_size(trainer: Trainer) -> int:
    """Bytes of the weights that a checkpoint holds: an adapter's and what trains beside it, or all."""
    adapter = isinstance(trainer.model, PeftModel)
    held = [p for p in trainer.model.parameters() if p.requires_grad or not adapter]
    if trainer.is_deepspeed_enabled:  # in 16 bits, whatever the model was loaded in
        return sum(count(p) * min(p.element_size(), 2) for p in held)
    return sum(count(p) * p.element_size() for p in held)


def resuming_size(trainer: Trainer) -> int:
    """Bytes that a checkpoint holds at least beside the weights, so that training can go on: the optimizer's, mostly.

    ZeRO's own copies of the weights are not counted: how many there are is up to its stage and settings.
    """
    deepspeed, fsdp = trainer.accelerator.state.deepspeed_plugin, trainer.is_fsdp_enabled
    chosen, arguments = trainer.optimizer_cls_and_kwargs or (None, {})
    copy = 0
    if fsdp and "FULL_STATE_DICT" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        copy = weights_size(trainer)  # once more, in FSDP's own form
    if deepspeed is not None and "optimizer" in deepspeed.deepspeed_config:
        return copy  # not the recipe's optimizer
    if chosen is MuonWithAdamW:  # a momentum for hidden matrices, AdamW's two numbers for the others
        groups = arguments["params"]
        return copy + sum(count(p) * (4 if group["muon"] else 8) for group in groups for p in group["params"])
    name = trainer.args.optim.value
    trained = sum(count(p) for p in trainer.model.parameters() if p.requires_grad)
    return copy + trained * NUMBERS_KEPT.get(name, 0) * (1 if "8bit" in name else 4)


def merged_size(model: PeftModel) -> int:
    """Bytes of the whole model in full precision, about: the adapter's own weights are counted in."""
    base = model.get_base_model()
    return sum(map(count, base.parameters())) * base.dtype.itemsize


def count(parameter: nn.Parameter) -> int:
    """How many numbers a weight stands for, packed in 4 bits or cut over the processes as it may be."""
    return getattr(parameter, "ds_numel", None) or quantized_weight_count(parameter)


def bytes_of(paths) -> int:
    """Bytes of the files among `paths`."""
    return sum(path.stat().st_size for path in paths if path.is_file())


def size(num_bytes: float) -> str:
    """Bytes as people read them: `75 kB`, `1.2 MB`."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= step:
            return f"{num_bytes / step:,.0f} {unit}" if num_bytes >= 10 * step else f"{num_bytes / step:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"

"""Room for the checkpoints of a run, counted before it trains: weights, and what the optimizer keeps beside them."""

import logging
import shutil

from peft import PeftModel
from torch import nn
from transformers import Trainer

from .checkpoints import list_checkpoints
from .optimizers import MuonWithAdamW


logger = logging.getLogger(__name__)

# Numbers that an optimizer of the Trainer's keeps for each weight that trains, by a part of its name; the others two.
NUMBERS_KEPT = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}


def check_disk_space(trainer: Trainer) -> None:
    """Refuse a run whose first checkpoint cannot fit, before it trains; warn where those to be kept may not.

    Raises:
        ValueError: naming `output_dir`, what a checkpoint takes and what is free.
    """
    args = trainer.args
    if not args.should_save:
        return
    weights = weights_size(trainer)
    checkpoint = weights if args.save_only_model else weights + resuming_size(trainer)
    free = shutil.disk_usage(args.output_dir).free
    present = len(list_checkpoints(args.output_dir))
    # the new one is written before the oldest goes, and the final weights come on top
    kept = present if args.save_total_limit is None else args.save_total_limit
    new = 0 if str(args.save_strategy.value) == "no" else max(kept + 1 - present, 1)
    first, wanted = checkpoint if new else weights, checkpoint * new + weights
    if free < first:
        raise ValueError(
            f"output_dir {args.output_dir!r} has {free / 1e6:,.0f} MB free, but one checkpoint takes about "
            f"{first / 1e6:,.0f} MB (weights {weights / 1e6:,.0f} MB, the rest the optimizer's); make room, or choose "
            "another"
        )
    if free < wanted:
        logger.warning(
            f"output_dir {args.output_dir!r} has {free / 1e6:,.0f} MB free; the run may need {wanted / 1e6:,.0f} MB "
            f"(about {checkpoint / 1e6:,.0f} MB a checkpoint, save_total_limit {args.save_total_limit}, one more "
            "while it is written, and the final weights)"
        )


def weights_size(trainer: Trainer) -> int:
    """Bytes of the weights that a checkpoint holds: an adapter's, or the whole model's."""
    adapter = isinstance(trainer.model, PeftModel)
    return sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad or not adapter)


def resuming_size(trainer: Trainer) -> int:
    """Bytes that a checkpoint holds beside the weights, so that training can go on: above all the optimizer's."""
    counts = {id(p): p.numel() for p in trainer.model.parameters() if p.requires_grad}
    chosen, arguments = trainer.optimizer_cls_and_kwargs or (None, {})
    if chosen is MuonWithAdamW:  # a momentum for hidden matrices, AdamW's two numbers for the others
        size = sum(
            counts[id(p)] * (4 if group["muon"] else 8) for group in arguments["params"] for p in group["params"]
        )
    else:
        name = trainer.args.optim.value
        numbers = next((number for part, number in NUMBERS_KEPT.items() if part in name), 2)
        # the Trainer has bitsandbytes keep 32 bits for embeddings
        embeddings = {id(m.weight) for m in trainer.model.modules() if isinstance(m, nn.Embedding)}
        small = "8bit" in name
        size = sum(n * numbers * (1 if small and key not in embeddings else 4) for key, n in counts.items())
    if (
        trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    ):  # they keep the whole model once more, in their own form
        size += sum(p.nbytes for p in trainer.model.parameters())
    if trainer.is_deepspeed_enabled:  # and float32 copies of what trains
        size += sum(counts.values()) * 4
    return size

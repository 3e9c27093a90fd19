"""The first and the last step of every training script: logging and seed, then saving, the card and the push."""

import json
import logging
import os
import sys
from pathlib import Path

from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments, set_seed

from jnana.modeling import PROJECTOR_FIELDS, JnanaConfig

from .disk_space import check_disk_space
from .interruption import explain_full_disk, restored_signals
from .sharing import push_folder


logger = logging.getLogger(__name__)

TEXT_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def start_run(args: TrainingArguments) -> None:
    """Log to stdout, every line once per process group, and seed whatever is drawn before the Trainer seeds again."""
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    logging.basicConfig(stream=sys.stdout, level=level, format="%(message)s", force=True)
    for name in ("httpx", "fsspec", "datasets", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logger.info(
        f"{args.world_size} process(es), {args.parallel_mode.value}, on {args.device}; output in {args.output_dir}"
    )
    set_seed(args.seed)


def is_finished(checkpoint: str | None, trainer: Trainer) -> bool:
    """Whether a checkpoint is the end of the run that is asked for now: the Trainer would take one step too many from
    there. What counts are the steps that today's `max_steps`, or epochs of today's data, come to."""
    if checkpoint is None:
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    wanted = trainer.args.max_steps
    if wanted <= 0:  # the last of the Trainer's own numbers
        *_, wanted = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    return state["global_step"] >= wanted


def check_same_model(model: nn.Module, checkpoint: str) -> None:
    """Refuse to resume a run with another model: the Trainer would take what fits and leave the rest as it is.

    Raises:
        ValueError: naming the checkpoint, the option, both values and the remedy.
    """
    remedy = "give the run's own options, another output_dir, or overwrite_output_dir: true to start anew"
    adapter = isinstance(model, PeftModel)
    holds_adapter = (Path(checkpoint) / "adapter_config.json").is_file()
    if not holds_adapter and not (Path(checkpoint) / "config.json").is_file():
        return  # sharded weights without a config
    if adapter != holds_adapter:
        held, wanted = ("a whole model", "an adapter") if adapter else ("an adapter", "a whole model")
        raise ValueError(f"{checkpoint} holds {held}, but this run trains {wanted} (lora_r); {remedy}")
    if adapter:
        now, saved = model.peft_config["default"], PeftConfig.from_pretrained(checkpoint)
        names = ("r", "lora_alpha")
    else:
        now, saved = model.config, type(model.config).from_pretrained(checkpoint)
        names = PROJECTOR_FIELDS if isinstance(now, JnanaConfig) else TEXT_FIELDS
    for name in names:
        if getattr(now, name, None) != getattr(saved, name, None):
            raise ValueError(
                f"{checkpoint} was trained with {name} {getattr(saved, name, None)!r}, this run has "
                f"{getattr(now, name, None)!r}; {remedy}"
            )


def train(trainer: Trainer, checkpoint: str | None, merge: bool = False) -> None:
    """Train from `checkpoint` on, or only take the run's weights when it is the end of the run.

    Args:
        trainer (`Trainer`): Of the run.
        checkpoint (`str`, *optional*): Where to go on from.
        merge (`bool`, defaults to `False`): Whether a merged model is written too, and needs room.

    Raises:
        ValueError: If the checkpoint is another model's, or the end of a run under DeepSpeed.
    """
    if checkpoint is not None:
        check_same_model(trainer.model, checkpoint)
    # set only now, for the dataloader's workers: tokenizing and checking the data was faster with it
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_finished(checkpoint, trainer):
        check_disk_space(trainer, merge)
        with restored_signals(trainer), explain_full_disk(trainer.args):
            trainer.train(resume_from_checkpoint=checkpoint)
        return
    if trainer.is_deepspeed_enabled:  # its engine, which alone saves, is made by training
        raise ValueError(
            f"{checkpoint} is the end of this run, and its weights are whole. If {trainer.args.output_dir} itself has "
            "none, start it once without DeepSpeed; a larger max_steps or num_train_epochs would go on"
        )
    logger.info(
        f"{checkpoint} is the end of this run: nothing is trained, the final files are written again (a larger "
        "max_steps or num_train_epochs would go on)"
    )
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    trainer._load_from_checkpoint(best or checkpoint)


def finish_run(trainer: Trainer) -> None:
    """Save a complete checkpoint with its card in `output_dir`, and push it when asked to."""
    with explain_full_disk(trainer.args):
        trainer.save_model(_internal_call=True)  # or the Trainer would push, and push everything
        trainer.save_state()
        trainer.create_model_card()
    args = trainer.args
    if args.push_to_hub and trainer.is_world_process_zero():
        push_folder(args.output_dir, trainer.hub_model_id, token=args.hub_token, revision=args.hub_revision)

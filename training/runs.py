"""The first and the last step of every training script: logging and seed, then saving, the card and the push."""

import json
import logging
import sys
from pathlib import Path

from transformers import Trainer, TrainerState, TrainingArguments, set_seed


logger = logging.getLogger(__name__)


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


def is_finished(checkpoint: str | None, args: TrainingArguments) -> bool:
    """Whether a checkpoint is the end of its run: the Trainer would take one step too many from there."""
    if checkpoint is None:
        return False
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))
    wanted = args.max_steps if args.max_steps > 0 else state["max_steps"]
    same_epochs = args.max_steps > 0 or state["num_train_epochs"] == args.num_train_epochs
    return same_epochs and state["global_step"] >= wanted


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """Train from `checkpoint` on, or only take its weights when it is the end of the run."""
    if not is_finished(checkpoint, trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    logger.info(f"{checkpoint} is the end of this run: nothing is trained, the final files are written again")
    trainer._load_from_checkpoint(checkpoint)  # what Trainer.train itself calls first
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))


def finish_run(trainer: Trainer) -> None:
    """Save a complete checkpoint with its card in `output_dir`, and push it when asked to."""
    trainer.save_model()
    trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()

"""Code of the training scripts around `Trainer`: logging and seed, the collator, training, saving and sharing."""

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, set_seed

from jnana.modeling import PROJECTOR_FIELDS, JnanaConfig
from jnana.processing import JnanaProcessor
from jnana.processing.data import JnanaCollator

from .attention import choose_attention, row_multiple
from .cards import write_model_card
from .console import log_to_stdout
from .data import collator_options
from .diagnosis import watched
from .distributed import run_on_main_process, unpartitioned
from .feature_cache import prepare_feature_cache
from .merging import merge_adapter
from .options.arguments import DataArguments, ModelArguments, RunArguments, TextDataArguments, TextModelArguments
from .options.recipe_record import check_same_data, data_fingerprint, write_record
from .saving.checkpoints import check_disk_space, checkpoint_to_resume, delete_checkpoints, list_checkpoints, step_of
from .saving.frozen_weights import copy_whole_weights, shared_frozen_weights, shares_frozen_weights
from .saving.interruption import explain_full_disk, restored_signals
from .saving.rotation import finished_checkpoints, rotate_finished_run
from .saving.run_lock import check_directories, hold_directory
from .sharing import published_files, push_folder


logger = logging.getLogger(__name__)

TEXT_FIELDS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def start_run(args: TrainingArguments) -> None:
    """Log to stdout, each line once per process group, and seed: weights are initialised before the Trainer seeds."""
    level = logging.INFO if args.process_index == 0 else logging.WARNING
    log_to_stdout(level)
    logger.info(
        f"{args.world_size} process(es), {args.parallel_mode.value}, on {args.device}; output in {args.output_dir}"
    )
    set_seed(args.seed)


def find_checkpoint(args: TrainingArguments, run_args: RunArguments) -> str | None:
    """Hold `output_dir` for this run, then decide where training starts; the first process does both, for all.

    Args:
        args (`TrainingArguments`): `output_dir`, `resume_from_checkpoint`.
        run_args (`RunArguments`): `overwrite_output_dir`.

    Returns:
        `str` or `None`: As [`checkpoint_to_resume`].

    Raises:
        ValueError: as [`checkpoint_to_resume`], or if another run writes into `output_dir`.
    """

    def find() -> str | None:
        hold_directory(args.output_dir)
        return checkpoint_to_resume(args.output_dir, args.resume_from_checkpoint, run_args.overwrite_output_dir)

    return run_on_main_process(find)


def prepare_collator(
    data_args: DataArguments,
    training_args: TrainingArguments,
    model: nn.Module,
    processor: JnanaProcessor,
    data: list[Dataset | IterableDataset | dict[str, Dataset] | None],
    needs_images: bool = False,
) -> JnanaCollator:
    """The collator of align and sft, with the feature cache that the recipe asks for.

    For packed rows this also sets the language model's attention implementation (see [`choose_attention`]), because
    the collator pads rows to the length that suits it.

    Args:
        data_args (`DataArguments`): Packing, lengths, what to do about bad rows, `feature_cache`.
        training_args (`TrainingArguments`): Device, precision, output directory.
        model (`JnanaForConditionalGeneration` or `PeftModel`): After [`apply_stage`].
        processor (`JnanaProcessor`): Renders and tokenises the conversations.
        data (`list[Dataset]`): Training rows and validation rows, or `None`; of several validation sources a `dict`.
        needs_images (`bool`, defaults to `False`): Whether a conversation without an image can't be used.
    """
    all_rows = [rows for each in data for rows in (each.values() if isinstance(each, dict) else [each])]
    images = prepare_feature_cache(data_args, model, processor, all_rows, training_args)
    attention = choose_attention(model, data_args.packing, training_args.device)
    multiple = row_multiple(attention, data_args.packing)
    options = collator_options(data_args, training_args.output_dir, needs_images)
    return JnanaCollator(processor, images=images, pad_to_multiple_of=multiple, **options)


def train(
    trainer: Trainer, checkpoint: str | None, run_args: RunArguments, options: dict[str, Any], *, merge: bool = False
) -> None:
    """Train from `checkpoint` on and save the final weights, configs and processor in `output_dir`.

    If the checkpoint is the end of the run, nothing is trained and its files are copied to `output_dir`.

    Args:
        trainer (`Trainer`): The run's.
        checkpoint (`str`, *optional*): Directory of the checkpoint to resume from.
        run_args (`RunArguments`): With `overwrite_output_dir` the run's old checkpoints are deleted first.
        options (`dict`): [`recipe_options`] of this start, for the record that a later start is compared with.
        merge (`bool`, defaults to `False`): Whether a merged model is written at the end, and needs space.

    Raises:
        ValueError: if the checkpoint is of another model or other data, or the disk has no space for one checkpoint.
        LostDirectory: if another run has taken `output_dir` because this one stood still.
    """
    run_on_main_process(check_directories)  # reading the data may have taken hours
    if run_args.overwrite_output_dir and trainer.args.should_save:
        delete_checkpoints(trainer.args.output_dir)
    fingerprint = data_fingerprint(trainer.train_dataset)
    if checkpoint is not None:
        check_same_data(checkpoint, fingerprint, run_args)
        check_same_model(trainer.model, checkpoint)
    # set after the data was tokenised, which is faster in parallel; the dataloader's workers would warn
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= planned_steps(trainer):
            restore_finished_run(trainer, checkpoint, state)
            return
    check_disk_space(trainer, merge)
    if trainer.args.should_save:
        output_dir, present = trainer.args.output_dir, list_checkpoints(trainer.args.output_dir)
        manifests_after = step_of(present[0]) if checkpoint is not None and present else 0
        write_record(output_dir, options, fingerprint, trainer.args.save_total_limit, manifests_after)
    trainer.add_callback(MovedRunCallback())
    with (
        watched(trainer),
        restored_signals(trainer),
        explain_full_disk(trainer.args),
        finished_checkpoints(trainer),
        shared_frozen_weights(trainer, checkpoint),
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
        run_on_main_process(check_directories)
        # Without `_internal_call` the Trainer would push, and push everything that lies in output_dir.
        trainer.save_model(_internal_call=True)


def planned_steps(trainer: Trainer) -> int:
    """The number of optimizer steps that today's `max_steps`, or epochs of today's data, come to."""
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    steps_per_epoch = math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps)
    return math.ceil(args.num_train_epochs * max(steps_per_epoch, 1))


def restore_finished_run(trainer: Trainer, checkpoint: str, state: TrainerState) -> None:
    """Copy the files of a run's last (or best) checkpoint to `output_dir`, because nothing is left to train.

    `Trainer.train` would take one step too many from there. Checkpoints beyond the run's `save_total_limit` are
    deleted: it may have been killed before it did so.

    Raises:
        ValueError: if the checkpoint holds sharded weights only.
    """
    best = moved_checkpoint(state, trainer.args) if trainer.args.load_best_model_at_end else None
    source = best or checkpoint
    run_on_main_process(check_directories)
    if trainer.args.should_save:
        limit = trainer.args.save_total_limit
        rotate_finished_run(trainer.args.output_dir, checkpoint, limit, state.best_model_checkpoint)
    if not list(Path(source).glob("*.safetensors")):
        raise ValueError(
            f"{checkpoint} is the end of this run, but {source} holds sharded weights only, which training alone can "
            "read; a larger max_steps or num_train_epochs continues from it"
        )
    logger.info(
        f"{checkpoint} is the end of this run: nothing is trained, its files are copied to {trainer.args.output_dir} "
        "(a larger max_steps or num_train_epochs continues from it, with `--allow_changed max_steps "
        "num_train_epochs` unless the learning rate is constant)"
    )
    trainer.state = state
    if trainer.args.should_save:
        with explain_full_disk(trainer.args):
            shared = shares_frozen_weights(source)
            if shared:
                copy_whole_weights(source, trainer.args.output_dir)
            for file in published_files(source):
                if shared and ".safetensors" in file.name:
                    continue
                shutil.copyfile(file, Path(trainer.args.output_dir) / file.name)
    trainer.accelerator.wait_for_everyone()


def moved_checkpoint(state: TrainerState, args: TrainingArguments) -> str | None:
    """The best checkpoint of a run, in `output_dir` if the run was moved since: the state holds its old path.

    Raises:
        ValueError: if it is in neither place.
    """
    best = state.best_model_checkpoint
    if best is None or Path(best).is_dir():
        return best
    moved = Path(args.output_dir) / Path(best).name
    if not moved.is_dir():
        raise ValueError(
            f"load_best_model_at_end is true, but the best checkpoint {best!r} does not exist, nor {str(moved)!r}; "
            "put it back, or set load_best_model_at_end: false"
        )
    return str(moved)


class MovedRunCallback(TrainerCallback):
    """After a resume, names the best checkpoint where it is now; the Trainer would not load it at the end."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.load_best_model_at_end:
            state.best_model_checkpoint = moved_checkpoint(state, args)


def check_same_model(model: nn.Module, checkpoint: str) -> None:
    """Check that a run is resumed with the model it was started with; the Trainer would load the weights that fit.

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


def finish_run(
    trainer: Trainer,
    stage: str,
    model_args: ModelArguments | TextModelArguments,
    data_args: DataArguments | TextDataArguments,
    recipe: str | None = None,
) -> None:
    """Save the Trainer's state and the model card in `output_dir`, and push the checkpoint with `push_to_hub`.

    Args:
        trainer (`Trainer`): After [`train`].
        stage, model_args, data_args, recipe: As for [`write_model_card`].
    """
    args = trainer.args
    run_on_main_process(check_directories)
    with explain_full_disk(args):
        trainer.save_state()
        if trainer.is_world_process_zero():
            write_model_card(trainer, stage, model_args, data_args, recipe)
    if args.push_to_hub and trainer.is_world_process_zero():
        push_folder(args.output_dir, trainer.hub_model_id, token=args.hub_token, revision=args.hub_revision)


def merge_trained_adapter(args: TrainingArguments, merge_base: str, device_map: str | None = None) -> None:
    """Write `output_dir/merged` from the adapter in `output_dir`; for the process that saves.

    Args:
        args (`TrainingArguments`): Of the run, which has ended and whose model is freed.
        merge_base (`str`): `dequantized` or `full`.
        device_map (`str`, *optional*): Of the run; a model that was spread over GPUs is merged on the CPU.
    """
    merged = f"{args.output_dir}/merged"
    remedy = (
        "The adapter is complete; make room, and run: python -m jnana.run_merge --model_name_or_path "
        f"{args.output_dir} --output_dir {merged} --merge_base {merge_base}"
    )
    with explain_full_disk(args, remedy), unpartitioned(args, whole=True):
        device = args.device if device_map is None else torch.device("cpu")
        merge_adapter(args.output_dir, merged, merge_base, device=device)

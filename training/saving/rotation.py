"""Finishes each checkpoint with its manifest, then deletes old ones by step number; the Trainer deletes none.

The Trainer would rotate by modification time, inside its saving: with a clock set back it deletes every new
checkpoint, and it counts folders that are half deleted.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from torch import distributed
from transformers import Trainer, TrainerCallback

from jnana.processing.data.files import file_stamp
from jnana.training.distributed import run_on_main_process
from jnana.training.monitoring import LossCurveCallback
from jnana.training.options.recipe_record import read_record

from .checkpoints import checkpoint_problem, list_checkpoints, remove_checkpoint, remove_leftovers, step_of
from .interruption import StopSignalCallback
from .manifests import MANIFEST, PassingProblem, write_manifest
from .run_lock import check_directories


logger = logging.getLogger(__name__)


class FinishedCheckpointCallback(TrainerCallback):
    """Writes the manifest of a checkpoint when all its files are there, and deletes those beyond `save_total_limit`.

    It must come after all callbacks that write into a checkpoint. While it trains, the Trainer is not told the limit.
    """

    def __init__(self):
        self.limit: int | None = None
        self.digests: dict[tuple[int, ...], str] = {}  # of frozen weights, which the checkpoints share

    def on_train_begin(self, args, state, control, **kwargs):
        self.limit, args.save_total_limit = args.save_total_limit, None
        if args.should_save:
            remove_leftovers(args.output_dir)
            for folder in list_checkpoints(args.output_dir):
                problem = damage_of(folder, with_optimizer=not args.save_only_model)
                if step_of(folder) > state.global_step and problem:
                    logger.info(f"deleting {folder}, which this run will write again: {problem}")
                    remove_checkpoint(folder)

    def on_save(self, args, state, control, **kwargs):
        if distributed.is_initialized():
            distributed.barrier()  # each process writes its random state, and its shards
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        run_on_main_process(check_directories)  # the writing may have stood still: then nothing is deleted
        if args.should_save and folder.is_dir():
            write_manifest(folder, self.digests)
            rotate(folder, self.limit, state.best_model_checkpoint, with_optimizer=not args.save_only_model)


class HeldDirectoryCallback(TrainerCallback):
    """Ends a run that has lost its output directory to another one, before it saves a checkpoint there.

    It must come after all callbacks that ask for a checkpoint. An evaluation, which may take hours, comes between that
    and the saving. Every process raises the error: one that goes on would wait for the others.
    """

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            run_on_main_process(check_directories)

    on_epoch_end = on_step_end

    def on_evaluate(self, args, state, control, **kwargs):
        run_on_main_process(check_directories)


def rotate(newest: Path, limit: int | None, best: str | None, with_optimizer: bool = True) -> None:
    """Delete the oldest checkpoints of a run until `limit` are left, and broken ones, which do not count.

    `newest` and the best one are always kept, and so are later ones: they were written before the run was resumed
    from an earlier step, and it will write them again.

    Args:
        newest (`Path`): The checkpoint that was written last, with its manifest.
        limit (`int`, *optional*): As `save_total_limit`; `None` or 0 deletes nothing.
        best (`str`, *optional*): The best checkpoint.
        with_optimizer (`bool`, defaults to `True`): Whether one without an optimizer counts as broken.
    """
    output_dir = str(newest.parent)
    remove_leftovers(output_dir)
    if not limit or limit < 0:
        return
    earlier = [folder for folder in list_checkpoints(output_dir) if step_of(folder) <= step_of(newest)]
    kept = {newest.name} | ({Path(best).name} if best else set())
    whole = []
    for folder in earlier:  # the latest first
        problem = damage_of(folder, with_optimizer)
        if problem is None or folder.name in kept:
            whole.append(folder)
        else:
            logger.info(f"deleting {folder}, which is broken: {problem}")
            remove_checkpoint(folder)
    others = [folder for folder in whole if folder.name not in kept]
    for folder in others[max(limit - (len(whole) - len(others)), 0) :]:
        logger.info(f"deleting {folder}, as save_total_limit is {limit}")
        remove_checkpoint(folder)


def rotate_finished_run(output_dir: str, checkpoint: str, limit: int | None, best: str | None) -> None:
    """Delete what a run would have deleted had it not been killed after its last checkpoint was written.

    By the larger of two `save_total_limit`s, that of the last start that trained and that of this one, which trains
    nothing. None is deleted of a run that was resumed from an earlier step and has written checkpoints after its end.

    Args:
        output_dir (`str`): The run's directory.
        checkpoint (`str`): The end of the run, perhaps a copy under another name or another run's.
        limit (`int`, *optional*): As in [`rotate`], of this start.
        best (`str`, *optional*): The best checkpoint.
    """
    remove_leftovers(output_dir)
    folders = list_checkpoints(output_dir)
    end = next((folder for folder in folders if folder.resolve() == Path(checkpoint).resolve()), None)
    if end is None or any(written_after(folder, end) for folder in folders if step_of(folder) < step_of(end)):
        return
    limits = [limit or 0, (read_record(str(end)) or {}).get("save_total_limit") or 0]
    if min(limits) > 0:
        rotate(end, max(limits), best, with_optimizer=False)


def written_after(folder: Path, other: Path) -> bool:
    """Whether the manifest of a checkpoint is newer than that of another one, by their times."""
    stamps = [file_stamp(str(each / MANIFEST)) for each in (folder, other)]
    return None not in stamps and stamps[0][1] > stamps[1][1]


def damage_of(folder: Path, with_optimizer: bool = True) -> str | None:
    """As [`checkpoint_problem`], but `None` too for a problem that may pass: on it nothing is deleted."""
    try:
        problem = checkpoint_problem(folder, read=False, with_optimizer=with_optimizer)
    except OSError as error:
        problem = PassingProblem(f"it cannot be read ({error.strerror})")
    if isinstance(problem, PassingProblem):
        logger.warning(f"{folder} is kept, although {problem}")
        return None
    return problem


@contextlib.contextmanager
def finished_checkpoints(trainer: Trainer) -> Iterator[None]:
    """Within the block the Trainer's checkpoints get manifests and are rotated here.

    Of the callbacks, those that write into a checkpoint come first, then the manifest, then pictures, then the exit
    after a signal; last the one that ends a run which has lost its directory.
    """
    limit, finish = trainer.args.save_total_limit, FinishedCheckpointCallback()
    last = [trainer.pop_callback(LossCurveCallback), trainer.pop_callback(StopSignalCallback)]
    held = HeldDirectoryCallback()
    for callback in (finish, *last, held):
        if callback is not None:
            trainer.add_callback(callback)
    try:
        yield
    finally:
        trainer.args.save_total_limit = limit
        trainer.remove_callback(finish)
        trainer.remove_callback(held)

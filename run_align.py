"""Stage 1: join an image encoder and a frozen language model by training the projector between them.

The image encoder is frozen too, unless `freeze_vision_tower: false` trains it with the projector.

    accelerate launch run_align.py recipes/jnana/align.yaml
    accelerate launch run_align.py recipes/era_capstone/align.yaml --learning_rate 1e-4 --output_dir outputs/mine
    accelerate launch --num_processes 8 run_align.py recipes/llava_chess/align.yaml --bf16 true

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_align.py recipes/...

Started again, an interrupted run resumes from its last complete checkpoint; on SIGTERM or Ctrl-C it writes one first.
`python run_align.py --help` lists all options.
"""

import sys

from transformers import Trainer, TrainingArguments

from jnana.training.data import load_training_data
from jnana.training.distributed import main_process_first, run_on_main_process
from jnana.training.model_setup import frozen_dtype, prepare_model, prepare_processor, run_image_backend
from jnana.training.monitoring import evaluation_hooks, monitoring_callbacks
from jnana.training.optimizers import PartScheduleCallback, trainer_optimizer
from jnana.training.options.arguments import DataArguments, ModelArguments, PartArguments, RunArguments
from jnana.training.options.computation_checks import check_computation
from jnana.training.options.model_checks import check_no_adapter, limit_to_context
from jnana.training.options.option_checks import check_run
from jnana.training.options.part_checks import check_parts
from jnana.training.options.recipe_record import check_same_recipe, recipe_options
from jnana.training.options.recipes import parse_arguments, recipe_name
from jnana.training.profiling.forecast import forecast_run
from jnana.training.run import find_checkpoint, finish_run, prepare_collator, start_run, train
from jnana.training.saving.interruption import StopSignalCallback
from jnana.training.saving.run_lock import releases_directory
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage


@releases_directory
def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (ModelArguments, DataArguments, PartArguments, RunArguments, TrainingArguments)
    model_args, data_args, part_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Checks that need no model
    check_run(training_args, model_args, data_args, run_args)
    check_no_adapter(model_args)
    model_args.dtype = frozen_dtype(model_args)
    check_parts(part_args, training_args, data_args)
    check_computation(training_args, model_args, run_args.optimizer)
    check_push(training_args)

    # 3. Checkpoint to resume from, and the processor: its library that resizes images is an option of the run, too
    checkpoint = find_checkpoint(training_args, run_args)
    backend = run_on_main_process(lambda: run_image_backend(model_args))
    with main_process_first():
        processor = prepare_processor(model_args, backend)
    model_args.image_backend = processor.image_backend
    options = recipe_options(model_args, data_args, part_args, run_args, training_args)
    check_same_recipe(checkpoint, options, run_args)

    # 4. Data: the first process prepares and checks them, the others read what it cached
    limit_to_context(data_args, model_args)
    train_rows, eval_rows = load_training_data(data_args, training_args, processor, needs_images=True)

    # 5. Model: the projector trains, and perhaps the tower; its memory is forecast before weights are read
    arguments = (model_args, data_args, run_args, part_args)
    forecast_run("align", training_args, *arguments, processor=processor, rows=train_rows)
    model = prepare_model(model_args, processor, training_args)
    model = apply_stage(model, "align", None, data_args.packing, part_args.freeze_vision_tower)

    # 6. Trainer
    rows = [train_rows, eval_rows]
    collator = prepare_collator(data_args, training_args, model, processor, rows, needs_images=True)
    callbacks = monitoring_callbacks(run_args, eval_rows, processor)
    if part_args.given:
        callbacks.append(PartScheduleCallback(part_args))
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=[*callbacks, StopSignalCallback(run_args.save_minutes)],  # must be the last
        optimizer_cls_and_kwargs=trainer_optimizer(run_args.optimizer, model, training_args, part_args),
        **evaluation_hooks(data_args.on_bad_sample, training_args.world_size),
    )

    # 7. Train, save, share
    train(trainer, checkpoint, run_args, options)
    finish_run(trainer, "align", model_args, data_args, recipe_name(argv))


if __name__ == "__main__":
    main(sys.argv[1:])

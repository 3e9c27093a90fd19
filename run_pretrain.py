"""Stage 0: train a causal language model from random weights (or continue one) on a text corpus.

    accelerate launch run_pretrain.py recipes/era_capstone/pretrain.yaml --max_steps 400 --output_dir outputs/pythia
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 4 \\
        run_pretrain.py recipes/jnana/pretrain.yaml

The second command trains a Phi-2-shaped model on 4 GPUs of 24 GB: its weights, gradients and AdamW state are 44.5 GB,
which FSDP2 shards over the GPUs (counted in recipes/jnana/README.md).

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_pretrain.py recipes/...

Started again, an interrupted run resumes from its last complete checkpoint; on SIGTERM or Ctrl-C it writes one first.
`python run_pretrain.py --help` lists all options.
"""

import sys

from transformers import Trainer, TrainingArguments

from jnana.training.attention import text_collator
from jnana.training.data import prepare_text_data
from jnana.training.distributed import unpartitioned
from jnana.training.monitoring import evaluation_hooks, monitoring_callbacks
from jnana.training.optimizers import trainer_optimizer
from jnana.training.options.arguments import RunArguments, TextDataArguments, TextModelArguments
from jnana.training.options.computation_checks import check_computation
from jnana.training.options.option_checks import check_run
from jnana.training.options.recipe_record import check_same_recipe, recipe_options
from jnana.training.options.recipes import parse_arguments, recipe_name
from jnana.training.profiling.forecast import forecast_text_run
from jnana.training.run import find_checkpoint, finish_run, start_run, train
from jnana.training.saving.interruption import StopSignalCallback
from jnana.training.saving.run_lock import releases_directory
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage
from jnana.training.text_models import prepare_text_model


@releases_directory
def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (TextModelArguments, TextDataArguments, RunArguments, TrainingArguments)
    model_args, data_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Checks that need no model
    check_run(training_args, model_args, data_args, run_args)
    check_computation(training_args, model_args, run_args.optimizer, trains_language_model=True)
    check_push(training_args)

    # 3. Checkpoint to resume from
    checkpoint = find_checkpoint(training_args, run_args)
    options = recipe_options(model_args, data_args, run_args, training_args)
    check_same_recipe(checkpoint, options, run_args)

    # 4. Tokenizer and data: the first process of each machine prepares them for the others
    tokenizer, train_blocks, eval_blocks = prepare_text_data(model_args, data_args, checkpoint)

    # 5. Model: everything trains; its memory is forecast before weights are read
    forecast_text_run(training_args, model_args, run_args, tokenizer, train_blocks, data_args.packing)
    with unpartitioned(training_args, whole=True):
        model = apply_stage(prepare_text_model(model_args, tokenizer), "pretrain")

    # 6. Trainer
    callbacks = monitoring_callbacks(run_args, eval_blocks, tokenizer)
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=text_collator(model, data_args.packing, training_args.device),
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        callbacks=[*callbacks, StopSignalCallback(run_args.save_minutes)],  # must be the last
        optimizer_cls_and_kwargs=trainer_optimizer(run_args.optimizer, model, training_args),
        **evaluation_hooks("raise", training_args.world_size),
    )

    # 7. Train, save, share
    train(trainer, checkpoint, run_args, options)
    finish_run(trainer, "pretrain", model_args, data_args, recipe_name(argv))


if __name__ == "__main__":
    main(sys.argv[1:])

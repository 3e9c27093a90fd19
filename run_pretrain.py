"""Stage 0: train a causal language model from random weights (or go on with one) on a text corpus.

    accelerate launch run_pretrain.py recipes/jnana/pretrain.yaml
    accelerate launch run_pretrain.py recipes/era_capstone/pretrain.yaml --max_steps 400 --output_dir outputs/pythia
    accelerate launch --num_processes 4 run_pretrain.py recipes/jnana/pretrain.yaml --learning_rate 3e-4

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_pretrain.py recipes/...

A run that was cut off goes on from its last whole checkpoint when it is started again; SIGTERM writes one first.
`python run_pretrain.py --help` lists all options.
"""

import sys

from transformers import Trainer, TrainingArguments, default_data_collator

from jnana.training.arguments import RunArguments, TextDataArguments, TextModelArguments, parse_arguments, recipe_name
from jnana.training.callbacks import LossCurveCallback, SamplesCallback
from jnana.training.checkpoints import checkpoint_to_resume, delete_checkpoints
from jnana.training.checks import check_computation, check_models, check_run
from jnana.training.data import load_blocks, load_documents
from jnana.training.distributed import main_process_first
from jnana.training.evaluation_loss import evaluation_hooks
from jnana.training.interruption import StopSignalCallback
from jnana.training.model_card import use_our_card
from jnana.training.optimizers import trainer_optimizer
from jnana.training.runs import finish_run, start_run, train
from jnana.training.samples import samples_from_blocks
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage
from jnana.training.text_models import check_text_arguments, prepare_text_model, prepare_tokenizer


def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (TextModelArguments, TextDataArguments, RunArguments, TrainingArguments)
    model_args, data_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Everything that can be refused before a model is loaded
    check_text_arguments(model_args)
    check_models(model_args)
    check_run(training_args, data_args, run_args)
    check_computation(training_args, model_args, run_args.optimizer, trains_language_model=True)
    check_push(training_args)

    # 3. Where to start
    checkpoint = checkpoint_to_resume(
        training_args.output_dir, training_args.resume_from_checkpoint, run_args.overwrite_output_dir
    )

    # 4. Tokenizer and data: the first process prepares, the others read what it cached
    with main_process_first():
        tokenizer = prepare_tokenizer(model_args, load_documents(data_args), checkpoint)
        train_blocks = load_blocks(data_args, tokenizer)
        eval_blocks = load_blocks(data_args, tokenizer, evaluation=True)

    # 5. Model
    model = apply_stage(prepare_text_model(model_args, tokenizer), "pretrain")

    # 6. Trainer
    callbacks = [LossCurveCallback()]
    if run_args.sample_steps > 0:
        samples = samples_from_blocks(eval_blocks, tokenizer, run_args.sample_count, run_args.sample_max_new_tokens)
        callbacks.append(
            SamplesCallback(samples, tokenizer.decode, run_args.sample_steps, run_args.sample_max_new_tokens)
        )
    callbacks.append(StopSignalCallback())  # the last one: see there
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=default_data_collator,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        processing_class=tokenizer,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=trainer_optimizer(run_args.optimizer, model, training_args),
        **evaluation_hooks("raise", training_args.world_size),
    )
    use_our_card(trainer, "pretrain", model_args, data_args, recipe=recipe_name(argv))

    # 7. Train, save, share
    if run_args.overwrite_output_dir and training_args.should_save:
        delete_checkpoints(training_args.output_dir)
    train(trainer, checkpoint)
    finish_run(trainer)


if __name__ == "__main__":
    main(sys.argv[1:])

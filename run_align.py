"""Stage 1: join a frozen image encoder and a frozen language model by training the projector between them.

    accelerate launch run_align.py recipes/jnana/align.yaml
    accelerate launch run_align.py recipes/era_capstone/align.yaml --learning_rate 1e-4 --output_dir outputs/mine
    accelerate launch --num_processes 8 run_align.py recipes/llava_chess/align.yaml --bf16 true

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_align.py recipes/...

A run that was cut off goes on from its last whole checkpoint when it is started again; SIGTERM writes one first.
`python run_align.py --help` lists all options.
"""

import sys

from transformers import Trainer, TrainingArguments

from jnana.processing.data import JnanaCollator
from jnana.training.adapters import is_adapter
from jnana.training.arguments import DataArguments, ModelArguments, RunArguments, parse_arguments, recipe_name
from jnana.training.attention import check_attention, choose_attention, row_multiple
from jnana.training.callbacks import LossCurveCallback, SamplesCallback
from jnana.training.checkpoints import checkpoint_to_resume, delete_checkpoints
from jnana.training.checks import check_computation, check_models, check_run
from jnana.training.data import collator_options, load_conversations
from jnana.training.distributed import main_process_first
from jnana.training.evaluation_loss import evaluation_hooks
from jnana.training.feature_cache import prepare_feature_cache
from jnana.training.interruption import StopSignalCallback
from jnana.training.loading import check_model_arguments, prepare_model, prepare_processor
from jnana.training.model_card import use_our_card
from jnana.training.optimizers import trainer_optimizer
from jnana.training.runs import finish_run, start_run, train
from jnana.training.samples import samples_from_rows
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage


def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (ModelArguments, DataArguments, RunArguments, TrainingArguments)
    model_args, data_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Everything that can be refused before a model is loaded
    check_model_arguments(model_args)
    check_models(model_args)
    check_run(training_args, data_args, run_args)
    check_computation(training_args, model_args, run_args.optimizer)
    check_attention(model_args.attn_implementation, data_args.packing)
    if model_args.model_name_or_path is not None and is_adapter(model_args.model_name_or_path):
        raise ValueError(
            f"model_name_or_path {model_args.model_name_or_path!r} is an adapter; align from a full checkpoint "
            "(run_sft writes one with merge_adapter: true)"
        )
    check_push(training_args)

    # 3. Where to start
    checkpoint = checkpoint_to_resume(
        training_args.output_dir, training_args.resume_from_checkpoint, run_args.overwrite_output_dir
    )

    # 4. Processor and data: the first process prepares and checks, the others take what it cached and found
    with main_process_first():
        processor = prepare_processor(model_args)
    where = {"output_dir": training_args.output_dir, "should_write": training_args.should_save}
    train_rows = load_conversations(data_args, processor, seed=training_args.seed, **where)
    eval_rows = load_conversations(data_args, processor, evaluation=True, **where)

    # 5. Model: only the projector trains
    model = apply_stage(prepare_model(model_args, processor, training_args), "align", packing=data_args.packing)
    images = prepare_feature_cache(data_args, model, processor, [train_rows, eval_rows], training_args)
    attention = choose_attention(model, data_args, training_args.device, model_args.attn_implementation)

    # 6. Trainer
    multiple = row_multiple(attention, data_args.packing)
    options = collator_options(data_args, training_args.output_dir)
    collator = JnanaCollator(processor, images=images, pad_to_multiple_of=multiple, **options)
    callbacks = [LossCurveCallback()]
    if run_args.sample_steps > 0:
        samples = samples_from_rows(eval_rows, processor, run_args.sample_count)
        callbacks.append(
            SamplesCallback(samples, processor.decode, run_args.sample_steps, run_args.sample_max_new_tokens)
        )
    callbacks.append(StopSignalCallback())  # the last one: see there
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=collator,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=trainer_optimizer(run_args.optimizer, model, training_args),
        **evaluation_hooks(data_args.on_bad_sample, training_args.world_size),
    )
    use_our_card(trainer, "align", model_args, data_args, recipe=recipe_name(argv))

    # 7. Train, save, share
    if run_args.overwrite_output_dir and training_args.should_save:
        delete_checkpoints(training_args.output_dir)
    train(trainer, checkpoint)
    finish_run(trainer)


if __name__ == "__main__":
    main(sys.argv[1:])

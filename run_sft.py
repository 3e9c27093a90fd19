"""Stage 2: fine-tune on questions and answers about pictures; the image encoder is frozen, the projector trains on.

The language model gets a LoRA adapter (`lora_r: 64`) or is trained whole (`lora_r: 0`). With an adapter, `output_dir`
holds the adapter and the trained projector, the processor, and what they rest on; `merge_adapter: true` also writes
`output_dir/merged`, an ordinary checkpoint. An adapter folder as `model_name_or_path` is trained for a further round.

    accelerate launch run_sft.py recipes/jnana/sft.yaml
    accelerate launch run_sft.py recipes/phi35_pooled/sft.yaml --learning_rate 5e-5 --merge_adapter true
    accelerate launch run_sft.py recipes/llava_chess/sft.yaml --train_data my_photos --eval_data my_test_photos

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_sft.py recipes/...

A run that was cut off goes on from its last whole checkpoint when it is started again; SIGTERM writes one first.
`python run_sft.py --help` lists all options.
"""

import sys

from accelerate.utils import release_memory
from transformers import Trainer, TrainingArguments

from jnana.processing.data import JnanaCollator
from jnana.training.adapters import (
    base_reference,
    complete_adapter_folder,
    is_adapter,
    quantization_settings,
    with_fingerprints,
)
from jnana.training.arguments import (
    DataArguments,
    LoraArguments,
    ModelArguments,
    RateArguments,
    RunArguments,
    parse_arguments,
    recipe_name,
)
from jnana.training.attention import check_attention, choose_attention, row_multiple
from jnana.training.callbacks import BaseReferenceCallback, LossCurveCallback, SamplesCallback
from jnana.training.checkpoints import checkpoint_to_resume, delete_checkpoints
from jnana.training.checks import check_computation, check_lora, check_models, check_quantization, check_run
from jnana.training.data import collator_options, load_conversations
from jnana.training.distributed import main_process_first
from jnana.training.evaluation_loss import evaluation_hooks
from jnana.training.feature_cache import prepare_feature_cache
from jnana.training.interruption import StopSignalCallback, explain_full_disk
from jnana.training.loading import check_model_arguments, prepare_model, prepare_processor
from jnana.training.merging import merge_adapter
from jnana.training.model_card import use_our_card
from jnana.training.optimizers import PartScheduleCallback, check_rates, trainer_optimizer
from jnana.training.runs import finish_run, start_run, train
from jnana.training.samples import samples_from_rows
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage


def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (ModelArguments, DataArguments, LoraArguments, RateArguments, RunArguments, TrainingArguments)
    model_args, data_args, lora_args, rate_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Everything that can be refused before a model is loaded
    check_model_arguments(model_args)
    check_models(model_args)
    check_run(training_args, data_args, run_args)
    check_attention(model_args.attn_implementation, data_args.packing)
    check_rates(rate_args, training_args)
    continues_adapter = model_args.model_name_or_path is not None and is_adapter(model_args.model_name_or_path)
    check_lora(lora_args, model_args.model_name_or_path if continues_adapter else None)
    with_adapter = continues_adapter or lora_args.lora_r > 0
    quantization = quantization_settings(lora_args, model_args)
    check_quantization(quantization, training_args.device)
    check_computation(training_args, model_args, run_args.optimizer, quantization["quantization"], not with_adapter)
    base_names = {"model": lora_args.base_model_id} if lora_args.base_model_id else base_reference(model_args)["names"]
    check_push(training_args, base_names if with_adapter else None)

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

    # 5. Model: the projector trains, and the language model by an adapter or whole
    model = prepare_model(model_args, processor, training_args, quantization)
    model = apply_stage(model, "sft", lora_args, data_args.packing)
    images = prepare_feature_cache(data_args, model, processor, [train_rows, eval_rows], training_args)
    attention = choose_attention(model, data_args, training_args.device, model_args.attn_implementation)

    # 6. Trainer
    multiple = row_multiple(attention, data_args.packing)
    options = collator_options(data_args, training_args.output_dir)
    collator = JnanaCollator(processor, images=images, pad_to_multiple_of=multiple, **options)
    callbacks = [LossCurveCallback()]
    if rate_args.given:
        callbacks.append(PartScheduleCallback(rate_args))
    if with_adapter:
        reference = with_fingerprints(base_reference(model_args, lora_args))
        callbacks.append(BaseReferenceCallback(reference))
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
        optimizer_cls_and_kwargs=trainer_optimizer(run_args.optimizer, model, training_args, rate_args),
        **evaluation_hooks(data_args.on_bad_sample, training_args.world_size),
    )
    use_our_card(trainer, "sft", model_args, data_args, recipe=recipe_name(argv))

    # 7. Train, save, share
    if run_args.overwrite_output_dir and training_args.should_save:
        delete_checkpoints(training_args.output_dir)
    merge = with_adapter and lora_args.merge_adapter
    train(trainer, checkpoint, merge)
    if with_adapter and training_args.should_save:
        published = training_args.push_to_hub
        complete_adapter_folder(trainer.model, reference, training_args.output_dir, published)
    finish_run(trainer)
    if merge and training_args.should_save:
        del trainer, model, callbacks
        release_memory()
        merged = f"{training_args.output_dir}/merged"
        remedy = (
            "The adapter is whole; make room, and run: python run_merge.py --model_name_or_path "
            f"{training_args.output_dir} --output_dir {merged} --merge_base {lora_args.merge_base}"
        )
        with explain_full_disk(training_args, remedy):
            merge_adapter(training_args.output_dir, merged, lora_args.merge_base, device=training_args.device)


if __name__ == "__main__":
    main(sys.argv[1:])

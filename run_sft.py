"""Stage 2: fine-tune on questions and answers about images; the projector trains on.

The language model gets a LoRA adapter (`lora_r: 64`) or is trained whole (`lora_r: 0`). The image encoder is frozen,
gets an adapter too (`lora_vision_target_modules`) or is trained whole (`freeze_vision_tower: false`). With an adapter,
`output_dir` holds the adapter and the parts that trained whole, the processor, and a record of the base model;
`merge_adapter: true` also writes `output_dir/merged`, an ordinary checkpoint. An adapter directory as
`model_name_or_path` is trained for a further round.

    accelerate launch run_sft.py recipes/jnana/sft.yaml
    accelerate launch run_sft.py recipes/phi35_pooled/sft.yaml --learning_rate 5e-5 --merge_adapter true
    accelerate launch run_sft.py recipes/llava_chess/sft.yaml --train_data my_photos --eval_data my_test_photos

Two processes on a machine without a GPU:

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 run_sft.py recipes/...

Started again, an interrupted run resumes from its last complete checkpoint; on SIGTERM or Ctrl-C it writes one first.
`python run_sft.py --help` lists all options.
"""

import sys

from accelerate.utils import release_memory
from transformers import Trainer, TrainingArguments

from jnana.training.adapters import (
    BaseReferenceCallback,
    base_reference,
    complete_adapter_folder,
    is_adapter,
    quantization_settings,
    with_fingerprints,
)
from jnana.training.data import load_training_data
from jnana.training.distributed import main_process_first, run_on_main_process
from jnana.training.model_setup import frozen_dtype, prepare_model, prepare_processor, run_image_backend
from jnana.training.monitoring import evaluation_hooks, monitoring_callbacks
from jnana.training.optimizers import PartScheduleCallback, trainer_optimizer
from jnana.training.options.arguments import DataArguments, LoraArguments, ModelArguments, PartArguments, RunArguments
from jnana.training.options.computation_checks import check_computation, check_quantization
from jnana.training.options.model_checks import check_lora, limit_to_context
from jnana.training.options.option_checks import check_run
from jnana.training.options.part_checks import check_parts
from jnana.training.options.recipe_record import check_same_recipe, recipe_options
from jnana.training.options.recipes import parse_arguments, recipe_name
from jnana.training.profiling.forecast import forecast_run
from jnana.training.run import find_checkpoint, finish_run, merge_trained_adapter, prepare_collator, start_run, train
from jnana.training.saving.interruption import StopSignalCallback
from jnana.training.saving.run_lock import releases_directory
from jnana.training.sharing import check_push
from jnana.training.stages import apply_stage


@releases_directory
def main(argv: list[str]) -> None:
    # 1. Arguments, logging, seed
    classes = (ModelArguments, DataArguments, LoraArguments, PartArguments, RunArguments, TrainingArguments)
    model_args, data_args, lora_args, part_args, run_args, training_args = parse_arguments(classes, argv)
    start_run(training_args)

    # 2. Checks that need no model
    check_run(training_args, model_args, data_args, run_args)
    model_args.dtype = frozen_dtype(model_args)
    start = model_args.model_name_or_path
    continued_adapter = start if start is not None and is_adapter(start) else None
    check_lora(lora_args, continued_adapter)
    check_parts(part_args, training_args, data_args, lora_args, continued_adapter)
    with_adapter = continued_adapter is not None or lora_args.lora_r > 0
    quantization = quantization_settings(lora_args, model_args)
    check_quantization(quantization, training_args.device)
    check_computation(training_args, model_args, run_args.optimizer, quantization["quantization"], not with_adapter)
    check_push(training_args, base_reference(model_args, lora_args) if with_adapter else None)

    # 3. Checkpoint to resume from, and the processor: its library that resizes images is an option of the run, too
    checkpoint = find_checkpoint(training_args, run_args)
    backend = run_on_main_process(lambda: run_image_backend(model_args))
    with main_process_first():
        processor = prepare_processor(model_args, backend)
    model_args.image_backend = processor.image_backend
    options = recipe_options(model_args, data_args, lora_args, part_args, run_args, training_args)
    check_same_recipe(checkpoint, options, run_args)

    # 4. Data: the first process prepares and checks them, the others read what it cached
    limit_to_context(data_args, model_args)
    train_rows, eval_rows = load_training_data(data_args, training_args, processor)

    # 5. Model: the projector trains, and the language model by an adapter or whole; perhaps the tower, too. Its memory
    # is forecast before weights are read
    arguments = (model_args, data_args, run_args, part_args, lora_args)
    forecast_run("sft", training_args, *arguments, quantization, processor=processor, rows=train_rows)
    model = prepare_model(model_args, processor, training_args, quantization)
    model = apply_stage(model, "sft", lora_args, data_args.packing, part_args.freeze_vision_tower)

    # 6. Trainer
    collator = prepare_collator(data_args, training_args, model, processor, [train_rows, eval_rows])
    callbacks = monitoring_callbacks(run_args, eval_rows, processor)
    if part_args.given:
        callbacks.append(PartScheduleCallback(part_args))
    if with_adapter:
        reference = with_fingerprints(base_reference(model_args, lora_args))
        callbacks.append(BaseReferenceCallback(reference))
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
    merge = with_adapter and lora_args.merge_adapter
    train(trainer, checkpoint, run_args, options, merge=merge)
    if with_adapter and training_args.should_save:
        complete_adapter_folder(trainer.model, reference, training_args.output_dir, training_args.push_to_hub)
    finish_run(trainer, "sft", model_args, data_args, recipe_name(argv))
    if merge and training_args.should_save:
        del trainer, model, callbacks  # the schedule callback holds the optimizer
        release_memory()
        merge_trained_adapter(training_args, lora_args.merge_base, model_args.device_map)


if __name__ == "__main__":
    main(sys.argv[1:])

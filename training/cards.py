"""The README.md of a trained checkpoint, from `model_cards/template.md` and the run's own log.

`Trainer.create_model_card` would overwrite it whenever the checkpoint is pushed; [`use_our_card`] puts this one in its
place.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import Trainer

from .arguments import DataArguments, ModelArguments, TextDataArguments, TextModelArguments
from .monitoring import LOSS_CURVE
from .stages import PARTS, count_parameters


TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"

SUMMARIES = {
    "pretrain": "A causal language model, trained from random weights (stage 0 of Jnana).",
    "align": "An image encoder and a language model joined by a trained projector (the align stage of Jnana). Both "
    "backbones are as they were; the projector learnt to write captions. Fine-tune it before asking it questions.",
    "sft": "A vision-language assistant: an image encoder, a projector and a language model, fine-tuned on questions "
    "and answers about pictures (the sft stage of Jnana).",
}

USE_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(ids[0]))"""

USE_IMAGE = """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
question = [{{"type": "image", "url": "picture.jpg"}}, {{"type": "text", "text": "What do you see in this picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=40)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def use_our_card(trainer: Trainer, stage: str, model_args, data_args, recipe: str | None = None) -> None:
    """Make every card this trainer writes, on a push too, the one of [`write_model_card`]."""
    trainer.create_model_card = partial(write_model_card, trainer, stage, model_args, data_args, recipe)


def write_model_card(
    trainer: Trainer,
    stage: str,
    model_args: ModelArguments | TextModelArguments,
    data_args: DataArguments | TextDataArguments,
    recipe: str | None = None,
    model_name: str | None = None,
    **kwargs: Any,
) -> None:
    """Write `output_dir/README.md`; the first process only.

    Args:
        trainer (`Trainer`): After training.
        stage (`str`): `pretrain`, `align` or `sft`.
        recipe (`str`, *optional*): The recipe file, named in the card by its last two path components.
        model_name (`str`, *optional*): Default: the Hub id, or else the folder's name.
        kwargs: What else the Trainer hands to `create_model_card`; only `tags` and `language` are used.
    """
    if not trainer.is_world_process_zero():
        return
    output_dir = Path(trainer.args.output_dir)
    adapter = isinstance(trainer.model, PeftModel)
    name = trainer.args.hub_model_id or model_name or output_dir.resolve().name
    usage = USE_TEXT if stage == "pretrain" else USE_IMAGE
    counts = count_parameters(trainer.model)
    origins = [origin for origin in model_origins(model_args) if origin]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation" if stage == "pretrain" else "image-text-to-text",
            tags=sorted({"jnana", stage, *(["lora"] if adapter else []), *as_list(kwargs.get("tags"))}),
            base_model=[origin for origin in origins if is_hub_id(origin)] or None,
            language=kwargs.get("language"),
        ),
        template_path=str(TEMPLATE),
        name=name.split("/")[-1],
        summary=SUMMARIES[stage],
        parts=[(p, f"{counts[p].trainable:,}", f"{counts[p].total:,}") for p in PARTS if p in counts],
        origins=[public_name(origin) for origin in origins] or ["random weights"],
        data=describe_data(data_args),
        settings=describe_settings(trainer, recipe),
        figures=describe_figures(trainer.state.log_history, trainer.state.global_step),
        curve=(output_dir / LOSS_CURVE).is_file(),
        usage=usage.format(name=name),
    )
    card.save(output_dir / "README.md")


def model_origins(args: ModelArguments | TextModelArguments) -> list[str | None]:
    if isinstance(args, TextModelArguments):
        return [args.model_name_or_path]
    return [args.model_name_or_path, args.vision_model, args.text_model]


def describe_data(args: DataArguments | TextDataArguments) -> list[str]:
    lines = [f"trained on `{public_name(args.train_data)}`, split `{args.train_split}`"]
    if args.max_train_rows:
        lines[0] += f", the first {args.max_train_rows:,} rows"
    if args.eval_data:
        lines.append(f"validation on `{public_name(args.eval_data)}`")
    return lines


def describe_settings(trainer: Trainer, recipe: str | None) -> list[tuple[str, str]]:
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    optimizer = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    settings = [
        ("recipe", "/".join(Path(recipe).parts[-2:]) if recipe else "command line"),
        ("steps", f"{trainer.state.global_step:,}"),
        ("rows a step", f"{batch:,} on {args.world_size} process(es)"),
        (
            "learning rate",
            f"{args.learning_rate:g}, {schedule}",
        ),
        ("optimizer", optimizer),
        ("precision", precision),
        ("seed", str(args.seed)),
        ("transformers", transformers.__version__),
    ]
    return [(key, value) for key, value in settings if value != "NoneType"]


def describe_figures(log_history: list[dict[str, float]], steps: int) -> list[tuple[str, str]]:
    """First and last losses, and the time, out of the Trainer's log."""
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    validation = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    figures = []
    for label, points in (("training loss", losses), ("validation loss", validation)):
        figures += [
            (f"{label}, step {step:,}", f"{value:.4f}") for step, value in dict.fromkeys(points[:1] + points[-1:])
        ]
    runtimes = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    if runtimes:
        figures.append(("seconds of the last, uninterrupted part", f"{runtimes[-1]:,.0f}"))
    return figures or [("steps", f"{steps:,}")]


def public_name(name: str | None) -> str:
    """A Hub id as it is; of a path only its last part, since folders of one machine tell others nothing."""
    if name is None:
        return "-"
    return name if is_hub_id(name) else Path(name).name


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists() and name[0] not in "./"


def as_list(tags: str | list[str] | None) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or [])

"""The model card (README.md) of a checkpoint: written from the run's log, extended by an evaluation or a push."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from transformers import Trainer

from jnana.processing.data.mixture import DataSource
from jnana.processing.data.paths import is_hub_id

from .monitoring import LOSS_CURVE, loss_names, points_of
from .options.arguments import DataArguments, ModelArguments, TextDataArguments, TextModelArguments
from .options.sources import sources_of
from .profiling.chips import device_name
from .profiling.speed import describe_speed
from .stages import PARTS, count_parameters


TEMPLATE = Path(__file__).parent.parent / "model_cards" / "template.md"

SUMMARIES = {
    "pretrain": "A causal language model, trained from random weights (stage 0 of Jnana).",
    "align": "An image encoder and a language model joined by a trained projector (the align stage of Jnana). Both "
    "backbones are unchanged; the projector was trained on captions. Fine-tune the model before asking it questions.",
    "sft": "A vision-language assistant: an image encoder, a projector and a language model, fine-tuned on questions "
    "and answers about images (the sft stage of Jnana).",
}

EVALUATION_HEADING = "## Evaluation"
LOCAL_COMMENT = "# run in the parent directory of the checkpoint, or give its full path\n"

USE_TEXT = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
ids = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(ids[0]))"""

USE_IMAGE = """from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
question = [{{"type": "image", "url": "image.jpg"}}, {{"type": "text", "text": "What do you see in this image?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": question}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=40)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""


def write_model_card(
    trainer: Trainer,
    stage: str,
    model_args: ModelArguments | TextModelArguments,
    data_args: DataArguments | TextDataArguments,
    recipe: str | None = None,
) -> None:
    """Write `output_dir/README.md`; call it in one process, after the last save, which may write a card of its own.

    Args:
        trainer (`Trainer`): After training.
        stage (`str`): `pretrain`, `align` or `sft`.
        model_args (`ModelArguments` or `TextModelArguments`): The models that the run started from.
        data_args (`DataArguments` or `TextDataArguments`): The data it was trained on.
        recipe (`str`, *optional*): The recipe file, named in the card by its last two path components.
    """
    output_dir = Path(trainer.args.output_dir)
    adapter = isinstance(trainer.model, PeftModel)
    name = trainer.args.hub_model_id or output_dir.resolve().name
    usage = USE_TEXT if stage == "pretrain" else USE_IMAGE
    counts = count_parameters(trainer.model)
    origins = [origin for origin in model_origins(model_args) if origin]
    card = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="text-generation" if stage == "pretrain" else "image-text-to-text",
            tags=sorted({"jnana", stage, *(["lora"] if adapter else [])}),
            base_model=[origin for origin in origins if is_hub_id(origin)] or None,
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
        usage=("" if trainer.args.hub_model_id else LOCAL_COMMENT) + usage.format(name=name),
    )
    card.save(output_dir / "README.md")


def set_name_in_usage(card_path: str | Path, name: str) -> None:
    """Change a card's code so that it loads the model from `name`.

    Args:
        card_path (`str` or `Path`): `README.md` of a checkpoint.
        name (`str`): Hub id, or the name of the checkpoint's directory.
    """
    card = ModelCard.load(Path(card_path))
    text = re.sub(r'from_pretrained\("[^"]*"', f'from_pretrained("{name}"', card.text).replace(LOCAL_COMMENT, "")
    if "/" not in name:
        text = text.replace("```python\n", f"```python\n{LOCAL_COMMENT}", 1)
    card.text = text
    card.save(Path(card_path))


@dataclass
class EvaluationResult:
    """One metric of a model on one test set.

    Args:
        dataset (`str`): Name of the test set, a Hub id or a file's name (no local path).
        split (`str`): Split, or the part of the test set.
        metric (`str`): `vqa_accuracy`, `exact_match` ...
        value (`float`): A share, 0 to 1; of some benchmarks another score (`percent`).
        interval (`tuple[float, float]`): Ends of the 95 % interval of the value.
        num_questions (`int`): Answered questions of the test set or its part. A metric may count fewer of them (POPE's
            precision: those answered with yes) or images (MME's accuracy+).
        blind (`float`, *optional*): The same of the model without the images.
        majority (`float`, *optional*): The same of a constant answer.
        percent (`bool`): Whether the card's table shows the value in percent.
        prompt (`str`, *optional*): What a benchmark was asked with.
    """

    dataset: str
    split: str
    metric: str
    value: float
    interval: tuple[float, float]
    num_questions: int
    blind: float | None = None
    majority: float | None = None
    percent: bool = True
    prompt: str | None = None


def add_evaluation_results(card_path: str | Path, results: Sequence[EvaluationResult]) -> None:
    """Write evaluation results into a card: `model-index` of its metadata, which the Hub shows, and a table.

    Earlier results for the same test sets and metrics are replaced; other earlier results stay in `model-index`. The
    table shows `results` only.

    Args:
        card_path (`str` or `Path`): `README.md` of a checkpoint.
        results (`Sequence[EvaluationResult]`): Of that checkpoint.

    Raises:
        ValueError: if there is no such file; the remedy is named.
    """
    card_path = Path(card_path)
    if not card_path.is_file():
        raise ValueError(f"{str(card_path)!r} does not exist; give the README.md of a checkpoint")
    card = ModelCard.load(card_path)
    new = [eval_result(result, card.data.pipeline_tag) for result in results]
    replaced = {measured(result) for result in new}
    kept = [result for result in card.data.eval_results or [] if measured(result) not in replaced]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.model_name or heading_of(card.text) or card_path.resolve().parent.name
    table = [
        EVALUATION_HEADING,
        "",
        "Measured by `run_evaluate.py`.",
        "",
        "| test set | metric | score | 95 % interval | without images | constant answer | questions |",
        "|---|---|---:|---:|---:|---:|---:|",
        *map(table_row, results),
    ]
    card.text = with_section(card.text, table)
    card.save(card_path)


def remove_evaluation_results(card: ModelCard) -> None:
    """Take evaluation results out of a card that was copied from another model's; see [`add_evaluation_results`].

    Args:
        card (`ModelCard`): Changed in place.
    """
    metadata: Any = card.data  # a `ModelCardData`, which huggingface_hub annotates as its base class
    metadata.eval_results = metadata.model_name = None
    card.text = re.sub(rf"^{EVALUATION_HEADING}\n.*?(?=^## |\Z)", "", card.text, flags=re.MULTILINE | re.DOTALL)


def table_row(result: EvaluationResult) -> str:
    low, high = result.interval

    def text(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}" if result.percent else f"{value:.5g}"

    return (
        f"| {result.dataset}, {result.split} | {result.metric} | {text(result.value)} | {text(low)} to {text(high)} | "
        f"{text(result.blind)} | {text(result.majority)} | {result.num_questions:,} |"
    )


def eval_result(result: EvaluationResult, task_type: str | None) -> EvalResult:
    """A result as huggingface_hub writes it into `model-index`."""
    low, high = result.interval
    baselines = {"blind": result.blind, "majority": result.majority}
    return EvalResult(
        task_type=task_type or "image-text-to-text",
        dataset_type=result.dataset,
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=result.metric,
        metric_value=round(result.value, 4),
        metric_args={
            "num_questions": result.num_questions,
            "interval_95": [round(low, 4), round(high, 4)],
            **{name: round(value, 4) for name, value in baselines.items() if value is not None},
            **({} if result.prompt is None else {"prompt": result.prompt}),
        },
    )


def measured(result: EvalResult) -> tuple:
    """The test set and metric of a result."""
    return (result.dataset_type, result.dataset_split, result.metric_type)


def heading_of(text: str) -> str | None:
    """The first heading of a card's text."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return None if found is None else found.group(1).strip()


def with_section(text: str, lines: list[str]) -> str:
    """A card's text with a section replaced, or added before `## Use` or at the end; `lines[0]` is its heading."""
    section = "\n".join(lines) + "\n\n"
    old = re.compile(rf"^{re.escape(lines[0])}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(text):
        return old.sub(lambda match: section, text)
    before, heading, after = text.partition("## Use\n")
    return f"{before}{section}{heading}{after}" if heading else f"{text.rstrip()}\n\n{section}"


def model_origins(args: ModelArguments | TextModelArguments) -> list[str | None]:
    if isinstance(args, TextModelArguments):
        return [args.model_name_or_path]
    return [args.model_name_or_path, args.vision_model, args.text_model]


def describe_data(args: DataArguments | TextDataArguments) -> list[str]:
    first = f", the first {args.max_train_rows:,} rows" if args.max_train_rows else ""
    if isinstance(args, TextDataArguments):
        lines = [f"trained on `{public_name(args.train_data)}`, split `{args.train_split}`{first}"]
        return [*lines, *([f"validation on `{public_name(args.eval_data)}`"] if args.eval_data else [])]
    sources = sources_of(args)
    lines = [f"trained on {describe_source(source, len(sources) > 1)}{first}" for source in sources]
    names = ", ".join(f"`{public_name(str(source.data))}`" for source in sources_of(args, evaluation=True))
    return [*lines, *([f"validation on {names}"] if names else [])]


def describe_source(source: DataSource, mixed: bool) -> str:
    """A source of training data, without local directories; its share where there are several."""
    text = f"`{public_name(str(source.data))}`, split `{source.split}`"
    if mixed:
        text = f"`{source.name}`: {text}"
    text += f", weight {source.weight:g}" if source.weight is not None else ""
    text += f", rows an epoch {source.samples:,}" if source.samples is not None else ""
    return text + (f", each row up to {source.repeat} times an epoch" if source.repeat > 1 else "")


def describe_settings(trainer: Trainer, recipe: str | None) -> list[tuple[str, str]]:
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    optimizer = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
    schedule = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    settings = [
        ("recipe", "/".join(Path(recipe).parts[-2:]) if recipe else "command line"),
        ("steps", f"{trainer.state.global_step:,}"),
        ("rows per step", f"{batch:,} on {args.world_size} process(es)"),
        ("device of each process", device_name(args.device)),
        ("learning rate", f"{args.learning_rate:g}, {schedule}"),
        ("optimizer", optimizer),
        ("precision", precision),
        ("seed", str(args.seed)),
        ("transformers", transformers.__version__),
    ]
    return [(key, value) for key, value in settings if value != "NoneType"]


def describe_figures(log_history: list[dict[str, float]], steps: int) -> list[tuple[str, str]]:
    """First and last losses, the time and the speed, from the Trainer's log."""
    curves = [("training loss", points_of(log_history, "loss"))]
    for label, name in loss_names(log_history).items():
        where, _, source = label.partition(", ")
        curves.append((f"{where} loss" + (f" of {source}" if source else ""), points_of(log_history, name)))
    figures = []
    for label, points in curves:
        figures += [
            (f"{label}, step {step:,}", f"{value:.4f}") for step, value in dict.fromkeys(points[:1] + points[-1:])
        ]
    runtimes = [entry["train_runtime"] for entry in log_history if "train_runtime" in entry]
    if runtimes:
        figures.append(("seconds since the last start", f"{runtimes[-1]:,.0f}"))
    speeds = [entry for entry in log_history if "train_runtime" in entry and "tokens_per_second" in entry]
    if speeds:
        figures.append(("speed since then", describe_speed(speeds[-1])))
        for name in [key.removeprefix("share_") for key in speeds[-1] if key.startswith("share_")]:
            share = f"{speeds[-1][f'tokens_{name}']:,.0f} ({speeds[-1][f'share_{name}']:.1%})"
            figures.append((f"tokens of {name} since then", share))
    return figures or [("steps", f"{steps:,}")]


def public_name(name: str | None) -> str:
    """A Hub id unchanged; of a local path only the last part."""
    if name is None:
        return "-"
    return name if is_hub_id(name) else Path(name).name

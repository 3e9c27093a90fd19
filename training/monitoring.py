"""Reports of a run while it trains: the validation loss per token, the loss curve and generated samples.

All of it goes through hooks and callbacks of the stock Trainer. Every process generates, because a sharded model needs
all of them; only the first process writes.
"""

import html
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback

from jnana.processing import JnanaProcessor
from jnana.processing.data import (
    IGNORED,
    BadSampleError,
    conversation_rows,
    load_image,
    message_text,
    read_json_lines,
    thumbnail,
    with_images,
)

from .options.arguments import RunArguments


logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
SAMPLES_PAGE = "samples.html"
LOSS_CURVE = "loss_curve.png"
THUMBNAIL_SIDE = 200  # pixels


def row_losses(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """The Trainer's `preprocess_logits_for_metrics`: the summed loss and token count of each row.

    Args:
        logits (`torch.Tensor`): `(batch_size, sequence_length, vocab_size)`, or only the logits of the positions that
            predict a label, `(num_kept, vocab_size)`; or a tuple of model outputs that begins with them.
        labels (`torch.Tensor`): `(batch_size, sequence_length)`, -100 at positions without a label.

    Returns:
        `torch.Tensor`: `(batch_size, 2)`, for each row the summed loss and the number of its supervised tokens.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    supervised = labels[:, 1:] != IGNORED
    if logits.ndim == 3:
        logits = logits[:, :-1][supervised]
    losses = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction="none")
    sums = torch.zeros(supervised.shape, dtype=losses.dtype, device=losses.device).masked_scatter(supervised, losses)
    return torch.stack([sums.sum(1), supervised.sum(1)], dim=1)


def mean_token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """The mean loss over all supervised tokens, as `loss`; the Trainer's `compute_metrics`.

    The Trainer's own `eval_loss` is a mean over batches, in which the last batch and a batch of short answers weigh as
    much as the others. This value replaces it and depends neither on the batches nor on the number of processes: the
    Trainer gathers the rows' sums and drops the rows that only fill up the last batch.
    """
    total, count = prediction.predictions.astype("float64").sum(0)
    return {"loss": float(total / max(count, 1))}


def evaluation_hooks(on_bad_sample: str, world_size: int) -> dict[str, Any]:
    """The Trainer's arguments for an exact `eval_loss`.

    Several processes that skip bad rows may end up with different numbers of rows, which can't be gathered: they keep
    the Trainer's mean over batches.

    Args:
        on_bad_sample (`str`): `raise` or `skip`.
        world_size (`int`): Number of processes.
    """
    if on_bad_sample == "skip" and world_size > 1:
        return {}
    return {"preprocess_logits_for_metrics": row_losses, "compute_metrics": mean_token_loss}


def monitoring_callbacks(
    run_args: RunArguments, eval_data: Iterable[dict[str, Any]] | None, processing_class: Any
) -> list[TrainerCallback]:
    """The callbacks of every training script: the loss curve and, with `sample_steps`, generated samples.

    Args:
        run_args (`RunArguments`): `sample_steps`, `sample_count`, `sample_max_new_tokens`.
        eval_data (`Iterable[dict]`): Validation rows, or blocks of a text corpus; of several sources a `dict`, whose
            rows are shown in turn. `None` only without `sample_steps`.
        processing_class (`JnanaProcessor` or `PreTrainedTokenizerBase`): Makes the prompts and decodes the answers.
    """
    callbacks: list[TrainerCallback] = [LossCurveCallback()]
    if run_args.sample_steps > 0 and eval_data is not None:
        count, max_new_tokens = run_args.sample_count, run_args.sample_max_new_tokens
        if isinstance(eval_data, dict):
            turns = zip_longest(*(islice(rows, count) for rows in eval_data.values()))
            eval_data = (row for turn in turns for row in turn if row is not None)
        if isinstance(processing_class, JnanaProcessor):
            samples = samples_from_rows(eval_data, processing_class, count)
        else:
            samples = samples_from_blocks(eval_data, processing_class, count, max_new_tokens)
        callbacks.append(SamplesCallback(samples, processing_class.decode, run_args.sample_steps, max_new_tokens))
    return callbacks


class LossCurveCallback(TrainerCallback):
    """Draws `loss_curve.png` in `output_dir` from the Trainer's log, at every save and at the end."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_loss_curve(state.log_history, Path(args.output_dir) / LOSS_CURVE)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)


def loss_names(log_history: list[dict[str, float]]) -> dict[str, str]:
    """The losses in a run's log beside `loss`, by a label for each: those of training sources, and of validation."""
    found = {}
    for name in dict.fromkeys(name for entry in log_history for name in entry):
        if name == "eval_loss":
            found["validation"] = name
        elif name.startswith("eval_") and name.endswith("_loss"):
            found[f"validation, {name.removeprefix('eval_').removesuffix('_loss')}"] = name
        elif name.startswith("loss_"):
            found[f"training, {name.removeprefix('loss_')}"] = name
    return found


def points_of(log_history: list[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """A figure of a run's log by its step, without the last entry, which is of the whole run."""
    return [(entry["step"], entry[name]) for entry in log_history if name in entry and "train_runtime" not in entry]


def draw_loss_curve(log_history: list[dict[str, float]], file: Path) -> None:
    """Plot the losses of training and validation over the steps; without a logged loss no file is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = {"training": "loss"} | loss_names(log_history)
    curves = {label: points_of(log_history, name) for label, name in names.items()}
    if not curves["training"]:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without pyplot's global state
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss per supervised token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


@dataclass
class Sample:
    """A prompt and the text that should follow it.

    Args:
        source (`str`): File and record it comes from.
        prompt (`str`): The question as text.
        truth (`str`): The reference answer.
        inputs (`dict[str, torch.Tensor]`): Model inputs of batch size 1, up to where the answer begins.
        images (`list[Image]`): The images of the question.
    """

    source: str
    prompt: str
    truth: str
    inputs: dict[str, torch.Tensor]
    images: list[Image] = field(default_factory=list)


def samples_from_rows(rows: Iterable[dict[str, Any]], processor: JnanaProcessor, count: int) -> list[Sample]:
    """The first question of the first `count` rows, packed or not.

    Rows whose image can't be decoded are skipped with a warning; validation itself follows `on_bad_sample`.
    """
    samples: list[Sample] = []
    for row in conversation_rows(rows):
        if len(samples) == count:
            break
        messages = row["conversations"][0]
        answer = next(index for index, message in enumerate(messages) if message["role"] == "assistant")
        try:
            images = [load_image(reference, source=row["source"]) for reference in row["images"]]
        except BadSampleError as error:
            logger.warning(f"not among the samples: {error}")
            continue
        inputs = processor.apply_chat_template(
            with_images(messages[:answer], images),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        question = " ".join(message_text(message) for message in messages[:answer])
        samples.append(Sample(row["source"], question.strip(), message_text(messages[answer]), dict(inputs), images))
    return samples


def samples_from_blocks(
    blocks: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int
) -> list[Sample]:
    """The first half of the first `count` blocks (or rows' first documents) as prompts, the second half as truth."""
    samples = []
    for number, block in enumerate(islice(blocks, count)):
        ids = torch.as_tensor(block["input_ids"])
        if "position_ids" in block:
            starts = (torch.as_tensor(block["position_ids"]) == 0).nonzero().flatten().tolist()
            ids = ids[: starts[1]] if len(starts) > 1 else ids
        half = len(ids) // 2
        inputs = {"input_ids": ids[None, :half], "attention_mask": torch.ones(1, half, dtype=torch.long)}
        truth = tokenizer.decode(ids[half : half + max_new_tokens])
        samples.append(Sample(f"validation block {number}", tokenizer.decode(ids[:half]), truth, inputs))
    return samples


class SamplesCallback(TrainerCallback):
    """Generates answers to a few validation samples before the first step, every `every` steps and at the end.

    They are logged, appended to `samples.jsonl`, and shown with their images in `samples.html`.

    Args:
        samples (`list[Sample]`): Prompts as model inputs, with the reference answers.
        decode (`Callable[[list[int]], str]`): Token ids to text.
        every (`int`): Steps between two rounds.
        max_new_tokens (`int`): Largest number of generated tokens.
    """

    def __init__(self, samples: list[Sample], decode: Callable[[list[int]], str], every: int, max_new_tokens: int):
        self.samples = samples
        self.decode = decode
        self.every = every
        self.max_new_tokens = max_new_tokens
        self.last_step = -1

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        file = Path(args.output_dir) / SAMPLES_FILE
        if state.is_world_process_zero and file.is_file():
            # The resumed run writes again what the interrupted run wrote after this checkpoint.
            resumed = state.global_step > 0
            kept = [line for line in read_json_lines(file, "skip") if resumed and line["step"] <= state.global_step]
            file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept), encoding="utf-8")
        if state.global_step == 0:
            self.write(args, state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.write(args, state, model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.last_step:
            self.write(args, state, model)

    def write(self, args, state, model) -> None:
        """Generate for all samples and record the round."""
        self.last_step = state.global_step
        was_training = model.training
        model.eval()
        texts = [self.generate(model, sample, args) for sample in self.samples]
        model.train(was_training)
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        with (folder / SAMPLES_FILE).open("a", encoding="utf-8") as stream:
            for sample, text in zip(self.samples, texts, strict=True):
                entry = {"step": state.global_step, "source": sample.source, "prompt": sample.prompt}
                entry |= {"truth": sample.truth, "generated": text}
                stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        lines = [f"samples at step {state.global_step}"]
        for sample, text in zip(self.samples, texts, strict=True):
            lines += [
                f"  {sample.source}: {sample.prompt}",
                f"    true:      {sample.truth}",
                f"    generated: {text}",
            ]
        logger.info("\n".join(lines))
        page = samples_page(self.samples, list(read_json_lines(folder / SAMPLES_FILE, "skip")))
        (folder / SAMPLES_PAGE).write_text(page, encoding="utf-8")

    @torch.no_grad()
    def generate(self, model, sample: Sample, args) -> str:
        """Greedy text for one sample. Greedy decoding draws no random numbers, so training is the same without it."""
        inputs = {name: value.to(args.device) for name, value in sample.inputs.items()}
        lower = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=lower, enabled=args.bf16 or args.fp16):
            ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True)
        return self.decode(ids[0, inputs["input_ids"].shape[1] :].tolist())


def samples_page(samples: list[Sample], entries: list[dict[str, Any]]) -> str:
    """An HTML page with one table a sample: its images, prompt and truth, then the text generated at each step."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Samples</title>"]
    parts.append("<style>body{font:15px sans-serif;margin:2em}td{padding:.2em .8em;vertical-align:top}</style>")
    for sample in samples:
        parts.append("<h3>" + html.escape(sample.source) + "</h3>")
        for image in sample.images:
            small = thumbnail(image, THUMBNAIL_SIDE)
            parts.append(f"<img src='{small['url']}' width='{small['width']}' height='{small['height']}'>")
        parts.append(f"<p>{html.escape(sample.prompt)}<br><b>{html.escape(sample.truth)}</b></p><table>")
        for entry in entries:
            if (entry["source"], entry["prompt"]) == (sample.source, sample.prompt):
                parts.append(f"<tr><td>{entry['step']}</td><td>{html.escape(entry['generated'])}</td></tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"

"""What a run shows while it trains: the loss curve, and what the model writes about pictures it does not train on.

All of it through the Trainer's own callback events. Every process generates (so that a sharded model does not hang),
only the first one writes.
"""

import html
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from jnana.processing.data import thumbnail

from .adapters import complete_adapter_folder
from .samples import Sample


logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"
SAMPLES_PAGE = "samples.html"
THUMBNAIL_SIDE = 200  # pixels
LOSS_CURVE = "loss_curve.png"


class LossCurveCallback(TrainerCallback):
    """Draws `loss_curve.png` beside the checkpoints at every save and at the end, from the Trainer's own log."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            draw_loss_curve(state.log_history, Path(args.output_dir) / LOSS_CURVE)

    def on_train_end(self, args, state, control, **kwargs):
        self.on_save(args, state, control)


def draw_loss_curve(log_history: list[dict[str, float]], file: Path) -> None:
    """Plot `loss` and `eval_loss` over the steps; nothing is written while there is no loss yet."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {
        label: [(entry["step"], entry[name]) for entry in log_history if name in entry]
        for label, name in (("training", "loss"), ("validation", "eval_loss"))
    }
    if not curves["training"]:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen and without touching pyplot's global state
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 50 else None)
    axes.set(xlabel="step", ylabel="loss per supervised token (nats)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


class SamplesCallback(TrainerCallback):
    """Before the first step and every `every` steps writes true and generated text of a few validation samples.

    They are printed, appended to `samples.jsonl`, and shown with their pictures in `samples.html`.

    Args:
        samples (`list[Sample]`): Prompts as model inputs, with the text a perfect model would write.
        decode (`Callable[[list[int]], str]`): Token ids to text.
        every (`int`): Steps between two rounds; one more round at the start and at the end.
        max_new_tokens (`int`): Tokens generated at most.
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
            # what an interrupted run wrote after the checkpoint that is resumed will be written again
            resumed = state.global_step > 0
            kept = [line for line in read_lines(file) if resumed and line["step"] <= state.global_step]
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
        page = samples_page(self.samples, read_lines(folder / SAMPLES_FILE))
        (folder / SAMPLES_PAGE).write_text(page, encoding="utf-8")

    @torch.no_grad()
    def generate(self, model, sample: Sample, args) -> str:
        """Greedy text for one sample; greedy draws no random numbers, so the run is the same with or without it."""
        inputs = {name: value.to(args.device) for name, value in sample.inputs.items()}
        lower = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(args.device.type, dtype=lower, enabled=args.bf16 or args.fp16):
            ids = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, use_cache=True)
        return self.decode(ids[0, inputs["input_ids"].shape[1] :].tolist())


class BaseReferenceCallback(TrainerCallback):
    """Writes beside each adapter checkpoint its base's record and the code, so that every `checkpoint-N` loads."""

    def __init__(self, reference: dict[str, Any]):
        self.reference = reference

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            complete_adapter_folder(model, self.reference, folder, published=args.push_to_hub)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a JSON-lines file; a last line that a crash cut off is dropped."""
    entries = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def samples_page(samples: list[Sample], entries: list[dict[str, Any]]) -> str:
    """One table a sample: its picture, prompt and truth, then what was generated at each step."""
    parts = ["<!doctype html><meta charset='utf-8'><title>Samples</title>"]
    parts.append("<style>body{font:15px sans-serif;margin:2em}td{padding:.2em .8em;vertical-align:top}</style>")
    for sample in samples:
        parts.append("<h3>" + html.escape(sample.source) + "</h3>")
        parts += [f"<img src='{thumbnail(image, THUMBNAIL_SIDE)['url']}'>" for image in sample.images]
        parts.append(f"<p>{html.escape(sample.prompt)}<br><b>{html.escape(sample.truth)}</b></p><table>")
        for entry in entries:
            if (entry["source"], entry["prompt"]) == (sample.source, sample.prompt):
                parts.append(f"<tr><td>{entry['step']}</td><td>{html.escape(entry['generated'])}</td></tr>")
        parts.append("</table>")
    return "\n".join(parts) + "\n"

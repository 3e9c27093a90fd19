"""Training throughput compared with stock LLaVA: four arms train on the same images, texts and weights.

    python -m benchmarks.train_throughput                        # one CPU thread, a small Phi
    python -m benchmarks.train_throughput --scale phi2           # a GPU, full Phi-2 from random weights
    python -m benchmarks.train_throughput --cases align-49 --rounds 9 --profile
    python -m benchmarks.train_throughput --against ../before    # beside another checkout of this repository

A case is a stage and a number of image tokens: `align-49`, `sft-576`; `sft-576-x3` has three images in a row,
`align-2340` cuts images into tiles (LLaVA-1.6).

    llava           stock `LlavaForConditionalGeneration`, a padded batch, one conversation in each row; with 2,340
                    image tokens stock `LlavaNextForConditionalGeneration`, which cuts an image into tiles
    padded          this package, `packing: none`
    shared_image    this package, `packing: shared_image`
    feature_cache   this package, `packing: shared_image` and `feature_cache`

All arms use the stock `Trainer`. They take turns within each round, so that a slower machine slows all of them.
Figures are medians over rounds; ratios are computed within a round. On one CPU thread the clock is the CPU time of the
process, which does not count other programs; elsewhere it is wall-clock time. The losses of every step are compared
with stock LLaVA's in each round, and the projector's gradient once; a difference is an error. The script writes
`results/<name>.json` and `.png` after each case. `--profile` adds the profile of one step, and writes the profiler's
tables to `results/<name>_<case>_<arm>.txt`.
"""

import argparse
import contextlib
import functools
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from benchmarks.checkouts import compare_checkouts
from benchmarks.machine import PeakMemory, describe_machine, synchronize, write_result
from benchmarks.profiling import profile_step
from benchmarks.throughput_report import draw, summarize, table
from benchmarks.workloads import SCALES, Scale, make_images, make_models, make_processor, make_rows
from jnana.processing import JnanaProcessor
from jnana.processing.data import JnanaCollator, check_rows, load_image, packed_rows, plan_rows, with_images
from jnana.processing.data.rows import rows_to_dataset
from jnana.training.feature_cache import prepare_feature_cache
from jnana.training.options.arguments import DataArguments, LoraArguments
from jnana.training.stages import apply_stage


logger = logging.getLogger(__name__)

ARMS = ("llava", "padded", "shared_image", "feature_cache")
# Largest relative differences allowed from stock LLaVA: of the loss of a step, of the projector's first gradient
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 0.2)}


class PaddedCollator:
    """
    The usual collator for stock LLaVA: each conversation is a row with its own image, padded on the right.

    Args:
        processor (`JnanaProcessor`): Renders and tokenises the chats and prepares the images.
    """

    def __init__(self, processor: JnanaProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        chats = [
            with_images(chat, [load_image(image, source=row["source"]) for image in row["images"]])
            for row in rows
            for chat in row["conversations"]
        ]
        batch = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True, "padding_side": "right", "return_tensors": "pt"},
        )
        answers = torch.as_tensor(batch.pop("assistant_masks")).bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~answers, -100)}


@dataclass
class Case:
    """One case: a stage and a number of image tokens, with the data and models of all arms."""

    name: str
    stage: str
    steps: list[list[dict]]
    processor: JnanaProcessor
    models: dict[str, nn.Module]  # by arm; the three arms of this package share one model
    batches: dict[str, list[list[dict]]] = field(default_factory=dict)  # by arm: the collator's input for each step
    collators: dict[str, Callable] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # trainable weights before the first step
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def conversations(self) -> list[int]:
        return [sum(len(row["conversations"]) for row in step) for step in self.steps]


def make_case(name: str, scale: Scale, num_steps: int, folder: Path, device: torch.device) -> Case:
    """
    Data, models and collators.

    Args:
        name (`str`): `align-49`, `sft-576`, `sft-576-x3`, ...
        scale (`Scale`): Sizes.
        num_steps (`int`): Steps of a round; the first is not timed.
        folder (`Path`): Directory for images and the feature cache.
        device (`torch.device`): Where the models run.
    """
    stage, num_tokens, times = parts_of(name)
    processor = make_processor(scale, num_tokens)
    size = scale.images_per_step[num_tokens] * times
    # one step more than is trained, because the Trainer reads one batch ahead
    rows = make_rows(stage, make_images(folder / "images", (num_steps + 1) * size))
    steps = [rows[start : start + size] for start in range(0, len(rows), size)]
    llava, jnana = make_models(scale, num_tokens, processor, device)
    lora = LoraArguments(lora_r=scale.lora_r)
    llava, jnana = (apply_stage(model, stage, lora if stage == "sft" else None) for model in (llava, jnana))
    for weight_name, weight in (*llava.named_parameters(), *jnana.named_parameters()):
        # The stages train this package's `image_newline`, a part of the projector, but not that of stock LLaVA-Next.
        weight.requires_grad &= "image_newline" not in weight_name
    case = Case(name, stage, steps, processor, {"llava": llava} | dict.fromkeys(ARMS[1:], jnana))
    case.weights = {name: weight.detach().clone() for name, weight in trainable(llava)}
    planned = [plan_step(step, processor, scale.max_row_tokens[num_tokens] * times) for step in steps]
    case.batches = {"llava": steps, "padded": steps, "shared_image": planned, "feature_cache": planned}
    begun = time.perf_counter()
    cache = make_cache(case, folder / f"cache-{name}", rows, scale, device)
    case.facts["seconds_to_fill_the_cache_per_image"] = (time.perf_counter() - begun) / len(rows)
    case.collators = {
        "llava": PaddedCollator(processor),
        "padded": JnanaCollator(processor),
        "shared_image": JnanaCollator(processor, packing="shared_image"),
        "feature_cache": JnanaCollator(processor, packing="shared_image", images=cache),
    }
    return case


def parts_of(name: str) -> tuple[str, int, int]:
    """Stage, image tokens, and how many times as many images a step and a packed row have, of a case."""
    stage, tokens, *times = name.split("-")
    return stage, int(tokens), int(times[0].removeprefix("x")) if times else 1


def known_cases(scale: Scale) -> tuple[list[str], list[str]]:
    """The cases of a scale: those that run by default, and those on request."""
    stages = ("align", "sft")
    plain = [f"{stage}-{tokens}" for stage in stages for tokens in scale.text if tokens != scale.tiles]
    longest = max(tokens for tokens in scale.text if tokens != scale.tiles)
    return [*plain, f"sft-{longest}-x3", f"align-{scale.tiles}"], [f"sft-{scale.tiles}"]


def plan_step(rows: list[dict], processor: JnanaProcessor, max_row_tokens: int) -> list[dict]:
    """The packed rows of one step's conversations."""
    dataset = rows_to_dataset(rows)
    report = check_rows(dataset, processor, image_check="none", progress=False)
    return list(packed_rows(dataset, plan_rows(report.lengths, report.shared, max_row_tokens)))


def make_cache(case: Case, folder: Path, rows: list[dict], scale: Scale, device: torch.device) -> Any:
    args = DataArguments(feature_cache=str(folder))
    training_args = trainer_arguments(case, scale, folder, 1, device)
    return prepare_feature_cache(
        args, case.models["feature_cache"], case.processor, [rows_to_dataset(rows)], training_args
    )


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def reset(case: Case, arm: str) -> nn.Module:
    """Reset the arm's model to the weights that every arm and round starts from."""
    model = case.models[arm]
    with torch.no_grad():
        for name, weight in trainable(model):
            weight.copy_(case.weights[name])
            weight.grad = None
    return model


def trainer_arguments(
    case: Case, scale: Scale, folder: Path, num_steps: int, device: torch.device
) -> TrainingArguments:
    """The arguments of the Trainer. The conversations of a step are one batch in every arm."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=1,  # an item of the data set holds a whole batch
        train_sampling_strategy="sequential",
        learning_rate=1e-3,
        bf16=scale.dtype == torch.bfloat16,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=0 if device.type == "cpu" else 4,
    )


class Stopwatch(TrainerCallback):
    """Records the end of every step. A step is timed from the end of the step before, so it includes data loading."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clock = clock(device)
        self.ends: list[float] = []
        self.wall: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.ends.append(self.clock())
        self.wall.append(time.perf_counter())


def by_cpu_time(device: torch.device) -> bool:
    """Whether the CPU time of the process equals the time on an idle machine: on one CPU thread."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def clock(device: torch.device) -> Callable[[], float]:
    """The clock to use, in seconds."""
    return time.process_time if by_cpu_time(device) else time.perf_counter


@contextlib.contextmanager
def recorded_losses(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the loss of every forward pass."""
    losses: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda module, inputs, outputs: losses.append(outputs.loss.detach()))
    try:
        yield losses
    finally:
        handle.remove()


def run_arm(case: Case, arm: str, scale: Scale, num_steps: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Run one arm: `num_steps` steps of the stock Trainer from the common weights."""
    model = reset(case, arm)
    watch = Stopwatch(device)
    trainer = Trainer(
        model=model,
        args=trainer_arguments(case, scale, folder, num_steps, device),
        data_collator=functools.partial(collate_step, case.collators[arm]),
        train_dataset=[{"batch": batch} for batch in case.batches[arm]],
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    with recorded_losses(model) as losses, PeakMemory(device) as memory:
        trainer.train()
    seconds = watch.ends[-1] - watch.ends[0]
    return {
        "seconds": seconds,
        "wall_seconds": watch.wall[-1] - watch.wall[0],
        "samples_per_second": sum(case.conversations[1:num_steps]) / seconds,
        "supervised_tokens_per_second": case.facts["supervised_tokens_per_step"] * (num_steps - 1) / seconds,
        "peak_memory_bytes": memory.bytes,
        "losses": [float(loss) for loss in losses],
    }


def collate_step(collator: Callable, items: list[dict]) -> dict[str, torch.Tensor]:
    return collator(items[0]["batch"])


def inspect_arms(case: Case, num_steps: int, device: torch.device, dtype: torch.dtype) -> None:
    """
    Count the tokens, padding and floating-point operations of the second step, and compare the projector's first
    gradient with stock LLaVA's.
    """
    gradients, arms = {}, {}
    for arm in ARMS:
        model, batch = reset(case, arm), case.collators[arm](case.batches[arm][1])
        real = batch["attention_mask"].bool() if "attention_mask" in batch else batch["segment_ids"] >= 0
        labels = batch["labels"][:, 1:] if "labels" in batch else batch["shift_labels"]
        batch = send_to_device(batch, device)
        counter = FlopCounterMode(display=False)
        with counter, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model.train()
            model(**batch).loss.backward()
        gradients[arm] = torch.cat([w.grad.flatten() for name, w in trainable(model) if "projector" in name])
        arms[arm] = {
            "rows": real.shape[0],
            "tokens": int(real.sum()),
            "padded_share": 1 - float(real.float().mean()),
            "flops_per_step": counter.get_total_flops(),
            "gradient_difference": float((gradients[arm] - gradients["llava"]).norm() / gradients["llava"].norm()),
        }
        case.facts.setdefault("supervised_tokens_per_step", int((labels != -100).sum()))
        reset(case, arm)
    case.facts["arms"] = arms
    _, allowed = TOLERANCE[dtype]
    for arm, found in arms.items():
        if found["gradient_difference"] > allowed:
            raise RuntimeError(
                f"{case.name}: the projector's gradient in {arm} differs from stock LLaVA's by "
                f"{found['gradient_difference']:.1e}, more than {allowed:.0e}; throughput can be compared for equal "
                "gradients only"
            )


def compare_losses(case: Case, turns: dict[str, dict], dtype: torch.dtype) -> float:
    """The largest relative difference of any arm's loss from stock LLaVA's, over the steps of a round."""
    allowed, _ = TOLERANCE[dtype]
    largest = 0.0
    for arm, turn in turns.items():
        pairs = zip(turn["losses"], turns["llava"]["losses"], strict=True)
        difference = max(abs(mine - theirs) / theirs for mine, theirs in pairs)
        if not difference <= allowed:
            raise RuntimeError(
                f"{case.name}: the loss in {arm} differs from stock LLaVA's by {difference:.1e}, more than "
                f"{allowed:.0e}; throughput can be compared for equal losses only"
            )
        largest = max(largest, difference)
    return largest


def profile_arms(
    case: Case, device: torch.device, dtype: torch.dtype, file: Callable[[str], Path]
) -> dict[str, dict[str, float]]:
    """Profile one step of each arm; also writes the profiler's tables."""
    found = {}
    for arm in ARMS:
        model = reset(case, arm).train()
        make_batch = functools.partial(case.collators[arm], case.batches[arm][1])
        found[arm], text = profile_step(model, make_batch, device, dtype)
        file(arm).write_text(text + "\n")
        logger.info(f"{case.name}, {arm}\n{text}")
    return found


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second that a large matrix product reaches on this device."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(8):
        synchronize(device)
        begun = clock(device)()
        left @ right
        synchronize(device)
        best = max(best, 2 * size**3 / (clock(device)() - begun))
    return best


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all cases; yields the result so far after each case."""
    scale, device = SCALES[args.scale], torch.device(args.device)
    machine = describe_machine(device)
    machine["clock"] = "CPU time of the process" if by_cpu_time(device) else "wall"
    machine["peak_flops_by_matmul"] = peak_flops(device, scale.dtype)
    settings = {key: value for key, value in vars(args).items() if key not in ("results", "against")}
    sizes = {"text": scale.text, "vision": scale.vision, "dtype": str(scale.dtype), "lora_r": scale.lora_r}
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.cases:
            case = make_case(name, scale, args.steps, Path(folder), device)
            inspect_arms(case, args.steps, device, scale.dtype)
            rounds, difference = [], 0.0
            for number in range(args.rounds):
                order = [*ARMS[number % len(ARMS) :], *ARMS[: number % len(ARMS)]]
                turns = {arm: run_arm(case, arm, scale, args.steps, device, Path(folder) / "out") for arm in order}
                difference = max(difference, compare_losses(case, turns, scale.dtype))
                rounds.append(turns)
                logger.info(
                    f"{name}, round {number + 1} of {args.rounds}: "
                    + ", ".join(f"{arm} {turns[arm]['samples_per_second']:.2f}" for arm in ARMS)
                    + " samples/s"
                )
            cases.append(summarize(case.name, case.facts, rounds, ARMS, machine["peak_flops_by_matmul"]))
            cases[-1]["largest_loss_difference"] = difference
            cases[-1]["samples_per_step"] = statistics.mean(case.conversations[1 : args.steps])
            if args.profile:
                cases[-1]["profile"] = profile_arms(
                    case, device, scale.dtype, lambda arm, c=name: args.results / f"{args.name}_{c}_{arm}.txt"
                )
            machine["load_average_at_the_end"] = [round(load, 2) for load in os.getloadavg()]
            yield {"machine": machine, "settings": settings, "sizes": sizes, "cases": cases}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    parser.add_argument("--scale", choices=SCALES, default="phi2" if default == "cuda" else "small")
    parser.add_argument("--cases", nargs="+", help="some of align-49 ... sft-2340; default: all but sft-2340")
    parser.add_argument("--against", type=Path, help="another checkout, which takes turns with this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round; the first is not timed")
    parser.add_argument("--profile", action="store_true", help="also profile one step of each arm")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="name of the written files; default: train_throughput_<device>")
    args = parser.parse_args(argv)
    default_cases, on_request = known_cases(SCALES[args.scale])
    args.cases, known = args.cases or default_cases, [*default_cases, *on_request]
    if unknown := set(args.cases) - set(known):
        parser.error(f"--cases {sorted(unknown)[0]}: scale {args.scale} has {', '.join(known)}")
    if args.steps < 2 or args.rounds < 1:
        parser.error("--steps must be at least 2 (the first is not timed) and --rounds at least 1")
    args.name = args.name or f"train_throughput_{args.device.replace(':', '')}"
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("jnana.training.stages", "jnana.training.feature_cache", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    args.results.mkdir(parents=True, exist_ok=True)
    if args.against is not None:
        return compare_checkouts(args)
    for result in measure(args):
        write_result(result, args.results / f"{args.name}.json")
        draw(result, args.results / f"{args.name}.png")
    logger.info(table(result))
    return result


if __name__ == "__main__":
    main()

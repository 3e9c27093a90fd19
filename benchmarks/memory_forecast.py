"""The memory forecast of a run beside what it measures: every way to train, with at least 1 GB of tensors, on a CPU.

    python -m benchmarks.memory_forecast                       # all cases, each in a process of its own: half an hour
    python -m benchmarks.memory_forecast --cases sft-lora align-frozen
    python -m benchmarks.memory_forecast --scale tiny          # a test run in seconds

Each case trains for two steps with the stock `Trainer`, from random weights, in float32 unless its name says
otherwise. Measured is the largest sum of torch's allocations: every allocation and release of the CPU allocator, which
torch.profiler records, the buffers that kernels take for themselves included. It is the counterpart of
`torch.cuda.max_memory_allocated`. The resident memory of the process is larger: it has Python and the libraries, what
the C library keeps of freed blocks, and matrix products' packed copies (`--resident` measures its growth in a further
run without the profiler).
"""

import argparse
import contextlib
import functools
import gc
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    PhiConfig,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from benchmarks.machine import PeakMemory, describe_machine, write_result
from benchmarks.train_throughput import plan_step
from benchmarks.workloads import SCALES, Scale, make_images, make_processor, make_rows
from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration, quantization_config
from jnana.processing.data import JnanaCollator
from jnana.training.optimizers import trainer_optimizer
from jnana.training.options.arguments import LoraArguments, PartArguments
from jnana.training.profiling.forecast import (
    Forecast,
    forecast,
    make_optimizer,
    planned_model,
    replace_quantized,
    traceable,
)
from jnana.training.profiling.memory_trace import held_bytes
from jnana.training.stages import apply_stage


RESULTS = Path(__file__).parent / "results"
STEPS = 2
TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
TEXT |= {"vocab_size": 32_000, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Case:
    """
    One way to train.

    Args:
        stage (`str`): `pretrain`, `align` or `sft`.
        lora_r (`int`): Rank of the adapter; 0 for none.
        packing (`str`): `none`, `rows` or `shared_image`.
        tokens (`int`): Image tokens; of pretrain the tokens of a row.
        images (`int`): Images of a step.
        row (`int`): Tokens of a packed row at most.
        optimizer (`str`): `stock` or `muon`.
        dtype (`str`): Of frozen weights; with `bfloat16` the run is in mixed precision.
        quantization (`str`): `none` or `nf4`.
        freeze_vision_tower (`bool`): As the option of that name.
        fields (`dict`): Of `JnanaConfig`.
        options (`dict`): Of `TrainingArguments`.
    """

    stage: str
    lora_r: int = 0
    packing: str = "shared_image"
    tokens: int = 576
    images: int = 6
    row: int = 2048
    optimizer: str = "stock"
    dtype: str = "float32"
    quantization: str = "none"
    freeze_vision_tower: bool = True
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


CHECKPOINTED = {"gradient_checkpointing": True}
CROSS_ATTENTION = {"fusion": "cross_attention", "projector_type": "perceiver", "projector_num_latents": 64}
CASES = {
    "align-frozen": Case("align", images=9),
    "sft-lora": Case("sft", lora_r=64),
    "sft-full": Case("sft"),
    "sft-full-checkpointed": Case("sft", options=CHECKPOINTED),
    "sft-lora-checkpointed": Case("sft", lora_r=64, images=12, row=4096, options=CHECKPOINTED),
    "sft-full-muon": Case("sft", images=4, optimizer="muon"),
    "sft-full-8bit": Case("sft", images=5, options={"optim": "adamw_bnb_8bit"}),
    "pretrain": Case("pretrain", tokens=2048),
    "align-padded-49": Case("align", packing="none", tokens=49, images=16),
    "align-frozen-checkpointed": Case("align", images=24, row=4096, options=CHECKPOINTED),
    "sft-full-accumulated": Case("sft", images=3, options={"gradient_accumulation_steps": 2}),
    "sft-lora-rows-49": Case("sft", lora_r=64, packing="rows", tokens=49, images=9),
    "align-tiles-2340": Case("align", tokens=2340, images=2, row=3072),
    "sft-lora-cross-attention": Case("sft", lora_r=64, images=9, fields=CROSS_ATTENTION),
    "align-tower": Case("align", images=9, freeze_vision_tower=False),
    "pretrain-checkpointed-adamw_torch": Case(
        "pretrain", tokens=2048, options={**CHECKPOINTED, "optim": "adamw_torch"}
    ),
    "sft-lora-bfloat16": Case("sft", lora_r=64, dtype="bfloat16"),
    "sft-lora-nf4-checkpointed": Case("sft", lora_r=64, dtype="bfloat16", quantization="nf4", options=CHECKPOINTED),
}


@dataclass
class Prepared:
    """What a case trains on."""

    args: TrainingArguments
    batches: list[dict[str, Any]]
    collator: Callable[[list], dict[str, Any]]
    items: list[list]
    make_model: Callable[[], nn.Module]
    config: Any


def prepare(case: Case, scale: Scale | None, folder: Path) -> Prepared:
    """Data and model of a case; `scale` replaces the models by those of a test."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        use_cpu=True,
        bf16=case.dtype == "bfloat16",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **case.options,
    )
    if case.stage == "pretrain":
        return prepare_text(case, scale, args)
    tokens = case.tokens if scale is None else {49: 4, 576: 16, 2340: 24}[case.tokens]
    num_images = case.images if scale is None else min(case.images, 4)
    sizes = SCALES["small"] if scale is None else scale
    processor = make_processor(sizes, tokens)
    text = PhiConfig(**(TEXT if scale is None else scale.text[tokens]))
    config = JnanaConfig.from_vision_text_configs(
        CLIPVisionConfig(**sizes.vision[tokens]),
        text,
        image_token_id=processor.image_token_id,
        vision_feature_layer=-1,
        image_grid_pinpoints=processor.image_grid_pinpoints,
        **case.fields,
    )
    if case.fields:
        processor.tokens_per_view = config.num_image_tokens
    images = make_images(folder / "images", num_images)
    count = STEPS * args.gradient_accumulation_steps + 1  # the Trainer reads one batch ahead
    rows = make_rows(case.stage, images)
    if case.packing != "none":
        rows = plan_step(rows, processor, case.row if scale is None else scale.max_row_tokens[tokens])
    collator = JnanaCollator(processor, packing=case.packing)

    def make_model() -> nn.Module:
        model = planned_model(config, case.dtype)
        lora = LoraArguments(lora_r=case.lora_r)
        return apply_stage(model, case.stage, lora, case.packing, case.freeze_vision_tower)

    return Prepared(args, [traceable(collator(rows), config, False)], collator, [rows] * count, make_model, config)


def prepare_text(case: Case, scale: Scale | None, args: TrainingArguments) -> Prepared:
    """The same for a bare language model."""
    config = PhiConfig(**(TEXT if scale is None else scale.text[4]))
    length = case.tokens if scale is None else 64
    ids = torch.arange(length) % config.vocab_size
    items = [[{"input_ids": ids, "labels": ids}]] * (STEPS + 1)

    def make_model() -> nn.Module:
        return apply_stage(AutoModelForCausalLM.from_config(config), "pretrain")

    return Prepared(args, [default_data_collator(items[0])], default_data_collator, items, make_model, config)


def trainable_model(case: Case, prepared: Prepared) -> nn.Module:
    """The real model, with random weights; quantised by bitsandbytes from a checkpoint, as a run loads it."""
    if case.quantization == "none":
        return prepared.make_model()
    with tempfile.TemporaryDirectory() as folder:
        planned_model(prepared.config, case.dtype).save_pretrained(folder)
        settings = quantization_config({"quantization": case.quantization}, case.dtype)
        model = JnanaForConditionalGeneration.from_pretrained(
            folder, quantization_config=settings, dtype=case.dtype, device_map={"": "cpu"}
        )
    return apply_stage(model, case.stage, LoraArguments(lora_r=case.lora_r), case.packing)


def collate(collator: Callable, items: list[dict]) -> dict[str, Any]:
    return collator(items[0]["batch"])


def trainer_of(case: Case, prepared: Prepared, model: nn.Module) -> Trainer:
    trainer = Trainer(
        model=model,
        args=prepared.args,
        data_collator=functools.partial(collate, prepared.collator),
        train_dataset=[{"batch": batch} for batch in prepared.items],
        optimizer_cls_and_kwargs=trainer_optimizer(case.optimizer, model, prepared.args),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextlib.contextmanager
def recorded_allocations() -> Iterator[list[int]]:
    """Adds to a list the largest sum of the bytes that torch allocates on the CPU within the block."""
    peak: list[int] = []
    gc.collect()  # what is freed within the block, but was made before, would be subtracted
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield peak
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = most = 0
    for _, num_bytes in memory:
        held += num_bytes
        most = max(most, held)
    peak.append(most)


def held_by(model: nn.Module) -> int:
    """Bytes of the real model, with the constants that bitsandbytes keeps beside packed weights."""
    constants = 0
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if state is not None:
            constants += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return sum(held_bytes(model, lambda name, tensor: "").values()) + constants


def measure(case: Case, scale: Scale | None = None, resident: bool = False) -> tuple[Forecast, dict[str, Any]]:
    """The forecast, and what two steps take."""
    with tempfile.TemporaryDirectory(prefix="jnana-") as folder:
        prepared = prepare(case, scale, Path(folder))

        with torch.device("meta"):
            planned = prepared.make_model()
            replace_quantized(planned, {"quantization": case.quantization}, case.dtype)
        optimizer = functools.partial(make_optimizer, prepared.args, case.optimizer, PartArguments())
        found = forecast(planned, prepared.batches[0], optimizer, prepared.args)
        model = trainable_model(case, prepared)
        held = held_by(model)
        if resident:
            with PeakMemory(torch.device("cpu")) as memory:
                trainer_of(case, prepared, model).train()
            return found, {"measured_resident_growth": memory.bytes}
        with recorded_allocations() as peak:
            trainer_of(case, prepared, model).train()
    return found, {"measured_weights": held, "measured": held + peak[0]}


def entry(name: str, found: Forecast, measured: dict[str, Any]) -> dict[str, Any]:
    """What the JSON file says of a case."""
    said = {"case": name, "rows": list(found.rows), "peak_in": found.step.moment, "forecast": found.total}
    said |= {"parts": {**found.weights, **found.step.parts}, **measured}
    if "measured" in measured:
        said["forecast_over_measured"] = found.total / measured["measured"]
    return said


def table(cases: list[dict[str, Any]]) -> str:
    """One line for each case, in MB of 10^6 bytes."""
    lines = ["| case | rows | weights | gradients, optimizer | activations | logits | forecast | measured | ratio |"]
    lines.append("|" + "---|" * 9)
    for case in cases:
        parts = case["parts"]
        weights = sum(size for name, size in parts.items() if name.startswith(("weights", "adapter", "buffers")))
        states = parts["gradients"] + parts["optimizer"] + parts.get("optimizer step", 0)
        columns = [weights, states, parts["activations"], parts["logits and loss"], case["forecast"], case["measured"]]
        sizes = " | ".join(f"{size / 1e6:,.0f}" for size in columns)
        rows = " x ".join(map(str, case["rows"]))
        lines.append(f"| {case['case']} | {rows} | {sizes} | {case['forecast_over_measured']:.3f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--resident", action="store_true", help="also measure the growth of the resident memory")
    parser.add_argument("--one", action="store_true", help="measure a single case in this process and print it")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory_forecast_cpu.json")
    args = parser.parse_args(argv)
    scale = SCALES["tiny"] if args.scale == "tiny" else None
    if args.one:
        logging.getLogger("jnana.training.stages").setLevel(logging.WARNING)
        torch.set_num_threads(1)
        measured = measure(CASES[args.cases[0]], scale, args.resident)
        print(json.dumps(entry(args.cases[0], *measured)))
        return []
    cases: list[dict[str, Any]] = []
    for name in args.cases:
        said: dict[str, Any] = {}
        for more in ([], ["--resident"])[: 1 + args.resident]:
            command = [sys.executable, "-m", "benchmarks.memory_forecast", "--one", "--cases", name, *more]
            ran = subprocess.run([*command, "--scale", args.scale], stdout=subprocess.PIPE, text=True, check=True)
            said |= json.loads(ran.stdout.splitlines()[-1])
        cases.append(said)
        print(table(cases[-1:]).splitlines()[-1], flush=True)
        machine = describe_machine(torch.device("cpu"))
        write_result({"machine": machine, "text": TEXT, "cases": cases}, args.output)
    print(table(cases))
    return cases


if __name__ == "__main__":
    main()

"""Looks at the data of a recipe before the run: sizes, what is supervised, repetitions, leaks, a page of examples.

    python run_inspect.py recipes/jnana/sft.yaml
    python run_inspect.py recipes/jnana/align.yaml --train_data my_photos --tokens_per_second 4000

Takes the recipe and the options of run_align.py or run_sft.py and reads no weights. Of several sources it shows what
an epoch has of each. Writes into
`output_dir/inspection`: `index.html` with the figures and 50 rows with their images, and `inspection.json`.
`python run_inspect.py --help` lists all options.
"""

import dataclasses
import json
import logging
import math
import sys
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from jnana.evaluation.inspection import Inspection, find_repetitions, inspect_rows, labelled_parts, write_inspection
from jnana.processing import JnanaProcessor
from jnana.processing.data import load_rows
from jnana.processing.data.checks import raise_for_problems
from jnana.processing.data.mixture import DataSource, Share, SourceRows, mix, plan_mixture, shares, source_names
from jnana.processing.data.packing import RowPlan
from jnana.processing.data.prepared_rows import PrepareOptions, RowPreparation, read_source
from jnana.processing.data.rows import iterate_rows, rows_to_dataset
from jnana.training.console import log_to_stdout
from jnana.training.data import prepare_options
from jnana.training.model_setup import prepare_processor
from jnana.training.options.arguments import DataArguments, LoraArguments, ModelArguments, PartArguments, RunArguments
from jnana.training.options.model_checks import check_model_arguments, check_models, limit_to_context
from jnana.training.options.option_checks import check_data
from jnana.training.options.path_checks import check_output_dir
from jnana.training.options.recipes import parse_arguments, recipe_name
from jnana.training.options.sources import is_list, sources_of


logger = logging.getLogger("jnana")

SHOWN = 3  # conversations in the terminal


@dataclass
class InspectArguments:
    """What to look at, and for which machine."""

    stage: Literal["align", "sft"] | None = field(
        default=None, metadata={"help": "Whose recipe it is; default: by its name."}
    )
    stream_rows: int = field(default=2000, metadata={"help": "Rows of a stream that are looked at."})
    max_examples: int = field(default=50, metadata={"help": "Rows of each source on the page."})
    num_processes: int = field(default=1, metadata={"help": "Of the run, for its steps an epoch."})
    tokens_per_second: float | None = field(
        default=None, metadata={"help": "Of the machine, as an earlier run logged it: forecasts the time of an epoch."}
    )


def main(argv: list[str]) -> None:
    # 1. Arguments and logging
    classes = (
        InspectArguments,
        ModelArguments,
        DataArguments,
        LoraArguments,
        PartArguments,
        RunArguments,
        TrainingArguments,
    )
    args, model_args, data_args, *_, training_args = parse_arguments(classes, argv)
    log_to_stdout()
    check_model_arguments(model_args)
    check_models(model_args)
    check_data(training_args, data_args)
    folder = Path(training_args.output_dir) / "inspection"
    check_output_dir(str(folder))
    recipe = recipe_name(argv) or "data"
    align = args.stage == "align" or (args.stage is None and Path(recipe).stem.startswith("align"))

    # 2. The processor, and the rows of both sources
    processor = prepare_processor(model_args)
    limit_to_context(data_args, model_args)
    inspections: list[Inspection] = []
    epoch = None
    for evaluation in (False, True):
        seed = None if evaluation else training_args.seed
        options = prepare_options(data_args, training_args.output_dir, evaluation, True, seed, align)
        options = dataclasses.replace(options, on_bad_sample="skip", bad_samples_file=None)
        sources = sources_of(data_args, evaluation)
        named = is_list(data_args.eval_data if evaluation else data_args.train_data)
        found = [inspect_source(source, named, evaluation, options, processor, args.stream_rows) for source in sources]
        inspections += found
        if not evaluation and not options.streaming:
            epoch = epoch_of(sources, found, options)
    find_repetitions(inspections)

    # 3. In the terminal, as JSON, as a page
    alone = sum(inspection.trains for inspection in inspections) == 1 and not (epoch and epoch.shares)
    for inspection in inspections:
        print(describe(inspection))
        if inspection.trains and alone:
            print(steps_line(inspection.num_tokens, inspection.num_sequences, args, training_args))
        for finding in inspection.findings:
            print("\n".join([f"  LOOK: {finding.title}", *(f"    {example}" for example in finding.examples[:3])]))
    if epoch and epoch.shares:
        print(epoch.describe(args, training_args))
    print(f"\n{SHOWN} conversations, [[supervised]]:")
    for row in islice(iterate_rows(inspections[0].rows), SHOWN):
        parts = labelled_parts(row["conversations"][0], processor)
        print(f"\n{row['source']}\n" + "".join(f"[[{text}]]" if labelled else text for text, labelled in parts))
    figures = {
        inspection.name: inspection.figures() | {"findings": list(map(dataclasses.asdict, inspection.findings))}
        for inspection in inspections
    }
    if epoch and epoch.shares:
        figures["epoch"] = epoch.figures()
    (folder / "inspection.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    page = write_inspection(folder / "index.html", inspections, processor, recipe, args.max_examples)
    print(f"\nimages, questions, answers: {page}")


def inspect_source(
    source: DataSource,
    named: bool,
    evaluation: bool,
    options: PrepareOptions,
    processor: JnanaProcessor,
    stream_rows: int,
) -> Inspection:
    """Read, check and plan a source as the run would, which finds it in the data cache."""
    options, rows = source.options(options), None
    if options.streaming:
        rows = rows_to_dataset(islice(read_source(source.data, options, load_rows), stream_rows))
        logger.info(f"{source.data} is a stream: its first {len(rows):,} rows are looked at")
    preparation = RowPreparation(source.data, processor, options, rows)
    usable, report = preparation.rows_of(preparation.run())
    raise_for_problems(report, "skip")
    plan = None
    if options.packing != "none":
        whole = dataclasses.replace(source, weight=None, samples=None, repeat=1)
        plan = plan_mixture(mix([whole], [SourceRows("", usable, report)], options.seed), options)
    name = ("eval" if evaluation else "train") + (f" {source.name}" if named else "")
    return inspect_rows(name, str(source.data), not evaluation, usable, report, plan, processor, options.max_length)


@dataclass
class Epoch:
    """
    The rows of several sources that an epoch has.

    Args:
        shares (`list[Share]`): Of each source; empty for a single source with all its rows.
        sequences (`int`): Rows that batches are made of: packed rows, or conversations.
        tokens (`int`): Without padding; those of a shared prefix once.
        plan (`RowPlan`, *optional*): How the rows are packed.
    """

    shares: list[Share]
    sequences: int
    tokens: int
    plan: RowPlan | None

    def figures(self) -> dict[str, Any]:
        """For `inspection.json`."""
        shares = {share.name: dataclasses.asdict(share) for share in self.shares}
        return {"sources": shares, "tokens": self.tokens, "sequences": self.sequences}

    def describe(self, args: InspectArguments, training_args: TrainingArguments) -> str:
        """For the terminal."""
        number = f"{len(self.shares)} source" + ("s" if len(self.shares) > 1 else "")
        lines = [f"\nan epoch of {number}", *(f"  {share}" for share in self.shares)]
        lines += [] if self.plan is None else [f"  {self.plan}"]
        return "\n".join([*lines, steps_line(self.tokens, self.sequences, args, training_args)])


def epoch_of(sources: list[DataSource], found: list[Inspection], options: PrepareOptions) -> Epoch:
    """Draw and pack the rows of an epoch as the run does."""
    names = source_names(sources)
    parts = [SourceRows(name, each.rows, each.report) for name, each in zip(names, found, strict=True)]
    mixture = mix(sources, parts, options.seed)
    mixed = len(parts) > 1 or mixture.rows is not parts[0].rows
    plan = plan_mixture(mixture, options) if options.packing != "none" else None
    of_sources = shares(mixture, parts, options.max_length)
    tokens = sum(share.tokens for share in of_sources) if plan is None else sum(plan.sizes)
    sequences = sum(share.conversations for share in of_sources) if plan is None else len(plan.rows)
    return Epoch(of_sources if mixed else [], sequences, tokens, plan)


def describe(inspection: Inspection) -> str:
    """The figures of a source for the terminal."""
    figures = inspection.figures()
    shortest, middle, longest = figures["tokens_of_a_conversation"]
    images = ", ".join(f"{number} in {count:,}" for number, count in figures["images_per_row"].items())
    lines = [
        f"\n{inspection.name}: {inspection.source}",
        f"  {figures['rows']:,} rows, {figures['conversations']:,} conversations of {shortest} to {longest} tokens, "
        f"half of them up to {middle}; {figures['conversations_cut_to_max_length']:,} are cut to max_length",
        f"  {figures['different_images']:,} different images; images a row: {images}",
        f"  {figures['supervised_share']:.1%} of the tokens are supervised",
    ]
    if inspection.plan is not None:
        lines.append(f"  {inspection.plan}")
    return "\n".join(lines)


def steps_line(tokens: int, sequences: int, args: InspectArguments, training_args: TrainingArguments) -> str:
    """The tokens and steps of an epoch, and its time."""
    size = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
    steps = math.ceil(sequences / (size * args.num_processes))
    line = f"  an epoch has {tokens:,} tokens and {steps:,} steps of {size} rows"
    line += f" on each of {args.num_processes} processes" if args.num_processes > 1 else ""
    if args.tokens_per_second:
        line += f", {tokens / args.tokens_per_second / 60:,.1f} minutes at {args.tokens_per_second:,.0f} tokens/s"
    return line


if __name__ == "__main__":
    main(sys.argv[1:])

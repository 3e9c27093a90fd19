"""The arguments of run_evaluate.py, and the checks that need neither model nor data."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .benchmarks import BENCHMARKS


# Options that a benchmark does not read, unless it says so (`Benchmark.takes`).
NOT_OF_ALL = ("eval_data", "eval_format", "eval_split", "independent_turns", "prompt", "text_column", "streaming")
NOT_OF_ALL += ("annotations_file", "ocr_file")


@dataclass
class EvaluationArguments:
    """The model, the test sets, how to answer, and where to write the results.

    `eval_data` is one test set, or a mapping of names to test sets, each with its own results. In a recipe:

    ```yaml
    eval_data: {test: data/test.json, unseen: data/unseen.json}
    ```

    On the command line the mapping is written as JSON. `image_folder` may be a mapping with the same names.

    `benchmark` asks an official benchmark instead; docs/benchmarks.md says which files each takes.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A Jnana checkpoint: a full one, a checkpoint-N of the Trainer, or an adapter directory."},
    )
    eval_data: str | None = field(default=None, metadata={"help": "A test set, or a mapping of names to test sets."})
    eval_format: str = field(default="auto", metadata={"help": "auto, coco_captions, llava_instruct, ..."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of `eval_data` where it has several (train), or of ScienceQA (test)."}
    )
    benchmark: str | None = field(default=None, metadata={"help": f"Instead of eval_data: {', '.join(BENCHMARKS)}."})
    questions_file: str | None = field(
        default=None, metadata={"help": "The benchmark's official questions; a directory for POPE's splits and MME."}
    )
    annotations_file: str | None = field(default=None, metadata={"help": "VQAv2's annotations; none for test splits."})
    ocr_file: str | None = field(
        default=None, metadata={"help": "For textvqa_ocr: LLaVA's llava_textvqa_val_v051_ocr.jsonl."}
    )
    image_folder: str | None = field(default=None, metadata={"help": "Directory of the images; may be a mapping too."})
    independent_turns: bool = field(
        default=True,
        metadata={"help": "Ask each question alone, not after the earlier turns with their true answers."},
    )
    prompt: str | None = field(default=None, metadata={"help": "Question to ask about each captioned image."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the captions or answers, where it has none of the known names."}
    )
    streaming: bool = field(default=False)
    max_rows: int | None = field(default=None, metadata={"help": "Use only the first rows of each test set."})
    max_image_pixels: int | None = field(default=None, metadata={"help": "Questions about larger images are skipped."})
    batch_size: int = field(default=16, metadata={"help": "Questions per `generate` call and process."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer in tokens."})
    share_prefix: bool = field(
        default=True, metadata={"help": "Read the images of several questions once, not once for each question."}
    )
    blind: bool = field(default=True, metadata={"help": "Also answer all questions with grey images."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Dtype of the weights; default: the checkpoint's."}
    )
    quantization: Literal["none", "nf4", "int8"] | None = field(
        default=None,
        metadata={"help": "Of the language model; default: as in training for an adapter's base, else as saved."},
    )
    attn_implementation: str | None = field(default=None)
    trust_remote_code: bool = field(default=False)
    num_workers: int = field(default=2, metadata={"help": "Dataloader workers that decode images."})
    output_dir: str | None = field(default=None, metadata={"help": "results.json, report.html, predictions.jsonl ..."})
    title: str | None = field(default=None, metadata={"help": "Heading of the report; default: the model's name."})
    update_card: bool = field(
        default=True,
        metadata={"help": "Add the scores to the README.md of a local checkpoint; not with max_rows, not on the Hub."},
    )
    max_examples: int = field(default=400, metadata={"help": "Questions shown in the report for each test set."})

    @property
    def test_sets(self) -> dict[str, str]:
        """Name -> source of each test set; a single test set is named `test`, a benchmark by its own name."""
        if self.benchmark is not None:
            return {self.benchmark: str(self.questions_file)}
        return _mapping("eval_data", self.eval_data, ["test"])

    @property
    def image_folders(self) -> dict[str, str | None]:
        """Name -> image directory of each test set."""
        names = list(self.test_sets)
        if self.image_folder is None:
            return dict.fromkeys(names)
        folders = _mapping("image_folder", self.image_folder, names)
        if sorted(folders) != sorted(names):
            data = "eval_data" if self.benchmark is None else "benchmark"
            raise ValueError(f"image_folder names {sorted(folders)}, {data} {sorted(names)}; use the same names")
        return {name: folders[name] for name in names}

    def check(self) -> None:
        """Check everything that needs neither model nor data.

        Raises:
            ValueError: naming the field, its value and the remedy.
        """
        self._check_benchmark()
        data = "eval_data" if self.benchmark is None else "questions_file"
        for name in ("model_name_or_path", data, "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set; give it in the recipe or as --{name}")
        for name, least in (("batch_size", 1), ("max_new_tokens", 1), ("num_workers", 0), ("max_examples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("max_rows", "max_image_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1; leave it out for no limit")
        for name in self.test_sets:
            if len(self.test_sets) > 1 and (name != Path(name).name or name in ("", ".", "..")):
                raise ValueError(
                    f"eval_data names a test set {name!r}; the name becomes a directory in output_dir, so use one word"
                )
        for folder in self.image_folders.values():
            if folder is not None and not Path(folder).is_dir():
                raise ValueError(
                    f"image_folder {folder!r} is not a directory; give the directory that holds the images"
                )

    def _check_benchmark(self) -> None:
        """Check the options of a benchmark; without one, that none of them is set."""
        files = ("questions_file", "annotations_file", "ocr_file")
        if self.benchmark is None:
            for name in files:
                if getattr(self, name):
                    raise ValueError(
                        f"{name} is set without benchmark; set benchmark to one of {', '.join(BENCHMARKS)}"
                    )
            return
        if self.benchmark not in BENCHMARKS:
            raise ValueError(f"benchmark is {self.benchmark!r}; it must be one of {', '.join(BENCHMARKS)}")
        benchmark = BENCHMARKS[self.benchmark]
        defaults = {option.name: option.default for option in fields(self)}
        for name in NOT_OF_ALL:
            if getattr(self, name) != defaults[name] and name not in benchmark.takes:
                raise ValueError(f"{name} is set, but benchmark {self.benchmark} does not read it; remove {name}")
        for name in benchmark.needs:
            if not getattr(self, name):
                raise ValueError(f"{name} is not set; benchmark {self.benchmark} needs it (docs/benchmarks.md)")
        for name in files:
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise ValueError(f"{name} {path!r} does not exist; give the official file (docs/benchmarks.md)")

    def folder_of(self, name: str) -> Path:
        """Directory for the predictions of a test set: `output_dir`, or one subdirectory for each."""
        folder = Path(str(self.output_dir))
        return folder if len(self.test_sets) == 1 else folder / name


def _mapping(field_name: str, value: str | None, names: list[str]) -> dict[str, str]:
    """The parsed mapping if the value is JSON (a recipe's list is too), else the value for every name."""
    text = str(value).strip()
    if not text.startswith(("{", '["', "[{")):
        return dict.fromkeys(names, text)
    try:
        parsed: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f'{field_name} {text!r} is not valid JSON ({error}); write {{"name": "path", ...}}'
        ) from error
    if not parsed or not isinstance(parsed, dict) or not all(isinstance(path, str) for path in parsed.values()):
        raise ValueError(f'{field_name} {text!r} must map names to paths; write {{"name": "path", ...}}')
    return parsed

"""The benchmarks that run_evaluate.py knows: how each is read, asked, scored and handed in."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..measures import Record, Scoring
from .files import BenchmarkFiles, Item
from .readers import (
    read_coco_captions,
    read_gqa,
    read_mme,
    read_pope,
    read_scienceqa,
    read_textvqa,
    read_textvqa_ocr,
    read_vqav2,
)
from .rules import CAPTIONS, GQA, MME, POPE, SCIENCEQA, TEXTVQA, VQAV2
from .servers import (
    write_coco_captions,
    write_gqa,
    write_mme,
    write_pope,
    write_scienceqa,
    write_textvqa,
    write_vqav2,
)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title (`str`): Its name in model cards.
        read (`Callable`): `BenchmarkFiles` -> its questions.
        prompt (`str`): What is asked about an image, with the names of `Item.fields` in braces.
        scoring (`Scoring`): Its measures.
        write (`Callable`): Records and a directory -> the files for its server, written.
        takes (`tuple[str, ...]`): Options beside `questions_file` and `image_folder` that it reads.
        needs (`tuple[str, ...]`): Those without which it cannot be read.
        split (`str`, *optional*): `eval_split` where it is not given.
        by_split (`bool`): Whether question types are splits that papers report apart, so that the card has each.
        prompt_of (`str`): Where the prompt comes from, for results.json.
    """

    title: str
    read: Callable[[BenchmarkFiles], list[Item]]
    prompt: str
    scoring: Scoring
    write: Callable[[Sequence[Record], Path], list[Path]]
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("image_folder",)
    split: str | None = None
    by_split: bool = False
    prompt_of: str = "LLaVA-1.5"


# LLaVA-1.5's prompts (Liu et al., Improved Baselines with Visual Instruction Tuning, 2023). It was not evaluated on
# COCO captions: the prompt is the first line of the one that it was trained with on TextCaps, where a line of OCR
# tokens follows. lmms-eval asks COCO captions with this line, too.
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."
SHORT_ANSWER_OCR = "{question}\n{ocr}Answer the question using a single word or phrase."
LETTER = "{context}{question}\n{choices}\nAnswer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."

BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark("VQAv2", read_vqav2, SHORT_ANSWER, VQAV2, write_vqav2, takes=("annotations_file",)),
    "gqa": Benchmark("GQA", read_gqa, SHORT_ANSWER, GQA, write_gqa),
    "textvqa": Benchmark("TextVQA", read_textvqa, SHORT_ANSWER, TEXTVQA, write_textvqa),
    "textvqa_ocr": Benchmark(
        "TextVQA with LLaVA's OCR tokens",
        read_textvqa_ocr,
        SHORT_ANSWER_OCR,
        TEXTVQA,
        write_textvqa,
        takes=("ocr_file",),
        needs=("image_folder", "ocr_file"),
    ),
    "pope": Benchmark("POPE", read_pope, SHORT_ANSWER, POPE, write_pope, by_split=True),
    "scienceqa": Benchmark(
        "ScienceQA-IMG", read_scienceqa, LETTER, SCIENCEQA, write_scienceqa, takes=("eval_split",), split="test"
    ),
    "mme": Benchmark("MME", read_mme, SHORT_ANSWER, MME, write_mme, needs=()),
    "coco_captions": Benchmark(
        "COCO captions",
        read_coco_captions,
        CAPTION,
        CAPTIONS,
        write_coco_captions,
        prompt_of="LLaVA-1.5's training on TextCaps, without its line of OCR tokens",
    ),
}

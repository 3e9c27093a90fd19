"""Export a model for other programs, and compare its answers before and after.

    python run_export.py --model_name_or_path outputs/llava_chess/sft --to llava --output_dir outputs/llava_chess/llava
    python run_export.py --model_name_or_path outputs/jnana/sft --to gguf --output_dir outputs/jnana/gguf \\
        --distill true --train_data llava_instruct_150k.json --image_folder train2017
    python run_export.py --model_name_or_path outputs/jnana/sft --to onnx --output_dir outputs/jnana/onnx

`llava` writes a folder that transformers loads as LLaVA, without code of this package; `gguf` writes mmproj.gguf and
text/ for llama.cpp; `onnx` three graphs for ONNX Runtime and transformers.js. What the format has no place for is
refused with the reason and the nearest way. `output_dir` appears only if the exported files answer as the model does
(docs/exports.md). `python run_export.py --help` lists all options.
"""

import itertools
import logging
import sys
from dataclasses import dataclass, field
from typing import Literal

from jnana.evaluation import QuestionSet
from jnana.export import ExportOptions, export_model
from jnana.export.comparison import ChatsOfQuestions
from jnana.processing.data import load_image, load_rows
from jnana.training.options.path_checks import check_output_apart, check_source
from jnana.training.options.recipes import parse_arguments


@dataclass
class ExportArguments:
    """The model, the format, and the data to compare by and to distil on."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Jnana checkpoint, an adapter directory, a LLaVA checkpoint, or a Hub id."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "A new directory."})
    to: Literal["llava", "gguf", "onnx"] | None = field(default=None, metadata={"help": "The format to write."})
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={"help": "Dtype of the weights; default: the checkpoint's for llava, float32 for the others."},
    )
    double_linear: bool = field(
        default=False,
        metadata={"help": "Write a linear projector with gelu, for programs that do not know the activation linear."},
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Questions to compare by; default: built-in ones about built-in images."}
    )
    eval_format: str = field(default="auto", metadata={"help": "auto, coco_captions, llava_instruct, ..."})
    max_rows: int | None = field(default=None, metadata={"help": "Compare by the first rows of eval_data only."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest compared answer in tokens."})
    distill: bool = field(default=False, metadata={"help": "Fit an mlp projector to a resblock one."})
    train_data: str | None = field(default=None, metadata={"help": "Data whose images the distillation uses."})
    train_format: str = field(default="auto", metadata={"help": "auto, coco_captions, llava_instruct, ..."})
    image_folder: str | None = field(default=None, metadata={"help": "Directory of the images of both data sets."})
    distill_images: int = field(default=1000, metadata={"help": "Images to distil on, at most."})
    distill_steps: int = field(default=2000, metadata={"help": "Steps of AdamW of the distillation."})


def main(argv: list[str]) -> None:
    # 1. Arguments, and all checks that need no model
    (args,) = parse_arguments([ExportArguments], argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    for name in ("model_name_or_path", "output_dir", "to"):
        if not getattr(args, name):
            raise ValueError(f"{name} is not set; give it as --{name}")
    check_source("model_name_or_path", args.model_name_or_path)
    check_output_apart(args.output_dir, {"model_name_or_path": args.model_name_or_path}, allowed="exported")
    if args.distill and args.train_data is None:
        raise ValueError("train_data is not set; distill fits the projector on its images: give it as --train_data")

    # 2. The questions to compare by, and the images to distil on
    chats, images = None, iter(())
    if args.eval_data is not None:
        rows = load_rows(
            args.eval_data, format=args.eval_format, image_folder=args.image_folder, max_rows=args.max_rows
        )
        chats = ChatsOfQuestions(QuestionSet(rows))
    if args.distill:
        rows = load_rows(args.train_data, format=args.train_format, image_folder=args.image_folder, captions=True)
        references = {str(image["path"] or id(image)): image for row in rows for image in row["images"]}
        images = (load_image(image) for image in itertools.islice(references.values(), args.distill_images))

    # 3. Export, compare and keep
    options = {name: getattr(args, name) for name in ("to", "dtype", "double_linear", "distill", "distill_steps")}
    export_model(
        args.model_name_or_path,
        args.output_dir,
        ExportOptions(max_new_tokens=args.max_new_tokens, **options),
        chats=chats,
        images=images,
    )


if __name__ == "__main__":
    main(sys.argv[1:])

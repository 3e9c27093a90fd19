"""Merge an adapter of run_sft into its base, to one ordinary checkpoint that loads anywhere.

    python run_merge.py --model_name_or_path outputs/jnana/sft --output_dir outputs/jnana/merged
    python run_merge.py --model_name_or_path outputs/jnana/sft --output_dir outputs/jnana/merged_full --merge_base full
    python run_merge.py --model_name_or_path me/jnana-lora --output_dir merged --dtype float32

An adapter that was trained on a 4-bit base is merged into that base, written out in `dtype` (`--merge_base
dequantized`, the default: what was trained), or into the original weights (`full`). The logits before and after are
compared, and the choice and the difference are logged and written into the merged config and card.
`python run_merge.py --help` lists all options.
"""

import logging
import sys
from dataclasses import dataclass, field
from typing import Literal

from jnana.training.adapters import is_adapter
from jnana.training.merging import merge_adapter
from jnana.training.options.path_checks import check_output_apart, check_output_dir, check_source
from jnana.training.options.recipes import parse_arguments


@dataclass
class MergeArguments:
    """The adapter, the base to merge it into, and the folder of the merged checkpoint."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Adapter directory of run_sft, or Hub id."})
    output_dir: str | None = field(default=None, metadata={"help": "The merged checkpoint."})
    merge_base: Literal["dequantized", "full"] = field(
        default="dequantized",
        metadata={"help": "The quantised base, written out (as trained), or the original weights."},
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Dtype of the merged weights; default: the one the adapter was trained with."}
    )


def main(argv: list[str]) -> None:
    # 1. Arguments, and all checks that need no model
    (args,) = parse_arguments([MergeArguments], argv)
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s", force=True)
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"{name} is not set; give it as --{name}")
    check_source("model_name_or_path", args.model_name_or_path, "give an adapter directory of run_sft, or a Hub id")
    if not is_adapter(args.model_name_or_path):
        raise ValueError(
            f"model_name_or_path {args.model_name_or_path!r} is not an adapter; give a directory that run_sft "
            "wrote with lora_r > 0"
        )
    models = {"model_name_or_path": args.model_name_or_path}
    check_output_apart(args.output_dir, models, allowed="merged")
    check_output_dir(args.output_dir)

    # 2. Merge, compare and save
    merge_adapter(args.model_name_or_path, args.output_dir, args.merge_base, args.dtype)


if __name__ == "__main__":
    main(sys.argv[1:])

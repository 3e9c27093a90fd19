"""Small pieces on larger images, seen whole and in tiles: does the assistant see more with tiles?

    python examples/chess_demo/run_demo.py --seed 0 --output_dir outputs/seed_0
    python examples/chess_demo/tiles.py --demo_dir outputs/seed_0 --output_dir outputs/tiles_0

The images have twice the demo's side, 144 pixels, and pieces of the demo's size. Vision tower and language model are
the demo's; align and sft run again on the new images, once with each image scaled down to the tower's 72 pixels
(`image_geometry: crop`, 36 image tokens), and once with the whole image and its four quarters at full resolution
(`image_geometry: anyres`, 192 image tokens). A complete stage is not run again.
"""

import argparse
import json
import os
import time
from pathlib import Path

from ablations import describe, scores_of
from run_demo import Job, Stage, assistant_commands, example, run_all
from scenes import IMAGE_SIZE


STEPS = 250  # of sft, half of the demo's

# A row holds three images with their questions in both variants, so that both take equally many steps.
VARIANTS = {
    "whole": ({"image_geometry": "crop"}, {"max_steps": STEPS}),
    "tiles": ({"image_geometry": "anyres"}, {"max_steps": STEPS, "max_row_tokens": 900}),
}
TRAIN_IMAGES = 5400  # more than sft takes


def tile_stages(demo: Path, output: Path, seed: int) -> list[Stage]:
    """The stages in order; the two variants run side by side, on one core each."""
    data = output / "data"
    draw = example(
        "make_data.py",
        part="images",
        output_dir=data,
        seed=seed,
        test_seed=1_000_000 + seed,
        image_size=2 * IMAGE_SIZE,
        train_images=TRAIN_IMAGES,
        single_images=1,
    )
    commands = {
        name: assistant_commands(
            data, demo / "clip", demo / "pretrain", output / name, seed, align_options, None, sft_options
        )
        for name, (align_options, sft_options) in VARIANTS.items()
    }
    titles = ("align", "sft", "evaluate")
    return [Stage("draw images", [Job("images", draw, 1)])] + [
        Stage(title, [Job(f"{title}_{name}", command[title], 1) for name, command in commands.items()])
        for title in titles
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo_dir", type=Path, required=True, help="a complete run of run_demo.py")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    output = arguments.output_dir.resolve()
    started = time.monotonic()
    seconds = run_all(tile_stages(arguments.demo_dir.resolve(), output, arguments.seed), output)
    for name in VARIANTS:
        result = {"variant": name, "seconds": {key: s for key, s in seconds.items() if key.endswith(name)}}
        result |= scores_of(output / name / "evaluation")
        (output / name / "result.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
        print(f"{name}: {describe(result)}", flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

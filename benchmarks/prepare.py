"""What happens before the first step, on data of COCO's and LLaVA-Instruct's size: time, CPU time and memory.

    python -m benchmarks.prepare                                     # this checkout
    python -m benchmarks.prepare --against ../before --tokenizer outputs/sft --data llava

The files are made first: 118,287 JPEG files of 640x480 pixels (hard links to a few), with five captions each, or
157,712 LLaVA records. Each start is a process of its own, which calls `load_conversations` as the training scripts
do: this checkout cold, warm, and warm in two processes, then the older one, which keeps nothing. Times and memory are
those beyond the imports. `held` is the proportional set size afterwards, in which a page that two processes share
counts half for each; `peak` is the resident memory of this process, its workers not counted. Token ids, labels,
positions and normalised pixels of the first 200 batches must be equal in all starts, of the older checkout too.

Last the collators of both checkouts make the same batches, as one worker of a dataloader does: on one thread, images
as the training scripts send them. They take turns, and the ratio is that of one turn's CPU times.
"""

import argparse
import hashlib
import inspect
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
IMAGES, CAPTIONS, RECORDS = 118_287, 591_753, 157_712
DIFFERENT = 8  # images; a file may have 65,000 links at most
COLLATED_ROWS, COLLATED_SCALE, TURNS = 64, 0.005, 11
COMPARED_BATCHES = 200
COMPARED = ("input_ids", "labels", "position_ids", "segment_ids", "branch_ids", "pixel_values")


# ---------------------------------------------------------------------- the data


def make_data(folder: Path, kind: str, scale: float) -> Path:
    """Write images and records; returns the file of the records."""
    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    words = [word.lower() for word in re.findall(r"[A-Za-z]{2,}", text)]

    def sentence(mean: float) -> str:
        start, number = rng.randrange(len(words)), max(3, round(rng.gauss(mean, mean / 4)))
        return (" ".join(words[start : start + number]) or "a word").capitalize()

    images = folder / "images"
    images.mkdir()
    number = round(IMAGES * scale)
    for index in range(number):
        if index < DIFFERENT:
            coarse = np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)
            picture.save(images / f"{index:012d}.jpg", quality=90)
        else:
            os.link(images / f"{index % DIFFERENT:012d}.jpg", images / f"{index:012d}.jpg")
    names = [f"{index:012d}.jpg" for index in range(number)]
    if kind == "coco":
        described = [{"id": index, "file_name": name, "height": 480, "width": 640} for index, name in enumerate(names)]
        captions = [
            {"id": index, "image_id": index % number, "caption": sentence(10.5)}
            for index in range(round(CAPTIONS * scale))
        ]
        content: Any = {"images": described, "annotations": captions}
    else:
        content = []
        for index in range(round(RECORDS * scale)):
            turns = []
            for turn in range(rng.choice((1, 1, 1, 2, 3, 6))):
                question = sentence(11) + ("\n<image>" if turn == 0 else "")
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": sentence(45)}]
            content.append({"id": f"{index:012d}", "image": names[index % number], "conversations": turns})
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


# ---------------------------------------------------------------------- one start, in a process of its own


def make_inputs(args: argparse.Namespace) -> tuple[Any, Any]:
    """The processor and the data arguments of a training script."""
    from jnana.processing import JnanaProcessor, read_chat_template
    from jnana.training.options.arguments import DataArguments

    processor = make_processor(args.tokenizer, args.image_size, JnanaProcessor, read_chat_template)
    processor.encode_chats([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])
    data_args = DataArguments(
        train_data=str(args.folder / f"{args.data}.json"),
        image_folder=str(args.folder / "images"),
        packing="shared_image",
        max_length=1024,
        max_row_tokens=1024,
    )
    return processor, data_args


def start(args: argparse.Namespace) -> None:
    """Prepare the data as a training script does and print what it cost, as JSON."""
    import torch.distributed as dist

    from jnana.processing.data import JnanaCollator
    from jnana.training.data import collator_options, load_conversations

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    if args.processes > 1:
        store = dist.FileStore(str(args.folder / "store"), args.processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.processes)
    processor, data_args = make_inputs(args)
    before, memory = cpu_seconds(), pss()
    resident_before = resident()
    watch = Watch()
    begun = time.perf_counter()
    rows = load_conversations(data_args, processor, str(args.folder / "out"), seed=0, should_write=False)
    wall = time.perf_counter() - begun
    cpu = [now - then for now, then in zip(cpu_seconds(), before, strict=True)]
    peak = watch.stop()
    held = pss() - memory
    found = {"wall_s": wall, "cpu_s": sum(cpu), "own_cpu_s": cpu[0], "peak_mb": (peak - resident_before) / 1e6}
    collator = JnanaCollator(processor, **collator_options(data_args, str(args.folder / "out")))
    found |= {"first_batches": digest_of_batches(collator, rows)}
    if args.processes > 1:
        dist.barrier()
    found |= {"held_mb": held / 1e6, "held_now_mb": (pss() - memory) / 1e6, "rows": len(rows)}
    if args.processes > 1:
        dist.barrier()
    print(json.dumps(found))


def collate(args: argparse.Namespace) -> None:
    """For each line of the standard input make the same batches, and print how many images a CPU second they had.

    Then those that decoding, resizing and cropping alone would have: what no collator with these pixels exceeds.
    """
    import torch

    from jnana.processing.data import JnanaCollator
    from jnana.training.data import collator_options, load_conversations

    torch.set_num_threads(1)  # as the dataloader does in its workers
    processor, data_args = make_inputs(args)
    rows = load_conversations(data_args, processor, str(args.folder / "out"), seed=0, should_write=False)
    options = collator_options(data_args, str(args.folder / "out"))
    if "normalize_on_device" in inspect.signature(JnanaCollator).parameters:  # not in the oldest checkouts
        options["normalize_on_device"] = True
    collator = JnanaCollator(processor, **options)
    collator([rows[0]])
    chosen = [rows[index] for index in range(min(COLLATED_ROWS, len(rows)))]
    paths = [row["images"][0]["path"] for item in chosen for row in item["groups"]]
    for _ in sys.stdin:
        begun = time.process_time()
        images = sum(len(collator([row])["pixel_values"]) for row in chosen)
        collated = time.process_time()
        for path in paths:
            crop_image(path, args.image_size)
        rates = images / (collated - begun), len(paths) / (time.process_time() - collated)
        print(json.dumps(rates), flush=True)


def crop_image(path: str, side: int) -> Any:
    """CLIP's crop of an image of 640x480 pixels, by Pillow."""
    from PIL import Image

    with Image.open(path) as image:
        width = side * 640 // 480
        left = (width - side) // 2
        return image.resize((width, side), Image.Resampling.BICUBIC).crop((left, 0, left + side, side))


def digest_of_batches(collator: Any, rows: Any) -> str:
    """SHA-256 of the first batches, images normalised: what every start and every version must give alike."""
    import torch

    digest = hashlib.sha256()
    for index in range(min(COMPARED_BATCHES, len(rows))):
        batch = dict(collator([rows[index]]))
        if "pixel_table" in batch:
            from jnana.modeling import normalize_pixels

            batch["pixel_values"] = normalize_pixels(batch["pixel_values"], batch["pixel_table"])
        for name in COMPARED:
            value = batch[name]
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def make_processor(tokenizer: str | None, image_size: int, processor_class: Any, read_chat_template: Any) -> Any:
    """CLIP's image processor, and the tokenizer of a directory or one that is trained on the docs."""
    from transformers import AutoTokenizer, CLIPImageProcessor

    from jnana.processing.data import train_tokenizer
    from jnana.processing.processing_jnana import add_jnana_tokens

    if tokenizer is None:
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
        found = train_tokenizer(texts, 8000)
    else:
        found = AutoTokenizer.from_pretrained(tokenizer)
    add_jnana_tokens(found)
    template = "smollm2" if "<|im_start|>" in found.get_vocab() else "jnana"
    return processor_class(
        CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}),
        found,
        patch_size=image_size // 7,
        num_additional_image_tokens=1,
        chat_template=read_chat_template(template),
    )


def cpu_seconds() -> tuple[float, float]:
    """CPU time of this process, and of its workers that have ended."""
    times = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return tuple(usage.ru_utime + usage.ru_stime for usage in times)  # type: ignore[return-value]


def pss(process: str = "self") -> int:
    """Proportional set size in bytes."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


class Watch:
    """The peak of this process's own resident memory beyond pages of files, sampled every 50 ms."""

    def __init__(self) -> None:
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.05)

    def stop(self) -> int:
        self.running = False
        self.thread.join()
        return self.peak


def resident() -> int:
    """Resident memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------- all starts


def open_process(
    args: argparse.Namespace, checkout: Path, cache: Path, mode: str, **settings: str
) -> subprocess.Popen:
    """This file as a process of a checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), mode, "--data", args.data, "--folder", str(args.folder)]
    command += ["--image_size", str(args.image_size), "--processes", settings.get("WORLD_SIZE", "1")]
    command += ["--tokenizer", args.tokenizer] if args.tokenizer else []
    settings |= {"PYTHONPATH": str(checkout), "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=checkout, env={**os.environ, **settings}, stdin=pipe, stdout=pipe, text=True, bufsize=1
    )


def run(args: argparse.Namespace, checkout: Path, cache: Path, processes: int) -> list[dict[str, Any]]:
    """One start of a checkout, in one process or several at once."""
    (args.folder / "store").unlink(missing_ok=True)
    children = []
    for rank in range(processes):
        settings = {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        children.append(open_process(args, checkout, cache, "--start", **settings))
    outputs = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"a start of {checkout} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def compare_collators(args: argparse.Namespace, checkouts: dict[str, Path], cache: Path) -> dict[str, list[float]]:
    """Images a CPU second of each checkout's collator, and of Pillow alone, turn by turn."""
    workers = {name: open_process(args, checkout, cache, "--collate") for name, checkout in checkouts.items()}
    found: dict[str, list[float]] = {name: [] for name in (*workers, "Pillow alone")}
    for turn in range(TURNS + 1):
        for name in sorted(workers, reverse=turn % 2 == 1):
            worker = workers[name]
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            line = next((line for line in worker.stdout if line[0] == "["), None)
            if line is None:
                raise SystemExit(f"the collator of {checkouts[name]} failed")
            if turn:  # the first one waits for the data
                for of, rate in zip((name, "Pillow alone"), json.loads(line), strict=True):
                    found[of].append(rate)
    for worker in workers.values():
        worker.communicate()
    return found


def spread(values: list[float], digits: int = 0) -> str:
    """The smallest and the largest."""
    return f"{min(values):.{digits}f}-{max(values):.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="an older checkout, which is measured in the same run")
    parser.add_argument("--data", choices=("coco", "llava"), default="coco")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the real size")
    parser.add_argument("--tokenizer", help="directory of a tokenizer; default: one trained on the docs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--image_size", type=int, default=224, help="side of the images that the tower sees")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--collate", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokenizer:
        args.tokenizer = str(Path(args.tokenizer).resolve())
    if args.start or args.collate:
        start(args) if args.start else collate(args)
        return
    with tempfile.TemporaryDirectory(prefix="jnana-prepare-") as folder:
        args.folder = Path(folder)
        make_data(args.folder, args.data, args.scale)
        result: dict[str, Any] = {
            "data": args.data,
            "scale": args.scale,
            "load_average": os.getloadavg(),
            "starts": [],
        }
        starts = [("cold", ROOT, 1), ("warm", ROOT, 1), ("warm", ROOT, 2)]
        if args.against is not None:
            starts += [("before", args.against.resolve(), 1), ("before", args.against.resolve(), 2)]
        for name, checkout, processes in starts:
            found = run(args, checkout, args.folder / "cache", processes)
            result["starts"].append({"name": name, "processes": processes, "measured": found})
            for rank, values in enumerate(found):
                shown = ", ".join(
                    f"{key} {value[:12] if isinstance(value, str) else format(value, ',.1f')}"
                    for key, value in values.items()
                )
                print(f"{name}, process {rank + 1} of {processes}: {shown}", flush=True)
        args.folder /= "few"
        args.folder.mkdir()
        make_data(args.folder, args.data, min(args.scale, COLLATED_SCALE))
        checkouts = {"now": ROOT} | ({"before": args.against.resolve()} if args.against is not None else {})
        result["collator_images_s"] = compare_collators(args, checkouts, args.folder / "cache")
        for name, values in result["collator_images_s"].items():
            print(f"collator, {name}: {statistics.median(values):.0f} images a CPU s ({spread(values)})")
        if len(checkouts) > 1:
            sides = (result["collator_images_s"][name] for name in checkouts)
            ratios = [now / then for now, then in zip(*sides, strict=True)]
            print(f"collator, now over before: {statistics.median(ratios):.2f} ({spread(ratios, 2)})")
    digests = {values["first_batches"] for start in result["starts"] for values in start["measured"]}
    if len(digests) > 1:
        raise SystemExit(f"the first {COMPARED_BATCHES} batches differ between the starts")
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compares two ways to compute the attention of packed rows on one CPU thread: a dense mask, and piece by piece.

    python -m benchmarks.packed_attention --output benchmarks/results/packed_attention_cpu.json

One layer, forward and backward, in float32. The two take turns within a round; a ratio is computed within a round. The
mask and the layout are made once a step, not once a layer, and are timed apart. Output and gradients must agree.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.machine import describe_machine, write_result
from jnana.modeling.packed_attention_jnana import packed_mask_function
from jnana.modeling.packed_kernels_jnana import attend_packed
from jnana.modeling.packed_layout_jnana import PackedLayout


HEADS, HEAD_DIM = 8, 64
TOLERANCE = 1e-5  # relative

# For each row its groups: tokens of the prefix, and of each branch
CASES: dict[str, list[tuple[int, list[int]]]] = {
    "captions at 49 tokens": [(50, [15] * 5)],
    "captions at 576 tokens": [(577, [15] * 5)],
    "580 + 390 tokens in 4 branches": [(580, [60, 130, 80, 120])],
    "two groups of 55 + 390": [(55, [60, 130, 80, 120])] * 2,
    "2,340 + 80 tokens": [(2340, [16] * 5)],
    "four conversations of 250 tokens": [(0, [250])] * 4,
    "eight groups of captions at 49 tokens": [(50, [15] * 5)] * 8,
}


def make_ids(groups: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segment, branch and position ids `(1, sequence_length)` of one row."""
    segments, branches, positions = [], [], []
    for segment, (prefix, sizes) in enumerate(groups):
        for branch, size in enumerate([prefix, *sizes]):
            start = prefix if branch else 0
            segments += [segment] * size
            branches += [branch] * size
            positions += range(start, start + size)
    return torch.tensor([segments]), torch.tensor([branches]), torch.tensor([positions])


def dense_mask(segment_ids: torch.Tensor, branch_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The mask `(1, 1, sequence_length, sequence_length)` that the pieces replace."""
    visible = packed_mask_function(segment_ids, branch_ids, position_ids)
    index = torch.arange(segment_ids.shape[1])
    queries, keys = index[None, None, :, None], index[None, None, None, :]
    return visible(torch.zeros(1, 1, 1, 1, dtype=torch.long), 0, queries, keys) & (queries >= keys)


def compare(groups: list[tuple[int, list[int]]], rounds: int) -> dict[str, float]:
    """Milliseconds of both ways, the ratios of the rounds, and the largest relative difference of their results."""
    ids = make_ids(groups)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, HEADS, ids[0].shape[1], HEAD_DIM, generator=generator).requires_grad_() for _ in range(3)]
    start = time.process_time()
    mask = dense_mask(*ids)
    mask_seconds = time.process_time() - start
    start = time.process_time()
    layout = PackedLayout.from_ids(*ids)
    layout_seconds = time.process_time() - start
    assert layout is not None

    ways = {
        "dense": lambda: functional.scaled_dot_product_attention(*states, attn_mask=mask).transpose(1, 2),
        "pieces": lambda: attend_packed(layout, "sdpa", *states),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for number in range(1 + rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            output = ways[name]()
            results[name] = [output, *torch.autograd.grad(output.square().sum(), states)]
            if number:  # not the warm-up
                seconds[name].append(time.process_time() - start)
    differences = [
        ((ours - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(results["pieces"], results["dense"], strict=True)
    ]
    if not max(differences) < TOLERANCE:
        raise AssertionError(f"pieces and mask differ by {max(differences):.1e}")
    ratios = sorted(dense / pieces for dense, pieces in zip(*seconds.values(), strict=True))
    middle = rounds // 2
    return {
        "dense_ms": 1000 * sorted(seconds["dense"])[middle],
        "pieces_ms": 1000 * sorted(seconds["pieces"])[middle],
        "ratio": ratios[middle],
        "smallest": ratios[0],
        "largest": ratios[-1],
        "mask_ms": 1000 * mask_seconds,
        "layout_ms": 1000 * layout_seconds,
        "difference": max(differences),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {"machine": describe_machine(torch.device("cpu")), "rounds": args.rounds, "cases": {}}
    for name, groups in CASES.items():
        found = result["cases"][name] = compare(groups, args.rounds)
        print(
            f"{name}: {found['ratio']:.2f} times ({found['smallest']:.2f}-{found['largest']:.2f}); "
            f"{found['dense_ms']:.1f} ms with a mask, {found['pieces_ms']:.1f} ms in pieces; "
            f"once a step: mask {found['mask_ms']:.1f} ms, layout {found['layout_ms']:.1f} ms"
        )
    if args.output is not None:
        write_result(result, args.output)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Whether torch's `varlen_attn` may compute packed rows: decided once, by comparing it with the pieces on a CPU."""

from collections.abc import Callable
from functools import lru_cache

import torch

from .packed_kernels_jnana import attend_pieces, attend_torch, attend_varlen, varlen_attn
from .packed_layout_jnana import PackedLayout
from .packed_plan_jnana import Piece


TOLERANCE = 0.02  # relative, in bfloat16, which rounds to 0.4 %; a causal triangle at the wrong end differs by about 1


@lru_cache
def varlen_problem(
    device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int, has_window: bool
) -> str | None:
    """Why `varlen_attn` of torch can't be used on a device for layers of this shape; `None` if it can. Tried once."""
    if device.type != "cuda":
        return f"varlen_attn of torch does not run on {device.type}"
    if varlen_attn is None:
        return f"torch {torch.__version__} has no varlen_attn"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"varlen_attn of torch needs compute capability 8.0 and this GPU has {capability[0]}.{capability[1]}"
    return probe_varlen(device, num_heads, num_kv_heads, head_dim, has_window)


def probe_varlen(
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    has_window: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> str | None:
    """Compare outputs and gradients of `varlen_attn` with those of pieces on a CPU, for random tensors of small rows
    with a prefix, branches, a single token and padding. Returns what is wrong, or `None`."""
    sizes = [(0, 37, 0), (37, 5, 37), (42, 70, 37), (112, 1, 37)]  # start, length, prefix
    pieces = [Piece(0, start, length, 0, prefix, False) for start, length, prefix in sizes]
    pieces += [Piece(1, 0, 60, 0, 0, False), Piece(1, 60, 53, 60, 0, True)]
    layout = PackedLayout(pieces, (2, 113))
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, heads, 113, head_dim, generator=generator).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    ]
    states[3][1, :, 60:] = 0.0  # no gradient at padding
    window, scaling = (16 if has_window else None), head_dim**-0.5

    def run(attend: Callable[..., torch.Tensor], where: torch.device, kind: torch.dtype) -> list[torch.Tensor]:
        *inputs, gradient = (values.to(where, kind) for values in states)
        inputs = [values.requires_grad_() for values in inputs]
        output = attend(layout.to(where), *inputs)
        gradient = gradient.transpose(1, 2)
        found = [output * (gradient != 0), *torch.autograd.grad(output, inputs, gradient)]
        return [values.detach().cpu().float() for values in found]

    def by_pieces(of: PackedLayout, query, key, value) -> torch.Tensor:
        return attend_pieces(of, query, key, value, 0.0, scaling, window).transpose(1, 2)

    def by_varlen(of: PackedLayout, query, key, value) -> torch.Tensor:
        return attend_varlen(of, attend_torch, query, key, value, scaling, window)

    with torch.inference_mode(False), torch.enable_grad():
        expected = run(by_pieces, torch.device("cpu"), torch.float32)
        try:
            found = run(by_varlen, device, dtype)
        except Exception as error:  # of many classes, by what an older torch lacks or the build does
            return f"varlen_attn of torch fails here for heads of {head_dim}: {str(error)[:200]}"
    worst = max(((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in zip(found, expected, strict=True))
    if not worst <= TOLERANCE:  # also if it is NaN
        return f"varlen_attn of torch gives other results here (relative difference {worst:.1e})"
    return None


__all__ = ["probe_varlen", "varlen_problem"]

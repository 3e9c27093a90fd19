"""The two methods by which bitsandbytes multiplies 4-bit weights on a CPU; each can be forced on any machine.

On a CPU with AVX512-BF16 bitsandbytes (0.50) repacks a `Linear4bit`'s weight at the first forward in eval mode whose
input needs no gradient, and multiplies in bfloat16 from then on, by a native kernel without backward. Here:

- `off`: the CPU is said to have no AVX512-BF16;
- `double`: the CPU is said to have it; the weights are repacked by bitsandbytes' own code, and the native kernel,
  which other CPUs can't run, is replaced by one in Python that unpacks the weight and multiplies in bfloat16;
- `native`: everything is bitsandbytes' own. Only for CPUs that have the instructions.
"""

import copy

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional


REPACKS = hasattr(functional, "has_avx512bf16")  # not in bitsandbytes 0.48
HAS_NATIVE_KERNEL = REPACKS and bool(functional.has_avx512bf16())
KERNELS = [
    "off",
    pytest.param("double", marks=pytest.mark.skipif(not REPACKS, reason="this bitsandbytes does not repack weights")),
    pytest.param("native", marks=pytest.mark.skipif(not HAS_NATIVE_KERNEL, reason="this CPU has no AVX512-BF16")),
]


def multiply_packed(A, B, out=None, transposed_A=False, transposed_B=False, state=None) -> torch.Tensor:
    """What the native kernel computes, of the same arguments: `A @ B.T` in bfloat16 of a repacked weight `B`."""
    plain = copy.copy(state)
    plain.original_nested = False
    weight, plain = functional._convert_weight_packed_for_cpu_inverse(B, plain)
    plain.absmax = state.absmax.T.reshape(-1).float()
    weight = functional.dequantize_4bit(weight, plain).to(torch.bfloat16)
    return (A.detach().to(torch.bfloat16) @ weight.T).to(A.dtype)


def force_kernel(kernel: str, patch=setattr) -> None:
    """Force one of the two ways; `patch` is `setattr`, or a `monkeypatch.setattr` that undoes it."""
    if kernel == "native" or not REPACKS:
        return
    for module in (bitsandbytes.nn.modules, functional):
        patch(module, "has_avx512bf16", lambda: kernel == "double")
    patch(functional, "gemv_4bit", multiply_packed)

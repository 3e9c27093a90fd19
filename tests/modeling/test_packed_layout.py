"""The layout of packed rows, and every way to compute their attention, beside the dense mask."""

import copy
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jnana.modeling import packed_kernels_jnana
from jnana.modeling.packed_attention_jnana import packed_mask_function
from jnana.modeling.packed_kernels_jnana import FLASH_FUNCTIONS, attend_packed, probe_varlen, takes, varlen_problem
from jnana.modeling.packed_layout_jnana import CALL_COST, PackedLayout, pieces_in


HEADS, DIM = 4, 8
KERNELS = {"varlen": None, "flash_attention_2": 2, "flash_attention_3": 3}


def ids_of(rows: list[list[tuple[int, list[int]]]], padding: int = 0, front: int = 0) -> tuple[torch.Tensor, ...]:
    """Segment, branch and position ids of rows of (tokens of the prefix, tokens of each branch)."""
    made = []
    for groups in rows:
        row = [(-1, 0, 0)] * front
        for segment, (prefix, branches) in enumerate(groups):
            row += [(segment, 0, at) for at in range(prefix)]
            row += [(segment, n, prefix + at) for n, size in enumerate(branches, 1) for at in range(size)]
        made.append(row)
    width = max(map(len, made)) + padding
    return torch.tensor([row + [(-1, 0, 0)] * (width - len(row)) for row in made]).unbind(-1)


def random_rows(seed: int) -> tuple[torch.Tensor, ...]:
    """One to three rows: empty prefixes, prefixes alone, one to eight branches, single tokens, padding."""
    rng = random.Random(seed)
    rows = []
    for _ in range(1 + seed % 3):
        groups = []
        for _ in range(rng.randint(1, 4)):
            prefix = rng.choice([0, 0, 1, 5, 40, 150])
            branches = [rng.choice([1, 2, 7, 30, 140]) for _ in range(rng.choice([0 if prefix else 1, 1, 2, 5, 8]))]
            groups.append((prefix, branches))
        rows.append(groups)
    return ids_of(rows, padding=rng.choice([0, 3, 130]), front=5 if seed % 4 == 0 else 0)


def states_of(layout: PackedLayout, kv_heads: int = HEADS, dtype=torch.float64) -> list[torch.Tensor]:
    rows, width = layout.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, heads, width, DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    ]


def dense(ids, states, window=None) -> torch.Tensor:
    """The reference: a mask of every query and key."""
    query, key, value = states
    index = torch.arange(query.shape[2])
    queries, keys = index[None, None, :, None], index[None, None, None, :]
    rows = torch.arange(len(query))[:, None, None, None]
    mask = packed_mask_function(*ids, window)(rows, 0, queries, keys) & (queries >= keys)
    key, value = (of.repeat_interleave(query.shape[1] // key.shape[1], 1) for of in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask).transpose(1, 2)


def differs(ids, states, output, expected) -> float:
    """The largest difference of outputs and gradients, but for padding."""
    kept = (ids[0] >= 0)[..., None, None]
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype) * kept
    found = [output * kept, *torch.autograd.grad(output, states, gradient.to(output.dtype))]
    theirs = [expected * kept, *torch.autograd.grad(expected, states, gradient, retain_graph=True)]
    return max((a - b).abs().max().item() for a, b in zip(found, theirs, strict=True))


def varlen_double(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **given):
    """What `varlen_attn` of torch computes, with its signature: causal from the end, in a window counted likewise."""
    assert given.keys() <= {"enable_gqa"} and (key.shape[1] == query.shape[1] or given["enable_gqa"])
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max() and window_size[1] == 0
    outputs = []
    key, value = (of.repeat_interleave(query.shape[1] // key.shape[1], 1) for of in (key, value))
    for start, end, first, last in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q, k, v = query[start:end], key[first:last], value[first:last]
        behind = torch.arange(len(k))[None] - (torch.arange(len(q)) + len(k) - len(q))[:, None]
        hidden = (behind > 0) | (behind < -window_size[0] if window_size[0] >= 0 else False)
        scores = (torch.einsum("qhd,khd->hqk", q, k) * scale).masked_fill(hidden, float("-inf"))
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def flash_double(query, key, value, *, softmax_scale, causal, window_size, **given):
    """The same with the signature of `flash_attn_varlen_func`."""
    starts = [given.pop(name) for name in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")]
    assert causal and not given
    size = (window_size[0], 0)
    return varlen_double(query, key, value, *starts, scale=softmax_scale, window_size=size, enable_gqa=True)


@pytest.fixture
def doubles(monkeypatch):
    """The kernels of GPUs are replaced, and taken on this machine."""
    monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", varlen_double)
    monkeypatch.setattr(packed_kernels_jnana, "takes", lambda query: True)
    for version in (2, 3):
        monkeypatch.setitem(FLASH_FUNCTIONS, version, flash_double)


# ---------------------------------------------------------------------- every way computes the same


@pytest.mark.parametrize("seed", range(12))
def test_pieces_are_the_dense_mask(seed, monkeypatch):
    """Also with the calls that a GPU would get, and as one operation."""
    ids = random_rows(seed)
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout, kv_heads=(4, 2)[seed % 2])
    for window in (None, 6):
        expected = dense(ids, states, window)
        assert differs(ids, states, attend_packed(layout, "sdpa", *states, window=window), expected) < 1e-9
        as_operation = torch.ops.jnana.packed_attention(*states, layout.table, DIM**-0.5, window or 0)
        assert differs(ids, states, as_operation.transpose(1, 2), expected) < 1e-9
        for_gpu = PackedLayout.from_ids(*ids)
        monkeypatch.setitem(for_gpu.plans, "cpu", for_gpu.plan("cuda"))
        assert differs(ids, states, attend_packed(for_gpu, "sdpa", *states, window=window), expected) < 1e-9


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(4))
def test_one_call_for_all_pieces_is_the_dense_mask(seed, kernel, doubles):
    ids = random_rows(seed)
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout, kv_heads=(4, 2)[seed % 2])
    for window in (None, 6):
        output = attend_packed(layout, kernel, *states, window=window)
        assert differs(ids, states, output, dense(ids, states, window)) < 1e-9


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])
def test_another_groups_prefix_is_seen(kernel, doubles):
    """The control: one branch attends to the prefix of the group before its own."""
    ids = ids_of([[(9, [5, 6]), (9, [4, 7])]])
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout)
    expected = dense(ids, states)
    assert differs(ids, states, attend_packed(layout, kernel, *states), expected) < 1e-9
    pieces = pieces_in(layout.table)
    assert pieces[-1].prefix_start == 20
    pieces[-1] = pieces[-1]._replace(prefix_start=0)
    wrong = PackedLayout(pieces, layout.shape)
    assert differs(ids, states, attend_packed(wrong, kernel, *states), expected) > 1e-2


def test_a_triangle_aligned_at_the_beginning_is_seen(doubles, monkeypatch):
    """The probe, by which a GPU's kernel is accepted: right, wrong alignment, one that fails, NaN."""
    shape = (torch.device("cpu"), 4, 2, DIM, True, torch.float32)
    assert probe_varlen(*shape) is None

    def aligned_at_the_beginning(query, key, value, starts_q, starts_k, *rest, **given):
        flipped = torch.cat([part.flip(0) for part in key.split(starts_k.diff().tolist())])
        return varlen_double(query, flipped, value, starts_q, starts_k, *rest, **given)

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel image")

    def forgets_the_window(*args, window_size, **given):
        return varlen_double(*args, window_size=(-1, 0), **given)

    for wrong, problem in (
        (aligned_at_the_beginning, "gives other results here"),
        (forgets_the_window, "gives other results here"),
        (lambda *args, **given: varlen_double(*args, **given) * torch.nan, "gives other results here"),
        (fails, "fails here for heads of 8: no kernel image"),
    ):
        monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", wrong)
        assert problem in probe_varlen(*shape)


def test_where_varlen_can_not_run(monkeypatch):
    varlen_problem.cache_clear()
    gpu = torch.device("cuda", 0)
    assert varlen_problem(torch.device("cpu"), 4, 4, 8, False) == "varlen_attn of torch does not run on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", varlen_double)
    assert "needs compute capability 8.0 and this GPU has 7.5" in varlen_problem(gpu, 4, 4, 8, False)
    monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", None)
    assert "has no varlen_attn" in varlen_problem(gpu, 4, 4, 16, False)
    monkeypatch.setattr(packed_kernels_jnana, "varlen_attn", varlen_double)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(packed_kernels_jnana, "probe_varlen", lambda *given: f"tried for {given[1:]}")
    assert varlen_problem(gpu, 4, 2, 80, True) == "tried for (4, 2, 80, True)"
    varlen_problem.cache_clear()
    assert not takes(torch.zeros(1, dtype=torch.bfloat16))  # not on a GPU


def test_16_bits_autocast_and_inference(doubles):
    ids = random_rows(1)
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout, dtype=torch.bfloat16)
    kept = (ids[0] >= 0)[..., None, None]
    expected = dense(ids, [of.float() for of in states]) * kept
    with torch.inference_mode():  # and its masks serve a backward pass afterwards
        attend_packed(layout, "sdpa", *states)
    output = attend_packed(layout, "sdpa", *states)
    output.sum().backward()
    assert output.dtype == torch.bfloat16 and (output * kept - expected).norm() < 0.01 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):  # rotary embeddings make queries and keys wider than values
        query, key, value = states
        for kernel in ("sdpa", "varlen"):
            mixed = attend_packed(layout, kernel, query.float(), key.float(), value)
            assert mixed.dtype == torch.bfloat16 and (mixed * kept - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kernel", ["sdpa", "varlen"])  # the latter has no dropout
def test_dropout(kernel, doubles):
    ids = ids_of([[(6, [3, 4])]])
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout)
    torch.manual_seed(0)
    dropped = [attend_packed(layout, kernel, *states, dropout=0.3) for _ in range(200)]
    reference = dense(ids, states)
    assert (torch.stack(dropped).mean(0) - reference).norm() < 0.1 * reference.norm()
    assert (dropped[0] - reference).norm() > 0.3 * reference.norm()


# ---------------------------------------------------------------------- the layout


def test_the_plan_of_a_group():
    """A prefix is cut, its short branches are computed together; what is hidden is a small part of the pairs."""
    layout = PackedLayout.from_ids(*ids_of([[(577, [15] * 5)]]))
    [calls] = layout.plan("cpu")
    assert sum(call.num_queries for call in calls) == 652 and 3 < len(calls) < 8
    pairs = sum(call.num_queries * call.num_keys for call in calls)
    assert 577 * 578 / 2 + 5 * 15 * 585 < pairs < 0.65 * 652**2
    [calls] = PackedLayout.from_ids(*ids_of([[(50, [15] * 5)]])).plan("cpu")
    assert len(calls) == 1  # two would cost more than they save
    [calls] = PackedLayout.from_ids(*ids_of([[(0, [9])] * 300])).plan("cpu")
    assert 10 < len(calls) < 100 and CALL_COST["cpu"] < CALL_COST["cuda"]


def test_a_layout_moves_like_a_tensor():
    layout = PackedLayout.from_ids(*random_rows(1))
    assert layout.to("cpu") is layout and layout.to(device=torch.device("cpu"), non_blocking=True) is layout
    moved = layout.to("meta")
    vectors = (moved.cu_seq_lens_q, moved.cu_seq_lens_k, moved.key_indices)
    assert {vector.device.type for vector in vectors} == {"meta"}
    assert moved.table.device.type == "cpu" and moved.plan("cpu") is layout.plan("cpu")
    for copied in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), layout.to("meta")):
        assert copied.equal(layout) and copied.plan("cpu") == layout.plan("cpu")
    assert not layout.equal(PackedLayout.from_ids(*random_rows(2)))
    alone = PackedLayout.from_ids(*ids_of([[(0, [5]), (0, [3])]]))
    assert alone.key_indices is None and alone.cu_seq_lens_q.tolist() == [0, 5, 8]


def test_the_layout_of_another_batch_raises():
    layout = PackedLayout.from_ids(*ids_of([[(4, [3, 3])]]))
    other = PackedLayout.from_ids(*ids_of([[(4, [3, 4])]]))
    with pytest.raises(ValueError, match=r"of shape \(1, 10\), but the rows are of shape \(1, 11\)"):
        attend_packed(layout, "sdpa", *states_of(other))


@pytest.mark.parametrize(
    "ids",
    [
        ([0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 2]),  # a prefix in two places
        ([0, 0, 0, 0], [0, 1, 2, 1], [0, 1, 1, 2]),  # a branch in two places
        ([0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 1]),  # a prefix behind its branch
        ([0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 3, 4]),  # a branch that does not go on from the prefix
        ([0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 3, 4]),  # a gap
    ],
)
def test_tokens_that_are_not_in_pieces(ids):
    assert PackedLayout.from_ids(*(torch.tensor([values]) for values in ids)) is None


def test_pieces_in_between():
    """Other groups between a prefix and its branch are allowed, and padding anywhere."""
    ids = tuple(torch.tensor([v]) for v in ([0, 0, 1, -1, 0, 0, 1], [0, 0, 0, 0, 1, 1, 2], [0, 1, 5, 0, 2, 3, 6]))
    layout = PackedLayout.from_ids(*ids)
    states = states_of(layout)
    assert differs(ids, states, attend_packed(layout, "sdpa", *states), dense(ids, states)) < 1e-9


# ---------------------------------------------------------------------- memory


class _Allocations(TorchDispatchMode):
    """Counts the elements of all new tensors, and of the largest."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, tensor.numel())
                self.total += tensor.numel()
        return result


@pytest.mark.parametrize("how", ["pieces", "dense"])
def test_memory_is_linear(how):
    """Of the attention of rows of 2,048 and 16,384 tokens; the mask (the control) is quadratic."""
    counted = []
    lengths = (2048, 16384) if how == "pieces" else (512, 2048)
    for length in lengths:
        ids = ids_of([[(384, [16] * 5), (40, [8])] * (length // 512)])
        assert ids[0].shape[1] == length
        with _Allocations() as allocations:
            states = [torch.randn(1, 1, length, 2).requires_grad_() for _ in range(3)]
            if how == "pieces":
                output = attend_packed(PackedLayout.from_ids(*ids), "sdpa", *states)
            else:
                output = dense(ids, states)
            output.sum().backward()
        counted.append(allocations)
    factor = lengths[1] // lengths[0]
    if how == "pieces":
        assert counted[1].largest < 16 * lengths[1]  # the row's own vectors, and small masks
        assert counted[1].total < 1.1 * factor * counted[0].total
    else:
        assert counted[1].largest >= lengths[1] ** 2 and counted[1].total > 3 * factor * counted[0].total


BROKEN_FLASH = """
import sys
import transformers.utils
sys.path.insert(0, sys.argv[1])
transformers.utils.is_flash_attn_2_available = transformers.utils.is_flash_attn_3_available = lambda: True
from jnana.modeling.packed_kernels_jnana import FLASH_FUNCTIONS
print("functions", FLASH_FUNCTIONS)
"""


def test_a_flash_attention_of_another_torch_does_not_stop_the_import(tmp_path):
    for name in ("flash_attn", "flash_attn_interface"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('undefined symbol')")
    command = [sys.executable, "-c", BROKEN_FLASH, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert "functions {}" in done.stdout, done.stderr[-2000:]

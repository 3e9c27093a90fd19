"""Runs a training step on tensors without data and adds up what a real step would hold in memory, by part.

torch's `FakeTensorMode` gives every tensor a shape, a dtype and a device, but no memory, and runs the same forward and
backward pass, gradient checkpointing, autocast and optimizer as training. So any language model is counted, with the
attention and the loss that it really uses, in a second or two. Not seen is what a kernel allocates for itself while it
runs, and what the allocator holds beyond the tensors.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


# Bytes beside the values of a weight of nf4: a float32 constant for 64 values, or an 8-bit one and a float32 for 256
# of those; of bitsandbytes' 8-bit AdamW: two float32 constants for 256 values, and no 8-bit state below 4,096 values.
NF4_BLOCK, NF4_CONSTANTS_BLOCK = 64, 256
EIGHT_BIT_BLOCK, EIGHT_BIT_LEAST = 256, 4096


@dataclass
class StepMemory:
    """
    What is live when a training step holds most, without the weights.

    Args:
        parts (`dict[str, int]`): Bytes of `gradients`, `optimizer`, `activations` and `logits and loss` (with their
            gradients), and in the optimizer's step `optimizer step` (what it allocates and frees).
        moment (`str`): `forward and backward pass` or `optimizer step`.
    """

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class LiveStorages(TorchDispatchMode):
    """
    Records when each storage is made and freed within the block.

    Args:
        outside (`Iterable[torch.Tensor]`): Tensors that are not recorded, nor views of them: weights and buffers.
        logits_width (`int`, *optional*): Size of the vocabulary, by which logits are recognised.

    Attributes:
        events (`list[tuple[int, int]]`): Number of a storage, and its bytes; negative where it is freed.
        is_logits (`list[bool]`): For each storage.
    """

    def __init__(self, outside: Iterable[torch.Tensor] = (), logits_width: int | None = None):
        super().__init__()
        self._outside = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in outside)}
        self.logits_width = logits_width
        self.events: list[tuple[int, int]] = []
        self.is_logits: list[bool] = []
        self._numbers: dict[int, tuple[int, weakref.ref]] = {}  # by the id of the storage

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        """Record a tensor's storage, unless it is known."""
        if self.number(tensor) is not None:
            return
        storage = tensor.untyped_storage()
        if id(storage) in self._outside:
            return
        number, size = len(self.is_logits), storage.nbytes()

        def freed(_: weakref.ref) -> None:
            self.events.append((number, -size))

        self._numbers[id(storage)] = number, weakref.ref(storage, freed)
        self.events.append((number, size))
        self.is_logits.append(tensor.ndim > 1 and tensor.shape[-1] == self.logits_width)

    def number(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor's storage, or `None` if it is not recorded."""
        storage = tensor.untyped_storage()
        known = self._numbers.get(id(storage))
        return known[0] if known is not None and known[1]() is storage else None


class TracedLinear(nn.Module):
    """
    Stands for a linear layer that bitsandbytes has quantised: its weight is restored for each matrix product, forward
    and backward, and not kept.

    Args:
        linear (`nn.Linear`): The layer.
        method (`str`): `nf4` or `int8`.
        double (`bool`): Whether the constants of 4-bit weights are quantised too.
        dtype (`torch.dtype`): Of the restored weight.
    """

    def __init__(self, linear: nn.Linear, method: str, double: bool, dtype: torch.dtype):
        super().__init__()
        device, count = linear.weight.device, linear.weight.numel()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        packed, constants = count, 4 * linear.out_features
        if method == "nf4":
            packed, blocks = count // 2, -(-count // NF4_BLOCK)
            constants = blocks + 4 * -(-blocks // NF4_CONSTANTS_BLOCK) if double else 4 * blocks
        self.packed_name = f"packed_{method}"
        self.register_buffer(self.packed_name, torch.empty(packed, dtype=torch.uint8, device=device))
        self.register_buffer(f"constants_{method}", torch.empty(constants, dtype=torch.uint8, device=device))
        self.bias = linear.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output = _RestoredProduct.apply(states.to(self.dtype), getattr(self, self.packed_name), self.out_features)
        output = output if self.bias is None else output + self.bias.to(self.dtype)
        return output.to(states.dtype)


class _RestoredProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, packed, out_features):
        ctx.save_for_backward(packed)
        ctx.shape, ctx.out_features = states.shape, out_features
        return states @ states.new_empty(states.shape[-1], out_features)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ gradient.new_empty(ctx.out_features, ctx.shape[-1]), None, None


class TracedEightBitAdamW(Optimizer):
    """Allocates what bitsandbytes' 8-bit AdamW does: embeddings keep a state of 32 bits, as the Trainer asks for."""

    def __init__(self, params, embeddings: set[int] = frozenset(), **defaults: Any):  # type: ignore[assignment]
        super().__init__(params, {})
        self.embeddings = embeddings

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None or self.state[weight]:
                    continue
                small = weight.numel() < EIGHT_BIT_LEAST or id(weight) in self.embeddings
                dtype = torch.float32 if small else torch.uint8
                for name in ("state1", "state2"):
                    self.state[weight][name] = torch.empty_like(weight, dtype=dtype)
                    if not small:
                        blocks = -(-weight.numel() // EIGHT_BIT_BLOCK)
                        self.state[weight][f"absmax_{name}"] = torch.empty(blocks, device=weight.device)


def put_without_data(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device weights and buffers that claim to be on `device`, within `FakeTensorMode`."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) not in made:
                empty = torch.empty_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                made[id(tensor)] = empty
            setattr(module, name, made[id(tensor)])


def held_bytes(model: nn.Module, label: Callable[[str, torch.Tensor], str]) -> dict[str, int]:
    """Bytes of a model's weights and buffers, by what `label` says of name and tensor; shared ones count once."""
    held: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        storage = tensor.untyped_storage()
        if id(storage) not in seen:
            seen.add(id(storage))
            key = label(name, tensor)
            held[key] = held.get(key, 0) + storage.nbytes()
    return held


def trace_step(
    model: nn.Module,
    batch: Mapping[str, Any],
    device: torch.device,
    make_optimizer: Callable[[nn.Module], Optimizer],
    *,
    autocast: torch.dtype | None = None,
    accumulation_steps: int = 1,
    logits_width: int | None = None,
) -> StepMemory:
    """
    The peak of an optimizer step that is not the first, so the optimizer has its state from the beginning.

    Args:
        model (`nn.Module`): On the meta device, with `requires_grad` set; its `forward` gives a `loss`. It is moved.
        batch (`Mapping`): Its inputs; only their shapes are used.
        device (`torch.device`): Where training will run.
        make_optimizer (`Callable`): Makes the optimizer of the model's trained parameters.
        autocast (`torch.dtype`, *optional*): The dtype of mixed precision.
        accumulation_steps (`int`, *optional*, defaults to 1): Batches of an optimizer step.
        logits_width (`int`, *optional*): Size of the vocabulary.
    """
    kinds: dict[int, str] = {}

    def note(kind: str, tensors: Any) -> None:
        numbers = (live.number(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        kinds.update((number, kind) for number in numbers if number is not None)

    with FakeTensorMode(allow_non_fake_inputs=True):
        put_without_data(model, device)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(model.train())
        with LiveStorages((*model.parameters(), *model.buffers()), logits_width) as live:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            optimizer.step()  # makes its state
            note("optimizer", tree_leaves([list(optimizer.state.values())]))
            optimizer.zero_grad(set_to_none=True)
            begin = len(live.events)
            for _ in range(min(accumulation_steps, 2)):
                _run(model, batch, device, autocast)
                note("gradients", (parameter.grad for parameter in trained))
            stepping = len(live.events)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return _at_peak(live, kinds, begin, stepping)


def _run(model: nn.Module, batch: Mapping[str, Any], device: torch.device, autocast: torch.dtype | None) -> None:
    """Forward and backward pass on one batch, as accelerate runs them."""
    inputs = {name: _like(value, device) for name, value in batch.items()}
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        output = model(**inputs)
    loss = output["loss"].float()
    if autocast is not None and output.get("logits") is not None:
        output = output["logits"].float()  # accelerate returns them in float32
    del output
    loss.backward()


def _like(value: Any, device: torch.device) -> Any:
    """An input without data on the device of the model."""
    return torch.empty_like(value, device=device) if isinstance(value, torch.Tensor) else value


def _at_peak(live: LiveStorages, kinds: dict[int, str], begin: int, optimizer_step: int) -> StepMemory:
    """The parts at the peak behind the event `begin`."""
    now, most, where = 0, -1, 0
    for index, (_, size) in enumerate(live.events):
        now += size
        if index >= begin and now > most:
            most, where = now, index
    held: dict[int, int] = {}
    for number, size in live.events[: where + 1]:
        if size >= 0:
            held[number] = size
        else:
            held.pop(number, None)
    stepping = where >= optimizer_step
    parts = dict.fromkeys(("gradients", "optimizer", "activations", "logits and loss"), 0)
    for number, size in held.items():
        kind = kinds.get(number)
        if kind is None:
            kind = "logits and loss" if live.is_logits[number] else "optimizer step" if stepping else "activations"
        parts[kind] = parts.get(kind, 0) + size
    return StepMemory(parts, "optimizer step" if stepping else "forward and backward pass")

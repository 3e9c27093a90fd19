"""Fits an `mlp` projector to a `resblock` one, on the features of the training images.

LLaVA's classes and llama.cpp have no place for residual blocks with norms. On the vectors that a tower gives, the
blocks are one function of one vector, and two linear layers can come close to it: the second layer is solved by least
squares for several choices of the first, the best of them is trained by AdamW, and then the second is solved again.
"""

import copy
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import nn

from jnana.modeling import JnanaConfig
from jnana.modeling.projector_jnana import build_projector


logger = logging.getLogger(__name__)

HELD_OUT = 10  # every tenth image measures the fit
MAX_VECTORS = (
    60_000  # at most 5 GB in float64 for Phi-2; that the fit is made on; a CLIP ViT-L/14-336 gives 576 an image
)
BATCH_SIZE = 4096  # vectors
LEARNING_RATE = 2e-3
RIDGE = 1e-6  # of the mean square of the hidden units


@dataclass
class Distillation:
    """How well an `mlp` projector follows the `resblock` one.

    Args:
        images (`int`): Images whose features were used, held-out ones among them.
        vectors (`int`): Vectors the fit was made on.
        least_squares_error (`float`): Relative error on the held-out vectors before AdamW:
            |mlp(x) - resblock(x)| / |resblock(x)|, by root mean square.
        relative_error (`float`): The same at the end.
    """

    images: int
    vectors: int
    least_squares_error: float
    relative_error: float

    def __str__(self) -> str:
        return (
            f"distilled the projector on {self.vectors} vectors of {self.images} images: relative error "
            f"{self.least_squares_error:.2%} by least squares, {self.relative_error:.2%} after AdamW (held-out images)"
        )


def distil_projector(
    model: Any, processor: Any, images: Iterable[Image.Image], steps: int = 2000, act: str | None = None
) -> Distillation:
    """
    Replace the `resblock` projector of a model by an `mlp` that was fitted to it.

    Args:
        model ([`JnanaForConditionalGeneration`]): Its projector and config are changed in place.
        processor ([`JnanaProcessor`]): Its image processor prepares the images.
        images (`Iterable[PIL.Image.Image]`): Images like those the projector was trained on, at least two.
        steps (`int`, defaults to 2000): Steps of AdamW, of 4,096 vectors each.
        act (`str`, *optional*): Activation of the `mlp`; by default that of the blocks.

    Returns:
        [`Distillation`]: It is also logged.

    Raises:
        ValueError: If there are fewer than two images.
    """
    config, old = model.config, model.model.multi_modal_projector
    train, held = projector_inputs(model, processor, images)
    if not train or not held:
        raise ValueError("distill needs at least two images (train_data, distill_images), to fit on and to measure on")
    generator = torch.Generator().manual_seed(0)
    inputs, measured = torch.cat(train).float(), torch.cat(held).float()
    inputs = inputs[torch.randperm(len(inputs), generator=generator)[:MAX_VECTORS]]
    with torch.no_grad():
        teacher = copy.deepcopy(old).float()
        targets, expected = (torch.cat([teacher.project(x) for x in v.split(BATCH_SIZE)]) for v in (inputs, measured))
        first = copy.deepcopy(config)
        first.projector_type, first.projector_layer_norm = "mlp", False
        first.projector_hidden_act = act or config.projector_hidden_act
        student = start_of_fit(first, teacher, inputs, targets, generator)
        start = relative_error(student, measured, expected)
    with torch.enable_grad():
        fit(student, inputs, targets, steps, generator)
    with torch.no_grad():
        trained = copy.deepcopy(student)
        solve_second(trained, inputs, targets)
        student = min((student, trained), key=lambda candidate: relative_error(candidate, measured, expected))
        report = Distillation(len(train) + len(held), len(inputs), start, relative_error(student, measured, expected))
    model.config.projector_type = model.model.config.projector_type = "mlp"
    model.config.projector_hidden_act = model.model.config.projector_hidden_act = first.projector_hidden_act
    model.config.projector_layer_norm = model.model.config.projector_layer_norm = False
    student.image_newline = old.image_newline
    weight = next(old.parameters())
    model.model.multi_modal_projector = student.to(weight.device, weight.dtype).eval()
    logger.info(str(report))
    return report


@torch.inference_mode()
def projector_inputs(
    model: Any, processor: Any, images: Iterable[Image.Image]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The vectors `(num_vectors, vision_feature_size)` of each image that enter the projector; the held-out ones."""
    train: list[torch.Tensor] = []
    held: list[torch.Tensor] = []
    for index, image in enumerate(images):
        inputs = processor.image_processor([image], return_tensors="pt").to(model.device)
        pixel_values, sizes = inputs["pixel_values"].to(model.dtype), inputs.get("image_sizes")
        features = model.model.get_vision_features(pixel_values, image_sizes=sizes)[1]
        (held if index % HELD_OUT == 1 else train).append(features.flatten(0, 1).clone())
    return train, held


def start_of_fit(
    config: JnanaConfig, teacher: Any, inputs: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
) -> Any:
    """
    An `mlp` whose second layer is solved by least squares, for the best of several first layers: the first layer of
    the first block behind the affine map that comes closest to what leads there, and random ones of several scales.
    """
    block = teacher.blocks[0]
    hidden = block.layer_norm(teacher.linear(inputs))
    into_block, offset = least_squares(inputs, hidden)
    composed = block.linear_1.weight @ into_block.T
    bias = block.linear_1.weight @ offset
    bias = bias if block.linear_1.bias is None else bias + block.linear_1.bias
    mean, spread = inputs.mean(0), inputs.std(0).mean().clamp_min(1e-6)
    candidates = [(composed, bias)]
    for scale in (0.1, 0.5, 1.0):
        weight = torch.randn(composed.shape, generator=generator).to(inputs)
        weight *= scale / (spread * math.sqrt(inputs.shape[1]))
        candidates.append((weight, torch.randn(len(weight), generator=generator).to(inputs) * scale - weight @ mean))
    built = []
    for weight, offset in candidates:
        student = build_projector(config).to(inputs.device, inputs.dtype)
        student.linear_1.weight.copy_(weight)
        if student.linear_1.bias is not None:
            student.linear_1.bias.copy_(offset)
        solve_second(student, inputs, targets)
        built.append(student)
    return min(built, key=lambda student: relative_error(student, inputs, targets))


def least_squares(inputs: torch.Tensor, targets: torch.Tensor, bias: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `(width_in, width_out)` and `bias` `(width_out,)` of the affine map closest to the targets."""
    inputs, exact = inputs.double(), targets.double()
    centre, level = (inputs.mean(0), exact.mean(0)) if bias else (inputs.new_zeros(1), exact.new_zeros(1))
    centred = inputs - centre
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (exact - level))
    return weight.to(targets.dtype), (level - centre @ weight).to(targets.dtype)


@torch.no_grad()
def solve_second(student: Any, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Give the second layer the weights that least squares finds."""
    has_bias = student.linear_2.bias is not None
    weight, bias = least_squares(student.act(student.linear_1(inputs)), targets, has_bias)
    student.linear_2.weight.copy_(weight.T)
    if has_bias:
        student.linear_2.bias.copy_(bias)


def fit(student: Any, inputs: torch.Tensor, targets: torch.Tensor, steps: int, generator: torch.Generator) -> None:
    """Train both layers by AdamW on the mean squared error, with a cosine schedule."""
    scale = targets.square().mean()
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        chosen = torch.randint(len(inputs), (min(BATCH_SIZE, len(inputs)),), generator=generator).to(inputs.device)
        loss = nn.functional.mse_loss(student.project(inputs[chosen]), targets[chosen]) / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def relative_error(student: Any, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """|student(x) - target| / |target|, by root mean square over all numbers."""
    difference = sum(
        (student.project(x) - y).double().square().sum().item()
        for x, y in zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True)
    )
    return math.sqrt(difference / targets.double().square().sum().item())

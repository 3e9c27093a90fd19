"""The floating-point operations that a training step needs: the numerator of model FLOP/s utilisation (MFU).

Counted is what the model's mathematics needs, as in PaLM (Chowdhery et al. 2022, appendix B): padding, hidden
attention pairs, logits without a label and layers that gradient checkpointing computes again are not. A multiplication
and an addition are two operations. Norms, activations, rotary embeddings and the optimizer are left out.

For each token that passes a linear layer of N weights

    forward                                                                             2 N
    + the gradient of its input, where anything before the layer trains                 2 N
    + the gradient of its weights, where they train                                     2 N

so 6 a trained weight, 4 a frozen weight on the backward path, 2 a frozen weight that no gradient passes. The head sees
the tokens with a label only. Attention takes 4 x heads x head size for each pair of a token and a token that it
attends to in each layer, and 8 more on the backward path. The vision tower and the projector cost the same for every
view of an image: their operations are counted by torch on the meta device, forward, and backward for what trains. A
frozen tower has no backward pass, and with `feature_cache` it is not run at all.
"""

from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from jnana.modeling import JnanaConfig
from jnana.modeling.backbones_jnana import build_vision_tower, image_shape, select_image_features
from jnana.modeling.projector_jnana import build_projector
from jnana.processing.data import BatchCounts
from jnana.training.stages import part_of


IMAGE_INPUTS = ("k_proj", "v_proj")  # layers of a cross-attention block that see image vectors instead of tokens


@dataclass
class ModelFlops:
    """
    The operations of one model, by what they are proportional to; see the module's docstring.

    Args:
        token (`int`): For each token without padding: linear layers of the language model, and of cross-attention.
        label (`int`): For each token with a label: the head.
        pair (`int`): For each pair of attention in one layer.
        windows (`list[int | None]`): The sliding window of each layer.
        cross_token (`int`): For each token: attention to the vectors of one image, in all blocks of cross-attention.
        cross_image (`int`): For each image: keys and values of the blocks of cross-attention.
        encoded_view (`int`): For each view of an image: the vision tower.
        projected_view (`int`): For each view of an image: the projector.
    """

    token: int
    label: int
    pair: int
    windows: list[int | None] = field(default_factory=list)
    cross_token: int = 0
    cross_image: int = 0
    encoded_view: int = 0
    projected_view: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> "ModelFlops":
        """
        Args:
            model (`PreTrainedModel` or `PeftModel`): With `requires_grad` set as it trains; its weights may be
                quantised, sharded, partitioned or on the meta device.
        """
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        config = base.config
        text = config.text_config if isinstance(config, JnanaConfig) else config
        trained = {part_of(name) for name, weight in model.named_parameters() if weight.requires_grad}
        backward = bool(trained - {"lm_head"})
        found = {"token": 0, "label": 0, "cross_image": 0}
        for name, module in model.named_modules():
            part, pieces = part_of(name), name.split(".")
            if not isinstance(module, nn.Linear) or "original_module" in pieces:
                continue
            if part in ("vision_tower", "multi_modal_projector"):
                continue
            kind = "label" if part == "lm_head" else "token"
            factor = 2 + 2 * backward + 2 * module.weight.requires_grad
            operations = factor * module.in_features * module.out_features
            if part == "cross_attention" and pieces[-1] in IMAGE_INPUTS:
                kind, operations = "cross_image", operations * config.projector_num_latents
            found[kind] += operations
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        pair = (12 if backward else 4) * width
        flops = cls(**found, pair=pair, windows=attention_windows(text))
        if isinstance(config, JnanaConfig):
            if config.fusion == "cross_attention":
                blocks = -(-text.num_hidden_layers // config.cross_layer_interval)
                flops.cross_token = blocks * pair * config.projector_num_latents
            flops.encoded_view, flops.projected_view = image_flops(config, *how_images_train(model))
        return flops

    def batch(self, counts: BatchCounts) -> int:
        """The operations of the forward and backward pass of one batch.

        Args:
            counts ([`BatchCounts`]): Of the batch.
        """
        pairs = {window: counts.attention_pairs(window) for window in set(self.windows)}
        return (
            (self.token + (self.cross_token if counts.images else 0)) * counts.tokens
            + self.label * counts.supervised
            + self.pair * sum(pairs[window] for window in self.windows)
            + self.cross_image * counts.images
            + self.encoded_view * counts.encoded_views
            + self.projected_view * counts.projected_views
        )


def attention_windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer of a language model, `None` where a layer has none."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def how_images_train(model: nn.Module) -> tuple[str, bool]:
    """How the vision tower trains, `frozen`, `adapter` or `whole`, and whether the projector does."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    tower = [name for name in names if part_of(name) == "vision_tower"]
    how = "frozen" if not tower else "adapter" if all("lora_" in name for name in tower) else "whole"
    return how, any(part_of(name) == "multi_modal_projector" for name in names)


def image_flops(config: JnanaConfig, tower: str, projector: bool) -> tuple[int, int]:
    """
    The operations of vision tower and projector for one view of an image, in a training step.

    Args:
        config ([`JnanaConfig`]): Builds both on the meta device, which computes shapes and no values.
        tower (`str`): `frozen`; `adapter`, through which gradients pass as through frozen weights (those of the
            adapter itself, a hundredth of the tower, are left out); or `whole`.
        projector (`bool`): Whether the projector trains.
    """
    with torch.device("meta"):
        encoder = build_vision_tower(config).float().requires_grad_(tower == "whole")
        projection = build_projector(config).float().requires_grad_(projector)
        pixels = torch.empty(image_shape(config)).requires_grad_(tower == "adapter")
    encoder.set_attn_implementation("eager")  # torch counts no operations in some of its fused kernels
    # as JnanaImageMixin.get_vision_features and project_vision_features
    layers, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    with torch.enable_grad(), FlopCounterMode(display=False) as encoding:
        features = select_image_features(encoder, pixels, layers, strategy, config.num_prefix_tokens)[1]
        if features.requires_grad:
            features.sum().backward()
    sizes, views = None, 1
    if config.image_grid_pinpoints is not None:
        sizes = [config.image_height_and_width]
        views = projection.count_views(sizes)[0]
    shape = (views, config.num_view_features, config.vision_feature_size)
    inputs = torch.empty(shape, device="meta").requires_grad_(tower != "frozen")
    with torch.enable_grad(), FlopCounterMode(display=False) as projecting:
        outputs = torch.cat(projection(inputs, sizes))
        if outputs.requires_grad:
            outputs.sum().backward()
    return encoding.get_total_flops(), projecting.get_total_flops() // views

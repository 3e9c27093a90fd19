"""The projector: the only part of a Jnana model that starts from random weights.

It maps the features of the image encoder into the embedding space of the language model. There are four kinds: one
Linear (LLaVA, era_capstone), Linear-activation-Linear (LLaVA-1.5, phi35_pooled), a Linear followed by residual blocks
(jnana, visualize_this), and a perceiver resampler followed by a Linear.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_jnana import JnanaConfig
from .resampler_jnana import JnanaPerceiverResampler


class JnanaLinearProjector(nn.Module):
    """One Linear layer."""

    def __init__(self, config: JnanaConfig):
        super().__init__()
        self.linear = nn.Linear(
            config.vision_feature_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear(image_features)


class JnanaMlpProjector(nn.Module):
    """Linear, activation, Linear; with `projector_layer_norm` a LayerNorm in front. Weight names are stock LLaVA's."""

    def __init__(self, config: JnanaConfig):
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.layer_norm = nn.LayerNorm(config.vision_feature_size) if config.projector_layer_norm else nn.Identity()
        self.linear_1 = nn.Linear(config.vision_feature_size, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.layer_norm(image_features))))


class JnanaResidualBlock(nn.Module):
    """`x = LayerNorm(x); x + Linear(act(Linear(x)))`, all of the language model's width."""

    def __init__(self, config: JnanaConfig):
        super().__init__()
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.layer_norm(hidden_states)
        return hidden_states + self.linear_2(self.act(self.linear_1(hidden_states)))


class JnanaResblockProjector(nn.Module):
    """One Linear layer, then `projector_num_blocks` residual blocks."""

    def __init__(self, config: JnanaConfig):
        super().__init__()
        self.linear = nn.Linear(
            config.vision_feature_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )
        self.blocks = nn.ModuleList([JnanaResidualBlock(config) for _ in range(config.projector_num_blocks)])

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear(image_features)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class JnanaPerceiverProjector(nn.Module):
    """A perceiver resampler of the vision features' width, then one Linear layer."""

    def __init__(self, config: JnanaConfig):
        super().__init__()
        self.resampler = build_resampler(config)
        self.linear = nn.Linear(
            config.vision_feature_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear(self.resampler(image_features))


class JnanaLatentsProjector(nn.Module):
    """
    For `fusion: cross_attention`: the resampler alone. The latents of an image come out as one long vector, so that an
    image has as many vectors as it has tokens, one.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__()
        self.resampler = build_resampler(config)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.resampler(image_features).flatten(1).unsqueeze(1)  # => [num_images, 1, num_latents * width]


def build_resampler(config: JnanaConfig) -> JnanaPerceiverResampler:
    """The resampler that the config's `projector_*` fields describe, with random weights."""
    return JnanaPerceiverResampler(
        width=config.vision_feature_size,
        num_latents=config.projector_num_latents,
        depth=config.projector_depth,
        num_heads=config.projector_num_heads,
        head_dim=config.projector_head_dim,
        qk_layer_norm=config.projector_qk_layer_norm,
        hidden_act=config.projector_hidden_act,
    )


PROJECTORS: dict[str, type[nn.Module]] = {
    "linear": JnanaLinearProjector,
    "mlp": JnanaMlpProjector,
    "resblock": JnanaResblockProjector,
    "perceiver": JnanaPerceiverProjector,
}


def build_projector(config: JnanaConfig) -> nn.Module:
    """
    Build the projector of type `config.projector_type`.

    Args:
        config ([`JnanaConfig`]): Its widths are `config.vision_feature_size` and `config.text_config.hidden_size`.

    Returns:
        `torch.nn.Module`: Maps `(..., vision_feature_size)` to `(..., text_hidden_size)`; the perceiver maps
        `(num_images, num_vectors, vision_feature_size)` to `(num_images, projector_num_latents, text_hidden_size)`,
        with `fusion: cross_attention` to `(num_images, 1, projector_num_latents * vision_feature_size)`.

    Raises:
        ValueError: If `projector_hidden_act` is not an activation that transformers knows.
    """
    if config.projector_hidden_act not in ACT2FN:
        raise ValueError(
            f"`projector_hidden_act` is {config.projector_hidden_act!r}; choose one of {', '.join(sorted(ACT2FN))}."
        )
    if config.fusion == "cross_attention":
        return JnanaLatentsProjector(config)
    return PROJECTORS[config.projector_type](config)

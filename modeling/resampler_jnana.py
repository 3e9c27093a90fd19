"""The perceiver resampler: turns the vectors of an image, however many, into a fixed number of latent vectors.

As in Flamingo and IDEFICS. Learned latents attend to the image's vectors and to themselves, layer after layer. The
weights of IDEFICS's resampler fit exactly (6 layers, 16 heads of 96, `qk_layer_norm`, `relu`, no biases).
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN


# The standard deviation of fresh latents. Equal latents would get equal gradients and stay equal for ever.
LATENTS_STD = 0.02


class JnanaResamplerAttention(nn.Module):
    """
    Attention from the latents to the image's vectors and the latents.

    Args:
        width (`int`): Width of the vectors and the latents.
        num_heads (`int`): Attention heads.
        head_dim (`int`): Width of a head.
        qk_layer_norm (`bool`): Whether queries and keys are normalised, each head by itself.
    """

    def __init__(self, width: int, num_heads: int, head_dim: int, qk_layer_norm: bool):
        super().__init__()
        self.head_dim = head_dim
        self.context_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, width, bias=False)
        self.q_norm = nn.LayerNorm(head_dim) if qk_layer_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim) if qk_layer_norm else nn.Identity()

    def forward(self, context: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = self.latents_norm(latents)
        context = torch.cat([self.context_norm(context), latents], dim=1)
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # => [batch, heads, vectors, width]
            for projection, states in ((self.q_proj, latents), (self.k_proj, context), (self.v_proj, context))
        )
        attended = nn.functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class JnanaResamplerLayer(nn.Module):
    """[`JnanaResamplerAttention`], then an MLP four times as wide without biases; each adds to the latents."""

    def __init__(self, width: int, num_heads: int, head_dim: int, qk_layer_norm: bool, hidden_act: str):
        super().__init__()
        self.attention = JnanaResamplerAttention(width, num_heads, head_dim, qk_layer_norm)
        self.mlp_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.act = ACT2FN[hidden_act]
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, context: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        latents = latents + self.attention(context, latents)
        return latents + self.fc2(self.act(self.fc1(self.mlp_norm(latents))))


class JnanaPerceiverResampler(nn.Module):
    """
    Maps any number of vectors to `num_latents` vectors of the same width.

    Args:
        width (`int`): Width of the vectors.
        num_latents (`int`): Vectors that come out (IDEFICS: 64).
        depth (`int`): Layers (IDEFICS: 6).
        num_heads (`int`): Attention heads (IDEFICS: 16).
        head_dim (`int`): Width of a head (IDEFICS: 96).
        qk_layer_norm (`bool`): Whether queries and keys are normalised.
        hidden_act (`str`): Activation of the MLPs (IDEFICS: `relu`).
    """

    def __init__(
        self,
        width: int,
        num_latents: int,
        depth: int,
        num_heads: int,
        head_dim: int,
        qk_layer_norm: bool,
        hidden_act: str,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.layers = nn.ModuleList(
            [JnanaResamplerLayer(width, num_heads, head_dim, qk_layer_norm, hidden_act) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)

    def init_weights(self) -> None:
        """
        Draw the latents from N(0, 0.02). Transformers initialises weights by the class of their module and doesn't
        know this one, so the model's `_init_weights` calls this.
        """
        init.normal_(self.latents, std=LATENTS_STD)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Args:
            image_features (`torch.FloatTensor` of shape `(batch_size, num_vectors, width)`): Features of images.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, num_latents, width)`.
        """
        latents = self.latents.expand(image_features.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(image_features, latents)
        return self.norm(latents)


__all__ = ["JnanaPerceiverResampler"]

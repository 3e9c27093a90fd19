"""The projector: the only part of a Jnana model that starts from random weights.

It maps the features of the image encoder into the embedding space of the language model: by one Linear (LLaVA,
era_capstone), by Linear-activation-Linear (LLaVA-1.5, phi35_pooled), by a Linear and residual blocks (jnana,
visualize_this), by joining neighbouring patches first, so that an image takes fewer tokens (Idefics3), or by a
perceiver resampler with a fixed number of latents (Idefics2; IDEFICS has it before its cross-attention).

A *view* is one square image that enters the image encoder. With `image_grid_pinpoints` an image has several
(LLaVA-1.6): the whole image, then its tiles. The projector lays the tiles out as one map, cuts off what was padding,
and ends each row of the map with the trained vector `image_newline`.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.image_processing_utils import select_best_resolution

from .configuration_jnana import JnanaConfig
from .resampler_jnana import JnanaPerceiverResampler


def tile_grid(image_size: tuple[int, int], pinpoints: list[list[int]], view_size: int) -> tuple[int, int]:
    """
    Rows and columns of the tiles that an image is cut into (LLaVA-1.6).

    Args:
        image_size (`tuple[int, int]`): (height, width) of the image in pixels, before it is processed.
        pinpoints (`list[list[int]]`): Resolutions (height, width) in pixels to choose from.
        view_size (`int`): Side of a tile in pixels.
    """
    height, width = select_best_resolution(image_size, pinpoints)
    return height // view_size, width // view_size


def unpadded_region(image_size: tuple[int, int], rows: int, columns: int) -> tuple[slice, slice]:
    """
    The part of the tiles' map that shows the image and not the padding around it.

    Args:
        image_size (`tuple[int, int]`): (height, width) of the image in pixels, before it is processed.
        rows, columns (`int`): Size of the map in tokens.

    Returns:
        `tuple[slice, slice]`: Rows and columns to keep. The padding is taken to be equal on both sides.
    """
    height, width = image_size
    # Rounded, because 2.9999999 stands for 3; transformers rounds at the same digit, and counts must agree with it.
    if width / height > columns / rows:
        padding = (rows - int(round(height * (columns / width), 7))) // 2
        return slice(padding, rows - padding), slice(0, columns)
    padding = (columns - int(round(width * (rows / height), 7))) // 2
    return slice(0, rows), slice(padding, columns - padding)


class JnanaProjector(nn.Module):
    """
    Base class: `project` maps the features of views, `forward` also joins the views of each image.

    Args:
        config ([`JnanaConfig`]): Its widths are `config.vision_feature_size` and `config.text_config.hidden_size`.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__()
        self.pinpoints = config.image_grid_pinpoints
        self.view_size = config.image_height_and_width[0]
        self.token_grid = config.token_grid
        # Tokens that are not a map of the image have no rows to end.
        has_rows = self.pinpoints is not None and self.token_grid is not None
        newline = nn.Parameter(torch.empty(config.text_config.hidden_size)) if has_rows else None
        self.register_parameter("image_newline", newline)

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Map `(num_views, num_view_features, vision_feature_size)` to `(num_views, num_view_tokens, hidden_size)`.
        """
        raise NotImplementedError

    def forward(
        self, image_features: torch.Tensor, image_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """
        Args:
            image_features (`torch.FloatTensor` of shape `(num_views, num_view_features, vision_feature_size)`):
                Features of the views of all images, one image after the other.
            image_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) of each image in pixels, before it
                is processed. Needed where an image has several views.

        Returns:
            `list[torch.FloatTensor]`: One tensor of shape `(num_image_tokens, hidden_size)` an image; with `fusion:
            cross_attention` of shape `(1, projector_num_latents * vision_feature_size)`.

        Raises:
            ValueError: If `image_sizes` are missing, or the images have another number of views.
        """
        views = self.project(image_features)
        if self.pinpoints is None:
            return list(views)
        counts = self.count_views(image_sizes)
        if sum(counts) != len(views):
            raise ValueError(
                f"`image_sizes` names images of {sum(counts)} views, but there are {len(views)} views. Take pixel "
                "values and sizes from one call of the image processor, with the model's `image_grid_pinpoints`."
            )
        images = views.split(counts)
        return [self._join_views(image, size) for image, size in zip(images, image_sizes or (), strict=True)]

    def count_views(self, image_sizes: Sequence[tuple[int, int]] | None) -> list[int]:
        """
        The number of views of each image: itself, and its tiles.

        Args:
            image_sizes (`Sequence[tuple[int, int]]`): As in [`~JnanaProjector.forward`].
        """
        if image_sizes is None:
            raise ValueError(
                "`image_sizes` is missing; this model cuts images into tiles (`image_grid_pinpoints`), so it needs "
                "the (height, width) of each image. The image processor returns them beside `pixel_values`."
            )
        return [1 + math.prod(self._tile_grid(size)) for size in image_sizes]

    def _tile_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return tile_grid(image_size, self.pinpoints, self.view_size)  # type: ignore[arg-type]  # called with tiles only

    def _join_views(self, views: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """The views of one image `(num_views, num_view_tokens, hidden_size)` as `(num_image_tokens, hidden_size)`."""
        if self.token_grid is None:
            return views.flatten(0, 1)
        (tile_rows, tile_columns), (rows, columns) = self._tile_grid(image_size), self.token_grid
        tiles = views[1:].view(tile_rows, tile_columns, rows, columns, -1)
        tiles = tiles.transpose(1, 2).reshape(tile_rows * rows, tile_columns * columns, -1)  # => one map
        kept = tiles[unpadded_region(image_size, tile_rows * rows, tile_columns * columns)]
        newlines = self.image_newline.to(kept).expand(len(kept), 1, -1)
        return torch.cat([views[0], torch.cat([kept, newlines], dim=1).flatten(0, 1)])

    def init_weights(self) -> None:
        """Draw `image_newline` at random; transformers initialises the layers."""
        if self.image_newline is not None:
            init.normal_(self.image_newline, mean=0.0, std=len(self.image_newline) ** -0.5)


class JnanaLinearProjector(JnanaProjector):
    """One Linear layer."""

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        self.linear = nn.Linear(
            config.vision_feature_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear(image_features)


class JnanaMlpProjector(JnanaProjector):
    """Linear, activation, Linear; with `projector_layer_norm` a LayerNorm in front. Weight names are stock LLaVA's."""

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.layer_norm = nn.LayerNorm(config.vision_feature_size) if config.projector_layer_norm else nn.Identity()
        self.linear_1 = nn.Linear(config.vision_feature_size, width, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
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


class JnanaResblockProjector(JnanaProjector):
    """One Linear layer, then `projector_num_blocks` residual blocks."""

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        self.linear = nn.Linear(
            config.vision_feature_size, config.text_config.hidden_size, bias=config.multimodal_projector_bias
        )
        self.blocks = nn.ModuleList([JnanaResidualBlock(config) for _ in range(config.projector_num_blocks)])

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        hidden_states = self.linear(image_features)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


class JnanaDownsamplingProjector(JnanaProjector):
    """
    Joins the vectors of each square of `projector_downsample_factor` x `projector_downsample_factor` patches to one,
    then one or two Linear layers. Weight names of the two are those of stock LLaVA.
    """

    def __init__(self, config: JnanaConfig, width_in: int):
        super().__init__(config)
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.factor = config.projector_downsample_factor
        self.linear_1 = nn.Linear(width_in, width, bias=bias)
        two = config.projector_num_layers == 2
        self.act = ACT2FN[config.projector_hidden_act] if two else nn.Identity()
        self.linear_2 = nn.Linear(width, width, bias=bias) if two else nn.Identity()

    def squares(self, image_features: torch.Tensor) -> torch.Tensor:
        """
        Group the patches of each view: `(num_views, num_patches, width)` to
        `(num_views, num_squares, factor * factor, width)`, both in reading order.
        """
        rows, columns = self.token_grid  # type: ignore[misc]  # the config checks the strategy
        grid = image_features.unflatten(1, (rows, self.factor, columns, self.factor))
        return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class JnanaPixelShuffleProjector(JnanaDownsamplingProjector):
    """The vectors of a square side by side (Idefics3)."""

    def __init__(self, config: JnanaConfig):
        super().__init__(config, config.vision_feature_size * config.projector_downsample_factor**2)

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.squares(image_features).flatten(2))))


class JnanaAvgPoolProjector(JnanaDownsamplingProjector):
    """The mean of the vectors of a square."""

    def __init__(self, config: JnanaConfig):
        super().__init__(config, config.vision_feature_size)

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(self.squares(image_features).mean(2))))


class JnanaPerceiverProjector(JnanaProjector):
    """
    A perceiver resampler of the vision features' width, then one Linear layer.

    With `fusion: cross_attention` the resampler alone: the latents of a view come out as one long vector, so that an
    image has as many vectors as it has tokens, one.
    """

    def __init__(self, config: JnanaConfig):
        super().__init__(config)
        self.resampler = JnanaPerceiverResampler(
            width=config.vision_feature_size,
            num_latents=config.projector_num_latents,
            depth=config.projector_depth,
            num_heads=config.projector_num_heads,
            head_dim=config.projector_head_dim,
            qk_layer_norm=config.projector_qk_layer_norm,
            hidden_act=config.projector_hidden_act,
        )
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        in_row = config.fusion == "tokens"
        self.linear = nn.Linear(config.vision_feature_size, width, bias=bias) if in_row else None

    def project(self, image_features: torch.Tensor) -> torch.Tensor:
        latents = self.resampler(image_features)
        if self.linear is None:
            return latents.flatten(1).unsqueeze(1)  # => [num_views, 1, num_latents * vision_feature_size]
        return self.linear(latents)


PROJECTORS: dict[str, type[JnanaProjector]] = {
    "linear": JnanaLinearProjector,
    "mlp": JnanaMlpProjector,
    "resblock": JnanaResblockProjector,
    "pixel_shuffle": JnanaPixelShuffleProjector,
    "avg_pool": JnanaAvgPoolProjector,
    "perceiver": JnanaPerceiverProjector,
}


def build_projector(config: JnanaConfig) -> JnanaProjector:
    """
    Build the projector of type `config.projector_type`.

    Args:
        config ([`JnanaConfig`]): Its widths are `config.vision_feature_size` and `config.text_config.hidden_size`.

    Returns:
        [`JnanaProjector`]: With weights that are not initialised yet.

    Raises:
        ValueError: If `projector_hidden_act` is not an activation that transformers knows.
    """
    if config.projector_hidden_act not in ACT2FN:
        raise ValueError(
            f"`projector_hidden_act` is {config.projector_hidden_act!r}; choose one of {', '.join(sorted(ACT2FN))}."
        )
    return PROJECTORS[config.projector_type](config)

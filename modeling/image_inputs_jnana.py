"""Images as inputs of the model: pixel values, stored features or encoded images become the vectors of image tokens.

The part of [`JnanaModel`] that its `forward` calls before the language model: vision tower, selected features,
projector, the choice of images for their positions in the text, and the blank image of a batch without images.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .backbones_jnana import find_unused_parameters, image_shape, select_image_features
from .configuration_jnana import JnanaConfig


# (height, width) in pixels of each image of a batch: a tensor `(num_images, 2)`, or pairs.
ImageSizes: TypeAlias = torch.Tensor | Sequence[tuple[int, int]]
# For each occurrence of an image in the text, the index of the image.
ImageIndices: TypeAlias = torch.Tensor | Sequence[int]


class JnanaImageMixin:
    """Vision tower, selected features and projector of [`JnanaModel`]."""

    config: JnanaConfig
    vision_tower: PreTrainedModel
    multi_modal_projector: nn.Module
    language_model: PreTrainedModel

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: ImageSizes | None = None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor]:
        """
        The inputs of the projector. A tower without any trainable parameter runs without building a graph.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_views, channels, height, width)`): The views of the images
                of the whole batch, in the order of their image tokens. An image is one view, or with
                `image_grid_pinpoints` several; then `(num_images, max_num_views, channels, height, width)` is taken
                too, as transformers' LLaVA-1.6 image processor gives it, and the views that pad it are left out.
            vision_feature_layer (`int` or `list[int]`, *optional*): Instead of the config's.
            vision_feature_select_strategy (`str`, *optional*): Instead of the config's.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)` or `list`, *optional*): (height, width) of each
                image in pixels, before it was processed. Needed for the five-dimensional `pixel_values`.

        Returns:
            `tuple`: The tower's output, and features of shape `(num_views, num_view_features, vision_feature_size)`.

        Raises:
            ValueError: If `pixel_values` isn't a batch of images, or holds bytes.
        """
        config = self.config
        if pixel_values.dtype == torch.uint8:
            raise ValueError(
                "`pixel_values` are bytes. Give them to `forward` or `generate` with the `pixel_table` that the "
                "collator made for them, or as floats: `normalize_pixels(pixel_values, pixel_table)`, or from the "
                "image processor."
            )
        if pixel_values.ndim == 5 and config.image_grid_pinpoints is not None:
            counts = self.multi_modal_projector.count_views(_size_list(image_sizes))
            if len(counts) != len(pixel_values):
                raise ValueError(
                    f"`image_sizes` has {len(counts)} images and `pixel_values` {len(pixel_values)}; give the size of "
                    "each image."
                )
            pixel_values = torch.cat([views[:n] for views, n in zip(pixel_values, counts, strict=True)])
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; give (num_images, channels, height, width), "
                "the images of all rows one after the other."
            )
        trainable = _any_trains(self.vision_tower)
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return select_image_features(
                self.vision_tower,
                pixel_values,
                layers=config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer,
                strategy=vision_feature_select_strategy or config.vision_feature_select_strategy,
                num_prefix_tokens=config.num_prefix_tokens,
                **kwargs,
            )

    def project_vision_features(
        self, image_features: torch.Tensor, image_sizes: ImageSizes | None = None
    ) -> list[torch.Tensor]:
        """
        Map vision features into the language model's embedding space.

        Args:
            image_features (`torch.FloatTensor` of shape `(num_views, num_view_features, vision_feature_size)`): As
                [`~JnanaModel.get_vision_features`] gives them, or stored from an earlier run.
            image_sizes (`torch.LongTensor` of shape `(num_images, 2)` or `list`, *optional*): As in
                [`~JnanaModel.get_vision_features`]. Needed with `image_grid_pinpoints`.

        Returns:
            `list[torch.FloatTensor]`: One tensor of shape `(num_image_tokens, hidden_size)` an image.

        Raises:
            ValueError: If the features are of another shape, or `image_sizes` does not fit them.
        """
        width = self.config.vision_feature_size
        if image_features.ndim != 3 or image_features.shape[-1] != width:
            raise ValueError(
                f"`image_features` has shape {tuple(image_features.shape)}; give (num_views, num_view_features, "
                f"{width}), as `get_vision_features` gives them with this config's `vision_feature_layer` and "
                "`vision_feature_select_strategy`."
            )
        sizes = None if self.config.image_grid_pinpoints is None else _size_list(image_sizes)
        return self.multi_modal_projector(image_features.to(self._projector_dtype()), sizes)

    def _projector_dtype(self) -> torch.dtype:
        """
        The dtype that the projector computes in. Its weights may have no floating-point dtype at all: quantisers pack
        them in integers, and `torch.ao` removes them from the parameters. Then it is the dtype of the model. (Weights
        are not asked for a device: with offloading they are on `meta` between two forwards.)
        """
        # PEFT keeps the frozen original beside the copy that trains.
        weights = [weight for weight in self.multi_modal_projector.parameters() if weight.is_floating_point()]
        trained = [weight for weight in weights if weight.requires_grad]
        return (trained or weights or [self])[0].dtype  # type: ignore[attr-defined]

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        image_sizes: ImageSizes | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Image features in the language model's embedding space; arguments as in [`~JnanaModel.get_vision_features`].

        Returns:
            `BaseModelOutputWithPooling`: The tower's output, with in `pooler_output` a list of one tensor of shape
            `(num_image_tokens, hidden_size)` an image.
        """
        outputs, features = self.get_vision_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, image_sizes, **kwargs
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.project_vision_features(features, image_sizes),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor,
        image_features: torch.Tensor,
        image_indices: ImageIndices | None = None,
        num_images: int = 0,
    ) -> torch.Tensor:
        """
        The positions of image tokens; found from the embeddings where ids are not given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Embeddings.
            image_features (`torch.FloatTensor` of shape `(num_image_vectors, hidden_size)`): Projected features.
            image_indices, num_images (*optional*): The indices that selected these features, and the number of images
                that they choose from; to be checked.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: Unless there are as many image tokens as image vectors, and the indices are of images.
        """
        image_mask = self._find_tokens(self.config.image_token_id, input_ids, inputs_embeds)
        self._check_images(image_mask, image_features.shape[0], None, image_indices, num_images)
        return image_mask.unsqueeze(-1).to(inputs_embeds.device)  # `device_map` may have put the ids elsewhere

    def _find_tokens(
        self, token_id: int, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor
    ) -> torch.BoolTensor:
        """The positions `(batch_size, sequence_length)` of a token."""
        if input_ids is not None:
            return input_ids == token_id  # type: ignore[return-value]
        token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.language_model.get_input_embeddings()(token)).all(-1)  # type: ignore[return-value]

    def unused_vision_parameters(self) -> list[str]:
        """
        Parameters of the tower on which the selected features do not depend: CLIP's `post_layernorm`, layers behind
        the selected one. They never get a gradient, so freeze them, or DistributedDataParallel has to search for them.

        Returns:
            `list[str]`: Their names, as in `named_parameters()` of this model.
        """
        return [f"vision_tower.{name}" for name in find_unused_parameters(self.vision_tower, self.config)]

    def _project_images(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        vision_feature_layer: int | list[int] | None,
        vision_feature_select_strategy: str | None,
        image_sizes: ImageSizes | None,
    ) -> list[torch.Tensor] | None:
        """Projected features `(num_image_tokens, hidden_size)` of each image, from any of the three kinds of input."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(value is not None for value in (pixel_values, image_features, encoded)) > 1:
            raise ValueError(
                "Images are given twice; give only one of `pixel_values`, `image_features`, `mm_encoder_outputs`."
            )
        if pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, image_sizes, return_dict=True
            )
        if image_features is not None:
            return self.project_vision_features(image_features, image_sizes)
        # A list of (tokens, hidden_size) or a tensor (images, tokens, hidden_size).
        return None if encoded is None else list(encoded.pooler_output)  # type: ignore[arg-type]

    def _check_indices(self, image_indices: ImageIndices, num_images: int) -> None:
        """Raise `ValueError` unless `image_indices` are a list of numbers, and there are images."""
        shape = tuple(image_indices.shape) if isinstance(image_indices, torch.Tensor) else (len(image_indices),)
        if num_images == 0 or len(shape) != 1:
            raise ValueError(
                f"`image_indices` has shape {shape} for {num_images} images; give one number for each run of image "
                "tokens, together with the images."
            )

    def _select_images(self, images: list[torch.Tensor] | None, image_indices: ImageIndices) -> list[torch.Tensor]:
        """Of the vectors of each image, those of the images that `image_indices` names, which are checked later."""
        images = images or []
        num_images = len(images)
        self._check_indices(image_indices, num_images)
        if isinstance(image_indices, torch.Tensor) and self.config.image_grid_pinpoints is None:
            vectors = torch.stack(images)  # equal numbers of vectors: selected without reading the indices
            return list(vectors[image_indices.to(vectors.device).clamp(0, num_images - 1)])
        indices = image_indices.tolist() if isinstance(image_indices, torch.Tensor) else image_indices
        return [images[min(max(index, 0), num_images - 1)] for index in indices]

    def _check_images(
        self,
        image_mask: torch.Tensor,
        num_vectors: int,
        image_positions: torch.Tensor | None = None,
        image_indices: ImageIndices | None = None,
        num_images: int = 0,
    ) -> None:
        """
        Raise `ValueError` unless there are as many image tokens as image vectors, and the indices are of images.

        With `image_positions` only their number is compared. Otherwise the device is read once.

        Args:
            image_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`): The image tokens.
            num_vectors (`int`): The vectors of all occurrences of images.
            image_positions, image_indices: See [`JnanaModel.forward`].
            num_images (`int`, *optional*, defaults to 0): The images that `image_indices` chooses from.
        """
        if image_positions is not None:
            self._check_positions(image_positions, num_vectors)
            return
        num_tokens = image_mask.sum()
        equal = num_tokens == num_vectors
        known = torch.ones_like(equal)
        if image_indices is not None:
            indices = torch.as_tensor(image_indices, device=equal.device)
            known = (indices >= 0).all() & (indices < num_images).all()
        torch_compilable_check(
            equal & known,
            lambda: (
                self._count_message(int(num_tokens), num_vectors)
                if known
                else f"`image_indices` {indices.tolist()} must be from 0 to {num_images - 1}, one of the images."
            ),
        )

    def _check_positions(self, image_positions: torch.Tensor, num_vectors: int) -> None:
        """Raise `ValueError` unless there are as many positions of image tokens as image vectors."""
        if len(image_positions) != num_vectors:
            raise ValueError(self._count_message(len(image_positions), num_vectors))

    def _count_message(self, num_tokens: int, num_vectors: int) -> str:
        size = self.config.num_image_tokens
        fixed = self.config.image_grid_pinpoints is None
        each = f", {size} an image ({num_vectors // size} images)" if fixed else ""
        return (
            f"The text has {num_tokens} image tokens (`image_token_id` {self.config.image_token_id}), but the images "
            f"give {num_vectors} vectors{each}. Let the processor write the image tokens, pass every image that the "
            "text names, and load model and processor from one directory."
        )

    def _must_encode_blank_image(self, has_labels: bool, cache: Cache | None) -> bool:
        """
        Whether a batch without images has to run the tower and the projector all the same, because other processes run
        them and wait for this one: DDP for the gradients of their parameters, FSDP and ZeRO-3 for their shards. With
        one process only where nothing but the projector and the tower trains, so that the loss would depend on no
        weight that does.
        """
        in_training_step = has_labels and torch.is_grad_enabled()
        if in_training_step and not _any_trains(self.language_model):
            return _any_trains(self.multi_modal_projector)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        if torch.distributed.get_world_size() < 2:
            return False
        if in_training_step:
            return True
        prefill = cache is None or cache.get_seq_length() == 0  # a later step of generation has no images anywhere
        return prefill and self._has_sharded_parameters()

    def _has_sharded_parameters(self) -> bool:
        """Whether FSDP or ZeRO-3 keeps the parameters of this model in shards that the processes must gather."""
        # DeepSpeed gives an id to each parameter that it partitions.
        parameters = self.parameters()  # type: ignore[attr-defined]
        if is_deepspeed_zero3_enabled() or any(hasattr(parameter, "ds_id") for parameter in parameters):
            return True
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # only where torch has `distributed`

        return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in self.modules())  # type: ignore[attr-defined]

    def _encode_blank_image(self, device: torch.device, from_features: bool) -> torch.Tensor:
        """
        Run tower and projector on a black image, or the projector alone on features of zeros.

        Called before the language model, because the other processes encode their images before it too.

        Args:
            device (`torch.device`): Device of the inputs.
            from_features (`bool`): Whether the processes get precomputed features, so that none runs the tower.

        Returns:
            `torch.FloatTensor` of shape `(num_image_tokens, hidden_size)`: The image's vectors.
        """
        config, sizes = self.config, None
        count = 1
        if config.image_grid_pinpoints is not None:
            sizes = [config.image_height_and_width]
            count = self.multi_modal_projector.count_views(sizes)[0]
        if from_features:
            shape = (count, config.num_view_features, config.vision_feature_size)
            return self.project_vision_features(torch.zeros(shape, device=device), sizes)[0]
        black = torch.zeros(image_shape(config), device=device, dtype=self.vision_tower.dtype)
        features = self.get_image_features(black.expand(count, -1, -1, -1), image_sizes=sizes, return_dict=True)
        return features.pooler_output[0]


def normalize_pixels(pixel_values: torch.Tensor, pixel_table: torch.Tensor) -> torch.Tensor:
    """
    Normalise images on the device that they are on. Every value is looked up, so that it is the image processor's own,
    to the last bit; the device waits for nothing.

    Args:
        pixel_values (`torch.ByteTensor` of shape `(..., channels, height, width)`): Levels from 0 to 255.
        pixel_table (`torch.FloatTensor` of shape `(channels, 256)`): What the image processor makes of each level of
            each channel.

    Returns:
        `torch.FloatTensor` of the shape of `pixel_values`.

    Raises:
        ValueError: If `pixel_values` holds no bytes, or the table is of another number of channels.
    """
    channels = pixel_values.shape[-3] if pixel_values.ndim > 2 else None
    if pixel_values.dtype != torch.uint8 or tuple(pixel_table.shape) != (channels, 256):
        raise ValueError(
            f"`pixel_table` of shape {tuple(pixel_table.shape)} is given with `pixel_values` of dtype "
            f"{pixel_values.dtype} and shape {tuple(pixel_values.shape)}; give bytes and their table "
            "`(channels, 256)`, or floats and no table."
        )
    table = pixel_table.to(pixel_values.device)
    # Channel by channel: indices take four bytes a value
    values = [row[levels.int()] for row, levels in zip(table, pixel_values.unbind(-3), strict=True)]
    return torch.stack(values, dim=-3)


def _any_trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _size_list(image_sizes: ImageSizes | None) -> list[tuple[int, int]] | None:
    """`image_sizes` as pairs of numbers. Reading them from a GPU waits for it."""
    if image_sizes is None:
        return None
    pairs = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
    return [(height, width) for height, width in pairs]

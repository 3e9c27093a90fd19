"""From images to vectors at the places of image tokens: what of [`JnanaModel`] is about images alone.

Images come as pixels, as the tower's features stored earlier, or projected already; each of these is one step further
on the same way: tower, selection of features, projector, places in the text.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, torch_compilable_check

from .backbones_jnana import find_unused_parameters, image_shape, select_image_features
from .configuration_jnana import JnanaConfig


class JnanaImageMixin:
    """How [`JnanaModel`] reads images with its vision tower and projector."""

    config: JnanaConfig
    vision_tower: PreTrainedModel
    multi_modal_projector: nn.Module
    language_model: PreTrainedModel

    def get_vision_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, torch.Tensor]:
        """
        What the projector reads. A tower without any trainable parameter runs without building a graph.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): The images of the
                whole batch, in the order in which its rows name them.
            vision_feature_layer (`int` or `list[int]`, *optional*): Instead of the config's.
            vision_feature_select_strategy (`str`, *optional*): Instead of the config's.

        Returns:
            `tuple`: The tower's output, and features of shape `(num_images, num_image_tokens, vision_feature_size)`.

        Raises:
            ValueError: If `pixel_values` isn't a batch of images.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"`pixel_values` has shape {tuple(pixel_values.shape)}; give (num_images, channels, height, width), "
                "the images of all rows one after the other."
            )
        config = self.config
        trainable = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trainable):
            return select_image_features(
                self.vision_tower,
                pixel_values,
                layers=config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer,
                strategy=vision_feature_select_strategy or config.vision_feature_select_strategy,
                num_prefix_tokens=config.num_prefix_tokens,
                **kwargs,
            )

    def project_vision_features(self, image_features: torch.Tensor) -> list[torch.Tensor]:
        """
        Carry vision features into the language model's embedding space.

        Args:
            image_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, vision_feature_size)`): As
                [`~JnanaModel.get_vision_features`] gives them, or stored from an earlier run.

        Returns:
            `list[torch.FloatTensor]`: One tensor of shape `(num_image_tokens, hidden_size)` an image.

        Raises:
            ValueError: If the features are of another shape.
        """
        width = self.config.vision_feature_size
        if image_features.ndim != 3 or image_features.shape[-1] != width:
            raise ValueError(
                f"`image_features` has shape {tuple(image_features.shape)}; give (num_images, num_image_tokens, "
                f"{width}), as `get_vision_features` gives them with this config's `vision_feature_layer` and "
                "`vision_feature_select_strategy`."
            )
        # PEFT keeps the frozen original beside the copy that trains, and 4-bit weights are of no float dtype.
        weights = [weight for weight in self.multi_modal_projector.parameters() if weight.is_floating_point()]
        weight = next((weight for weight in weights if weight.requires_grad), weights[0])
        return list(self.multi_modal_projector(image_features.to(weight.device, weight.dtype)))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """
        Image features as the language model reads them; arguments as in [`~JnanaModel.get_vision_features`].

        Returns:
            `BaseModelOutputWithPooling`: The tower's output, with in `pooler_output` a list of one tensor of shape
            `(num_image_tokens, hidden_size)` an image.
        """
        outputs, features = self.get_vision_features(
            pixel_values, vision_feature_layer, vision_feature_select_strategy, **kwargs
        )
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.project_vision_features(features),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_features: torch.Tensor
    ) -> torch.Tensor:
        """
        The places that image features take; found from embeddings where ids are not given.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Token ids.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`): Embeddings.
            image_features (`torch.FloatTensor` of shape `(num_image_vectors, hidden_size)`): Projected features.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length, 1)`.

        Raises:
            ValueError: Unless there are as many image tokens as image vectors.
        """
        image_token_id = self.config.image_token_id
        if input_ids is None:
            image_token = torch.full((), image_token_id, dtype=torch.long, device=inputs_embeds.device)
            image_mask = (inputs_embeds == self.language_model.get_input_embeddings()(image_token)).all(-1)
        else:
            image_mask = input_ids == image_token_id
        self._check_counts(image_mask, image_features.shape[0])
        return image_mask.unsqueeze(-1)

    def unused_vision_parameters(self) -> list[str]:
        """
        Parameters of the tower on which the selected features do not depend: CLIP's `post_layernorm`, layers behind
        the selected one. They never get a gradient, so freeze them, or DistributedDataParallel has to search for them.

        Returns:
            `list[str]`: Their names, as in `named_parameters()` of this model.
        """
        return [f"vision_tower.{name}" for name in find_unused_parameters(self.vision_tower, self.config)]

    def _read_images(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
        vision_feature_layer: int | list[int] | None,
        vision_feature_select_strategy: str | None,
    ) -> torch.Tensor | None:
        """Projected features of shape `(num_image_vectors, hidden_size)`, from whichever way images were given."""
        encoded = (mm_encoder_outputs or {}).get("image")
        if sum(value is not None for value in (pixel_values, image_features, encoded)) > 1:
            raise ValueError(
                "Images are given twice; give only one of `pixel_values`, `image_features`, `mm_encoder_outputs`."
            )
        if pixel_values is not None:
            encoded = self.get_image_features(
                pixel_values, vision_feature_layer, vision_feature_select_strategy, return_dict=True
            )
        if image_features is not None:
            return torch.cat(self.project_vision_features(image_features))
        # A list of (tokens, hidden_size) or a tensor (images, tokens, hidden_size).
        return None if encoded is None else torch.cat(list(encoded.pooler_output))  # type: ignore[arg-type]

    def _show_images(self, vectors: torch.Tensor | None, image_indices: torch.Tensor) -> torch.Tensor:
        """Vectors `(num_images * num_image_tokens, hidden_size)` of the images that `image_indices` names."""
        size = self.config.num_image_tokens
        num_images = 0 if vectors is None else len(vectors) // size
        if vectors is None or image_indices.ndim != 1:
            raise ValueError(
                f"`image_indices` has shape {tuple(image_indices.shape)} for {num_images} images; give one number for "
                "each place of an image, together with the images."
            )
        torch_compilable_check(
            (image_indices >= 0).all() & (image_indices < num_images).all(),
            lambda: f"`image_indices` {image_indices.tolist()} must be from 0 to {num_images - 1}, one of the images.",
        )
        return vectors.view(num_images, size, -1)[image_indices.to(vectors.device)].flatten(0, 1)

    def _check_counts(self, image_mask: torch.Tensor, num_vectors: int) -> None:
        """Raise `ValueError` unless there are as many image tokens as image vectors."""
        num_tokens, size = image_mask.sum(), self.config.num_image_tokens
        torch_compilable_check(
            num_tokens == num_vectors,
            lambda: (
                f"The text has {int(num_tokens)} image tokens (`image_token_id` {self.config.image_token_id}), but "
                f"the images give {num_vectors} vectors, {size} an image ({num_vectors // size} images). Let the "
                "processor write the image tokens, pass every image that the text names, and load model and processor "
                "from one folder."
            ),
        )

    def _others_may_read_images(self, past_key_values: Cache | None) -> bool:
        """Whether other processes may be reading images now: several run, and this is no step of generation."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return False
        return past_key_values is None or past_key_values.get_seq_length() == 0

    def _touch_image_path(self, device: torch.device, stored: bool) -> torch.Tensor:
        """
        Run tower and projector on a black image, or the projector alone on features of zeros (`stored`: the processes
        read stored features); returns a zero that depends on them. When several processes compute together and one has
        a batch without images, its parameters must take part all the same: DDP waits for their gradients, FSDP and
        ZeRO-3 for their shards, in evaluation too, and in the order in which the other processes ask: images first.
        """
        if stored:
            size = (1, self.config.num_image_tokens, self.config.vision_feature_size)
            return 0.0 * self.project_vision_features(torch.zeros(size, device=device))[0].sum()
        black = torch.zeros(image_shape(self.config), device=device, dtype=self.vision_tower.dtype)
        return 0.0 * self.get_image_features(black, return_dict=True).pooler_output[0].sum()

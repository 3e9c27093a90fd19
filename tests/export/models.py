"""Tiny models of every kind that an export takes, written as checkpoints."""

from pathlib import Path

import torch

from jnana.modeling import JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor, set_image_geometry
from jnana.training.loading import downsample_factor, set_special_tokens, tokens_per_view
from tests.tiny import save_tiny_text, save_tiny_vision


SPREAD = 0.2  # of random weights: with the usual 0.02 every answer of a tiny model is the same


def save_model(folder: Path, vision: str = "clip", text: str = "llama", geometry: str | None = None, **fields) -> str:
    """
    Write a checkpoint with random weights, biases and norms among them, and return its directory.

    Args:
        folder (`Path`): Where the backbones and the checkpoint are written.
        vision, text (`str`): Kinds of `tests.tiny`.
        geometry (`str`, *optional*): How images become square.
        fields: Of `JnanaConfig`; those that start with `text_` of the language model's config.
    """
    changes = {name[5:]: fields.pop(name) for name in list(fields) if name.startswith("text_")}
    tower = save_tiny_vision(folder / "vision", vision)
    language = save_tiny_text(folder / "text", text, **{"initializer_range": SPREAD, **changes})
    strategy = fields.get("vision_feature_select_strategy", "default")
    processor = JnanaProcessor.from_vision_text_pretrained(
        tower,
        language,
        vision_feature_select_strategy=strategy,
        chat_template="jnana",
        downsample_factor=downsample_factor(fields),
        tokens_per_view=tokens_per_view(fields),
    )
    if geometry is not None:
        processor.image_processor = set_image_geometry(processor.image_processor, geometry)
    if vision == "siglip":  # its image processor has no crop
        from transformers import SiglipImageProcessor

        side = processor.image_height_and_width()[0]
        processor.image_processor = SiglipImageProcessor(size={"height": side, "width": side})
    torch.manual_seed(1)
    model = JnanaForConditionalGeneration.from_vision_text_pretrained(
        str(tower),
        str(language),
        dtype="float32",
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=processor.image_grid_pinpoints,
        **fields,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.startswith("lm_head"):
                parameter.add_(torch.randn_like(parameter), alpha=SPREAD)
            elif "multi_modal_projector" in name:
                parameter.normal_(0, SPREAD)
    set_special_tokens(model, processor)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return str(folder / "model")

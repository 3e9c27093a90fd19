"""Tiny models and processors of images that are cut into tiles, pictures of many sizes, and rows about them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor, add_jnana_tokens, read_chat_template, set_image_geometry
from jnana.processing.data.rows import IMAGE_PART, make_row, message, text_part
from tests.tiny import (
    PATCH_SIZE,
    save_tiny_llava,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
)


KINDS = ["llava_next", "pixel_shuffle", "avg_pool", "perceiver"]

LATENTS = 3  # of the perceiver, so many tokens a view

# (height, width): one view apart from the whole image, tiles in a row, a column and a square, with and without padding
SIZES = [(24, 24), (31, 77), (90, 20), (48, 48), (61, 60), (40, 24)]


def tile_pair(
    folder: Path, kind: str = "llava_next", side: int = 48, grids: tuple = ((1, 2), (2, 1), (2, 2))
) -> tuple[JnanaForConditionalGeneration, JnanaProcessor]:
    """
    A model and its processor.

    Args:
        folder (`Path`): where a checkpoint may be written.
        kind (`str`): `llava_next` (a stock LLaVA-1.6 checkpoint of 4 tokens a view), or the type of a projector.
        side (`int`): side of a view in pixels, for the other kinds than `llava_next`.
        grids (`tuple`): rows and columns of the tiles, for the other kinds than `llava_next`.
    """
    if kind == "llava_next":
        path = save_tiny_llava(folder)
        model = JnanaForConditionalGeneration.from_llava_pretrained(str(path), dtype="float32")
        return model, JnanaProcessor.from_llava_pretrained(path, chat_template="jnana")
    tokenizer = tiny_tokenizer()
    add_jnana_tokens(tokenizer)
    tokenizer.padding_side = "left"
    square = {"height": side, "width": side}
    image_processor = set_image_geometry(CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square), "anyres")
    image_processor.image_grid_pinpoints = [[side * rows, side * columns] for rows, columns in grids]
    factor = 2 if kind in ("pixel_shuffle", "avg_pool") else 1
    processor = JnanaProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,
        chat_template=read_chat_template("jnana"),
        downsample_factor=factor,
        tokens_per_view=LATENTS if kind == "perceiver" else None,
    )
    vision, text = tiny_vision_config("clip"), tiny_text_config("llama", initializer_range=0.2)
    vision.image_size = side
    config = JnanaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        projector_type=kind,
        projector_num_latents=LATENTS,
        image_grid_pinpoints=image_processor.image_grid_pinpoints,
        vision_feature_layer=-2,
    )
    torch.manual_seed(0)
    model = JnanaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, processor


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of random pixels."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def save_pictures(folder: Path, sizes: list[tuple[int, int]] = SIZES) -> list[Path]:
    """PNG files of random pixels, one for each size (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}_{height}x{width}.png" for number, (height, width) in enumerate(sizes)]
    for number, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        picture(*size, seed=number).save(path)
    return paths


def row(paths: list[Path], answers: list[str], question: str | None = "what?", source: str = "record") -> dict:
    """A row about these images (a path may occur twice), with one conversation for each answer."""
    references = [{"path": str(path), "bytes": None} for path in paths]
    asked = [text_part(question)] if question else []
    user = message("user", *[IMAGE_PART] * len(paths), *asked)
    return make_row(references, [[user, message("assistant", text_part(answer))] for answer in answers], source)


def rows_of(paths: list[Path]) -> list[dict]:
    """Rows with one to three images and several conversations, an image in two rows, one twice in a row, and text."""
    return [
        row([paths[0]], ["a rook", "a white king", "two"], source="one image"),
        row([paths[1], paths[2]], ["a cat on a mat", "no"], source="two images"),
        row([paths[2]], ["yes", "yes", "three pieces on the board", "one", "a dog"], None, source="captions"),
        row([paths[4], paths[3], paths[4]], ["a black rook", "four"], source="an image twice"),
        row([], ["a photograph", "the lazy dog"], source="text"),
        row([paths[5]], ["a board"], source="one conversation"),
    ]

"""Workloads of the benchmarks: seeded random images, captions, questions and answers, and models with random weights.

Lengths follow the real data: five captions of about 13 tokens for each image (COCO), or four or five question/answer
pairs of about 90 tokens together (LLaVA-Instruct-150K, independent pairs). Images are JPEG files of COCO's size, so
that reading them takes as long as with COCO.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from jnana.modeling import JnanaConfig, JnanaForConditionalGeneration
from jnana.processing import JnanaProcessor, add_jnana_tokens, read_chat_template, set_image_geometry
from jnana.processing.data import train_tokenizer
from jnana.processing.data.rows import IMAGE_PART, make_row, message, text_part


CAPTIONS = 5
WIDTH, HEIGHT = 640, 480  # of an image in pixels
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Scale:
    """
    Sizes of a pair of models, by the number of image tokens.

    Args:
        text (`dict[int, dict]`): `PhiConfig` fields.
        vision (`dict[int, dict]`): `CLIPVisionConfig` fields.
        dtype (`torch.dtype`): Dtype of the frozen weights.
        images_per_step (`dict[int, int]`): Images of one step, each with all its conversations.
        max_row_tokens (`dict[int, int]`): Longest packed row, in tokens.
        lora_r (`int`): Rank of the adapter in SFT.
        tiles (`int`): The number of image tokens with which images are cut into tiles (LLaVA-1.6); the models are then
            compared with stock LLaVA-Next.
    """

    text: dict[int, dict[str, Any]]
    vision: dict[int, dict[str, Any]]
    dtype: torch.dtype
    images_per_step: dict[int, int]
    max_row_tokens: dict[int, int]
    lora_r: int
    tiles: int


def _vision(hidden: int, layers: int, heads: int, image: int, patch: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "image_size": image, "patch_size": patch}


def _text(hidden: int, layers: int, heads: int, vocabulary: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, "vocab_size": vocabulary, "max_position_embeddings": 2048, **more}


PHI_2 = _text(2560, 32, 32, 51_200, partial_rotary_factor=0.4)

SCALES = {
    # for tests
    "tiny": Scale(
        text=dict.fromkeys((4, 16, 24), _text(32, 2, 2, 700)),
        vision={4: _vision(16, 2, 2, 16, 8), 16: _vision(16, 2, 2, 32, 8), 24: _vision(16, 2, 2, 16, 8)},
        dtype=torch.float32,
        images_per_step={4: 2, 16: 1, 24: 1},
        max_row_tokens=dict.fromkeys((4, 16, 24), 320),
        lora_r=2,
        tiles=24,
    ),
    # for one CPU thread; the vision tower's share of the work is about that of ViT-B/32 and ViT-L/14 with Phi-2
    "small": Scale(
        text={49: _text(512, 8, 8, 51_200), 576: _text(256, 8, 4, 8_000), 2340: _text(256, 8, 4, 8_000)},
        vision={49: _vision(128, 3, 2, 224, 32), 576: _vision(64, 2, 1, 336, 14), 2340: _vision(64, 2, 1, 336, 14)},
        dtype=torch.float32,
        images_per_step={49: 1, 576: 1, 2340: 1},
        max_row_tokens={49: 1024, 576: 1280, 2340: 3072},
        lora_r=8,
        tiles=2340,
    ),
    # Phi-2 with CLIP ViT-B/32, with ViT-L/14 at 336 pixels, and with five views of an image through the latter
    "phi2": Scale(
        text={49: PHI_2, 576: PHI_2, 2340: PHI_2},
        vision={49: _vision(768, 12, 12, 224, 32)} | dict.fromkeys((576, 2340), _vision(1024, 24, 16, 336, 14)),
        dtype=torch.bfloat16,
        images_per_step={49: 16, 576: 4, 2340: 1},
        max_row_tokens={49: 2048, 576: 2048, 2340: 4096},
        lora_r=64,
        tiles=2340,
    ),
}


def make_processor(scale: Scale, num_image_tokens: int) -> JnanaProcessor:
    """Tokenizer, image processor and the `jnana` chat template; every word of [`words`] is one token."""
    vision = scale.vision[num_image_tokens]
    # each word on two lines of its own, so that the tokenizer merges pairs within words first
    tokenizer: PreTrainedTokenizerFast = train_tokenizer([f" {word}" for word in words() for _ in range(2)], 690)
    add_jnana_tokens(tokenizer)
    side = vision["image_size"]
    image_processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return JnanaProcessor(
        set_image_geometry(image_processor, "anyres" if num_image_tokens == scale.tiles else "crop"),
        tokenizer,
        patch_size=vision["patch_size"],
        num_additional_image_tokens=1,
        chat_template=read_chat_template("jnana"),
    )


def words() -> list[str]:
    """The vocabulary of all texts: 400 words of two letters."""
    return [first + second for first in LETTERS[:20] for second in LETTERS[:20]]


def make_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Write JPEG files of `WIDTH` x `HEIGHT` pixels: smooth colours with noise, about as large as photographs."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.int16)
        pixels = (pixels + generator.integers(-12, 13, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{number:05d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=85)
    return paths


def make_rows(stage: str, images: list[Path], seed: int = 0) -> list[dict]:
    """
    Rows with one image and all its conversations.

    Args:
        stage (`str`): `align` (five captions for each image) or `sft` (four or five independent pairs).
        images (`list[Path]`): One for each row.
        seed (`int`): Seed of lengths and words.
    """
    rng = random.Random(f"{stage} {seed}")

    def text(mean: float, spread: float, least: int, most: int) -> str:
        length = round(min(max(rng.lognormvariate(np.log(mean), spread), least), most))
        return " ".join(rng.choice(words()) for _ in range(length))

    def conversation() -> list[dict]:
        if stage == "align":
            return [message("user", IMAGE_PART), message("assistant", text_part(text(11.5, 0.22, 7, 40)))]
        question, answer = text(16, 0.4, 5, 50), text(50, 0.7, 2, 200)
        return [message("user", IMAGE_PART, text_part(question)), message("assistant", text_part(answer))]

    rows = []
    for number, image in enumerate(images):
        count = CAPTIONS if stage == "align" else 4 + (number % 5 in (1, 3))
        chats = [conversation() for _ in range(count)]
        rows.append(make_row([{"path": str(image), "bytes": None}], chats, f"{stage} record {number}"))
    return rows


@contextlib.contextmanager
def built_as(scale: Scale, device: torch.device) -> Iterator[None]:
    """Models that are made inside are made on `device`, in the dtype of the scale."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(scale.dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def make_models(
    scale: Scale, num_image_tokens: int, processor: JnanaProcessor, device: torch.device
) -> tuple[PreTrainedModel, JnanaForConditionalGeneration]:
    """
    Stock LLaVA (with tiles LLaVA-Next) and Jnana with the same random weights.

    The stock head has no bias, so the bias of Phi's head is set to zero.
    """
    vision = CLIPVisionConfig(**scale.vision[num_image_tokens])
    text = PhiConfig(**scale.text[num_image_tokens])
    common: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    pinpoints = processor.image_grid_pinpoints
    parts = {"vision_config": vision, "text_config": text, "image_token_index": processor.image_token_id}
    torch.manual_seed(0)
    with built_as(scale, device):
        if pinpoints is None:
            llava_config = LlavaConfig(**parts, **common, image_seq_length=num_image_tokens)
            stock: PreTrainedModel = LlavaForConditionalGeneration(llava_config)
        else:
            next_config = LlavaNextConfig(**parts, **common, image_grid_pinpoints=pinpoints)
            stock = LlavaNextForConditionalGeneration(next_config)
        common |= {"image_token_id": processor.image_token_id, "image_grid_pinpoints": pinpoints}
        jnana = JnanaForConditionalGeneration(JnanaConfig.from_vision_text_configs(vision, text, **common))
    names = {"model.image_newline": "model.multi_modal_projector.image_newline"}  # the projector owns it here
    state = {names.get(name, name): weight for name, weight in stock.state_dict().items()}
    jnana.load_state_dict({**state, "lm_head.bias": torch.zeros_like(jnana.lm_head.bias)})
    return stock, jnana

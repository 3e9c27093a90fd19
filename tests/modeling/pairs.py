"""Tiny pairs for the model tests: checkpoints on disk as the Hub has them, and the model that joins them.

One-dimensional weights (biases, norms) are drawn at random, because transformers starts them at 0 and 1, where a
forgotten bias would go unseen. Matrices are drawn wide, so that a random model's answers depend on what it reads.
"""

from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, CLIPModel, MistralConfig, PreTrainedModel

from jnana.modeling import JnanaForConditionalGeneration
from tests.tiny import IMAGE_SIZE, VOCAB_ROWS, tiny_text_config, tiny_vision_config


FAMILIES = ["phi", "phi3", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"]
IMAGE = 310  # a free row of the tiny embedding
TEXT_IDS = 300  # ids below are the tokenizer's


def text_config(family: str, **changes):
    if family == "mistral":
        fields = tiny_text_config("llama").to_dict()
        fields = {key: fields[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        return MistralConfig(**{**fields, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})
    return tiny_text_config(family, **changes)


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def save_text(folder: Path, family: str = "phi", seed: int = 0, **changes) -> str:
    torch.manual_seed(seed)
    config = text_config(family, **{"initializer_range": 0.2, **changes})
    randomize(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return str(folder)


def save_vision(folder: Path, kind: str = "clip", seed: int = 1) -> str:
    torch.manual_seed(seed)
    config = tiny_vision_config(kind)
    model = CLIPModel(config) if kind == "clip_full" else AutoModel.from_config(config)
    randomize(model).save_pretrained(folder)
    return str(folder)


def join(
    folder: Path, family: str = "phi", vision: str = "clip", text_changes: dict | None = None, **fields
) -> JnanaForConditionalGeneration:
    """A pair of fresh tiny backbones, saved below `folder` and joined."""
    save_vision(folder / "vision", vision)
    save_text(folder / "text", family, **(text_changes or {}))
    torch.manual_seed(2)
    fields = {"image_token_id": IMAGE, **fields}
    return JnanaForConditionalGeneration.from_vision_text_pretrained(
        str(folder / "vision"), str(folder / "text"), **fields
    )


def text_ids(rows: int = 2, length: int = 10, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, TEXT_IDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def pictures(count: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def with_images(ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Each row gets one image in front."""
    return torch.cat([torch.full((len(ids), num_tokens), IMAGE), ids], dim=1)


def greedy_by_hand(model, ids, images, new=6):
    """Without any cache, the images passed every time."""
    start = ids.shape[1]
    for _ in range(new):
        with torch.no_grad():
            logits = model(ids, pixel_values=images, use_cache=False).logits[:, -1]
        logits[:, IMAGE] = float("-inf")
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, start:]


__all__ = [
    "FAMILIES",
    "IMAGE",
    "VOCAB_ROWS",
    "greedy_by_hand",
    "join",
    "pictures",
    "randomize",
    "save_text",
    "save_vision",
]
__all__ += ["text_config", "text_ids", "with_images"]

"""Tiny models with random weights, tokenizers and image processors, which the tests use instead of the real ones.

Nothing here is downloaded: each builder is seeded, takes milliseconds on a CPU, and keeps the features that matter of
the real thing (Phi's biased head, Phi-3's fused projections and sliding window, Qwen's tied embeddings, CLIP's CLS).
"""

from pathlib import Path

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)


IMAGE_SIZE = 24
PATCH_SIZE = 12  # 24 / 12 -> 4 patches, 5 vectors with CLIP's CLS
VOCAB_ROWS = 320  # more rows than the tokenizer has entries, as in Phi-2

CORPUS = [
    "a white king and a black rook stand on the board",
    "what do you see in this picture? how many pieces are there?",
    "caption image: end of question: USER: ASSISTANT: the answer is yes, no, one, two, three",
    "a photograph of a cat on a mat beside a dog; the quick brown fox jumps over the lazy dog",
]


def tiny_vision_config(kind: str = "clip") -> PreTrainedConfig:
    """The config of a small vision tower: `clip`, `siglip`, `dinov2` (vision parts), `clip_full` (a `CLIPConfig`)."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    if kind == "clip":
        return CLIPVisionConfig(**sizes, intermediate_size=64, projection_dim=16)
    if kind == "siglip":
        return SiglipVisionConfig(**sizes, intermediate_size=64)
    if kind == "dinov2":
        return Dinov2Config(**sizes, mlp_ratio=2)
    if kind == "clip_full":
        text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        vision = {**sizes, "intermediate_size": 64}
        return CLIPConfig(
            vision_config=vision,
            text_config={**text, "vocab_size": VOCAB_ROWS, "max_position_embeddings": 32},
            projection_dim=16,
        )
    raise ValueError(f"unknown tiny vision tower {kind!r}")


def tiny_text_config(kind: str = "phi", **changes) -> PreTrainedConfig:
    """The config of a small language model: phi, phi3, gpt_neox, llama, qwen2, qwen3 (the Qwens' heads are tied)."""
    sizes = {
        "vocab_size": VOCAB_ROWS,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    kinds: dict[str, tuple[type[PreTrainedConfig], dict]] = {
        "phi": (PhiConfig, {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
        "phi3": (Phi3Config, {"num_key_value_heads": 4, "sliding_window": 16}),
        "gpt_neox": (GPTNeoXConfig, {"rotary_pct": 0.5}),
        "llama": (LlamaConfig, {"num_key_value_heads": 2}),
        "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
    }
    config_class, extra = kinds[kind]
    return config_class(**{**sizes, **extra, **changes})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as Phi-2's: `<|endoftext|>` (id 0) closes a text, no pad token, no image token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=256,
    )


def tiny_image_processor() -> CLIPImageProcessor:
    """CLIP's image processor at the tiny towers' size."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


def save_tiny_vision(folder: str | Path, kind: str = "clip", seed: int = 0) -> Path:
    """Write a vision checkpoint (weights, config, image processor) as the Hub has it; returns the folder."""
    torch.manual_seed(seed)
    config = tiny_vision_config(kind)
    models = {"clip": CLIPVisionModel, "clip_full": CLIPModel}
    model = models[kind](config) if kind in models else AutoModel.from_config(config)
    model.save_pretrained(folder)
    tiny_image_processor().save_pretrained(folder)
    return Path(folder)


def save_tiny_text(folder: str | Path, kind: str = "phi", seed: int = 0, **changes) -> Path:
    """Write a language model checkpoint (weights, config, tokenizer) as the Hub has it; returns the folder."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_text_config(kind, **changes))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)

"""Tiny models with random weights, tokenizers and image processors, which the tests use instead of the real ones.

Nothing here is downloaded: each builder is seeded, takes milliseconds on a CPU, and keeps the features that matter of
the real thing (Phi's biased head, Phi-3's fused projections and sliding window, Qwen's tied embeddings, CLIP's CLS).
"""

from pathlib import Path

import torch
from transformers import (
    AddedToken,
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
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

# The templates of llava-1.5-7b-hf and llava-v1.6-mistral-7b-hf as they were published
LLAVA_TEMPLATES = {
    kind: Path(__file__).parent / "fixtures" / "chat_templates" / f"{name}.jinja"
    for kind, name in (("llava", "llava-1.5"), ("llava_next", "llava-1.6-mistral"))
}


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
    """The config of a small language model of a family: phi, phi3, ..., qwen3 (the Qwens' heads are tied)."""
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
        "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
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


def save_tiny_llava(
    folder: str | Path, kind: str = "llava_next", text: str = "llama", seed: int = 0, **changes
) -> Path:
    """
    Write a published LLaVA checkpoint as transformers itself saves one: `llava` (1.5) or `llava_next` (1.6), with the
    stock processor. Its image token is in the embedding; biases and norms are drawn at random.
    """
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    token = tokenizer.convert_tokens_to_ids("<image>")
    fields = {
        "vision_config": tiny_vision_config("clip"),
        "text_config": tiny_text_config(text, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id),
        "vision_feature_layer": -2,
        "image_token_index": token,
        **changes,
    }
    stock_processor = {"patch_size": PATCH_SIZE, "num_additional_image_tokens": 1}
    stock_processor |= {"chat_template": LLAVA_TEMPLATES[kind].read_text(encoding="utf-8")}
    stock_processor |= {"vision_feature_select_strategy": "default", "tokenizer": tokenizer}
    if kind == "llava":
        config: PreTrainedConfig = LlavaConfig(**fields)
        model: type[PreTrainedModel] = LlavaForConditionalGeneration
        processor = LlavaProcessor(image_processor=tiny_image_processor(), **stock_processor)
    else:
        grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        pinpoints = [[IMAGE_SIZE * rows, IMAGE_SIZE * columns] for rows, columns in grids]
        config, model = LlavaNextConfig(**fields, image_grid_pinpoints=pinpoints), LlavaNextForConditionalGeneration
        image_processor = LlavaNextImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=pinpoints,
        )
        processor = LlavaNextProcessor(image_processor=image_processor, **stock_processor)
    torch.manual_seed(seed)
    stock = model(config)
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    stock.save_pretrained(folder)
    processor.save_pretrained(folder)
    return Path(folder)

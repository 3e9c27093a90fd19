"""Tiny IDEFICS models with random weights, and checkpoints of them as the Hub has them."""

from pathlib import Path

import torch
from transformers import IdeficsConfig, IdeficsForVisionText2Text, IdeficsImageProcessorPil, IdeficsProcessor

from tests.tiny import tiny_tokenizer


VOCABULARY, IMAGE, END, AROUND = 320, 321, 2, 320


def tiny_config(**changes) -> IdeficsConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "additional_vocab_size": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_layer_interval": 2,
        "qk_layer_norms": True,
        "use_resampler": True,
        "max_position_embeddings": 128,
        "vision_config": {
            "embed_dim": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": 12,
            "patch_size": 4,
        },
        "perceiver_config": {
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 2,
            "resampler_head_dim": 6,
            "qk_layer_norms_perceiver": True,
        },
    }
    return IdeficsConfig(**{**fields, **changes})


def tiny_idefics(**changes) -> IdeficsForVisionText2Text:
    """With weights that make each part count: wide matrices, random norms and biases, open gates."""
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.requires_grad_(True)


def save_tiny_idefics(folder: Path, **changes) -> IdeficsForVisionText2Text:
    """A checkpoint as the Hub has it; its tokenizer gives the added tokens the ids 320 and 321."""
    model = tiny_idefics(**changes)
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens(["<fake_token_around_image>", "<image>"], special_tokens=True)
    tokenizer.pad_token = "<unused0>"
    IdeficsProcessor(IdeficsImageProcessorPil(image_size=12), tokenizer, image_size=12).save_pretrained(folder)
    return model

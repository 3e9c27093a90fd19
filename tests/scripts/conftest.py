"""One tiny chain, pretrain -> align -> sft, that most script tests use; it is trained once a session."""

from pathlib import Path

import pytest
import torch

from jnana import run_align, run_pretrain, run_sft
from tests.scripts.tiny_data import make_data
from tests.tiny import save_tiny_vision


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)  # two test workers share two cores; more threads would only wait for each other


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def vision(tmp_path_factory) -> Path:
    return save_tiny_vision(tmp_path_factory.mktemp("vision"), "clip_full")


def options(**values) -> list[str]:
    """Keyword arguments as a command line."""
    return [f"--{key}={value}" for key, value in values.items()]


PRETRAIN = {
    "text_config": '{"model_type": "phi", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "partial_rotary_factor": 0.5, "max_position_embeddings": 128}',
    "train_tokenizer_vocab_size": 290,
    "block_size": 32,
    "max_steps": 12,
    "save_steps": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": "2e-3",
}


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "pretrain"
    corpus = data / "corpus.txt"
    samples = {"eval_data": corpus, "sample_steps": 6, "sample_count": 1, "eval_strategy": "steps", "eval_steps": 6}
    run_pretrain.main(options(**PRETRAIN, train_data=corpus, output_dir=folder, **samples))
    return folder


def align_options(data, vision, pretrained, **changes) -> list[str]:
    values = {
        "vision_model": vision,
        "text_model": pretrained,
        "vision_feature_layer": -1,
        "train_data": data / "captions.json",
        "image_folder": data / "images",
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": "1e-3",
        "logging_steps": 1,
    }
    return options(**{**values, **changes})


@pytest.fixture(scope="session")
def aligned(pretrained, data, vision) -> Path:
    folder = pretrained.parent / "align"
    run_align.main(align_options(data, vision, pretrained, output_dir=folder))
    return folder


def sft_options(data, aligned, **changes) -> list[str]:
    values = {
        "model_name_or_path": aligned,
        "train_data": data / "instruct.json",
        "image_folder": data / "images",
        "eval_data": data / "instruct.json",
        "lora_r": 4,
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": "1e-3",
        "logging_steps": 1,
    }
    return options(**{**values, **changes})


@pytest.fixture(scope="session")
def tuned(aligned, data) -> Path:
    folder = aligned.parent / "sft"
    samples = {"sample_steps": 3, "sample_count": 2, "sample_max_new_tokens": 6}
    run_sft.main(sft_options(data, aligned, output_dir=folder, merge_adapter="true", **samples))
    return folder


CROSS = {
    "fusion": "cross_attention",
    "cross_layer_interval": 1,
    "cross_attention_intermediate_size": 64,
    "projector_type": "perceiver",
    "projector_num_latents": 4,
    "projector_depth": 1,
    "projector_num_heads": 2,
    "projector_head_dim": 8,
    "learning_rate": "1e-2",
}


@pytest.fixture(scope="session")
def crossed(tmp_path_factory, data, vision, pretrained):
    folder = tmp_path_factory.mktemp("crossed") / "align"
    run_align.main(align_options(data, vision, pretrained, output_dir=folder, **CROSS))
    return folder

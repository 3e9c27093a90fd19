"""The options of the three training scripts, beside the stock `transformers.TrainingArguments`.

`recipes.py` reads them from a recipe and the command line.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from jnana.modeling import PROJECTOR_FIELDS


# Defaults of this project for the stock TrainingArguments; a recipe overrides them.
TRAINING_DEFAULTS = {
    "remove_unused_columns": "false",  # rows are images and conversations; the collator turns them into model inputs
    "label_names": ["labels"],
    "report_to": "none",
    "dataloader_pin_memory": str(torch.cuda.is_available()).lower(),  # without a GPU it only warns
    "logging_steps": "10",
    "logging_first_step": "true",
    "logging_nan_inf_filter": "false",  # it reads the loss of every micro-batch back from the GPU
    "save_total_limit": "2",  # the last one, and the one before in case a crash leaves the last incomplete
    # accelerate would slice a packed batch of a stream along dimension 0, images and rows alike
    "accelerator_config": '{"dispatch_batches": false}',
    "hub_strategy": "end",  # the scripts push the files that training/sharing.py selects
    # every trained parameter is used (see training/stages.py), so DDP need not search for unused ones
    "ddp_find_unused_parameters": "false",
}
# The one key of `liger_kernel_config` that Jnana's models follow.
LIGER_LOSS = "fused_linear_cross_entropy"


@dataclass
class ModelArguments:
    """The model: a Jnana checkpoint, or two backbones and the projector that joins them."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A Jnana checkpoint, or an adapter directory of run_sft, to continue from."}
    )
    vision_model: str | None = field(default=None, metadata={"help": "Vision tower: Hub id or directory."})
    text_model: str | None = field(default=None, metadata={"help": "Causal language model: Hub id or directory."})
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Default: the tokenizer in `text_model`. Another one must have the same ids."}
    )
    projector_type: Literal["linear", "mlp", "resblock", "pixel_shuffle", "avg_pool", "perceiver"] | None = field(
        default=None
    )
    projector_hidden_act: str | None = field(default=None)
    projector_num_blocks: int | None = field(
        default=None, metadata={"help": "Residual blocks of a `resblock` projector."}
    )
    projector_layer_norm: bool | None = field(
        default=None, metadata={"help": "LayerNorm in front of an `mlp` projector."}
    )
    projector_downsample_factor: int | None = field(
        default=None, metadata={"help": "`pixel_shuffle`, `avg_pool`: side in patches of the squares that are joined."}
    )
    projector_num_layers: int | None = field(
        default=None, metadata={"help": "`pixel_shuffle`, `avg_pool`: 1 or 2 Linear layers."}
    )
    projector_num_latents: int | None = field(
        default=None, metadata={"help": "`perceiver`: vectors that the resampler makes of an image."}
    )
    projector_depth: int | None = field(default=None, metadata={"help": "`perceiver`: layers."})
    projector_num_heads: int | None = field(default=None, metadata={"help": "`perceiver`: attention heads."})
    projector_head_dim: int | None = field(default=None, metadata={"help": "`perceiver`: width of a head."})
    projector_qk_layer_norm: bool | None = field(
        default=None, metadata={"help": "`perceiver`: normalise queries and keys."}
    )
    multimodal_projector_bias: bool | None = field(default=None)
    vision_feature_layer: list[int] | None = field(
        default=None, metadata={"help": "Hidden state(s) of the tower; several are concatenated."}
    )
    vision_feature_select_strategy: Literal["default", "full", "pooled"] | None = field(default=None)
    fusion: Literal["tokens", "cross_attention"] | None = field(
        default=None,
        metadata={
            "help": "How images reach the language model: as vectors in the row (LLaVA; the default), or by gated "
            "cross-attention (IDEFICS; with `projector_type: perceiver`)."
        },
    )
    cross_layer_interval: int | None = field(
        default=None, metadata={"help": "`cross_attention`: a block before every n-th layer of the language model."}
    )
    cross_attention_intermediate_size: int | None = field(
        default=None, metadata={"help": "`cross_attention`: width inside the blocks' MLPs; default: the layers' own."}
    )
    cross_attention_qk_norm: bool | None = field(
        default=None, metadata={"help": "`cross_attention`: normalise queries and keys."}
    )
    cross_attention_gate: Literal["scalar", "vector"] | None = field(
        default=None, metadata={"help": "`cross_attention`: one gate for all channels, or one for each."}
    )
    cross_attention_norm_eps: float | None = field(default=None)
    image_end_token_id: int | None = field(
        default=None, metadata={"help": "`cross_attention`: the token behind which no image is attended to."}
    )
    image_geometry: Literal["crop", "pad", "anyres"] | None = field(
        default=None,
        metadata={
            "help": "How an image becomes square: cropped (CLIP), padded (LLaVA-1.5), or whole and in tiles "
            "(LLaVA-1.6; a new pair only). Default: as the checkpoint's image processor does it."
        },
    )
    image_backend: Literal["pil", "torchvision"] | None = field(
        default=None,
        metadata={
            "help": "Library that resizes images. Default: that of the checkpoint to continue; for a new pair "
            "torchvision where it is installed. Their pixels differ by a level, so a resumed run keeps it."
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A shipped template's name, or a .jinja file. Default: the format of an instruct model's own chat "
            "template; `jnana` for a language model without one."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="float32",
        metadata={
            "help": "Dtype of the frozen weights; trained weights are always float32. auto: that of the checkpoint "
            "(in a pair: of the language model), but bfloat16 for float16."
        },
    )
    attn_implementation: str | None = field(default=None)
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = field(
        default=None,
        metadata={"help": "Spread the layers over the GPUs of this machine, in one process, as transformers does."},
    )
    trust_remote_code: bool = field(default=False)

    @property
    def projector_fields(self) -> dict[str, Any]:
        """The `JnanaConfig` fields that are set; the others keep `JnanaConfig`'s defaults."""
        values = {name: getattr(self, name) for name in PROJECTOR_FIELDS}
        if self.vision_feature_layer is not None and len(self.vision_feature_layer) == 1:
            values["vision_feature_layer"] = self.vision_feature_layer[0]
        return {name: value for name, value in values.items() if value is not None}


@dataclass
class TextModelArguments:
    """The language model of stage 0: a config to initialise randomly, or a checkpoint to continue from."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A language model to continue from."})
    config_name_or_path: str | None = field(
        default=None, metadata={"help": "A checkpoint whose config is used, with random weights."}
    )
    text_config: str | None = field(
        default=None, metadata={"help": "Config fields with `model_type`, as a mapping (JSON on the command line)."}
    )
    tokenizer_name_or_path: str | None = field(default=None)
    train_tokenizer_vocab_size: int | None = field(
        default=None, metadata={"help": "Train a byte-level BPE tokenizer of this size on the corpus first."}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32")
    attn_implementation: str | None = field(default=None)

    @property
    def text_config_fields(self) -> dict[str, Any]:
        """`text_config` as a mapping; empty if it is not set."""
        return {} if self.text_config is None else json.loads(self.text_config)


@dataclass
class DataArguments:
    """Images and conversations, for align and sft."""

    train_data: str | None = field(
        default=None,
        metadata={
            "help": "A JSON file, an image directory, or a Hub data set; or a list of sources, each a path, or `data` "
            "with weight or samples, repeat, name, image_folder, format, split, text_column, prompt, "
            "independent_turns (JSON on the command line; docs/data.md)."
        },
    )
    train_format: str = field(default="auto", metadata={"help": "auto, coco_captions, llava_instruct, ..."})
    train_split: str = field(default="train")
    image_folder: str | None = field(default=None)
    eval_data: str | None = field(
        default=None, metadata={"help": "As `train_data`; each source of a list has a loss of its own."}
    )
    eval_format: str = field(default="auto")
    eval_split: str = field(default="train", metadata={"help": "Split of `eval_data` where it has several."})
    eval_image_folder: str | None = field(default=None, metadata={"help": "Default: `image_folder`."})
    independent_turns: bool = field(
        default=True, metadata={"help": "Each question/answer pair is a conversation of its own."}
    )
    prompt: str | None = field(default=None, metadata={"help": "Question before every caption."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the captions or answers, where it has none of the known names."}
    )
    answer_keywords: bool = field(
        default=False, metadata={"help": "Train answers without stop words and punctuation (phi35_pooled)."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a row at most, image tokens included."})
    max_length_source: str | None = field(default=None, init=False)  # what `max_length` is, where it was not given
    max_image_pixels: int | None = field(default=None)
    jpeg_draft: bool = field(
        default=False,
        metadata={
            "help": "Decode JPEG files of twice the tower's size and more at a smaller size: faster, other pixels "
            "(docs/data.md)."
        },
    )
    on_bad_sample: Literal["raise", "skip"] = field(default="raise")
    image_check: Literal["none", "header", "decode"] = field(
        default="header",
        metadata={
            "help": "How much of every image the check before training reads. Where images are cut into tiles, `none` "
            "reads the headers too: the number of image tokens depends on the size."
        },
    )
    mix: Literal["row", "batch"] = field(
        default="row",
        metadata={"help": "Several sources share a packed row (row), or only a batch (batch)."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training; each process reads files of its own."}
    )
    shuffle_buffer: int = field(
        default=0,
        metadata={"help": "Rows of a stream from which the next one is drawn; 0: in the order of the files."},
    )
    data_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory of prepared rows, found again by the next start; default: `jnana` in the cache of "
            "`datasets`, for files of 1 MB and more (docs/data.md)."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that prepare rows; default: one for each core."}
    )
    max_train_rows: int | None = field(default=None)
    max_eval_rows: int | None = field(default=None)
    packing: Literal["none", "rows", "shared_image"] = field(
        default="none",
        metadata={
            "help": "Several conversations a row, invisible to one another; with shared_image, those about "
            "one image share its tokens. Trains exactly what `none` trains; the batch size counts packed rows."
        },
    )
    max_row_tokens: int = field(
        default=1024, metadata={"help": "Tokens of a packed row at most; docs/packing.md says what to choose."}
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Directory of the frozen tower's features of every image; missing ones are computed first."},
    )
    feature_cache_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "Dtype of the stored features; default: the dtype that the tower computes in."}
    )


@dataclass
class TextDataArguments:
    """A text corpus, for stage 0."""

    train_data: str | None = field(default=None, metadata={"help": "A .txt, .jsonl or .parquet file, or a Hub id."})
    train_split: str = field(default="train")
    eval_data: str | None = field(default=None)
    eval_split: str = field(default="train")
    text_column: str = field(default="text")
    block_size: int = field(default=512, metadata={"help": "Tokens a block; the corpus is packed into such blocks."})
    streaming: bool = field(default=False)
    max_train_rows: int | None = field(default=None, metadata={"help": "Documents of the corpus at most."})
    packing: Literal["blocks", "rows"] = field(
        default="blocks",
        metadata={
            "help": "blocks: documents end to end, cut every block_size tokens; a token sees the documents before its "
            "own. rows: whole documents, invisible to one another, in rows of block_size tokens."
        },
    )


@dataclass
class LoraArguments:
    """The adapter and the quantisation of run_sft. A further round on an adapter needs none of these."""

    lora_r: int = field(default=0, metadata={"help": "Rank of the adapter; 0 trains the whole language model."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Default: twice the rank."})
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Default: 0. Above 0, packed and separate rows draw different noise."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear layers of the language model, by the last part of their names; default: `all-linear`."
        },
    )
    merge_adapter: bool = field(default=False, metadata={"help": "Also write output_dir/merged, a full checkpoint."})
    lora_vision_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers of the vision tower, or `all-linear`; default: the tower gets no adapter."},
    )
    quantization: Literal["none", "nf4", "int8"] | None = field(
        default=None,
        metadata={
            "help": "Bits of the frozen language model (bitsandbytes); default: none, or those of a continued adapter."
        },
    )
    double_quantization: bool = field(default=True, metadata={"help": "nf4: quantise the quantisation constants too."})
    quantization_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "nf4: dtype of matrix products; default: `dtype`."}
    )
    quantization_storage_dtype: Literal["uint8", "float32", "bfloat16", "float16"] = field(
        default="uint8",
        metadata={"help": "nf4: dtype that holds the packed bits; FSDP needs the dtype of the other weights."},
    )
    merge_base: Literal["dequantized", "full"] = field(
        default="dequantized",
        metadata={"help": "merge_adapter: into the dequantised 4-bit base, as trained, or into the original weights."},
    )
    base_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the local checkpoint that is fine-tuned, written into the adapter."}
    )


@dataclass
class PartArguments:
    """Whether the vision tower trains whole; learning rates and schedules of single parts; in run_align and run_sft.

    `learning_rate` and `lr_scheduler_type` are those of the language model, and of each part for which none is given.
    """

    freeze_vision_tower: bool = field(
        default=True,
        metadata={
            "help": "false: the tower trains whole, but for weights behind the selected features. "
            "An adapter that is continued trains what it trained before."
        },
    )
    projector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Also for the blocks of cross-attention; default: `learning_rate`. (LLaVA's `mm_projector_lr`.)"
        },
    )
    projector_lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] | None = field(
        default=None, metadata={"help": "Default: `lr_scheduler_type`."}
    )
    vision_learning_rate: float | None = field(
        default=None,
        metadata={"help": "For the vision tower, or its adapter; default: `learning_rate`. (LLaVA-1.6: 2e-6.)"},
    )
    vision_lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] | None = field(
        default=None, metadata={"help": "Default: `lr_scheduler_type`."}
    )

    @property
    def parts(self) -> dict[str, tuple[float | None, str | None]]:
        """Learning rate and schedule of each part that can have its own; `None` where they are not set."""
        return {
            "multi_modal_projector": (self.projector_learning_rate, self.projector_lr_scheduler_type),
            "vision_tower": (self.vision_learning_rate, self.vision_lr_scheduler_type),
        }

    @property
    def given(self) -> bool:
        """Whether any part has a learning rate or schedule of its own."""
        return any(value is not None for values in self.parts.values() for value in values)

    def rate_of(self, part: str) -> float | None:
        """The part's own learning rate."""
        return self.parts.get(part, (None, None))[0]

    def schedule_of(self, part: str) -> str | None:
        """The part's own schedule."""
        return self.parts.get(part, (None, None))[1]


@dataclass
class RunArguments:
    """Samples, restarts and the optimizer, around the stock Trainer."""

    sample_steps: int = field(
        default=0, metadata={"help": "Generate answers to validation rows every N steps; 0: never."}
    )
    sample_count: int = field(default=4)
    sample_max_new_tokens: int = field(default=64)
    save_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Save a checkpoint too when the last one is this many minutes old; default: `save_steps` alone."
        },
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete output_dir's checkpoints and start anew instead of resuming."}
    )
    allow_changed: list[str] | None = field(
        default=None,
        metadata={"help": "Options that may differ from those with which the resumed run was started."},
    )
    optimizer: Literal["stock", "muon"] = field(
        default="stock",
        metadata={"help": "stock: the one named by `optim`; muon: Muon for matrices, AdamW for other weights."},
    )

"""For llama.cpp: `mmproj.gguf`, and the language model as a stock folder that its converter takes."""

import copy
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import EntryNotFoundError, cached_file

from jnana.modeling import JnanaConfig
from jnana.processing import JnanaProcessor

from .comparison import LAST_LOGITS, Answering, ExportFailedError, encode
from .mmproj import TANH_GELUS, TOWER_FLAGS, MmprojEncoder, feature_layers
from .refusals import NEAREST_AS_IT_IS, check_projector, refuse


logger = logging.getLogger(__name__)

MARKER = "<__media__>"  # the text that llama.cpp's server and its programs put where an image was
MAX_FEATURE_ERROR = 1e-3  # relative, by root mean square over the vectors of an image
TEXT_FAMILIES = ("gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")

GENERATION_TAG = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")

# Put in front of a chat template: texts are split at the marker, as if each one had been an image part.
SPLIT_AT_MARKER = """\
{%- set found = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- set found.parts = [] -%}
{%- set given = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
{%- for part in given -%}
{%- if part.type == 'text' and 'MARKER' in part.text -%}
{%- for piece in part.text.split('MARKER') -%}
{%- if not loop.first -%}
{%- set found.parts = found.parts + [{'type': 'image'}] -%}
{%- endif -%}
{%- if piece | trim -%}
{%- set found.parts = found.parts + [{'type': 'text', 'text': piece | trim}] -%}
{%- endif -%}
{%- endfor -%}
{%- else -%}
{%- set found.parts = found.parts + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- set found.messages = found.messages + [{'role': message.role, 'content': found.parts}] -%}
{%- endfor -%}
{%- set messages = found.messages -%}
""".replace("MARKER", MARKER)


def check_fits_llama_cpp(config: JnanaConfig, distill: bool = False) -> None:
    """
    Refuse what llama.cpp's graph for LLaVA, or its converter of language models, has no place for.

    Args:
        config ([`JnanaConfig`]): The model's.
        distill (`bool`): Whether a `resblock` projector will be replaced by an `mlp`.

    Raises:
        ValueError: With the reason, and the nearest way to go.
    """
    check_projector(config, "llama.cpp", distill)
    vision, text = config.vision_config, config.text_config
    if vision.model_type not in ("clip_vision_model", "siglip_vision_model"):
        refuse(
            f"llama.cpp's graph for LLaVA computes CLIP and SigLIP towers, not {vision.model_type!r}",
            f"train with one of those, export with --to llava, or {NEAREST_AS_IT_IS}",
        )
    if config.image_grid_pinpoints is not None:
        refuse(
            "it cuts images into tiles, and llama.cpp's order of tiles, unpadding and newlines have not been shown "
            "equal to those it was trained with",
            "export with --to llava (LLaVA-1.6's class), or train with image_geometry: pad",
        )
    if config.vision_feature_select_strategy == "full" and config.num_prefix_tokens:
        refuse(
            "vision_feature_select_strategy is 'full', and llama.cpp always drops CLIP's class token",
            "train with vision_feature_select_strategy: default, or export with --to llava",
        )
    height, width = config.image_height_and_width
    if height != width or not isinstance(vision.patch_size, int):
        refuse(f"llama.cpp takes square images, and this tower takes {height} x {width} pixels", NEAREST_AS_IT_IS)
    if vision.hidden_act not in TOWER_FLAGS:
        refuse(
            f"the tower's activation is {vision.hidden_act!r}, and llama.cpp's graph has {', '.join(TOWER_FLAGS)}",
            NEAREST_AS_IT_IS,
        )
    if vision.intermediate_size == vision.hidden_size:
        refuse(
            f"the tower's MLP is as wide as the tower ({vision.hidden_size}), and llama.cpp then takes its two layers "
            "for those of older files and exchanges them",
            "export with --to llava",
        )
    layers = feature_layers(config)
    if len(set(layers)) < len(layers):
        refuse(f"vision_feature_layer names a layer twice ({layers}), and llama.cpp joins each once", "name it once")
    mlp = config.projector_type == "mlp"
    if mlp and not distill and config.projector_hidden_act not in ("gelu", *TANH_GELUS):
        refuse(
            f"projector_hidden_act is {config.projector_hidden_act!r}, and llama.cpp always computes a GELU there",
            "train with projector_hidden_act: gelu_pytorch_tanh, or export with --to llava",
        )
    if mlp and config.projector_layer_norm and len(layers) > 1:
        refuse(
            "projector_layer_norm stands in front of several feature layers, and llama.cpp would apply it to the "
            "last one alone",
            "train with one feature layer, or export with --to llava",
        )
    if text.model_type not in TEXT_FAMILIES:
        refuse(
            f"llama.cpp's converter was not read for language models of type {text.model_type!r} (it was for "
            f"{', '.join(TEXT_FAMILIES)})",
            NEAREST_AS_IT_IS,
        )
    if text.model_type == "phi" and text.intermediate_size != 4 * text.hidden_size:
        refuse(
            f"llama.cpp takes the feed-forward of a Phi to be 4 x {text.hidden_size} wide, and this one has "
            f"{text.intermediate_size}",
            "use Phi-2's own proportions, or a Llama",
        )


def is_exact(config: JnanaConfig) -> bool:
    """Whether llama.cpp computes the same function: it has the tanh form of GELU, never the one with erf."""
    tower, projector = config.vision_config.hidden_act, config.projector_hidden_act
    return tower != "gelu" and (config.projector_type == "linear" or projector in TANH_GELUS)


def llama_cpp_template(chat_template: str, image_token: str) -> str:
    """
    A chat template that also knows llama.cpp's image marker.

    llama.cpp's server replaces each image by a marker in the text *before* it renders the template, so a part of type
    `image` never comes. The template splits texts at the marker and writes the marker where the model's own template
    writes its image token. `{% generation %}` tags, which only transformers knows, are taken out.

    Args:
        chat_template (`str`): The model's.
        image_token (`str`): The token that stands for an image in it.
    """
    body = GENERATION_TAG.sub(r"{#\1 \2#}", chat_template).replace(image_token, MARKER)
    return SPLIT_AT_MARKER + body


def write_text_folder(
    folder: Path, model: Any, processor: JnanaProcessor, source: str, dtype: torch.dtype = torch.float32
) -> None:
    """
    Write the language model with its head as transformers' own class, with tokenizer and chat template.

    Args:
        folder (`Path`): Directory to write.
        model ([`JnanaForConditionalGeneration`]): Its modules are moved: not usable afterwards.
        processor ([`JnanaProcessor`]): Its tokenizer and template are written.
        source (`str`): Directory or Hub id of the model, for Phi-3's `tokenizer.model`.
        dtype (`torch.dtype`): Of the weights.

    Raises:
        ValueError: If the tokenizer has more entries than the embedding, or Phi-3's file is missing.
    """
    text_config = copy.deepcopy(model.config.text_config)
    text_config.tie_word_embeddings = model.config.tie_word_embeddings
    text_config.name_or_path = ""  # it is saved in config.json
    tokenizer = copy.deepcopy(processor.tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        refuse(
            f"the tokenizer has {len(tokenizer)} entries and the embedding {rows} rows, which llama.cpp's converter "
            "refuses",
            "train with run_align or run_sft, which add the rows",
        )
    with torch.device("meta"):
        text: Any = AutoModelForCausalLM.from_config(text_config)
    setattr(text, text.base_model_prefix, model.model.language_model)
    text.set_output_embeddings(model.lm_head)
    text.generation_config = copy.deepcopy(model.generation_config)
    text.eval().to(dtype).save_pretrained(folder)
    tokenizer.chat_template = llama_cpp_template(processor.chat_template, processor.image_token)
    tokenizer.save_pretrained(folder)
    if text_config.model_type == "phi3":
        try:
            shutil.copyfile(cached_file(source, "tokenizer.model"), folder / "tokenizer.model")
        except (EntryNotFoundError, OSError):
            refuse(
                f"llama.cpp's converter of Phi-3 reads tokenizer.model, and {source!r} has none",
                f"put the one of the language model's own checkpoint into the directory, or {NEAREST_AS_IT_IS}",
            )


def check_features(
    encoder: MmprojEncoder, ours: list[tuple[torch.Tensor, torch.Tensor]], config: JnanaConfig
) -> tuple[float, float]:
    """
    Compare the features of the file with the model's, and log both orders of the class token.

    Args:
        encoder ([`MmprojEncoder`]): Reads the file.
        ours (`list[tuple]`): Pixel values and projected features `(num_patches, hidden_size)` of each image.
        config ([`JnanaConfig`]): The model's.

    Returns:
        `tuple[float, float]`: The relative error, and that of the order which llama.cpp has at present.

    Raises:
        ExportFailedError: If they are not equal.
    """
    errors = [[relative(encoder(pixels, last)[0], vectors) for pixels, vectors in ours] for last in (False, True)]
    error, error_last = (max(values) for values in errors)
    logger.info(f"features of mmproj.gguf differ by {error:.2g} (relative, root mean square of an image)")
    if encoder.has_class_token:
        logger.warning(
            "llama.cpp's graph puts CLIP's class token last, while its positions and gathered rows take it to be the "
            "first (its report 25814; pull request 25844 mends it and was open in mid-2026): in a build without that "
            f"change features differ by {error_last:.2g}. Take a build with it, or train with a SigLIP tower, which "
            "has no class token"
        )
    if not error <= MAX_FEATURE_ERROR:
        raise ExportFailedError(
            f"nothing was written: the features of mmproj.gguf differ from the model's by {error:.2g} (relative), and "
            f"at most {MAX_FEATURE_ERROR:g} is allowed"
            + ("" if is_exact(config) else ". llama.cpp computes the tanh form of GELU, this model the one with erf")
        )
    return error, error_last


def relative(vectors: torch.Tensor, expected: torch.Tensor) -> float:
    """|a - b| / |b|, by root mean square."""
    expected = expected.double().cpu()
    return ((vectors.double().cpu() - expected).norm() / expected.norm()).item()


def answering_by_halves(
    text: nn.Module, encoder: MmprojEncoder, processor: JnanaProcessor, max_new_tokens: int
) -> Answering:
    """How the two halves answer, as llama.cpp joins them: the features take the places of the image tokens."""

    @torch.inference_mode()
    def answer(chat: list[dict[str, Any]], with_logits: bool) -> tuple[torch.Tensor | None, list[int]]:
        inputs = encode(processor, chat)
        ids = inputs["input_ids"]
        images = ids == processor.image_token_id
        embeds = text.get_input_embeddings()(ids.masked_fill(images, 0).to(text.device))
        if "pixel_values" in inputs:
            features = encoder(inputs["pixel_values"]).flatten(0, 1)
            embeds[images.to(embeds.device)] = features.to(embeds)
        logits = text(inputs_embeds=embeds).logits[:, -LAST_LOGITS:].float().cpu() if with_logits else None
        settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return logits, text.generate(inputs_embeds=embeds, attention_mask=mask, **settings)[0].tolist()

    return answer

"""For ONNX Runtime and transformers.js: vision encoder, embedding, and decoder with its cache, a graph each.

The three and the names of their inputs and outputs are those that transformers.js asks for where `config.json` has the
`model_type` `llava`. The projector, of any type, is inside the vision encoder, the bias of a head in the decoder.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LlavaConfig, LlavaProcessor

from jnana.modeling import CACHE_NAME, JnanaConfig
from jnana.processing import JnanaProcessor

from .comparison import LAST_LOGITS, Answering, encode
from .llava import processor_of, stock_fields
from .refusals import NEAREST_AS_IT_IS, check_fusion, refuse


logger = logging.getLogger(__name__)

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
GRAPHS = (VISION, EMBEDDING, DECODER)
FOLDER = "onnx"  # where transformers.js looks for graphs
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TEXT_FAMILIES = ("gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3")
CHANGING_ROPES = ("dynamic", "longrope")  # their frequencies depend on the length
PLAIN_SETTINGS: dict[str, Any] = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
PLAIN_SETTINGS |= {"min_new_tokens": 0, "bad_words_ids": None, "num_beams": 1}
OPSET = 18
EXTERNAL_BYTES = 1_900_000_000  # a file of more than 2 GB is no valid graph: its weights lie beside it


def require_onnx() -> None:
    """Raise `ImportError` where a package that writes or runs graphs is missing."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"--to onnx needs the packages {', '.join(PACKAGES)}, and {', '.join(missing)} is not installed: "
            "`pip install 'jnana[onnx]'`"
        )


def check_fits_onnx(
    config: JnanaConfig, distill: bool = False, dtype: str | None = None, double_linear: bool = False
) -> None:
    """
    Refuse what transformers.js's class for LLaVA has no place for.

    Args:
        config ([`JnanaConfig`]): The model's.
        distill (`bool`): Whether a `resblock` projector shall be replaced, for which there is no reason here.
        dtype (`str`, *optional*): The asked dtype of the weights; graphs have float32 alone.
        double_linear (`bool`): Whether a `linear` projector shall be doubled, for which there is no reason here.

    Raises:
        ValueError: With the reason, and the nearest way to go.
    """
    if distill:
        refuse("distill is for formats without residual blocks, and a graph holds any projector", "leave distill out")
    if dtype not in (None, "float32"):
        refuse(f"the graphs are in float32 and dtype {dtype!r} was asked for", "leave dtype out")
    if double_linear:
        refuse(
            "double_linear is for formats without linear projectors, and a graph holds any", "leave double_linear out"
        )
    check_fusion(config, "transformers.js")
    text = config.text_config
    if config.image_grid_pinpoints is not None:
        refuse(
            "it cuts images into tiles, and the number of vectors of an image would depend on its size",
            "export with --to llava (LLaVA-1.6's class), or train with image_geometry: pad",
        )
    if text.model_type not in TEXT_FAMILIES:
        refuse(
            f"language models of type {text.model_type!r} were not tried (but {', '.join(TEXT_FAMILIES)})",
            NEAREST_AS_IT_IS,
        )
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in CHANGING_ROPES:
        refuse(
            f"the positions of its language model (rope_type {rope_type!r}) change with the length of a text, and a "
            "graph is traced at one length",
            NEAREST_AS_IT_IS,
        )
    if len(set(getattr(text, "layer_types", None) or ["full_attention"])) > 1:
        refuse("some layers of its language model have a sliding window and others have none", NEAREST_AS_IT_IS)


def check_generation(settings: GenerationConfig) -> None:
    """Refuse settings that change greedy answers, which the comparison with the graphs does not compute."""
    found = [name for name, plain in PLAIN_SETTINGS.items() if getattr(settings, name, None) not in (None, plain)]
    if found:
        refuse(
            f"its generation_config.json sets {', '.join(found)}, and answers of the graphs are compared without",
            f"take {', '.join(found)} out of generation_config.json, and give them where answers are generated",
        )


class VisionEncoder(nn.Module):
    """`pixel_values` `(num_images, 3, height, width)` -> `image_features` `(num_images, num_tokens, hidden_size)`."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.get_vision_features(pixel_values)[1]
        return self.model.multi_modal_projector.project(features)


class Decoder(nn.Module):
    """
    Embeddings `(batch_size, sequence_length, hidden_size)`, mask `(batch_size, total_length)` and positions
    `(batch_size, sequence_length)`, with the keys and values of each layer -> logits, and the longer keys and values.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.language_model, self.lm_head = model.model.language_model, model.lm_head
        self.window = getattr(model.config.text_config, "sliding_window", None)
        kinds = getattr(model.config.text_config, "layer_types", None)
        if kinds and "sliding_attention" not in kinds:
            self.window = None

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        # the whole mask is given, so that no code of transformers builds one from shapes while it is traced
        cached, count = past[0][0].shape[2], inputs_embeds.shape[1]
        rows = torch.arange(count, device=inputs_embeds.device)[:, None] + cached
        columns = torch.arange(cached + count, device=inputs_embeds.device)[None]
        seen = columns <= rows
        if self.window is not None:
            seen = seen & (columns > rows - self.window)
        seen = seen[None, None] & (attention_mask[:, None, None] > 0)
        mask = torch.where(seen, 0.0, torch.finfo(inputs_embeds.dtype).min).to(inputs_embeds.dtype)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            return_dict=True,
            **{CACHE_NAME: cache},
        )
        present = [(layer.keys, layer.values) for layer in cache.layers]
        return self.lm_head(outputs.last_hidden_state), present


def cache_shape(config: JnanaConfig, batch_size: int, length: int) -> tuple[int, int, int, int]:
    """The shape of a layer's keys, and of its values."""
    text = config.text_config
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return batch_size, heads, length, head_dim


def cache_names(prefix: str, layers: int) -> list[str]:
    """`past_key_values.0.key`, `past_key_values.0.value`, ... or `present.0.key`, ..."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


@contextlib.contextmanager
def without_warnings(name: str) -> Iterator[None]:
    """Only errors of another library's log."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def write_graph(
    file: Path, module: nn.Module, arguments: tuple, dynamic_shapes: tuple, inputs: list[str], outputs: list[str]
) -> None:
    """Trace a module and write its graph."""
    bytes_of_weights = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    with torch.no_grad(), without_warnings("torch.onnx"):  # of torchvision, which nothing here needs
        torch.onnx.export(
            module.eval(),
            arguments,
            str(file),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            opset_version=OPSET,
            external_data=bytes_of_weights > EXTERNAL_BYTES,
            verbose=False,
        )
    if Path(f"{file}.data").exists():
        rename_weights(file)


def rename_weights(file: Path) -> None:
    """Call the weights beside a graph `NAME.onnx_data`, as transformers.js does."""
    import onnx

    graph = onnx.load(str(file), load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = f"{file.name}_data"
    onnx.save(graph, str(file))
    Path(f"{file}.data").rename(f"{file}_data")


def add_rows(model: Any, processor: JnanaProcessor) -> None:
    """Rows of zeros for an image or padding token beyond the vocabulary; their tokens are never generated."""
    embedding, head = model.get_input_embeddings(), model.lm_head
    rows = embedding.weight.shape[0]
    needed = max(processor.image_token_id, processor.tokenizer.pad_token_id or 0) + 1
    if needed <= rows:
        return
    tied = head.weight is embedding.weight

    def longer(tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(torch.cat([tensor.detach(), tensor.new_zeros(needed - rows, *tensor.shape[1:])]))

    embedding.weight, embedding.num_embeddings = longer(embedding.weight), needed
    head.weight, head.out_features = embedding.weight if tied else longer(head.weight), needed
    if head.bias is not None:
        head.bias = longer(head.bias)
    model.config.text_config.vocab_size = needed
    settings = model.generation_config
    settings.suppress_tokens = sorted({*(settings.suppress_tokens or []), *range(rows, needed)})


def write_onnx_folder(folder: Path, model: Any, processor: JnanaProcessor) -> None:
    """
    Write the graphs below `onnx/`, and beside it the configs that transformers.js reads.

    Args:
        folder (`Path`): Directory to write.
        model ([`JnanaForConditionalGeneration`]): In float32; its config fits ([`check_fits_onnx`]).
        processor ([`JnanaProcessor`]): The model's.
    """
    config, auto = model.config, torch.export.Dim.AUTO
    (folder / FOLDER).mkdir(parents=True)
    model.set_attn_implementation("eager")  # plain products, which every runtime has
    model = model.cpu()
    add_rows(model, processor)
    layers, width = config.text_config.num_hidden_layers, config.text_config.hidden_size
    pixels = torch.zeros(2, config.vision_config.num_channels, *config.image_height_and_width)
    write_graph(
        folder / FOLDER / f"{VISION}.onnx",
        VisionEncoder(model),
        (pixels,),
        ({0: auto},),
        ["pixel_values"],
        ["image_features"],
    )
    ids = torch.zeros(2, 3, dtype=torch.long)
    write_graph(
        folder / FOLDER / f"{EMBEDDING}.onnx",
        torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.detach()),
        (ids,),
        ({0: auto, 1: auto},),
        ["input_ids"],
        ["inputs_embeds"],
    )
    batch_size, cached, count = 2, 4, 3
    past = [tuple(torch.zeros(cache_shape(config, batch_size, cached)) for _ in range(2)) for _ in range(layers)]
    arguments = (
        torch.zeros(batch_size, count, width),
        torch.ones(batch_size, cached + count, dtype=torch.long),
        torch.arange(cached, cached + count).repeat(batch_size, 1),
        past,
    )
    both = {0: auto, 1: auto}
    shapes = (both, both, both, [({0: auto, 2: auto}, {0: auto, 2: auto}) for _ in range(layers)])
    names = ["inputs_embeds", "attention_mask", "position_ids", *cache_names("past_key_values", layers)]
    outputs = ["logits", *cache_names("present", layers)]
    write_graph(folder / FOLDER / f"{DECODER}.onnx", Decoder(model), arguments, shapes, names, outputs)
    # the graph selects the vectors, and "pooled" is no word of LLaVA's config
    fields = stock_fields(config, "llava", double_linear=False) | {"vision_feature_select_strategy": "full"}
    stock: Any = LlavaConfig(**fields)
    for part in (stock.vision_config, stock.text_config):
        part.name_or_path = ""  # it is saved in config.json
    stock.architectures = ["LlavaForConditionalGeneration"]
    stock.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    stock_of_processor = counting_processor(config, processor)
    stock_of_processor.save_pretrained(folder)
    stock_of_processor.image_processor.save_pretrained(folder)
    add_fields(folder / "preprocessor_config.json", processor_class="LlavaProcessor")
    add_fields(folder / "tokenizer_config.json", chat_template=stock_of_processor.chat_template)
    beside = {name: True for name in GRAPHS if (folder / FOLDER / f"{name}.onnx_data").exists()}
    settings = {"dtype": "fp32", **({"use_external_data_format": beside} if beside else {})}
    add_fields(folder / "config.json", **{"transformers.js_config": settings})


def add_fields(file: Path, **fields: Any) -> None:
    """Set fields of a JSON file that transformers wrote."""
    values = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def counting_processor(config: JnanaConfig, processor: JnanaProcessor) -> LlavaProcessor:
    """LLaVA's processor, which counts as many tokens an image as the vision encoder gives vectors."""
    stock = processor_of(LlavaProcessor, config, processor)
    height, width = config.image_height_and_width
    patch = config.vision_config.patch_size
    # transformers.js adds the additional ones and, unlike transformers, takes none off for `default`
    stock.num_additional_image_tokens = config.image_seq_length - (height // patch) * (width // patch)
    stock.vision_feature_select_strategy = "full"
    return stock


def load_sessions(folder: Path) -> dict[str, Any]:
    """The three graphs in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return {
        name: onnxruntime.InferenceSession(
            str(folder / FOLDER / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for name in GRAPHS
    }


def answering_by_graphs(
    sessions: dict[str, Any], folder: Path, reference_processor: JnanaProcessor, max_new_tokens: int
) -> Answering:
    """How the graphs answer greedily, joined as transformers.js joins them, with the cache of the decoder."""
    processor = LlavaProcessor.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder)
    config = LlavaConfig.from_pretrained(folder)
    ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
    names = [value.name for value in sessions[DECODER].get_inputs()][3:]
    shape = cache_shape(config, 1, 0)  # type: ignore[arg-type]  # of the same text config

    def embed(ids: np.ndarray) -> np.ndarray:
        return sessions[EMBEDDING].run(None, {"input_ids": ids})[0]

    def start(inputs: Any) -> np.ndarray:
        """The embeddings of a prompt, image vectors in the places of the image tokens."""
        ids = inputs["input_ids"].numpy()
        images = ids == config.image_token_id
        embeds = embed(ids)
        if "pixel_values" in inputs:
            features = sessions[VISION].run(None, {"pixel_values": inputs["pixel_values"].numpy()})[0]
            embeds[images] = features.reshape(-1, features.shape[-1])
        return embeds

    def decode(embeds: np.ndarray, past: list[np.ndarray], length: int) -> tuple[np.ndarray, list[np.ndarray]]:
        count = embeds.shape[1]
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, length + count), dtype=np.int64),
            "position_ids": np.arange(length, length + count, dtype=np.int64)[None],
            **dict(zip(names, past, strict=True)),
        }
        logits, *present = sessions[DECODER].run(None, feed)
        return logits, present

    def answer(chat: list[dict[str, Any]], with_logits: bool) -> tuple[torch.Tensor | None, list[int]]:
        empty = [np.zeros(shape, dtype=np.float32) for _ in names]
        kept = None
        if with_logits:
            kept = torch.from_numpy(decode(start(encode(reference_processor, chat)), empty, 0)[0][:, -LAST_LOGITS:])
        embeds, past, length, ids = start(encode(processor, chat)), empty, 0, []
        for _ in range(max_new_tokens):
            logits, past = decode(embeds, past, length)
            length += embeds.shape[1]
            last = logits[0, -1].copy()
            last[settings.suppress_tokens or []] = -np.inf
            ids.append(int(last.argmax()))
            if ids[-1] in ends:
                break
            embeds = embed(np.array([[ids[-1]]], dtype=np.int64))
        return kept, ids

    return answer

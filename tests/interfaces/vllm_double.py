"""A double of vLLM's transformers backend, as far as it touches a model and its processor.

vLLM itself can't be installed here. What the double does was read in the sources of autumn 2026, and is written anew:
`vllm/model_executor/models/transformers` (the model is built on meta with the attention named `vllm`, its layers are
replaced in place, requests lie one after another in one row, keys and values stay with the attention), its
`multimodal.py` (placeholders from the offsets of replacements) and `vllm/renderers/hf.py` (a chat is one string).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2.nodes
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoProcessor
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from transformers.utils.chat_template_utils import _compile_jinja_template


class Linear(nn.Module):
    """What takes the place of each `nn.Linear`: no subclass of it."""

    def __init__(self, old: nn.Linear):
        super().__init__()
        self.weight = nn.Parameter(torch.full(old.weight.shape, torch.nan))
        self.bias = None if old.bias is None else nn.Parameter(torch.full(old.bias.shape, torch.nan))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Conv(nn.Module):
    """What takes the place of each `nn.Conv2d`."""

    def __init__(self, old: nn.Conv2d):
        super().__init__()
        self.weight = nn.Parameter(torch.full(old.weight.shape, torch.nan))
        self.bias = None if old.bias is None else nn.Parameter(torch.full(old.bias.shape, torch.nan))
        self.settings = {"stride": old.stride, "padding": old.padding}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight, self.bias, **self.settings)


class Embedding(nn.Module):
    """The table of `vocab_size` rows that takes the place of the model's, whatever that one has."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((rows, width), torch.nan))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight)


class Attention:
    """The attention of one layer, with the keys and values of every request; called on flattened rows."""

    def __init__(self, heads: int, kv_heads: int, size: int, window: int | None):
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, size, window
        self.scale = size**-0.5
        self.cache: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.batch: list[tuple[str, int]] = []  # request, new tokens; set before each step
        self.calls = 0

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        mixed, start = [], 0
        for request, count in self.batch:
            rows = slice(start, start := start + count)
            q, k, v = (
                x[rows].view(count, heads, self.size).transpose(0, 1)
                for x, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
            )
            if request in self.cache:
                k, v = (torch.cat(pair, dim=1) for pair in zip(self.cache[request], (k, v), strict=True))
            self.cache[request] = k, v
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=0) for x in (k, v))
            length = k.shape[1]
            distance = torch.arange(length - count, length)[:, None] - torch.arange(length)[None]
            seen = (distance >= 0) & (distance < (self.window or length))
            scores = (q @ k.transpose(1, 2) * self.scale).masked_fill(~seen, -torch.inf)
            mixed.append((scores.softmax(-1) @ v).transpose(0, 1).reshape(count, -1))
        assert start == len(query)
        return torch.cat(mixed)


def attention_forward(
    module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs
) -> tuple[torch.Tensor, None]:
    """What is registered under the name `vllm`."""
    instance = attention_instances[module.layer_idx]
    if scaling is not None:
        instance.scale = float(scaling)
    tokens = query.shape[-2]
    query, key, value = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
    return instance(query, key, value), None


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters are made on the device meta; buffers are computed where they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


class VllmDouble:
    """
    A checkpoint as vLLM's transformers backend serves it.

    Args:
        folder (`Path`): The checkpoint.
    """

    def __init__(self, folder: Path):
        AttentionInterface.register("vllm", attention_forward)
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.text_config = text = self.config.get_text_config()
        assert self.config != text  # or the model is served as one of texts alone
        text._attn_implementation = "vllm"
        with parameters_on_meta():
            self.model: Any = AutoModel.from_config(self.config, dtype=torch.float32, trust_remote_code=True)
        assert all(parameter.is_meta for parameter in self.model.parameters())
        assert not any(buffer.is_meta for buffer in self.model.buffers())
        self.rename = self.names()
        self.replace_layers(self.model)
        self.instances = self.attention_instances()
        self.model.set_input_embeddings(Embedding(text.vocab_size, text.hidden_size))
        for module in self.model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    setattr(module, name, nn.Parameter(torch.full(parameter.shape, torch.nan)))
        self.head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        tied = text.tie_word_embeddings or self.config.tie_word_embeddings
        if tied:
            self.head.weight = self.model.get_input_embeddings().weight
        else:
            nn.init.constant_(self.head.weight, torch.nan)
        self.requests: dict[str, int] = {}  # request -> tokens so far
        self.load(load_file(folder / "model.safetensors"))

    def names(self):
        """The function from a weight's name in a file to its name here."""
        renamings = [
            mapping for mapping in get_model_conversion_mapping(self.model) if isinstance(mapping, WeightRenaming)
        ]
        parts = "|".join(
            [name for name, _ in self.model.named_children()]
            + [name for name, _ in self.model.named_parameters(recurse=False)]
        )
        prefix = self.model.base_model_prefix
        patterns = [(rf"^{prefix}\.(.+)", r"model.\1")] if prefix not in ("", "model") else []
        patterns += [(rf"^(?!model\.)(({parts}).*)", r"model.\1"), (rf"^(model\.)((?!{parts}).+)", r"\2")]
        patterns += [(r"^model\.(.+\.)*(lm_head.+)", r"\2")]

        def rename(name: str) -> str:
            for mapping in renamings:
                name = mapping.rename_source_key(name)[0]
            for pattern, replacement in patterns:
                name = re.sub(pattern, replacement, name)
            return name

        return rename

    def replace_layers(self, module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear(child))
            elif isinstance(child, nn.Conv2d):
                setattr(module, name, Conv(child))
            else:
                self.replace_layers(child)

    def attention_instances(self) -> dict[int, Attention]:
        text = self.text_config
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        window = getattr(text, "sliding_window", None)
        kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
        return {
            layer: Attention(heads, kv_heads, size, window if kind == "sliding_attention" else None)
            for layer, kind in enumerate(kinds)
        }

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Every weight of the files has a place, and every place gets a weight."""
        places = {f"model.{name}": weight for name, weight in self.model.named_parameters()}
        if self.head.weight is not self.model.get_input_embeddings().weight:  # not tied
            places["lm_head.weight"] = self.head.weight
        missing = set(places)
        for name, weight in weights.items():
            name = self.rename(name)
            if name == "lm_head.bias":
                self.head.bias = nn.Parameter(weight)
            elif name in places:
                places[name].data.copy_(weight)
                missing.discard(name)
            else:
                raise ValueError(f"There is no module or parameter named {name!r}")
        if missing:
            raise ValueError(f"Following weights were not initialized from checkpoint: {sorted(missing)}")

    # ------------------------------------------------------------------ a chat, its images and its tokens

    def prompt_ids(self, chat: list[dict]) -> list[int]:
        """A chat rendered as one string and tokenised, one image token an image."""
        template = self.processor.chat_template
        return one_string_ids(self.processor.tokenizer, template, chat)

    def process(self, ids: list[int], images: list) -> tuple[list[int], dict[str, Any]]:
        """A prompt with the placeholders that the processor names for its images, and what the model gets of them."""
        processor = self.processor
        if not images:
            return ids, {}
        called = processor(
            text=processor.image_token * len(images),
            images=images,
            return_text_replacement_offsets=True,
            return_tensors="pt",
            truncation=False,
            add_special_tokens=False,
        )
        fields = {name: value for name, value in called.items() if name not in ("input_ids", "attention_mask")}
        offsets = fields.pop("text_replacement_offsets")[0]
        assert [entry["type"] for entry in offsets] == ["image"] * len(images)
        tokenizer = processor.tokenizer
        replacements = [tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
        counts = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
        rows = counts["num_image_patches"]
        if sum(rows) != len(fields["pixel_values"]):
            raise ValueError(f"{len(fields['pixel_values'])} rows of pixel_values can't be split into {rows}")
        (target,) = tokenizer.encode(processor.image_token, add_special_tokens=False)
        expanded, found = [], iter(replacements)
        for token in ids:
            expanded += next(found) if token == target else [token]
        assert next(found, None) is None
        fields["num_image_patches"] = rows
        return expanded, fields

    def embed_images(self, fields: dict[str, Any]) -> list[torch.Tensor]:
        """One tensor `(num_image_tokens, hidden_size)` an image."""
        fields = dict(fields)
        fields.pop("num_image_patches")
        features = self.model.get_image_features(fields.pop("pixel_values"), **fields)
        return list(features[0] if isinstance(features, tuple) else features.pooler_output)

    # ------------------------------------------------------------------ steps

    @torch.inference_mode()
    def step(self, rows: dict[str, list[int]], images: dict[str, list[torch.Tensor]] | None = None) -> dict[str, int]:
        """
        New tokens of several requests in one row.

        Args:
            rows (`dict[str, list[int]]`): Ids of each request: its prompt, or the last token it was given.
            images (`dict`, *optional*): The vectors of each request's images.

        Returns:
            `dict[str, int]`: The likeliest next token of each.
        """
        embedding = self.model.get_input_embeddings()
        token = self.processor.image_token_id
        embeds, positions = [], []
        for request, ids in rows.items():
            row = torch.tensor(ids)
            vectors = embedding(row)
            given = (images or {}).get(request)
            if given:
                vectors[row == token] = torch.cat(given)
            embeds.append(vectors)
            done = self.requests.get(request, 0)
            positions.append(torch.arange(done, done + len(ids)))
            self.requests[request] = done + len(ids)
        for instance in self.instances.values():
            instance.batch = [(request, len(ids)) for request, ids in rows.items()]
        outputs = self.model(
            input_ids=None,
            inputs_embeds=torch.cat(embeds)[None],
            use_cache=False,
            position_ids=torch.cat(positions)[None],
            attention_instances=self.instances,
            return_dict=False,
        )
        hidden = outputs[0][0]
        assert not hidden.isnan().any()
        ends = torch.tensor([len(ids) for ids in rows.values()]).cumsum(0) - 1
        self.logits = self.head(hidden[ends])
        return dict(zip(rows, self.logits.argmax(-1).tolist(), strict=True))

    def generate(self, chats: dict[str, list[dict]], max_new_tokens: int) -> dict[str, list[int]]:
        """Greedy answers of several requests, which decode together."""
        rows, images = {}, {}
        for request, chat in chats.items():
            parts = [part for message in chat for part in message["content"] if not isinstance(part, str)]
            shown = [part["image"] for part in parts if part["type"] == "image"]
            rows[request], fields = self.process(self.prompt_ids(chat), shown)
            with torch.inference_mode():
                images[request] = self.embed_images(fields) if fields else []
        answers: dict[str, list[int]] = {request: [] for request in chats}
        for _ in range(max_new_tokens):
            for request, token in self.step(rows, images).items():
                answers[request].append(token)
            rows, images = {request: answer[-1:] for request, answer in answers.items()}, {}
        return answers


def content_format(chat_template: str) -> str:
    """
    `openai`, if a template is given the parts of a message, `string`, if their text joined (and then no image): found
    in the template's syntax. Parts are given where a loop goes over `message.content`, filtered or not, or over a
    variable called `content`.
    """

    def is_content(node: Any, messages: set[str]) -> bool:
        while isinstance(node, jinja2.nodes.Filter):
            node = node.node
        key = getattr(node, "attr", None) or getattr(getattr(node, "arg", None), "value", None)
        return key == "content" and getattr(getattr(node, "node", None), "name", None) in messages

    tree = _compile_jinja_template(chat_template).environment.parse(chat_template)
    loops = list(tree.find_all(jinja2.nodes.For))
    messages = {loop.target.name for loop in loops if getattr(loop.iter, "name", None) == "messages"}
    found = any(is_content(loop.iter, messages) or getattr(loop.iter, "name", None) == "content" for loop in loops)
    return "openai" if found else "string"


def one_string_ids(tokenizer, chat_template: str, chat: list[dict]) -> list[int]:
    """The ids of a chat that ends where the answer begins, rendered by the tokenizer and tokenised as one string."""
    assert content_format(chat_template) == "openai"

    def plain(content: str | list[dict]) -> list[dict]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [{key: part[key] for key in ("type", "text") if key in part} for part in parts]

    messages = [{"role": message["role"], "content": plain(message["content"])} for message in chat]
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)

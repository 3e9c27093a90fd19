"""JnanaProcessor: image processor, tokenizer and chat template in one object, saved and shared with the model.

It turns chats about images into model inputs. A call `processor(images=..., text=...)` goes through `ProcessorMixin`
and gives what LLaVA's processor gives. `apply_chat_template` tokenises by itself, because text that a user wrote must
never become a control token, and the first token of an answer must never merge with the last one of the prompt (see
`chat_encoding_jnana.py`).

This file is copied into every saved checkpoint and loaded from there without this package. It imports transformers and
its neighbours only, uses their public interface only, and runs unchanged on transformers 5.20 and every later 5.x.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs, TextKwargs, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_encoding_jnana import BREAK, ChatEncoder, mark_answers, transcribe_chat, truncate_rows
from .chat_formats_jnana import (
    GENERATION_BLOCK,
    adopt_chat_template,
    chat_template_names,
    check_answer_end,
    read_chat_template,
)
from .image_geometry_jnana import (
    JnanaImageCountMixin,
    count_prefix_tokens,
    image_backend,
    set_image_geometry,
    with_image_backend,
)


# Keyword arguments for the tokenizer and the image processor. `apply_chat_template` also takes them outside
# `processor_kwargs`; every other keyword argument is a variable of the template.
TEXT_OPTIONS = frozenset(TextKwargs.__annotations__) | {"return_mm_token_type_ids"}
# Values of `truncation` that shorten a single text.
TRUNCATES = (True, "longest_first", "only_first")
PROCESSOR_OPTIONS = TEXT_OPTIONS | frozenset(ImagesKwargs.__annotations__) | {"images", "text_kwargs", "images_kwargs"}

# Keys under which an image part of a message may hold its image, in the order of preference.
IMAGE_KEYS = ("image", "url", "path", "base64")


class JnanaChatMixin(ProcessorMixin):
    """The part of [`JnanaProcessor`] that turns chats into model inputs."""

    image_token: str
    image_token_id: int
    count_image_tokens: Callable[..., int]

    def apply_chat_template(  # type: ignore[override]  # the base class's hint says `str` whatever it returns
        self,
        conversation,
        chat_template: str | None = None,
        tools: list | None = None,
        documents: list | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: Any = "auto",
        return_dict: bool = False,
        load_audio_from_video: bool = False,
        processor_kwargs: dict | None = None,
        sanitize_control_tokens: bool = True,
        transcriber: Any = None,
        **kwargs,
    ) -> Any:
        """
        Render one chat or a batch of chats; as `ProcessorMixin.apply_chat_template`, with three guarantees.

        * Text in messages that spells a control token (`<image>`, `<|endoftext|>`) stays text, with and without
          `tokenize` (`sanitize_control_tokens` is always on). A string rendered with `tokenize=False` carries an
          invisible private-use character inside such passages.
        * The token ids of a chat rendered with `add_generation_prompt=True` are an exact prefix of those of the same
          chat with its answer.
        * With `return_assistant_tokens_mask=True`, `assistant_masks` is 1 on the tokens of `{% generation %}` blocks
          and only there. The only special tokens are those that the template writes.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): messages, `content` a string or a list of parts; an
                image part holds a `PIL.Image.Image` under `image`, or a path or URL under `path` or `url`; an audio
                part, a path under `path` or samples under `audio`.
            transcriber (`Any`, *optional*): replaces audio parts by their transcripts; see [`transcribe_chat`].
            processor_kwargs (`dict`, *optional*): `padding`, `padding_side`, `truncation`, `max_length`,
                `pad_to_multiple_of`, `return_tensors`, `return_mm_token_type_ids` and the image processor's options.

        Returns:
            `str`, `list[str]`, or with `tokenize` and `return_dict` a `BatchFeature` of `input_ids`
            `(batch_size, sequence_length)`, `attention_mask`, what the image processor returns for the images in
            reading order (`pixel_values` `(num_images, channels, height, width)`; with tiles `(num_images,
            max_num_views, channels, height, width)` and `image_sizes` `(num_images, 2)`; absent without images), and
            `assistant_masks`.

        Raises:
            ValueError: if `truncation` would cut off image tokens, images and placeholders differ in number,
                `chat_template` is not Jinja (but the name of a template), or a recording has no transcriber.
        """
        template = self._find_template(chat_template)
        if "{" not in template:  # Jinja would render every chat as this same text
            raise ValueError(
                f"chat_template={template!r} is not a Jinja template. Give the template's text: "
                "`read_chat_template(name)` reads that of a shipped one."
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError(
                "`continue_final_message` and `add_generation_prompt` contradict each other: the first continues the "
                "last message, the second starts a new one. Give one of them."
            )
        call_kwargs = {**(processor_kwargs or {}), **{k: v for k, v in kwargs.items() if k in PROCESSOR_OPTIONS}}
        kwargs = {name: value for name, value in kwargs.items() if name not in PROCESSOR_OPTIONS}
        is_batched = isinstance(conversation[0], (list, tuple))
        conversations = [_normalise_chat(chat) for chat in (conversation if is_batched else [conversation])]
        conversations = [transcribe_chat(chat, transcriber) for chat in conversations]
        images = [image for chat in conversations for image in _images_of(chat)] if tokenize else []
        texts = self._render(
            conversations,
            template,
            mark=tokenize,  # at inference too, so that earlier answers are tokenised as in training
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if not tokenize:
            return texts if is_batched else texts[0]
        if return_tensors != "auto":
            call_kwargs["return_tensors"] = return_tensors
        if "images" in call_kwargs:
            images = [call_kwargs.pop("images")]
        inputs, masks = self._tokenize_chats(texts, self._flatten_images(images), call_kwargs)
        if not return_dict:
            return inputs["input_ids"]
        if return_assistant_tokens_mask:
            inputs["assistant_masks"] = masks
            inputs.convert_to_tensors(tensor_type=call_kwargs.get("return_tensors"))
        return inputs

    def encode_chats(
        self, conversations: list[list[dict]], add_generation_prompt: bool = False
    ) -> tuple[list[list[int]], list[list[int]]]:
        """
        Tokenise chats without opening their images (`{"type": "image"}` parts need hold none), with one image token
        for each image.

        Args:
            conversations (`list[list[dict]]`): a batch of chats.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): end where the next answer begins.

        Returns:
            `tuple[list[list[int]], list[list[int]]]`: token ids, and for each id 1 inside an answer and 0 elsewhere.
        """
        template = self._find_template(None)
        texts = self._render(conversations, template, mark=True, add_generation_prompt=add_generation_prompt)
        return self._encoder().encode(texts)

    def encode_chat(
        self,
        conversation: list[dict],
        add_generation_prompt: bool = True,
        image_sizes: Sequence[tuple[int, int] | None] | None = None,
    ) -> list[int]:
        """
        The token ids that `apply_chat_template` gives a chat, without opening its images.

        Args:
            conversation (`list[dict]`): one chat; `{"type": "image"}` parts need hold no image.
            add_generation_prompt (`bool`, *optional*, defaults to `True`): end where the next answer begins.
            image_sizes (`Sequence[tuple[int, int]]`, *optional*): (height, width) of each image in pixels, in reading
                order. Needed where the number of image tokens depends on the size.

        Returns:
            `list[int]`: its `input_ids`, as many image tokens an image as the model gives vectors.
        """
        ids = self.encode_chats([conversation], add_generation_prompt=add_generation_prompt)[0][0]
        sizes = iter([None] * ids.count(self.image_token_id) if image_sizes is None else image_sizes)
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (self.count_image_tokens(next(sizes)) if token == self.image_token_id else 1)
        return expanded

    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, (self.image_token,))

    def _render(
        self, conversations: list, template: str, *, mark: bool, tools: Any = None, documents: Any = None, **kwargs
    ) -> list[str]:
        """Chats as text, control tokens in messages broken; with `mark`, answers marked for the encoder."""
        encoder = self._encoder()
        rendered: Any = render_jinja_template(
            conversations=encoder.neutralise(conversations),
            tools=encoder.neutralise(tools),
            documents=encoder.neutralise(documents),
            chat_template=template,
            return_assistant_tokens_mask=mark and GENERATION_BLOCK.search(template) is not None,
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        texts, spans = rendered
        return [mark_answers(text, span) for text, span in zip(texts, spans, strict=True)] if spans else texts

    def _find_template(self, chat_template: str | None) -> str:
        """The text of the given template, which may be a name where the processor has several, or its own one."""
        own = self.chat_template
        templates = own if isinstance(own, dict) else {"default": own}
        template = templates.get("default" if chat_template is None else chat_template, chat_template)
        if template is None:
            raise ValueError(
                f"chat_template=None, and the processor has no default one (it has {own!r}). Give a template's text, "
                "or build the processor with `chat_template=`."
            )
        return template

    def validate_inputs(  # type: ignore[override]  # the other parameters are passed on
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """
        Raise `ValueError` unless there is an input, and a text has as many placeholders as there are images. (From
        transformers 5.22 on `ProcessorMixin` also counts.)
        """
        if text is not None:
            texts = [text] if isinstance(text, str) else text
            num_placeholders = sum(sample.count(self.image_token) for sample in texts)
            num_images = 0 if images is None else len(make_flat_list_of_images(images))
            if num_placeholders != num_images:
                raise ValueError(
                    f"The text has {num_placeholders} {self.image_token!r}, but the number of images passed is "
                    f"{num_images or 'zero: no images were passed'}. Pass one image for each, in reading order."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    @staticmethod
    def _flatten_images(images) -> list | None:
        """Images in reading order, from one image, a list, or a list of lists; `None` if there are none."""
        if images is None:
            return None
        nested = images if isinstance(images, (list, tuple)) else [images]
        flat = [image for item in nested for image in (item if isinstance(item, (list, tuple)) else [item])]
        return flat or None

    def _tokenize_chats(self, texts: list[str], images: list | None, kwargs: dict) -> tuple[BatchFeature, list]:
        """Marked texts and their images -> model inputs, and the mask of answer tokens (lists, padded alike)."""
        images = None if images is None else self.image_processor.fetch_images(images)
        self.validate_inputs(images=images, text=texts)
        text_kwargs, images_kwargs = _split_kwargs(kwargs)
        processed, replacements = {}, []
        if images is not None:
            processed = self.image_processor(images, **images_kwargs)
            processed["pixel_values"] = _as_floats(processed["pixel_values"])
            replacements = [self.replace_image_token(processed, index) for index in range(len(images))]
        texts, _ = self.get_text_with_replacements(texts, replacements)
        ids, masks = self._encoder().encode(texts)
        if text_kwargs.get("truncation") in TRUNCATES:
            max_length = text_kwargs.get("max_length") or self.tokenizer.model_max_length
            keep_end = self.tokenizer.truncation_side == "left"
            ids, masks = truncate_rows(ids, masks, max_length, self.image_token_id, keep_end)

        pad_names = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
        pad_kwargs = {"padding": False, **{k: text_kwargs[k] for k in pad_names if k in text_kwargs}}
        text_inputs = dict(self.tokenizer.pad({"input_ids": ids}, **pad_kwargs))
        left = (pad_kwargs.get("padding_side") or self.tokenizer.padding_side) == "left"
        for row, mask in enumerate(masks):
            padding = [0] * (len(text_inputs["input_ids"][row]) - len(mask))
            masks[row] = padding + mask if left else mask + padding
        if text_kwargs.get("return_mm_token_type_ids"):
            text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
        return BatchFeature({**text_inputs, **processed}, tensor_type=text_kwargs.get("return_tensors")), masks


def _split_kwargs(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of a processor -> those for the tokenizer, those for the image processor."""
    kwargs = dict(kwargs)
    text_kwargs, images_kwargs = dict(kwargs.pop("text_kwargs", {})), dict(kwargs.pop("images_kwargs", {}))
    for name, value in {**kwargs.pop("common_kwargs", {}), **kwargs}.items():
        if name in TEXT_OPTIONS:
            text_kwargs[name] = value
        if name not in TEXT_OPTIONS or name == "return_tensors":
            images_kwargs[name] = value
    return text_kwargs, images_kwargs


def _as_floats(pixels: Any) -> Any:
    """Pixels with bytes as floats, which the model takes: levels that are neither rescaled nor normalised."""
    if isinstance(pixels, (list, tuple)):
        return [_as_floats(of_image) for of_image in pixels]
    if str(getattr(pixels, "dtype", None)).removeprefix("torch.") != "uint8":
        return pixels
    return pixels.float() if isinstance(pixels, torch.Tensor) else pixels.astype("float32")


def _normalise_chat(chat: list[dict]) -> list[dict]:
    """A copy of a chat without keys whose value is None, OpenAI's `image_url` parts written as `image` parts."""

    def part(content: Any) -> Any:
        if not (isinstance(content, dict) and content.get("type") == "image_url" and "image_url" in content):
            return content
        image_url = content["image_url"]
        return {"type": "image", "url": image_url.get("url", "") if isinstance(image_url, dict) else image_url}

    messages = [{name: value for name, value in message.items() if value is not None} for message in chat]
    for message in messages:
        if isinstance(message.get("content"), list):
            message["content"] = [part(content) for content in message["content"]]
    return messages


def _images_of(chat: list[dict]) -> list:
    """The images that a chat's image parts hold, in reading order."""
    parts = [part for message in chat if isinstance(message.get("content"), list) for part in message["content"]]
    found = [
        [part[key] for key in IMAGE_KEYS if part.get(key) is not None][:1]
        for part in parts
        if isinstance(part, dict) and part.get("type") == "image"
    ]
    return [image for images in found for image in images]


# The published models that a processor can be made from
LLAVA_MODEL_TYPES = ("llava", "llava_next")

IDEFICS_IMAGE_TOKEN = "<image>"

FEATURE_SELECT_STRATEGIES = ("default", "full", "pooled")


class JnanaProcessor(JnanaImageCountMixin, JnanaChatMixin):
    """
    Turns chats about images into model inputs.

    Args:
        image_processor (`BaseImageProcessor`): the vision tower's image processor; its output size must be fixed. One
            with `image_grid_pinpoints` (LLaVA-1.6's) cuts images into tiles; the number of image tokens then depends
            on an image's size.
        tokenizer (`PreTrainedTokenizerBase`): the language model's tokenizer, holding `image_token`.
        patch_size (`int`, *optional*): side of the tower's patches in pixels; images need it unless the strategy is
            `pooled` or `tokens_per_view` is given.
        num_additional_image_tokens (`int`, *optional*, defaults to 0):
            vectors the tower puts before its patches: 1 for CLIP and DINOv2 (CLS), 0 for SigLIP.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `default` (patches alone), `full` (with the vectors before them) or `pooled` (one vector an image), as in
            the model's config.
        downsample_factor (`int`, *optional*, defaults to 1): side, in patches, of the squares that the projector joins
            to one token: the config's `projector_downsample_factor` for `pixel_shuffle` and `avg_pool`.
        tokens_per_view (`int`, *optional*): image tokens of a view where they do not depend on its patches.
        image_backend (`str`, *optional*): the library that resizes images, `pil` or `torchvision`: as the checkpoint
            was trained with, whose processor records it. Where it is not installed, the image processor stays as it
            is; its pixels differ by a level. By default that of `image_processor`, and nothing is recorded.
        chat_template (`str`, *optional*): the Jinja template.
        image_token (`str`, *optional*, defaults to `"<image>"`): the token that stands for one image vector.

    Raises:
        ValueError: if the strategy or `image_backend` is unknown, or the tokenizer lacks `image_token`.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        num_additional_image_tokens=0,
        vision_feature_select_strategy="default",
        chat_template=None,
        image_token="<image>",
        downsample_factor=1,
        tokens_per_view=None,
        image_backend=None,
    ):
        if vision_feature_select_strategy not in FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} must be one of "
                f"{', '.join(FEATURE_SELECT_STRATEGIES)}."
            )
        image_token_ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(image_token_ids) != 1:
            raise ValueError(
                f"image_token={image_token!r} is {len(image_token_ids)} tokens of the tokenizer, not one. Add it with "
                "`tokenizer.add_tokens([image_token], special_tokens=True)`, or build the processor by "
                "`JnanaProcessor.from_vision_text_pretrained`."
            )
        self.patch_size = patch_size
        self.num_additional_image_tokens = num_additional_image_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.downsample_factor = downsample_factor
        self.tokens_per_view = tokens_per_view
        self.image_token = image_token
        self.image_token_id = image_token_ids[0]
        self.recorded_image_backend = image_backend
        if image_backend is not None:
            image_processor = with_image_backend(image_processor, image_backend)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def image_backend(self) -> str:
        """`str`: the library that resizes images here, `pil` or `torchvision`."""
        return image_backend(self.image_processor)

    def set_image_backend(self, backend: str) -> None:
        """
        Resize with a library, as in [`with_image_backend`], and record the one that resizes from here on, because a
        model is trained on its pixels. Only then, and where it was given, a saved processor names it.

        Args:
            backend (`str`): `pil` or `torchvision`.
        """
        self.image_processor = with_image_backend(self.image_processor, backend)
        self.recorded_image_backend = self.image_backend

    def to_dict(self) -> dict[str, Any]:
        """
        As `ProcessorMixin.to_dict`, with the recorded `image_backend`: image processors of both libraries are saved
        alike. A processor that is loaded and saved where this library is not installed keeps the record.
        """
        record = {} if self.recorded_image_backend is None else {"image_backend": self.recorded_image_backend}
        return super().to_dict() | record

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """As in `ProcessorMixin`; a `backend` or `use_fast` that `from_pretrained` was given outweighs the record."""
        found = super().from_args_and_dict(args, processor_dict, **kwargs)
        if kwargs.get("backend") is not None or kwargs.get("use_fast") is not None:
            processor = found[0] if isinstance(found, tuple) else found
            processor.image_processor = args[0]  # as AutoImageProcessor loaded it with these
        return found

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | Path,
        text: str | Path,
        *,
        chat_template: str | None = None,
        vision_feature_select_strategy: str = "default",
        patch_size: int | None = None,
        num_additional_image_tokens: int | None = None,
        image_geometry: str | None = None,
        downsample_factor: int = 1,
        tokens_per_view: int | None = None,
        image_token: str = "<image>",
        **kwargs,
    ) -> "JnanaProcessor":
        """
        Build the processor of a pair of backbones.

        The image token, and a padding token if the tokenizer has none of its own, are added behind the tokenizer's
        entries: no existing id changes. (Padding with the closing token would teach a model never to stop.) Batches
        are padded on the left, as generation needs them; the collator pads training batches by itself.

        Args:
            vision (`str` or `Path`): Hub id or folder of the vision checkpoint, with its image processor.
            text (`str` or `Path`): Hub id or folder of the language model, with its tokenizer.
            chat_template (`str`, *optional*): name of a shipped template, or the path of a `.jinja` file. When not
                given, an instruct model keeps its own chat format (see [`adopt_chat_template`]), and a language model
                whose tokenizer has no chat template gets `jnana`.
            vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): as in `JnanaConfig`.
            patch_size (`int`, *optional*): read from the vision config when not given.
            num_additional_image_tokens (`int`, *optional*): known for the usual towers when not given.
            image_geometry (`str`, *optional*): how an image becomes square, as in [`set_image_geometry`]; by default
                as the image processor of the vision checkpoint does it.
            downsample_factor, tokens_per_view (`int`, *optional*): as in the constructor.
            image_token (`str`, *optional*, defaults to `"<image>"`): the image token.
            kwargs: passed to every `from_pretrained` (`revision`, `token`, `trust_remote_code`, ...).

        Raises:
            ValueError: if the tower's patch size or prefix is not known and not given, the tokenizer's own chat
                template cannot be trained with (see [`adopt_chat_template`]), or the tokenizer lacks the template's
                end token.
        """
        vision_config = AutoConfig.from_pretrained(vision, **kwargs)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        patch_size = getattr(vision_config, "patch_size", None) if patch_size is None else patch_size
        if num_additional_image_tokens is None:
            num_additional_image_tokens = count_prefix_tokens(vision_config)
        # given here, because a side set afterwards is not saved
        tokenizer = AutoTokenizer.from_pretrained(text, **{"padding_side": "left", **kwargs})
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {str(text)!r} has no `eos_token`, so answers would have no end. Give it one of its "
                f"tokens and save it: `AutoTokenizer.from_pretrained(path, eos_token=...).save_pretrained(path)`."
            )
        add_jnana_tokens(tokenizer, image_token)
        if chat_template is None and tokenizer.chat_template is not None:
            template = adopt_chat_template(tokenizer.chat_template, tokenizer, image_token)
        else:
            template = read_chat_template(chat_template or "jnana")
            check_answer_end(template, tokenizer, chat_template or "jnana", image_token)
        image_processor = AutoImageProcessor.from_pretrained(vision, **kwargs)
        return cls(
            set_image_geometry(image_processor, image_geometry) if image_geometry else image_processor,
            tokenizer,
            patch_size=patch_size,
            num_additional_image_tokens=num_additional_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=template,
            image_token=image_token,
            downsample_factor=downsample_factor,
            tokens_per_view=tokens_per_view,
        )

    @classmethod
    def from_llava_pretrained(
        cls, path: str | Path, *, chat_template: str | None = None, **kwargs
    ) -> "JnanaProcessor":
        """
        Build the processor of a published LLaVA-1.5 or LLaVA-1.6 checkpoint in the format of transformers, with its
        tokenizer and image processor. Image token counts and pixel values equal those of the checkpoint's processor.

        Args:
            path (`str` or `Path`): Hub id or directory.
            chat_template (`str`, *optional*): name of a shipped template, or the path of a `.jinja` file; by default
                the equivalent of the checkpoint's own template that marks answers (see [`adopt_chat_template`]).
            kwargs: passed to every `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: if the checkpoint is of another kind, its tokenizer has no image token, or its chat template
                cannot be trained with.
        """
        config = AutoConfig.from_pretrained(path, **kwargs)
        if config.model_type not in LLAVA_MODEL_TYPES:
            raise ValueError(
                f"{str(path)!r} has model_type {config.model_type!r}, not one of {', '.join(LLAVA_MODEL_TYPES)}."
            )
        stock: Any = AutoProcessor.from_pretrained(path, **kwargs)
        # the side is given here, because one set afterwards is not saved, and batches of a reloaded processor need it
        tokenizer = AutoTokenizer.from_pretrained(path, **{"padding_side": "left", **kwargs})
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        template = stock.chat_template
        if chat_template is not None:
            template = read_chat_template(chat_template)
            check_answer_end(template, tokenizer, chat_template, image_token)
        elif template is not None:
            template = adopt_chat_template(template, tokenizer, image_token)
        else:
            raise ValueError(
                f"{str(path)!r} has no chat template. Name the one that it was trained with by `chat_template`: "
                f"{', '.join(chat_template_names())}, or the path of a .jinja file."
            )
        return cls(
            stock.image_processor,
            tokenizer,
            patch_size=config.vision_config.patch_size,
            num_additional_image_tokens=count_prefix_tokens(config.vision_config),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            chat_template=template,
            image_token=image_token,
        )

    @classmethod
    def from_idefics_pretrained(
        cls, path: str | Path, *, chat_template: str | None = None, **kwargs
    ) -> "JnanaProcessor":
        """
        Build the processor of an IDEFICS checkpoint, whose images take one image token each. Pixel values equal those
        of the checkpoint's own image processor.

        Args:
            path (`str` or `Path`): Hub id or directory.
            chat_template (`str`, *optional*): name of a shipped template, or a path; by default `idefics_instruct` for
                a tokenizer with `<end_of_utterance>`, which the instruct versions were trained with, else `idefics`.
            kwargs: passed to every `from_pretrained` (`revision`, `token`, ...).

        Raises:
            ValueError: if the tokenizer has no image token, or lacks the end token of the chat template.
        """
        tokenizer = AutoTokenizer.from_pretrained(path, **{"padding_side": "left", **kwargs})
        if IDEFICS_IMAGE_TOKEN not in tokenizer.get_vocab():
            raise ValueError(f"The tokenizer in {str(path)!r} has no {IDEFICS_IMAGE_TOKEN!r}, as IDEFICS's have.")
        if chat_template is None:
            instruct = "<end_of_utterance>" in tokenizer.get_vocab()
            chat_template = "idefics_instruct" if instruct else "idefics"
        template = read_chat_template(chat_template)
        check_answer_end(template, tokenizer, chat_template, IDEFICS_IMAGE_TOKEN)
        if tokenizer.pad_token is None:  # as in the published tokenizers
            tokenizer.pad_token = tokenizer.unk_token
        stock = AutoImageProcessor.from_pretrained(path, **kwargs)
        # IDEFICS's own image processor returns a tensor and no `pixel_values`.
        image_processor = transformers.CLIPImageProcessor(  # an import at the top would warn without torchvision
            size=dict(stock.size),
            resample=stock.resample,
            do_center_crop=False,
            image_mean=list(stock.image_mean),
            image_std=list(stock.image_std),
        )
        return cls(
            image_processor,
            tokenizer,
            vision_feature_select_strategy="pooled",  # one token an image, whatever its patches
            tokens_per_view=1,
            chat_template=template,
            image_token=IDEFICS_IMAGE_TOKEN,
        )

    # ------------------------------------------------------------------ ProcessorMixin's hooks

    @property
    def unused_input_names(self) -> list[str]:
        """Names a tokenizer may return that the model does not take."""
        return ["token_type_ids"]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: as many image tokens as the model will give vectors."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]  # ([num_views,] 3, height, width)
        if self.image_grid_pinpoints is None:
            return self.image_token * self.num_image_tokens(height, width)
        image_height, image_width = (int(side) for side in image_inputs["image_sizes"][image_idx])
        size = {"height": height, "width": width}
        return self.image_token * self.count_image_tokens((image_height, image_width), crop_size=size)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """
        Placeholder tokens of images before they are processed (vLLM asks for them).

        Args:
            image_sizes (`list[list[int]]`, *optional*): (height, width) of each image in pixels.

        Returns:
            `MultiModalData`: `num_image_tokens` of each image, and `num_image_patches`, its rows of `pixel_values`:
            one, also with tiles, whose views lie in the second dimension.
        """
        if image_sizes is None:
            return MultiModalData()
        options = _split_kwargs(kwargs)[1]
        sizes = [tuple(size) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.count_image_tokens(size, **options) for size in sizes],
            num_image_patches=[1] * len(sizes),
        )

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ) -> BatchFeature:
        """
        As `LlavaProcessor`: `text` is prompt text, in which each image token stands for one image.

        Text rendered by `apply_chat_template(tokenize=False)` carries its neutralised passages with it and is taken
        here too. `pixel_values` are floats, also of an image processor that neither rescales nor normalises.

        Raises:
            ValueError: if `truncation` would cut off image tokens, or images and placeholders differ in number.
        """
        options: dict[str, Any] = dict(kwargs)
        texts: Any = [text] if isinstance(text, str) else text
        bos_token = self.tokenizer.bos_token
        if texts and bos_token is not None and all(sample.startswith(bos_token) for sample in texts):
            options.setdefault("add_special_tokens", False)  # the template wrote it: not twice
        truncation = options.get("truncation", options.get("text_kwargs", {}).get("truncation"))
        if texts is None or not (truncation in TRUNCATES or any(BREAK in sample for sample in texts)):
            inputs = super().__call__(images=images, text=text, **options)
            if "pixel_values" in inputs:
                inputs["pixel_values"] = _as_floats(inputs["pixel_values"])
            return inputs
        adds_bos = self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id]
        if options.pop("add_special_tokens", True) and adds_bos:
            texts = [bos_token + sample for sample in texts]
        return self._tokenize_chats(list(texts), self._flatten_images(images), options)[0]


def add_jnana_tokens(tokenizer: PreTrainedTokenizerBase, image_token: str = "<image>") -> None:
    """
    Add the image token, and `<|pad|>` if padding has no token of its own, behind the tokenizer's entries.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): changed in place.
        image_token (`str`, *optional*, defaults to `"<image>"`): the image token.
    """
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": AddedToken("<|pad|>", special=True, normalized=False)})


JnanaProcessor.register_for_auto_class()

__all__ = ["JnanaProcessor"]

"""From chats to model inputs: what of `JnanaProcessor` is about chats alone.

A chat is rendered by the template, tokenised piece by piece (see `chat_encoding_jnana.py`), and joined by its images.
This file is copied beside `processing_jnana.py` into every shared checkpoint.
"""

import re
from collections.abc import Callable
from typing import Any

from transformers import BatchFeature, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .chat_encoding_jnana import ChatEncoder, mark_answers, measure_sequence, transcribe_chat


GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class JnanaChatMixin(ProcessorMixin):
    """How [`JnanaProcessor`] reads chats."""

    image_token: str
    image_token_id: int
    num_image_tokens: Callable[..., int]
    image_height_and_width: Callable[..., tuple[int, int]]

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
        Render one chat or a batch of chats; as `ProcessorMixin.apply_chat_template`, with three promises.

        * Text in messages that spells a control token (`<image>`, `<|endoftext|>`) stays text, with and without
          `tokenize` (`sanitize_control_tokens` is always on). A string rendered with `tokenize=False` carries an
          invisible private-use character inside such passages.
        * The token ids of a chat rendered with `add_generation_prompt=True` are an exact prefix of those of the same
          chat with its answer.
        * With `return_assistant_tokens_mask=True`, `assistant_masks` is 1 on the tokens of `{% generation %}` blocks
          and only there. Special tokens are those the template writes; none are added.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): messages, `content` a string or a list of parts; an
                image part holds a `PIL.Image.Image` under `image`, or a path or URL under `path` or `url`; an audio
                part, a path under `path` or samples under `audio`.
            transcriber (`Any`, *optional*): puts words in the place of audio parts; see [`transcribe_chat`].
            processor_kwargs (`dict`, *optional*): `padding`, `padding_side`, `max_length` (with
                `padding="max_length"`), `pad_to_multiple_of`, `return_tensors`, `return_mm_token_type_ids` and the
                image processor's options.

        Returns:
            `str`, `list[str]`, or with `tokenize` and `return_dict` a `BatchFeature` of `input_ids`
            `(batch_size, sequence_length)`, `attention_mask`, `pixel_values` `(num_images, channels, height, width)`
            in reading order (absent without images), and `assistant_masks`.

        Raises:
            ValueError: if truncation is asked for (it could cut image tokens), images and placeholders differ in
                number, `chat_template` is not Jinja (a template's name), or a recording has no transcriber.
        """
        template = self._resolve_chat_template(chat_template)
        if "{" not in template:  # Jinja would answer with this very word, whatever the chat
            raise ValueError(
                f"chat_template={template!r} is not a Jinja template. Give the template's text: "
                "`read_chat_template(name)` reads that of a shipped one."
            )
        call_kwargs = self._prepare_processor_kwargs(
            template, dict(processor_kwargs or {}), kwargs, add_generation_prompt, bool(continue_final_message), False
        )
        conversations, is_batched = self._normalize_conversations(conversation)
        conversations = [transcribe_chat(chat, transcriber) for chat in conversations]
        images = self._multimodal_inputs_from_conversations(conversations, {})[0] if tokenize else []
        texts = self._render(
            conversations,
            template,
            mark=tokenize,  # at inference too, so that past answers have the tokens of training
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

    def measure_chats(self, conversations: list[list[dict]]) -> list[tuple[int, int | None, int]]:
        """
        Sizes of chats without opening their images (`{"type": "image"}` parts need hold none).

        Args:
            conversations (`list[list[dict]]`): a batch of chats.

        Returns:
            `list[tuple[int, int | None, int]]`: for each chat, as [`measure_sequence`].
        """
        return [
            measure_sequence(ids, mask, self.image_token_id, self.tokens_per_image)
            for ids, mask in zip(*self.encode_chats(conversations), strict=True)
        ]

    def encode_chats(
        self, conversations: list[list[dict]], expand: bool = False, add_generation_prompt: bool = False
    ) -> tuple[list[list[int]], list[list[int]]]:
        """
        Tokenise chats without opening their images (`{"type": "image"}` parts need hold none).

        Args:
            conversations (`list[list[dict]]`): a batch of chats.
            expand (`bool`, *optional*, defaults to `False`): give each image as many image tokens as
                [`~JnanaProcessor.apply_chat_template`] does, instead of one.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): end where the next answer begins.

        Returns:
            `tuple[list[list[int]], list[list[int]]]`: token ids, and for each id 1 inside an answer and 0 elsewhere.
        """
        template = self._resolve_chat_template(None)
        texts = self._render(conversations, template, mark=True, add_generation_prompt=add_generation_prompt)
        all_ids, masks = self._encoder().encode(texts)
        size = self.tokens_per_image if expand else 1
        if size > 1:
            places = [[size if token == self.image_token_id else 1 for token in ids] for ids in all_ids]
            all_ids = [_repeat(ids, times) for ids, times in zip(all_ids, places, strict=True)]
            masks = [_repeat(mask, times) for mask, times in zip(masks, places, strict=True)]
        return all_ids, masks

    def encode_chat(self, conversation: list[dict], add_generation_prompt: bool = True) -> list[int]:
        """
        The token ids that `apply_chat_template` gives a chat, without opening its images.

        Args:
            conversation (`list[dict]`): one chat; `{"type": "image"}` parts need hold no image.
            add_generation_prompt (`bool`, *optional*, defaults to `True`): end where the next answer begins.

        Returns:
            `list[int]`: its `input_ids`, as many image tokens an image as the model gives vectors.
        """
        return self.encode_chats([conversation], expand=True, add_generation_prompt=add_generation_prompt)[0][0]

    @property
    def tokens_per_image(self) -> int:
        """Image tokens that stand for one image (`int`)."""
        return self.num_image_tokens(*self.image_height_and_width())

    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.tokenizer, (self.image_token,))

    def _render(
        self, conversations: list, template: str, *, mark: bool, tools: Any = None, documents: Any = None, **kwargs
    ) -> list[str]:
        """Chats as text, control tokens in people's words broken; with `mark`, answers marked for the encoder."""
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
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        text_kwargs = merged["text_kwargs"]
        if text_kwargs.get("truncation"):
            raise ValueError("truncation=True could cut image tokens. Shorten the chat instead.")

        processed, replacements = {}, []
        if images is not None:
            processed, replacements = self._process_images(images, **merged["images_kwargs"])
        texts, _ = self.get_text_with_replacements(texts, replacements)
        ids, masks = self._encoder().encode(texts)
        self._check_special_mm_tokens(texts, BatchFeature({"input_ids": ids}), modalities=["image"])

        pad_names = ("padding", "max_length", "pad_to_multiple_of", "padding_side", "return_attention_mask")
        pad_kwargs = {"padding": False, **{k: text_kwargs[k] for k in pad_names if k in text_kwargs}}
        text_inputs = dict(self.tokenizer.pad({"input_ids": ids}, **pad_kwargs))
        left = (pad_kwargs.get("padding_side") or self.tokenizer.padding_side) == "left"
        for row, mask in enumerate(masks):
            padding = [0] * (len(text_inputs["input_ids"][row]) - len(mask))
            masks[row] = padding + mask if left else mask + padding
        if text_kwargs.get("return_mm_token_type_ids", merged.get("return_mm_token_type_ids")):
            text_inputs["mm_token_type_ids"] = self.create_mm_token_type_ids(text_inputs["input_ids"])
        return BatchFeature({**text_inputs, **processed}, tensor_type=text_kwargs.get("return_tensors")), masks


def _repeat(values: list[int], times: list[int]) -> list[int]:
    return [value for value, count in zip(values, times, strict=True) for _ in range(count)]

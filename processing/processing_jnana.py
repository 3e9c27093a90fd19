"""JnanaProcessor: image processor, tokenizer and chat template in one object, saved and shared with the model.

It turns chats about images into model inputs. Built on `ProcessorMixin`'s own hooks, so a raw
`processor(images=..., text=...)` behaves as LLaVA's does; `apply_chat_template` tokenises by itself, because what
people wrote must never become a control token and an answer's first token must never merge with the prompt's last (see
`chat_encoding_jnana.py`). Here are the images, their placeholders and how a pair of backbones gets its processor;
`chat_inputs_jnana.py` has the chats.

These files are copied into every shared checkpoint and loaded there without this package: they import transformers and
one another, nothing else.
"""

from pathlib import Path

from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.processing_utils import MultiModalData

from .chat_encoding_jnana import BREAK
from .chat_inputs_jnana import JnanaChatMixin


FEATURE_SELECT_STRATEGIES = ("default", "full", "pooled")

# Vectors a tower puts before its patches, registers not counted: the same table as the model's config has, which this
# file must not import (a test keeps the two equal)
TOWER_CLS_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "siglip_vision_model": 0,
    "vit": 1,
}


def chat_template_names() -> list[str]:
    """The names of the chat templates shipped with this package, one a system (`list[str]`)."""
    return sorted(path.stem for path in (Path(__file__).parent / "chat_templates").glob("*.jinja"))


def read_chat_template(chat_template: str) -> str:
    """
    The text of a chat template.

    Args:
        chat_template (`str`): the name of a shipped template (`jnana`, `llava_chess`, ...) or the path of a `.jinja`
            file.

    Raises:
        ValueError: if it is neither.
    """
    shipped = Path(__file__).parent / "chat_templates" / f"{chat_template}.jinja"
    for path in (shipped, Path(chat_template)):
        if path.suffix == ".jinja" and path.is_file():
            return path.read_text(encoding="utf-8")
    raise ValueError(
        f"chat_template={chat_template!r} is neither a shipped template ({', '.join(chat_template_names())}) nor the "
        "path of a .jinja file."
    )


class JnanaProcessor(JnanaChatMixin):
    """
    Turns chats about images into model inputs.

    Args:
        image_processor (`BaseImageProcessor`): the vision tower's image processor; its output size must be fixed.
        tokenizer (`PreTrainedTokenizerBase`): the language model's tokenizer, holding `image_token`.
        patch_size (`int`, *optional*): side of the tower's patches in pixels; needed unless the strategy is `pooled`.
        num_additional_image_tokens (`int`, *optional*, defaults to 0):
            vectors the tower puts before its patches: 1 for CLIP and DINOv2 (CLS), 0 for SigLIP.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `default` (patches alone), `full` (with the vectors before them) or `pooled` (one vector an image), as in
            the model's config.
        chat_template (`str`, *optional*): the Jinja template.
        image_token (`str`, *optional*, defaults to `"<image>"`): the token that stands for one image vector.

    Raises:
        ValueError: if the strategy is unknown, the patch size is missing, or the tokenizer lacks `image_token`.
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
    ):
        if vision_feature_select_strategy not in FEATURE_SELECT_STRATEGIES:
            raise ValueError(
                f"vision_feature_select_strategy={vision_feature_select_strategy!r} must be one of "
                f"{', '.join(FEATURE_SELECT_STRATEGIES)}."
            )
        if patch_size is None and vision_feature_select_strategy != "pooled":
            raise ValueError("patch_size=None: give the vision tower's patch size, or use the strategy 'pooled'.")
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
        self.image_token = image_token
        self.image_token_id = image_token_ids[0]
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | Path,
        text: str | Path,
        *,
        chat_template: str = "jnana",
        vision_feature_select_strategy: str = "default",
        patch_size: int | None = None,
        num_additional_image_tokens: int | None = None,
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
            chat_template (`str`, *optional*, defaults to `"jnana"`): name of a shipped template, or a path.
            vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`): as in `JnanaConfig`.
            patch_size (`int`, *optional*): read from the vision config when not given.
            num_additional_image_tokens (`int`, *optional*): known for the usual towers when not given.
            image_token (`str`, *optional*, defaults to `"<image>"`): the image token.
            kwargs: passed to every `from_pretrained` (`revision`, `token`, `trust_remote_code`, ...).

        Raises:
            ValueError: if the tower's patch size or prefix is not known and not given.
        """
        vision_config = AutoConfig.from_pretrained(vision, **kwargs)
        vision_config = getattr(vision_config, "vision_config", vision_config)
        patch_size = getattr(vision_config, "patch_size", None) if patch_size is None else patch_size
        if num_additional_image_tokens is None:
            num_additional_image_tokens = _prefix_tokens(vision_config)
        # given here, because a side set afterwards is not saved
        tokenizer = AutoTokenizer.from_pretrained(text, **{"padding_side": "left", **kwargs})
        add_jnana_tokens(tokenizer, image_token)
        return cls(
            AutoImageProcessor.from_pretrained(vision, **kwargs),
            tokenizer,
            patch_size=patch_size,
            num_additional_image_tokens=num_additional_image_tokens,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=read_chat_template(chat_template),
            image_token=image_token,
        )

    # ------------------------------------------------------------------ ProcessorMixin's hooks

    @property
    def unused_input_names(self) -> list[str]:
        """Names a tokenizer may return that the model does not take."""
        return ["token_type_ids"]

    def num_image_tokens(self, height: int, width: int) -> int:
        """Placeholder tokens of an image that enters the tower with `height` x `width` pixels."""
        if self.vision_feature_select_strategy == "pooled":
            return 1
        patches = (height // self.patch_size) * (width // self.patch_size)
        return patches + (self.num_additional_image_tokens if self.vision_feature_select_strategy == "full" else 0)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: as many image tokens as the model will give vectors."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]  # (3, height, width)
        return self.image_token * self.num_image_tokens(height, width)

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs) -> MultiModalData:
        """
        Placeholder tokens of images before they are processed (vLLM asks for them).

        Args:
            image_sizes (`list[list[int]]`, *optional*): (height, width) of each image; all are resized to one size.
        """
        if image_sizes is None:
            return MultiModalData()
        num_tokens = self.num_image_tokens(
            *self.image_height_and_width(**self._merge_kwargs(**kwargs)["images_kwargs"])
        )
        return MultiModalData(
            num_image_tokens=[num_tokens] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """
        As `LlavaProcessor`: `text` is prompt text, in which each image token stands for one image.

        Text rendered by `apply_chat_template(tokenize=False)` carries its neutralised passages with it and is taken
        here too.
        """
        texts = [text] if isinstance(text, str) else text
        bos_token = self.tokenizer.bos_token
        if texts and bos_token is not None and all(sample.startswith(bos_token) for sample in texts):
            kwargs.setdefault("add_special_tokens", False)  # the template wrote it: not twice
        if texts is None or not any(BREAK in sample for sample in texts):
            return super().__call__(images=images, text=text, **kwargs)
        if kwargs.pop("add_special_tokens", True) and self.tokenizer("")["input_ids"] == [self.tokenizer.bos_token_id]:
            texts = [bos_token + sample for sample in texts]
        return self._tokenize_chats(list(texts), self._flatten_images(images), kwargs)[0]

    def image_height_and_width(
        self, crop_size: dict | None = None, size: dict | None = None, **kwargs
    ) -> tuple[int, int]:
        """
        The size that the image processor gives every image.

        Args:
            crop_size, size (`dict`, *optional*): instead of the image processor's own.

        Raises:
            ValueError: if its images differ in size.
        """
        crops = getattr(self.image_processor, "do_center_crop", False)
        target = crop_size or size or (self.image_processor.crop_size if crops else self.image_processor.size)
        if "height" not in target or "width" not in target:
            raise ValueError(
                f"image_processor.size={dict(target)} gives images of different sizes. Use an image processor that "
                "crops or resizes to a fixed height and width."
            )
        return target["height"], target["width"]


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


def _prefix_tokens(vision_config: PreTrainedConfig) -> int:
    if vision_config.model_type not in TOWER_CLS_TOKENS:
        raise ValueError(
            f"vision tower of model_type={vision_config.model_type!r}: how many vectors it puts before its patches is "
            f"not known here. Give num_additional_image_tokens (1 for a CLS vector), or choose one of "
            f"{', '.join(TOWER_CLS_TOKENS)}."
        )
    return TOWER_CLS_TOKENS[vision_config.model_type] + getattr(vision_config, "num_register_tokens", 0)


JnanaProcessor.register_for_auto_class()

__all__ = ["JnanaProcessor"]

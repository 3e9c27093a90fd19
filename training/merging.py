"""From base and adapter to one ordinary checkpoint, and how far its answers are from the adapter's.

An adapter trained on a 4-bit base was trained to correct *that* base, rounding included. There are two to merge into:

- `dequantized`: the 4-bit weights written out in 16 or 32 bits. The merged model computes what was trained, up to the
  rounding of the dtype it is saved in.
- `full`: the original weights. They are closer to the language model as published, but not what the adapter was
  trained on, so answers change, by as much as 4 bits lose.

Which one it was is written into the merged folder's config and card, with the difference measured on two questions.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers.utils import cached_file

from jnana.modeling import JnanaForConditionalGeneration, load_base
from jnana.processing import JnanaProcessor

from .adapters import adapter_reference, is_adapter
from .loading import load_config, load_model


logger = logging.getLogger(__name__)

QUESTION = "What do you see in this picture?"


@dataclass
class MergeReport:
    """What was merged, and how it compares.

    Args:
        base (`str`): `full`, or `dequantized nf4` / `dequantized int8`.
        trained_on (`str`): How the base was held in training: `full`, `nf4` or `int8`.
        dtype (`str`): Of the merged weights.
        max_logit_difference (`float`): Largest difference between the logits before and after, over all positions of a
            question with a picture and one without.
        adapter_logit_change (`float`): Largest change that the adapter itself makes to the base's logits; what the
            difference is to be compared with.
        same_predictions (`float`): Share of the positions at which the likeliest token is the same.
    """

    base: str
    trained_on: str
    dtype: str
    max_logit_difference: float
    adapter_logit_change: float
    same_predictions: float

    def __str__(self) -> str:
        return (
            f"merged into the {self.base} base in {self.dtype} (the adapter was trained on a {self.trained_on} base): "
            f"logits before and after differ by at most {self.max_logit_difference:.2g}, where the adapter itself "
            f"changes them by up to {self.adapter_logit_change:.2g}; the likeliest token is the same at "
            f"{self.same_predictions:.1%} of positions"
        )


def merge_adapter(
    path: str,
    folder: str | Path,
    merge_base: Literal["dequantized", "full"] = "dequantized",
    dtype: str | None = None,
    device: str | torch.device | None = None,
) -> MergeReport:
    """Merge an adapter folder and write an ordinary full checkpoint: safetensors, code, processor, card.

    Args:
        path (`str`): Adapter folder or Hub id, as run_sft writes it.
        folder (`str` or `Path`): Where to.
        merge_base (`str`, defaults to `"dequantized"`): Which base, if the adapter was trained on a quantised one.
        dtype (`str`, *optional*): Of the merged weights; default: the one the adapter was trained with.
        device (`str` or `torch.device`, *optional*): Where to compute; default: where the base would be quantised for
            training, so that its bits are the same.

    Returns:
        [`MergeReport`]: Also logged, and written into `folder`'s config and card.

    Raises:
        ValueError: if `path` is no adapter of run_sft.
    """
    if not is_adapter(path):
        raise ValueError(f"model_name_or_path {path!r} is not an adapter; give a folder of run_sft with lora_r > 0")
    reference = adapter_reference(path)
    method, dtype = reference["quantization"]["quantization"], dtype or reference["dtype"] or "float32"
    placed: dict[str, Any] = {"device_map": {"": device or (torch.accelerator.current_accelerator() or "cpu")}}
    adapted, processor = load_model(path, **placed)
    before = probe_logits(adapted, processor)
    with adapted.disable_adapter():
        change = max_difference(before, probe_logits(adapted, processor))
    if method != "none":
        generation_config = adapted.get_base_model().generation_config  # with the ids that end an answer
        del adapted
        base = merging_base(path, reference, merge_base, dtype, placed)
        base.generation_config = generation_config
        adapted = PeftModel.from_pretrained(base, path)
    merged = adapted.merge_and_unload().to(getattr(torch, dtype))
    after = probe_logits(merged, processor)
    same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in zip(before, after, strict=True)])
    report = MergeReport(
        base="full" if method == "none" or merge_base == "full" else f"dequantized {method}",
        trained_on="full" if method == "none" else method,
        dtype=dtype,
        max_logit_difference=max_difference(before, after),
        adapter_logit_change=change,
        same_predictions=same.float().mean().item(),
    )
    logger.info(str(report))
    merged.config.adapter_merge = asdict(report)
    merged.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_merge_card(path, folder, report)
    return report


def merging_base(
    path: str, reference: dict[str, Any], merge_base: str, dtype: str, placed: dict[str, Any]
) -> JnanaForConditionalGeneration:
    """The base of a quantised adapter in plain weights: the originals, or what 4 or 8 bits kept of them."""
    config = load_config(path)
    if merge_base == "full":
        return load_base(
            JnanaForConditionalGeneration, reference, config, dtype=dtype, quantization_config=None, **placed
        )
    base = load_base(JnanaForConditionalGeneration, reference, config, **placed)
    # bitsandbytes writes the weights out in the dtype they were quantised from; float32 then holds them exactly
    return base.dequantize(dtype=getattr(torch, dtype)).to(getattr(torch, dtype))


@torch.inference_mode()
def probe_logits(model: nn.Module, processor: JnanaProcessor) -> list[torch.Tensor]:
    """Logits `(1, sequence_length, vocab_size)` in float32 for a question about a picture and for one without."""
    picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    text = {"type": "text", "text": QUESTION}
    logits = []
    for content in ([{"type": "image", "image": picture}, text], [text]):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        logits.append(model.eval()(**inputs.to(model.device, dtype=model.dtype)).logits.float().cpu())
    return logits


def max_difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def write_merge_card(path: str, folder: str | Path, report: MergeReport) -> None:
    """The adapter's card, with what was merged said at its end."""
    file = cached_file(path, "README.md", _raise_exceptions_for_missing_entries=False)
    card = ModelCard("---\n---\n# A merged adapter\n") if file is None else ModelCard.load(file)
    tags = sorted({*(card.data.tags or []), "jnana"} - {"lora"})
    data = ModelCardData(**{**card.data.to_dict(), "library_name": "transformers", "tags": tags})
    text = card.text.replace("![training and validation loss over the steps](loss_curve.png)\n\n", "").strip()
    text = f"{text}\n\n## Merged\n\nThe adapter was {report}.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(Path(folder) / "README.md")

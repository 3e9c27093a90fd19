"""Merges an adapter into its base, to one ordinary checkpoint, and measures how far the logits change.

An adapter trained on a 4-bit base corrects *that* base, rounding included. It can be merged into either of two bases:

- `dequantized`: the 4-bit weights written out in 16 or 32 bits. The merged model computes what was trained, up to the
  rounding of the dtype it is saved in.
- `full`: the original weights. They are closer to the published language model, but the adapter was not trained on
  them, so answers change by the rounding to 4 bits.

The merged folder's config and card name the base, with the difference measured on two questions.
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

from jnana.modeling import JnanaForConditionalGeneration, available_device, load_base
from jnana.processing import JnanaProcessor

from .adapters import adapter_reference, is_adapter
from .cards import remove_evaluation_results, set_name_in_usage
from .loading import load_config, load_model


logger = logging.getLogger(__name__)

QUESTION = "What do you see in this picture?"


@dataclass
class MergeReport:
    """The base that an adapter was merged into, and the differences that were measured.

    Args:
        base (`str`): `full`, or `dequantized nf4` / `dequantized int8`.
        trained_on (`str`): How the base was held in training: `full`, `nf4` or `int8`.
        dtype (`str`): Dtype of the merged weights.
        max_logit_difference (`float`): Largest difference between the logits before and after, over all positions of a
            question with an image and one without.
        adapter_logit_change (`float`): Largest change of the base's logits by the adapter, for comparison.
        same_predictions (`float`): Share of the positions at which the most likely token is the same.
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
            f"changes them by up to {self.adapter_logit_change:.2g}; the most likely token is the same at "
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
        folder (`str` or `Path`): Of the merged checkpoint.
        merge_base (`str`, defaults to `"dequantized"`): Which base, if the adapter was trained on a quantised one.
        dtype (`str`, *optional*): Dtype of the merged weights; default: the one the adapter was trained with.
        device (`str` or `torch.device`, *optional*): Where to compute; default: [`available_device`], as in training,
            so that the base is quantised to the same bits.

    Returns:
        [`MergeReport`]: It is also logged, and written into `folder`'s config and card.

    Raises:
        ValueError: if `path` is not an adapter of run_sft.
    """
    if not is_adapter(path):
        raise ValueError(f"model_name_or_path {path!r} is not an adapter; give a directory of run_sft with lora_r > 0")
    reference = adapter_reference(path)
    method, dtype = reference["quantization"]["quantization"], dtype or reference["dtype"] or "float32"
    placed: dict[str, Any] = {"device_map": {"": device or available_device()}}
    adapted, processor = load_model(path, **placed)
    before = probe_logits(adapted, processor)
    with adapted.disable_adapter():
        change = max_difference(before, probe_logits(adapted, processor))
    if method != "none":
        generation_config = adapted.get_base_model().generation_config
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
    """The base of a quantised adapter in 16 or 32 bits: the original weights, or the quantised ones written out."""
    config = load_config(path)
    if merge_base == "full":
        return load_base(
            JnanaForConditionalGeneration, reference, config, dtype=dtype, quantization_config=None, **placed
        )
    base = load_base(JnanaForConditionalGeneration, reference, config, **placed)
    # bitsandbytes writes the weights out in the dtype they were quantised from, and float32 holds those exactly
    return base.dequantize(dtype=getattr(torch, dtype)).to(getattr(torch, dtype))


@torch.inference_mode()
def probe_logits(model: nn.Module, processor: JnanaProcessor) -> list[torch.Tensor]:
    """Logits `(1, sequence_length, vocab_size)` in float32 for a question about an image and for one without."""
    image = Image.radial_gradient("L").resize((64, 64)).convert("RGB")
    text = {"type": "text", "text": QUESTION}
    logits = []
    for content in ([{"type": "image", "image": image}, text], [text]):
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        logits.append(model.eval()(**inputs.to(model.device, dtype=model.dtype)).logits.float().cpu())
    return logits


def max_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """The largest absolute difference between two lists of tensors of the same shapes."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def write_merge_card(path: str, folder: str | Path, report: MergeReport) -> None:
    """Write the adapter's card with a section about the merge at its end."""
    file = cached_file(path, "README.md", _raise_exceptions_for_missing_entries=False)
    card = ModelCard("---\n---\n# A merged adapter\n") if file is None else ModelCard.load(file)
    remove_evaluation_results(card)  # they were measured with the adapter on its base, perhaps in another precision
    tags = sorted({*(card.data.tags or []), "jnana"} - {"lora"})
    data = ModelCardData(**{**card.data.to_dict(), "library_name": "transformers", "tags": tags})
    text = card.text.replace("![training and validation loss over the steps](loss_curve.png)\n\n", "").strip()
    text = f"{text}\n\n## Merged\n\nThe adapter was {report}.\n"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(Path(folder) / "README.md")
    set_name_in_usage(Path(folder) / "README.md", Path(folder).resolve().name)

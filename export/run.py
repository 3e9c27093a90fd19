"""One export from end to end: load, ask, write beside the target, load that, ask it, compare, and only then keep."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from jnana.modeling import available_device
from jnana.processing import JnanaProcessor
from jnana.training.adapters import is_adapter
from jnana.training.loading import load_config, load_model
from jnana.training.merging import merge_adapter

from .comparison import Agreement, answering, ask, compare, encode, probe_chats
from .distillation import Distillation, distil_projector
from .llama_cpp import (
    answering_by_halves,
    check_features,
    check_fits_llama_cpp,
    is_exact,
    write_text_folder,
)
from .llava import build_stock, check_fits_llava, check_head, load_stock, stock_processor
from .mmproj import MmprojEncoder, write_mmproj
from .onnx_graphs import (
    answering_by_graphs,
    check_fits_onnx,
    check_generation,
    load_sessions,
    require_onnx,
    write_onnx_folder,
)
from .refusals import refuse


logger = logging.getLogger(__name__)

MMPROJ, TEXT = "mmproj.gguf", "text"


@dataclass
class ExportOptions:
    """What to write, and how to compare.

    Args:
        to (`str`): `llava`, `gguf` or `onnx`.
        dtype (`str`, *optional*): Dtype of the weights; default: the checkpoint's for `llava`, float32 for the others.
            `mmproj.gguf` and the graphs of `onnx` are in float32 always.
        double_linear (`bool`): Write a `linear` projector with the activation `gelu`, for programs that do not know
            `linear`.
        distill (`bool`): Fit an `mlp` projector to a `resblock` one.
        distill_steps (`int`): Steps of AdamW.
        max_new_tokens (`int`): Longest compared answer, in tokens.
    """

    to: Literal["llava", "gguf", "onnx"]
    dtype: str | None = None
    double_linear: bool = False
    distill: bool = False
    distill_steps: int = 2000
    max_new_tokens: int = 32


def export_model(
    path: str,
    output_dir: str | Path,
    options: ExportOptions,
    chats: Iterable[list[dict[str, Any]]] | None = None,
    images: Iterable[Image.Image] = (),
) -> Agreement:
    """
    Export a model; the directory appears only if the exported files answer as the model does.

    Args:
        path (`str`): Directory or Hub id of any model that this package loads; an adapter is merged first.
        output_dir (`str` or `Path`): Must not exist, or be empty.
        options ([`ExportOptions`]): What to write.
        chats (`Iterable`, *optional*): Questions to compare by, with images; gone through twice. Default:
            [`probe_chats`].
        images (`Iterable[PIL.Image.Image]`): Training images, for `distill`.

    Returns:
        [`Agreement`]: It is also logged, and written into the card.

    Raises:
        ValueError: If the format has no place for the model; with the reason and the nearest way.
        ExportFailedError: If the answers differ.
    """
    target = Path(output_dir).resolve()  # of a link the directory that it leads to
    if target == Path.cwd():
        raise ValueError(f"output_dir {str(output_dir)!r} is the current directory; give a new one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"output_dir {str(target)!r} is not empty; give a new directory")
    config = load_config(path)
    if options.to == "llava":
        check_fits_llava(config, options.double_linear, options.distill)
    elif options.to == "gguf":
        require_gguf()
        check_fits_llama_cpp(config, options.distill)
    else:
        require_onnx()
        check_fits_onnx(config, options.distill, options.dtype, options.double_linear)
    chats = probe_chats() if chats is None else chats
    target.parent.mkdir(parents=True, exist_ok=True)
    dtype = options.dtype or (None if options.to == "llava" else "float32")
    # beside the target, so that the last step is a renaming
    scratch_folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    with scratch_folder as scratch, full_precision():
        model, processor = load_whole(path, Path(scratch) / "merged", dtype)
        if options.to == "llava":
            check_head(model)
        elif options.to == "onnx":
            check_generation(model.generation_config)
            model.float()
        else:  # weights rounded to 16 bits are compared in the 32 bits that mmproj.gguf has
            model.float()
        before = ask(answering(model, processor, processor, options.max_new_tokens), chats)
        distillation = None
        if options.distill:
            act = "gelu_pytorch_tanh" if options.to == "gguf" else None
            distillation = distil_projector(model, processor, images, options.distill_steps, act)
        written = Path(scratch) / target.name
        write = {"llava": write_llava, "gguf": write_gguf, "onnx": write_onnx}[options.to]
        after, exact = write(written, model, processor, options, chats, path)
        agreement = compare(before, after)
        logger.info(str(agreement))
        agreement.check(distilled=options.distill or not exact)
        write_card(written, path, options, agreement, distillation)
        if target.exists():
            target.rmdir()
        os.replace(written, target)
    return agreement


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Convolutions in float32 on GPUs, whose default (TF32) rounds more than the comparison allows."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def require_gguf() -> None:
    """Raise `ImportError` where the package that writes GGUF files is missing."""
    if find_spec("gguf") is None:
        raise ImportError("--to gguf needs the package gguf, which is not installed: `pip install 'jnana[gguf]'`")


def load_whole(path: str, scratch: Path, dtype: str | None) -> tuple[Any, JnanaProcessor]:
    """A model in 16 or 32 bits on the device, with its adapter merged."""
    if is_adapter(path):
        merge_adapter(path, scratch, dtype=dtype)
        path = str(scratch)
    model, processor = load_model(path, dtype=dtype, device_map={"": available_device()})
    if getattr(model, "is_quantized", False):
        refuse("its language model is stored in 4 or 8 bits", "give the checkpoint in 16 bits, or the adapter")
    return model.eval(), processor


def write_llava(
    folder: Path, model: Any, processor: JnanaProcessor, options: ExportOptions, chats: Iterable, source: str
) -> tuple[Any, bool]:
    """Write a stock folder, and ask it: (its answers, whether they must be equal)."""
    device, config = model.device, model.config
    stock_processor(config, processor).save_pretrained(folder)
    build_stock(model, processor, options.double_linear).save_pretrained(folder)
    stock, stocks_processor = load_stock(folder, device)
    return ask(answering(stock, stocks_processor, processor, options.max_new_tokens), chats), True


def write_gguf(
    folder: Path, model: Any, processor: JnanaProcessor, options: ExportOptions, chats: Iterable, source: str
) -> tuple[Any, bool]:
    """Write `mmproj.gguf` and `text/`, compare the features, and ask both halves."""
    folder.mkdir()
    config, device = model.config, model.device
    write_mmproj(folder / MMPROJ, model, processor, Path(source).resolve().name)
    encoder = MmprojEncoder(folder / MMPROJ, config)
    check_features(encoder, projected_features(model, processor), config)
    explain_pixels(processor)
    write_text_folder(folder / TEXT, model, processor, source, getattr(torch, options.dtype or "float32"))
    text = AutoModelForCausalLM.from_pretrained(folder / TEXT, dtype="float32", use_safetensors=True).to(device).eval()
    return ask(answering_by_halves(text, encoder, processor, options.max_new_tokens), chats), is_exact(config)


def write_onnx(
    folder: Path, model: Any, processor: JnanaProcessor, options: ExportOptions, chats: Iterable, source: str
) -> tuple[Any, bool]:
    """Write the three graphs with their configs, and ask them through onnxruntime."""
    write_onnx_folder(folder, model, processor)
    answer = answering_by_graphs(load_sessions(folder), folder, processor, options.max_new_tokens)
    return ask(answer, chats), True


@torch.inference_mode()
def projected_features(model: Any, processor: JnanaProcessor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pixel values and projected features of the built-in images."""
    pixels = [encode(processor, chat).get("pixel_values") for chat in probe_chats()]
    return [
        (
            values,
            model.model.get_image_features(values.to(model.device, model.dtype), return_dict=True).pooler_output[0],
        )
        for values in pixels
        if values is not None
    ]


def explain_pixels(processor: JnanaProcessor) -> None:
    """Say where llama.cpp's preparation of images differs from the one that the model was trained with."""
    image_processor = processor.image_processor
    pads = getattr(image_processor, "do_pad", False)
    colour = [int(255 * value) for value in image_processor.image_mean]
    if not pads:
        what = "this model was trained on images that are cropped or squashed to a square"
    elif colour != [122, 116, 104]:
        what = f"this model was trained on images padded in {tuple(colour)}"
    else:
        return
    logger.warning(
        f"llama.cpp pads images to a square in the colour (122, 116, 104), and {what}: the answers agree for square "
        "images only. Train with image_geometry: pad, or give it square images"
    )


def write_card(
    folder: Path, source: str, options: ExportOptions, agreement: Agreement, distillation: Distillation | None
) -> None:
    """A README.md that says what the directory is and what was measured."""
    name = Path(source).resolve().name
    lines = [
        f"# {name}, exported",
        "",
        f"Written by `run_export.py --to {options.to}`. Before and after: {agreement}.",
    ]
    if distillation is not None:
        changed = 1 - agreement.same_answers / agreement.answers
        lines += ["", f"{distillation}. {changed:.1%} of the answers changed."]
    if options.to == "gguf":
        lines += ["", "```", f"python convert_hf_to_gguf.py {TEXT} --outfile text.gguf"]
        lines += [f"llama-server -m text.gguf --mmproj {MMPROJ} --jinja", "```"]
    library = "transformers.js" if options.to == "onnx" else "transformers"
    header = ["---", f"library_name: {library}", "pipeline_tag: image-text-to-text", "---"]
    (folder / "README.md").write_text("\n".join([*header, "", *lines, ""]), encoding="utf-8")

"""Trains the demo's vision tower: a small stock `CLIPModel`, contrastively, on images and captions.

    python examples/chess_demo/train_clip.py --data_dir outputs/chess_demo/data --output_dir outputs/chess_demo/clip

The first phase trains on images of one piece at 36 pixels (9 patches, so a step is fast). The position embeddings are
then interpolated to 72 pixels, and the second phase trains on images of one to three pieces. Each image is compared
with the captions of the batch and with captions that have one wrong piece, as in NegCLIP (Yuksekgonul et al. 2023),
because random captions seldom differ so little. The result is a stock checkpoint: model, image processor, tokenizer.
"""

import argparse
import json
import logging
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scenes import PIECES, phrase
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast
from vocabulary import END, PAD, START, caption_vocabulary

from jnana.training.optimizers import MuonWithAdamW


logger = logging.getLogger(__name__)

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
PATCH_SIZE, START_SIZE, FULL_SIZE = 12, 36, 72


def build_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=caption_vocabulary(),
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=32,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
    }
    vision = {**sizes, "num_hidden_layers": 4, "image_size": START_SIZE, "patch_size": PATCH_SIZE}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "vocab_size": len(tokenizer)}
    text = {**sizes, **ids, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=128))


def interpolate_positions(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, image_size: int) -> CLIPModel:
    """A model for larger images with the same weights; the patches' position embeddings are interpolated (bicubic)."""
    config = CLIPConfig.from_dict(model.config.to_dict())
    config.vision_config.image_size = image_size
    larger = CLIPModel(config)
    state = model.state_dict()
    name = "vision_model.embeddings.position_embedding.weight"
    patches = state[name][1:]  # the first embedding is of CLS
    old, new = round(len(patches) ** 0.5), image_size // PATCH_SIZE
    grid = patches.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    state[name] = torch.cat([state[name][:1], grid.reshape(grid.shape[1], -1).T])
    larger.load_state_dict(state)
    return larger


def load_images(folder: Path, captions_file: Path) -> tuple[torch.Tensor, list[str]]:
    """Images of shape `(number, 3, size, size)`, uint8, and the captions of a COCO captions file."""
    content = json.loads(captions_file.read_text(encoding="utf-8"))
    captions = {annotation["image_id"]: annotation["caption"] for annotation in content["annotations"]}
    images = np.stack([np.asarray(Image.open(folder / image["file_name"])) for image in content["images"]])
    return torch.from_numpy(images).permute(0, 3, 1, 2), [captions[image["id"]] for image in content["images"]]


def pixel_values(images: torch.Tensor, rng: np.random.Generator | None = None) -> torch.Tensor:
    """Normalise as the saved image processor does; with `rng`, vary each image's contrast and brightness."""
    values = (images.float() / 255.0 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    if rng is None:
        return values
    contrast, brightness = rng.uniform(0.8, 1.2, len(values)), rng.uniform(-0.3, 0.3, len(values))
    return values * torch.tensor(contrast).float().view(-1, 1, 1, 1) + torch.tensor(brightness).float().view(
        -1, 1, 1, 1
    )


def change_one_piece(caption: str, rng: np.random.Generator) -> str:
    """Replace one piece of a caption by another; in 30 % of cases only its colour changes."""
    names = [part.removeprefix("a ") for part in caption.replace(" and ", ", ").split(", ")]
    wrong = int(rng.integers(len(names)))
    number = PIECES.index(names[wrong])
    shift = len(PIECES) // 2 if rng.random() < 0.3 else int(rng.integers(1, len(PIECES)))
    names[wrong] = PIECES[(number + shift) % len(PIECES)]
    return phrase(names)


def contrastive_loss(
    model: CLIPModel, pixels: torch.Tensor, captions: list[str], tokenizer: PreTrainedTokenizerFast, wrong: list[str]
) -> torch.Tensor:
    """CLIP's symmetric loss. Images with equal captions share one caption; `wrong` captions match no image."""
    texts = sorted(set(captions))
    row = {text: index for index, text in enumerate(texts)}
    target = torch.tensor([row[text] for text in captions])
    others = sorted(set(wrong) - set(texts))
    tokens = tokenizer(texts + others, padding=True, return_tensors="pt")
    images = F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)
    sentences = model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    scores = model.logit_scale.exp() * images @ F.normalize(sentences.pooler_output, dim=-1).T
    matches = F.one_hot(target, len(texts)).float()
    by_text = F.cross_entropy(scores[:, : len(texts)].T, (matches / matches.sum(0)).T)
    return (F.cross_entropy(scores, target) + by_text) / 2


def train_phase(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    data: tuple[torch.Tensor, list[str]],
    rng: np.random.Generator,
    *,
    steps: int,
    batch_size: int,
    muon_lr: float,
    adamw_lr: float,
    warmup: int = 20,
    decay: float = 0.5,
) -> None:
    """Train with Muon for matrices and AdamW for embeddings, norms and biases; linear warm-up and final decay."""
    images, captions = data
    model.train()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embedding" not in n]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    groups = [{"params": matrices, "muon": True, "lr": muon_lr}, {"params": others, "muon": False, "lr": adamw_lr}]
    optimizer = MuonWithAdamW(groups, lr=muon_lr, betas=(0.9, 0.98), eps=1e-8)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = np.empty(0, dtype=np.int64)
    mean_loss, started = 0.0, time.monotonic()
    for step in range(steps):
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(images))])
        batch, order = order[:batch_size], order[batch_size:]
        texts = [captions[i] for i in batch]
        wrong = [change_one_piece(text, rng) for text in texts]
        loss = contrastive_loss(model, pixel_values(images[batch], rng), texts, tokenizer, wrong)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.logit_scale.data.clamp_(max=4.6)  # 100, as CLIP
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            logger.info("step %d/%d  loss %.3f  %.0f s", step + 1, steps, mean_loss, time.monotonic() - started)


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    data: tuple[torch.Tensor, list[str]],
    rng: np.random.Generator,
) -> float:
    """Share of images that score their caption above 15 captions with one wrong piece (6 % by chance)."""
    images, captions = data
    model.eval()
    features = torch.cat([model.get_image_features(pixel_values(part)).pooler_output for part in images.split(256)])
    texts = [[caption] + [change_one_piece(caption, rng) for _ in range(15)] for caption in captions]
    tokens = tokenizer(sum(texts, []), padding=True, return_tensors="pt")
    sentences = model.get_text_features(
        **{name: tokens[name] for name in ("input_ids", "attention_mask")}
    ).pooler_output
    sentences = F.normalize(sentences, dim=-1).view(len(texts), 16, -1)
    return (torch.einsum("nd,nkd->nk", features, sentences).argmax(1) == 0).float().mean().item()


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    side = {"height": FULL_SIZE, "width": FULL_SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": FULL_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--single_steps", type=int, default=250)
    parser.add_argument("--single_batch_size", type=int, default=96)
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--muon_lr", type=float, default=3e-3)
    parser.add_argument("--adamw_lr", type=float, default=1.5e-3)
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng([77, arguments.seed])
    tokenizer = build_tokenizer()
    rates = {"muon_lr": arguments.muon_lr, "adamw_lr": arguments.adamw_lr}

    model = build_model(tokenizer)
    data = load_images(arguments.data_dir / "single", arguments.data_dir / "captions_single.json")
    sizes = {"steps": arguments.single_steps, "batch_size": arguments.single_batch_size}
    train_phase(model, tokenizer, data, rng, **sizes, **rates)

    model = interpolate_positions(model, tokenizer, FULL_SIZE)
    data = load_images(arguments.data_dir / "train", arguments.data_dir / "captions_train.json")
    sizes = {"steps": arguments.steps, "batch_size": arguments.batch_size}
    train_phase(model, tokenizer, data, rng, **sizes, **rates)

    data = load_images(arguments.data_dir / "validation", arguments.data_dir / "captions_validation.json")
    accuracy = zero_shot_accuracy(model, tokenizer, data, np.random.default_rng(0))
    logger.info("validation images that score their caption above 15 with one wrong piece: %.1f %%", 100 * accuracy)
    save(model, tokenizer, arguments.output_dir)


if __name__ == "__main__":
    main()

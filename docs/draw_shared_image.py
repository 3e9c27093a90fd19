"""Draws `docs/shared_image.png`: three captions of one image as padded rows and as one packed row, with its mask.

    python -m docs.draw_shared_image

Nothing in the figure is drawn by hand: `processing/data/packing.py` packs the row, and the squares on the right are
the values of the model's mask function.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jnana.modeling.packed_attention_jnana import packed_mask_function
from jnana.processing.data.packing import IGNORED, EncodedConversation, PackedRow, pack_row


IMAGE, NUM_IMAGE_TOKENS = "img", 5
PROMPT = ["caption", ":"]
CAPTIONS = [["a", "cat", "asleep", "<end>"], ["two", "cats", "<end>"], ["my", "old", "sofa", "<end>"]]
SHARED, BRANCHES, PADDING = "#c6d4e8", ["#f4b183", "#a9d18e", "#d9b3e6"], "#ffffff"


def encode() -> tuple[list[str], list[EncodedConversation]]:
    """The words, and the captions' conversations as their numbers."""
    prompt = [IMAGE] * NUM_IMAGE_TOKENS + PROMPT
    words = sorted({word for caption in CAPTIONS for word in caption} | set(prompt))
    chats = [
        EncodedConversation(
            [words.index(word) for word in prompt + caption],
            [0] * len(prompt) + [1] * len(caption),
            [0],
            [NUM_IMAGE_TOKENS],
        )
        for caption in CAPTIONS
    ]
    return words, chats


def cell(axes: Axes, x: float, y: float, text: str, colour: str, bold: bool = False, height: float = 0.8) -> None:
    axes.add_patch(Rectangle((x, y), 1, height, facecolor=colour, edgecolor="white" if text else "#bbbbbb", lw=1))
    weight = "bold" if bold else "normal"
    axes.text(x + 0.5, y + height / 2, text, ha="center", va="center", fontsize=6.5, rotation=90, weight=weight)


def draw_rows(axes: Axes, words: list[str], chats: list[EncodedConversation]) -> int:
    """A row a caption, padded to the longest; returns the number of cells."""
    width = max(len(chat.ids) for chat in chats)
    for number, chat in enumerate(chats):
        for place in range(width):
            if place >= len(chat.ids):
                cell(axes, place, -number, "", PADDING)
                continue
            answer = chat.mask[place] == 1
            cell(axes, place, -number, words[chat.ids[place]], BRANCHES[number] if answer else SHARED, bold=answer)
    return width * len(chats)


def colour_of(row: PackedRow, place: int) -> str:
    return SHARED if row.branches[place] == 0 else BRANCHES[row.branches[place] - 1]


def draw_packed(axes: Axes, words: list[str], row: PackedRow, y: float) -> None:
    """The packed row with its positions."""
    for place, token in enumerate(row.ids):
        cell(axes, place, y, words[token], colour_of(row, place), bold=row.labels[place] != IGNORED)
        axes.text(place + 0.5, y - 0.25, str(row.positions[place]), ha="center", va="center", fontsize=6.5)


def draw_mask(axes: Axes, words: list[str], row: PackedRow) -> None:
    """A square for each pair of tokens that see each other: the line looks, the column is seen."""
    count = len(row.ids)
    ids = [torch.tensor([values]) for values in (row.segments, row.branches, row.positions)]
    query, key = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    seen = packed_mask_function(*ids)(torch.zeros_like(query), 0, query, key) & (key <= query)
    picture = torch.ones(count, count, 3)
    for line in range(count):
        for column in range(count):
            if seen[line, column]:
                picture[line, column] = torch.tensor(to_rgb(colour_of(row, column)))
    axes.imshow(picture.numpy(), interpolation="nearest", extent=(0, count, count, 0))
    axes.set_xticks([place + 0.5 for place in range(count)], [words[token] for token in row.ids], rotation=90)
    axes.set_yticks([place + 0.5 for place in range(count)], [words[token] for token in row.ids])
    axes.tick_params(labelsize=6.5, length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for border in range(count + 1):
        axes.axhline(border, color="#e4e4e4", lw=0.4)
        axes.axvline(border, color="#e4e4e4", lw=0.4)


def draw(file: Path) -> None:
    """
    Args:
        file (`Path`): The figure, in a format that matplotlib derives from the suffix.
    """
    words, chats = encode()
    row = pack_row([chats], words.index(IMAGE), share=True)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    cells = draw_rows(left, words, chats)
    draw_packed(left, words, row, -4.6)
    left.text(0, 1.0, f"packing: none, {cells} places", fontsize=9)
    left.text(0, -3.65, f"packing: shared_image, {len(row.ids)} places (below: their positions)", fontsize=9)
    left.text(
        0,
        -5.9,
        "Bold tokens are learned. Each branch repeats the last shared token, here ':', at its position and\n"
        "unlearned: it has to predict the first word of every caption, and a place can predict only one.",
        fontsize=7.5,
    )
    left.set(xlim=(-0.2, len(row.ids) + 0.2), ylim=(-6.1, 1.4))
    left.axis("off")
    draw_mask(right, words, row)
    right.set_title("who (line) sees whom (column)", fontsize=9)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix("").parent / "shared_image.png")

"""The language model's corpus: small boards of letters in reading order, with captions and questions about them.

A document has the form of a later prompt, in text only. In the position of the image's patches it has one word for
each cell of a board (a dot, or the letter of the piece that covers the cell). The chat template's separators,
questions and answers follow.

     . . K K . . . . K K . . . . . . . . q q . . ...
    caption image: Which piece is at the top? end of question: a white king
    Is there a black queen? end of question: yes

The corpus begins with simple documents: rows of one to three letters, then boards of 3 x 3 cells with one cell for
each piece. Later boards have 6 x 6 cells, as an image has patches, and a piece covers several cells.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np
from scenes import IMAGE_SIZE, PIECES, QUESTION_TYPES, Scene, draw_scene, question_of_type


SMALL, LARGE = 3, 6  # an image has 6 x 6 patches
BLOCK_SIZE = 64  # `block_size` of recipes/chess_demo/pretrain.yaml
WORDS = re.compile(r"\n| ?\w+| ?[^\w\s]+")
# The letters of chess notation (FEN): capitals are white.
LETTERS = dict(zip(PIECES, "KQRBNPkqrbnp", strict=True))


def row_of_pieces(scene: Scene, rng: np.random.Generator) -> list[str]:
    """The letters of the pieces, from top to bottom."""
    return [LETTERS[placed.piece] for placed in scene]


def small_board(scene: Scene, rng: np.random.Generator) -> list[str]:
    """3 x 3 cells in reading order: each piece is in one cell, in a separate row."""
    cells = ["."] * SMALL * SMALL
    for row, placed in zip(np.sort(rng.permutation(SMALL)[: len(scene)]), scene, strict=True):
        cells[int(row) * SMALL + int(rng.integers(SMALL))] = LETTERS[placed.piece]
    return cells


def large_board(scene: Scene, rng: np.random.Generator) -> list[str]:
    """6 x 6 cells in reading order: the letter of the piece that covers the cell, else a dot.

    Cells of a piece are left out at random, because not every patch of an image shows its piece clearly.
    """
    step = IMAGE_SIZE / LARGE
    cells = ["."] * LARGE * LARGE
    for placed in scene:
        for row in range(LARGE):
            for column in range(LARGE):
                down, right = abs((row + 0.5) * step - placed.y), abs((column + 0.5) * step - placed.x)
                if down <= 0.5 * placed.size and right <= 0.4 * placed.size and rng.random() < 0.85:
                    cells[row * LARGE + column] = LETTERS[placed.piece]
        cells[int(placed.y / step) * LARGE + int(placed.x / step)] = LETTERS[placed.piece]
    return cells


def ask(
    scene: Scene, rng: np.random.Generator, extra: int, kinds: list[str] = QUESTION_TYPES
) -> list[tuple[str, str]]:
    """One question of each possible kind, and `extra` more yes/no and colour questions, in random order."""
    asked = [question_of_type(kind, scene, rng) for kind in kinds]
    asked += [question_of_type("exists" if rng.random() < 0.7 else "colour", scene, rng) for _ in range(extra)]
    different = list(dict.fromkeys(pair for pair in asked if pair is not None))
    return [different[index] for index in rng.permutation(len(different))]


def count_tokens(text: str) -> int:
    """Number of tokens of a text: the demo's tokenizer makes each word, number and mark one token."""
    return len(WORDS.findall(text))


def document(rng: np.random.Generator, draw_board: Callable, describe: float = 0.7) -> str:
    """One board with as many questions as fit, exactly `BLOCK_SIZE` tokens long with its end token; padded with dots.

    Therefore every block of the packed corpus is one document, and a board begins at position 0, as an image does
    later.
    """
    scene = draw_scene(rng, int(rng.choice(3, p=(0.15, 0.35, 0.5))) + 1)
    board = draw_board(scene, rng)
    # An answer that names a piece reveals later yes/no answers, so a document asks either about positions or about
    # presence. The description comes last, because it reveals all other answers. Left and right are not asked about: a
    # line of letters does not show the column of a cell; they are learnt from images.
    if rng.random() < 0.5:
        turns = ask(scene, rng, extra=0, kinds=["top", "middle", "bottom", "count"])
        last = [question_of_type("describe", scene, rng)] if rng.random() < describe else []
    else:
        turns, last = ask(scene, rng, extra=6, kinds=["exists", "colour", "count"]), []
    text = " " + " ".join(board) + "\ncaption image:"
    lines = [f"{question} end of question: {answer}" for question, answer in turns]
    closing = [f"{question} end of question: {answer}" for question, answer in last]
    room = BLOCK_SIZE - 1 - count_tokens(text) - sum(count_tokens("\n" + line) for line in closing)
    chosen = []
    for line in lines:
        needed = count_tokens("\n" + line)
        if needed <= room:
            chosen.append(line)
            room -= needed
    text += " " + "\n".join(chosen + closing)
    return text + " ." * (BLOCK_SIZE - 1 - count_tokens(text))


def documents(rng: np.random.Generator, number: int, first: float = 0.3, easy: float = 0.35) -> Iterator[str]:
    """The corpus in order: first rows and small boards, later large boards with a share `easy` of the former."""
    for index in range(number):
        if index < first * number:
            draw_board = row_of_pieces if rng.random() < 0.85 else small_board
        elif rng.random() < easy:
            draw_board = row_of_pieces if rng.random() < 0.6 else small_board
        else:
            draw_board = large_board
        yield document(rng, draw_board)

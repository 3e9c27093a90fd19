"""The language model's corpus: little boards of letters in reading order, with captions and questions about them.

A document is what the assistant will see later, in text: where the picture's patches will be there is a word for
each cell of a board (a dot, or the letter of the piece that covers it), then the chat template's separators, questions
and answers.

     . . K K . . . . K K . . . . . . . . q q . . ...
    caption image: Which piece is at the top? end of question: a white king
    Is there a black queen? end of question: yes

The corpus begins with what is quickly learnt from: rows of one to three letters, then boards of 3 x 3 cells with one
cell a piece. Later boards are 6 x 6, as the picture's patches, and a piece covers several cells.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np
from scenes import IMAGE_SIZE, PIECES, QUESTION_TYPES, Scene, draw_scene, question_of_type


SMALL, LARGE = 3, 6  # the picture has 6 x 6 patches
BLOCK_SIZE = 64  # `block_size` of recipes/chess_demo/pretrain.yaml
WORDS = re.compile(r"\n| ?\w+| ?[^\w\s]+")
# The letters of chess notation (FEN): capitals are white.
LETTERS = dict(zip(PIECES, "KQRBNPkqrbnp", strict=True))
BESIDE = ("left", "right")


def row_of_pieces(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Nothing but the pieces, from top to bottom."""
    return [LETTERS[placed.piece] for placed in scene]


def small_board(scene: Scene, rng: np.random.Generator) -> list[str]:
    """3 x 3 cells in reading order: each piece on a row of its own, in one cell."""
    cells = ["."] * SMALL * SMALL
    for row, placed in zip(np.sort(rng.permutation(SMALL)[: len(scene)]), scene, strict=True):
        cells[int(row) * SMALL + int(rng.integers(SMALL))] = LETTERS[placed.piece]
    return cells


def large_board(scene: Scene, rng: np.random.Generator) -> list[str]:
    """6 x 6 cells in reading order: the letter of the piece that covers a cell, else a dot.

    Cells are left out at random, as a picture's patches do not all show clearly what stands in them.
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
    """Each kind of question that the scene allows, in random order, and `extra` more yes/no and colour questions."""
    asked = [question_of_type(kind, scene, rng) for kind in kinds]
    asked += [question_of_type("exists" if rng.random() < 0.7 else "colour", scene, rng) for _ in range(extra)]
    different = list(dict.fromkeys(pair for pair in asked if pair is not None))
    return [different[index] for index in rng.permutation(len(different))]


def count_tokens(text: str) -> int:
    """Tokens of a text when every word, number and mark has become one token, as in the demo's tokenizer."""
    return len(WORDS.findall(text))


def document(rng: np.random.Generator, draw_board: Callable, describe: float = 0.7) -> str:
    """One board and as many questions about it as fit; with its closing token exactly `BLOCK_SIZE` tokens long.

    So every block of the packed corpus is one document, and a board begins where a picture will: at position 0. What
    is left over is filled with dots.
    """
    scene = draw_scene(rng, int(rng.choice(3, p=(0.15, 0.35, 0.5))) + 1)
    board = draw_board(scene, rng)
    # An answer that names a piece gives later yes/no answers away, so a document asks either for places or for what
    # is there. The description comes last, for it gives all others away. Which column a cell stands in, a line of
    # letters does not show; a picture's patches do, so left and right are learnt there.
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
    """The corpus in order: first rows of pieces, later mostly large boards with a share `easy` of what came before."""
    for index in range(number):
        if index < first * number:
            draw_board = row_of_pieces if rng.random() < 0.85 else small_board
        elif rng.random() < easy:
            draw_board = row_of_pieces if rng.random() < 0.6 else small_board
        else:
            draw_board = large_board
        yield document(rng, draw_board)

"""The language model's corpus: little boards of letters in reading order, with captions and questions about them.

A document is what the assistant will see later, in text: where the picture's patches will be there is a letter for each
cell of a board, then the chat template's separators, questions and answers.

     . . K . . . q . .
    caption image: Which piece is at the top? end of question: a white king
    Is there a black queen? end of question: yes

The corpus begins with boards of 3 x 3 cells, one a piece, which are quickly learnt from; later boards are 6 x 6, as the
picture's patches, and a piece covers several cells.
"""

from collections.abc import Iterator

import numpy as np
from scenes import IMAGE_SIZE, PIECES, QUESTION_TYPES, Scene, caption, draw_scene, question_of_type


SMALL, LARGE = 3, 6
# The letters of chess notation (FEN): capitals are white.
LETTERS = dict(zip(PIECES, "KQRBNPkqrbnp", strict=True))
BESIDE = ("left", "right")


def small_board(scene: Scene, rng: np.random.Generator) -> list[str]:
    """3 x 3 cells in reading order: each piece on a row of its own, in one cell."""
    cells = ["."] * SMALL * SMALL
    for row, placed in zip(np.sort(rng.permutation(SMALL)[: len(scene)]), scene, strict=True):
        cells[row * SMALL + int(rng.integers(SMALL))] = LETTERS[placed.piece]
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
    """Each kind of question that the scene allows, in random order, and `extra` more of the yes/no and colour kinds."""
    asked = [question_of_type(kind, scene, rng) for kind in kinds]
    asked += [question_of_type("exists" if rng.random() < 0.7 else "colour", scene, rng) for _ in range(extra)]
    different = list(dict.fromkeys(pair for pair in asked if pair is not None))
    return [different[index] for index in rng.permutation(len(different))]


def document(rng: np.random.Generator, small: bool, captions: float, questions: int) -> str:
    """One board and, with probability `captions`, its caption, else up to `questions` questions."""
    scene = draw_scene(rng, int(rng.choice(3, p=(0.2, 0.4, 0.4))) + 1)
    board = " " + " ".join(small_board(scene, rng) if small else large_board(scene, rng))
    if rng.random() < captions:
        return f"{board}\ncaption image: {caption(scene)}"
    # A small board has no left and right; the description comes last, for it gives all other answers away.
    kinds = [kind for kind in QUESTION_TYPES if kind != "describe" and not (small and kind in BESIDE)]
    asked = ask(scene, rng, extra=2, kinds=kinds)[:questions]
    if rng.random() < 0.5:
        asked.append(question_of_type("describe", scene, rng))
    turns = [f"{question} end of question: {answer}" for question, answer in asked]
    return f"{board}\ncaption image: " + "\n".join(turns)


def documents(rng: np.random.Generator, number: int, small_share: float = 0.4) -> Iterator[str]:
    """The corpus in order: the first `small_share` are small boards, then few are."""
    for index in range(number):
        small = index < small_share * number or rng.random() < 0.1
        yield document(rng, small, captions=0.3, questions=5)

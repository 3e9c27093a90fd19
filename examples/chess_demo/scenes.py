"""The scenes of the data set, and the captions, questions and answers about them; independent of pixels.

A scene is one to three chess pieces, stacked from top to bottom. Captions, questions, answers and the boards of
letters in the language model's corpus are computed from scenes, so every answer can be checked.
"""

from dataclasses import dataclass

import numpy as np


IMAGE_SIZE = 72  # pixels
KINDS = ["king", "queen", "rook", "bishop", "knight", "pawn"]
COLOURS = ["white", "black"]
PIECES = [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
NUMBERS = ["one", "two", "three"]
QUESTION_TYPES = ["describe", "count", "top", "middle", "bottom", "colour", "exists", "left", "right"]
# Smallest horizontal distance (pixels) between two pieces for questions about left and right.
MIN_LEFT_RIGHT_DISTANCE = 20


@dataclass(frozen=True)
class PlacedPiece:
    """One piece in an image: its name ("white king"), centre (pixels), height (pixels) and rotation (degrees)."""

    piece: str
    x: float
    y: float
    size: float
    angle: float


Scene = list[PlacedPiece]  # from top to bottom


def held_out_pairs(rng: np.random.Generator, count: int = 12) -> list[tuple[str, str]]:
    """Pairs of different pieces that no training image shows together; each piece is in at most two of them."""
    pairs = [(a, b) for i, a in enumerate(PIECES) for b in PIECES[i + 1 :]]
    order = rng.permutation(len(pairs))
    used = dict.fromkeys(PIECES, 0)
    chosen: list[tuple[str, str]] = []
    for index in order:
        first, second = pairs[index]
        if len(chosen) < count and used[first] < 2 and used[second] < 2:
            chosen.append((first, second))
            used[first] += 1
            used[second] += 1
    return sorted(chosen)


def shows_held_out_pair(scene: Scene, pairs: list[tuple[str, str]]) -> bool:
    names = {placed.piece for placed in scene}
    return any(first in names and second in names for first, second in pairs)


def draw_scene(rng: np.random.Generator, count: int, size: int = IMAGE_SIZE) -> Scene:
    """One random scene of `count` pieces. They do not overlap vertically, so that their order is unambiguous."""
    largest = min(28.0, size / count)
    heights = rng.uniform(max(19.0, 0.8 * largest), largest, count)
    # The free height is split at random into the gaps above, between and below the pieces.
    cuts = np.sort(rng.uniform(0.0, size - heights.sum(), count))
    tops = cuts + np.concatenate([[0.0], np.cumsum(heights[:-1])])
    names = rng.integers(len(PIECES), size=count)
    margin = heights / 2
    columns = rng.uniform(margin, size - margin)
    angles = rng.uniform(-10.0, 10.0, count)
    return [
        PlacedPiece(
            PIECES[names[i]], float(columns[i]), float(tops[i] + heights[i] / 2), float(heights[i]), float(angles[i])
        )
        for i in range(count)
    ]


def draw_scenes(
    rng: np.random.Generator,
    number: int,
    pairs: list[tuple[str, str]],
    unseen: bool = False,
    shares: tuple[float, float, float] = (0.2, 0.4, 0.4),
    image_size: int = IMAGE_SIZE,
) -> list[Scene]:
    """`number` scenes without held-out pairs or, if `unseen`, each with at least one, on images of `image_size`."""
    scenes: list[Scene] = []
    while len(scenes) < number:
        scene = draw_scene(rng, int(rng.choice(3, p=shares)) + 1, image_size)
        if shows_held_out_pair(scene, pairs) == unseen:
            scenes.append(scene)
    return scenes


def phrase(names: list[str]) -> str:
    """["white king", "black rook"] -> "a white king and a black rook"."""
    parts = [f"a {name}" for name in names]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    return phrase([placed.piece for placed in scene])


def question_of_type(kind: str, scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    """One question and its only correct answer; `None` if the scene has no unambiguous question of that type.

    Args:
        kind (`str`): One of `QUESTION_TYPES`.
        scene (`list[PlacedPiece]`): The pieces from top to bottom.
        rng (`np.random.Generator`): Chooses which piece to ask about.

    Returns:
        `tuple[str, str]` or `None`: Question and answer.
    """
    names = [placed.piece for placed in scene]
    if kind == "describe":
        return "What do you see in this picture?", phrase(names)
    if kind == "count":
        return "How many pieces are there?", NUMBERS[len(names) - 1]
    if kind in ("top", "bottom") and len(names) > 1:
        return f"Which piece is at the {kind}?", phrase([names[0 if kind == "top" else -1]])
    if kind == "middle" and len(names) == 3:
        return "Which piece is in the middle?", phrase([names[1]])
    if kind == "colour":
        # Only kinds that the scene shows in one colour.
        kinds = sorted({name.split()[1] for name in names})
        single = [k for k in kinds if len({name for name in names if name.endswith(k)}) == 1]
        if single:
            asked = single[rng.integers(len(single))]
            return f"What colour is the {asked}?", next(name for name in names if name.endswith(asked)).split()[0]
    if kind == "exists":
        present = sorted(set(names))
        if rng.random() < 0.5:
            return f"Is there a {present[rng.integers(len(present))]}?", "yes"
        # In half of the cases the absent piece differs from a present one only in its colour.
        absent = [piece for piece in PIECES if piece not in present]
        near = [piece for piece in absent if any(piece.split()[1] == name.split()[1] for name in present)]
        pool = near if near and rng.random() < 0.5 else absent
        return f"Is there a {pool[rng.integers(len(pool))]}?", "no"
    if kind in ("left", "right") and len(scene) == 2 and abs(scene[0].x - scene[1].x) >= MIN_LEFT_RIGHT_DISTANCE:
        ordered = sorted(scene, key=lambda placed: placed.x)
        return f"Which piece is on the {kind}?", phrase([ordered[0 if kind == "left" else -1].piece])
    return None

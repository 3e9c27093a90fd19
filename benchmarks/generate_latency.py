"""Time to the first token, and tokens per second, of a chat with two questions about one image; beside stock LLaVA.

    python -m benchmarks.generate_latency                                # CPU, small models, 49 and 576 image tokens
    python -m benchmarks.generate_latency --scale phi2 --device cuda     # full Phi-2, random weights in bfloat16

Three methods answer the chat: stock `LlavaForConditionalGeneration.generate`, which processes the whole chat and its
image in every turn; a `ChatSession` without a cache; and a `ChatSession` that keeps its cache between turns. All have
the same weights and decode greedily. In float32 they must write the same answers, or the run ends. The methods take
turns in rotating order; ratios are computed within a round. The clock of a turn starts before the image file is
opened.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from benchmarks.answering import measure_cases
from benchmarks.machine import synchronize
from benchmarks.throughput_report import spread
from benchmarks.workloads import SCALES, make_images, make_models, make_processor, words
from jnana.chat import ChatSession
from jnana.processing import JnanaProcessor


METHODS = ("llava", "uncached", "cached")
LABELS = {
    "llava": "stock LLaVA",
    "uncached": "ChatSession, keep_cache=False",
    "cached": "ChatSession",
}


@dataclasses.dataclass
class Timed:
    """One answer: its text, seconds to its first token, and tokens per second after the first."""

    text: str
    first: float
    speed: float


class Clock(BaseStreamer):
    """Records the time of each token."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def put(self, value: torch.Tensor) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())  # the first entry is the prompt's

    def end(self) -> None:
        pass


def answer_by_llava(
    llava: LlavaForConditionalGeneration, processor: JnanaProcessor, chat: list[dict], new_tokens: int
) -> Timed:
    """One turn of stock LLaVA, which processes the whole chat and its image."""
    started, clock = time.perf_counter(), Clock(llava.device)
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(llava.device, llava.dtype)
    output = llava.generate(
        **inputs, max_new_tokens=new_tokens, do_sample=False, streamer=clock, pad_token_id=0, use_cache=True
    )
    made = output[0, inputs["input_ids"].shape[1] :]
    text = processor.tokenizer.decode(made, skip_special_tokens=True).strip()
    first, last = clock.times[1], clock.times[-1]
    return Timed(text, first - started, (len(made) - 1) / max(last - first, 1e-9))


def chat_by_llava(llava, processor, image: Path, questions: list[str], new_tokens: int) -> list[Timed]:
    turns: list[Timed] = []
    chat: list[dict] = []
    for number, question in enumerate(questions):
        parts = [{"type": "image", "path": str(image)}] if number == 0 else []
        chat.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        turns.append(answer_by_llava(llava, processor, chat, new_tokens))
        chat.append({"role": "assistant", "content": [{"type": "text", "text": turns[-1].text}]})
    return turns


def chat_by_session(session: ChatSession, image: Path, questions: list[str], new_tokens: int) -> list[Timed]:
    turns = []
    for number, question in enumerate(questions):
        for _ in session.ask(question, [image] if number == 0 else [], max_new_tokens=new_tokens):
            pass
        text = session.messages[-1]["content"][0]["text"]
        turn = session.last_turn
        assert turn is not None
        behind = turn.seconds - turn.seconds_to_first_token
        turns.append(Timed(text, turn.seconds_to_first_token, (turn.new_tokens - 1) / max(behind, 1e-9)))
    return turns


def measure(arguments: argparse.Namespace, tokens: int, device: torch.device) -> dict[str, Any]:
    """Measure one number of image tokens."""
    scale = SCALES[arguments.scale]
    processor = make_processor(scale, tokens)
    llava, jnana = make_models(scale, tokens, processor, device)
    for model in (llava.eval(), jnana.eval()):
        # Only entries of the tokenizer are generated, so that different answers differ in their text ...
        model.lm_head.weight.data[len(processor.tokenizer) :] = 0
        # ... and no end tokens, so that every answer has its full length
        model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    questions = [" ".join(words()[start : start + 12]) for start in (0, 40)]
    rounds: list[dict[str, list[Timed]]] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        image = make_images(Path(folder), 1)[0]
        for number in range(arguments.rounds + 1):  # the first round is a warm-up
            order = [METHODS[(number + shift) % len(METHODS)] for shift in range(len(METHODS))]
            turn: dict[str, list[Timed]] = {}
            for method in order:
                if method == "llava":
                    with torch.inference_mode():
                        turn[method] = chat_by_llava(llava, processor, image, questions, arguments.new_tokens)
                    continue
                session = ChatSession(jnana, processor, keep_cache=method == "cached")
                turn[method] = chat_by_session(session, image, questions, arguments.new_tokens)
                if method == "cached":
                    facts = {
                        "prompt_tokens_second_turn": session.last_turn.prompt_tokens,
                        "cached_tokens_second_turn": session.last_turn.cached_tokens,
                    }
            check_answers(turn, scale.dtype)
            if number > 0:
                rounds.append(turn)
    return {"image_tokens": tokens, "new_tokens": arguments.new_tokens, **facts, **summarize(rounds)}


def check_answers(turn: dict[str, list[Timed]], dtype: torch.dtype) -> None:
    """In float32 all methods must have written the same answers; in lower precision ties may differ."""
    texts = {method: [timed.text for timed in turns] for method, turns in turn.items()}
    if dtype == torch.float32 and not texts["llava"] == texts["uncached"] == texts["cached"]:
        raise SystemExit(f"The answers differ, so the times cannot be compared: {texts}")


def summarize(rounds: list[dict[str, list[Timed]]]) -> dict[str, Any]:
    """Medians and spreads by method and turn, and ratios within rounds."""
    methods = {
        method: {
            "seconds_to_first_token": [spread([turn[method][number].first for turn in rounds]) for number in (0, 1)],
            "tokens_per_second": spread([timed.speed for turn in rounds for timed in turn[method]]),
        }
        for method in METHODS
    }
    ratios = {
        "llava/cached, first turn": spread([turn["llava"][0].first / turn["cached"][0].first for turn in rounds]),
        "llava/cached, second turn": spread([turn["llava"][1].first / turn["cached"][1].first for turn in rounds]),
        "uncached/cached, second turn": spread(
            [turn["uncached"][1].first / turn["cached"][1].first for turn in rounds]
        ),
        "cached, first/second turn": spread([turn["cached"][0].first / turn["cached"][1].first for turn in rounds]),
        "tokens per second, cached/llava": spread(
            [
                statistics.median(timed.speed for timed in turn["cached"])
                / statistics.median(timed.speed for timed in turn["llava"])
                for turn in rounds
            ]
        ),
    }
    return {"methods": methods, "ratios": ratios}


def table(case: dict[str, Any]) -> str:
    lines = [f"{case['image_tokens']} image tokens; milliseconds to the first token, median (smallest-largest)"]
    lines.append(f"{'':28}{'first question':>24}{'second question':>24}{'tokens/s':>12}")
    for method, measured in case["methods"].items():
        cells = [
            f"{1e3 * s['median']:.0f} ({1e3 * s['min']:.0f}-{1e3 * s['max']:.0f})"
            for s in measured["seconds_to_first_token"]
        ]
        speed = measured["tokens_per_second"]["median"]
        lines.append(f"{LABELS[method]:28}{cells[0]:>24}{cells[1]:>24}{speed:>12.1f}")
    for name, ratio in case["ratios"].items():
        lines.append(f"  {name}: {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    return measure_cases(argv, __doc__, {"rounds": 7, "new_tokens": 24}, measure, table)


if __name__ == "__main__":
    main()

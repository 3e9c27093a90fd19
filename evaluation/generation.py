"""Answers a whole test set by batched greedy `generate`; resumes after an interruption and skips unreadable images.

Answers are appended to a JSON Lines file after each batch. A restarted run reads that file and asks only the open
questions. A stored answer is reused only if its key matches. The key hashes question, images, weights and settings, so
that answers of another model, or of a test set that was regenerated under the same name, are not reused.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from jnana.chat.session import end_token_ids
from jnana.modeling import available_device
from jnana.processing import JnanaProcessor
from jnana.processing.data import BadSampleError, tokenizer_fingerprint
from jnana.processing.data.feature_cache import weights_digest
from jnana.processing.data.files import write_whole
from jnana.processing.data.records import read_json_lines

from .questions import Question, QuestionSet


logger = get_logger(__name__)

CHARACTERS_A_TOKEN = 4  # of English text, roughly


def answer_questions(
    model: torch.nn.Module,
    processor: Any,
    rows: QuestionSet | Iterable[dict[str, Any]],
    batch_size: int = 16,
    max_new_tokens: int = 64,
    blind: bool = False,
    *,
    predictions_file: str | Path | None = None,
    num_workers: int = 2,
    max_image_pixels: int | None = None,
    progress_bar: bool = True,
) -> list[dict[str, Any]]:
    """Answer every question of a test set greedily.

    The longest questions come first, so that a batch holds questions of similar length and a batch too large for the
    memory fails at once. (Where images are cut into tiles, their headers are read for it.) Under `accelerate launch`
    each process answers its share on its own copy of the model, and every process returns all answers.

    Args:
        model (`PreTrainedModel`): Any image-text-to-text model with `generate`. Its train or eval mode is restored
            afterwards.
        processor (`ProcessorMixin`): Its processor; must have a chat template.
        rows (`QuestionSet` or rows of `jnana.load_rows`): The test set.
        batch_size (`int`): Questions per `generate` call and process.
        max_new_tokens (`int`): Longest answer, in tokens.
        blind (`bool`): Replace every image by a grey image of the same size.
        predictions_file (`str` or `Path`, *optional*): JSON Lines file to append to and to resume from.
        num_workers (`int`): Dataloader workers that decode images and tokenise; 0 does both in the main process.
        max_image_pixels (`int`, *optional*): Larger images are refused; default of
            `jnana.processing.data.load_image`.
        progress_bar (`bool`): Show a progress bar on the main process.

    Returns:
        `list[dict]`: One record for each question, in the order of the test set: `source`, `category`, `history`,
        `question`, `references`, `prediction` (`None` if an image could not be read; `error` then holds the reason),
        `complete` (whether the model wrote an end token within `max_new_tokens`), `blind`, `key`.

    Raises:
        ValueError: if `batch_size` or `max_new_tokens` is below 1, or the processor has no chat template.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if processor.chat_template is None:
        raise ValueError("the processor has no chat template; load one that was saved with a Jnana checkpoint")
    questions = rows if isinstance(rows, QuestionSet) else QuestionSet(rows)
    state = process_state()
    run = _run_key(model, processor, blind, max_new_tokens)
    keys = [f"{run}-{question.key}" for question in questions.questions]

    answered = _read_answers(predictions_file, keys, state)
    waiting = [index for index, key in enumerate(keys) if key not in answered]
    if len(waiting) < len(keys):
        logger.info(f"{len(keys) - len(waiting)} of {len(keys)} answers are read from {predictions_file}")
    waiting.sort(key=lambda index: -prompt_length(questions, questions.questions[index], processor))

    mine = waiting[state.process_index :: state.num_processes]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    collator = PromptCollator(questions, processor, blind, max_image_pixels)
    loader = DataLoader(batches, batch_size=None, collate_fn=collator, num_workers=num_workers if batches else 0)
    hidden = not (progress_bar and state.is_main_process)
    bar = tqdm(total=len(mine), desc="blind" if blind else "answers", disable=hidden)
    new = []
    with _evaluating(model), _appending(predictions_file, state) as write, bar:
        for indices, inputs, errors in loader:
            records = [_record(questions.questions[i], keys[i], blind, error=error) for i, error in errors]
            answers = zip(indices, *_generate(model, processor, inputs, max_new_tokens), strict=True)
            records += [_record(questions.questions[i], keys[i], blind, *answer) for i, *answer in answers]
            write(records)
            new += records
            bar.update(len(records))
            for _, error in errors:
                logger.warning(f"not answered: {error}", main_process_only=False)

    if state.num_processes > 1:
        new = gather_object(new)
    answered.update({record["key"]: record for record in new})
    records = [answered[key] for key in keys]
    if predictions_file is not None:
        if state.is_main_process:
            _replace_file(predictions_file, records)
        state.wait_for_everyone()
    return records


def prompt_length(questions: QuestionSet, question: Question, processor: Any) -> int:
    """About the length of a question, its images included, in characters.

    Args:
        questions (`QuestionSet`): The test set.
        question (`Question`): One of its questions.
        processor (`ProcessorMixin`): If it is a [`JnanaProcessor`] that cuts images into tiles, an image counts by
            its number of tokens. Otherwise all images count alike, and none is opened.
    """
    length = sum(len(str(message)) for message in question.messages)
    if isinstance(processor, JnanaProcessor) and processor.image_grid_pinpoints is not None:
        sizes = questions.image_sizes(question)
        length += CHARACTERS_A_TOKEN * sum(processor.count_image_tokens(size) for size in sizes)
    return length


def process_state() -> PartialState:
    """accelerate's state of this process: its rank, the number of processes, its device.

    On a machine without an accelerator, `PartialState()` reports one process even when several were launched, unless
    it is told to use the CPU. Each process would then answer every question.

    Returns:
        `PartialState`: One for each process.
    """
    return PartialState(cpu=available_device().type == "cpu")


class PromptCollator:
    """Turns indices of questions into one left-padded batch of model inputs. Runs in the dataloader workers.

    Args:
        questions (`QuestionSet`): The test set.
        processor (`ProcessorMixin`): Renders and tokenises the messages and prepares the images.
        blind (`bool`): Use grey images.
        max_image_pixels (`int`, *optional*): Limit passed to `jnana.processing.data.load_image`.

    Returns:
        `tuple[list[int], BatchFeature | None, list[tuple[int, str]]]`: The indices of the questions in the batch;
        the model inputs (`input_ids` of shape `(batch_size, sequence_length)` ...; `None` if no question is left); and
        index and reason for each question whose images cannot be read.
    """

    def __init__(self, questions: QuestionSet, processor: Any, blind: bool, max_image_pixels: int | None = None):
        self.questions = questions
        self.processor = processor
        self.blind = blind
        self.limits = {} if max_image_pixels is None else {"max_image_pixels": max_image_pixels}

    def __call__(self, batch: list[int]):
        indices, conversations, errors = [], [], []
        for index in batch:
            question = self.questions.questions[index]
            try:
                images = self.questions.images(question, self.blind, **self.limits)
                conversations.append(self.questions.messages_with_images(question, images))
                indices.append(index)
            except BadSampleError as error:
                errors.append((index, str(error)))
        if not conversations:
            return indices, None, errors
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return indices, inputs, errors


@torch.inference_mode()
def _generate(model, processor, inputs, max_new_tokens: int) -> tuple[list[str], list[bool]]:
    """The answers to one batch, and for each whether the model wrote an end token."""
    if inputs is None:
        return [], []
    inputs = inputs.to(model.device, dtype=model.dtype)
    outputs = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    # => (batch_size, new tokens)
    outputs = outputs[:, inputs["input_ids"].shape[1] :]
    ends = torch.tensor(end_token_ids(model, processor.tokenizer), device=outputs.device)
    complete = torch.isin(outputs, ends).any(dim=1).tolist()
    texts = processor.tokenizer.batch_decode(outputs, skip_special_tokens=True)
    return [text.strip() for text in texts], complete


def _run_key(model, processor, blind: bool, max_new_tokens: int) -> str:
    """A hash of everything except the question that an answer depends on."""
    settings = {
        "model": model_fingerprint(model),
        "generation": model.generation_config.to_dict(),
        "processor": processor.to_dict(),
        "tokenizer": tokenizer_fingerprint(processor.tokenizer),
        "chat_template": processor.chat_template,
        "blind": blind,
        "max_new_tokens": max_new_tokens,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def model_fingerprint(model: torch.nn.Module) -> str:
    """A short hash that differs between trained models. To save time it reads about 4096 values of each weight.

    Args:
        model (`torch.nn.Module`): Any model, adapters included.

    Returns:
        `str`: 16 hexadecimal digits.
    """
    return weights_digest(model, values_per_tensor=4096)[:16]


def _record(question: Question, key: str, blind: bool, prediction=None, complete=None, error=None) -> dict[str, Any]:
    record = {
        "source": question.source,
        "category": question.category,
        "history": question.history,
        "question": question.text,
        "references": question.references,
        "prediction": prediction,
        "complete": complete,
        "blind": blind,
        "key": key,
    }
    return record if error is None else {**record, "error": error}


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and restore its former mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _appending(path: str | Path | None, state: PartialState):
    """Yields a function that appends records to the file of this process and flushes them to the disk."""
    if path is None:
        yield lambda records: None
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if state.num_processes > 1:
        path = path.with_name(f"{path.name}.part{state.process_index}")
    with path.open("a", encoding="utf-8") as file:

        def write(records: list[dict[str, Any]]) -> None:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())

        yield write


def _read_answers(path: str | Path | None, keys: list[str], state: PartialState) -> dict[str, dict[str, Any]]:
    """The stored answers to these questions. Questions that failed in an earlier run are asked again."""
    if path is None:
        return {}
    path = Path(path)
    wanted = set(keys)
    answered = {}
    for file in [path, *sorted(path.parent.glob(f"{path.name}.part*"))]:
        for record in read_json_lines(file, torn="skip"):
            if isinstance(record, dict) and record.get("key") in wanted and record.get("prediction") is not None:
                answered[record["key"]] = record
    state.wait_for_everyone()  # no process writes before all have read
    if state.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace_file(path, [answered[key] for key in keys if key in answered])
    state.wait_for_everyone()
    return answered


def _replace_file(path: str | Path, records: list[dict[str, Any]]) -> None:
    """Replace the file by one with these records, atomically, and delete the part files of all processes."""
    path = Path(path)
    write_whole(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
    for part in path.parent.glob(f"{path.name}.part*"):
        part.unlink()

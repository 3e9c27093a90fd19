"""Answers a whole test set by greedy `generate` in batches; resumes after an interruption and skips unreadable images.

Answers are appended to a JSON Lines file after each batch. A restarted run reads that file and asks only the open
questions. A stored answer is reused only if its key matches. The key hashes question, images, weights and settings, so
that answers of another model, or of a test set that was regenerated under the same name, are not reused.
"""

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import BatchFeature

from jnana.chat.session import end_token_ids
from jnana.modeling import CACHE_NAME, available_device
from jnana.processing.data import tokenizer_fingerprint
from jnana.processing.data.feature_cache import weights_digest
from jnana.processing.data.files import write_whole
from jnana.processing.data.records import read_json_lines

from .prefixes import cache_of_rows, length_limit, read_prefix, sharing_problem
from .prompts import PromptBatch, PromptCollator, plan_batches
from .questions import Question, QuestionSet


logger = get_logger(__name__)


@dataclass
class Answer:
    """The answer to one question.

    Attributes:
        text (`str`, *optional*): As the model wrote it, without special tokens; `None` if an image could not be read.
        complete (`bool`, *optional*): Whether the model wrote an end token within `max_new_tokens`.
        num_tokens (`int`): Tokens of the answer, the end token included.
        error (`str`, *optional*): Why there is no text.
        shared (`bool`): Whether the start of the prompt was read once for several questions.
    """

    text: str | None = None
    complete: bool | None = None
    num_tokens: int = 0
    error: str | None = None
    shared: bool = False


def answer_questions(
    model: torch.nn.Module,
    processor: Any,
    rows: QuestionSet | Iterable[dict[str, Any]],
    batch_size: int = 16,
    max_new_tokens: int = 64,
    blind: bool = False,
    *,
    share_prefix: bool = True,
    predictions_file: str | Path | None = None,
    num_workers: int = 2,
    max_image_pixels: int | None = None,
    progress_bar: bool = True,
) -> list[dict[str, Any]]:
    """Answer every question of a test set greedily.

    The longest questions come first, so that a batch holds questions of similar length and a batch too large for the
    memory is among the first ones. (Where images are cut into tiles, their headers are read for it.) Under
    `accelerate launch` each process answers its share on its own copy of the model, and every process returns all
    answers.

    Args:
        model (`PreTrainedModel`): Any image-text-to-text model with `generate`. Its train or eval mode is restored
            afterwards.
        processor (`ProcessorMixin`): Its processor; must have a chat template.
        rows (`QuestionSet` or rows of `jnana.load_rows`): The test set.
        batch_size (`int`): Questions per `generate` call and process.
        max_new_tokens (`int`): Longest answer, in tokens.
        blind (`bool`): Replace every image by a grey image of the same size.
        share_prefix (`bool`): Run the model once on the images of several questions, and on the text before them,
            instead of once for each question. The answers are the same, up to rounding. Questions for which it is not
            possible are asked whole; docs/evaluation.md says which.
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
        ValueError: if `batch_size` or `max_new_tokens` is below 1, the processor has no chat template, or the
            processes have read different test sets.
    """
    if processor.chat_template is None:
        raise ValueError("the processor has no chat template; load one that was saved with a Jnana checkpoint")
    questions = rows if isinstance(rows, QuestionSet) else QuestionSet(rows)
    state = process_state()
    run = _run_key(model, processor, blind, max_new_tokens)
    keys = [f"{run}-{question.key}" for question in questions.questions]
    _check_same_questions(keys, state)

    answered = _read_answers(predictions_file, keys, state)
    waiting = [index for index, key in enumerate(keys) if key not in answered]
    if len(waiting) < len(keys):
        logger.info(f"{len(keys) - len(waiting)} of {len(keys)} answers are read from {predictions_file}")
    answers = generate_answers(
        model,
        processor,
        questions,
        waiting,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        blind=blind,
        share_prefix=share_prefix,
        num_workers=num_workers,
        max_image_pixels=max_image_pixels,
        part=(state.process_index, state.num_processes),
    )
    hidden = not (progress_bar and state.is_main_process)
    bar = tqdm(total=len(waiting), desc="blind" if blind else "answers", disable=hidden)
    new, shared = [], 0
    with closing(answers), _appending(predictions_file, state) as write, bar:
        for batch in answers:
            records = [_record(questions.questions[i], keys[i], blind, answer) for i, answer in batch.items()]
            write(records)
            new += records
            shared += sum(answer.shared for answer in batch.values())
            # about as many as the other processes have answered
            bar.update(min(len(records) * state.num_processes, len(waiting) - bar.n))
            for answer in batch.values():
                if answer.error is not None:
                    logger.warning(f"not answered: {answer.error}", main_process_only=False)

    if state.num_processes > 1:
        new, shared = gather_object(new), sum(gather_object([shared]))
    if shared:
        logger.info(f"{shared} of {len(waiting)} questions were asked behind a prefix that was read once")
    answered.update({record["key"]: record for record in new})
    records = [answered[key] for key in keys]
    if predictions_file is not None:
        if state.is_main_process:
            _replace_file(predictions_file, records)
        state.wait_for_everyone()
    return records


def generate_answers(
    model: torch.nn.Module,
    processor: Any,
    questions: QuestionSet,
    indices: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    blind: bool = False,
    share_prefix: bool = True,
    num_workers: int = 0,
    max_image_pixels: int | None = None,
    part: tuple[int, int] = (0, 1),
    decoding: dict[str, Any] | None = None,
) -> Generator[dict[int, Answer], None, None]:
    """Ask some questions of a test set, batch by batch.

    Args:
        model, processor, batch_size, max_new_tokens, blind, share_prefix, num_workers, max_image_pixels: As in
            [`answer_questions`].
        questions (`QuestionSet`): The test set.
        indices (`Sequence[int]`): The questions to ask.
        part (`tuple[int, int]`): Ask only the batches of this process: its index, and the number of processes. Each
            question is asked by one of them.
        decoding (`dict`, *optional*): Arguments of `generate`; greedy by default.

    Returns:
        `Generator[dict[int, Answer]]`: The questions of a batch and their answers, batch by batch. The model is in
        eval mode until it ends or is closed.

    Raises:
        ValueError: if `batch_size` or `max_new_tokens` is below 1.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    process_state()  # without it the logger raises
    options = {"do_sample": False, "num_beams": 1, **(decoding or {}), "max_new_tokens": max_new_tokens}
    limit = None
    if share_prefix:
        problem = sharing_problem(model, processor, options)
        if problem is None:
            limit = length_limit(model.config.text_config)
        else:
            share_prefix = False
            logger.info(f"each question is asked whole, because {problem}")
    process, num_processes = part
    batches = plan_batches(questions, indices, processor, batch_size, share_prefix, num_processes)
    collator = PromptCollator(
        questions,
        processor,
        blind,
        max_image_pixels,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        limit=limit,
    )
    own = batches[process::num_processes]
    loader = DataLoader(own, batch_size=None, collate_fn=collator, num_workers=num_workers if own else 0)
    return _answer_batches(model, processor, loader, options)


def _answer_batches(
    model, processor, loader: DataLoader, options: dict[str, Any]
) -> Generator[dict[int, Answer], None, None]:
    with _evaluating(model):
        for batch in loader:
            yield _answer_batch(model, processor, batch, options)


def process_state() -> PartialState:
    """accelerate's state of this process: its rank, the number of processes, its device.

    On a machine without an accelerator, `PartialState()` reports one process even when several were launched, unless
    it is told to use the CPU. Each process would then answer every question.

    Returns:
        `PartialState`: One for each process.
    """
    return PartialState(cpu=available_device().type == "cpu")


@torch.inference_mode()
def _answer_batch(model, processor, batch: PromptBatch, options: dict[str, Any]) -> dict[int, Answer]:
    """The answers to one batch."""
    answers = {index: Answer(error=error) for index, error in batch.errors}
    prefix = None if batch.prefix is None else read_prefix(model, _on_device(batch.prefix, model))
    behind_prefix = sum(prompts.rows is not None for prompts in batch.prompts)
    ends = torch.tensor(end_token_ids(model, processor.tokenizer), device=model.device)
    for prompts in batch.prompts:
        # the cache of the call before is let go with its inputs
        inputs = _on_device(prompts.inputs, model)
        if prompts.rows is not None:
            inputs[CACHE_NAME] = cache_of_rows(prefix, prompts.rows)
            behind_prefix -= 1
            if behind_prefix == 0:
                prefix = None  # not kept beside its last copy
        outputs = model.generate(**inputs, **options, pad_token_id=processor.tokenizer.pad_token_id)
        # => (num_questions, new tokens)
        outputs = outputs[:, inputs["input_ids"].shape[1] :]
        ended = torch.isin(outputs, ends)
        before_end = (ended.cumsum(1) == 0).sum(1).tolist()
        texts = processor.tokenizer.batch_decode(outputs, skip_special_tokens=True)
        for index, text, count in zip(prompts.indices, texts, before_end, strict=True):
            complete = count < outputs.shape[1]
            answers[index] = Answer(text, complete, count + complete, shared=prompts.rows is not None)
    return answers


def _on_device(inputs: BatchFeature, model) -> BatchFeature:
    """A copy where the model is; `to` alone changes its own object."""
    return BatchFeature(dict(inputs)).to(model.device, dtype=model.dtype)


def _check_same_questions(keys: list[str], state: PartialState) -> None:
    """Raise unless all processes have the same questions: each answers a part of them."""
    if state.num_processes == 1:
        return
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    if len(set(gather_object([digest]))) > 1:
        raise ValueError(
            "the processes have different test sets or weights, so their answers can't be joined; give every machine "
            "the same files, with the same paths, sizes and times of modification (as `rsync -a` copies them)"
        )


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


def _record(question: Question, key: str, blind: bool, answer: Answer) -> dict[str, Any]:
    record = {
        "source": question.source,
        "category": question.category,
        "history": question.history,
        "question": question.text,
        "references": question.references,
        "prediction": None if answer.text is None else answer.text.strip(),
        "complete": answer.complete,
        "blind": blind,
        "key": key,
    }
    return record if answer.error is None else {**record, "error": answer.error}


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

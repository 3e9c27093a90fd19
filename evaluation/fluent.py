"""Answers a question in two passes, as in phi35_pooled: first keywords with the adapter, then sentences without it.

An adapter trained with `answer_keywords: true` answers in keywords. The second pass gives the question and these
keywords to the language model with the adapter disabled, which writes as fluently as before fine-tuning. A question
without an image needs the second pass only.
"""

from typing import Any

import torch
from peft import PeftModel


INSTRUCTION = "{question}\nAnswer in one or two sentences, from these keywords about the picture: {keywords}"


@torch.inference_mode()
def fluent_answer(
    model: PeftModel, processor: Any, messages: list[dict[str, Any]], max_new_tokens: int = 64
) -> tuple[str | None, str]:
    """Answer one question: first in keywords, then in sentences.

    Args:
        model (`PeftModel`): The base model with the unmerged keyword adapter, as `jnana.load_model` returns it.
        processor (`JnanaProcessor`): Its processor.
        messages (`list[dict]`): A chat that ends with a question; each content is a list of parts.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest output of each pass, in tokens.

    Returns:
        `tuple[str | None, str]`: The keywords (`None` without an image) and the answer.

    Raises:
        ValueError: if the model has no adapter to disable.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "fluent_answer needs a model with an unmerged adapter, but this one is merged or has no adapter; load the "
            "directory that run_sft wrote, not its subdirectory `merged`"
        )
    if not any(part["type"] == "image" for message in messages for part in message["content"]):
        with model.disable_adapter():
            return None, _generate(model, processor, messages, max_new_tokens)
    keywords = _generate(model, processor, messages, max_new_tokens)
    question = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
    text = INSTRUCTION.format(question=question, keywords=keywords)
    second = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    with model.disable_adapter():
        return keywords, _generate(model, processor, second, max_new_tokens)


def _generate(model: PeftModel, processor: Any, messages: list[dict[str, Any]], max_new_tokens: int) -> str:
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = inputs.to(model.device, dtype=model.dtype)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()

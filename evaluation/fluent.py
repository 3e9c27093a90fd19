"""Two passes to one answer, as in phi35_pooled: the adapter names keywords, the bare model writes the sentence.

An adapter trained with `answer_keywords: true` answers in keywords. They and the question go to the language model
with the adapter switched off, which then writes as fluently as it did before any training. A question without a
picture goes straight to it.
"""

from typing import Any

import torch
from peft import PeftModel


INSTRUCTION = "{question}\nAnswer in one or two sentences, from these keywords about the picture: {keywords}"


@torch.inference_mode()
def fluent_answer(
    model: PeftModel, processor: Any, messages: list[dict[str, Any]], max_new_tokens: int = 64
) -> tuple[str | None, str]:
    """Answer one question by keywords first, then in sentences.

    Args:
        model (`PeftModel`): Base with the keyword adapter on it, unmerged (`jnana.training.loading` gives it so).
        processor (`JnanaProcessor`): Its processor.
        messages (`list[dict]`): A chat that ends with a question; content as a list of parts.
        max_new_tokens (`int`, *optional*, defaults to 64): Of each pass.

    Returns:
        `tuple[str | None, str]`: The keywords (`None` if there is no picture) and the answer.

    Raises:
        ValueError: if the model has no adapter to switch off.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            "fluent_answer needs the adapter and its base apart, and this model is merged or has none; give the "
            "folder that run_sft wrote, not its `merged`"
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

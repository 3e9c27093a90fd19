"""The vocabulary of the CLIP model's text tower: a byte-level BPE over all possible captions."""

from scenes import PIECES, phrase
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers


START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"  # ids 0, 1, 2


def caption_vocabulary() -> Tokenizer:
    """Train the tokenizer on captions in a fixed order, so that its ids are the same in every process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[START, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([phrase([first, second]) for first in PIECES for second in PIECES], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 0), (END, 1)]
    )
    return tokenizer

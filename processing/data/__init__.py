"""People's data to batches: readers, the row of data, checks, packing, the collator, text for stage 0."""

from .checks import CheckReport, check_rows
from .collator import JnanaCollator
from .feature_cache import FeatureCache
from .images import MAX_IMAGE_PIXELS, PixelImages, check_image, load_image
from .keywords import answers_as_keywords, keywords
from .packing import IGNORED
from .plan import RowPlan, packed_rows, packed_stream, plan_rows
from .readers import load_rows
from .rows import (
    ROW_FEATURES,
    BadSampleError,
    append_bad_samples,
    conversation_rows,
    flatten_conversations,
    message_text,
    read_bad_samples,
    with_images,
)
from .text_corpus import load_text, pack_blocks, pack_documents, train_tokenizer
from .tokenizer_checks import check_tokenizer, tokenizer_fingerprint


__all__ = [
    "IGNORED",
    "MAX_IMAGE_PIXELS",
    "ROW_FEATURES",
    "BadSampleError",
    "CheckReport",
    "FeatureCache",
    "JnanaCollator",
    "PixelImages",
    "RowPlan",
    "answers_as_keywords",
    "append_bad_samples",
    "check_image",
    "check_rows",
    "check_tokenizer",
    "conversation_rows",
    "flatten_conversations",
    "keywords",
    "load_image",
    "load_rows",
    "load_text",
    "message_text",
    "pack_blocks",
    "pack_documents",
    "packed_rows",
    "packed_stream",
    "plan_rows",
    "read_bad_samples",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "with_images",
]

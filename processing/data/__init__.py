"""From data sources to batches: reading, checking, planning, packing and collating rows; text corpora for stage 0."""

from .checks import CheckReport, check_rows
from .collator import JnanaCollator
from .counting import BatchCounts, CountedBatch, count_tensors
from .feature_cache import FeatureCache
from .images import MAX_IMAGE_PIXELS, check_image, image_size, load_image, thumbnail
from .keywords import answers_as_keywords, keywords
from .packing import IGNORED, RowPlan, plan_rows
from .paths import is_hub_id, names_local_path
from .pixels import PixelImages
from .prepare import packed_rows, packed_stream, prepare
from .prepared_rows import Prepared, PrepareOptions
from .readers import load_rows
from .records import read_json_lines
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
from .text_corpus import collate_documents, load_text, pack_blocks, pack_documents, train_tokenizer
from .tokenizer_checks import check_tokenizer, tokenizer_fingerprint
from .transcripts import StoredTranscripts


__all__ = [
    "IGNORED",
    "MAX_IMAGE_PIXELS",
    "ROW_FEATURES",
    "BadSampleError",
    "BatchCounts",
    "CheckReport",
    "CountedBatch",
    "FeatureCache",
    "JnanaCollator",
    "PixelImages",
    "PrepareOptions",
    "Prepared",
    "RowPlan",
    "StoredTranscripts",
    "answers_as_keywords",
    "append_bad_samples",
    "check_image",
    "check_rows",
    "check_tokenizer",
    "conversation_rows",
    "count_tensors",
    "flatten_conversations",
    "is_hub_id",
    "keywords",
    "image_size",
    "load_image",
    "load_rows",
    "load_text",
    "message_text",
    "names_local_path",
    "pack_blocks",
    "pack_documents",
    "collate_documents",
    "packed_rows",
    "packed_stream",
    "plan_rows",
    "prepare",
    "read_bad_samples",
    "read_json_lines",
    "thumbnail",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "with_images",
]

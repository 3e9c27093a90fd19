"""Turns people's data into model inputs: processor, chat templates, readers, checks, collator, text for stage 0."""

from .bad_samples import BadSampleError, append_bad_samples, read_bad_samples
from .chat_encoding_jnana import transcribe_chat
from .data_checks import CheckReport, check_rows
from .data_collator import JnanaCollator
from .data_readers import load_rows
from .data_rows import ROW_FEATURES, conversation_rows, flatten_conversations, with_images
from .feature_cache import FeatureCache
from .image_inputs import PixelImages
from .image_loading import MAX_IMAGE_PIXELS, check_image, load_image
from .keywords import answers_as_keywords, keywords
from .packing import IGNORED
from .processing_jnana import JnanaProcessor, add_jnana_tokens, chat_template_names, read_chat_template
from .recordings import Transcript, TranscriptionError
from .row_planning import RowPlan, packed_rows, packed_stream, plan_rows
from .stored_transcripts import StoredTranscripts
from .text_corpus import load_text, pack_blocks, train_tokenizer
from .text_rows import pack_documents
from .tokenizer_checks import check_tokenizer, tokenizer_fingerprint
from .transcription import Transcriber


__all__ = [
    "IGNORED",
    "MAX_IMAGE_PIXELS",
    "ROW_FEATURES",
    "BadSampleError",
    "CheckReport",
    "FeatureCache",
    "JnanaCollator",
    "JnanaProcessor",
    "PixelImages",
    "RowPlan",
    "StoredTranscripts",
    "Transcriber",
    "Transcript",
    "TranscriptionError",
    "add_jnana_tokens",
    "answers_as_keywords",
    "append_bad_samples",
    "chat_template_names",
    "check_image",
    "check_rows",
    "check_tokenizer",
    "conversation_rows",
    "flatten_conversations",
    "keywords",
    "load_image",
    "load_rows",
    "load_text",
    "pack_blocks",
    "pack_documents",
    "packed_rows",
    "packed_stream",
    "plan_rows",
    "read_bad_samples",
    "read_chat_template",
    "tokenizer_fingerprint",
    "train_tokenizer",
    "transcribe_chat",
    "with_images",
]

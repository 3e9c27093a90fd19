"""The model: an image encoder, a projector and a causal language model.

Importing this package registers Jnana with transformers' Auto classes in this process. A saved checkpoint contains a
copy of the `*_jnana.py` files, and registers nothing.
"""

if __name__ != "jnana.modeling":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.modeling instead")


from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
)

from .configuration_jnana import DOWNSAMPLING_PROJECTORS, PROJECTOR_FIELDS, RESIZING_TOWERS, JnanaConfig
from .idefics_jnana import IDEFICS_MODEL_TYPE, find_image_tokens, jnana_config_from_idefics
from .image_inputs_jnana import normalize_pixels
from .llava_jnana import LLAVA_MODEL_TYPES, jnana_config_from_llava
from .loading_jnana import (
    BASE_REFERENCE,
    BASE_REFERENCE_FORMAT,
    HUB_ARGUMENTS,
    REPOSITORY_ARGUMENTS,
    available_device,
    disable_packed_kernel,
    explain_missing_safetensors,
    grow_embeddings,
    held_dtype,
    load_adapter_base,
    load_base,
    model_type_of,
    quantization_config,
    quantized_weight_count,
    read_base_reference,
    weights_fingerprint,
)
from .modeling_jnana import (
    CACHE_NAME,
    JnanaForConditionalGeneration,
    JnanaModel,
    JnanaPreTrainedModel,
    JnanaWrongAutoClass,
)


AutoConfig.register("jnana", JnanaConfig, exist_ok=True)
AutoModel.register(JnanaConfig, JnanaModel, exist_ok=True)
AutoModelForImageTextToText.register(JnanaConfig, JnanaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(JnanaConfig, JnanaForConditionalGeneration, exist_ok=True)
AutoModelForPreTraining.register(JnanaConfig, JnanaForConditionalGeneration, exist_ok=True)
# Auto classes without a model of this kind: loading raises an error that names the right ones.
AutoModelForCausalLM.register(JnanaConfig, JnanaWrongAutoClass, exist_ok=True)
AutoModelForSequenceClassification.register(JnanaConfig, JnanaWrongAutoClass, exist_ok=True)

__all__ = [
    "BASE_REFERENCE",
    "BASE_REFERENCE_FORMAT",
    "CACHE_NAME",
    "DOWNSAMPLING_PROJECTORS",
    "HUB_ARGUMENTS",
    "IDEFICS_MODEL_TYPE",
    "LLAVA_MODEL_TYPES",
    "PROJECTOR_FIELDS",
    "REPOSITORY_ARGUMENTS",
    "RESIZING_TOWERS",
    "JnanaConfig",
    "JnanaForConditionalGeneration",
    "JnanaModel",
    "JnanaPreTrainedModel",
    "available_device",
    "disable_packed_kernel",
    "explain_missing_safetensors",
    "find_image_tokens",
    "grow_embeddings",
    "held_dtype",
    "jnana_config_from_idefics",
    "jnana_config_from_llava",
    "load_adapter_base",
    "load_base",
    "model_type_of",
    "normalize_pixels",
    "quantization_config",
    "quantized_weight_count",
    "read_base_reference",
    "weights_fingerprint",
]

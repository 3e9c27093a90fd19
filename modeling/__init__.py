"""The model: an image encoder, a projector and a causal language model. Torch modules and configs only, no file
formats.

Importing it registers Jnana with transformers' Auto classes in this process; saved folders carry their own code
instead.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

from .configuration_jnana import RESIZING_TOWERS, JnanaConfig
from .modeling_jnana import JnanaForConditionalGeneration, JnanaModel, JnanaPreTrainedModel


AutoConfig.register("jnana", JnanaConfig, exist_ok=True)
AutoModel.register(JnanaConfig, JnanaModel, exist_ok=True)
AutoModelForImageTextToText.register(JnanaConfig, JnanaForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(JnanaConfig, JnanaForConditionalGeneration, exist_ok=True)

__all__ = [
    "RESIZING_TOWERS",
    "JnanaConfig",
    "JnanaForConditionalGeneration",
    "JnanaModel",
    "JnanaPreTrainedModel",
]

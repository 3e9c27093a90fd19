"""What the scripts share: arguments, stages, loading, checks, callbacks, checkpoints and the model card.

Importing it registers the processor with `AutoProcessor` in this process. It happens here because the registration
needs the config and the processor, and `modeling` and `processing` don't know each other.
"""

from transformers import AutoProcessor

from modeling import JnanaConfig
from processing import JnanaProcessor


AutoProcessor.register(JnanaConfig, JnanaProcessor, exist_ok=True)

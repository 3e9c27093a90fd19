"""Imported once by the server process of `forked.py`: loads a model, which is slow the first time.

tqdm's own lock lies in memory that forked processes share: a process that is killed while it draws a progress bar
would stop all that are forked after it, at their first bar. Here it is a lock of each process, and no thread of tqdm's
runs, which could hold it while another process forks.
"""

import contextlib
import io
import tempfile
import threading
from pathlib import Path

from peft import get_peft_model  # noqa: F401
from PIL import Image
from tqdm import tqdm

from jnana import run_align, run_pretrain, run_sft  # noqa: F401
from jnana.training.model_setup import prepare_model, prepare_processor
from jnana.training.monitoring import LossCurveCallback
from jnana.training.options.arguments import ModelArguments
from tests.tiny import save_tiny_text, save_tiny_vision


tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
    vision, text = save_tiny_vision(Path(folder) / "vision", "clip_full"), save_tiny_text(Path(folder) / "text")
    arguments = ModelArguments(vision_model=str(vision), text_model=str(text))
    prepare_model(arguments, prepare_processor(arguments))
Image.init()

# Half of a tiny run's time would go into drawing its loss curve at every save; other tests look at that.
LossCurveCallback.on_save = lambda *args, **kwargs: None

"""Writes a trained model in the formats of other programs, and compares the answers before anything is kept.

`run_export.py` calls [`export_model`]:

```python
from jnana.export import ExportOptions, export_model

report = export_model("outputs/sft/merged", "outputs/llava", ExportOptions(to="llava"))
```
"""

if __name__ != "jnana.export":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.export instead")


from .comparison import Agreement, ExportFailedError, probe_chats
from .distillation import Distillation, distil_projector
from .llama_cpp import check_fits_llama_cpp
from .llava import check_fits_llava
from .onnx_graphs import check_fits_onnx
from .run import ExportOptions, export_model


__all__ = [
    "Agreement",
    "Distillation",
    "ExportFailedError",
    "ExportOptions",
    "check_fits_llama_cpp",
    "check_fits_llava",
    "check_fits_onnx",
    "distil_projector",
    "export_model",
    "probe_chats",
]

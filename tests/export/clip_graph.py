"""llama.cpp's graph for LLaVA (tools/mtmd: clip.cpp, models/llava.cpp) read in numpy, from the file alone.

Nothing of this project is imported. The order of the class token is a parameter, because the graph puts it behind the
patches while positions (0, 1, 2, ...) and gathered rows (1, 2, ...) take it to be the first (report 25814).
"""

from pathlib import Path

import gguf
import numpy as np


def norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def ggml_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(0.79788456080286535587989211986876 * x * (1 + 0.044715 * x * x)))


def ggml_gelu_quick(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


def ggml_silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class ClipGraph:
    """A file, and the features `(patches, width)` that llama.cpp computes for one image with it."""

    def __init__(self, path: Path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: field.contents() for name, field in reader.fields.items()}
        # GGUF counts dimensions from the fastest; the arrays have rows of outputs, as in `y = W x`
        self.tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
        assert self.fields["general.architecture"] == "clip" and self.fields["clip.has_vision_encoder"]
        assert self.fields["clip.projector_type"] == "mlp"

    def hparam(self, name: str):
        return self.fields[f"clip.vision.{name}"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.tensors[f"{name}.weight"].T
        bias = self.tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def ffn_op(self, x: np.ndarray) -> np.ndarray:
        if self.fields.get("clip.use_gelu"):
            return ggml_gelu(x)
        return ggml_silu(x) if self.fields.get("clip.use_silu") else ggml_gelu_quick(x)

    def attention(self, prefix: str, x: np.ndarray) -> np.ndarray:
        heads, width = self.hparam("attention.head_count"), x.shape[-1]
        q, k, v = (
            self.linear(f"{prefix}.attn_{name}", x).reshape(len(x), heads, width // heads).transpose(1, 0, 2)
            for name in "qkv"
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(width // heads)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        return self.linear(f"{prefix}.attn_out", mixed.transpose(1, 0, 2).reshape(len(x), width))

    def __call__(self, pixels: np.ndarray, class_token: str = "first") -> np.ndarray:
        eps, size = self.hparam("attention.layer_norm_epsilon"), self.hparam("patch_size")
        kernel = self.tensors["v.patch_embd.weight"]
        channels, height, width = pixels.shape
        assert height == width == self.hparam("image_size")  # "only square images supported"
        patches = pixels.astype(np.float64).reshape(channels, height // size, size, width // size, size)
        patches = patches.transpose(1, 3, 0, 2, 4).reshape(-1, channels * size * size)
        x = patches @ kernel.reshape(len(kernel), -1).T
        if "v.patch_embd.bias" in self.tensors:
            x = x + self.tensors["v.patch_embd.bias"]
        count = len(x)
        has_class = "v.class_embd" in self.tensors
        if has_class:
            token = self.tensors["v.class_embd"].reshape(1, -1)
            x = np.concatenate([token, x] if class_token == "first" else [x, token])
        x = x + self.tensors["v.position_embd.weight"][np.arange(len(x))]
        if "v.pre_ln.weight" in self.tensors:
            x = norm(x, self.tensors["v.pre_ln.weight"], self.tensors["v.pre_ln.bias"], eps)

        chosen = self.fields.get("clip.vision.feature_layer")
        chosen = set() if chosen is None else set(chosen)
        deepest = max(chosen, default=-1)
        last = self.hparam("block_count") - 1 if deepest < 0 else deepest
        stack = []
        for layer in range(last):
            if layer in chosen:
                stack.append(x)
            prefix = f"v.blk.{layer}"
            y = norm(x, self.tensors[f"{prefix}.ln1.weight"], self.tensors[f"{prefix}.ln1.bias"], eps)
            x = x + self.attention(prefix, y)
            y = norm(x, self.tensors[f"{prefix}.ln2.weight"], self.tensors[f"{prefix}.ln2.bias"], eps)
            up, down = f"{prefix}.ffn_up", f"{prefix}.ffn_down"
            if self.tensors[f"{down}.weight"].shape[1] == self.hparam("embedding_length"):
                up, down = down, up  # what llama.cpp does to older files
            x = x + self.linear(down, self.ffn_op(self.linear(up, y)))
        if "v.post_ln.weight" in self.tensors:
            x = norm(x, self.tensors["v.post_ln.weight"], self.tensors["v.post_ln.bias"], eps)
        if last in chosen:
            stack.append(x)
        x = np.concatenate(stack, axis=-1) if stack else x
        x = x[np.arange(count) + has_class]
        x = ggml_gelu(x @ self.tensors["mm.0.weight"].T + self.tensors["mm.0.bias"])
        return x @ self.tensors["mm.2.weight"].T + self.tensors["mm.2.bias"]

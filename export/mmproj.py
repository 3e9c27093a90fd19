"""`mmproj.gguf`: vision tower and projector as llama.cpp's graph for LLaVA reads them (tools/mtmd, autumn 2026).

What that graph computes: patches, class token, positions, `v.pre_ln` where it exists, the layers up to the deepest of
`clip.vision.feature_layer`, `v.post_ln` where it exists, the vectors of the patches, then `mm.0`, always a GELU of the
tanh form, and `mm.2`. So the tower's own last norm is left out, and its place is free for a LayerNorm in front of the
projector.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from jnana.modeling import JnanaConfig


TANH_GELUS = ("gelu_pytorch_tanh", "gelu_new", "gelu_accurate", "gelu_fast")
# `hidden_act` of a tower -> the flags of llama.cpp; without a flag it computes the quick GELU
TOWER_FLAGS = {"quick_gelu": None, "silu": "use_silu", "gelu": "use_gelu", **dict.fromkeys(TANH_GELUS, "use_gelu")}

# Tensor names: those of transformers' CLIP and SigLIP, and those of llama.cpp
NAMES = {
    "embeddings.class_embedding": "v.class_embd",
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)")


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a weight of a CLIP or SigLIP tower; `None` if its graph has no place for it."""
    name = name.removeprefix("vision_model.")
    if name in NAMES:
        return NAMES[name]
    module, _, kind = name.rpartition(".")
    layer = LAYER.fullmatch(module)
    if layer is not None:
        return f"v.blk.{layer[1]}.{NAMES[layer[2]]}.{kind}" if layer[2] in NAMES else None
    return f"{NAMES[module]}.{kind}" if module in NAMES else None


def feature_layers(config: JnanaConfig) -> list[int]:
    """The selected hidden states, counted from 0 (the input of the first layer), in the config's order."""
    layers = config.vision_feature_layer
    states = config.vision_config.num_hidden_layers + 1
    return [layer % states for layer in ([layers] if isinstance(layers, int) else layers)]


@torch.no_grad()
def projector_tensors(projector: Any, config: JnanaConfig) -> dict[str, torch.Tensor]:
    """
    `mm.0`, `mm.2` and, for a LayerNorm in front, `v.post_ln`.

    A linear layer becomes `[I, -I] gelu([W; -W] x + [b; -b])`, as gelu(z) - gelu(-z) = z. llama.cpp joins several
    feature layers from the lowest to the highest, so the columns of `mm.0` go in that order.
    """
    if config.projector_type == "linear":
        layer = projector.linear
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
        identity = torch.eye(layer.out_features, device=bias.device, dtype=bias.dtype)
        tensors = {
            "mm.0.weight": torch.cat([layer.weight, -layer.weight]),
            "mm.0.bias": torch.cat([bias, -bias]),
            "mm.2.weight": torch.cat([identity, -identity], dim=1),
            "mm.2.bias": torch.zeros_like(bias),
        }
    else:
        tensors = {}
        for number, layer in ((0, projector.linear_1), (2, projector.linear_2)):
            bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
            tensors |= {f"mm.{number}.weight": layer.weight, f"mm.{number}.bias": bias}
        if config.projector_layer_norm:
            tensors |= {"v.post_ln.weight": projector.layer_norm.weight, "v.post_ln.bias": projector.layer_norm.bias}
    layers = feature_layers(config)
    order = sorted(range(len(layers)), key=lambda index: layers[index])
    columns = tensors["mm.0.weight"].chunk(len(layers), dim=1)
    tensors["mm.0.weight"] = torch.cat([columns[index] for index in order], dim=1)
    return tensors


def write_mmproj(path: Path, model: Any, processor: Any, name: str) -> None:
    """
    Write vision tower and projector in 32 bits.

    Args:
        path (`Path`): The file.
        model ([`JnanaForConditionalGeneration`]): Its config fits ([`check_fits_llama_cpp`]).
        processor ([`JnanaProcessor`]): Its image processor's mean and standard deviation are written.
        name (`str`): The model's name.
    """
    import gguf

    config, vision = model.config, model.config.vision_config
    layers = feature_layers(config)
    blocks = max(1, *layers)  # the layers behind the deepest selected one are never computed
    writer = gguf.GGUFWriter(path, arch="clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_image_size(config.image_height_and_width[0])
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(blocks)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_image_mean([float(value) for value in processor.image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_processor.image_std])
    writer.add_array("clip.vision.feature_layer", sorted(layers))
    for flag in ("use_gelu", "use_silu"):
        writer.add_bool(f"clip.{flag}", TOWER_FLAGS[vision.hidden_act] == flag)
    tensors = projector_tensors(model.model.multi_modal_projector, config)
    for weight_name, weight in model.model.vision_tower.state_dict().items():
        own = gguf_name(weight_name)
        if own is not None and not (own.startswith("v.blk.") and int(own.split(".")[2]) >= blocks):
            tensors[own] = weight
    for weight_name, weight in sorted(tensors.items()):
        writer.add_tensor(weight_name, np.ascontiguousarray(weight.detach().float().cpu().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class MmprojEncoder(nn.Module):
    """
    The tower and projector that a file holds, computed by transformers' tower as llama.cpp's graph is meant to.

    Args:
        path (`Path`): As [`write_mmproj`] writes it.
        config ([`JnanaConfig`]): Names the tower's class; all sizes and settings are read from the file.
    """

    def __init__(self, path: Path, config: JnanaConfig):
        super().__init__()
        import gguf

        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
        flags = [flag for flag in ("use_gelu", "use_silu") if fields[f"clip.{flag}"]]
        acts = {"use_gelu": "gelu_pytorch_tanh", "use_silu": "silu"}
        settings = {
            "image_size": fields["clip.vision.image_size"],
            "patch_size": fields["clip.vision.patch_size"],
            "hidden_size": fields["clip.vision.embedding_length"],
            "intermediate_size": fields["clip.vision.feed_forward_length"],
            "num_hidden_layers": fields["clip.vision.block_count"],
            "num_attention_heads": fields["clip.vision.attention.head_count"],
            "layer_norm_eps": fields["clip.vision.attention.layer_norm_epsilon"],
            "hidden_act": acts[flags[0]] if flags else "quick_gelu",
        }
        self.layers = list(fields["clip.vision.feature_layer"])
        self.eps = settings["layer_norm_eps"]
        self.has_class_token = "v.class_embd" in tensors
        self.tower: PreTrainedModel = AutoModel.from_config(type(config.vision_config)(**settings)).eval()
        state = self.tower.state_dict()
        known = {name: gguf_name(name) for name in state}
        state |= {name: tensors[own] for name, own in known.items() if own is not None}
        self.tower.load_state_dict(state)
        self.tensors = {name: tensor for name, tensor in tensors.items() if name[:3] == "mm." or "post_ln" in name}

    @torch.inference_mode()
    def forward(self, pixel_values: torch.Tensor, class_token_last: bool = False) -> torch.Tensor:
        """
        Projected features `(num_images, num_patches, hidden_size)`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): Square images, normalised.
            class_token_last (`bool`): As llama.cpp has it since a refactoring (its report 25814): the class token
                stands behind the patches, while positions and the rows that are gathered take it to be the first. So
                each patch gets the position of the one before it, the class token that of the last patch, and the
                vectors are those of all patches but the first, and of the class token.
        """
        embedding = next(m for n, m in self.tower.named_modules() if n.endswith("embeddings.position_embedding"))
        shifted = class_token_last and self.has_class_token
        if shifted:
            embedding.weight.data = embedding.weight.data.roll(1, 0)
        states = self.tower(pixel_values.float(), output_hidden_states=True).hidden_states
        if shifted:
            embedding.weight.data = embedding.weight.data.roll(-1, 0)
        features = torch.cat([states[layer] for layer in self.layers], dim=-1)
        if self.has_class_token:
            features = torch.cat([features[:, 2:], features[:, :1]], dim=1) if shifted else features[:, 1:]
        if "v.post_ln.weight" in self.tensors:
            weight, bias = self.tensors["v.post_ln.weight"], self.tensors["v.post_ln.bias"]
            features = nn.functional.layer_norm(features, weight.shape, weight, bias, self.eps)
        hidden = features @ self.tensors["mm.0.weight"].T + self.tensors["mm.0.bias"]
        hidden = nn.functional.gelu(hidden, approximate="tanh")
        return hidden @ self.tensors["mm.2.weight"].T + self.tensors["mm.2.bias"]

"""What no export can hold: refused before anything is written, with the reason and the nearest way."""

from typing import NoReturn

from jnana.modeling import JnanaConfig


NEAREST_AS_IT_IS = "serve the model as it is (transformers with trust_remote_code, vLLM's transformers backend)"
NEAREST_IN_TRANSFORMERS = "serve it by transformers with trust_remote_code"  # vLLM's backend gives no image to layers

# Why a projector type fits neither LLaVA's classes nor llama.cpp's graph, and what to do
PROJECTOR_REASONS = {
    "resblock": (
        "has residual blocks with norms of their own",
        "fit an mlp to it with --distill true --train_data ...",
    ),
    "pixel_shuffle": ("joins neighbouring patches", "train one of type mlp"),
    "avg_pool": ("averages neighbouring patches", "train one of type mlp"),
    "perceiver": ("is a resampler that attends to the patches", "train one of type mlp"),
}


def refuse(reason: str, nearest: str) -> NoReturn:
    """Raise `ValueError` with a reason and the nearest way."""
    raise ValueError(f"this model can't be exported: {reason}. Nearest: {nearest}.")


def check_fusion(config: JnanaConfig, target: str) -> None:
    """
    Refuse layers of a language model that attend to images.

    Args:
        config ([`JnanaConfig`]): The model's.
        target (`str`): The name of what can't hold it, for the message.
    """
    if config.fusion == "cross_attention":
        refuse(
            f"with fusion: cross_attention the layers of the language model attend to images, and {target} knows "
            "images as tokens only",
            f"train with fusion: tokens, or {NEAREST_IN_TRANSFORMERS}",
        )


def check_projector(config: JnanaConfig, target: str, distill: bool) -> None:
    """
    Refuse what neither LLaVA's classes nor llama.cpp have a place for.

    Args:
        config ([`JnanaConfig`]): The model's.
        target (`str`): The name of what can't hold it, for the message.
        distill (`bool`): Whether a `resblock` projector will be replaced by an `mlp`.
    """
    check_fusion(config, target)
    if distill and config.projector_type != "resblock":
        refuse(
            f"distill replaces a projector of type resblock, and this one is of type {config.projector_type!r}",
            "leave distill out",
        )
    if config.projector_type in PROJECTOR_REASONS and not distill:
        reason, nearest = PROJECTOR_REASONS[config.projector_type]
        refuse(
            f"the projector of type {config.projector_type!r} {reason}, and {target}'s is one or two linear layers",
            f"{nearest}, or {NEAREST_AS_IT_IS}",
        )
    if config.vision_feature_select_strategy == "pooled":
        refuse(
            f"vision_feature_select_strategy is 'pooled' (one vector an image), and {target} takes the vectors of the "
            "patches",
            f"train with vision_feature_select_strategy: default, or {NEAREST_AS_IT_IS}",
        )

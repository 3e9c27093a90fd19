"""The part of lmms-eval 0.7.3 that its models touch, for machines where it is not installed."""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


class CacheHook:
    def add_partial(self, attr, req, res) -> None:
        pass


class lmms:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None):
        given = dict(pair.split("=", 1) for pair in arg_string.split(",") if pair)
        return cls(**given, **{name: value for name, value in (additional_config or {}).items() if value is not None})


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)

    @property
    def args(self) -> tuple:
        return self.arguments


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def install(monkeypatch) -> None:
    """Make its modules importable for the length of a test."""
    contents: dict[str, list[type]] = {
        "api.instance": [GenerationResult, Instance, TokenCounts],
        "api.model": [lmms],
        "models.registry_v2": [ModelManifest],
    }
    for name in ("", "api", "models", *contents):
        module = ModuleType(f"lmms_eval.{name}".rstrip("."))
        for kind in contents.get(name, []):
            setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, module.__name__, module)

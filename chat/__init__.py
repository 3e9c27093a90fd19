"""Chat with a model: a session that keeps its cache between turns, and the page around it."""

if __name__ != "jnana.chat":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.chat instead")


from .session import ChatSession, ContextFullError, Turn


__all__ = ["ChatSession", "ContextFullError", "Turn"]

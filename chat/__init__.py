"""Talking to a model: a session that keeps what was read, the limits of an open door, the page."""

if __name__ != "jnana.chat":  # a second copy of every class would be registered
    raise ImportError(f"{__name__!r} is part of the package jnana; import jnana.chat instead")


from .session import ChatSession, ContextFullError, Turn


__all__ = ["ChatSession", "ContextFullError", "Turn"]

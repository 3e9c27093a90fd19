"""Talking to a model: a session that keeps what was read, the limits of an open door, the page."""

from .session import ChatSession, ContextFullError, Turn


__all__ = ["ChatSession", "ContextFullError", "Turn"]

"""The arguments that the program was started with: reports say how they are made again."""

from contextvars import ContextVar

ASKED: ContextVar[tuple[str, ...]] = ContextVar("asked", default=())

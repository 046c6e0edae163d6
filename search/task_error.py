"""A model, data or weights that the user named and that cannot be used."""

from __future__ import annotations

from .errors import UserError


class TaskError(UserError, ValueError):
    """One line that names the thing, its value, what is allowed, and what to do next."""

"""URLs of a Redis for one of its ACL users."""

from __future__ import annotations


def as_user(url: str, user: str, password: str = "") -> str:
    """The same Redis, signed in as this user."""
    login = f"{user}:{password}" if password else user
    return url.replace("://", f"://{login}@", 1)

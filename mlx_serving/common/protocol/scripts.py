"""The protocol's Lua scripts, as texts ready to register.

A script is the generated names of keys and fields, then ``quarantine.lua``, ``tenants.lua`` and
``prelude.lua``, then its own file, before some of them also ``losses.lua`` or ``affinity.lua``.
Redis caches it by hash, so the length costs nothing after the first call.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from mlx_serving.common.protocol.fields import lua_tables
from mlx_serving.common.protocol.keys import Keys

NAMES = (
    "enqueue", "claim", "commit", "renew", "release", "cancel", "reap", "reconcile", "crash",
    "audit", "forget", "requeue", "mend", "pardon",
)  # fmt: skip
_SHARED = ("quarantine", "tenants", "prelude")
_LOSSES = ("losses",)
_BEFORE = {
    "claim": ("losses", "affinity"),
    "reap": _LOSSES,
    "commit": _LOSSES,
    "renew": _LOSSES,
    "release": _LOSSES,
    "crash": _LOSSES,
}  # parts of some scripts alone
# With flags Redis refuses a script before its first write where it could not end it: on a Cluster,
# a replica, a full memory or a disk that fails. Without, it stops at the first write that it can't
# do, which on a Cluster comes after others.
_FLAGS = {"enqueue": "#!lua flags=no-cluster\n"}


@cache
def script_text(name: str) -> str:
    """Whole text of one script.

    Raises:
        KeyError: there is no script of that name.
    """
    if name not in NAMES:
        raise KeyError(name)
    folder = files("mlx_serving.common") / "lua"
    names = (*_SHARED, *_BEFORE.get(name, ()), name)
    parts = [(folder / f"{part}.lua").read_text(encoding="utf-8") for part in names]
    script = "".join(parts)
    return _FLAGS.get(name, "") + Keys().lua_functions(script) + lua_tables() + script

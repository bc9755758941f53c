"""The protocol's Lua scripts, as texts ready to register.

A script is the generated names of keys and fields, then ``tenants.lua`` and ``prelude.lua``, then
its own file (before ``claim.lua`` also ``affinity.lua`` and ``shares.lua``). Redis caches it by
hash, so the length costs nothing after the first call.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

from mlx_serving.common.protocol.fields import lua_tables
from mlx_serving.common.protocol.keys import Keys

NAMES = (
    "enqueue", "claim", "commit", "renew", "release", "cancel", "reap", "reconcile", "crash",
    "audit",
)  # fmt: skip
_SHARED = ("tenants", "prelude")
_BEFORE = {"claim": ("affinity", "shares")}  # parts of one script alone


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
    text = lua_tables() + "".join(parts)
    # Lua has room for 200 local names: a script gets those of the keys that it uses.
    used = set(re.findall(r"\bk_(\w+)", text))
    return Keys().lua_functions(used) + text

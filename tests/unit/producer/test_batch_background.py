"""How a background runner gets its settings: whole, and on no command line."""

from __future__ import annotations

import msgspec
from pydantic import SecretStr

from mlx_serving.common.settings import load_settings
from mlx_serving.producer.batch.background import encode_settings


def test_settings_arrive_as_they_were() -> None:
    settings = load_settings(
        redis__url="rediss://user:secret@host:6380/2",
        redis__by_model={"large": SecretStr("redis://other:6379")},
        sentinel__hosts=("a:1", "b:2"),
        jobs__signing_keys=("k" * 32,),
        models={"mine": "/models/mine"},
        worker__lease_seconds=7.5,
        metrics__port=None,
    )
    sent = encode_settings(settings)
    assert load_settings(**msgspec.json.decode(sent)) == settings
    assert b"secret" in sent

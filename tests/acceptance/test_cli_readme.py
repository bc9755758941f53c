"""The README's web backend, run as it stands."""

import re
import subprocess
import sys
from typing import Any

import httpx
import pytest

from mlx_serving.common.protocol.keys import Keys
from mlx_serving.common.redis.local import LocalRedis
from tests.support.helpers import wait_until
from tests.support.paths import ROOT


def _start_worker() -> subprocess.Popen[bytes]:
    """256 tokens take half a second."""
    command = [sys.executable, "-m", "mlx_serving", "worker", "--name", "w"]
    return subprocess.Popen(
        [*command, "--engine", "simulated", "--tokens-per-second", "500"], cwd=ROOT
    )


async def test_the_ten_lines_of_the_readme_stream_an_answer(
    local_redis: LocalRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.setenv("MLX_SERVING_REDIS_URL", local_redis.url)
    worker = _start_worker()
    try:
        with local_redis.client() as client:
            wait_until(lambda: client.exists(Keys().worker("w")), timeout=30, what="a worker")
        names: dict[str, Any] = {}
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 -- our own README
        transport = httpx.ASGITransport(names["app"])
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as browser:
            answer = await browser.get("/ask", params={"q": "hello"})
        await names["client"].aclose()
        worker.terminate()
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()
    assert answer.status_code == 200
    assert answer.text

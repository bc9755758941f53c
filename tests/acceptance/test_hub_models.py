"""Models of a hub, from a small one over HTTP: pinned, whole, once, and with a clear error."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from mlx_serving.cli.doctor.engine import check_model
from mlx_serving.cli.main import app
from mlx_serving.cli.models import found_path
from mlx_serving.cli.worker import model_path
from mlx_serving.common.errors import UnknownModel
from mlx_serving.common.settings import TALLY_PATH, load_settings
from mlx_serving.worker.engine import model_hub as hub_module
from mlx_serving.worker.engine.model_files import ModelFilesError
from mlx_serving.worker.engine.model_hub import Hub, HubModel, download, hub_model, local_folder
from tests.support.hub_server import COMMIT, FakeHub, model_at

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPO = "org/tally"
MODEL = HubModel(REPO, COMMIT)
CLOSED = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub(REPO, model_at(TALLY_PATH)) as made:
        yield made


@pytest.fixture
def hub(server: FakeHub, tmp_path: Path) -> Hub:
    return Hub(server.endpoint, tmp_path / "cache")


def test_a_path_is_no_model_of_a_hub() -> None:
    assert hub_model("org/name@main") == HubModel("org/name", "main")
    for path in ("/models/qwen", "./org/name@main", "org/name", "~/a/b@c", "a/b/c@d"):
        assert hub_model(path) is None


def test_only_what_may_be_loaded_is_downloaded_and_once(server: FakeHub, hub: Hub) -> None:
    said: list[str] = []
    assert local_folder(MODEL, hub) is None
    folder = download(MODEL, hub, said.append)
    assert {file.name for file in folder.iterdir()} == {f.name for f in TALLY_PATH.iterdir()} & {
        *hub_module._OTHERS, "model.safetensors",
    }  # fmt: skip
    assert server.gets[-1] == "config.json"
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert any("model.safetensors" in line and "MB (1 of" in line for line in said)
    asked = len(server.gets)
    assert download(MODEL, hub, said.append) == folder == local_folder(MODEL, hub)
    assert len(server.gets) == asked


def test_a_download_that_broke_off_goes_on_with_what_is_missing(server: FakeHub, hub: Hub) -> None:
    server.cut = {"tokenizer.json"}
    with pytest.raises(ModelFilesError, match=rf"^{REPO}@{COMMIT}: 127\.0\.0\.1:\d+ answered 503"):
        download(MODEL, hub, print)
    assert local_folder(MODEL, hub) is None, "it is not whole"
    server.cut = set()
    server.gets.clear()
    download(MODEL, hub, print)
    assert "model.safetensors" not in server.gets, "it was there already"


def test_two_processes_that_ask_at_once_download_once(server: FakeHub, hub: Hub) -> None:
    code = (
        "import sys; from pathlib import Path; from mlx_serving.worker.engine.model_hub import *;"
        "print(download(HubModel(*sys.argv[1:3]), Hub(sys.argv[3], Path(sys.argv[4])), print))"
    )
    command = [sys.executable, "-c", code, REPO, COMMIT, server.endpoint, str(hub.cache)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [one.communicate(timeout=60)[0].splitlines()[-1] for one in both]
    assert answers == [str(local_folder(MODEL, hub))] * 2
    assert sorted(server.gets) == sorted(set(server.gets)), "no file was fetched twice"


def test_a_shard_that_the_index_names_has_to_be_there(server: FakeHub, hub: Hub) -> None:
    server.files["model.safetensors.index.json"] = (
        b'{"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}'
    )
    with pytest.raises(ModelFilesError, match=r"model-00002\.safetensors is named in"):
        download(MODEL, hub, print)
    assert local_folder(MODEL, hub) is None


@pytest.mark.parametrize(
    ("gone", "reason"),
    [("model.safetensors", r"has no model\*\.safetensors"), ("config.json", "has no config.json")],
)
def test_what_could_not_be_loaded_is_not_downloaded(
    server: FakeHub, hub: Hub, gone: str, reason: str
) -> None:
    del server.files[gone]
    with pytest.raises(ModelFilesError, match=reason):
        download(MODEL, hub, print)
    assert server.gets == []


def test_a_config_that_names_code_is_refused_after_the_download(server: FakeHub, hub: Hub) -> None:
    server.files["config.json"] = b'{"model_type": "qwen3", "auto_map": {"AutoModel": "evil.py"}}'
    with pytest.raises(ModelFilesError, match="auto_map names code"):
        download(MODEL, hub, print)


def test_a_model_larger_than_the_disk_is_refused_before_its_first_byte(
    server: FakeHub, hub: Hub
) -> None:
    server.claimed = {"model.safetensors": 10**15}
    with pytest.raises(ModelFilesError, match=r"needs 1000000\.0 GB and 1 GB to spare, .* free"):
        download(MODEL, hub, print)
    assert server.gets == []


def test_errors_name_the_model_and_the_host(server: FakeHub, hub: Hub) -> None:
    cases = [
        (HubModel(REPO, "f" * 40), hub, "has no such revision"),
        (HubModel("org/other", COMMIT), hub, "has no such model"),
        (MODEL, Hub(CLOSED, hub.cache), r"127\.0\.0\.1:9 can't be reached \(ConnectError\)"),
        (HubModel(REPO, "main"), hub, "'main' is a branch or a tag"),
    ]
    for model, asked, reason in cases:
        with pytest.raises(ModelFilesError, match=reason) as raised:
            download(model, asked, print)
        assert str(raised.value).startswith(f"{model}: ")
    assert server.gets == []


def settings(monkeypatch: pytest.MonkeyPatch, hub: Hub, revision: str, endpoint: str = "") -> None:
    monkeypatch.setenv("MLX_SERVING_MODELS", f'{{"t": "{REPO}@{revision}"}}')
    used = Hub(endpoint or hub.endpoint, hub.cache)
    monkeypatch.setattr(hub_module, "Hub", lambda: used)


def test_the_command_line_asks_the_hub_that_the_environment_names(hub: Hub) -> None:
    """huggingface_hub reads its own variables, when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": str(hub.endpoint), "HF_HUB_CACHE": str(hub.cache), "HF_HUB_OFFLINE": "0",
        "MLX_SERVING_MODELS": f'{{"t": "{REPO}@{COMMIT}"}}',
    }  # fmt: skip
    command = [sys.executable, "-m", "mlx_serving", "models", "pull", "t"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert local_folder(MODEL, hub) is not None


def test_pull_downloads_and_the_list_says_what_is_here(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(monkeypatch, hub, COMMIT)
    runner = CliRunner()
    before = runner.invoke(app, ["models", "t", "--json"])
    assert "not downloaded, or not completely: mlx-serving models pull t" in before.output
    pulled = runner.invoke(app, ["models", "pull", "t"])
    assert pulled.exit_code == 0, pulled.output
    assert "ready" in pulled.output
    assert "ready" in runner.invoke(app, ["models", "t"]).output
    assert runner.invoke(app, ["models", "t", "u"]).exit_code != 0
    assert "not an alias" in runner.invoke(app, ["models", "pull", "u"]).output


def test_pull_of_a_branch_says_which_commit_to_write(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(monkeypatch, hub, "main")
    result = CliRunner().invoke(app, ["models", "pull", "t"])
    assert result.exit_code == 1
    assert f"models.t: {REPO}@main is not pinned; it is {REPO}@{COMMIT} now" in result.output


def test_a_worker_and_the_doctor_find_the_model_or_say_why_not(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(monkeypatch, hub, COMMIT, CLOSED)
    refused = load_settings()
    with pytest.raises(UnknownModel, match=rf"models\.t: {REPO}@{COMMIT}: can't be downloaded"):
        model_path(refused, "t")
    found = check_model(refused, "t")
    assert (found.level.value, "models pull t" in found.detail) == ("fail", True)
    settings(monkeypatch, hub, COMMIT)
    reached = load_settings()
    assert model_path(reached, "t") == found_path(f"{REPO}@{COMMIT}")

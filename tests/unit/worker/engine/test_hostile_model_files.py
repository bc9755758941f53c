"""Model folders that a hostile hand packed: nothing outside is read, nothing in them is run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from mlx_serving.worker.engine.model_files import ModelFilesError, check_model_files

if TYPE_CHECKING:
    from pathlib import Path

HEADER = b"{}".ljust(8)
SAFETENSORS = len(HEADER).to_bytes(8, "little") + HEADER


def fill(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(SAFETENSORS)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "model")


def test_a_plain_folder_is_accepted(folder: Path) -> None:
    check_model_files(folder)


def test_a_link_to_the_folder_itself_is_accepted(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    check_model_files(tmp_path / "alias")


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors",
        "chat_template.jinja",
    ],
)  # fmt: skip
@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "../../x/secret", "."])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str, target: str) -> None:
    (folder.parent / "secret").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(target)
    if target == ".":  # inside, but no file
        if name in {"config.json", "tokenizer.json"}:
            with pytest.raises(ModelFilesError, match=f"{name}: missing"):
                check_model_files(folder)
        return
    with pytest.raises(ModelFilesError, match=name.replace(".", r"\.")) as refusal:
        check_model_files(folder)
    assert "{}" not in str(refusal.value)


def test_a_chain_of_links_is_followed_to_its_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("../secret")
    with pytest.raises(ModelFilesError, match=r"^a: links to a file outside of"):
        check_model_files(folder)


def test_a_snapshot_of_the_hubs_cache_is_accepted_and_another_models_blob_is_not(
    tmp_path: Path,
) -> None:
    model = tmp_path / "models--org--name"
    snapshot = fill(model / "snapshots" / "abc")
    (model / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(model / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    check_model_files(snapshot)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "9").write_bytes(SAFETENSORS)
    (snapshot / "model-2.safetensors").symlink_to("../../../models--org--other/blobs/9")
    with pytest.raises(ModelFilesError, match=r"^model-2\.safetensors: links to a file outside of"):
        check_model_files(snapshot)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "ckpt", "pkl", "npz"])
def test_pickles_alone_are_refused_and_beside_safetensors_never_read(
    folder: Path, suffix: str
) -> None:
    pickle = folder / f"pytorch_model.{suffix}"
    pickle.write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    check_model_files(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFilesError, match=rf"pytorch_model\.{suffix} is not loaded"):
        check_model_files(folder)


@pytest.mark.parametrize("key", ["auto_map", "model_file", "custom_pipelines"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("value", [{"AutoModel": "evil.Model"}, "evil.py", ["x"], {"a": ""}])
def test_a_config_that_names_code_is_refused(
    folder: Path, key: str, file: str, value: object
) -> None:
    (folder / file).write_text(json.dumps({key: value}))
    with pytest.raises(ModelFilesError, match=f"{key} names code"):
        check_model_files(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_30_000_deep_config_is_refused(folder: Path, file: str) -> None:
    (folder / file).write_text('{"a":' * 30_000 + "1" + "}" * 30_000)
    with pytest.raises(ModelFilesError, match="is not a JSON object"):
        check_model_files(folder)

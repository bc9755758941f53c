"""Loading a model folder: what is refused, what identifies it, and parity with mlx-lm on disk."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx_lm
import pytest

from benchmarks.lib.synthetic import save_model
from mlx_serving.worker.engine.interface import Request, SamplingParams
from mlx_serving.worker.engine.loader import EngineOptions, load_engine
from mlx_serving.worker.engine.model_files import (
    ModelFilesError,
    check_model_files,
    model_revision,
    tokenizer_hash,
)
from tests.support.engine_support import drive


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny", architecture=request.param)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder to spoil."""
    return save_model(tmp_path / "model")


def test_text_equals_mlx_lm_generate(folder: Path) -> None:
    model, tokenizer = mlx_lm.load(str(folder))[:2]
    engine = load_engine(folder, EngineOptions(kv_budget_bytes=1 << 28))
    prompts = ["one", "a longer prompt of some words", "x" * 90]
    encode = cast("Any", tokenizer).encode
    requests = [Request(prompt, tuple(encode(prompt)), SamplingParams(), 24) for prompt in prompts]
    rows = drive(engine, requests)
    for prompt in prompts:
        expected = mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=24)
        # mlx-lm's streaming detokenizer drops a character that the end cuts in two.
        assert rows[prompt].text.rstrip("\ufffd") == expected.rstrip("\ufffd")


def test_model_info_names_what_runs(folder: Path) -> None:
    info = load_engine(folder, EngineOptions(warm_up=False), name="alias").model_info
    assert (info.name, info.vocab_size, info.eos_token_ids) == ("alias", 300, frozenset({256}))
    assert info.revision == model_revision(folder)
    assert info.tokenizer_hash == tokenizer_hash(folder)


def test_the_revision_changes_with_config_and_weights(broken: Path) -> None:
    first = model_revision(broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 1
    weights.write_bytes(data)
    second = model_revision(broken)
    config = broken / "config.json"
    config.write_text(config.read_text() + "\n")
    assert len({first, second, model_revision(broken)}) == 3


def test_a_warm_engine_is_empty(folder: Path) -> None:
    engine = load_engine(folder)
    assert (engine.has_work, engine.kv_tokens_used) == (False, 0)
    assert engine.kv_tokens_capacity > 0


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code"),
        ("config.json", {"model_file": "evil.py"}, "model_file names code"),
        ("config.json", {"text_config": {"auto_map": {"A": "b.C"}}}, "auto_map names code"),
        ("config.json", {"model_type": "..evil"}, "model_type is not a plain name"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["e.T"]}}, "auto_map names code"),
        ("tokenizer_config.json", {"tool_parser_type": "a.b"}, "tool_parser_type is not a plain"),
    ],
)
def test_a_config_that_names_code_is_refused(
    broken: Path, file: str, values: dict[str, Any], reason: str
) -> None:
    (broken / "evil.py").write_text("raise SystemExit('code from the model folder ran')")
    set_json(broken / file, **values)
    with pytest.raises(ModelFilesError, match=f"{file}: {reason}"):
        load_engine(broken)


def test_a_folder_of_pickles_is_refused(broken: Path) -> None:
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelFilesError, match=r"pytorch_model\.bin is not loaded"):
        load_engine(broken)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle" * 10, b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused(broken: Path, content: bytes) -> None:
    (broken / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is not a safetensors file"):
        check_model_files(broken)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(broken: Path, missing: str) -> None:
    (broken / missing).unlink()
    with pytest.raises(ModelFilesError, match=f"{missing}: missing"):
        load_engine(broken)


def test_a_config_that_is_no_object_is_refused(broken: Path) -> None:
    (broken / "config.json").write_text("[1, 2]")
    with pytest.raises(ModelFilesError, match=r"config.json: is not a JSON object"):
        load_engine(broken)


def test_a_name_that_is_no_folder_is_never_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="nothing is downloaded"):
        load_engine("mlx-community/Qwen3-0.6B-bf16")
    shutil.rmtree(tmp_path / "x", ignore_errors=True)

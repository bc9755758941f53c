"""The command line without a Redis: help, wrong input, what it imports, what it prints."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mlx_serving import __version__
from mlx_serving.cli import options
from mlx_serving.cli.console import harmless
from mlx_serving.cli.generate import build_job
from mlx_serving.cli.main import app
from mlx_serving.cli.streaming import Printer
from mlx_serving.cli.worker import engine_spec, model_path
from mlx_serving.common.errors import InvalidJob, InvalidSettings, MissingDependency, UnknownModel
from mlx_serving.common.events import (
    ChoiceDelta,
    ChoiceLogprobs,
    TokenLogprob,
    TopLogprob,
    reset_event,
    tokens_event,
)
from mlx_serving.common.results import ChoiceResult, GenerationResult
from mlx_serving.common.settings import TALLY_PATH, load_settings
from mlx_serving.common.states import JobState
from mlx_serving.worker.engine import model_hub
from mlx_serving.worker.process.crash import EXIT_CONFIGURATION

COMMANDS = ("demo", "worker", "generate", "status", "cancel", "doctor", "models", "batch")
HEAVY = {"mlx", "mlx_lm", "numpy", "transformers", "mlx_serving.worker", "redis", "rq", "pydantic"}

runner = CliRunner()


def test_help_names_every_command() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = runner.invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version_is_the_packages() -> None:
    assert runner.invoke(app, ["--version"]).stdout.strip() == f"mlx-serving {__version__}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_takes_nothing_more_is_an_error_in_a_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_serving", "models"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: io_error: No space left on device\n"


def _loaded_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_help_imports_neither_engine_nor_redis() -> None:
    assert _loaded_after("import mlx_serving.cli.main") & HEAVY == set()


def test_following_a_job_imports_no_engine() -> None:
    loaded = _loaded_after(
        "import mlx_serving.cli.main, mlx_serving.cli.streaming, mlx_serving.cli.overview"
    )
    assert loaded & {"mlx", "mlx_lm", "numpy", "transformers"} == set()


# -- generate ---------------------------------------------------------------------------


def test_a_prompt_is_a_chat_message() -> None:
    job = build_job("hello", raw=False, system="be brief", model="tally", top_p=None, stop=[])
    assert job.template_messages() == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
    ]
    assert (job.prompt, job.top_p, job.stop) == (None, 1.0, ())


def test_raw_continues_the_text_itself() -> None:
    job = build_job("once upon", raw=True, system=None, model="tally", temperature=0.0)
    assert (job.prompt, job.messages, job.temperature) == ("once upon", None, 0.0)


def test_a_wrong_parameter_is_refused_by_name() -> None:
    with pytest.raises(InvalidJob, match="top_p"):
        build_job("x", raw=False, system=None, model="tally", top_p=2.0)


def printed(capsys: pytest.CaptureFixture[str], printer: Printer) -> str:
    scored = ChoiceLogprobs([TokenLogprob("3", -0.25, None, [TopLogprob("\n", -1.5)])])
    choices = [
        ChoiceResult(index=0, text="3 4", finish_reason="stop", logprobs=scored),
        ChoiceResult(index=1, text="5"),
    ]
    deltas = [ChoiceDelta(n, choice.text, [1]) for n, choice in enumerate(choices)]
    printer.show(tokens_event(attempt=1, seq=2, choices=deltas))
    printer.end(GenerationResult(id="a", state=JobState.FINISHED, choices=choices))
    return capsys.readouterr().out


def test_one_choice_is_printed_as_it_comes(capsys: pytest.CaptureFixture[str]) -> None:
    scores = "  -0.2500 '3'  |  -1.5000 '\\n'\n"
    assert printed(capsys, Printer(as_json=False)) == "3 4\n" + scores


def test_a_text_that_is_void_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer(as_json=False)
    printer.show(reset_event())
    for text in ("3 ", "3 4"):
        printer.show(tokens_event(attempt=1, seq=2, choices=[ChoiceDelta(0, text, [1])]))
        if text == "3 ":
            printer.show(reset_event())
    shown = capsys.readouterr()
    assert shown.out == "3 3 4"
    assert shown.err == "\nthe text so far is void: the job begins anew\n"


def test_several_choices_are_printed_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = printed(capsys, Printer(as_json=False, choices=2)).split("[1: cut short]\n")
    assert first.splitlines()[:2] == ["[0: stop]", "3 4"]
    assert second == "5\n"


def test_events_hold_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = printed(capsys, Printer(as_json=True, choices=2)).splitlines()
    assert [choice["index"] for choice in json.loads(line)["choices"]] == [0, 1]


def test_an_error_is_one_line_with_its_code() -> None:
    result = runner.invoke(app, ["generate", "x", "--min-p", "3"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: invalid_job: min_p: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not result.stdout


def test_a_system_message_with_raw_is_a_usage_error() -> None:
    result = runner.invoke(app, ["generate", "x", "--raw", "--system", "y"])
    assert result.exit_code == 2
    assert "--system" in result.stderr


def test_redis_that_is_away_is_one_line() -> None:
    result = runner.invoke(app, ["status", "--redis-url", "unix:///nowhere/redis.sock"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: queue_unavailable: ")


def test_a_wrong_url_names_the_setting() -> None:
    result = runner.invoke(app, ["status", "--redis-url", "http://example.com"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: invalid_settings: redis.url: ")


def test_a_misspelt_setting_of_the_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typo in a service file would else be a default that nobody asked for."""
    monkeypatch.setenv("MLX_SERVING_METRIC_PORT", "9109")
    monkeypatch.setenv("MLX_SERVING_METRICS_PORT", "9109")
    monkeypatch.setenv("MLX_SERVING_NO_NATIVE_BUILD", "1")  # the build's
    monkeypatch.setenv("MLX_SERVING_RQ_PREFIX", "rq")  # RQ's own name is RQ_KEY_PREFIX
    result = runner.invoke(app, ["models"])
    assert result.exit_code == 0
    names = ("MLX_SERVING_METRIC_PORT", "MLX_SERVING_RQ_PREFIX")
    assert result.stderr.splitlines() == [
        f"warning: {name} is not a setting and has no effect" for name in names
    ]


@pytest.mark.parametrize("control", ["\x1b", "\x07", "\r", "\x00", "\x7f", "\x9b"])
def test_a_model_can_not_drive_the_terminal(control: str) -> None:
    assert harmless(f"a{control}[2Jb") == "a\ufffd[2Jb"


def test_lines_and_words_stay_as_they_are() -> None:
    assert harmless("a\tb\nGrüße 東京 🎲") == "a\tb\nGrüße 東京 🎲"


# -- worker and models ------------------------------------------------------------------


def test_a_worker_of_an_unknown_model_names_the_known_ones() -> None:
    result = runner.invoke(app, ["worker", "--model", "no-such"])
    assert result.exit_code == EXIT_CONFIGURATION
    assert result.stderr.startswith("error: unknown_model: model: 'no-such'")
    assert "tally" in result.stderr


def test_a_worker_that_no_restart_mends_says_so_to_its_service_manager(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Status 78: wrong settings, a model that is not there, no engine."""
    monkeypatch.setenv("MLX_SERVING_WORKER_LEASE_SECONDS", "soon")
    wrong_setting = runner.invoke(app, ["worker"])
    monkeypatch.delenv("MLX_SERVING_WORKER_LEASE_SECONDS")
    monkeypatch.setenv("MLX_SERVING_MODELS", json.dumps({"gone": str(tmp_path / "gone")}))
    no_model = runner.invoke(app, ["worker", "--model", "gone"])
    monkeypatch.setattr(options, "ENGINE", ("no_such_engine",))
    no_engine = runner.invoke(app, ["worker"])
    assert [r.exit_code for r in (wrong_setting, no_model, no_engine)] == [EXIT_CONFIGURATION] * 3
    assert [r.stderr.split(": ")[1] for r in (wrong_setting, no_model, no_engine)] == [
        "invalid_settings", "unknown_model", "missing_dependency",
    ]  # fmt: skip


def test_a_worker_whose_hub_is_away_is_worth_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_model = {"big": "organisation/name@" + "0" * 40}
    monkeypatch.setenv("MLX_SERVING_MODELS", json.dumps(hub_model))
    monkeypatch.setattr(model_hub, "Hub", partial(model_hub.Hub, "http://127.0.0.1:9"))
    result = runner.invoke(app, ["worker", "--model", "big"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: model_unreachable: models.big: organisation/name@0000")


def test_a_worker_without_redis_is_one_line() -> None:
    options = ["--engine", "simulated", "--redis-url", "unix:///nowhere/redis.sock"]
    result = runner.invoke(app, ["worker", *options])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: queue_unavailable: ")


def test_a_worker_without_the_engine_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options, "ENGINE", ("no_such_engine",))
    with pytest.raises(MissingDependency, match=r'pip install "mlx-serving\[worker\]"'):
        engine_spec(load_settings(), "tally")


def test_the_simulated_engine_needs_no_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "ENGINE", ("no_such_engine",))
    spec = engine_spec(load_settings(), "tally", "simulated", 50.0)
    assert (spec.kind, spec.tokens_per_second) == ("simulated", 50.0)


def test_a_worker_may_serve_several_models(tmp_path: Path) -> None:
    settings = load_settings(models={"gone": str(tmp_path / "gone")})
    spec = engine_spec(settings, "tally", others=["gone"])
    assert spec.paths("tally") == {"tally": str(TALLY_PATH), "gone": str(tmp_path / "gone")}
    spec = engine_spec(settings, "gone", others=["tally"])
    assert list(spec.paths("gone")) == ["gone", "tally"]
    with pytest.raises(UnknownModel, match="not an alias"):
        engine_spec(settings, "tally", others=["tolly"])
    with pytest.raises(UnknownModel, match="not a folder"):
        engine_spec(settings, "gone")


def test_a_worker_s_models_share_one_redis() -> None:
    settings = load_settings(redis__by_model={"b": "redis://elsewhere/0"})
    with pytest.raises(InvalidSettings, match=r"redis\.by_model\.b: .*share one Redis"):
        engine_spec(settings, "tally", "simulated", others=["b"])


def test_model_path_is_the_settings_folder() -> None:
    assert model_path(load_settings(), "tally") == str(TALLY_PATH)


def test_a_model_whose_folder_is_gone_is_refused(tmp_path: Path) -> None:
    settings = load_settings(models={"big": str(tmp_path / "gone")})
    with pytest.raises(UnknownModel, match=r"models\.big: .*gone is not a folder"):
        model_path(settings, "big")


def test_models_lists_what_loads_and_what_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "mlx-serving.toml"
    config.write_text(f'[models]\nbroken = "{tmp_path}"\n')
    monkeypatch.setenv("MLX_SERVING_CONFIG", str(config))
    result = runner.invoke(app, ["models", "--json"])
    assert result.exit_code == 0
    broken, tally = json.loads(result.stdout)
    assert (broken["alias"], broken["problem"].split(":")[0]) == ("broken", "config.json")
    assert (tally["alias"], tally["problem"]) == ("tally", None)
    assert tally["size_bytes"] > tally["weight_bytes"] > 1_000_000
    assert len(tally["revision"]) == 16


@pytest.mark.parametrize("words", [["no-such"], ["pull", "no-such"], ["no-such", "--json"]])
def test_models_of_an_unknown_alias_names_the_known_ones(words: list[str]) -> None:
    result = runner.invoke(app, ["models", *words])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "error: unknown_model: model: 'no-such' is not an alias in the settings (known: tally)\n"
    )

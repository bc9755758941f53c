"""Models of a hub: a pinned revision becomes a local folder, downloaded once. Needs no mlx.

huggingface_hub fetches one file at a time into its own cache, where other tools find them too:
weights in safetensors, configs and the tokenizer, nothing else. `config.json` is fetched last, so a
folder that has it is complete. If another process downloads the model, this one waits for it.
After a crash, complete files are kept.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from mlx_serving.worker.engine.model_files import ModelFilesError, check_model_files, read_json

_NAME: Final = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)@(?P<revision>[\w./-]+)")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_WEIGHTS: Final = re.compile(r"model[\w.-]*\.safetensors")
_INDEX: Final = "model.safetensors.index.json"
_OTHERS: Final = frozenset(
    {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    | {"special_tokens_map.json", "chat_template.jinja", "chat_template.json", _INDEX}
)
_SPARE_BYTES: Final = 1 << 30  # of the disk, to leave free
_LOCK_POLL_SECONDS: Final = 0.2
_ANSWER_SECONDS: Final = 20.0

Say = Callable[[str], None]
"""Shows one line of progress."""


@dataclass(frozen=True, slots=True)
class HubModel:
    """`organisation/name` at a revision, as in the settings."""

    repo: str
    revision: str

    def __str__(self) -> str:
        """As in the settings."""
        return f"{self.repo}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, whose files never change."""
        return _COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True, slots=True)
class Hub:
    """A hub and the folder of its files; None: huggingface_hub's own."""

    endpoint: str | None = None
    cache: Path | None = None

    @property
    def folder(self) -> Path:
        """The cache's folder."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return self.cache or Path(HF_HUB_CACHE)

    @property
    def host(self) -> str:
        """The hub's host, for errors."""
        from huggingface_hub.constants import ENDPOINT

        return urlsplit(self.endpoint or ENDPOINT).netloc


class HubUnreachableError(ModelFilesError):
    """The hub does not answer now; later it may."""


def hub_model(value: str) -> HubModel | None:
    """Read `organisation/name@revision`; None: the setting is a path."""
    found = _NAME.fullmatch(value)
    return HubModel(found["repo"], found["revision"]) if found else None


def require_pinned(model: HubModel) -> None:
    """Refuse a revision whose files may change. Raises ModelFilesError."""
    if not model.pinned:
        message = (
            f"{model}: {model.revision!r} is a branch or a tag, which may come to mean other "
            "files; write the commit, 40 hex digits (`mlx-serving models pull` says which it is)"
        )
        raise ModelFilesError(message)


def local_folder(model: HubModel, hub: Hub) -> Path | None:
    """Return the folder of a model that is completely downloaded, or None; asks no hub.

    Raises:
        ModelFilesError: the revision is not pinned, or the folder may not be loaded.
    """
    require_pinned(model)
    folder = hub.folder / f"models--{model.repo.replace('/', '--')}" / "snapshots" / model.revision
    if not (folder / "config.json").is_file() or _missing_weights(folder):
        return None
    check_model_files(folder)
    return folder


def download(model: HubModel, hub: Hub, say: Say) -> Path:
    """Return the model's folder, downloaded if need be; shows progress bars on a terminal.

    Raises:
        HubUnreachableError: the hub can't be reached, or can't answer now.
        ModelFilesError: the model is not pinned, not on the hub, too large for the disk, or has
            nothing that may be loaded. The message names model, host and reason.
    """
    from filelock import FileLock, Timeout

    found = local_folder(model, hub)
    if found is not None:
        return found
    locks = hub.folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / f"mlx-serving--{model.repo.replace('/', '--')}--{model.revision}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"{model}: another process downloads it; waiting")
        lock.acquire(poll_interval=_LOCK_POLL_SECONDS)
    try:
        return local_folder(model, hub) or _fetch(model, hub, say)
    finally:
        lock.release()


def resolve(model: HubModel, hub: Hub) -> HubModel:
    """Ask the hub for the commit of a branch or a tag. Raises ModelFilesError as `download`."""
    commit = _asked(model, hub, lambda: _info(model, hub)).sha
    if commit is None or not _COMMIT.fullmatch(commit):
        message = f"{model}: {hub.host} names no commit for it"
        raise ModelFilesError(message)
    return HubModel(model.repo, commit)


def _fetch(model: HubModel, hub: Hub, say: Say) -> Path:
    sizes = _asked(model, hub, lambda: _sizes(model, hub))
    names = _wanted(model, sizes)
    _require_space(model, hub, sum(sizes[name] for name in names))
    for n, name in enumerate(names, 1):
        say(f"{model}: {name}, {sizes[name] / 1e6:.1f} MB ({n} of {len(names)})")
        path = _asked(model, hub, partial(_fetch_file, model, hub, name))
    folder = Path(path).parent
    missing = _missing_weights(folder)
    if missing:
        message = f"{model}: {missing[0]} is named in {_INDEX} and not on {hub.host}"
        raise ModelFilesError(message)
    check_model_files(folder)
    return folder


def _sizes(model: HubModel, hub: Hub) -> dict[str, int]:
    """Return names and sizes in bytes of the repository's files."""
    files = _info(model, hub).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


def _info(model: HubModel, hub: Hub) -> Any:  # noqa: ANN401 -- the library's own type
    """Return the hub's answer about a revision; asked once: an unreachable hub fails soon."""
    from huggingface_hub import HfApi

    return HfApi(endpoint=hub.endpoint).model_info(
        model.repo, revision=model.revision, files_metadata=True, timeout=_ANSWER_SECONDS
    )


def _wanted(model: HubModel, sizes: dict[str, int]) -> list[str]:
    """Return the files to fetch, in order: weights first, the config last."""
    weights = sorted(name for name in sizes if _WEIGHTS.fullmatch(name))
    if not weights:
        message = f"{model}: has no model*.safetensors; weights of another kind are not loaded"
        raise ModelFilesError(message)
    for name in ("config.json", "tokenizer.json"):
        if name not in sizes:
            message = f"{model}: has no {name}"
            raise ModelFilesError(message)
    others = sorted(_OTHERS & sizes.keys() - {"config.json"})
    return [*weights, *others, "config.json"]


def _fetch_file(model: HubModel, hub: Hub, name: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(
        model.repo, name, revision=model.revision, endpoint=hub.endpoint, cache_dir=hub.folder
    )


def _missing_weights(folder: Path) -> list[str]:
    """Return weight files that the index names and the folder lacks."""
    if not (folder / _INDEX).is_file():
        return []
    named = read_json(folder / _INDEX).get("weight_map")
    files = sorted({str(file) for file in named.values()}) if isinstance(named, dict) else []
    return [file for file in files if not (folder / file).is_file()]


def _require_space(model: HubModel, hub: Hub, needed: int) -> None:
    """Check the free space first, so that a download that can't finish does not fill the disk."""
    free = shutil.disk_usage(hub.folder).free
    if free < needed + _SPARE_BYTES:
        message = (
            f"{model}: needs {needed / 1e9:.1f} GB and 1 GB to spare, {hub.folder} has "
            f"{free / 1e9:.1f} GB free"
        )
        raise ModelFilesError(message)


def _asked(model: HubModel, hub: Hub, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 -- the answer
    """Ask the hub; turn its errors into one line each.

    Raises:
        HubUnreachableError: it may answer later.
        ModelFilesError: it does not serve this model.

    """
    import httpx2
    from huggingface_hub import errors

    try:
        return ask()
    except errors.RevisionNotFoundError:
        reason = f"{hub.host} has no such revision"
    except errors.GatedRepoError:
        reason = f"{hub.host} asks for consent to its terms, and for a token (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        reason = f"{hub.host} has no such model, or not for everybody"
    except errors.HfHubHTTPError as error:
        reason = f"{hub.host} answered {error.response.status_code}"
        raise HubUnreachableError(f"{model}: {reason}") from None
    except (httpx2.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        reason = f"can't be downloaded: {hub.host} can't be reached ({type(error).__name__})"
        raise HubUnreachableError(f"{model}: {reason}") from None
    except OSError as error:
        reason = f"can't be downloaded from {hub.host}: {' '.join(str(error).split())[:300]}"
        raise HubUnreachableError(f"{model}: {reason}") from None
    message = f"{model}: {reason}"
    raise ModelFilesError(message)

"""The error tree: codes, messages, what is carried along."""

from __future__ import annotations

import pickle

import pytest

from mlx_serving.common import errors, results
from mlx_serving.common.errors import FieldError, InvalidJob, MlxServingError
from mlx_serving.common.results import ChoiceResult, GenerationResult, JobDead, JobFailed
from mlx_serving.common.states import JobState
from tests.support.paths import ROOT

TREE = list(
    {
        value: None
        for module in (errors, results)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, MlxServingError)
    }
)


@pytest.mark.parametrize("kind", TREE)
def test_every_error_is_drawn_in_the_tree(kind: type[MlxServingError]) -> None:
    assert f"* {kind.__name__}" in (errors.__doc__ or "")


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in TREE]
    assert len(set(codes)) == len(codes)


def test_only_these_may_succeed_when_they_are_tried_again() -> None:
    retryable = {kind.__name__ for kind in TREE if kind.retryable}
    assert retryable == {
        "ResultTimeout", "TenantLimited", "EngineError", "ModelUnreachable",
        "QueueUnavailable", "RedisLoading", "RedisReadOnly", "RedisFull", "RedisCrowded",
    }  # fmt: skip


def test_the_message_is_the_docstring_unless_one_is_given() -> None:
    assert str(errors.JobNotFound()) == "There is no such job, or its result has expired"
    assert str(errors.JobNotFound("no job 5")) == "no job 5"


def test_an_invalid_job_lists_path_and_reason() -> None:
    error = InvalidJob([("top_k", "is negative"), ("", "is empty")])
    assert error.errors == [FieldError("top_k", "is negative"), FieldError("", "is empty")]
    assert str(error) == "top_k: is negative; is empty"
    assert str(InvalidJob("is empty")) == "is empty"


def test_an_invalid_job_without_details_still_says_something() -> None:
    assert str(InvalidJob()) == "The job has fields that are wrong"


@pytest.mark.parametrize("kind", TREE)
def test_errors_survive_a_pickle(kind: type[MlxServingError]) -> None:
    error = kind()
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert type(copy) is kind
    assert str(copy) == str(error)


def test_a_limited_tenant_keeps_what_it_carries_over_a_pickle() -> None:
    error = errors.TenantLimited("m", tenant="acme", limit=2, queued=3, job_ids=["a", None])
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert vars(copy) == vars(error)
    assert (copy.message, copy.tenant, copy.job_ids) == ("m", "acme", ("a", None))


def test_a_conflict_keeps_what_it_carries_over_a_pickle() -> None:
    error = errors.IdempotencyConflict([("idempotency_key", "is used")], job_ids=["a", None])
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 -- our own bytes
    assert vars(copy) == vars(error)
    assert (str(copy), copy.job_ids) == ("idempotency_key: is used", ("a", None))


def test_an_unsuccessful_job_keeps_its_result_over_a_pickle() -> None:
    result = GenerationResult(
        id="a", state=JobState.DEAD, choices=[ChoiceResult(index=0, text="so far")]
    )
    error = pickle.loads(pickle.dumps(JobDead("it died", result=result)))  # noqa: S301 -- our own
    assert isinstance(error, JobFailed)
    assert (error.message, error.result) == ("it died", result)


@pytest.mark.parametrize("kind", [kind for kind in TREE if kind is not MlxServingError])
def test_every_error_is_on_the_page_of_errors(kind: type[MlxServingError]) -> None:
    page = (ROOT / "docs" / "reference" / "errors.md").read_text(encoding="utf-8")
    retryable = "yes" if kind.retryable else "no"
    assert f"| `{kind.code}` | `{kind.__name__}` | {retryable} | " in page

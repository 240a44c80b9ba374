"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable

import metal_moe
import pytest
from hypothesis import HealthCheck, settings

# Reproducible and without deadlines: a shared machine may stall any single example.
settings.register_profile(
    "metal_moe", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("metal_moe")


@pytest.fixture(autouse=True)
def native_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests start on the default engine, whatever the caller's environment says."""
    monkeypatch.delenv("METAL_MOE_CPU_ENGINE", raising=False)


@pytest.fixture
def use_engine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Switches CPU tensors to an engine for the rest of the test."""

    def use(engine: str) -> None:
        monkeypatch.setenv("METAL_MOE_CPU_ENGINE", engine)

    return use


@pytest.fixture
def exact_engine(use_engine: Callable[[str], None]):
    """CPU tensors on `exact`; gives the function that seeds its schedule."""
    use_engine("exact")
    yield metal_moe.set_exact_seed
    metal_moe.set_exact_seed(0)


@pytest.fixture
def num_threads():
    """Gives the function that sets the number of threads of `native`; restores it."""
    before = metal_moe.get_num_threads()
    yield metal_moe.set_num_threads
    metal_moe.set_num_threads(before)


def pytest_report_header() -> str:
    return f"metal_moe {metal_moe.__version__}: {metal_moe.device_info()}"

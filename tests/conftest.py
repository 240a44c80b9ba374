"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import cases
import metal_moe
import on_device
import pytest
import torch
from hypothesis import HealthCheck, settings
from metal_moe import experts

# What somebody measured on this machine is not what is tested.
os.environ["METAL_MOE_TUNING"] = ""

# Reproducible and without deadlines: a shared machine may stall any single example.
settings.register_profile(
    "metal_moe", deadline=None, derandomize=True, max_examples=60, suppress_health_check=list(HealthCheck)
)
settings.load_profile("metal_moe")

STAND_IN = (
    "test_check_msl.py",
    "test_cuda_compile.py",
    "test_environment.py",
    "test_exact.py",
    "test_metal_cpp.py",
    "test_translator.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of PyTorch that the tests compute on (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if device.type == "cpu":
        return
    cases.ENGINES[:] = [device.type]
    cases.DEVICE = device
    # Memory that nobody has written, results and scratch, is NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Tests of one kind of device are collected where they are asked for: `--device cuda`, `--device mps`.

    Those of the stand-in for Metal are collected where it is: macOS has Metal.
    """
    kind = torch.device(config.getoption("--device")).type
    of_device = {"test_cuda.py": "cuda", "test_mps.py": "mps"}.get(collection_path.name, kind)
    of_stand_in = sys.platform == "darwin" and collection_path.name in STAND_IN
    return True if of_device != kind or of_stand_in else None


@pytest.fixture
def device(pytestconfig: pytest.Config) -> torch.device:
    """What --device names."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def default_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """Tests start on the engine of the device, whatever the caller's environment says.

    A module with OWN_DEVICE makes its tensors on the device itself; those of others are moved there and back.
    """
    monkeypatch.delenv("METAL_MOE_CPU_ENGINE", raising=False)
    if device.type != "cpu" and not getattr(request.module, "OWN_DEVICE", False):
        on_device.patch(monkeypatch, device)


@pytest.fixture
def use_engine(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Callable[[str], None]:
    """Switches to an engine for the rest of the test: the device's own, or one that computes CPU tensors."""

    def use(engine: str) -> None:
        if engine == device.type:
            return
        if sys.platform == "darwin":
            pytest.skip(f"the {engine} engine belongs to the stand-in for Metal, which macOS does not have")
        if device.type != "cpu":
            on_device.unpatch(monkeypatch)
        monkeypatch.setenv("METAL_MOE_CPU_ENGINE", engine)

    return use


@pytest.fixture
def exact_engine(use_engine: Callable[[str], None]):
    """CPU tensors on `exact`; gives the function that seeds its schedule."""
    use_engine("exact")
    yield metal_moe.set_exact_seed
    metal_moe.set_exact_seed(0)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The list of operations that were checked since: calls like an earlier one are not."""
    seen = []

    def check_experts(op: str, *args: object) -> int:
        seen.append(op)
        return check(op, *args)

    check = experts.check_experts
    monkeypatch.setattr(experts, "check_experts", check_experts)
    return seen


@pytest.fixture
def num_threads():
    """Gives the function that sets the number of threads of `native`; restores it."""
    if sys.platform == "darwin":
        pytest.skip("no engine of a macOS build computes on threads of the CPU")
    before = metal_moe.get_num_threads()
    yield metal_moe.set_num_threads
    metal_moe.set_num_threads(before)


def pytest_report_header() -> str:
    return f"metal_moe {metal_moe.__version__}: {metal_moe.device_info()}"

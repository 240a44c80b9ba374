"""The environment variables, each in a process of its own, and every processor level that is compiled.

Each process runs one set of layers (this file as a script) and reports what ran and a digest of the bits.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import metal_moe
import pytest
import torch
from cases import DTYPES, FAMILIES, assert_close, check, make_layer


def run_layers() -> dict:
    """Every family and dtype against the reference; a digest of all results."""
    digest = hashlib.sha256()
    small = os.environ.get("METAL_MOE_CPU_ENGINE") == "exact"
    for dtype in DTYPES:
        for tokens in (1, 6) if small else (1, 6, 40):
            size = (24, 16) if small else (136, 72)
            layer = make_layer(tokens, *size, 6, 2, DTYPES[dtype], shared=1, routing="dropped")
            expected = layer.reference()
            for family in FAMILIES:
                out = layer.run(kernel=family)
                assert_close(out, expected, f"{layer} {family}")
                digest.update(out.view(torch.uint8).numpy().tobytes())
    layer = make_layer(5, 65, 33, 4, 2, torch.float16, use_fp32_acc=False)
    digest.update(check(layer).view(torch.uint8).numpy().tobytes())
    return {
        "digest": digest.hexdigest(),
        "engine": metal_moe.last_dispatch()["engine"],
        "threads": metal_moe.get_num_threads(),
        "device": metal_moe.device_info(),
    }


def start(**variables: str) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("METAL_MOE_") or k == "METAL_MOE_LIBRARY"}
    return subprocess.Popen(
        [sys.executable, __file__],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def levels() -> list[str]:
    """Native libraries beside the extension, "x86-64-v3", ..."""
    library = Path(os.environ.get("METAL_MOE_LIBRARY") or Path(metal_moe.__file__).parent / "metal_moe.metallib")
    return sorted(path.stem.removeprefix("native-") for path in library.glob("native-*.so"))


@pytest.fixture(scope="module")
def default() -> dict:
    return finish(start())


def test_levels_are_compiled():
    assert len(levels()) >= 2, "a baseline and at least one better level"


@pytest.mark.parametrize("level", levels())
def test_level(level):
    """Right on every level that this processor runs; refused by name on the others."""
    process = start(METAL_MOE_CPU_LEVEL=level)
    out, err = process.communicate(timeout=300)
    if process.returncode == 0:
        assert level in json.dumps(json.loads(out.splitlines()[-1])["device"])
    else:
        assert level != min(levels(), key=len), "the baseline runs everywhere"
        assert f"METAL_MOE_CPU_LEVEL is '{level}', which this processor does not run" in err


def test_unknown_level_is_an_error_that_lists_the_levels():
    process = start(METAL_MOE_CPU_LEVEL="x86-64-v9")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "x86-64-v9" in err
    assert all(f"native-{level}.so" in err for level in levels())


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads(default, threads):
    """Read from the environment; the bits do not depend on it."""
    report = finish(start(METAL_MOE_NUM_THREADS=str(threads)))
    assert report["threads"] == threads
    assert report["digest"] == default["digest"]


def test_exact_engine_and_seed():
    """Two seeds in two processes: the same bits."""
    processes = [start(METAL_MOE_CPU_ENGINE="exact", METAL_MOE_EXACT_SEED=seed) for seed in ("1", "77")]
    first, second = (finish(process) for process in processes)
    assert first["engine"] == "exact"
    assert first["digest"] == second["digest"]


def test_unknown_engine():
    process = start(METAL_MOE_CPU_ENGINE="cuda9")
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "METAL_MOE_CPU_ENGINE" in err and "cuda9" in err and "native" in err and "exact" in err


def test_missing_library(tmp_path):
    process = start(METAL_MOE_LIBRARY=str(tmp_path / "nowhere.metallib"))
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0 and "nowhere.metallib" in err


if __name__ == "__main__":
    print(json.dumps(run_layers()))

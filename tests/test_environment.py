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
from cases import DTYPES, FAMILIES, ROUNDING, Layer, assert_close, check, make_layer
from metal_moe import QuantizedExperts
from test_formats_trellis import exl3_linear

QUANTIZED = [
    *({"format": "affine", "bits": bits, "group_size": 32} for bits in (3, 4, 8)),
    *({"format": name} for name in ("mxfp4", "mxfp8", "nvfp4", "dense", "trellis")),
]


def quantized_layer(settings: dict, tokens: int, dtype: torch.dtype, small: bool) -> tuple[Layer, tuple]:
    """A layer, and its weights as they are stored."""
    # nvfp4 has blocks of 16 columns: rows that end within a run of 32.
    hidden, intermediate = (48, 80) if settings["format"] == "nvfp4" else (64, 32) if small else (160, 96)
    if settings["format"] == "trellis":  # whose search takes long where every thread is a fiber
        hidden, intermediate = 128, 128
        sides = [
            QuantizedExperts.from_exl3([exl3_linear(128, 128, 3, seed=3 * e + side) for e in range(3)])
            for side in range(3)
        ]
        weights = QuantizedExperts({"gate": sides[0].parts["weight"], "up": sides[1].parts["weight"]}), sides[2]
    layer = make_layer(tokens, hidden, intermediate, 3, 2, dtype, bias=True)
    if settings["format"] != "trellis":
        weights = tuple(QuantizedExperts.quantize(w, **settings) for w in (layer.w1, layer.w2))
    return layer, weights


def run_quantized(settings: dict, dtype: torch.dtype, small: bool) -> bytes:
    """Against the reference; the results."""
    results = []
    for family, tokens in (("moe_decode", 1), ("moe_prefill4", 3), ("moe_large_batch", 9)):
        layer, weights = quantized_layer(settings, tokens, dtype, small)
        layer.w1, layer.w2 = (w.dequantize(torch.float64) for w in weights)
        expected = layer.reference()
        layer.w1, layer.w2 = weights
        out = layer.run(kernel=family)
        assert_close(out, expected, f"{settings} {family}", ROUNDING[dtype])
        results.append(out.view(torch.uint8).numpy().tobytes())
    return b"".join(results)


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
        for settings in QUANTIZED:
            digest.update(run_quantized(settings, DTYPES[dtype], small))
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

"""The cuda engine without a GPU: every kernel compiles with NVRTC, results are cached, and what is missing is named."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import metal_moe
import pytest
from metal_moe import _core
from metal_moe._nvrtc import nvrtc_library

ARCHITECTURE = 90
LIBRARY = Path(os.environ.get("METAL_MOE_LIBRARY") or Path(metal_moe.__file__).parent / "metal_moe.metallib")
SOURCES = sorted((LIBRARY / "cuda").glob("*.cu"))


def kernels_of(source: Path) -> list[str]:
    return [line.split()[2] for line in source.read_text().splitlines() if line.startswith("//! kernel ")]


@pytest.fixture(autouse=True)
def nvrtc():
    path = nvrtc_library()
    if path is None:
        pytest.skip("no NVRTC: pip install nvidia-cuda-nvrtc")
    _core.set_nvrtc_path(path)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "metal_moe" / "cuda"


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)


def test_the_library_holds_every_kernel():
    names = sorted(name for source in SOURCES for name in kernels_of(source))
    assert names == sorted(kernel["name"] for kernel in metal_moe.kernels("cpu"))


def test_which_kernels_begin_early():
    """All others wait for the kernel in front of them before any of their code runs: kernels/tiles/early_start.h."""
    early = set()
    for source in SOURCES:
        for entry in source.read_text().split("#if defined(METAL_SIM_ENTRY_")[1:]:
            body = entry[entry.index(" {\n  using P") :]
            first = body.index("metal_sim::cuda_context(")
            if "metal_sim::wait_for_previous_kernel();" not in body[:first]:
                early.add(re.sub("_(fp32acc|fp32|fp16|bf16|m16|m64)(?=_|$)", "", entry.split(")")[0]))
    down = {"down_decode", "trellis_down_decode", "down_quantized_decode"}
    row_tiles = {"down_quantized_base", "down_quantized_large_batch"}
    gate_up = {"gate_up_quantized_decode", "up_quantized_decode"}
    assert early == gate_up | down | row_tiles | {"rotate_outputs", "combine"}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_kernels_compile(source):
    """All of them, through the user's cache: some minutes the first time."""

    def compile_kernel(name: str) -> bytes:
        return _core.compile_cuda_kernel(str(LIBRARY), name, ARCHITECTURE)

    names = kernels_of(source)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, image in zip(names, threads.map(compile_kernel, names), strict=True):
            assert image.startswith(b"\x7fELF") and name.encode() in image


def test_the_cache_is_read_and_written(cache):
    first = _core.compile_cuda_kernel(str(LIBRARY), "combine_bf16", ARCHITECTURE)
    (file,) = cache.iterdir()
    assert file.suffix == ".cubin" and file.read_bytes().startswith(first)
    written = file.stat().st_ino
    assert _core.compile_cuda_kernel(str(LIBRARY), "combine_bf16", ARCHITECTURE) == first
    assert file.stat().st_ino == written, "read, not compiled again"
    _core.compile_cuda_kernel(str(LIBRARY), "combine_bf16", 80)
    assert len(list(cache.iterdir())) == 2, "another architecture is another entry"


def affine(bits: int, group_size: int = 64) -> int:
    """The code of matrices with bf16 scales and aligned rows."""
    return _core.matrix_code(1, 2 * bits, group_size, 0, 2, True)


TRELLIS_6_2_3 = [_core.matrix_code(5, 2 * bits, 128, 2, 1, True) for bits in (6, 2, 3)]


@pytest.mark.parametrize(
    ("kernel", "codes"),
    [
        ("gate_up_quantized_decode_fp32acc_bf16", [affine(4), affine(4)]),
        ("gate_up_quantized_decode_fp32acc_bf16", [affine(6), affine(2)]),
        ("gate_up_quantized_large_batch_fp32acc_m16_bf16", [affine(3), affine(5, 128)]),
        ("down_quantized_decode_fp32acc_fp16", [affine(8, 32)]),
        ("down_quantized_prefill4_fp32acc_bf16", [_core.matrix_code(2, 8, 32, 0, 3, True)]),  # mxfp4
        ("trellis_gate_up_decode", TRELLIS_6_2_3[:2]),
        ("trellis_down_decode", TRELLIS_6_2_3[2:]),
        ("trellis_product_m4", [TRELLIS_6_2_3[0], 0]),  # up of any rate
        ("trellis_product_m16", TRELLIS_6_2_3[:2]),
        ("trellis_product_m64", TRELLIS_6_2_3[:2]),
    ],
)
def test_specialised_kernels_hold_their_decoders_alone(kernel, codes):
    """Function constants reach the compiler: what the codes rule out is not in the code."""
    constants = {index: code for index, code in enumerate(codes) if code}
    specialized = _core.compile_cuda_kernel(str(LIBRARY), kernel, ARCHITECTURE, constants)
    generic = _core.compile_cuda_kernel(str(LIBRARY), kernel, ARCHITECTURE)
    assert specialized.startswith(b"\x7fELF") and kernel.encode() in specialized
    if 0 not in codes:
        assert len(specialized) < len(generic) / 2


@pytest.mark.parametrize("architecture", [80, 86])  # the second has less memory than packed tiles of bf16 take
@pytest.mark.parametrize(
    ("kernel", "group_size"),
    [
        ("gate_up_quantized_decode_fp32acc_bf16", 32),
        ("down_quantized_decode_fp32acc_fp16", 128),
        ("gate_up_quantized_base_fp32acc_fp16", 64),
        ("down_quantized_large_batch_fp32acc_m16_bf16", 32),
    ],
)
@pytest.mark.parametrize("short_rows", [0, 1 << 20], ids=["long", "short"])  # CODE_SHORT_ROWS
def test_packed_products(architecture, kernel, group_size, short_rows):
    """4-bit affine codes become operands of matrix instructions where these are and threadgroup memory suffices."""
    code = affine(4, group_size) | short_rows
    constants = {0: code, 1: code} if "gate_up" in kernel else {0: code}
    assert kernel.encode() in _core.compile_cuda_kernel(str(LIBRARY), kernel, architecture, constants)


def test_the_cache_tells_specialised_kernels_apart(cache):
    compiled = [
        _core.compile_cuda_kernel(str(LIBRARY), "down_quantized_decode_fp32acc_fp32", ARCHITECTURE, {0: affine(bits)})
        for bits in (2, 3, 2)
    ]
    assert compiled[0] == compiled[2] != compiled[1]
    assert len(list(cache.iterdir())) == 2


def test_function_constants_that_a_kernel_does_not_have():
    with pytest.raises(RuntimeError, match="kernel 'route' has no function constant of an index given"):
        _core.compile_cuda_kernel(str(LIBRARY), "route", ARCHITECTURE, {0: 1})


@pytest.mark.parametrize("damage", ["empty", "cut", "one bit", "another file", "longer"])
def test_a_damaged_file_is_compiled_again(cache, damage):
    first = _core.compile_cuda_kernel(str(LIBRARY), "combine_bf16", ARCHITECTURE)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    damaged = {
        "empty": b"",
        "cut": whole[:-100],
        "one bit": flipped,
        "another file": b"#!/bin/sh\n",
        "longer": whole * 2,
    }
    file.write_bytes(damaged[damage])
    assert _core.compile_cuda_kernel(str(LIBRARY), "combine_bf16", ARCHITECTURE) == first
    assert file.read_bytes() == whole, "and replaced"


def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch):
    (tmp_path / "metal_moe").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _core.compile_cuda_kernel(str(LIBRARY), "combine_fp16", ARCHITECTURE).startswith(b"\x7fELF")


def test_compiler_errors_are_shown(tmp_path, cache):
    text = (LIBRARY / "cuda" / "combine.cu").read_text()
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "combine.cu").write_text(text + "\nthis is no declaration;\n")
    with pytest.raises(
        RuntimeError, match=r"NVRTC .* does not compile kernel 'combine_bf16' of combine.cu(.|\n)*error:"
    ):
        _core.compile_cuda_kernel(str(tmp_path), "combine_bf16", ARCHITECTURE)


def test_unknown_kernel_and_missing_sources(tmp_path):
    with pytest.raises(RuntimeError, match="kernel 'fast' is not in the library"):
        _core.compile_cuda_kernel(str(LIBRARY), "fast", ARCHITECTURE)
    with pytest.raises(RuntimeError, match=r"no kernels for the cuda engine: .* holds no \.cu file"):
        _core.compile_cuda_kernel(str(tmp_path), "route", ARCHITECTURE)


def test_without_a_driver():
    result = run("import metal_moe; metal_moe.device_info('cuda')", METAL_MOE_CUDA_DRIVER="/nowhere/libcuda.so.1")
    assert result.returncode != 0
    assert "RuntimeError: device 'cuda': the CUDA driver cannot be loaded (/nowhere/libcuda.so.1" in result.stderr
    assert "the cuda engine needs an NVIDIA GPU and its driver" in result.stderr


def test_without_nvrtc():
    code = f"from metal_moe import _core; _core.compile_cuda_kernel({str(LIBRARY)!r}, 'route', 90)"
    result = run(code, METAL_MOE_NVRTC="/nowhere/libnvrtc.so.13")
    assert result.returncode != 0
    assert "METAL_MOE_NVRTC is '/nowhere/libnvrtc.so.13', which cannot be loaded" in result.stderr

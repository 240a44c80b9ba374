"""The macOS side, as far as it can be tested anywhere: embedded sources, the check of PyTorch's release, plain errors.

That it compiles and links is `make check-apple`; that it runs, test_mps.py on a Mac.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import metal_moe
import pytest
import torch
from metal_moe import _torch_abi, gpu

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "kernels").glob("*/*.metal"))


def embed(source: Path, output: Path, *folders: Path) -> subprocess.CompletedProcess:
    includes = [word for folder in folders for word in ("-I", str(folder))]
    command = [sys.executable, str(ROOT / "cmake" / "metal_source.py"), *includes, str(source), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, str]:
    """Each source as it is embedded where Metal's compiler is missing."""
    folder = tmp_path_factory.mktemp("texts")
    for source in SOURCES:
        done = embed(source, folder / source.name, ROOT / "kernels")
        assert done.returncode == 0, done.stderr
    return {source.stem: (folder / source.name).read_text() for source in SOURCES}


def test_embedded_sources_name_every_kernel(texts):
    named = [line.split()[2] for text in texts.values() for line in text.splitlines() if line.startswith("//! kernel ")]
    assert sorted(named) == sorted(kernel["name"] for kernel in metal_moe.kernels())


def test_embedded_sources_need_no_file(texts):
    for name, text in texts.items():
        included = [line.split()[1] for line in text.splitlines() if line.lstrip().startswith("#include")]
        assert "<metal_stdlib>" in included and not any(one.startswith('"') for one in included), name
        assert "#pragma once" not in text
        assert text.count("#define INSTANTIATE") <= 1, f"{name}: a header stands in it twice"


def test_embedded_sources_carry_their_digest(texts):
    for name, text in texts.items():
        first, rest = text.split("\n", 1)
        assert first == f"//! digest {hashlib.sha256(rest.encode()).hexdigest()}", name


def test_embedded_sources_keep_their_places(tmp_path):
    """A message of Metal's compiler names the file and line of the repository."""
    (tmp_path / "one.h").write_text("#pragma once\n#include <metal_stdlib>\nusing namespace metal;\n")
    source = tmp_path / "two.metal"
    source.write_text(
        '#include "one.h"\n#include "one.h"\nkernel void two(device int* p [[buffer(0)]]) {\n  p[0] = 2;\n}\n'
    )
    assert embed(source, tmp_path / "out", tmp_path).returncode == 0
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[1] == "//! kernel two"
    assert lines.count("using namespace metal;") == 1
    place = lines.index("kernel void two(device int* p [[buffer(0)]]) {")
    marker = max(i for i in range(place) if lines[i].startswith("#line"))
    assert lines[marker].endswith('"two.metal"')
    assert int(lines[marker].split()[1]) + place - marker - 1 == 3


def test_embedding_names_a_missing_header(tmp_path):
    source = tmp_path / "lost.metal"
    source.write_text('#include "nowhere.h"\n')
    done = embed(source, tmp_path / "out", tmp_path)
    assert done.returncode == 1 and "nowhere.h" in done.stderr


@pytest.mark.parametrize(
    ("built_with", "running"), [("2.13.0", "2.13.0"), ("2.13.0", "2.13.1+cpu"), ("2.9.0a0+git", "2.9.1")]
)
def test_same_release_of_pytorch(built_with, running):
    _torch_abi.compare(built_with, running)


@pytest.mark.parametrize(("built_with", "running"), [("2.13.0", "2.14.0"), ("2.13.0", "3.13.0"), ("2.1.3", "2.13.0")])
def test_another_release_of_pytorch_is_refused(built_with, running):
    with pytest.raises(ImportError) as caught:
        _torch_abi.compare(built_with, running)
    text = str(caught.value)
    assert f"built with PyTorch {built_with}" in text and f"PyTorch {running} is installed" in text
    assert f"torch=={'.'.join(built_with.split('.')[:2])}.*" in text


@pytest.mark.skipif(sys.platform == "darwin", reason="there they exist")
def test_what_only_metal_has(tmp_path):
    with pytest.raises(RuntimeError, match=r"capture: GPU captures need Apple's Metal.*\"cpu\" or \"cuda\""):
        with metal_moe.capture(tmp_path / "a.gputrace"):
            pass
    with pytest.raises(RuntimeError, match="keep_resident: residency sets need Apple's Metal"):
        metal_moe.keep_resident(torch.ones(3), metal_moe.QuantizedExperts.quantize(torch.ones(1, 8, 64)))


def test_quantised_weights_are_kept_by_their_buffers():
    w = torch.ones(1, 8, 64)
    for weights, names in (
        (metal_moe.QuantizedExperts.quantize(w), ("codes", "scales", "biases", "table")),
        (metal_moe.QuantizedExperts.quantize(w, format="mxfp4"), ("codes", "scales", "table")),
    ):
        part = weights.parts["weight"]
        kept = gpu._memory((w, weights))
        assert [one.data_ptr() for one in kept] == [w.data_ptr(), *(getattr(part, name).data_ptr() for name in names)]


def test_wrong_paths_of_a_capture(tmp_path):
    there = tmp_path / "there.gputrace"
    there.mkdir()
    for path, message in [
        (3, "path is of type int"),
        (tmp_path / "layer.txt", 'path is "layer.txt"; it must be a name that ends in ".gputrace"'),
        (there, "which exists; it must be a new document"),
        (tmp_path / "no" / "a.gputrace", "it must be in a folder that exists"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            with metal_moe.capture(path):
                pass


def test_wrong_arguments_of_keep_resident():
    with pytest.raises(TypeError, match="tensors is of type list"):
        metal_moe.keep_resident([torch.ones(3)])
    with pytest.raises(ValueError, match="tensors is empty"):
        metal_moe.keep_resident()

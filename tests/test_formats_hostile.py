"""Checkpoints of every kind with something wrong at random: refused by name, or read and decoded without a fault."""

import json
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from metal_moe.formats import ExpertReader, QuantizedExperts
from safetensors.torch import load_file, save_file
from test_cli_quantize import checkpoint_of, run
from test_formats_readers import shared_tensors

KINDS = ("exl3", "mlx", "gpt-oss", "dense", "stacked", "metal-moe")
MODEL, CONFIG = "model.safetensors", "config.json"
TYPES = (torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.int64)
# What a config may say instead: of no type that is expected, or of the type and absurd.
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.builds(list),
    st.builds(dict),
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Whole ones: tensors and config by kind, with shared experts."""
    whole = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind) / "in"
        checkpoint_of("dense" if kind == "metal-moe" else kind, folder)
        shared = kind if kind in ("exl3", "mlx") else "dense"
        save_file(shared_tensors(shared, "model.layers.1.mlp.shared_experts."), folder / "shared.safetensors")
        if kind == "metal-moe":
            import metal_moe.cli as cli

            out = folder.with_name("out")
            assert cli.main(["quantize", str(folder), "--output", str(out), "--format", "affine"]) == 0
            folder = out
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            tensors |= load_file(file)
        whole[kind] = tensors, json.loads((folder / CONFIG).read_text())
    return whole


def read_all(folder) -> bool:
    """Whether the checkpoint was read; it was refused with its own name otherwise."""
    try:
        with ExpertReader(folder) as reader:
            for experts in reader:
                for weights in (experts.w1, experts.w2, experts.shared_w1, experts.shared_w2):
                    if isinstance(weights, QuantizedExperts):
                        weights.dequantize()
                    elif weights is not None:
                        weights.sum()
    except ValueError as error:
        assert str(folder) in str(error), error
        return False
    return True


def write(folder, tensors: dict, config: object) -> None:
    folder.mkdir()
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / MODEL)
    (folder / CONFIG).write_text(json.dumps(config))


def changed(draw, tensors: dict) -> dict:
    """One to three tensors missing, renamed, of another type, or of another shape."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        how = draw(st.sampled_from(("missing", "renamed", "type", "cut", "flat", "deeper", "empty", "longer")))
        if how == "renamed":
            digit = draw(st.sampled_from(("0", "1", "7", "99999999")))
            tensors[name.replace("layers.1", f"layers.{digit}").replace("experts.1", f"experts.{digit}")] = tensor
        elif how == "type":
            data = tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor
            kind = draw(st.sampled_from(TYPES))
            tensors[name] = data.view(kind) if data.ndim and data.shape[-1] % kind.itemsize == 0 else tensor.to(kind)
        elif how == "cut" and tensor.ndim:
            axis = draw(st.integers(0, tensor.ndim - 1))
            tensors[name] = tensor.narrow(axis, 0, draw(st.integers(0, tensor.shape[axis])))
        elif how == "flat":
            tensors[name] = tensor.flatten()
        elif how == "deeper":
            tensors[name] = tensor[None]
        elif how == "empty":
            tensors[name] = tensor.new_empty(0)
        elif how == "longer":
            tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor.new_zeros(3)
    return tensors


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Every key of nested objects."""
    found = []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += [(*path, key), *places(inner, (*path, key))]
    return found


OPTIONS = {
    "deadline": None,
    "derandomize": True,  # the same cases on every run
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@pytest.mark.parametrize("kind", KINDS)
def test_whole_ones_are_read(kind, checkpoints, tmp_path):
    write(tmp_path / "whole", *checkpoints[kind])
    assert read_all(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_wrong(kind, checkpoints, tmp_path):
    refused = []

    @settings(max_examples=60, **OPTIONS)
    @given(st.data())
    def check(data):
        tensors, config = checkpoints[kind]
        folder = tmp_path / str(len(refused))
        write(folder, changed(data.draw, tensors), config)
        refused.append(not read_all(folder))

    check()
    assert sum(refused) > len(refused) / 3


@pytest.mark.parametrize("kind", KINDS)
def test_configs_that_are_wrong(kind, checkpoints, tmp_path):
    count = 0

    @settings(max_examples=40, **OPTIONS)
    @given(st.data())
    def check(data):
        nonlocal count
        tensors, config = checkpoints[kind]
        config = json.loads(json.dumps(config))
        for path in data.draw(st.lists(st.sampled_from([(), *places(config)]), min_size=1, max_size=2)):
            holder = config
            for key in path[:-1]:
                holder = holder[key] if isinstance(holder, dict) and key in holder else {}
            if not path:
                config = data.draw(VALUES)
            elif isinstance(holder, dict):
                holder[path[-1]] = data.draw(VALUES)
        count += 1
        write(tmp_path / str(count), tensors, config)
        read_all(tmp_path / str(count))

    check()
    assert count >= 20


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cut_or_have_random_bytes(kind, checkpoints, tmp_path):
    write(tmp_path / "whole", *checkpoints[kind])
    whole = (tmp_path / "whole" / MODEL).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = []

    @settings(max_examples=60, **OPTIONS)
    @given(st.data())
    def check(data):
        content = bytearray(whole)
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        # A new file each time: PyTorch may still have the last one mapped.
        folder = tmp_path / str(len(refused))
        write(folder, {"x": torch.zeros(1)}, checkpoints[kind][1])
        (folder / MODEL).write_bytes(content)
        refused.append(not read_all(folder))

    check()
    assert sum(refused) > len(refused) / 2


def test_the_command_line_says_it_too(capsys, checkpoints, tmp_path):
    """One line, naming the file."""
    tensors, config = checkpoints["gpt-oss"]
    write(tmp_path / "in", tensors, config)
    content = (tmp_path / "in" / MODEL).read_bytes()
    (tmp_path / "in" / MODEL).write_bytes(content[: len(content) // 2])
    status, out, err = run(capsys, "quantize", tmp_path / "in", "--output", tmp_path / "out")
    assert (status, out) == (1, "")
    assert "model.safetensors: not a valid safetensors file" in err.splitlines()[-1]

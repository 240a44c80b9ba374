"""Quantised experts in files of their own: saved, mapped back, and refused where a file is not what it says."""

import json
import random
import re
import struct
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from metal_moe.formats import QuantizedExperts
from metal_moe.formats.layout import RECORD, Format
from test_formats_mxfp4 import gpt_oss
from test_formats_trellis import exl3_linear


def mixed() -> QuantizedExperts:
    """Gate and up of other bits, expert 2 in another format than the rest, with a bias."""
    weights = torch.randn(2, 64, 128)
    one = QuantizedExperts.quantize(weights, format="affine", bits={"gate": 6, "up": [2, 3]}, group_size=32)
    sides = dict(zip(("gate", "up"), weights[:1].split(32, 1), strict=True))
    return QuantizedExperts.cat([one, QuantizedExperts.quantize(sides, format="mxfp4")])


def examples() -> dict[str, QuantizedExperts]:
    return {
        "affine": QuantizedExperts.quantize(torch.randn(3, 16, 128).bfloat16(), bits=3, bias=torch.randn(3, 16)),
        "mxfp4": QuantizedExperts.from_mxfp4(*gpt_oss(2, 32, 64)[:2], bias=torch.randn(2, 32).bfloat16()),
        "trellis": QuantizedExperts.from_exl3([exl3_linear(256, 128, 3 + i % 2) for i in range(3)], shape=(100, 200)),
        "mixed": mixed(),
    }


@pytest.mark.parametrize("kind", ["affine", "mxfp4", "trellis", "mixed"])
def test_saved_and_loaded(kind, tmp_path):
    experts = examples()[kind]
    path = tmp_path / "experts.safetensors"
    experts.save(path, "model.layers.3.w1.")
    loaded = QuantizedExperts.load(path, "model.layers.3.w1.")
    assert loaded.shape == experts.shape and repr(loaded) == repr(experts)
    assert torch.equal(loaded.dequantize(), experts.dequantize())
    assert (loaded.bias is None) == (experts.bias is None)
    assert experts.bias is None or torch.equal(loaded.bias, experts.bias)
    # The real package reads the same bytes, and every buffer begins at a multiple of 16.
    theirs = safetensors.torch.load_file(path)
    assert theirs.keys() == experts.state_dict("model.layers.3.w1.").keys()
    for name, tensor in experts.state_dict("model.layers.3.w1.").items():
        assert torch.equal(theirs[name], tensor), name
    assert all(b.data_ptr() % 16 == 0 for part in loaded.parts.values() for b in part.buffers().values() if len(b))
    assert [path.name for path in tmp_path.iterdir()] == ["experts.safetensors"], "nothing unfinished is left"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_loading_maps_the_file(tmp_path):
    experts = examples()["affine"]
    path = tmp_path / "experts.safetensors"
    experts.save(path)
    loaded = QuantizedExperts.load(path)
    address = loaded.parts["weight"].codes.data_ptr()
    with open("/proc/self/maps") as maps:
        lines = [line.split() for line in maps if str(path) in line]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    assert any(low <= address < high for low, high in spans)


def test_state_dict_shares_memory():
    experts = examples()["mixed"]
    again = QuantizedExperts.from_state_dict(experts.state_dict("a."), "a.")
    for name, part in experts.parts.items():
        for buffer, other in zip(part.buffers().values(), again.parts[name].buffers().values(), strict=True):
            assert buffer.data_ptr() == other.data_ptr()


def test_aligned_copies_what_is_not():
    storage = torch.zeros(2 * 16 * 64 + 64, dtype=torch.uint8)
    offset = (8 - storage.data_ptr()) % 16
    blocks = storage[offset : offset + 2 * 16 * 64].view(2, 16, 4, 16)
    experts = QuantizedExperts.from_mxfp4(blocks, torch.full((2, 16, 4), 127, dtype=torch.uint8))
    assert experts.parts["weight"].codes.data_ptr() % 16 == 8
    assert experts.aligned().parts["weight"].codes.data_ptr() % 16 == 0
    assert torch.equal(experts.aligned().dequantize(), experts.dequantize())
    again = experts.aligned().aligned()
    assert again.parts["weight"].scales.data_ptr() == experts.parts["weight"].scales.data_ptr()


def test_records_are_what_the_documentation_says():
    """docs/formats.md: byte, type, field. Kernels read a record as this struct."""
    text = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (u32|u64) \| `?(\w*)`? +\|", text, re.MULTILINE)
    documented = {name or "reserved": (int(byte), {"u64": "<u8", "u32": "<u4"}[kind]) for byte, kind, name in rows}
    assert documented == {name: (offset, dtype.str) for name, (dtype, offset, *_) in RECORD.fields.items()}
    assert RECORD.itemsize == 64
    names = {known.NUMBER: name for name, known in Format.registry.items()}
    assert names == {1: "affine", 2: "mxfp4", 3: "mxfp8", 4: "nvfp4", 5: "trellis", 6: "dense"}


def change(state: dict[str, torch.Tensor], field: str, value: int, expert: int = 1) -> dict[str, torch.Tensor]:
    table = state["weight.table"].clone()
    table.numpy().view(RECORD)[expert, 0][field] = value
    return {**state, "weight.table": table}


# A table is data of a file: whatever it says, no kernel may be led out of a buffer.
HOSTILE = {
    "codes beyond the buffer": (("codes", 1 << 20), "codes ends at byte"),
    "offset near 2**64": (("codes", (1 << 64) - 16), "codes ends at byte"),
    "scales beyond the buffer": (("scales", 4096), "scales ends at byte"),
    "biases beyond the buffer": (("biases", 4096), "biases ends at byte"),
    "large stride": (("codes_stride", (1 << 32) - 4), "codes ends at byte"),
    "small stride": (("codes_stride", 4), "apart|stride"),
    "misaligned codes": (("codes", 3), "must be multiples of 4"),
    "misaligned scales": (("scales", 1), "must be multiples of 2"),
    "unknown format": (("format", 77), "format is 77"),
    "no format": (("format", 0), "format is 0"),
    "bits of another format": (("half_bits", 7), "bits is 3.5; affine has"),
    "group of nothing": (("group_size", 0), "group_size is 0"),
    "unknown scale type": (("scale_type", 9), "scale_type is 9; it must be below 5"),
    "unknown codebook": (("codebook", 3), "codebook is 3; it must be below 3"),
    "no rows": (("rows", 0), r"the matrix is \[0, 128\]"),
    "rows without end": (("rows", (1 << 32) - 1), "sizes must be from 1 to"),
    "rows of its own": (("rows", 8), "must be equal"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tables_that_lie(case):
    (field, value), message = HOSTILE[case]
    state = QuantizedExperts.quantize(torch.randn(3, 16, 128).bfloat16(), bits=3).state_dict()
    with pytest.raises(ValueError, match=message) as error:
        QuantizedExperts.from_state_dict(change(state, field, value))
    assert "expert 1" in str(error.value)


def test_buffers_that_do_not_fit():
    state = QuantizedExperts.quantize(torch.randn(3, 16, 128), bits=3).state_dict()
    with pytest.raises(ValueError, match="codes ends at byte"):
        QuantizedExperts.from_state_dict({**state, "weight.codes": state["weight.codes"][:-1]})
    with pytest.raises(ValueError, match="weight.codes is torch.int8"):
        QuantizedExperts.from_state_dict({**state, "weight.codes": state["weight.codes"].view(torch.int8)})
    with pytest.raises(ValueError, match="'weight.scales' is missing"):
        QuantizedExperts.from_state_dict({k: v for k, v in state.items() if k != "weight.scales"})
    with pytest.raises(ValueError, match=r"table is torch.int32 \(0, 16\)"):
        QuantizedExperts.from_state_dict({**state, "weight.table": state["weight.table"][:0]})
    with pytest.raises(ValueError, match="no tensor"):
        QuantizedExperts.from_state_dict(state, "model.")
    with pytest.raises(ValueError, match=r"bias has shape \(3, 15\); it must be \[3, 16\]"):
        QuantizedExperts.from_state_dict({**state, "bias": torch.zeros(3, 15)})


def write(path: Path, header: object, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "half a length": b"\x10\x00\x00",
    "header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "length of 2**64": b"\xff" * 8 + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"{{{{",
    "not an object": struct.pack("<Q", 2) + b"[]",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_without_a_header(case, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(ValueError, match="broken.safetensors: not a valid safetensors file"):
        QuantizedExperts.load(path)


LYING = {
    "offsets beyond the file": {"a": entry("U8", [64], 0, 64)},
    "overlapping tensors": {"a": entry("U8", [32], 0, 32), "b": entry("U8", [32], 16, 48)},
    "a gap": {"a": entry("U8", [8], 0, 8), "b": entry("U8", [8], 40, 48)},
    "end before begin": {"a": entry("U8", [8], 48, 40)},
    "negative offset": {"a": entry("U8", [8], -8, 0)},
    "shape larger than the bytes": {"a": entry("F32", [1000], 0, 48)},
    "shape that overflows": {"a": entry("F32", [1 << 40, 1 << 40], 0, 48)},
    "negative shape": {"a": entry("U8", [-48], 0, 48)},
    "unknown type": {"a": entry("F5", [48], 0, 48)},
    "no offsets": {"a": {"dtype": "U8", "shape": [48]}},
    "bytes that nobody owns": {"a": entry("U8", [8], 0, 8)},
}


@pytest.mark.parametrize("case", LYING)
def test_headers_that_lie(case, tmp_path):
    path = tmp_path / "lying.safetensors"
    write(path, LYING[case], bytes(48))
    with pytest.raises(ValueError, match="lying.safetensors: not a valid safetensors file"):
        QuantizedExperts.load(path)


def test_truncated_files(tmp_path):
    path = tmp_path / "experts.safetensors"
    examples()["mixed"].save(path)
    whole = path.read_bytes()
    for length in (0, 5, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="experts.safetensors: not a valid safetensors file"):
            QuantizedExperts.load(path)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(ValueError, match="nothing.safetensors: there is no such file"):
        QuantizedExperts.load(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        QuantizedExperts.load(tmp_path)
    path = tmp_path / "dense.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="dense.safetensors: no tensor 'weight.table'"):
        QuantizedExperts.load(path)


def test_unknown_types_are_not_written(tmp_path):
    from metal_moe.formats.safetensors_file import save_safetensors

    with pytest.raises(TypeError, match="x is torch.complex64"):
        save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["affine", "trellis", "mixed"])
def test_files_with_random_bytes(kind, tmp_path):
    """Whatever a few bytes of the header or of a table say, the file is refused or decodes without a fault."""
    path = tmp_path / "experts.safetensors"
    experts = examples()[kind]
    experts.save(path)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    starts = [header + json.loads(whole[8:header])[f"{name}.table"]["data_offsets"][0] for name in experts.parts]
    tables = [byte for start in starts for byte in range(start, start + 64 * experts.num_experts)]
    rng = random.Random(0)
    refused = 0
    for attempt in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(8, header) if attempt % 3 == 0 else rng.choice(tables)] = rng.randrange(256)
        # A new file each time: PyTorch may still have the last one mapped.
        path = tmp_path / f"{attempt}.safetensors"
        path.write_bytes(data)
        try:
            QuantizedExperts.load(path).dequantize()
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert 50 < refused < 150

"""Trellis codes (EXL3), bit for bit.

`data/exl3_vectors.npz` has random tiles as they stand in a file, and what exllamav3's own kernels made of them on each
bit rate and codebook: the first tile in full, all of them as a SHA-256.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from metal_moe.formats import QuantizedExperts, codebooks, trellis
from metal_moe.formats.hadamard import hadamard

VECTORS = np.load(Path(__file__).parent / "data" / "exl3_vectors.npz")
CODEBOOKS = ("3inst", "mcg", "mul1")
WHOLE = [str(bits) for bits in range(1, 9)]
HALVES = [f"{bits}h" for bits in range(1, 8)]
MARKERS = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}


def rate(name: str) -> float:
    return float(name.rstrip("h")) + (0.5 if name.endswith("h") else 0)


def words_of(name: str) -> torch.Tensor:
    return torch.from_numpy(VECTORS[f"words_k{name}"].view(np.int32))


def assert_digest(values: np.ndarray, key: str) -> None:
    assert hashlib.sha256(np.ascontiguousarray(values).tobytes()).digest() == VECTORS[f"{key}_sha256"].tobytes(), key


def exl3_linear(
    inputs: int, outputs: int, bits: float, codebook: str = "mul1", seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random tensors of one linear layer, as a checkpoint names them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (inputs // 16, outputs // 16, int(16 * bits))
    tensors = {
        "trellis": torch.randint(-(2**15), 2**15, shape, generator=generator).to(torch.int16),
        "suh": torch.randn(inputs, generator=generator).half(),
        "svh": torch.randn(outputs, generator=generator).half(),
    }
    if codebook in MARKERS:
        tensors[codebook] = torch.tensor(MARKERS[codebook]).to(torch.uint32).view(torch.int32)
    return tensors


def hadamard_matrix() -> np.ndarray:
    i = np.arange(128)
    return (-1.0) ** np.bitwise_count(i[:, None] & i[None, :]) / np.sqrt(128)


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_codebooks(codebook):
    table = codebooks.table(codebook)
    assert_digest(table.view(np.uint16), f"codebook_{codebook}")
    assert table.astype(np.float64).std() == pytest.approx(codebooks.STANDARD_DEVIATIONS[codebook], abs=1e-5)


@pytest.mark.parametrize("name", WHOLE + HALVES)
def test_states(name):
    words = words_of(name)
    states = trellis.tile_states(words, rate(name))
    assert_digest(states.numpy().astype(np.uint16), f"states_k{name}")
    assert torch.equal(trellis.pack_states(states, rate(name)), words)


@pytest.mark.parametrize(
    ("name", "codebook"), [(n, c) for n in WHOLE for c in CODEBOOKS] + [(n, "mul1") for n in HALVES]
)
def test_tiles(name, codebook):
    """Values and their places: [k, n] of each tile."""
    words = words_of(name)
    decoded = trellis.decode_tiles(words[None, :, None], rate(name), codebook, torch.float32)[0]  # [16, 16 * tiles]
    tiles = decoded.view(16, -1, 16).permute(1, 2, 0).half().contiguous().numpy().view(np.uint16)
    assert np.array_equal(tiles[0], VECTORS[f"tile_k{name}_{codebook}_first"])
    assert_digest(tiles, f"tile_k{name}_{codebook}")


@pytest.mark.parametrize("name", WHOLE)
def test_dense_weights(name):
    tensors = {
        "trellis": torch.from_numpy(VECTORS[f"words_k{name}"].view(np.int16)).view(8, 16, -1),
        "suh": torch.from_numpy(VECTORS[f"suh_k{name}"]),
        "svh": torch.from_numpy(VECTORS[f"svh_k{name}"]),
        "mul1": torch.tensor(MARKERS["mul1"]).to(torch.uint32).view(torch.int32),
    }
    experts = QuantizedExperts.from_exl3([tensors])
    assert experts.shape == (1, 256, 128)
    assert_digest(experts.dequantize()[0].T.contiguous().numpy(), f"dense_mul1_k{name}")


def test_dense_weights_by_definition():
    """diag(suh) H What H diag(svh) with matrices, in float64."""
    tensors = exl3_linear(256, 384, 3)
    words = tensors["trellis"].view(torch.int32)
    rotated = trellis.decode_tiles(words[None], 3, "mul1", torch.float64)[0].T.numpy()
    block = hadamard_matrix()
    inputs, outputs = np.kron(np.eye(2), block), np.kron(np.eye(3), block)
    suh, svh = tensors["suh"].double().numpy(), tensors["svh"].double().numpy()
    expected = suh[:, None] * (inputs @ rotated @ outputs) * svh
    got = QuantizedExperts.from_exl3([tensors]).dequantize(torch.float64)[0].T.numpy()
    assert np.abs(got - expected).max() <= 1e-14 * np.abs(expected).max()


def test_hadamard():
    x = torch.randn(3, 256, dtype=torch.float64)
    expected = x.numpy() @ np.kron(np.eye(2), hadamard_matrix())
    assert np.allclose(hadamard(x).numpy(), expected, rtol=0, atol=1e-14)
    assert torch.allclose(hadamard(hadamard(x)), x, rtol=0, atol=1e-14)
    assert torch.equal(hadamard(x.T, 0), hadamard(x).T)


def test_older_files_with_packed_signs():
    tensors = exl3_linear(256, 128, 4, "3inst")
    packed = torch.from_numpy(VECTORS["sign_packed"].view(np.int16))
    unpacked = torch.from_numpy(VECTORS["sign_unpacked"])
    old = {"trellis": tensors["trellis"], "su": packed, "svh": tensors["svh"]}
    new = {**tensors, "suh": unpacked}
    assert torch.equal(QuantizedExperts.from_exl3([old]).dequantize(), QuantizedExperts.from_exl3([new]).dequantize())
    # The h form wins where both are there.
    both = QuantizedExperts.from_exl3([{**tensors, "su": packed}])
    assert torch.equal(both.dequantize(), QuantizedExperts.from_exl3([tensors]).dequantize())


def test_experts_of_different_bits_and_codebooks():
    kinds = [(4, "mul1"), (6, "mcg"), (4, "mul1"), (2.5, "mul1"), (8, "3inst")]
    linears = [exl3_linear(256, 128, bits, codebook, seed) for seed, (bits, codebook) in enumerate(kinds)]
    experts = QuantizedExperts.from_exl3(linears)
    part = experts.parts["weight"]
    assert [(s.bits, s.codebook) for s in part.settings] == kinds
    assert part.records["half_bits"].tolist() == [8, 12, 8, 5, 16]
    assert all((part.records[name] % 16 == 0).all() for name in ("codes", "scales", "biases"))
    for expert, linear in enumerate(linears):
        alone = QuantizedExperts.from_exl3([linear]).dequantize()
        assert torch.equal(experts.dequantize(experts=[expert]), alone)
        # What a kernel finds by the record is what the file has.
        record, codes = part.records[expert], linear["trellis"].view(torch.uint8).flatten()
        assert torch.equal(part.codes[int(record["codes"]) :][: len(codes)], codes)
        assert record["codes_stride"] == 128 // 16 * 32 * linear["trellis"].shape[2] / 16
        suh = part.scales[int(record["scales"]) :][: 2 * 256].view(torch.float16)
        assert torch.equal(suh, linear["suh"])
        svh = part.biases[int(record["biases"]) :][: 2 * 128].view(torch.float16)
        assert torch.equal(svh, linear["svh"])


def test_gate_and_up_with_bits_of_their_own():
    gate = [exl3_linear(128, 128, 6, seed=i) for i in range(3)]
    up = [exl3_linear(128, 128, 2, seed=10 + i) for i in range(3)]
    w1 = QuantizedExperts.from_exl3([gate, up])
    assert w1.shape == (3, 256, 128)
    assert [part.settings[0].bits for part in w1.gate_up()] == [6, 2]
    expected = torch.cat([QuantizedExperts.from_exl3(side).dequantize() for side in (gate, up)], 1)
    assert torch.equal(w1.dequantize(), expected)


def test_padded_sizes_and_bias():
    """gpt-oss's 2880 is stored as 2944; here 200 as 256."""
    linears = [{**exl3_linear(256, 256, 4, seed=i), "bias": torch.randn(256)} for i in range(2)]
    experts = QuantizedExperts.from_exl3(linears, shape=(200, 180))
    assert experts.shape == (2, 200, 180)
    whole = QuantizedExperts.from_exl3(linears)
    assert torch.equal(experts.dequantize(), whole.dequantize()[:, :200, :180])
    assert torch.equal(experts.bias, torch.stack([linear["bias"][:200].half() for linear in linears]))
    assert whole.bias.shape == (2, 256)
    with pytest.raises(
        ValueError, match=r"shape is \(100, 180\); rounded up to multiples of 128 it must be \(256, 256\)"
    ):
        QuantizedExperts.from_exl3(linears, shape=(100, 180))
    del linears[1]["bias"]
    with pytest.raises(ValueError, match=r"experts\[1\].bias is missing"):
        QuantizedExperts.from_exl3(linears)


def test_a_fused_w1_is_taken_apart_at_blocks():
    linear = exl3_linear(128, 512, 3)
    w1 = QuantizedExperts.from_exl3([linear])
    dense = w1.dequantize()
    gate, up = w1.gate_up()
    assert torch.equal(gate.dequantize(None, torch.float32), dense[:, :256])
    assert torch.equal(up.dequantize(None, torch.float32), dense[:, 256:])
    with pytest.raises(ValueError, match="only whole blocks of 128"):
        w1.gate_up(interleaved=True)
    with pytest.raises(ValueError, match="only whole blocks of 128"):
        QuantizedExperts.from_exl3([exl3_linear(128, 128, 3)]).gate_up()


def test_an_expert_decodes_in_well_under_a_second():
    experts = QuantizedExperts.from_exl3([exl3_linear(2048, 768, 4)])
    threads = torch.get_num_threads()
    times = []
    try:
        torch.set_num_threads(1)
        for _ in range(3):  # this thread's own time: the machine may be busy with something else
            start = time.thread_time()
            experts.dequantize()
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(times) < 0.5


WRONG = {
    "no trellis": ({"trellis": None}, "trellis is missing"),
    "no suh": ({"suh": None}, "suh is missing"),
    "short suh": ({"suh": torch.zeros(128, dtype=torch.float16)}, r"suh has shape \(128,\); it must be \[256\]"),
    "svh of another type": ({"svh": torch.zeros(256)}, "svh is float32; it must be float16"),
    "trellis of another type": ({"trellis": torch.zeros(16, 16, 64)}, "trellis is float32; it must be int16"),
    "no tiles": ({"trellis": torch.zeros(0, 16, 64, dtype=torch.int16)}, "must be a multiple of 8"),
    "half a block": ({"trellis": torch.zeros(12, 16, 64, dtype=torch.int16)}, "must be a multiple of 8"),
    "9 bits": ({"trellis": torch.zeros(16, 16, 144, dtype=torch.int16)}, "bits is 9; trellis has 1 to 8"),
    "0 bits": ({"trellis": torch.zeros(16, 16, 0, dtype=torch.int16)}, "bits is 0"),
    "a third of a bit": ({"trellis": torch.zeros(16, 16, 69, dtype=torch.int16)}, "bits is 4.3125"),
    "trial files": ({"scale": torch.ones(1)}, "scale is there"),
    "two codebooks": ({"mcg": torch.tensor(0)}, "both mcg and mul1"),
    "another multiplier": ({"mul1": torch.tensor(5, dtype=torch.int32)}, "mul1 is 0x5; it must be 0x83dcd12d"),
    "a marker of another type": ({"mul1": torch.zeros(2)}, "it must be one int32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_make_no_layer(case):
    changes, message = WRONG[case]
    tensors = {**exl3_linear(256, 256, 4), **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        QuantizedExperts.from_exl3([{name: tensor for name, tensor in tensors.items() if tensor is not None}])


def test_half_rates_exist_with_mul1_alone():
    with pytest.raises(ValueError, match="rates of n . 1/2 exist with mul1 alone"):
        QuantizedExperts.from_exl3([exl3_linear(128, 128, 2.5, "mcg")])


def test_experts_of_different_shapes():
    with pytest.raises(ValueError, match=r"experts\[1\].trellis has \(8, 16\) tiles, that of expert 0 \(8, 8\)"):
        QuantizedExperts.from_exl3([exl3_linear(128, 128, 4), exl3_linear(128, 256, 4)])

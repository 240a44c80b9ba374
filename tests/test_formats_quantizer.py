"""The trellis quantiser: walks as good as exllamav3's, errors where inputs do not see them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from metal_moe.formats import QuantizedExperts, codebooks, trellis, trellis_quantizer
from metal_moe.formats.viterbi import nearest_walks

VECTORS = np.load(Path(__file__).parent / "data" / "exl3_vectors.npz")
CODEBOOKS = ("3inst", "mcg", "mul1")

# Relative MSE of exllamav3's search on the inputs in VECTORS, to the digits that it was published with.
TABLE = {
    "3inst": (0.319, 0.0760, 0.0191, 0.00474, 0.00120, 3.2e-4, 8.2e-5, 2.1e-5),
    "mcg": (0.310, 0.0738, 0.0182, 0.00467, 0.00118, 3.1e-4, 8.1e-5, 2.1e-5),
    "mul1": (0.305, 0.0715, 0.0181, 0.00445, 0.00116, 2.8e-4, 7.7e-5, 1.9e-5),
}


def relative_mse(got: torch.Tensor, values: torch.Tensor) -> float:
    return float((got.double() - values.double()).square().sum() / values.double().square().sum())


def values_of(states: torch.Tensor, codebook: str) -> torch.Tensor:
    return torch.from_numpy(codebooks.table(codebook))[states].double()


def is_closed(states: torch.Tensor, bits: float) -> bool:
    step = torch.from_numpy(trellis.step_bits(bits))
    before = states.roll(1, -1).long()
    return torch.equal(before & (0xFFFF >> step), states.long() >> step)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_walks_are_as_good_as_the_references(bits, codebook):
    values = torch.from_numpy(VECTORS[f"enc_in_k{bits}_{codebook}"])
    states = nearest_walks(values, bits, codebook)
    assert is_closed(states, bits)
    error = relative_mse(values_of(states, codebook), values)
    reference = relative_mse(torch.from_numpy(VECTORS[f"enc_out_k{bits}_{codebook}"]), values)
    assert error <= 1.005 * reference
    # Half a unit of the table's last digit, which has two or three.
    table = TABLE[codebook][bits - 1]
    rounding = 0.5 * 10.0 ** (np.floor(np.log10(table)) - (1 if bits > 5 else 2))
    assert reference == pytest.approx(table, abs=rounding * 1.01)
    # What is packed decodes to the same walk.
    packed = trellis.pack_states(states, bits)
    assert torch.equal(trellis.tile_states(packed, bits), states)


@pytest.mark.parametrize("bits", [1.5, 2.5, 7.5])
def test_half_rates(bits):
    values = 0.8 * torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    states = nearest_walks(values, bits, "mul1")
    assert is_closed(states, bits)
    error = relative_mse(values_of(states, "mul1"), values)
    low, high = TABLE["mul1"][int(bits) - 1], TABLE["mul1"][int(bits)]
    assert high < error < low
    assert torch.equal(trellis.tile_states(trellis.pack_states(states, bits), bits), states)


def test_walks_do_not_depend_on_threads_or_on_other_tiles():
    values = torch.randn(5, 256, generator=torch.Generator().manual_seed(2))
    together = nearest_walks(values, 4, "mcg")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(nearest_walks(values[3:4], 4, "mcg"), together[3:4])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert nearest_walks(values[:0], 4, "mcg").shape == (0, 256)


def matrices(n: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights whose rows and columns differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, rows, columns, generator=generator) * 0.02
    return weights * (0.2 + torch.rand(rows, 1, generator=generator)) * (0.2 + torch.rand(columns, generator=generator))


@pytest.mark.parametrize(("bits", "codebook"), [(3, "mul1"), (4, "3inst"), (2.5, "mul1"), (6, "mcg")])
def test_matrices(bits, codebook):
    weights = matrices(1, 128, 128)
    experts = QuantizedExperts.quantize(weights, format="trellis", bits=bits, codebook=codebook)
    settings = experts.parts["weight"].settings[0]
    assert (settings.bits, settings.codebook) == (bits, codebook)
    low, high = TABLE[codebook][int(np.ceil(bits)) - 1], TABLE[codebook][int(bits) - 1]
    # Scales take most of the differences between rows and columns, float16 rounding of scales costs next to nothing.
    assert 0.9 * low < relative_mse(experts.dequantize(), weights) < 1.05 * high


def test_what_is_rounded_is_normal():
    """suh and svh take out sizes, the transforms the rest: unit variance in the codebook's scale, kurtosis 3."""
    rotated, suh, svh = trellis_quantizer._rotate(matrices(2, 384, 256).transpose(1, 2), 1.0, 0)
    assert suh.shape == (2, 256) and svh.shape == (2, 384)
    assert float(rotated.std()) == pytest.approx(1, abs=0.01)
    assert float((rotated**4).mean() / rotated.square().mean() ** 2) == pytest.approx(3, abs=0.1)


def test_padding_and_zeros():
    weights = matrices(2, 100, 120)
    weights[0, 7] = 0
    weights[0, :, 9] = 0
    weights[1] = 0
    experts = QuantizedExperts.quantize(weights, format="trellis", bits=5)
    assert experts.shape == (2, 100, 120)
    dense = experts.dequantize()
    assert not dense[0, 7].any() and not dense[0, :, 9].any() and not dense[1].any()
    assert relative_mse(dense, weights) < 1.1 * TABLE["mul1"][4]


def test_bits_by_projection_and_by_expert():
    """Gate 8, up 7, but expert 1's up in 5."""
    weights = matrices(2, 32, 32)
    experts = QuantizedExperts.quantize(weights, format="trellis", bits={"gate": 8, "up": [7, 5]})
    assert [[s.bits for s in part.settings] for part in experts.gate_up()] == [[8, 8], [7, 5]]
    errors = [
        relative_mse(experts.dequantize()[e, half], weights[e, half])
        for e in (0, 1)
        for half in (slice(16), slice(16, 32))
    ]
    assert errors[0] < errors[1] < errors[3] and errors[2] < errors[1]


def test_a_hessian_moves_errors_to_where_inputs_are_small():
    generator = torch.Generator().manual_seed(3)
    weights = matrices(1, 128, 128)
    inputs = torch.randn(512, 12, generator=generator) @ torch.randn(12, 128, generator=generator)
    inputs += 0.2 * torch.randn(512, 128, generator=generator)
    hessian = inputs.T @ inputs

    def output_error(experts: QuantizedExperts) -> float:
        return relative_mse(inputs @ experts.dequantize()[0].T, inputs @ weights[0].T)

    plain = QuantizedExperts.quantize(weights, format="trellis", bits=5)
    calibrated = QuantizedExperts.quantize(weights, format="trellis", bits=5, hessian=hessian)
    assert output_error(calibrated) < 0.4 * output_error(plain)
    assert relative_mse(calibrated.dequantize(), weights) < 2 * relative_mse(plain.dequantize(), weights)
    own = QuantizedExperts.quantize(weights, format="trellis", bits=5, hessian=hessian[None])
    assert torch.equal(own.dequantize(), calibrated.dequantize())


def test_block_factors():
    hessian = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    hessian = hessian @ hessian.transpose(1, 2) + torch.eye(64)
    lower = trellis_quantizer._block_lower(hessian)
    diagonal = torch.linalg.solve(lower, hessian) @ torch.linalg.inv(lower).transpose(1, 2)
    blocks = torch.block_diag(*[torch.ones(16, 16)] * 4)
    assert (diagonal * (1 - blocks)).abs().max() < 1e-5 * diagonal.abs().max()
    assert torch.allclose(lower * blocks, torch.eye(64).expand(2, 64, 64), atol=1e-6)
    assert not (lower * (1 - blocks)).triu().any()


def test_hessians_that_are_wrong():
    weights = matrices(2, 16, 16)
    quantize = QuantizedExperts.quantize
    with pytest.raises(ValueError, match=r"hessian has shape \(8, 8\); it must be \[16, 16\] or \[2, 16, 16\]"):
        quantize(weights, format="trellis", hessian=torch.eye(8))
    with pytest.raises(ValueError, match="hessian is not positive semidefinite"):
        quantize(weights, format="trellis", hessian=torch.diag(torch.tensor([-100.0] + [1.0] * 15)))
    with pytest.raises(ValueError, match="hessian is not positive semidefinite, or has values that are no numbers"):
        quantize(weights, format="trellis", hessian=torch.full((16, 16), float("nan")))
    with pytest.raises(TypeError, match="hessian is given; affine has no such option"):
        quantize(matrices(2, 16, 64), format="affine", hessian=torch.eye(64))


def test_another_search_can_take_over():
    """The interface of a kernel: values [m, 256] float32 -> states [m, 256] int32."""
    seen = []

    def walks(values: torch.Tensor, bits: float, codebook: str) -> torch.Tensor:
        seen.append((tuple(values.shape), values.dtype, bits, codebook))
        return nearest_walks(values, bits, codebook)

    weights = matrices(1, 16, 16)
    ours = QuantizedExperts.quantize(weights, format="trellis", bits=8, walks=walks)
    assert seen == [((64, 256), torch.float32, 8, "mul1")]
    assert torch.equal(ours.dequantize(), QuantizedExperts.quantize(weights, format="trellis", bits=8).dequantize())

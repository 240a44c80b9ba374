"""Kernels of trellis weights against the same in PyTorch, bit for bit: whole matrices, and the quantiser's search."""

import cases
import metal_moe
import pytest
import torch
from metal_moe.formats import QuantizedExperts, trellis, trellis_kernels, viterbi
from test_formats_trellis import exl3_linear

CODES = [(bits, codebook) for bits in range(1, 9) for codebook in ("3inst", "mcg", "mul1")]
CODES += [(bits + 0.5, "mul1") for bits in range(1, 8)]
# Where the number of bits makes one kernel differ from the next: one node for a thread, most of them, halves.
SEARCHED_BY_EXACT = [(1, "mcg"), (2.5, "mul1"), (4, "3inst"), (8, "mul1")]


def assert_decodes(experts: QuantizedExperts) -> None:
    for part in experts.parts.values():
        moved = part.to(cases.DEVICE)
        for group in part.groups():
            got = trellis_kernels.dequantize(moved.stack(group))
            assert metal_moe.last_dispatch()["kernels"] == ["dequantize_trellis"]
            assert torch.equal(got.cpu(), trellis.decode(part.stack(group), torch.float32))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize(("bits", "codebook"), CODES)
def test_matrices(bits, codebook, engine, use_engine):
    use_engine(engine)
    assert_decodes(QuantizedExperts.from_exl3([exl3_linear(128, 256, bits, codebook)]))


@pytest.mark.parametrize("engine", cases.ENGINES)
@pytest.mark.parametrize("codebook", ["3inst", "mcg", "mul1"])
def test_all_states(codebook, engine, use_engine):
    """Each of the 65536 states once at least: their values have all roundings that there are, ties among them."""
    use_engine(engine)
    # With 8 bits a state is two neighbouring bytes: those of a tile are one byte and 128 others in turn.
    one, others = torch.arange(256).view(256, 1, 1), torch.arange(256).view(1, 2, 128)
    ring = torch.stack([one.expand(256, 2, 128), others.expand(256, 2, 128)], -1).view(512, 256)
    states = ring.roll(1, -1) << 8 | ring
    assert states.unique().numel() == 2**16
    linear = exl3_linear(256, 512, 8, codebook)
    linear["trellis"] = trellis.pack_states(states.int(), 8).view(torch.int16).view(linear["trellis"].shape)
    assert_decodes(QuantizedExperts.from_exl3([linear]))


@pytest.mark.parametrize("engine", cases.ENGINES)
def test_several_matrices(engine, use_engine):
    """Sizes that were rounded up, gate and up within one matrix, experts of different bits."""
    use_engine(engine)
    linears = [exl3_linear(256, 256, bits, seed=seed) for seed, bits in enumerate((3, 3, 5))]
    padded = QuantizedExperts.from_exl3(linears, shape=(200, 180))
    assert_decodes(padded)
    dense = padded.dequantize()
    assert dense.shape == (3, 200, 180)
    gate, up = (part.dequantize(None, torch.float32) for part in QuantizedExperts.from_exl3(linears).gate_up())
    assert torch.equal(torch.cat([gate, up], 1)[:, :200, :180], dense)


def test_matrices_at_any_address():
    experts = QuantizedExperts.from_exl3([exl3_linear(128, 128, 3)])
    stack = experts.parts["weight"].stack([0])
    expected = trellis.decode(stack, torch.float32)
    for name in ("codes", "scales", "biases"):
        tensor = getattr(stack, name)
        setattr(stack, name, torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape))
    assert torch.equal(trellis_kernels.dequantize(stack), expected)


def assert_same_walks(values: torch.Tensor, bits: float, codebook: str) -> None:
    got = trellis_kernels.nearest_walks(values.to(cases.DEVICE), bits, codebook)
    assert metal_moe.last_dispatch()["kernels"] == ["viterbi"]
    assert torch.equal(got.cpu(), viterbi.nearest_walks(values, bits, codebook))


@pytest.mark.parametrize(("bits", "codebook"), CODES)
def test_walks(bits, codebook):
    generator = torch.Generator().manual_seed(round(2 * bits))
    assert_same_walks(torch.randn(3, 256, generator=generator), bits, codebook)


@pytest.mark.parametrize(("bits", "codebook"), SEARCHED_BY_EXACT)
def test_walks_in_any_order_of_threads(bits, codebook, exact_engine):
    exact_engine(7)
    assert_same_walks(torch.randn(1, 256, generator=torch.Generator().manual_seed(3)), bits, codebook)


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_of_equal_walks_the_same(bits):
    """Values on a coarse grid and all alike: many walks cost the same."""
    generator = torch.Generator().manual_seed(4)
    coarse = torch.randint(-2, 3, (2, 256), generator=generator) / 2
    assert_same_walks(torch.cat([coarse, torch.zeros(1, 256), torch.full((1, 256), 100.0)]), bits, "mul1")


def test_walks_do_not_depend_on_threads(num_threads):
    values = torch.randn(9, 256, generator=torch.Generator().manual_seed(5))
    num_threads(2)
    together = trellis_kernels.nearest_walks(values, 5, "mcg")
    num_threads(1)
    assert torch.equal(trellis_kernels.nearest_walks(values[4:5], 5, "mcg"), together[4:5])
    strided = torch.randn(256, 9, generator=torch.Generator().manual_seed(5)).T
    assert torch.equal(
        trellis_kernels.nearest_walks(strided, 5, "mcg"), trellis_kernels.nearest_walks(strided.contiguous(), 5, "mcg")
    )
    assert trellis_kernels.nearest_walks(values[:0], 5, "mcg").shape == (0, 256)


def test_values_that_are_no_tiles():
    with pytest.raises(ValueError, match=r"values has shape \(3, 128\); it must be \[n, 256\]"):
        trellis_kernels.nearest_walks(torch.zeros(3, 128), 4, "mul1")


def test_the_quantiser_searches_with_the_kernel():
    weights = torch.randn(1, 128, 128, generator=torch.Generator().manual_seed(6))
    by_kernel = QuantizedExperts.quantize(weights, format="trellis", bits=6)
    assert metal_moe.last_dispatch()["operation"] == "viterbi"
    by_pytorch = QuantizedExperts.quantize(weights, format="trellis", bits=6, walks=viterbi.nearest_walks)
    assert torch.equal(by_kernel.parts["weight"].codes, by_pytorch.parts["weight"].codes)

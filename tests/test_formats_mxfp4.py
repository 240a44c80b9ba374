"""mxfp4, mxfp8 and nvfp4 against MLX's own package, and gpt-oss's layout against its definition."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from metal_moe.formats import QuantizedExperts
from mlx_tensors import DTYPES, mlx_quantize, to_mlx, to_torch

# bits, block
MODES = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def difficult_weights(seed: int) -> np.ndarray:
    """Normal weights of many sizes, zeros, and every tie between two elements."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((3, 8, 256)).astype(np.float32)
    weights[0, 0] = 0
    weights[0, 1] = 1.5
    weights[0, 2] = np.resize(np.arange(-25, 25) / 4, 256)
    weights[0, 3] *= 1e-9
    weights[0, 4, ::5] = 0
    weights[0, 5] = 6
    weights[1] *= rng.lognormal(0, 2, (8, 256))
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_bits_are_those_of_mlx(mode, dtype):
    bits, block = MODES[mode]
    weights = to_mlx(difficult_weights(bits), dtype)
    codes, scales = mlx_quantize(weights, block, bits, mode)
    ours = QuantizedExperts.quantize(to_torch(weights), format=mode)
    part = ours.parts["weight"]
    assert torch.equal(part.scales, scales.flatten())
    assert torch.equal(part.codes.view(torch.int32), codes.view(torch.int32).flatten())
    theirs = mx.dequantize(*mx.quantize(weights, mode=mode), mode=mode, dtype=mx.float32)
    assert torch.equal(ours.dequantize(), to_torch(theirs))
    wrapped = QuantizedExperts.from_mlx(codes, scales, group_size=block, bits=bits, mode=mode)
    assert torch.equal(wrapped.dequantize(), to_torch(theirs))
    assert wrapped.parts["weight"].codes.data_ptr() == codes.data_ptr()


def test_nvfp4_of_half_a_run():
    """Columns in blocks of 16 that are no multiple of 32."""
    weights = to_mlx(np.random.default_rng(1).normal(size=(2, 8, 48)), "float32")
    codes, scales = mlx_quantize(weights, 16, 4, "nvfp4")
    wrapped = QuantizedExperts.from_mlx(codes, scales, group_size=16, bits=4, mode="nvfp4")
    theirs = to_torch(mx.dequantize(*mx.quantize(weights, mode="nvfp4"), mode="nvfp4", dtype=mx.float32))
    assert torch.equal(wrapped.dequantize(), theirs)
    assert torch.equal(QuantizedExperts.quantize(to_torch(weights), format="nvfp4").dequantize(), theirs)


def gpt_oss(experts: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random blocks, scales and bias as gpt-oss's checkpoint has them, scales around 1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 135, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
    return blocks, scales, torch.randn(experts, rows, generator=generator).bfloat16()


def test_gpt_oss_by_definition():
    blocks, scales, bias = gpt_oss(4, 128, 2880)
    experts = QuantizedExperts.from_mxfp4(blocks, scales, bias=bias)
    assert experts.shape == (4, 128, 2880)
    assert experts.parts["weight"].codes.data_ptr() == blocks.data_ptr()
    assert experts.parts["weight"].scales.data_ptr() == scales.data_ptr()
    assert experts.bias is bias
    assert experts.bits_per_weight == 4.25
    nibbles = np.stack([blocks.numpy() & 15, blocks.numpy() >> 4], -1).reshape(4, 128, 90, 32)
    expected = E2M1[nibbles] * 2.0 ** (scales.numpy()[..., None].astype(np.float64) - 127)
    assert np.array_equal(experts.dequantize(torch.float64).numpy(), expected.reshape(4, 128, 2880))
    assert np.array_equal(experts.dequantize().numpy(), expected.reshape(4, 128, 2880).astype(np.float32))


def test_gpt_oss_is_mlx_in_other_words():
    blocks, scales, _ = gpt_oss(2, 64, 96)
    words = blocks.flatten(-2).view(torch.int32)
    theirs = mx.dequantize(
        mx.array(words.numpy().view(np.uint32)), mx.array(scales.numpy()), mode="mxfp4", dtype=mx.float32
    )
    assert torch.equal(QuantizedExperts.from_mxfp4(blocks, scales).dequantize(), to_torch(theirs))


def test_gpt_oss_gate_and_up_are_interleaved():
    blocks, scales, _ = gpt_oss(3, 64, 64)
    experts = QuantizedExperts.from_mxfp4(blocks, scales)
    dense = experts.dequantize()
    gate, up = experts.gate_up(interleaved=True)
    assert torch.equal(gate.dequantize(None, torch.float32), dense[:, 0::2])
    assert torch.equal(up.dequantize(None, torch.float32), dense[:, 1::2])
    assert gate.codes.data_ptr() == blocks.data_ptr()


def test_extreme_scales():
    """2**-127 is subnormal in float32 and no less right; byte 255 is NaN."""
    blocks = torch.full((1, 4, 1, 16), 0x2A, dtype=torch.uint8)  # -1, 1
    scales = torch.tensor([[[0], [1], [254], [255]]], dtype=torch.uint8)
    got = QuantizedExperts.from_mxfp4(blocks, scales).dequantize(torch.float64)[0]
    assert got[0].tolist() == [-(2.0**-127), 2.0**-127] * 16
    assert got[2].tolist() == [-(2.0**127), 2.0**127] * 16
    assert got[3].isnan().all()
    assert QuantizedExperts.from_mxfp4(blocks, scales).dequantize()[0, 0].tolist() == got[0].tolist()


@pytest.mark.parametrize("mode", MODES)
def test_weights_of_extreme_size(mode):
    """Too small for any scale: nearly zero, or an error where all of them would be 0; nearly the largest of float32, or
    of nvfp4, which has a range of its own: as any other."""
    sizes = [(2.5e38, None), (1e-38, 1e-38), (1e-45, 1e-38)]
    if mode == "nvfp4":
        sizes = [(2600.0, None), (0.2, None)]
        for value, message in ((0.001, "expert 0 of w has values up to 0.001, too small for nvfp4"), (2700.0, "2688")):
            with pytest.raises(ValueError, match=message):
                QuantizedExperts.quantize(torch.full((1, 1, 32), value), format=mode)
    for value, limit in sizes:
        weights = torch.full((1, 1, 32), value)
        error = (QuantizedExperts.quantize(weights, format=mode).dequantize() - weights).abs().max()
        assert error <= (0.15 * value if limit is None else limit)


@pytest.mark.parametrize(
    ("blocks", "scales", "error", "message"),
    [
        ((2, 8, 4, 15), (2, 8, 4), ValueError, r"blocks has shape \(2, 8, 4, 15\); it must be \[any, any, any, 16\]"),
        ((2, 8, 4, 16), (2, 8, 3), ValueError, r"scales has shape \(2, 8, 3\); it must be \[2, 8, 4\]"),
        ((2, 8, 64), (2, 8, 4), ValueError, "blocks has shape"),
        ((2, 0, 4, 16), (2, 0, 4), ValueError, "must have rows and columns"),
    ],
)
def test_wrong_shapes(blocks, scales, error, message):
    with pytest.raises(error, match=message):
        QuantizedExperts.from_mxfp4(torch.zeros(blocks, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))
    with pytest.raises(TypeError, match="blocks is int8; it must be uint8"):
        QuantizedExperts.from_mxfp4(torch.zeros(2, 8, 4, 16, dtype=torch.int8), torch.zeros(2, 8, 4, dtype=torch.uint8))


def test_bits_and_groups_are_fixed():
    weights = torch.randn(1, 4, 64)
    with pytest.raises(ValueError, match="bits is 8; mxfp4 has 4"):
        QuantizedExperts.quantize(weights, format="mxfp4", bits=8)
    with pytest.raises(ValueError, match="group_size is 64; mxfp4 has 32"):
        QuantizedExperts.quantize(weights, format="mxfp4", group_size=64)
    with pytest.raises(ValueError, match="48 columns; it must be a multiple of 32"):
        QuantizedExperts.quantize(weights[..., :48], format="mxfp4")

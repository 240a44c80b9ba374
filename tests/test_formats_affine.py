"""Affine codes against MLX's own package: its bits are read, and the same bits are written."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from metal_moe.formats import QuantizedExperts
from mlx_tensors import DTYPES, mlx_quantize, to_mlx, to_torch

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)


def difficult_weights(seed: int, experts: int = 3, rows: int = 8, columns: int = 256) -> np.ndarray:
    """Normal weights, and groups that are constant, tiny, one-sided, or of very different sizes."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((experts, rows, columns)).astype(np.float32)
    weights[0, 0] = 0
    weights[0, 1] = 1.5
    weights[0, 2] = -2
    weights[0, 3] *= 1e-9
    weights[0, 4] = np.abs(weights[0, 4])
    weights[0, 5] = -np.abs(weights[0, 5]) - 3
    weights[0, 6, ::7] = 0
    weights[1] *= rng.lognormal(0, 1, weights[1].shape)
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_of_mlx(bits, group_size, dtype):
    weights = to_mlx(difficult_weights(bits), dtype)
    codes, scales, biases = mlx_quantize(weights, group_size, bits, "affine")
    ours = QuantizedExperts.quantize(to_torch(weights), format="affine", bits=bits, group_size=group_size)
    part = ours.parts["weight"]
    assert torch.equal(part.codes.view(torch.int32), codes.view(torch.int32).flatten())
    assert torch.equal(part.scales.view(scales.dtype), scales.flatten())
    assert torch.equal(part.biases.view(biases.dtype), biases.flatten())
    # Arithmetic in the scales' type has one rounding of the product and one of the sum.
    theirs = to_torch(mx.dequantize(*mx.quantize(weights, group_size, bits), group_size=group_size, bits=bits)).double()
    largest_product = scales.double().abs().repeat_interleave(group_size, -1) * (2**bits - 1)
    bound = torch.finfo(scales.dtype).eps * (largest_product + theirs.abs())
    assert ((ours.dequantize(torch.float64) - theirs).abs() <= bound).all()
    assert torch.equal(
        ours.dequantize(),
        QuantizedExperts.from_mlx(codes, scales, biases, group_size=group_size, bits=bits).dequantize(),
    )


@pytest.mark.parametrize("bits", BITS)
def test_decoded_value_by_value(bits):
    """scale * code + bias in float64, code i being the bits [i * b, (i + 1) * b) of its row."""
    codes, scales, biases = mlx_quantize(to_mlx(difficult_weights(1), "float16"), 64, bits, "affine")
    rows = codes.numpy().view(np.uint8)
    stream = np.unpackbits(rows, axis=-1, bitorder="little").reshape(*rows.shape[:2], -1, bits)
    values = (stream * (1 << np.arange(bits))).sum(-1).astype(np.float64)
    expected = values * np.repeat(scales.double().numpy(), 64, -1) + np.repeat(biases.double().numpy(), 64, -1)
    got = QuantizedExperts.from_mlx(codes, scales, biases, group_size=64, bits=bits).dequantize(torch.float64)
    assert np.array_equal(got.numpy(), expected)


def test_a_checkpoints_tensors_are_wrapped():
    codes, scales, biases = mlx_quantize(to_mlx(difficult_weights(2), "bfloat16"), 64, 4, "affine")
    experts = QuantizedExperts.from_mlx(codes, scales, biases, group_size=64, bits=4)
    part = experts.parts["weight"]
    assert [b.data_ptr() for b in part.buffers().values()] == [t.data_ptr() for t in (codes, scales, biases)]
    assert experts.shape == (3, 8, 256)
    assert experts.bits_per_weight == 4.5
    assert experts.nbytes == codes.nbytes + scales.nbytes + biases.nbytes + 3 * 64


def test_small_matrices_are_padded_to_16_bytes():
    """3 bits, one row of 32: 12 bytes; each expert begins at a multiple of 16 all the same."""
    weights = torch.randn(5, 1, 32)
    experts = QuantizedExperts.quantize(weights, format="affine", bits=3, group_size=32)
    part = experts.parts["weight"]
    assert part.records["codes"].tolist() == [0, 16, 32, 48, 64]
    assert part.records["scales"].tolist() == [0, 16, 32, 48, 64]
    mlx_codes, scales, biases = mlx_quantize(to_mlx(weights.numpy(), "float32"), 32, 3, "affine")
    copied = QuantizedExperts.from_mlx(mlx_codes, scales, biases, group_size=32, bits=3)
    assert torch.equal(copied.dequantize(), experts.dequantize())


def test_gate_and_up_of_one_tensor_in_either_order():
    weights = torch.randn(4, 96, 128)
    fused = QuantizedExperts.quantize(weights, format="affine", bits=5, group_size=64)
    dense = fused.dequantize()
    gate, up = fused.gate_up()
    assert gate.codes.data_ptr() == up.codes.data_ptr() == fused.parts["weight"].codes.data_ptr()
    assert torch.equal(gate.dequantize(None, torch.float32), dense[:, :48])
    assert torch.equal(up.dequantize(None, torch.float32), dense[:, 48:])
    gate, up = fused.gate_up(interleaved=True)
    assert torch.equal(gate.dequantize(None, torch.float32), dense[:, 0::2])
    assert torch.equal(up.dequantize(None, torch.float32), dense[:, 1::2])
    with pytest.raises(ValueError, match="95 rows"):
        QuantizedExperts.quantize(weights[:, :95], bits=5).gate_up()


def test_bits_by_projection_and_by_expert():
    weights = torch.randn(8, 64, 128)
    bits = {"gate": 6, "up": [2] * 7 + [8]}
    mixed = QuantizedExperts.quantize(weights, format="affine", bits=bits, group_size=32)
    assert mixed.shape == weights.shape
    gate, up = mixed.gate_up()
    assert {s.bits for s in gate.settings} == {6}
    assert [s.bits for s in up.settings] == [2] * 7 + [8]
    assert (up.records["codes"] % 16 == 0).all()
    for rows, settings in ((slice(0, 32), gate.settings), (slice(32, 64), up.settings)):
        for expert in range(8):
            alone = QuantizedExperts.quantize(
                weights[expert : expert + 1, rows], format="affine", bits=settings[expert].bits, group_size=32
            )
            assert torch.equal(mixed.dequantize(experts=[expert])[:, rows], alone.dequantize())
    assert mixed.bits_per_weight == (6 + (7 * 2 + 8) / 8) / 2 + 2
    with pytest.raises(ValueError, match="bits has 3 entries; it must have 8"):
        QuantizedExperts.quantize(weights, bits=[2, 3, 4])


def test_formats_may_differ_between_experts():
    weights = torch.randn(3, 32, 128)
    several = [
        QuantizedExperts.quantize(weights[:1], format="affine", bits=3, group_size=64),
        QuantizedExperts.quantize(weights[1:2], format="mxfp4"),
        QuantizedExperts.quantize(weights[2:], format="affine", bits=8, group_size=128),
    ]
    together = QuantizedExperts.cat(several)
    assert [s.format for s in together.parts["weight"].settings] == ["affine", "mxfp4", "affine"]
    assert torch.equal(together.dequantize(), torch.cat([each.dequantize() for each in several]))
    assert torch.equal(together.dequantize(experts=[2, 0, 2]), together.dequantize()[[2, 0, 2]])


WRONG = [
    ({"bits": 7}, ValueError, "bits is 7; affine has 2, 3, 4, 5, 6, 8"),
    ({"group_size": 16}, ValueError, "group_size is 16; affine has 32, 64, 128"),
    ({"group_size": 128}, ValueError, "192 columns; it must be a multiple of 128"),
    ({"format": "int4"}, ValueError, "it must be one of affine, dense, mxfp4, mxfp8, nvfp4, trellis"),
    ({"codebook": "mcg"}, TypeError, "codebook is given; affine has no such option"),
    ({"scale_dtype": torch.int8}, ValueError, "scale_dtype is torch.int8"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        QuantizedExperts.quantize(torch.randn(2, 8, 192), **arguments)


def test_weights_that_are_not_numbers():
    weights = torch.randn(2, 8, 64)
    weights[1, 2, 3] = float("inf")
    with pytest.raises(ValueError, match="infinite or NaN"):
        QuantizedExperts.quantize(weights)


def test_tensors_of_mlx_that_do_not_fit():
    codes, scales, biases = mlx_quantize(to_mlx(difficult_weights(2), "bfloat16"), 64, 4, "affine")
    make = QuantizedExperts.from_mlx
    with pytest.raises(ValueError, match=r"scales has shape \(3, 8, 3\); it must be \[3, 8, 4\]"):
        make(codes, scales[..., :3], biases, group_size=64, bits=4)
    with pytest.raises(TypeError, match="biases is float32; it must be bfloat16"):
        make(codes, scales, biases.float(), group_size=64, bits=4)
    with pytest.raises(TypeError, match="biases is of type NoneType"):
        make(codes, scales, None, group_size=64, bits=4)
    with pytest.raises(TypeError, match="weight is float32; it must be uint32"):
        make(scales.float(), scales, biases, group_size=64, bits=4)
    with pytest.raises(ValueError, match="bits is 7"):
        make(codes, scales, biases, group_size=64, bits=7)
    with pytest.raises(ValueError, match="biases is given; mxfp4 has none"):
        make(codes, scales.to(torch.uint8).repeat(1, 1, 2), biases, group_size=32, bits=4, mode="mxfp4")

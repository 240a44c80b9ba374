"""`gather_experts`: the weights of selected experts, copied bit for bit."""

import metal_moe
import pytest
import torch


def check_gather(weights, ids):
    out = metal_moe.gather_experts(weights, ids)
    assert out.shape == (ids.shape[0], *weights.shape[1:]) and out.dtype == weights.dtype
    inside = (ids >= 0) & (ids < weights.shape[0])
    expected = weights[ids.long().clamp(0, weights.shape[0] - 1)]
    expected[~inside] = 0
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    assert torch.equal(out.contiguous().view(kind), expected.contiguous().view(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (3, 5), (7, 9), (16, 8), (33, 65), (200, 301)])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_matches_indexing(shape, dtype, id_dtype):
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(11, *shape, generator=generator).to(dtype)
    for count in (0, 1, 2, 17):
        check_gather(weights, torch.randint(0, 11, (count,), generator=generator).to(id_dtype))


def test_ids_outside_give_zeros():
    weights = torch.randn(4, 6, 10)
    check_gather(weights, torch.tensor([3, -1, 4, 0, 2**31 - 1, -(2**31), 1], dtype=torch.int32))
    check_gather(weights, torch.tensor([3, 2**32 + 1, -(2**32), 0]))


def test_bits_survive():
    """NaN payloads, infinities and negative zeros are copied, not computed with."""
    bits = torch.tensor([0x7FC12345, 0x7F800001, -1, 0x80000000 - 2**32, 0x7F800000, 1], dtype=torch.int64).int()
    check_gather(bits.view(torch.float32).repeat(3, 4, 1), torch.tensor([2, 0, 1, 0]))


def test_strided_ids_and_offset_weights():
    """The first column of [T, k] ids, as naive code indexes with it, and weights at an odd place in their storage."""
    weights = torch.randn(1 + 5 * 7 * 3)[1:].view(5, 7, 3)
    ids = torch.randint(0, 5, (9, 4), generator=torch.Generator().manual_seed(2))
    check_gather(weights, ids[:, 0])
    check_gather(weights.half(), ids[::2, 3])
    check_gather(torch.randn(1 + 5 * 7 * 3).bfloat16()[1:].view(5, 7, 3), ids[:, 1])


def test_experts_larger_than_one_block():
    check_gather(torch.randn(3, 260, 131), torch.tensor([2, 0, 2, -1], dtype=torch.int32))


def test_weights_beyond_32_bit_offsets():
    """More than 4 GiB of weights, of which two experts are ever touched."""
    weights = torch.empty(1030, 2048, 1024, dtype=torch.bfloat16)
    assert weights.nbytes > 2**32
    weights[1029] = torch.randn(2048, 1024)
    weights[1] = 7
    out = metal_moe.gather_experts(weights, torch.tensor([1029, 1]))
    assert torch.equal(out[0], weights[1029]) and (out[1] == 7).all()

"""`matmul` and `lora` against float64: shapes, layouts, kernels, engines, errors, gradients."""

import functools

import cases
import metal_moe
import numpy as np
import pytest
import reference
import torch
from cases import COMMITS, DTYPES, ENGINES, assert_close
from metal_moe import tuning
from torch._subclasses.fake_tensor import FakeTensorMode

KERNELS = ["gemv", "tile"]
# Edges of the tiles: 4 rows, 32 rows, 64 columns, 8 elements of a vector, 64 and 128 bytes of K.
SHAPES = [
    (1, 1, 1),
    (1, 64, 64),
    (2, 8, 3),
    (3, 40, 65),
    (4, 256, 64),
    (5, 33, 7),
    (31, 64, 128),
    (32, 72, 64),
    (33, 100, 66),
    (64, 64, 64),
    (65, 257, 130),
]
SMALL = [shape for shape in SHAPES if shape[0] * shape[1] * shape[2] < 70_000]


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return cases.normal(*shape, generator=generator, dtype=dtype, scale=scale)


def check_product(out, a, b, about=""):
    expected = reference.to_double(a) @ reference.to_double(b)
    assert out.dtype == a.dtype and out.is_contiguous() and out.shape == expected.shape
    assert_close(out.reshape(-1, out.shape[-1]), expected.reshape(-1, expected.shape[-1]), about)


def pair(m, k, n, dtype, transposed, batch=()):
    """Positive numbers where rows are short: none that cancel."""
    a, b = normal(*batch, m, k, dtype=dtype), normal(*batch, k, n, seed=1, dtype=dtype, scale=k**-0.5)
    if n == 1 or k == 1:
        a, b = a.abs(), b.abs()
    return a, b.mT.contiguous().mT if transposed else b


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul(use_engine, engine, kernel, dtype, transposed):
    use_engine(engine)
    for m, k, n in SMALL if engine == "exact" else SHAPES:
        a, b = pair(m, k, n, DTYPES[dtype], transposed)
        check_product(metal_moe.matmul(a, b, kernel=kernel), a, b, (m, k, n))
        ran = metal_moe.last_dispatch()
        # One row or column lies both ways.
        layout = "nt" if transposed and k > 1 and n > 1 else "n[nt]" if min(k, n) == 1 else "nn"
        assert ran["family"] == kernel and ran["dispatches"] == 1 and ran["engine"] == engine
        assert ran["commits"] == COMMITS.get(engine, 1)
        assert [one for one in ran["kernels"] if one.startswith(f"matmul_{kernel}_{layout[:1]}")] == ran["kernels"]
        if "[" not in layout:
            assert ran["kernels"] == [f"matmul_{kernel}_{layout}_{dtype}"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_under_every_seed(exact_engine, kernel, dtype):
    for transposed in (False, True):
        a, b = pair(6, 72, 67, DTYPES[dtype], transposed)
        results = []
        for seed in (0, 1, 0xDEADBEEF):
            exact_engine(seed)
            results.append(metal_moe.matmul(a, b, kernel=kernel))
        assert all(torch.equal(one, results[0]) for one in results)
        check_product(results[0], a, b)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_batches_and_strides(use_engine, engine, kernel):
    """Batches, one matrix for a whole batch, rows with gaps, addresses that are no multiple of 16."""
    use_engine(engine)
    wide = normal(3, 18, 100, dtype=torch.bfloat16)
    a, b = wide[:, ::2, 3:43], normal(3, 40, 50, seed=1, dtype=torch.bfloat16, scale=0.2)
    check_product(metal_moe.matmul(a, b, kernel=kernel), a, b, "gaps in a")
    check_product(metal_moe.matmul(a, b[:, :, 1:34], kernel=kernel), a, b[:, :, 1:34], "gaps in b")
    right = normal(3, 50, 40, seed=2, dtype=torch.bfloat16, scale=0.2).mT[:, :, ::2]
    check_product(metal_moe.matmul(a, right, kernel=kernel), a, right, "every second row of b's transpose")
    for x, y in ((a, b[0]), (a[0], b), (a, b[:1]), (a[:1], b), (a.expand(3, 9, 40), b[:1].expand(3, 40, 50))):
        check_product(metal_moe.matmul(x, y, kernel=kernel), x, y, (x.shape, y.shape))
        assert metal_moe.last_dispatch()["family"] == kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((0, 4), (4, 3)),
        ((3, 0), (0, 5)),
        ((3, 4), (4, 0)),
        ((0, 3, 4), (0, 4, 5)),
        ((2, 3, 0), (2, 0, 5)),
        ((4,), (4,)),
        ((4,), (4, 3)),
        ((3, 4), (4,)),
        ((2, 1, 3, 4), (5, 4, 6)),
        ((2, 3, 4), (4,)),
        ((1, 2, 3, 4), (4, 5)),
    ],
)
def test_other_shapes_are_torchs(a_shape, b_shape, dtype):
    a, b = normal(*a_shape, dtype=DTYPES[dtype]), normal(*b_shape, seed=1, dtype=DTYPES[dtype])
    got, expected = metal_moe.matmul(a, b), torch.matmul(a, b)
    assert metal_moe.last_dispatch()["family"] == "torch"
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert torch.allclose(got.double(), expected.double(), atol=0.05)


def test_matrices_without_rows_are_torchs():
    a, b = normal(8, 4).T, normal(8, 5, seed=1)
    assert torch.equal(metal_moe.matmul(a, b), a @ b)
    assert metal_moe.last_dispatch()["family"] == "torch"
    with pytest.raises(ValueError, match=r"matmul: a or b is strided .*; it must be of rows that are contiguous"):
        metal_moe.matmul(a, b, kernel="gemv")


def test_size_decides(monkeypatch, device):
    """Up to the limit of device and dtype our kernel, beyond it PyTorch's."""
    engine = metal_moe.device_info(device)["engine"]
    metal_moe.matmul(normal(2, 2), normal(2, 2))
    monkeypatch.setitem(tuning._limits, engine, {torch.float32: 8 * 16 * 4, torch.float16: 0})
    for rows, dtype, ours in ((8, torch.float32, True), (9, torch.float32, False), (8, torch.float16, False)):
        a, b = normal(rows, 16, dtype=dtype), normal(16, 4, dtype=dtype, seed=1)
        check_product(metal_moe.matmul(a, b), a, b)
        assert (metal_moe.last_dispatch()["family"] != "torch") == ours
        metal_moe.matmul(a, b, kernel="torch")
        assert metal_moe.last_dispatch()["family"] == "torch"


def test_default_limit(device):
    engine = metal_moe.device_info(device)["engine"]
    for dtype in DTYPES.values():
        assert tuning.matmul_limit(engine, dtype) == tuning.default_matmul_limit(engine, dtype)
    assert tuning.default_matmul_limit(engine, torch.bfloat16) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_surroundings_do_not_matter(use_engine, engine):
    """NaN around every operand: nothing outside of it is used."""
    use_engine(engine)

    def guarded(value):
        room = torch.full((value.shape[0] + 2, value.shape[1] + 5), torch.nan, dtype=value.dtype)
        place = room[1:-1, 2:-3]
        return place.copy_(value)

    for m, k, n in [(5, 33, 17), (34, 65, 66), (1, 64, 64)]:
        a, b = pair(m, k, n, torch.float32, False)
        for kernel in KERNELS:
            check_product(metal_moe.matmul(guarded(a), guarded(b), kernel=kernel), a, b)
            check_product(metal_moe.matmul(guarded(a), guarded(b.T).T, kernel=kernel), a, b)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 3).double(), torch.ones(3, 2).double()), TypeError, "a is torch.float64; it must be torch.bfl"),
        ((torch.ones(2, 3), torch.ones(3, 2).half()), TypeError, "b is torch.float16; it must be torch.float32, the"),
        (([[1.0]], torch.ones(1, 1)), TypeError, "a is of type list; it must be a torch.Tensor"),
        (
            (torch.ones(2, 3), torch.ones(4, 2)),
            ValueError,
            r"b has shape \(4, 2\); it must be \[..., K, N\] with K = 3",
        ),
        ((torch.ones(2, 3), torch.ones(4)), ValueError, r"b has shape \(4,\); it must be \[K\] with K = 3"),
        ((torch.ones(()), torch.ones(1)), ValueError, "a has shape .*; it must be of at least 1 dimension"),
        ((torch.ones(2, 3, 4), torch.ones(3, 4, 5)), ValueError, "b has shape .*; it must be of leading dimensions"),
        ((torch.ones(2, 2), torch.ones(2, 2).to_sparse()), ValueError, "b is a torch.sparse_coo tensor"),
        ((torch.ones(2, 2), torch.ones(2, 2, device="meta")), ValueError, "b is on device meta"),
    ],
)
def test_matmul_refuses(arguments, error, message):
    with pytest.raises(error, match=f"matmul: {message}"):
        metal_moe.matmul(*arguments)


def test_kernels_by_name():
    with pytest.raises(
        ValueError, match='matmul: kernel is "fast"; it must be "gemv", "tile", "metal_moe" or "torch" or None'
    ):
        metal_moe.matmul(torch.ones(2, 2), torch.ones(2, 2), kernel="fast")
    with pytest.raises(TypeError, match="matmul: kernel is 3 of type int"):
        metal_moe.matmul(torch.ones(2, 2), torch.ones(2, 2), kernel=3)
    with pytest.raises(ValueError, match="matmul: a has shape .*; it must be of 2 or 3 dimensions"):
        metal_moe.matmul(torch.ones(2), torch.ones(2, 2), kernel="gemv")


# --- lora --------------------------------------------------------------------------------------------------------


def lora_reference(x, A, B, scale, base=None, adapter_ids=None):
    x, A, B, base = (reference.to_double(one) for one in (x, A, B, base))
    scales = scale.double().numpy() if isinstance(scale, torch.Tensor) else np.full(max(1, len(A)), float(scale))
    out = np.zeros((*x.shape[:-1], B.shape[-2])) if base is None else base.copy()
    if adapter_ids is None:
        return out + scales[0] * (x @ A.T) @ B.T
    for place, adapter in np.ndenumerate(adapter_ids.numpy()):
        if 0 <= adapter < len(A):
            out[place] += scales[adapter] * (x[place] @ A[adapter].T) @ B[adapter].T
    return out


def make_lora(tokens, inputs, outputs, rank, dtype, adapters=None):
    stack = () if adapters is None else (adapters,)
    x = normal(tokens, inputs, dtype=dtype)
    A = normal(*stack, rank, inputs, seed=1, dtype=dtype, scale=inputs**-0.5)
    B = normal(*stack, outputs, rank, seed=2, dtype=dtype, scale=rank**-0.5)
    return x, A, B, normal(tokens, outputs, seed=3, dtype=dtype)


def check_lora(x, A, B, scale, base=None, adapter_ids=None, kernel=None, about=""):
    options = {} if adapter_ids is None else {"adapter_ids": adapter_ids}
    out = metal_moe.lora(x, A, B, scale, base, kernel=kernel, **options)
    expected = lora_reference(x, A, B, scale, base, adapter_ids)
    assert out.dtype == x.dtype and out.is_contiguous() and out.shape == expected.shape
    assert_close(out.reshape(-1, out.shape[-1]), expected.reshape(-1, expected.shape[-1]), about)
    return out


LORA_SHAPES = [
    (1, 64, 64, 16),
    (1, 1, 9, 1),
    (3, 40, 70, 8),
    (4, 256, 33, 4),
    (5, 33, 129, 7),
    (33, 72, 66, 64),
    (66, 40, 24, 65),
    (7, 130, 40, 256),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_lora(use_engine, engine, kernel, dtype):
    use_engine(engine)
    for tokens, inputs, outputs, rank in LORA_SHAPES:
        x, A, B, base = make_lora(tokens, inputs, outputs, rank, DTYPES[dtype])
        if inputs == 1 or rank == 1:
            x, A, B, base = x.abs(), A.abs(), B.abs(), base.abs()
        about = (tokens, inputs, outputs, rank)
        check_lora(x, A, B, 0.7, base, kernel=kernel, about=about)
        ran = metal_moe.last_dispatch()
        tile = "_tile" if kernel == "tile" else ""
        assert ran["kernels"] == [f"lora_shrink{tile}_{dtype}", f"lora_expand{tile}_{dtype}"]
        assert (ran["dispatches"], ran["commits"], ran["family"]) == (2, COMMITS.get(engine, 1), kernel)
        check_lora(x, A, B, -2, kernel=kernel, about=("no base", about))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_by_token(use_engine, engine, dtype, id_dtype):
    """Every token its own adapter, runs of one adapter, ids that name none, a scale for each adapter."""
    use_engine(engine)
    for tokens, rank in ((1, 16), (9, 8), (23, 5), (70, 16)):
        x, A, B, base = make_lora(tokens, 72, 40, rank, DTYPES[dtype], adapters=5)
        scales = torch.linspace(-1, 2, 5)
        generator = torch.Generator().manual_seed(tokens)
        random = torch.randint(-1, 6, (tokens,), generator=generator).to(id_dtype)
        outside = torch.full((tokens,), 2**31 - 1, dtype=id_dtype)
        for ids in (random, random.sort().values, torch.full_like(random, 3), outside, random - 3):
            check_lora(x, A, B, scales, base, ids, about=(tokens, rank, ids))
            check_lora(x, A, B, 0.5, None, ids, about=(tokens, rank, ids))
            assert metal_moe.last_dispatch()["kernels"] == [f"lora_shrink_{dtype}", f"lora_expand_{dtype}"]
    assert torch.equal(metal_moe.lora(x, A, B, 0.5, base, adapter_ids=outside), base)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_under_every_seed(exact_engine, dtype):
    x, A, B, base = make_lora(9, 40, 70, 12, DTYPES[dtype], adapters=3)
    ids = torch.tensor([0, 0, 1, 1, 1, 7, 2, 0, 1])
    results = []
    for seed in (0, 1, 0xDEADBEEF):
        exact_engine(seed)
        one_adapter = [metal_moe.lora(x, A[0], B[0], 0.5, base, kernel=kernel) for kernel in KERNELS]
        results.append(torch.stack([metal_moe.lora(x, A, B, 0.5, base, adapter_ids=ids), *one_adapter]))
    assert all(torch.equal(one, results[0]) for one in results)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 12, 31, 32, 63, 100, 128, 255, 256])
def test_ranks(rank):
    x, A, B, base = make_lora(6, 96, 50, rank, torch.bfloat16, adapters=2)
    if rank == 1:
        x, A, B, base = x.abs(), A.abs(), B.abs(), base.abs()
    check_lora(x, A, B, 0.25, base, torch.tensor([0, 1, 1, 0, 0, 1]), about=rank)
    for kernel in KERNELS:
        check_lora(x, A[1], B[1], 0.25, base, kernel=kernel, about=(rank, kernel))


def test_a_token_does_not_depend_on_the_others():
    x, A, B, base = make_lora(40, 136, 72, 16, torch.bfloat16, adapters=4)
    ids = torch.randint(0, 4, (40,), generator=torch.Generator().manual_seed(1))
    expected = metal_moe.lora(x, A, B, 0.5, base, adapter_ids=ids)
    order = ids.argsort(stable=True)
    assert torch.equal(metal_moe.lora(x[order], A, B, 0.5, base[order], adapter_ids=ids[order]), expected[order])
    for token in (0, 17, 39):
        one = slice(token, token + 1)
        assert torch.equal(metal_moe.lora(x[one], A, B, 0.5, base[one], adapter_ids=ids[one]), expected[one])


@pytest.mark.parametrize("engine", ENGINES)
def test_lora_strides(use_engine, engine):
    """Leading dimensions, rows with gaps, adapters cut out of larger ones, strided ids."""
    use_engine(engine)
    x = normal(2, 5, 90, dtype=torch.float16)
    base = normal(2, 5, 48, seed=3, dtype=torch.float16)
    A = normal(3, 24, 90, seed=1, dtype=torch.float16, scale=0.1)
    B = normal(3, 48, 24, seed=2, dtype=torch.float16, scale=0.2)
    ids = torch.randint(0, 3, (2, 10), generator=torch.Generator().manual_seed(0))[:, ::2]
    check_lora(x, A, B, 0.5, base, ids)
    check_lora(x[0, ::2, 5:70], A[1, 2:18, 5:70], B[1, :, 2:18], 0.5, base[0, 1:4])
    check_lora(x[:, 2], A[:, ::2], B[:, 3:31, :12], 0.5, None, ids[:, 2])
    check_lora(x[0, :0], A[0], B[0], 0.5, base[0, :0])
    with pytest.raises(ValueError, match="lora: x is strided .*; it must be of leading dimensions that can be seen as"):
        metal_moe.lora(x.transpose(0, 1), A[0], B[0], 0.5)


def test_the_rank_may_be_filled_up():
    """An adapter of lower rank among others: zeros where it has none."""
    x, A, B, base = make_lora(4, 64, 32, 8, torch.float32, adapters=2)
    A[1, 3:], B[1, :, 3:] = 0, 0
    out = metal_moe.lora(x, A, B, 1.5, base, adapter_ids=torch.ones(4, dtype=torch.int32))
    assert_close(out, lora_reference(x, A[1, :3], B[1, :, :3], 1.5, base))


def test_unused_adapters_do_not_matter():
    x, A, B, base = make_lora(6, 64, 32, 8, torch.float32, adapters=4)
    ids = torch.tensor([1, 3, 9, 1, -1, 3])
    expected = metal_moe.lora(x, A, B, 1.5, base, adapter_ids=ids)
    A[::2], B[::2] = torch.nan, torch.nan
    assert torch.equal(metal_moe.lora(x, A, B, 1.5, base, adapter_ids=ids), expected)


X, A, B = torch.ones(3, 8), torch.ones(2, 8), torch.ones(5, 2)
IDS = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X, A.half(), B, 1.0), {}, TypeError, "A is torch.float16; it must be torch.float32, the dtype of x"),
        ((X[0], A, B, 1.0), {}, ValueError, r"x has shape \(8,\); it must be \[..., inputs\]"),
        ((X, A[:, :7], B, 1.0), {}, ValueError, r"A has shape \(2, 7\); it must be .* inputs = 8 as in x"),
        ((X, torch.ones(257, 8), B, 1.0), {}, ValueError, r"A has shape \(257, 8\); .* r from 1 to 256"),
        ((X, A, B.T, 1.0), {}, ValueError, "B is strided|B has shape"),
        ((X, A, torch.ones(5, 3), 1.0), {}, ValueError, r"B has shape \(5, 3\); it must be .* r = 2 as in A"),
        ((X, A, B, 1.0, torch.ones(3, 4)), {}, ValueError, r"base has shape \(3, 4\); it must be \(3, 5\)"),
        ((X, A, B, torch.inf), {}, ValueError, "scale is inf; it must be a finite number"),
        ((X, A, B, "1"), {}, TypeError, "scale is '1' of type str"),
        ((X, A, B, torch.ones(2)), {}, ValueError, r"scale has shape \(2,\); it must be \[L\] = \(1,\)"),
        ((X, A, B, 1.0), {"adapter_ids": IDS}, ValueError, r"A has shape \(2, 8\); it must be \[L, r, inputs\]"),
        ((X, A[None], B[None], 1.0), {"adapter_ids": IDS[:2]}, ValueError, "adapter_ids has shape .*one for each row"),
        ((X, A[None], B[None], 1.0), {"adapter_ids": IDS.float()}, TypeError, "adapter_ids is torch.float32"),
        ((X, A[None], B[None], 1.0), {"adapter_ids": IDS, "kernel": "tile"}, ValueError, 'kernel is "tile"; it must'),
        ((X, A, B, 1.0), {"kernel": "torch"}, ValueError, 'kernel is "torch"; it must be "gemv" or "tile" or None'),
        ((X, A, B.to("meta"), 1.0), {}, ValueError, "B is on device meta"),
    ],
)
def test_lora_refuses(arguments, options, error, message):
    with pytest.raises(error, match=f"lora: {message}"):
        metal_moe.lora(*arguments, **options)


# --- PyTorch -----------------------------------------------------------------------------------------------------


def lora_samples(stacked, dtype=torch.float32):
    x, A, B, base = make_lora(5, 24, 16, 4, dtype, adapters=3 if stacked else None)
    ids = torch.tensor([0, 2, 9, 1, 2]) if stacked else None
    scales = torch.tensor([0.5, 1.0, 2.0]) if stacked else None
    return [None if one is None else one.to(cases.DEVICE) for one in (x, A, B, base, ids, scales)]


def lora_arguments(stacked):
    x, A, B, base, ids, scales = lora_samples(stacked)
    return (x, A, B, 0.5, base, ids, scales)


def test_opcheck():
    a, b = normal(6, 24).to(cases.DEVICE), normal(24, 8, seed=1).to(cases.DEVICE)
    for kernel in (None, "gemv", "tile", "torch"):
        torch.library.opcheck(torch.ops.metal_moe.matmul, (a, b), {"family": kernel})
    torch.library.opcheck(torch.ops.metal_moe.matmul, (a.requires_grad_(), b.T.contiguous().T.requires_grad_()))
    torch.library.opcheck(torch.ops.metal_moe.matmul, (a[:0].detach(), b.detach()))
    for stacked in (False, True):
        arguments = lora_arguments(stacked)
        torch.library.opcheck(torch.ops.metal_moe.lora, arguments)
        gradients = [
            one.requires_grad_() if torch.is_tensor(one) and one.is_floating_point() else one for one in arguments
        ]
        torch.library.opcheck(torch.ops.metal_moe.lora, gradients)


def test_fake_tensors_have_the_real_shapes():
    a, b = normal(2, 6, 24), normal(24, 8, seed=1)
    x, A, B, base, ids, scales = lora_samples(True)
    real = [metal_moe.matmul(a, b), metal_moe.lora(x, A, B, scales, base, adapter_ids=ids)]
    before = metal_moe.last_dispatch()
    with FakeTensorMode() as mode:
        a, b, x, A, B, base, ids, scales = map(mode.from_tensor, (a, b, x, A, B, base, ids, scales))
        fake = [metal_moe.matmul(a, b), metal_moe.lora(x, A, B, scales, base, adapter_ids=ids)]
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    assert metal_moe.last_dispatch() == before, "a fake call must not run kernels"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    x, A, B, base, ids, scales = lora_samples(True)

    def run(x, A, B, base, ids):
        return metal_moe.lora(metal_moe.matmul(x, A[0].T) @ A[0], A, B, scales, base, adapter_ids=ids) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (5, 1, 3):
        arguments = (x[:rows], A, B, base[:rows], ids[:rows])
        assert torch.equal(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((5, 6), (6, 7)),
        ((2, 5, 6), (6, 7)),
        ((5, 6), (2, 6, 7)),
        ((2, 1, 5, 6), (3, 6, 7)),
        ((6,), (6, 7)),
        ((5, 6), (6,)),
    ]
    + [((6,), (6,)), ((2, 5, 6), (6,)), ((0, 6), (6, 7))],
)
def test_matmul_gradients(a_shape, b_shape):
    """Those of torch.matmul, with our forward pass wherever it takes the shapes."""
    grads = []
    takes = 0 not in a_shape and all(2 <= len(shape) <= 3 for shape in (a_shape, b_shape))
    ours = functools.partial(metal_moe.matmul, kernel="metal_moe" if takes else None)
    for product in (ours, torch.matmul):
        a = normal(*a_shape).to(cases.DEVICE).requires_grad_()
        b = normal(*b_shape, seed=1).to(cases.DEVICE).requires_grad_()
        out = product(a, b)
        (out * torch.arange(out.numel(), device=out.device).reshape(out.shape)).sum().backward()
        grads.append((a.grad, b.grad))
    for ours, theirs in zip(*grads, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("per_adapter", [False, True])
def test_lora_gradients(stacked, per_adapter):
    """Those of the formula in PyTorch."""

    def formula(x, A, B, scale, base, ids):
        if ids is None:
            return base + scale * (x @ A.mT) @ B.mT
        chosen = ids.clamp(0, 2)
        s = torch.einsum("ti,tri->tr", x, A[chosen])
        part = torch.einsum("tr,tor->to", s, B[chosen])
        if torch.is_tensor(scale):
            scale = scale[chosen].unsqueeze(1)
        return base + torch.where((ids == chosen).unsqueeze(1), scale * part, 0.0)

    x, A, B, base, ids, scales = lora_samples(stacked)
    scale = scales if stacked else torch.tensor([0.5], device=x.device)
    grads = []
    for ours in (True, False):
        leaves = [one.clone().requires_grad_() for one in (x, A, B, base, scale)]
        x1, A1, B1, base1, scale1 = leaves
        factor = scale1 if per_adapter else 0.5
        out = (
            metal_moe.lora(x1, A1, B1, factor, base1, adapter_ids=ids)
            if ours
            else formula(x1, A1, B1, factor, base1, ids)
        )
        (out * torch.arange(out.numel(), device=out.device).reshape(out.shape)).sum().backward()
        grads.append([one.grad for one in leaves])
        assert metal_moe.last_dispatch()["operation"] == "lora"
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_modes():
    a, b = normal(4, 8).to(cases.DEVICE), normal(8, 4, seed=1).to(cases.DEVICE)
    expected = metal_moe.matmul(a, b, kernel="gemv")
    assert not expected.requires_grad
    a.requires_grad_()
    assert metal_moe.matmul(a, b, kernel="gemv").requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = metal_moe.matmul(a, b, kernel="gemv")
        assert torch.equal(out, expected) and not out.requires_grad


def test_inputs_are_not_modified():
    arguments = [one for one in lora_samples(True) if one is not None]
    before = [one.clone() for one in arguments]
    x, A, B, base, ids, scales = arguments
    out = metal_moe.lora(x, A, B, scales, base, adapter_ids=ids)
    product = metal_moe.matmul(x, A[0].T)
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))
    storages = {one.untyped_storage().data_ptr() for one in arguments}
    assert out.untyped_storage().data_ptr() not in storages and product.untyped_storage().data_ptr() not in storages

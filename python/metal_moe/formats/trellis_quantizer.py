"""Makes trellis codes of weights: scales and rotation, then rounding to walks, block of rows by block of rows.

With W [inputs, outputs] and y = x W:

1. svh takes the size of each output, suh that of each input once outputs are mixed; both get random signs. Hadamard
   transforms on both sides then make the weights nearly normal and independent of one another.
2. Without calibration, every 16 x 16 tile is replaced by the nearest closed walk (`viterbi`).
3. With H, the sum of x x^T over calibration inputs, errors are judged by what they do to outputs, tr(E^T H E). H is
   written as L D L^T with unit block lower triangular L (blocks of 16). Rows of tiles are rounded from the last to the
   first, each after the errors of those done have been added to it, weighted by L: LDLQ of QuIP# and QTIP, as
   exllamav3 has it too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import trellis_kernels
from .codebooks import STANDARD_DEVIATIONS, table_on
from .hadamard import BLOCK, hadamard
from .layout import round_up
from .trellis import TILE, WEIGHTS, pack_states, tile_order
from .viterbi import nearest_walks

Walks = Callable[[Tensor, float, str], Tensor]

# Added to H's diagonal, of its mean: directions that calibration has not seen must not be free. exllamav3's value.
DAMPING = 0.025
# When H is still not positive definite in float32 it is damped this many times more, each time by ten times as much.
DAMPING_TRIES = 5

# Standard deviation of what is rounded, in those of the codebook, for 1 to 8 bits: where the relative error of normal
# values was least. Few bits want large values, whose reconstruction is then too small, as the mean of what is rounded
# alike is; with many bits the error of values beyond the codebook's largest decides.
TARGETS = {
    "3inst": (1.10, 0.96, 0.91, 0.87, 0.85, 0.79, 0.77, 0.755),
    "mcg": (1.12, 0.96, 0.92, 0.89, 0.85, 0.80, 0.77, 0.755),
    "mul1": (1.08, 0.95, 0.91, 0.89, 0.88, 0.84, 0.81, 0.79),
}


def search(values: Tensor, bits: float, codebook: str) -> Tensor:
    """The nearest closed walks, states int32 [n, 256] of values [n, 256]: the kernel where the values' device has an
    engine, elsewhere PyTorch. Both find the same."""
    find = trellis_kernels.nearest_walks if trellis_kernels.has_engine(values) else nearest_walks
    return find(values, bits, codebook)


def quantize(
    weights: Tensor,
    bits: float,
    codebook: str,
    hessian: Tensor | None = None,
    seed: int = 0,
    walks: Walks | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises matrices.

    Args:
        weights: [n, inputs, outputs] float32.
        bits: 1 to 8, or n + 1/2 with codebook "mul1".
        codebook: "3inst", "mcg" or "mul1".
        hessian: [inputs, inputs] or [n, inputs, inputs], symmetric, positive semidefinite. None: all inputs alike.
        seed: of the signs, which are the same for all n.
        walks: values [m, 256] float32, bits and codebook -> states [m, 256] int32. None: `search`.

    Returns:
        Words int32 [n, inputs / 16, outputs / 16, 8 * bits], suh float16 [n, inputs], svh float16 [n, outputs]; sizes
        rounded up to multiples of 128.
    """
    walks = walks or search
    n, inputs, outputs = weights.shape
    padding = (0, round_up(outputs, BLOCK) - outputs, 0, round_up(inputs, BLOCK) - inputs)
    weights = torch.nn.functional.pad(weights.float(), padding)
    rotated, suh, svh = _rotate(weights, _target(bits, codebook), seed)
    if hessian is None:
        states = _walks_of(rotated, bits, codebook, walks)
    else:
        lower = _block_lower(_rotated_hessian(hessian, inputs, suh))
        states = _ldlq(rotated, lower, bits, codebook, walks)
    return pack_states(states, bits), suh, svh


def _target(bits: float, codebook: str) -> float:
    targets = TARGETS[codebook]
    return STANDARD_DEVIATIONS[codebook] * (targets[int(bits) - 1] + targets[int(bits + 0.5) - 1]) / 2


def _rotate(weights: Tensor, target: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is to be rounded, of standard deviation `target`, with suh and svh as they are stored."""
    generator = torch.Generator("cpu").manual_seed(seed)
    su, sv = (
        (torch.randint(0, 2, (size,), generator=generator, device="cpu") * 2 - 1).to(weights.device, torch.float32)
        for size in weights.shape[1:]
    )
    by_output = weights.square().mean(1).sqrt()
    mean = by_output.mean(1, keepdim=True)
    svh = (by_output / torch.where(mean == 0, 1.0, mean) * sv).to(torch.float16)
    mixed = hadamard(weights / _not_zero(svh)[:, None, :])
    suh = (mixed.square().mean(2).sqrt() / target * su).to(torch.float16)
    return hadamard(mixed / _not_zero(suh)[:, :, None], 1), suh, svh


def _not_zero(scales: Tensor) -> Tensor:
    """Of a row or column of zeros the scale is 0: what is divided by it is 0 and stays it."""
    scales = scales.float()
    return torch.where(scales == 0, 1.0, scales)


def _tiles(rows: Tensor) -> Tensor:
    """[n, 16 * i, 16 * o] -> [n, i, o, 256], weights in the ring's order."""
    n, inputs, outputs = rows.shape
    column, row = tile_order()
    order = torch.from_numpy(column * TILE + row).to(rows.device)
    tiles = rows.view(n, inputs // TILE, TILE, outputs // TILE, TILE).transpose(2, 3)
    return tiles.reshape(n, inputs // TILE, outputs // TILE, WEIGHTS)[..., order]


def _rows(tiles: Tensor) -> Tensor:
    """The inverse of `_tiles`."""
    n, inputs, outputs, _ = tiles.shape
    column, row = tile_order()
    rows = torch.empty_like(tiles)
    rows[..., torch.from_numpy(column * TILE + row).to(tiles.device)] = tiles
    return rows.view(n, inputs, outputs, TILE, TILE).transpose(2, 3).reshape(n, inputs * TILE, outputs * TILE)


def _walks_of(rows: Tensor, bits: float, codebook: str, walks: Walks) -> Tensor:
    tiles = _tiles(rows)
    return walks(tiles.reshape(-1, WEIGHTS), bits, codebook).view(tiles.shape)


def _rotated_hessian(hessian: Tensor, inputs: int, suh: Tensor) -> Tensor:
    """[n, inputs, inputs] of the inputs that meet the rotated weights, (x * suh) Hadamard; damped."""
    size = suh.shape[1]
    damped = hessian.float().to(suh.device)
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    damped = damped + torch.diag_embed((DAMPING * torch.where(mean > 0, mean, 1.0))[..., None].expand(diagonal.shape))
    if damped.ndim == 2:
        damped = damped[None]
    padded = torch.eye(size, dtype=torch.float32, device=suh.device).repeat(damped.shape[0], 1, 1)
    padded *= damped.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    padded[:, :inputs, :inputs] = damped
    # An input whose weights are zero has suh 0: any scale will do, for whatever is rounded there is nothing later.
    scales = _not_zero(suh)
    return hadamard(hadamard(padded * scales[:, :, None] * scales[:, None, :]), 1)


def _block_lower(hessian: Tensor) -> Tensor:
    """Unit block lower triangular L of hessian = L D L^T, in blocks of 16."""
    size = hessian.shape[-1]
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    eye = torch.eye(size, dtype=torch.float32, device=hessian.device)
    for attempt in range(DAMPING_TRIES + 1):
        damping = 0.0 if attempt == 0 else DAMPING * 10.0 ** (attempt - DAMPING_TRIES) * mean
        factor, failed = torch.linalg.cholesky_ex(hessian + damping * eye)
        if not failed.any():
            break
    else:
        raise ValueError("hessian is not positive semidefinite, or has values that are no numbers")
    blocks = size // TILE
    diagonal = factor.view(-1, blocks, TILE, blocks, TILE).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    inverse = torch.linalg.solve_triangular(diagonal, eye[:TILE, :TILE], upper=False)
    columns = factor.view(-1, size, blocks, TILE)
    return torch.einsum("nskt,nktu->nsku", columns, inverse).reshape(-1, size, size)


def _ldlq(rows: Tensor, lower: Tensor, bits: float, codebook: str, walks: Walks) -> Tensor:
    n, inputs, outputs = rows.shape
    book = table_on(codebook, rows.device, torch.float32)
    errors = torch.zeros_like(rows)
    states = torch.empty(n, inputs // TILE, outputs // TILE, WEIGHTS, dtype=torch.int32, device=rows.device)
    for block in reversed(range(inputs // TILE)):
        here, done = slice(block * TILE, (block + 1) * TILE), slice((block + 1) * TILE, inputs)
        target = rows[:, here] + lower[:, done, here].transpose(1, 2) @ errors[:, done]
        states[:, block : block + 1] = _walks_of(target.contiguous(), bits, codebook, walks)
        errors[:, here] = rows[:, here] - _rows(book[states[:, block : block + 1]])
    return states

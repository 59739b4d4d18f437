"""Codes that make up for each other's errors (GPTQ, Frantar et al. 2022, §3).

What is to stay is a layer's output on the text, W·X, and not its weights. With H = X·Xᵀ, the error of rounding column
j can be taken back, as far as the inputs allow, by the columns that are not rounded yet: each moves by the error
times row j of the inverse's Cholesky factor, over its diagonal (eq. 2 and 3, and §3.3 step 3). Columns go from the
loudest input to the quietest, so that those that matter are rounded while many are left to make up for them
(`actorder` in the authors' code); each keeps the scale of the group that it stands in, which is chosen beforehand.

Columns are done in blocks: within one, every column moves all the others; what is right of the block moves once, by
one product. A diagonal of 1% of the mean is added to H (§3.3); an input that is always 0 gets weight 0.

Shape suffixes: O outputs, I inputs, G groups in a row, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lathe.model.codes import Codes
from lathe.quantization.nearest import Grid, finished

_BLOCK = 128
_DAMPING = 0.01


def gptq(weight_OI: Tensor, hessian_II: Tensor, grid: Grid) -> Codes:
    """Codes of a matrix that keep its output on the text.

    Args:
        hessian_II: the inputs' second moments, X·Xᵀ; float32 or wider.
        grid: scales and zeros.
    """
    work_OI = weight_OI.to(torch.float32).clone()
    rows, columns = work_OI.shape
    hessian = hessian_II.to(torch.float64).clone()
    silent_I = hessian.diagonal() == 0
    hessian.diagonal()[silent_I] = 1.0
    work_OI[:, silent_I] = 0.0
    order_I = hessian.diagonal().argsort(descending=True)
    work_OI, hessian = work_OI[:, order_I], hessian[order_I][:, order_I]
    hessian.diagonal().add_(_DAMPING * float(hessian.diagonal().mean()))
    factor_II = _inverse_factor(hessian).to(torch.float32)
    size = columns // grid.scales_OG.shape[1]
    scales_OI = grid.scales_OG.repeat_interleave(size, 1)[:, order_I]
    zeros_OI = None if grid.zeros_OG is None else grid.zeros_OG.repeat_interleave(size, 1)[:, order_I]
    codes_OI = torch.empty_like(work_OI)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors_OB = torch.empty(rows, end - start)
        for j in range(start, end):
            column_O1, scale_O1 = work_OI[:, j : j + 1], scales_OI[:, j : j + 1]
            own = Grid(scale_O1, None if zeros_OI is None else zeros_OI[:, j : j + 1], grid.bits)
            codes_O11 = own.codes(column_O1[..., None])
            codes_OI[:, j] = codes_O11.view(-1)
            error_O1 = (column_O1 - own.numbers(codes_O11).view(-1, 1)) / factor_II[j, j]
            work_OI[:, j:end] -= error_O1 * factor_II[j, j:end]
            errors_OB[:, j - start] = error_O1.view(-1)
        work_OI[:, end:] -= errors_OB @ factor_II[start:end, end:]
    restored_OI = torch.empty_like(codes_OI)
    restored_OI[:, order_I] = codes_OI
    return finished(restored_OI, grid, weight_OI.dtype)


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    # The inverse is symmetric but for its last digits, and the factor reads one half alone.
    factor_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return factor_II


def output_error(weight_OI: Tensor, codes: Codes, hessian_II: Tensor | None) -> float:
    """How much the output is off, ‖(Ŵ − W)·X‖ / ‖W·X‖; of the weights alone where no inputs are known."""
    wide_OI = weight_OI.to(torch.float32)
    difference_OI = codes.dequantized().to(torch.float32) - wide_OI
    if hessian_II is None:
        return float(torch.linalg.vector_norm(difference_OI) / torch.linalg.vector_norm(wide_OI).clamp_min(1e-30))
    seen = hessian_II.to(torch.float32)
    off = ((difference_OI @ seen) * difference_OI).sum()
    size = ((wide_OI @ seen) * wide_OI).sum()
    return float((off.clamp_min(0) / size.clamp_min(1e-30)).sqrt())

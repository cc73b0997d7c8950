"""DeepGEMM's grouped products, as an op's implementation calls them: watched, and noted instead of run in a trace.

E groups, one weight each. `contiguous`: the rows of all groups one after the other, each group padded to a multiple
of `ALIGNMENT` rows. `masked`: as many rows of memory for each group, of which the first counts[e] are meant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.jit import tracing
from custom_ops.jit.deep_gemm_first_call import first_call_of, multiprocessors_of
from custom_ops.jit.deep_gemm_tiles import ALIGNMENT, BLOCK_K, Product, kernel_of, transpose_of
from custom_ops.jit.kernel import Kernel
from custom_ops.scales import pitch_of

Pair = tuple[Tensor, Tensor]

# (device index, product, M, rows of memory, strides of the scales) of what has run in this process.
_ran: set[tuple[object, ...]] = set()


def contiguous(left: Pair, right: Pair, out: Tensor, row_experts: Tensor) -> None:
    """out[row] = left[row] @ right[row_experts[row]].T, both dequantized.

    left: codes float8_e4m3fn [M, K] and scales float32 [M, ceil(K / 128)], in place if they are column_major_tma, or
    row-major, which DeepGEMM transposes with a kernel of its own. right: codes [E, N, K] and scales
    [E, ceil(N / 128), ceil(K / 128)], contiguous. out: bfloat16 [M, N], contiguous. row_experts: int32 [M], the same
    for each `ALIGNMENT` rows, -1 for rows that are nobody's, which may hold anything afterwards.

    Raises RuntimeError for a kernel that would be compiled or loaded inside a CUDA graph capture or for another
    alignment, JitError for one that would be compiled after a strict warm-up.
    """
    groups, n, k = right[0].shape
    m = left[0].shape[0]
    _run(Product(n, k, "contiguous", groups), m, m, left, right, out, row_experts)


def masked(left: Pair, right: Pair, out: Tensor, counts: Tensor, expected_m: int) -> None:
    """out[e, row] = left[e, row] @ right[e].T for row < counts[e], both dequantized.

    left: codes float8_e4m3fn [E, M, K] and scales float32 [E, M, ceil(K / 128)]; right: as in `contiguous`. out:
    bfloat16 [E, M, N], contiguous; other rows may hold anything afterwards. counts: int32 [E]. expected_m: how many
    rows of a group there are about, >= 1, which decides on the tile. Raises as `contiguous`.
    """
    groups, n, k = right[0].shape
    m = left[0].shape[1]
    _run(Product(n, k, "masked", groups), expected_m, m, left, right, out, counts)


def _run(
    product: Product, m: int, rows: int, left: Pair, right: Pair, out: Tensor, which: Tensor
) -> None:
    if rows == 0:
        return
    scale = left[1]
    if (trace := tracing.current()) is not None:
        if trace.can("deep_gemm"):
            trace.add(kernel_of(m, product, multiprocessors_of(trace.target)))
            if _transposes(scale, rows):
                trace.add(transpose_of(m, product))
        return
    problem = (out.device.index, product, m, rows, scale.stride())
    if problem in _ran:
        _call(product, m, left, right, out, which)
        return
    _check_alignment(product)
    capturing = torch.cuda.is_current_stream_capturing()
    with first_call_of(product, m, out.device.index, _transposes(scale, rows), capturing):
        _call(product, m, left, right, out, which)
    _ran.add(problem)


def _call(product: Product, m: int, left: Pair, right: Pair, out: Tensor, which: Tensor) -> None:
    import deep_gemm

    if product.kind == "contiguous":
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(left, right, out, which)
    else:
        deep_gemm.fp8_m_grouped_gemm_nt_masked(left, right, out, which, m)


def _check_alignment(product: Product) -> None:
    import deep_gemm

    if product.kind == "contiguous":
        alignment = deep_gemm.get_mk_alignment_for_contiguous_layout()
        if alignment != ALIGNMENT:
            raise RuntimeError(
                f"DeepGEMM was told to align groups to {alignment} rows; accepted: {ALIGNMENT}"
            )


def _transposes(scale: Tensor, rows: int) -> bool:
    """Whether DeepGEMM transposes the scales with a kernel of its own."""
    pitch = pitch_of(rows, "column_major_tma")
    in_place = scale.stride()[-2:] == (1, pitch) and (
        scale.dim() == 2 or scale.stride(0) == pitch * scale.shape[-1]
    )
    # of a single column the strides say nothing
    return scale.is_contiguous() and not (in_place and scale.shape[-1] > 1)


def run_once(kernel: Kernel) -> None:
    """Run a product whose rows are nobody's, on the current GPU: loads its kernel, compiles it if it must.

    kernel: of a grouped product, or of the transposition for one. It allocates the memory of one weight, E * N * K
    bytes, for as long as it takes.
    """
    device, size = torch.device("cuda"), dict(kernel.example)
    m, n, k, groups = (size[name] for name in ("m", "n", "k", "groups"))
    blocks = -(-k // BLOCK_K)
    rows = ALIGNMENT if size["masked"] else -(-m // ALIGNMENT) * ALIGNMENT

    def codes(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)

    # rows are a multiple of 4, so that no padding is between the columns of these scales
    scale = torch.empty(groups, blocks, rows, device=device).transpose(1, 2)
    if "transpose_groups" in dict(kernel.spec):
        scale = scale.contiguous()
    right = (codes(groups, n, k), torch.empty(groups, -(-n // BLOCK_K), blocks, device=device))
    if size["masked"]:
        out = torch.empty(groups, rows, n, dtype=torch.bfloat16, device=device)
        none = torch.zeros(groups, dtype=torch.int32, device=device)
        masked((codes(groups, rows, k), scale), right, out, none, m)
    else:
        out = torch.empty(rows, n, dtype=torch.bfloat16, device=device)
        nobody = torch.full((rows,), -1, dtype=torch.int32, device=device)
        contiguous((codes(rows, k), scale[0]), right, out, nobody)

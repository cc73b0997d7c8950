"""Which tile DeepGEMM picks for a block-scaled product on Hopper: dense, or of one group of rows per expert.

Facts from DeepGEMM's sources as of `VERSIONS`: csrc/jit_kernels/heuristics/sm90.hpp, csrc/apis/gemm.hpp. None of M, N
and K of a dense product is compiled in (its default of `compiled_dims`), so kernels are few and shared by layers; K
decides only how many stages fit into shared memory. Grouped products have N, K and the number of groups compiled in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from custom_ops.jit.kernel import Kernel

VERSIONS = ("0.1.4",)
OP, IMPLEMENTATION = "block_scaled_mm", "deep_gemm"
KINDS = ("dense", "contiguous", "masked")

BLOCK_K = 128
WGMMA_M = 64
SHARED_MEMORY = 232448
MAX_STAGES = 16
# Bytes per cycle from L2, all multiprocessors together, and from one multiprocessor's L1.
L2_LIMIT, L2_EACH, L1_EACH = 8e6 / 1.3e3, 64.0, 128
# Rows of a group in the contiguous kind are a multiple of this, which is also the height of its tiles.
ALIGNMENT = 128
TILE_M = {"dense": (64, 128, 16, 32, 256), "contiguous": (ALIGNMENT,), "masked": (64, 128)}
TILE_N = tuple(range(16, 193, 16))
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Product:
    """What of a product decides on its kernels beside M.

    M is the rows of a dense product, all rows of a contiguous one, and the expected rows of a group of a masked one.
    """

    n: int
    k: int
    kind: str = "dense"
    groups: int = 1


@dataclass(frozen=True)
class Tile:
    """One choice of the heuristic."""

    block_m: int
    block_n: int
    cluster_m: int
    cluster_n: int
    stages: int


@functools.lru_cache(maxsize=256)
def tiles(product: Product) -> tuple[Tile, ...]:
    """The tiles that DeepGEMM considers for a product, in its order, which decides between equals."""
    found = []
    for cluster_m, cluster_n in ((1, 1), (1, 2), (2, 1)):
        for block_m in TILE_M[product.kind]:
            for block_n in TILE_N:
                over = block_n - BLOCK_K
                if over > 0 and block_n % over and BLOCK_K % over:
                    continue
                columns = -(-product.n // block_n)
                if product.kind == "masked" and columns % (cluster_m * cluster_n):
                    continue
                if block_m > 128 and block_n > 128:
                    continue
                stages = _stages(block_m, block_n, product.k)
                if stages >= (3 if block_m * block_n >= 128 * 192 else 4):
                    found.append(Tile(block_m, block_n, cluster_m, cluster_n, stages))
    return tuple(found)


def _stages(block_m: int, block_n: int, k: int) -> int:
    """How many stages of the pipeline fit into shared memory beside the output tile and the scales of b."""
    output = _align(block_m * block_n * 2, 1024)
    barriers = MAX_STAGES * 8 * 2
    scales = _align(-(-k // BLOCK_K) * 4 * (1 if BLOCK_K % block_n == 0 else 2), 8)
    stage = (block_m + block_n) * BLOCK_K + _align(block_m * 4, 128)
    return min((SHARED_MEMORY - output - barriers - scales) // stage, MAX_STAGES)


def _align(size: int, to: int) -> int:
    return -(-size // to) * to


def choose(m: np.ndarray, product: Product, multiprocessors: int) -> np.ndarray:
    """For each M, the index in `tiles(product)` of the tile that DeepGEMM picks: that of the fewest cycles.

    m: int64, [count]. Divisions and roundings are those of its C++: int64, and float32 for the efficiency.
    """
    n, k = product.n, product.k
    considered = tiles(product)
    block_m, block_n, cluster_m, cluster_n = (
        np.array([getattr(t, name) for t in considered], np.int64)[:, None]
        for name in ("block_m", "block_n", "cluster_m", "cluster_n")
    )
    groups = product.groups if product.kind == "masked" else 1
    blocks = -(-m[None, :] // block_m) * -(-n // block_n) * groups
    waves = -(-blocks // multiprocessors)
    l2_rate = int(min(L2_EACH * multiprocessors, L2_LIMIT))
    l1_rate = L1_EACH * multiprocessors

    output = block_m * block_n * 2
    l2_bytes = k * (block_m // cluster_n + block_n // cluster_m) + output
    # tiles are read into L1, and again by the tensor cores, whose instruction has 64 rows
    l1_bytes = k * (block_m + block_n) + k * (np.maximum(WGMMA_M, block_m) + block_n) + 2 * output
    slowest = np.maximum(l1_bytes * blocks // l1_rate, l2_bytes * blocks // l2_rate)
    efficiency = blocks.astype(np.float32) / (waves * multiprocessors).astype(np.float32)
    cycles = (slowest.astype(np.float32) / efficiency).astype(np.int64)

    cycles[(cluster_m * cluster_n > 1) & (waves <= 1)] = NEVER  # multicast pays from two waves on
    cycles[((block_m == 16) & (m > 16)) | ((block_m == 32) & (m > 32))] = NEVER
    return np.argmin(cycles, axis=0)  # the first of equals


def spec_of(tile: Tile, product: Product, multiprocessors: int) -> dict[str, int | str]:
    """What of a tile and a product is compiled in."""
    spec: dict[str, int | str] = {
        "block_m": tile.block_m,
        "block_n": tile.block_n,
        "stages": tile.stages,
        "cluster": tile.cluster_m * tile.cluster_n,
        "multicast_a": int(tile.cluster_n > 1),
        "multiprocessors": multiprocessors,
    }
    if product.kind != "dense":
        spec |= {"kind": product.kind, "groups": product.groups, "n": product.n, "k": product.k}
    return spec


@functools.lru_cache(maxsize=1 << 14)
def kernel_of(m: int, product: Product, multiprocessors: int) -> Kernel:
    """The kernel that DeepGEMM runs for one problem."""
    index = int(choose(np.array([m], np.int64), product, multiprocessors)[0])
    return kernel_at(index, m, product, multiprocessors)


def kernel_at(index: int, m: int, product: Product, multiprocessors: int) -> Kernel:
    """The kernel of the tile of that index in `tiles(product)`."""
    spec = spec_of(tiles(product)[index], product, multiprocessors)
    return Kernel.of(OP, IMPLEMENTATION, spec, **_example(m, product))


def transpose_of(m: int, product: Product) -> Kernel:
    """The kernel that brings row-major scales of a into the layout that the product reads."""
    spec = {"transpose_groups": -(-product.k // BLOCK_K)}
    return Kernel.of(OP, IMPLEMENTATION, spec, **_example(m, product))


def _example(m: int, product: Product) -> dict[str, int]:
    sizes = {"m": m, "n": product.n, "k": product.k}
    if product.kind != "dense":
        sizes |= {"groups": product.groups, "masked": int(product.kind == "masked")}
    return sizes

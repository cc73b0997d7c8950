import json, os, shutil, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, ".")
import torch
import triton.testing as tt
from custom_ops import cuda_build

OUT = Path(os.environ.get("OUT", "/tmp"))
ARCH = "9.0a"


def build_variant(name, subs):
    d = Path(tempfile.mkdtemp())
    src = d / "csrc"
    shutil.copytree(cuda_build.CSRC, src)
    subs = [
        *subs,
        ("bindings.cpp", "LIBRARY_FRAGMENT(custom_ops_cuda", f"LIBRARY_FRAGMENT(custom_ops_{name}"),
        ("bindings.cpp", "LIBRARY_IMPL(custom_ops_cuda", f"LIBRARY_IMPL(custom_ops_{name}"),
    ]
    for f, a, b in subs:
        s = (src / f).read_text()
        assert a in s, (name, f, a)
        (src / f).write_text(s.replace(a, b))
    lib = d / f"{name}.so"
    cuda_build.compile_library(
        lib, ARCH, [p for p in sorted(src.iterdir()) if p.suffix in (".cu", ".cpp")]
    )
    return lib


def R(n):
    return [
        ("group_quant.cu", "<T, 4, true", f"<T, {n}, true"),
        ("group_quant.cu", "? 1 : 4", f"? 1 : {n}"),
        ("activation.cu", "<T, 4, true", f"<T, {n}, true"),
        ("activation.cu", "? 1 : 4", f"? 1 : {n}"),
    ]


def T(n):
    return [("rows.cuh", "kThreads = 128", f"kThreads = {n}")]


def V(n):
    return [("normalization.cu", ">= kManyRows ? 4 : 1", f">= kManyRows ? {n} : 1")]


def H(h):
    return [("vec.cuh", "ld.global.nc.L1::no_allocate.v4.u32", f"ld.global.{h}.v4.u32")]


SMALL = [
    ("rows.cuh", "int64_t{1} << 22", "int64_t{1} << 12"),
    ("normalization.cu", "kManyRows = 512", "kManyRows = 1"),
]


def bench(fn, rep=20):
    return tt.do_bench_cudagraph(fn, rep=rep, return_mode="median") * 1e3


def gq(x):
    g = x.float().view(x.shape[0], -1, 128)
    s = g.abs().amax(-1).clamp(min=1e-10) / 448.0
    return (g / s.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn).view(x.shape), s


def sq(p):
    g, u = p.chunk(2, -1)
    return gq(torch.nn.functional.silu(g) * u)


def nq(x, r, w):
    h = x + r
    f = h.float()
    y = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (*gq(w * y.to(x.dtype)), h)


def inputs(kind, m, k):
    if kind == "gq":
        return (torch.randn(m, k, device="cuda", dtype=torch.bfloat16),)
    if kind == "sq":
        return (torch.randn(m, 2 * k, device="cuda", dtype=torch.bfloat16),)
    return (
        torch.randn(m, k, device="cuda", dtype=torch.bfloat16),
        torch.randn(m, k, device="cuda", dtype=torch.bfloat16),
        torch.rand(k, device="cuda", dtype=torch.bfloat16) + 0.5,
    )


def nbytes(kind, m, k):
    n = m * k
    s = n // 128 * 4
    return {"gq": 3 * n, "sq": 5 * n, "nq": 7 * n + 2 * k}[kind] + s


def caller(ns, kind, args, layout="row_major"):
    o = getattr(torch.ops, ns)
    if kind == "gq":
        return lambda: o.group_quant(args[0], 128, scale_layout=layout)
    if kind == "sq":
        g, u = args[0].chunk(2, -1)
        return lambda: o.silu_mul_group_quant(g, u, 128, scale_layout=layout)
    return lambda: o.add_rms_norm_group_quant(
        args[0], args[1], args[2], 1e-6, 128, scale_layout=layout
    )


EAGER = {"gq": gq, "sq": sq, "nq": nq}


def copy_bw():
    a = torch.empty(1 << 30, device="cuda", dtype=torch.uint8).random_()
    b = torch.empty_like(a)
    return 2 * a.numel() / (bench(lambda: b.copy_(a), 100) * 1e-6)


def load(variants):
    with ThreadPoolExecutor(8) as p:
        libs = list(p.map(lambda kv: build_variant(*kv), variants.items()))
    for lib in libs:
        torch.ops.load_library(lib)


if __name__ == "__main__":
    t0 = time.time()
    what = sys.argv[1]
    res = []
    torch._dynamo.config.cache_size_limit = 1000
    torch._dynamo.config.recompile_limit = 1000
    if what == "one":
        variants = {
            "base": [],
            "r2v2": R(2) + V(2),
            "r1v1": R(1) + V(1),
            "t256": T(256),
            "r2t256": R(2) + T(256),
            "t64": T(64),
            "plain": H("nc"),
            "l2256": H("nc.L1::no_allocate.L2::256B"),
            "small": SMALL,
            "small2": SMALL + R(2) + V(2),
        }
        shapes = [("gq", 4096, 7168), ("sq", 16384, 2048), ("nq", 16384, 7168)]
        small = [
            (k, m, h)
            for k, h in (("gq", 7168), ("sq", 2048), ("nq", 7168))
            for m in (1, 16, 64, 256, 1024, 4096)
        ]
        load(variants)
        print("built", time.time() - t0, flush=True)
        bw = copy_bw()
        print("copy TB/s", bw / 1e12, flush=True)
        for shp in shapes + small:
            a = inputs(*shp)
            ideal = nbytes(*shp) / bw * 1e6
            row = {"shape": shp, "ideal": ideal}
            for v in variants:
                row[v] = bench(caller("custom_ops_" + v, shp[0], a))
            row["tma"] = bench(caller("custom_ops_base", shp[0], a, "column_major_tma"))
            c = torch.compile(EAGER[shp[0]], dynamic=False)
            c(*a)
            row["inductor"] = bench(lambda: c(*a))
            res.append(row)
            print(
                *shp,
                f"ideal {ideal:.2f}",
                *(f"{k} {v:.2f}" for k, v in row.items() if k not in ("shape", "ideal")),
                flush=True,
            )
        (OUT / "one.json").write_text(json.dumps({"bw": bw, "rows": res}))
    print("done", time.time() - t0)

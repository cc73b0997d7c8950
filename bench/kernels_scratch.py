# ruff: noqa
# fmt: off
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


def GR(n): return [('group_quant.cu', '<T, 8, 4, true>', f'<T, 8, {n}, true>')]
def SR(n): return [('activation.cu', '<T, 8, 4, true, Quant>', f'<T, 8, {n}, true, Quant>')]
def T(n): return [('rows.cuh', 'kThreads = 128', f'kThreads = {n}')]
def N(v, r): return [('normalization.cu', 'int per_thread = 1;', f'int per_thread = {v};'), ('normalization.cu', 'int rows_per_thread = 1;', f'int rows_per_thread = {r};'),
    *[('normalization.cu', f'launch_vecs<T, {i}, 1>', f'launch_vecs<T, {i}, {r}>') for i in (1, 2, 4)]]
GPLAIN = [('group_quant.cu', 'load_streaming', 'load_const')]
SSTREAM = [('activation.cu', 'load_const', 'load_streaming')]
NSTREAM = [('normalization.cu', 'load_const<T>(static_cast<const T*>(p.x', 'load_streaming<T>(static_cast<const T*>(p.x'), ('normalization.cu', 'load_const<T>(static_cast<const T*>(p.res', 'load_streaming<T>(static_cast<const T*>(p.res')]
def FEW(n): return [('rows.cuh', '} << 18', '} << %d' % n)]
def MANY(n): return [('rows.cuh', '} << 22', '} << %d' % n)]

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
    best = 0
    for n, dt in ((1 << 30, torch.uint8), (1 << 30, torch.float32), (1 << 31, torch.bfloat16)):
        a = torch.empty(n, device='cuda', dtype=dt); a.view(torch.uint8).random_(); b = torch.empty_like(a)
        nb = 2 * a.numel() * a.element_size()
        for name, f in (('do_bench', lambda: tt.do_bench(lambda: b.copy_(a), return_mode='median') * 1e3), ('graph', lambda: bench(lambda: b.copy_(a), 100)),
                        ('mul', lambda: bench(lambda: torch.mul(a, 1, out=b), 100))):
            if name == 'mul' and dt == torch.uint8: continue
            t = f(); print('copy', n, dt, name, f'{nb / t / 1e6:.3f} TB/s', flush=True); best = max(best, nb / (t * 1e-6))
        del a, b
    return best
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
    if what == 'three':
        variants = {'base': [], 'noredux': [('fp8.cuh', 'N == 4 && group_size == 128', 'N == 2')], 'few12': [('group_quant.cu', '} << 16', '} << 12'), ('activation.cu', '} << 18', '} << 12')],
                    'few18': [('group_quant.cu', '} << 16', '} << 18'), ('activation.cu', '} << 18', '} << 16')], 'many22': [('group_quant.cu', '} << 20', '} << 22'), ('activation.cu', '} << 20', '} << 22'), ('normalization.cu', 'kManyRows = 256', 'kManyRows = 512')]}
        load(variants)
        print('built', time.time() - t0, flush=True)
        bw = copy_bw(); print('copy', bw / 1e12)
        one = torch.zeros(32, device='cuda'); print('floor (tiny torch op)', bench(lambda: one + 1))
        for shp in [(k, m, h) for k, hs in (('gq', (7168, 4096)), ('sq', (2048, 14336)), ('nq', (7168, 4096))) for h in hs for m in (1, 16, 64, 256, 1024, 4096, 8192, 16384)]:
            a = inputs(*shp); ideal = nbytes(*shp) / bw * 1e6
            row = {'shape': shp, 'ideal': ideal}
            for v in variants:
                if v != 'base' and shp[1] > 1024: continue
                row[v] = bench(caller('custom_ops_' + v, shp[0], a))
                row[v + 't'] = bench(caller('custom_ops_' + v, shp[0], a, 'column_major_tma'))
            c = torch.compile(EAGER[shp[0]], dynamic=False)
            c(*a); row['inductor'] = min(bench(lambda: c(*a)) for _ in range(2))
            res.append(row)
            print(*shp, f"ideal {ideal:.2f} frac {ideal/row['base']:.3f}|", *(f'{v}: {row[v]:.2f} {row[v+"t"]:.2f}|' for v in variants if v in row), f"ind {row['inductor']:.2f}",
                  'SLOWER' if max(row['base'], row['baset']) > 1.03 * row['inductor'] else '', flush=True)
            del a, c; torch._dynamo.reset()
        (OUT / 'three.json').write_text(json.dumps({'bw': bw, 'rows': res}))
        x = torch.randn(16, 7168, device='cuda', dtype=torch.bfloat16)
        for name, f in (('group_quant', caller('custom_ops_base', 'gq', (x,), 'column_major_tma')), ('add_rms_norm_group_quant', caller('custom_ops_base', 'nq', (x, x, x[0]), 'column_major_tma'))):
            for _ in range(100): f()
            torch.cuda.synchronize(); t = time.perf_counter()
            for _ in range(1000): f()
            t1 = time.perf_counter(); torch.cuda.synchronize(); print('host us per call', name, (t1 - t) * 1e3)
        from tests.custom_ops.test_cuda_kernels import errors, randn, count_flips
        from custom_ops.activation import reference as ra
        from custom_ops.normalization import reference as rn
        o = torch.ops.custom_ops_base
        for dt in (torch.bfloat16, torch.float16):
            for spread in (0.0, 3.0):
                g = randn(2000, 8192, dtype=dt, spread=spread); u = randn(2000, 8192, dtype=dt); w = torch.ones(8192, device='cuda', dtype=dt)
                n = torch.ones_like(g); ex = g.double() * torch.sigmoid(g.double())
                print(dt, spread, 'silu err ulp mean/max: ours', errors(o.silu_mul(g, n), ex), 'eager', errors(ra.silu_mul(g, n), ex))
                kw = dict(scale_layout='row_major', min_amax=1e-10)
                print('  silu_mul_group_quant flips, far', count_flips(o.silu_mul_group_quant(g, u, 128), ra.silu_mul_group_quant(g, u, 128, **kw), 128), 'of', g.numel())
                d = g.double(); ex = d * torch.rsqrt(d.pow(2).mean(-1, keepdim=True) + 1e-6)
                print('  norm err ulp mean/max: ours', errors(o.rms_norm(g, w, 1e-6), ex), 'eager', errors(rn.rms_norm(g, w, 1e-6, weight_mode='rounded'), ex))
                print('  add_rms_norm_group_quant flips, far', count_flips(o.add_rms_norm_group_quant(g, u, w, 1e-6, 128), rn.add_rms_norm_group_quant(g, u, w, 1e-6, 128, weight_mode='rounded', **kw), 128), flush=True)
    print("done", time.time() - t0)

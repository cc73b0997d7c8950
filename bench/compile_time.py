"""Compile time of a whole model with the plugin against stock Inductor, each in a process with empty caches.

`python -m bench compile-time` runs this file once per measurement.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time

BACKENDS = ("inductor", "fusion_passes")
SCHEMES = ("bf16", "fp8_block")


def compile_once(backend: str, scheme: str, layers: int) -> float:
    """Seconds from the first call of a freshly made Llama to its result, less one warm call."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import fusion_passes
    from fusion_passes.backend import fusion_passes as plugin

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    if scheme == "fp8_block":
        fusion_passes.quantize_(model, "fp8_block")
    ids = torch.randint(0, 256, (1, 16))
    compiled = torch.compile(model, backend=plugin if backend == "fusion_passes" else backend)
    torch.compile(lambda x: x + 1)(
        torch.zeros(2)
    )  # imports Inductor and starts its compile workers
    with torch.no_grad():
        start = time.perf_counter()
        compiled(ids, use_cache=False)
        first = time.perf_counter()
        compiled(ids, use_cache=False)
    return (first - start) - (time.perf_counter() - first)


def measure(scheme: str, layers: int, repeats: int) -> dict[str, float]:
    """Median seconds per backend, the backends in turn so that a drift of the machine meets both."""
    seconds: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
    for _ in range(repeats):
        for backend in BACKENDS:
            with tempfile.TemporaryDirectory() as cache:
                environment = os.environ | {
                    "TORCHINDUCTOR_CACHE_DIR": cache,
                    "CUSTOM_OPS_CACHE_DIR": cache,
                    "FUSION_PASSES": "all",
                    "FUSION_PASSES_ALLOW_REFERENCE": "1",
                }
                command = [sys.executable, "-m", "bench.compile_time", backend, scheme, str(layers)]
                done = subprocess.run(
                    command, env=environment, check=True, capture_output=True, text=True
                )
                seconds[backend].append(float(done.stdout.split()[-1]))
    return {backend: statistics.median(each) for backend, each in seconds.items()}


if __name__ == "__main__":
    print(compile_once(sys.argv[1], sys.argv[2], int(sys.argv[3])))

"""Experts on several ranks in two batches: what one sends and receives runs beside the products of the other.

    communication   send A | send B           | back A          | back B
    products                 experts A          experts B

Two streams; each batch has communication buffers and a handle of its own. The stream of the communication comes first
on the GPU where both have blocks that wait, and the libraries whose kernels stay on the SMs until they are done
(DeepGEMM, torch._grouped_mm) leave it those that DeepEP is set to use; DeepGEMM compiles kernels for that number.

No tensor needs to be recorded on the stream that did not allocate it: the communication begins behind all that the
products' stream was given before, which in turn goes on behind all of the communication, and until then this function
keeps everything that crosses over.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from custom_ops.expert_parallel import buffers
from custom_ops.expert_parallel.exchanges import Dispatch, Gather, Received, Tokens

Products = Callable[[Tokens], Tensor]


def in_one(exchange: Dispatch | Gather, products: Products, tokens: Tokens) -> Tensor:
    """[T, H]: there, through the experts, and back."""
    received = exchange.send(tokens)
    return exchange.back(products(received.tokens), received.handle)


def in_two(
    exchange: Dispatch | Gather, products: Products, tokens: Tokens, dtype: torch.dtype
) -> Tensor:
    """The same in two halves, of a dtype. Every rank has both, be they empty."""
    half, batches = exchange.half(), tokens.halves()
    if not tokens.x.is_cuda:
        return torch.cat([in_one(half, products, batch) for batch in batches])
    main = torch.cuda.current_stream(tokens.x.device)
    # Before the streams part: later the products' stream may hand out memory that its own kernels still read.
    out = tokens.x.new_empty(tokens.x.shape, dtype=dtype)
    side = _side_stream(tokens.x.device)
    side.wait_stream(main)

    def send(which: int) -> tuple[Received, Any]:
        with torch.cuda.stream(side), buffers.batch(which):
            received = half.send(batches[which])
            return received, side.record_event()

    def run(received: Received, arrived: Any) -> tuple[Tensor, Any]:
        main.wait_event(arrived)
        y = products(received.tokens)
        return y, main.record_event()

    kept: list[Any] = []
    with _leaving(buffers.SMS, tokens.x.device):
        there = [send(0)]
        if not half.waits:
            there.append(send(1))
        done = [run(*there[0])]
        if half.waits:  # the host, which has launched the products of the first by then
            there.append(send(1))
        done.append(run(*there[1]))
    first = len(batches[0].x)
    parts = out[:first], out[first:]
    for which, (y, ready) in enumerate(done):
        with torch.cuda.stream(side), buffers.batch(which):
            side.wait_event(ready)
            back = half.back(y, there[which][0].handle)
            parts[which].copy_(back)
            kept.append(back)
    main.wait_stream(side)
    del kept, there, done
    return out


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device, priority=-1)


@contextlib.contextmanager
def _leaving(sms: int, device: torch.device) -> Iterator[None]:
    """Leave so many SMs to the communication in kernels that are launched inside."""
    deep_gemm = sys.modules.get("deep_gemm")
    before = torch._C._get_sm_carveout_experimental()
    torch._C._set_sm_carveout_experimental(sms)
    had = deep_gemm.get_num_sms() if deep_gemm else 0
    if deep_gemm:
        deep_gemm.set_num_sms(had - sms)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(before)
        if deep_gemm:
            deep_gemm.set_num_sms(had)

"""Several layers of a batch on one activation: what each of them is alone, bit for bit."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import custom_ops
from custom_ops import LoRABatch
from custom_ops.lora import hopper, hopper_batch, launch, linears
from fusion_passes.testing.strategies import relayouts
from tests.custom_ops.helpers import DEVICE, assert_same_bits, fake_mode, implementation
from tests.custom_ops.lora.cases import CHANNELS, DTYPES, RANKS, WIDTHS, adapters, normal

NAME = "lora_linears"
few = settings(max_examples=12)


def layers_of(seed, widths, ranks, most, channels, dtype, biases) -> tuple[list, ...]:
    """Weights, biases, a, b, scalings and ranks of layers, each of which has ranks of its own in the slots."""
    weights, rows, a, b, scalings, of_layers = [], [], [], [], [], []
    for index, (width, here, biased) in enumerate(zip(widths, ranks, biases, strict=True)):
        first = seed + 20 * index
        ((of_a,), (of_b,)) = adapters(first, here, most, channels, [width], dtype)
        weights.append(normal(first + 1, (width, channels), dtype))
        rows.append(normal(first + 2, (width,), dtype) if biased else None)
        a.append(of_a)
        b.append(of_b)
        scalings.append(normal(first + 3, (len(here),), torch.float32))
        of_layers.append(torch.tensor(here, dtype=torch.int32, device=DEVICE))
    return weights, rows, a, b, scalings, of_layers


@st.composite
def calls(draw: st.DrawFn) -> tuple:
    """One to four layers of any widths; in a slot, each has a rank of its own."""
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(10, 2**31))
    count, channels = draw(st.sampled_from((1, 2, 17, 70))), draw(st.sampled_from(CHANNELS))
    most, slots = draw(st.sampled_from(RANKS)), draw(st.integers(1, 4))
    widths = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4))
    in_slots = st.lists(st.integers(0, most), min_size=slots, max_size=slots)
    ranks = [draw(in_slots) for _ in widths]
    layers = layers_of(
        seed, widths, ranks, most, channels, dtype, [draw(st.booleans()) for _ in widths]
    )
    layers[0][0] = draw(relayouts(layers[0][0]))
    batch = LoRABatch(count + draw(st.integers(1, 40)), slots, device=DEVICE)
    batch.update(draw(st.lists(st.integers(-1, slots - 1), min_size=count, max_size=count)))
    x = draw(relayouts(normal(seed + 7, (count, channels), dtype)))
    return x.reshape(1, count, channels) if draw(st.booleans()) else x, *layers, *batch.tensors


def one_by_one(which: str, call: tuple) -> list[torch.Tensor]:
    x, weights, biases, a, b, scalings, ranks, *batch = call
    alone = implementation("lora_linear", which)
    layers = zip(weights, biases, a, b, scalings, ranks, strict=True)
    return [
        alone(x, weight, bias, [of_a], [of_b], *numbers, *batch)
        for weight, bias, of_a, of_b, *numbers in layers
    ]


@pytest.mark.parametrize("which", ["reference", "triton"])
@given(call=calls())
@few
def test_each_is_what_it_is_alone(which, call):
    together = implementation(NAME, which)(*call)
    apart = one_by_one(which, call)
    assert len(together) == len(apart)
    for one, other in zip(together, apart, strict=True):
        assert one.is_contiguous()
        assert_same_bits(one, other)


def test_one_shrink_for_all_layers(monkeypatch):
    shrunk, prepare = [], launch.prepare_shrink

    def counting(x, a, *rest, **named):
        shrunk.append(len(a))
        return prepare(x, a, *rest, **named)

    monkeypatch.setattr(linears.launch, "prepare_shrink", counting)
    implementation(NAME, "triton")(*sample())
    assert shrunk == [3]


def sample() -> tuple:
    batch = LoRABatch(8, 3, device=DEVICE)
    batch.update([0, -1, 2, 2, 1, 0])
    ranks = [[8, 3, 0], [1, 8, 8], [8, 8, 2]]
    layers = layers_of(40, (16, 40, 8), ranks, 8, 32, torch.bfloat16, (False, True, False))
    return normal(1, (2, 3, 32), torch.bfloat16), *layers, *batch.tensors


def test_opcheck():
    torch.library.opcheck(
        torch.ops.custom_ops.lora_linears.default,
        sample(),
        test_utils=[
            *("test_schema", "test_autograd_registration", "test_faketensor"),
            "test_aot_dispatch_dynamic",
        ],
    )


def test_no_tokens():
    x, *rest = sample()
    outs = custom_ops.lora_linears(x[:0], *rest)
    assert [out.shape for out in outs] == [(0, 3, 16), (0, 3, 40), (0, 3, 8)]


def changed(index: int, value: object) -> tuple:
    call = list(sample())
    call[index] = value
    return tuple(call)


X, WEIGHTS, BIASES, A, B, SCALINGS, RANK_LISTS, *BATCH = sample()
BAD = {
    "no layer": (
        (X, [], [], [], [], [], [], *BATCH),
        "weights is empty; accepted: one or more layers",
    ),
    "biases": (changed(2, BIASES[:2]), "biases has 2 layers; accepted: 3, as weights"),
    "ranks": (changed(6, RANK_LISTS[:1]), "ranks has 1 layers; accepted: 3, as weights"),
    "weight": (changed(1, [WEIGHTS[0][:, :8], *WEIGHTS[1:]]), r"weight.shape is \(16, 8\)"),
    "ranks of two": (
        changed(3, [A[0][:, :4].contiguous(), *A[1:]]),
        r"a\[1\].shape is \(3, 8, 32\)",
    ),
    "width": (
        changed(4, [B[1], *B[1:]]),
        r"b\[0\].shape is \(3, 40, 8\); accepted: \[num_slots, N, rank\]",
    ),
    "slots": (changed(5, [SCALINGS[0][:2], *SCALINGS[1:]]), r"scaling.shape is \(2,\)"),
    "dtype": (changed(4, [each.half() for each in B]), r"b\[0\].dtype is torch.float16"),
    "batch": (changed(7, BATCH[0].long()), "token_slots.dtype is torch.int64"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_are_the_same_in_fake_and_kernel(case):
    args, message = BAD[case]
    with pytest.raises(ValueError, match=message) as real:
        custom_ops.lora_linears(*args)
    assert str(real.value).startswith(f"{NAME}: ")
    with fake_mode() as fake, pytest.raises(ValueError, match=re.escape(str(real.value))):
        custom_ops.lora_linears(*fake(args))


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a Hopper GPU",
)
@pytest.mark.parametrize("tokens", [1, 40, 300, 1100])
def test_in_a_graph_that_serves_other_adapters(tokens):
    """The chosen implementation and its twins beside one layer after the other, in a CUDA graph."""
    slots, widths = 5, (512, 256, 256)
    ranks = [[16, 8, 0, 3, 16], [16, 16, 1, 0, 2], [8, 16, 16, 16, 0]]
    layers = layers_of(90, widths, ranks, 16, 1024, torch.bfloat16, (True, False, False))
    batch = LoRABatch(tokens, slots, device=DEVICE)
    call = (normal(1, (tokens, 1024), torch.bfloat16) / 32, *layers, *batch.tensors)
    ways = [custom_ops.lora_linears, implementation(NAME, "triton")]
    if not hopper.unsupported_batches(*call):
        ways.append(hopper_batch.load_linears())
    for way in ways:
        batch.update(())
        way(*call)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = way(*call)
        generator = torch.Generator().manual_seed(tokens)
        for _ in range(2):
            batch.update(torch.randint(-1, slots, (tokens,), generator=generator).tolist())
            for out in outs:
                out.zero_()
            graph.replay()
            for out, other in zip(outs, one_by_one("reference", call), strict=True):
                step = torch.finfo(out.dtype).eps
                torch.testing.assert_close(out, other, rtol=2 * step, atol=4 * step)

"""Which page of `docs/` has a fusion, an op or a suite of the bench: one page per op family."""

from __future__ import annotations

from dataclasses import dataclass

from bench import heat_map
from bench.results import RANKS


@dataclass(frozen=True)
class Page:
    """A page of `docs/`, named by its file.

    words: a fusion or an op is of the first page that has a word of its name.
    suites: the page shows the rows of a suite whose name starts with one of these.
    families: the folders of `custom_ops` whose ops it has.
    """

    name: str
    title: str
    words: tuple[str, ...]
    suites: tuple[str, ...]
    families: tuple[str, ...]


# in the order in which a name is looked up: `fused_moe_lora` is an op of LoRA, `ep_fused_moe` one of expert parallelism
PAGES = (
    Page(
        "expert_parallel",
        "Expert parallelism",
        ("ep_", "dispatch", "combine", "gather_tokens", "two_batch"),
        (RANKS,),
        ("expert_parallel",),
    ),
    Page("lora", "LoRA", ("lora",), ("lora",), ("lora",)),
    Page(
        "moe",
        "Mixtures of experts",
        ("moe", "topk", "expert", "router"),
        ("moe",),
        ("moe",),
    ),
    Page("gemm", "Matrix products", ("linear", "_mm"), ("gemm", "layer", "torchao"), ("gemm",)),
    Page(
        "norms_and_activations",
        "Norms and activations",
        ("norm", "silu", "gelu", "swiglu", "rotary"),
        ("normalization", "activation"),
        ("normalization", "activation"),
    ),
    Page(
        "quantization",
        "Quantization",
        ("quant",),
        ("quantization", "layouts", heat_map.SUITE),
        ("quantization",),
    ),
)


def of_name(name: str) -> Page:
    """The page of a fusion or an op. Raises ValueError when no page has a word of its name."""
    for page in PAGES:
        if any(word in name for word in page.words):
            return page
    raise ValueError(f"{name!r} has no page: give one of bench/pages.py a word of it")


def of_suite(suite: str) -> Page | None:
    """The page that shows a suite: none for what has no time of ours beside another, such as a warm-up."""
    return next((page for page in PAGES if suite.startswith(page.suites)), None)

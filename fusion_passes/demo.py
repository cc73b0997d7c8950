"""The main job on small stock models with random weights: `fusion-passes demo`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

TOKENS = (2, 33)
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
WEIGHTS = ("bf16", "fp8_block")
SLACK = 1.1
"""How much further from float32 than eager a compiled model may be: flipped codes move either by a few percent."""


@dataclass(frozen=True)
class Result:
    """One model, compiled with the plugin and in eager mode, against its weights in float32 arithmetic.

    Errors are norms of differences of the logits over the norm of the logits.
    """

    model: str
    weights: str
    matches: dict[str, int]
    eager_error: float
    error: float
    difference: float
    same_token: float
    report: Any

    @property
    def passed(self) -> bool:
        """The criterion of the design: never further from exact arithmetic than eager is; and something fired."""
        return self.error <= SLACK * self.eager_error and bool(self.matches)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the report, for JSON."""
        fields = {name: value for name, value in vars(self).items() if name != "report"}
        return {**fields, "passed": self.passed}


def models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names and constructors of the models: real classes of transformers, nothing to download."""
    import transformers

    for name in ("Llama", "Qwen3", "Gemma3"):
        prefix = f"{name}Text" if name == "Gemma3" else name
        config = getattr(transformers, f"{prefix}Config")(**SIZES)
        yield name, partial(getattr(transformers, f"{name}ForCausalLM"), config)


def run(device: str, progress: Callable[[str], None] = lambda text: None) -> list[Result]:
    """Each model in bf16 and fp8_block, with all fusions on, references allowed on a CPU."""
    import fusion_passes

    options: dict[str, Any] = {"fusions": "all", "allow_reference": device == "cpu"}
    results = []
    for name, make in models():
        for weights in WEIGHTS:
            progress(f"{name} in {weights} ...")
            torch.manual_seed(0)
            torch.compiler.reset()
            fusion_passes.reset_reports()
            model = make().to(device, torch.bfloat16).eval()
            if weights == "fp8_block":
                fusion_passes.quantize_(model, "fp8_block")
            tokens = torch.randint(SIZES["vocab_size"], TOKENS, device=device)
            compiled = torch.compile(model, backend="fusion_passes", options=options)
            with torch.no_grad():
                eager, fused, exact = (
                    each(tokens, use_cache=False).logits.double()
                    for each in (model, compiled, copy.deepcopy(model).float())
                )
            report = fusion_passes.report()
            results.append(
                Result(
                    model=name,
                    weights=weights,
                    matches=report.matches,
                    eager_error=_distance(eager, exact),
                    error=_distance(fused, exact),
                    difference=_distance(fused, eager),
                    same_token=float((fused.argmax(-1) == eager.argmax(-1)).double().mean()),
                    report=report,
                )
            )
    return results


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())

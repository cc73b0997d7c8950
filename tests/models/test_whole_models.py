"""Stock models of other kinds, in one graph or in many: vision and language, encoder and decoder, state spaces.

Each graph of a call is rewritten and run beside the one it was: no output is further from float64 than eager's, and
every quantized linear that the call ran is one block-scaled product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_passes
from fusion_passes.quantize import Fp8BlockLinear
from fusion_passes.testing import Result, fuse_graphs
from tests.models.test_more_classes import assert_near

transformers = pytest.importorskip("transformers", reason="needs the extra 'models'")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("references")]

TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
SIGHT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 16,
}  # fmt: skip
SEQ2SEQ = {
    "d_model": 256, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "vocab_size": 128,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "max_position_embeddings": 64,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 16, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
IMAGE, START, END = 100, 101, 102
Made = tuple[nn.Module, dict[str, Any]]


def text(kind: str, **settings: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **settings}


def words(count: int = 12, image: int = 0) -> Tensor:
    """Tokens, of which some stand for an image."""
    ids = torch.randint(3, 90, (1, count), generator=torch.Generator().manual_seed(count))
    ids[0, 2 : 2 + image] = IMAGE
    return ids


def pixels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def make(name: str, **settings: Any) -> nn.Module:
    """A model by its class, less `ForConditionalGeneration` or `ForCausalLM`."""
    for suffix in ("ForConditionalGeneration", "ForCausalLM"):
        if hasattr(transformers, name + suffix):
            config = getattr(transformers, f"{name}Config")(**settings)
            return getattr(transformers, name + suffix)(config)
    pytest.skip(f"needs a transformers with {name}")


def llava() -> Made:
    sight = {"model_type": "clip_vision_model", "projection_dim": 256, **SIGHT}
    model = make(
        "Llava",
        vision_config=sight,
        text_config=text("llama"),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return model, {"input_ids": words(12, 4), "pixel_values": pixels(1, 3, 32, 32)}


def idefics3() -> Made:
    model = make(
        "Idefics3",
        vision_config=SIGHT,
        text_config=text("llama"),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return model, {"input_ids": words(12, 1), "pixel_values": pixels(1, 1, 3, 32, 32)}


def paligemma() -> Made:
    sight = {
        "model_type": "siglip_vision_model",
        "projection_dim": 256,
        "vision_use_head": False,
        **SIGHT,
    }
    settings = {"image_token_index": IMAGE, "projection_dim": 256}
    model = make("PaliGemma", vision_config=sight, text_config=text("gemma"), **settings)
    ids = words(12, 4)
    return model, {
        "input_ids": ids,
        "pixel_values": pixels(1, 3, 32, 32),
        "token_type_ids": torch.zeros_like(ids),
    }


def qwen2_5_vl() -> Made:
    sight = {
        "depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 256,
        "fullatt_block_indexes": [1], "window_size": 56, "patch_size": 14,
    }  # fmt: skip
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [8, 12, 12]}
    settings = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END}
    model = make(
        "Qwen2_5_VL", vision_config=sight, text_config={**TEXT, "rope_scaling": rope}, **settings
    )
    ids = words(12, 4)
    ids[0, 1], ids[0, 6] = START, END
    given = {
        "pixel_values": pixels(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    return model, {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).int(), **given}


def mllama() -> Made:
    sight = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 4, "image_size": 32, "patch_size": 16, "max_num_tiles": 2, "vision_output_dim": 512,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]],
    }  # fmt: skip
    plain = {name: value for name, value in TEXT.items() if name != "head_dim"}
    model = make(
        "Mllama", vision_config=sight, text_config={**plain, "cross_attention_layers": [1]}
    )
    given = {
        "pixel_values": pixels(1, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 2, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 12, 1, 2, dtype=torch.long),
    }
    return model, {"input_ids": words(), **given}


def t5gemma() -> Made:
    sizes = {name: value for name, value in TEXT.items() if name != "max_position_embeddings"}
    model = make("T5Gemma", encoder=sizes, decoder=sizes, vocab_size=128)
    return model, {"input_ids": words(7), "decoder_input_ids": words(4)}


def bart() -> Made:
    return make("Bart", **SEQ2SEQ), {"input_ids": words(7), "decoder_input_ids": words(4)}


def falcon_h1() -> Made:
    model = make(
        "FalconH1",
        **TEXT,
        **MAMBA | {"mamba_d_ssm": 512, "mamba_n_groups": 1, "mamba_rms_norm": True},
    )
    return model, {"input_ids": words(7)}


def bamba() -> Made:
    return make("Bamba", **TEXT, **MAMBA, attn_layer_indices=[1]), {"input_ids": words(7)}


def nemotron_h() -> Made:
    sizes = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    model = make(
        "NemotronH", **sizes, layers_block_type=["mamba", "attention", "mlp"], mamba_num_heads=8, mamba_head_dim=32,
        ssm_state_size=16, n_groups=1, chunk_size=16, use_mamba_kernels=False,
    )  # fmt: skip
    return model, {"input_ids": words(7)}


MODELS: list[tuple[Callable[[], Made], dict[str, int]]] = [
    (llava, {"add_rms_norm_group_quant": 3, "silu_mul_group_quant": 2}),
    (idefics3, {"add_rms_norm_group_quant": 3, "silu_mul_group_quant": 2}),
    (paligemma, {"add_rms_norm_group_quant": 3, "gelu_tanh_mul_group_quant": 2}),
    (qwen2_5_vl, {"add_rms_norm_group_quant": 4, "silu_mul_group_quant": 3}),
    (mllama, {"add_rms_norm_group_quant": 3, "silu_mul_group_quant": 2}),
    (t5gemma, {"add_rms_norm_group_quant": 9, "gelu_tanh_mul_group_quant": 4}),
    (bart, {"group_quant": 11}),  # LayerNorm and GELU by erf
    (falcon_h1, {"add_rms_norm_group_quant": 3, "silu_mul_group_quant": 2}),
    (bamba, {"add_rms_norm_group_quant": 3, "silu_mul_group_quant": 2}),
    (nemotron_h, {"add_rms_norm_group_quant": 2}),
]


def linears_run(model: nn.Module, given: dict[str, Any]) -> int:
    """How many times a call runs a quantized linear."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_: ran.append(""))
        for module in model.modules()
        if isinstance(module, Fp8BlockLinear)
    ]
    with torch.no_grad():
        model(**given)
    for hook in hooks:
        hook.remove()
    return len(ran)


@pytest.mark.filterwarnings(
    "ignore:quantize_ leaves"
)  # a mixer of Mamba reads the weight of out_proj
@pytest.mark.parametrize(("build", "expected"), MODELS, ids=[build.__name__ for build, _ in MODELS])
def test_every_quantized_linear_is_one_product(
    build: Callable[[], Made], expected: dict[str, int]
) -> None:
    torch.manual_seed(0)
    model, given = build()
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "norm" in name:  # constant in a fresh model
            value.data += 0.1 * torch.randn_like(value)
    fusion_passes.quantize_(model, "fp8_block")
    given["use_cache"] = False
    results: list[Result] = fuse_graphs(
        model, **given, only=list(fusion_passes.registry().values())
    )
    found = Counter[str]()
    for result in results:
        found.update(result.report.matches)
        assert_near(result)
        assert not [miss for miss in result.report.near_misses if miss.fusion.endswith("linear")]
    assert expected.items() <= found.items()
    if len(results) == 1:  # a frame of many graphs may be run again, for the next layer
        assert found["block_scaled_linear"] == linears_run(model, given)

"""A PEFT model with all of its adapters becomes a model with slots, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusion_passes.lora import loading
from fusion_passes.lora.layers import compute_dtype, is_linear
from fusion_passes.lora.loading import AdapterError, Site
from fusion_passes.lora.manager import AdapterManager
from fusion_passes.lora.sites import replace

__all__ = ["from_peft"]


def from_peft(
    model: nn.Module,
    *,
    max_loaded: int | None = None,
    max_resident: int | None = None,
    max_rank: int | None = None,
    max_tokens: int = 8192,
) -> AdapterManager:
    """Turn PEFT's mixed-batch inference into an :class:`AdapterManager`: same model, same adapters, same names.

    model: a ``PeftModel`` with LoRA adapters on linears, none of them merged, or a model of transformers that has them
    by ``add_adapter`` or ``load_adapter``. Its base model, the linears unwrapped, is the manager's ``model`` then, and
    the PEFT model is used up. max_loaded, max_resident: as many as there are adapters if None. max_rank: the largest of
    theirs if None. An adapter's current scaling (``set_scale``) is kept.

    What was ``model(input_ids, adapter_names=names)`` is ``manager(input_ids, adapter_names=names)``. Adapters are
    rounded to the dtype of the model, where PEFT keeps them in float32 by default; a delta is rounded once, together
    with what it is added to.

    Raises TypeError for anything but those, AdapterError for an adapter that is no plain LoRA or a layer that is
    no linear, and what AdapterManager raises; the model is as it was then.
    """
    try:
        import peft
    except ImportError as missing:
        raise ImportError("from_peft needs peft: pip install 'fusion-passes[models]'") from missing
    injected = getattr(model, "_hf_peft_config_loaded", False)  # transformers' own way
    if not isinstance(model, peft.PeftModel) and not injected:
        raise TypeError(
            f"model is a {type(model).__name__}; accepted: a peft.PeftModel, or a model of transformers with adapters"
        )
    whole: Any = model
    base: Any = model if injected else whole.get_base_model()
    layers, wrappers = _layers(base)
    configs: Any = whole.peft_config
    names = list(configs)
    sites = {path: Site(layer.in_features, layer.out_features) for path, layer in layers.items()}
    saved_sites = {
        path: {name: value.shape for name, value in wrapper.original_module.named_parameters()}
        for path, wrapper in wrappers.items()
    }
    rank = max_rank or max(layer.r[name] for layer in layers.values() for name in layer.r)
    dtype = compute_dtype(next(iter(layers.values())).get_base_layer())
    adapters = []
    for name in names:
        adapters.append(
            loading.parse(
                name,
                _config(configs[name]),
                _tensors(layers, wrappers, name),
                sites=sites,
                saved_sites=saved_sites,
                max_rank=rank,
                dtype=dtype,
                scalings={
                    p: layer.scaling[name] for p, layer in layers.items() if name in layer.scaling
                },
            )
        )
    if max_loaded is not None and max_loaded < len(names):
        raise ValueError(
            f"max_loaded is {max_loaded}; accepted: {len(names)} or more, as there are adapters"
        )
    wrapped = {**layers, **wrappers}
    try:
        for path, layer in layers.items():
            replace(base, path, layer.get_base_layer())
        for path, wrapper in wrappers.items():
            replace(base, path, wrapper.original_module)
        manager = AdapterManager(
            base,
            max_loaded=max_loaded or max(len(names), max_resident or 1),
            max_resident=max_resident or len(names),
            max_rank=rank,
            max_tokens=max_tokens,
            target_modules=[*layers],
            modules_to_save=[*wrappers],
        )
    except BaseException:
        for path, module in wrapped.items():
            replace(base, path, module)
        raise
    for adapter in adapters:
        manager._insert(adapter)
    return manager


def _layers(base: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """PEFT's LoRA layers and its copies of whole modules, by the name of what they wrap."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    layers: dict[str, Any] = {}
    wrappers: dict[str, Any] = {}
    for path, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner = module.get_base_layer()
            if not isinstance(module, LoraLayer) or not is_linear(inner):
                raise AdapterError(
                    f"{path} is a {type(module).__name__} over a {type(inner).__name__}; accepted: LoRA over linears"
                )
            if module.merged:
                raise AdapterError(f"{path} has merged adapters: call unmerge_adapter() first")
            layers[path] = module
        elif isinstance(module, ModulesToSaveWrapper):
            wrappers[path] = module
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise AdapterError(f"{path} is a {type(module).__name__}; accepted: modules_to_save")
    if not layers:
        raise AdapterError("the model has no LoRA layer")
    return layers, wrappers


def _config(config: Any) -> dict[str, Any]:
    """What a file would say, but for what this model has done already: it has its targets, and is initialised."""
    words = config.to_dict()
    kind = getattr(words.get("peft_type"), "value", words.get("peft_type"))
    return {**words, "peft_type": kind, "target_modules": None, "init_lora_weights": True}


def _tensors(
    layers: dict[str, Any], wrappers: dict[str, Any], name: str
) -> dict[str, torch.Tensor]:
    tensors = {}
    for path, layer in layers.items():
        if name in layer.lora_A:
            tensors[f"{path}.lora_A.weight"] = layer.lora_A[name].weight.detach().cpu()
            tensors[f"{path}.lora_B.weight"] = layer.lora_B[name].weight.detach().cpu()
    for path, wrapper in wrappers.items():
        if name in wrapper.modules_to_save:
            for parameter, value in wrapper.modules_to_save[name].named_parameters():
                tensors[f"{path}.{parameter}"] = value.detach().cpu()
    return tensors

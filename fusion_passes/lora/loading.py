"""Reads a LoRA adapter as PEFT saves it, and checks all of it before anything of it is used."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Adapter", "AdapterError", "Factors", "Site", "parse", "read_folder"]

RANK_STEP = 16
"""Kernels read the rank in steps of it: the rows of A and columns of B up to the next multiple are zeros."""

# Keys of adapter_config.json whose presence changes what an adapter computes into something that is no plain LoRA.
_REFUSED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "adapters of single parameters",
}
# Initialisations that also take something away from the base weights, which many adapters share here.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
# PEFT adds these of a head or an embedding that an adapter is on, without having changed them.
_BASE = re.compile(r"(?P<module>.+)\.base_layer\.(?P<parameter>weight|bias)")


class AdapterError(ValueError):
    """An adapter that cannot be loaded; says of which module, what was found, and what is accepted."""


@dataclass(frozen=True)
class Site:
    """A linear of the model that takes adapters."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class Factors:
    """One module's part of an adapter, on the host: a [rank, in] and b [out, rank], the rank padded with zeros."""

    a: Tensor
    b: Tensor
    rank: int
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter as the manager keeps it on the host. ``saved``: full weights of modules, by module and parameter."""

    name: str
    rank: int
    factors: dict[str, Factors]
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = [t for f in self.factors.values() for t in (f.a, f.b)]
        tensors += [t for parameters in self.saved.values() for t in parameters.values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def read_folder(folder: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a folder that ``PeftModel.save_pretrained`` wrote.

    Raises AdapterError where ``adapter_config.json`` or ``adapter_model.safetensors`` is missing or is not what its
    name says. Pickled adapters (``adapter_model.bin``) are refused, as loading one runs code.
    """
    root = Path(folder)
    config_path, tensors_path = (
        root / "adapter_config.json",
        root / "adapter_model.safetensors",
    )
    for path in (config_path, tensors_path):
        if not path.is_file():
            pickled = (root / "adapter_model.bin").is_file() and path is tensors_path
            why = "; adapter_model.bin is pickled, save it with safe_serialization=True"
            raise AdapterError(f"{root} has no {path.name}{why if pickled else ''}")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as missing:
        raise ImportError(
            "loading an adapter needs safetensors: pip install 'fusion-passes[lora]'"
        ) from missing
    try:
        config = json.loads(config_path.read_text())
    except json.JSONDecodeError as error:
        raise AdapterError(f"{config_path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{config_path} holds a {type(config).__name__}; accepted: an object")
    try:
        return config, load_file(tensors_path)
    except SafetensorError as error:
        raise AdapterError(f"{tensors_path} cannot be read: {error}") from None


def parse(
    name: str,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    sites: Mapping[str, Site],
    saved_sites: Mapping[str, Mapping[str, torch.Size]],
    max_rank: int,
    dtype: torch.dtype,
    modules: Iterable[str] = (),
    scalings: Mapping[str, float] | None = None,
    base: Callable[[str, str], Tensor | None] | None = None,
) -> Adapter:
    """An adapter that fits the model, or AdapterError.

    config, tensors: as in the files of PEFT. sites: the linears that take adapters, by name. saved_sites: the modules
    that an adapter may replace altogether (``modules_to_save``), with the shapes of their parameters. modules: every
    module of the model, for a message that tells an unknown one from one without slots. scalings: by module, where it
    is not what the configuration says. base: the model's own parameter of a module, for files that repeat it. Factors
    are rounded to ``dtype`` once.
    """
    say = _Complaint(name)
    _check_kind(config, say)
    factors: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for key, tensor in tensors.items():
        path = key.removeprefix(_PREFIX)
        if not tensor.is_floating_point():
            raise say(f"{key} is {tensor.dtype}; accepted: floating-point tensors")
        if match := _FACTOR.fullmatch(path):
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        elif base and (match := _BASE.fullmatch(path)) and match["module"] in sites:
            _check_base(path, tensor, base(match["module"], match["parameter"]), say)
        elif any(path.startswith(f"{module}.") for module in saved_sites):
            module = max((m for m in saved_sites if path.startswith(f"{m}.")), key=len)
            saved.setdefault(module, {})[path[len(module) + 1 :]] = tensor
        else:
            strangers.append(path)
    if strangers:
        raise say(_what_are(strangers, config))
    _check_targets(config, set(factors), sites, set(modules), say)
    _check_saved(config, saved, saved_sites, say)
    parsed = {
        module: _factors(module, pair, config, sites[module], max_rank, dtype, say)
        for module, pair in factors.items()
    }
    for module, scaling in (scalings or {}).items():
        parsed[module] = dataclasses.replace(parsed[module], scaling=scaling)
    rank = max((f.rank for f in parsed.values()), default=0)
    copies = {
        module: {parameter: value.clone() for parameter, value in parameters.items()}
        for module, parameters in saved.items()
    }
    return Adapter(name, rank, parsed, copies)


class _Complaint:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, message: str) -> AdapterError:
        return AdapterError(f"adapter {self.name!r}: {message}")


def _check_kind(config: Mapping[str, Any], say: _Complaint) -> None:
    if config.get("peft_type") != "LORA":
        raise say(f"peft_type is {config.get('peft_type')!r}; accepted: 'LORA'")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise say(f"{meaning} is not supported ({key} is {config[key]!r})")
    if config.get("bias", "none") != "none":
        raise say(
            f"it trains biases of the base model: bias is {config['bias']!r}; accepted: 'none'"
        )
    init = str(config.get("init_lora_weights", True))
    if init.startswith(_CHANGES_BASE):
        raise say(
            f"init_lora_weights is {init!r}, which changes the base weights too: save it converted to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )


def _check_targets(
    config: Mapping[str, Any],
    found: set[str],
    sites: Mapping[str, Site],
    modules: set[str],
    say: _Complaint,
) -> None:
    """Every module of the file takes adapters, and every one that the configuration names is in the file."""
    if unknown := sorted(found - sites.keys()):
        known = [m for m in unknown if m in modules]
        why = (
            f"; {_some(known)} of the model take no adapters here (target_modules)" if known else ""
        )
        raise say(
            f"unknown target modules: {_some(unknown)}{why}; accepted: {_some(_suffixes(sites))}"
        )
    targets = config.get("target_modules")
    if isinstance(targets, (list, tuple)):
        for target in targets:
            if not any(_names(target, site) for site in {*sites, *found}):
                raise say(
                    f"unknown target modules: {target!r} is no linear of the model that takes adapters; accepted: "
                    f"{_some(_suffixes(sites))}"
                )
    missing = sorted(site for site in sites if site not in found and _is_target(config, site))
    if missing:
        raise say(f"target_modules names {_some(missing)}, for which the file has no tensors")
    if not found:
        raise say("the file has no lora_A and lora_B")


def _is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT would put an adapter on a linear of this name."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if re.fullmatch(excluded, module):
            return False
    elif any(_names(name, module) for name in excluded):
        return False
    for saved in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){saved}($|\..*)", module):
            return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if not targets or not any(_names(target, module) for target in targets):
        return False
    layers = config.get("layers_to_transform")
    if module in targets or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in ([layers] if isinstance(layers, int) else layers)
    return False


def _names(name: str, module: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _check_base(path: str, tensor: Tensor, own: Tensor | None, say: _Complaint) -> None:
    """All adapters share the base weights: a file may repeat them, and not change them."""
    same = own is not None and own.shape == tensor.shape and own.is_floating_point()
    if own is None or not same or not torch.equal(tensor.to(own.device, own.dtype), own):
        raise say(
            f"it comes with another {path} than the model has, which all adapters share; accepted: the same, or none "
            "(save_embedding_layers=False)"
        )


def _check_saved(
    config: Mapping[str, Any],
    saved: Mapping[str, Mapping[str, Tensor]],
    saved_sites: Mapping[str, Mapping[str, torch.Size]],
    say: _Complaint,
) -> None:
    wanted = config.get("modules_to_save") or ()
    missing = [m for m in saved_sites if m not in saved and any(_names(name, m) for name in wanted)]
    if missing:
        raise say(f"modules_to_save names {_some(missing)}, for which the file has no tensors")
    for module, parameters in saved.items():
        shapes = saved_sites[module]
        if parameters.keys() != shapes.keys():
            raise say(
                f"modules_to_save: {module} comes with {_some(parameters)}; accepted: {_some(shapes)}"
            )
        for parameter, tensor in parameters.items():
            if tensor.shape != shapes[parameter]:
                raise say(
                    f"modules_to_save: {module}.{parameter} has shape {tuple(tensor.shape)}; accepted: "
                    f"{tuple(shapes[parameter])}"
                )


def _factors(
    module: str,
    pair: Mapping[str, Tensor],
    config: Mapping[str, Any],
    site: Site,
    max_rank: int,
    dtype: torch.dtype,
    say: _Complaint,
) -> Factors:
    for factor in "AB":
        if factor not in pair:
            raise say(f"{module} has no lora_{factor}")
        if pair[factor].dim() != 2:
            raise say(
                f"{module}.lora_{factor} has shape {tuple(pair[factor].shape)}; accepted: 2-D"
            )
    rank = pair["A"].shape[0]
    configured = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    if rank > max_rank:
        raise say(f"{module} has rank {rank}; accepted: up to max_rank={max_rank}")
    for factor, shape in (("A", (rank, site.in_features)), ("B", (site.out_features, rank))):
        if tuple(pair[factor].shape) != shape:
            raise say(
                f"{module}.lora_{factor} has shape {tuple(pair[factor].shape)}; accepted: {shape}"
            )
    if rank != configured or rank < 1:
        raise say(f"{module} has rank {rank}, but adapter_config.json says {configured}")
    alpha = _by_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise say(f"lora_alpha of {module} is {alpha!r}; accepted: a number")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    padded = -(-rank // RANK_STEP) * RANK_STEP
    a = torch.zeros(padded, site.in_features, dtype=dtype)
    b = torch.zeros(site.out_features, padded, dtype=dtype)
    a[:rank] = pair["A"].to(dtype)
    b[:, :rank] = pair["B"].to(dtype)
    for factor, given, stored in (("A", pair["A"], a), ("B", pair["B"], b)):
        if not bool(stored.isfinite().all()):
            where = f"as {dtype} " if bool(given.isfinite().all()) else ""
            raise say(f"{module}.lora_{factor} has values that are {where}not finite")
    return Factors(a, b, rank, float(scaling))


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rank_pattern and alpha_pattern: the first key that the end of the name matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _what_are(strangers: list[str], config: Mapping[str, Any]) -> str:
    whole = config.get("modules_to_save") or ()
    replaced = [m for m in whole if any(f".{m}." in f".{path}" for path in strangers)]
    if replaced:
        return (
            f"it replaces {_some(replaced)} altogether (modules_to_save), which this manager has no room for: name "
            "them in AdapterManager(modules_to_save=...)"
        )
    if any("lora_embedding_" in path for path in strangers):
        return f"it adapts an embedding ({_some(strangers)}); accepted: linears"
    if any("lora_magnitude_vector" in path for path in strangers):
        return f"DoRA is not supported ({_some(strangers)})"
    return f"unknown tensors: {_some(strangers)}; accepted: <module>.lora_A.weight, <module>.lora_B.weight"


def _suffixes(names: Iterable[str]) -> list[str]:
    return sorted({name.split(".")[-1] for name in names})


def _some(names: Iterable[str], count: int = 6) -> str:
    listed = list(names)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return (", ".join(listed[:count]) or "none") + more

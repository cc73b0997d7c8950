"""Many adapters over one model: loaded, pinned, swapped and removed while it runs, and compiled once."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import custom_ops
from fusion_passes.lora import loading
from fusion_passes.lora.cache import TwoLevelCache
from fusion_passes.lora.layers import LoRALinear, SavedModule, StepBuffers
from fusion_passes.lora.loading import Adapter
from fusion_passes.lora.sites import chosen, one_of_each, replace
from fusion_passes.lora.transfers import Transfers

__all__ = ["AdapterInfo", "AdapterManager"]

MAX_RANK = 256
BASE = "__base__"
"""PEFT's name for no adapter; None says the same."""


@dataclass(frozen=True)
class AdapterInfo:
    """One adapter as :meth:`AdapterManager.list` shows it. ``slot`` None: on the host only."""

    name: str
    rank: int
    slot: int | None
    pinned: bool
    modules: int
    nbytes: int


class AdapterManager:
    """Puts slots for LoRA adapters into a model, in place, and decides which adapters are in them.

    model: a module whose linears take the adapters; on its device and in its dtype already. Compile it before or after.
    max_loaded: how many adapters the host keeps. max_resident: how many are in device slots, and so how many one step
        may mix. Both levels evict the least recently used adapter that is neither pinned nor in use.
    max_rank: the largest rank that fits, up to 256: it is what a slot's memory is for. max_tokens: the most tokens of a
        step. target_modules: the linears that get slots, by the end of their names; None takes every linear of a
        repeated layer, and not the heads. modules_to_save: linears and embeddings of which an adapter may bring a copy.

    A step says which request uses which adapter, and runs the model::

        manager = AdapterManager(model, max_loaded=64, max_resident=8)
        compiled = torch.compile(model, backend="fusion_passes")
        manager.add("french", "adapters/french")
        with manager.step(["french", None], num_tokens=[5, 7]):  # 5 tokens of one request, 7 of another, side by side
            compiled(input_ids)

    Every method may be called from any thread. What a step uses stays where it is until the step has ended; steps run
    one at a time. Outside of a step the model is the base model. On a GPU nothing waits for the host: adapters are
    copied in a stream of their own, and a CUDA graph of the model, captured inside of a step, serves every later one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_loaded: int,
        max_resident: int,
        max_rank: int = 64,
        max_tokens: int = 8192,
        target_modules: Sequence[str] | None = None,
        modules_to_save: Sequence[str] = (),
    ) -> None:
        self._cache = TwoLevelCache(max_loaded, max_resident)
        if not 1 <= max_rank <= MAX_RANK:
            raise ValueError(f"max_rank is {max_rank}; accepted: 1 to {MAX_RANK}")
        if any(isinstance(module, (LoRALinear, SavedModule)) for module in model.modules()):
            raise ValueError("the model has an AdapterManager already")
        self.model, self.max_rank, self.max_tokens = model, max_rank, max_tokens
        linears, saved = chosen(model, target_modules, modules_to_save)
        self.dtype, self.device = one_of_each(linears)
        self.batch = custom_ops.LoRABatch(max_tokens, max_resident, device=self.device)
        self._modules = frozenset(name for name, _ in model.named_modules())
        self._adapters: dict[str, Adapter] = {}
        self._lock = threading.RLock()
        self._step_lock, self._generate_lock = threading.Lock(), threading.Lock()
        self._stepping: int | None = None  # the thread that is in a step
        self._transfers = Transfers(self.device)
        # one row for each linear, so that a slot is one copy; rows stay aligned as Inductor expects of an input
        aligned = -(-max_resident // 32) * 32
        self._scaling = torch.zeros(len(linears), aligned, device=self.device)
        self._ranks = torch.zeros(len(linears), aligned, dtype=torch.int32, device=self.device)
        step = StepBuffers(self.batch.tensors)
        self._linears: dict[str, LoRALinear] = {}
        for row, (name, linear) in enumerate(linears.items()):
            scaling, ranks = self._scaling[row, :max_resident], self._ranks[row, :max_resident]
            layer = LoRALinear(linear, step, max_resident, max_rank, scaling, ranks)
            self._linears[name] = layer
        self._saved = {n: SavedModule(m, step, max_resident) for n, m in saved.items()}
        for name, module in (*self._linears.items(), *self._saved.items()):
            replace(model, name, module)
        self._forward: Callable[..., Any] = model.forward

    # Adapters

    def add(
        self,
        name: str,
        source: str | PathLike[str] | tuple[Mapping[str, Any], Mapping[str, Tensor]],
    ) -> None:
        """Load an adapter onto the host, evicting another where the host is full.

        source: a folder as PEFT saves it, or its configuration and its tensors. Raises AdapterError, and changes
        nothing, where it does not fit the model; ValueError where an adapter of that name is loaded; AdapterCacheFull
        where all others are pinned or in use.
        """
        if not name or name == BASE:
            raise ValueError(f"an adapter cannot be named {name!r}")
        config, tensors = source if isinstance(source, tuple) else loading.read_folder(source)
        adapter = loading.parse(
            name,
            config,
            tensors,
            sites={n: layer.site for n, layer in self._linears.items()},
            saved_sites={n: module.shapes for n, module in self._saved.items()},
            max_rank=self.max_rank,
            dtype=self.dtype,
            modules=self._modules,
            base=lambda name, parameter: getattr(self._linears[name].base_layer, parameter, None),
        )
        self._insert(adapter)

    def _insert(self, adapter: Adapter) -> None:
        adapter = self._transfers.pinned(adapter)
        with self._lock:
            evicted = self._cache.add(adapter.name)
            if evicted is not None:
                del self._adapters[evicted]
            self._adapters[adapter.name] = adapter

    def activate(self, name: str) -> int:
        """Put an adapter into a device slot, evicting another where all are taken; returns the slot.

        Raises KeyError where it is not loaded, AdapterCacheFull where all slots are pinned or in use.
        """
        with self._lock:
            return self._filled(name, *self._cache.activate(name))

    def pin(self, name: str) -> int:
        """Activate an adapter, and evict it from neither level until it is unpinned; returns its slot."""
        with self._lock:
            return self._filled(name, *self._cache.pin(name))

    def unpin(self, name: str) -> None:
        """Let an adapter be evicted again. Raises KeyError where it is not loaded."""
        with self._lock:
            self._cache.unpin(name)

    def remove(self, name: str) -> None:
        """Forget an adapter, pinned or not. A step that uses it runs to its end with it."""
        with self._lock:
            self._cache.remove(name)
            del self._adapters[name]

    def remove_all(self) -> None:
        """Forget every adapter, pinned or not."""
        with self._lock:
            for name in list(self._adapters):
                self.remove(name)

    def list(self) -> tuple[AdapterInfo, ...]:
        """The loaded adapters, least recently used first."""
        with self._lock:
            return tuple(self._info(name) for name in self._cache.loaded)

    def _info(self, name: str) -> AdapterInfo:
        adapter, cache = self._adapters[name], self._cache
        return AdapterInfo(
            name,
            adapter.rank,
            cache.slots.get(name),
            name in cache.pinned,
            len(adapter.factors) + len(adapter.saved),
            adapter.nbytes,
        )

    # Running

    def acquire(self, name: str) -> int:
        """Activate an adapter and keep it in its slot until :meth:`release`, as for a request that lives many steps.

        Work of the current stream that follows sees the whole adapter.
        """
        with self._lock:
            slot = self.activate(name)
            self._cache.acquire(slot)
            self._transfers.before_use(slot)
            return slot

    def release(self, slot: int) -> None:
        """Undo one :meth:`acquire`. The slot is filled anew only after what the current stream has been given."""
        with self._lock:
            self._transfers.after_use(slot)
            self._cache.release(slot)

    @contextlib.contextmanager
    def step(
        self, adapters: Sequence[str | None], num_tokens: int | Sequence[int] = 1
    ) -> Iterator[None]:
        """Run the model inside of it: request ``i`` has ``num_tokens[i]`` tokens, which use ``adapters[i]``.

        adapters: None or "__base__" is no adapter. The tokens of the model's input, flattened, are those of the first
        request, then those of the second, and so on; what follows them uses no adapter. Raises ValueError for more
        tokens than max_tokens or more adapters than max_resident, and what :meth:`activate` raises.
        """
        names = [None if name == BASE else name for name in adapters]
        counts = [num_tokens] * len(names) if isinstance(num_tokens, int) else [*num_tokens]
        self._check_step(names, counts)
        if self._stepping == threading.get_ident():
            raise RuntimeError("a step is running in this thread already")
        with self._step_lock, contextlib.ExitStack() as leases:
            self._stepping = threading.get_ident()
            leases.callback(setattr, self, "_stepping", None)
            slots: dict[str | None, int] = {None: -1}
            with (
                self._lock
            ):  # those in slots first, or another one could take the slot of one of them
                wanted = [name for name in dict.fromkeys(names) if name is not None]
                for name in sorted(wanted, key=lambda name: name not in self._cache.slots):
                    slots[name] = self.acquire(name)
                    leases.callback(self.release, slots[name])
            leases.enter_context(self._transfers.step())
            per_request = np.array([slots[name] for name in names], dtype=np.int32)
            leases.callback(self.batch.update, ())
            self.batch.update(np.repeat(per_request, counts))
            yield

    def _check_step(self, names: Sequence[str | None], counts: Sequence[int]) -> None:
        if len(counts) != len(names) or any(count < 0 for count in counts):
            raise ValueError(
                f"num_tokens is {counts} for {len(names)} adapters; accepted: one number >= 0 for each, or one for all"
            )
        if sum(counts) > self.max_tokens:
            raise ValueError(
                f"num_tokens sums to {sum(counts)}; accepted: up to max_tokens={self.max_tokens}"
            )
        distinct = {name for name in names if name is not None}
        if len(distinct) > self._cache.max_resident:
            raise ValueError(
                f"adapters has {len(distinct)} different ones; accepted: up to max_resident={self._cache.max_resident}"
            )

    def compile(self, **options: Any) -> None:
        """Compile the model's forward for ``manager(...)`` and ``manager.generate(...)``: torch.compile's options."""
        self._forward = torch.compile(self.model.forward, **{"backend": "fusion_passes", **options})

    def __call__(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """The model's forward for a batch whose row ``i`` uses ``adapter_names[i]``: PEFT's mixed-batch inference.

        The first argument (or ``input_ids``, ``inputs_embeds``) is [rows, tokens, ...]; adapter_names None is the base
        model. Several rows in a row may share a name, as beams do: their number is a multiple of that of the names.
        """
        rows, tokens = _rows(args, kwargs)
        names = [None] if adapter_names is None else [*adapter_names]
        if not names or rows % len(names):
            raise ValueError(
                f"adapter_names has {len(names)} names for {rows} rows; accepted: one for each"
            )
        with self.step(names, tokens * (rows // len(names))):
            return self._forward(*args, **kwargs)

    def generate(
        self, *args: Any, adapter_names: Sequence[str | None] | None = None, **kwargs: Any
    ) -> Any:
        """``model.generate(...)`` of transformers, each of its steps run as ``manager(...)`` does."""
        names = (
            []
            if adapter_names is None
            else [name for name in adapter_names if name not in (None, BASE)]
        )
        model: Any = self.model

        @functools.wraps(self._forward)
        def forward(*inputs: Any, **keywords: Any) -> Any:
            return self(*inputs, adapter_names=adapter_names, **keywords)

        with self._generate_lock, contextlib.ExitStack() as stack:
            for name in dict.fromkeys(names):
                stack.callback(self.release, self.acquire(str(name)))
            own = model.__dict__.get("forward")
            stack.callback(setattr, model, "forward", own) if own else stack.callback(
                delattr, model, "forward"
            )
            model.forward = forward
            return model.generate(*args, **kwargs)

    def _filled(self, name: str, slot: int, new: bool) -> int:
        if new:
            try:
                with torch.no_grad(), self._transfers.filling(slot):
                    self._fill(slot, self._adapters[name])
            except BaseException:
                self._cache.deactivate(name)  # what is in the slot is no adapter
                raise
        return slot

    def _fill(self, slot: int, adapter: Adapter) -> None:
        factors = [adapter.factors.get(site) for site in self._linears]
        ranks = [f.rank if f else 0 for f in factors]
        columns = (
            (self._scaling, torch.tensor([f.scaling if f else 0.0 for f in factors])),
            (self._ranks, torch.tensor(ranks, dtype=torch.int32)),
        )
        for rows, column in columns:
            host = column.pin_memory() if self._transfers.on_gpu else column
            rows[:, slot].copy_(host, non_blocking=True)
        for layer, found in zip(self._linears.values(), factors, strict=True):
            if found is not None:
                layer.fill(slot, found)
        for site, module in self._saved.items():
            module.fill(slot, adapter.saved.get(site))


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() >= 2:
            return int(value.shape[0]), int(value.shape[1])
    raise ValueError(
        "the rows of the batch are not known: pass input_ids or inputs_embeds, [rows, tokens, ...]"
    )

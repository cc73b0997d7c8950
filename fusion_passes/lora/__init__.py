"""Many LoRA adapters in one compiled model.

:class:`AdapterManager` puts slots into a model and adapters into the slots; :func:`from_peft` makes one from a PEFT
model with all of its adapters. Importing this package imports neither peft nor safetensors.
"""

from fusion_passes.lora.cache import AdapterCacheFull
from fusion_passes.lora.conversion import from_peft
from fusion_passes.lora.loading import AdapterError
from fusion_passes.lora.manager import AdapterInfo, AdapterManager

__all__ = ["AdapterCacheFull", "AdapterError", "AdapterInfo", "AdapterManager", "from_peft"]

"""Lets transformers' Auto classes find the narrow models of ``modeling_koff.py`` once koff is
imported, without importing transformers for it.

``AutoConfig.register`` wants a class, and to have the classes takes all of transformers' model
code: seconds, which most commands would wait for in vain. So nothing is registered before
``AutoConfig`` exists, and then it gets stand-ins, which register the classes when the first of
them is asked for. Every Auto class loads a config before it looks for anything else, so that is
in time.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from .arch import ARCHITECTURES, NARROW_PREFIX
from .when_imported import when_imported

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"
_NARROW_MODELS = "koff.model.modeling_koff"


def announce() -> None:
    """Have the narrow models known to AutoConfig and AutoModelForCausalLM from now on, whether
    transformers is imported already, later, or never."""
    when_imported(_AUTO_CONFIG, _put_stand_ins)
    # A process that unpickles a narrow config has the class without having asked AutoConfig for it.
    when_imported(_NARROW_MODELS, lambda _: _register())


def _put_stand_ins(module: ModuleType) -> None:
    for entry in ARCHITECTURES.values():
        stand_in = _StandIn(entry.model_type, f"Koff{entry.config}")
        module.CONFIG_MAPPING.register(
            f"{NARROW_PREFIX}{entry.model_type}", stand_in, exist_ok=True
        )


class _StandIn:
    """Stands for a narrow config class in AutoConfig's list until the class is needed.

    Args:
        model_type: of the architecture: "llama", "qwen2", ...
        name: of the class.
    """

    def __init__(self, model_type: str, name: str):
        self.model_type, self.__name__ = model_type, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._config_class()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle and copy ask for these before there is a model_type
            raise AttributeError(name)
        return getattr(self._config_class(), name)

    def _config_class(self) -> type:
        return _register().narrow_classes(self.model_type)[0]


def _register() -> ModuleType:
    """Import ``narrow``, which registers the classes, in the place of the stand-ins."""
    return importlib.import_module(".narrow", __package__)

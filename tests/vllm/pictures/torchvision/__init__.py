"""Stands for torchvision where vLLM's file of Qwen3.5 is imported, which names it for models that
take pictures. The builds that pip finds do not fit the build of torch for the CPU."""

import sys
from unittest.mock import MagicMock

__version__ = "0.28.0"
for name in ("io", "transforms", "transforms.functional", "transforms.v2"):
    sys.modules[f"{__name__}.{name}"] = MagicMock(__path__=[], __spec__=None)
sys.modules[f"{__name__}.transforms.v2.functional"] = MagicMock(__spec__=None)
transforms = sys.modules[f"{__name__}.transforms"]

"""How a kernel is cut into programs: one shape of configuration for all kernels, and which of a
file's table is taken."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Tile sizes and launch options of a kernel.

    Args:
        block_m: tokens or queries of a tile; None: as many as the call has (decode).
        block_n: outputs, neurons or keys of a tile.
        block_k: of the reduction, in a pipeline stage; None: all of it (attention: a head's width).
        warps: of a program.
        stages: depth of the software pipeline.
        group_m: tile rows that run side by side, so that they share W in the L2 cache (for fused
            GEMMs).
        archs: compute capabilities (80, 90, 100) that it was made for; None: it fits them all.
    """

    block_m: int | None
    block_n: int
    block_k: int | None = None
    warps: int = 4
    stages: int = 2
    group_m: int = 8
    archs: tuple[int, ...] | None = None

    def args(self) -> dict[str, int]:
        """Return the arguments of ``launch`` that this fixes."""
        sides = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        given = {name: side for name, side in sides.items() if side is not None}
        return {**given, "num_warps": self.warps, "num_stages": self.stages}


@functools.lru_cache
def _arch(device: torch.device) -> int | None:
    if torch.version.hip is not None:
        return None  # gfx90a calls itself 9.0, too
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def default_name(configs: dict[str, Config], arch: int | None) -> str:
    """Return the name of the first candidate that was made for this chip (80, 90, ...), else of the
    first that every chip can run, else of the first.

    Larger tiles, which not every chip has the registers for, are restricted to some (``archs``).
    """
    for name, config in configs.items():
        if config.archs is not None and arch in config.archs:
            return name
    return next((name for name, c in configs.items() if c.archs is None), next(iter(configs)))


def choose_config(
    config: Config | None, configs: dict[str, Config], fp32: Config, x: Tensor
) -> Config:
    """Return the configuration of a call.

    Args:
        config: what the caller asks for; None: the default.
        configs: the file's table, made for 16-bit dtypes.
        fp32: what the file has for fp32, whose tiles take twice the room.
        x: tells the dtype and the GPU.
    """
    if config is not None:
        return config
    if x.dtype == torch.float32:
        return fp32
    return configs[default_name(configs, _arch(x.device) if x.device.type == "cuda" else None)]

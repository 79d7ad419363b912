"""lm-eval's model type "koff": importing this file registers it.

import koff.commands.task_model, lm_eval
lm_eval.simple_evaluate("koff", {"directory": "out", "memory": "fr"}, tasks=["arc_easy"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from ..evaluation.harness import KoffLM
from ..storage.save_load import load
from ..storage.saved_folder import open_saved
from .saved import check_saved, pick_device


@register_model("koff")
class SavedKoffLM(KoffLM):
    """A saved model, as ``KoffLM`` measures it.

    Args:
        directory: output folder of `koff train`, or an id of the hub.
        memory: name, or None.
        batch_size: rows per forward.
        device: where to run; None: the first GPU if there is one, else the CPU.
        max_batch_size: lm-eval gives it to all models; not used.
    """

    def __init__(
        self,
        directory: str | Path,
        memory: str | None = None,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: Any = None,
    ):
        folder = check_saved(directory)
        tokenizer = open_saved(folder).load_tokenizer()
        model = load(folder, device=pick_device(device))
        rows = 8 if batch_size is None else int(batch_size)
        super().__init__(model, tokenizer, memory=memory, batch_size=rows)

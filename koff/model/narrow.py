"""Makes the models of ``modeling_koff.py``, whose layers differ in width, known to transformers'
Auto classes.

``modeling_koff.py`` imports transformers alone: ``save_pretrained`` copies it beside such a model
(``register_for_auto_class``), where it is what ``trust_remote_code=True`` runs without koff. So
nothing exists twice. With koff imported the registered classes come first, and no code from a
folder is run.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import arch, modeling_koff

REMOTE_FILE = "modeling_koff.py"  # the copy's name, which transformers takes from the module's


def narrow_classes(model_type: str) -> tuple[type, type]:
    """Return (config class, model class) of an architecture's narrow form.

    Args:
        model_type: "llama", "qwen2", ...
    """
    entry = arch.ARCHITECTURES[model_type]
    return tuple(getattr(modeling_koff, f"Koff{name}") for name in (entry.config, entry.causal_lm))


def register() -> None:
    """Register the narrow classes of every architecture with AutoConfig, AutoModel and
    AutoModelForCausalLM."""
    for model_type in arch.ARCHITECTURES:
        config, model = narrow_classes(model_type)
        base = getattr(modeling_koff, config.__name__.replace("Config", "Model"))
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, base, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)
        config.register_for_auto_class("AutoConfig")
        base.register_for_auto_class("AutoModel")
        model.register_for_auto_class("AutoModelForCausalLM")


register()

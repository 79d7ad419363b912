"""What of vLLM is hooked, and when: the entry point that vLLM calls in each of its processes.

A hook is put in right after vLLM has imported the module it belongs to. So a process pays for
nothing that it does not use, and where there is no koff memory each hook passes its call on.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .requests import backbone_of, check_request, memory_of, with_placeholders
from .saved import NARROW
from .server import check_model, init_static_loras, show_available_models

TESTED = ("0.32",)  # the versions of vLLM that tests/vllm ran with
_HOOKED = "_koff_vllm"


@functools.cache
def register() -> None:
    """Make koff's models and memories known to vLLM; may be called any number of times."""
    from . import configs

    configs.register()
    _when_imported("vllm.model_executor.models.registry", _add_models)
    _when_imported("vllm.model_executor.models.config", _add_settings)
    for module in _HOOKS:
        _when_imported(module, _hook)


def check_hooks(*modules: str) -> None:
    """Refuse a vLLM without what the hooks of this process hold on to.

    Args:
        modules: those of ``_HOOKS`` that this process uses.

    Raises:
        RuntimeError: another version of vLLM, or one that was told to leave this plugin out.
    """
    import vllm

    for path in modules:
        for name in _HOOKS[path]:
            if not hasattr(_method(sys.modules.get(path), name)[1], _HOOKED):
                raise RuntimeError(
                    f"koff_vllm: vLLM must be one of {', '.join(TESTED)} with the plugin koff, got "
                    f"{vllm.__version__} without a hook on {name}; install another version, and "
                    "name koff in VLLM_PLUGINS if that is set"
                )


def _add_models(module: ModuleType) -> None:
    for place in NARROW.values():
        module.ModelRegistry.register_model(_name(place), place)


def _add_settings(module: ModuleType) -> None:
    """Where vLLM has settings for the models of a family, give the narrow ones the same."""
    settings = module.MODELS_CONFIG_MAP
    for name in map(_name, NARROW.values()):
        family = name.removeprefix("Koff")
        if family in settings:
            settings[name] = settings[family]


def _name(place: str) -> str:
    return place.partition(":")[2]


# ---- hooks: each takes the method it stands before ----


def _init_input_processor(init: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
    init(self, *args, **kwargs)
    backbone_of(self.vllm_config.model_config.model)  # as it is while its weights are read


def _process_inputs(process: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    request = process(self, *args, **kwargs)
    try:
        check_request(self.vllm_config, request)
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None  # the client's fault: status 400
    return request


def _preprocess_add_request(
    preprocess: Callable[..., Any], self: Any, request: Any
) -> tuple[Any, int]:
    # Again, for requests that reach the engine by another way.
    check_request(self.vllm_config, request)
    memory = memory_of(request)
    if memory is None or memory.num_tokens == 0:
        return preprocess(self, request)
    made, wave = preprocess(self, with_placeholders(request))
    made.koff_prefix = memory.num_tokens
    return made, wave


def _update_from_output(
    update: Callable[..., Any], self: Any, scheduler_output: Any, model_runner_output: Any
) -> Any:
    rows = model_runner_output.prompt_logprobs_dict
    for name in rows or ():
        # The rows of placeholders are not computed: whatever was in that memory.
        prefix = getattr(self.requests.get(name), "koff_prefix", 0)
        if prefix and rows[name] is not None:
            columns = ("logprob_token_ids", "logprobs", "selected_token_ranks")
            own = {column: getattr(rows[name], column)[prefix:] for column in columns}
            rows[name] = rows[name]._replace(**own)
    return update(self, scheduler_output, model_runner_output)


_HOOKS: dict[str, dict[str, Callable[..., Any]]] = {
    "vllm.v1.engine.input_processor": {
        "InputProcessor.__init__": _init_input_processor,
        "InputProcessor.process_inputs": _process_inputs,
    },
    "vllm.v1.engine.core": {"EngineCore.preprocess_add_request": _preprocess_add_request},
    "vllm.v1.core.sched.scheduler": {"Scheduler.update_from_output": _update_from_output},
    "vllm.entrypoints.serve.engine.serving": {"BaseServing._check_model": check_model},
    "vllm.entrypoints.openai.models.serving": {
        "OpenAIServingModels.init_static_loras": init_static_loras,
        "OpenAIServingModels.show_available_models": show_available_models,
    },
}


def _hook(module: ModuleType) -> None:
    """Put a module's hooks before its methods. One whose method is not there is missed by
    ``check_hooks``, where a koff model is served, and by nobody elsewhere."""
    for name, hook in _HOOKS[module.__name__].items():
        cls, method = _method(module, name)
        if method is not None and not hasattr(method, _HOOKED):
            setattr(cls, method.__name__, _before(hook, method))


def _method(module: ModuleType | None, name: str) -> tuple[type | None, Callable[..., Any] | None]:
    """(class, method) of "Class.method"; None where there is none."""
    owner, _, method = name.partition(".")
    cls = getattr(module, owner, None)
    return cls, None if cls is None else getattr(cls, method, None)


def _before(hook: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def hooked(self: Any, *args: Any, **kwargs: Any) -> Any:
        return hook(original, self, *args, **kwargs)

    setattr(hooked, _HOOKED, True)
    return hooked


def _when_imported(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action`` with a module right after its import, or at once if it has been imported."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """A finder (``sys.meta_path``) that finds one module as the others do, and has an action follow
    its execution."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]):
        self.name, self.action = name, action

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_act(module: ModuleType) -> None:
                execute(module)
                self.action(module)

            spec.loader.exec_module = execute_and_act
        return spec

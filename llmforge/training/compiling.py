"""torch.compile in the steps of a trainer and nowhere else, and what is done where it cannot be had."""

import subprocess
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# Below this, compiling (half a minute and more) takes longer than it saves.
_MICRO_STEPS_WORTH_COMPILING = 1_000


def compiling_pays(device: torch.device, *, micro_steps: int) -> bool:
    """What `TrainConfig.compile` None means: a CUDA device, for which Triton is installed, and a run of some length.

    Args:
        micro_steps: forward passes of the whole run.
    """
    if device.type != "cuda" or micro_steps < _MICRO_STEPS_WORTH_COMPILING or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)  # Triton's own limit


class CompiledModel:
    """A context in which `model(...)` and `model.features(...)` run compiled. Outside of it the model is what it was.

    So the names in a state_dict, copies of the model, and text generated with a KV cache know nothing of it. Within, too, calls with a KV cache
    or with positions of packed documents run as they are: their lengths differ from call to call, and each would be compiled for.

    Code is made for the shapes of the first call, and again for each further one: keep them the same.

    Args:
        modules: the model; or several parts of it, which are compiled each for itself.
        insist: errors of the compiler about this model are raised; False = they end the compiling (see `give_up`). A compiler that is not
            there ends it in any case.
    """

    def __init__(self, *modules: nn.Module, insist: bool) -> None:
        self.insist = insist
        self.is_on = True
        self._inside: list[tuple[nn.Module, dict[str, Any]]] = []
        for module in modules:
            attributes: dict[str, Any] = {"_compiled_call_impl": compiled(_calls(module))}
            if callable(getattr(module, "features", None)):
                attributes["features"] = _compiled_features(module)
            self._inside.append((module, attributes))
        self._outside: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        global _depth
        _depth += 1
        # Past nn.Module's own way of setting attributes, which is slow.
        self._outside = [{k: m.__dict__[k] for k in inside if k in m.__dict__} for m, inside in self._inside]
        for module, inside in self._inside:
            module.__dict__.update(inside)

    def __exit__(self, *exception: object) -> None:
        global _depth
        _depth -= 1
        for (module, inside), outside in zip(self._inside, self._outside, strict=True):
            for name in inside:
                module.__dict__.pop(name, None)
            module.__dict__.update(outside)

    def give_up(self, error: BaseException) -> bool:
        """Whether an error, out of a forward or backward pass, is the compiler's and the pass can be done again without it.

        If so, one line of warning has said why, and `is_on` is False.
        """
        if not self.is_on:
            return False
        reason = _no_compiler(error)
        if reason is None:
            if self.insist or not isinstance(error, _dynamo_errors()):
                return False
            reason = _first_line(getattr(error, "inner_exception", None) or error)
        self.is_on = False
        warnings.warn(f"training without torch.compile: {reason}", stacklevel=3)
        return True


_depth = 0  # of CompiledModels entered


def is_compiling() -> bool:
    """Whether this is called within a `CompiledModel`."""
    return _depth > 0


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled, for each shape of its arguments anew."""
    # A code object of its own: torch keeps what it has compiled by code object, and gives up after eight times.
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    found: Callable[..., Any] = torch.compile(own, dynamic=False)
    return found


def _calls(module: nn.Module) -> Callable[..., Any]:
    # A function of this file: torch leaves frames of its own, such as nn.Sequential's forward, uncompiled when they come first.
    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    return call


def _compiled_features(module: Any) -> Callable[..., Tensor]:
    features: Callable[..., Tensor] = module.features  # bound to the module, as it is outside

    def call(idx: Tensor) -> Tensor:
        return features(idx)

    fast = compiled(call)

    def either(idx: Tensor, kv_cache: Any = None, *, positions: Tensor | None = None) -> Tensor:
        if kv_cache is not None or positions is not None or torch.compiler.is_compiling():
            return features(idx, kv_cache, positions=positions)
        found: Tensor = fast(idx)
        return found

    return either


def _dynamo_errors() -> tuple[type[BaseException], ...]:
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def _no_compiler(error: BaseException) -> str | None:
    """Why code cannot be compiled on this machine, if that is what the error is about."""
    from torch._inductor.exc import CppCompileError, GPUTooOldForTriton, InvalidCxxCompiler, TritonMissing

    for cause in _causes(error):
        if isinstance(cause, InvalidCxxCompiler):
            return "there is no working C++ compiler (install g++, clang or, on Windows, Visual Studio's, or name one in CXX)"
        if isinstance(cause, TritonMissing):
            return "Triton is not installed (pip install triton; on Windows triton-windows)"
        if isinstance(cause, GPUTooOldForTriton):
            return _first_line(cause)
        if isinstance(cause, CppCompileError):
            return f"the C++ compiler fails ({_first_line(cause.output) or 'it says nothing'})"
        # Triton's launchers are C; and torch's own messages, for a compiler that cannot be started, have no class.
        if isinstance(cause, subprocess.CalledProcessError) and isinstance(error, _dynamo_errors()):
            return f"the compiler fails ({_first_line(cause)})"
        if str(cause).startswith(("Failed to find C compiler", "Compiler: ", "Failed to run ")):
            return _first_line(cause)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was made of."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        cause = waiting.pop(0)
        if cause is None or any(cause is other for other in seen):
            continue
        seen.append(cause)
        yield cause
        waiting += [getattr(cause, "inner_exception", None), cause.__cause__, cause.__context__]


def _first_line(error: object) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")

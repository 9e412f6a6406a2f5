"""Where a run computes, and in which numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llmforge.errors import ConfigError


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None = CUDA where there is one, else MPS, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}; use 'cpu', 'cuda', 'cuda:1' or 'mps'") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(device.type, False):
        raise ConfigError(
            f"device {name!r} is not available here: this torch ({torch.__version__}) sees no such device"
        )
    return device


def arithmetic_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type of `TrainConfig.dtype`; None = bfloat16 or else float16 on CUDA, float32 elsewhere.

    Raises:
        ConfigError: "tf32", which is float32 with faster matrix products, on another device than CUDA.
    """
    if name == "tf32":
        if device.type != "cuda":
            raise ConfigError(f"dtype 'tf32' is of NVIDIA's matrix units, and the device is {device}; use 'float32'")
        return torch.float32
    if name is not None:
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextmanager
def arithmetic(*, tf32: bool = False, num_threads: int | None = None) -> Iterator[None]:
    """Within the block, float32 matrices are multiplied in TF32 and operations on the CPU take so many threads; then as before.

    Args:
        tf32: factors are rounded to 11 bits, sums are float32 (Ampere and later).
        num_threads: None = as it is.
    """
    threads = torch.get_num_threads()
    try:
        if num_threads is not None and num_threads != threads:
            torch.set_num_threads(num_threads)
        if not tf32:
            yield
            return
        try:
            precision = torch.get_float32_matmul_precision()
        except RuntimeError:  # set by torch's newer switch, which this one cannot tell
            yield from _tf32_by_the_newer_switch()
            return
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _tf32_by_the_newer_switch() -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block the generators of the CPU and of a CUDA device begin with `seed`; then they go on as before.

    As torch.random.fork_rng and torch.manual_seed, which take 0.2 ms because they ask for every kind of device.
    """
    if device.type not in ("cpu", "cuda"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
        return
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()  # type: ignore[no-untyped-call]  # makes the generators
        number = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[number])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

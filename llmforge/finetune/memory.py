"""How much memory a tuning run needs, found by running its step without a GPU and without weights; and what to change until it fits.

A step runs under FakeTensorMode: every tensor has a shape, a dtype and a storage, and no values. `MemoryTracker` sees each storage
come and go, as the CUDA caching allocator would. So what is counted is the step itself, not a formula about it.

Fake tensors are on the "cpu" here: torch without CUDA ends the process in the backward pass of fake CUDA tensors. What stands for
host memory is told apart by `nn.host.allocates_on_host`.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llmforge.config import Config
from llmforge.errors import ConfigError, OutOfMemoryError
from llmforge.nn.host import HostEmbedding, HostEmbedding8bit, allocates_on_host
from llmforge.nn.int8 import Embedding8bit, Int8Matrix, Linear8bit
from llmforge.nn.linear4bit import Linear4bit
from llmforge.nn.lora import LowRank, SavedModule

GiB = 2**30

LINEAR = "linear layers"
EMBEDDINGS = "embeddings and head"
OTHER_WEIGHTS = "norms and other weights"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
ACTIVATIONS = "activations"
LOSS = "logits and loss"
WORKSPACES = "kernel workspaces"
ITEMS = (LINEAR, EMBEDDINGS, OTHER_WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOSS, WORKSPACES)

# What kernels allocate once, unseen: cuBLAS' workspace, 8.1 MiB before Hopper and 32 MiB from then on, and cublasLt's. It is part of
# torch.cuda.max_memory_allocated(), unlike the CUDA context.
CUDA_WORKSPACE_BYTES = 34 * 2**20

_BLOCK_BYTES = 512  # the CUDA caching allocator hands out multiples of this
_HOST = -1  # index of what is in host memory
_DEVICE_QUERY = torch.ops.prim.device.default  # of half of all calls, and FakeTensorMode takes its time for the answer

Checkpointing = Literal["none", "blocks", "offload"]


# What was measured


@dataclass(frozen=True)
class MemoryEstimate:
    """The moment of a step at which the device holds most.

    items: bytes by name, those of ITEMS that are not 0; they add up to peak_bytes. Activations contain what is computed with for a
        moment: decoded 4-bit matrices, gradients of activations.
    host_bytes: the most that the step holds in host memory at one time (offloaded checkpoints, embedding); of whatever else the process
        has there it knows nothing.
    """

    items: Mapping[str, int]
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated() will say. The CUDA context is not in it, nor what is lost between blocks: see `GPU`."""
        return sum(self.items.values())

    def fits(self, gpu_bytes: int) -> bool:
        """Whether the peak is within so many usable bytes (`GPU.usable_bytes`)."""
        return self.peak_bytes <= gpu_bytes

    def __str__(self) -> str:
        rows = [*self.items.items(), ("peak on the device", self.peak_bytes)]
        if self.host_bytes:
            rows.append(("in host memory", self.host_bytes))
        width = max(len(name) for name, _ in rows)
        lines = [f"{name:<{width}}  {count / GiB:7.2f} GiB" for name, count in rows]
        lines.insert(len(self.items), "-" * (width + 13))
        return "\n".join(lines)


@dataclass(frozen=True)
class MemoryProfile:
    """The peaks of the parts of a step, each by itself.

    A part is one block's forward or backward pass, or what comes between. `extrapolated` needs them: of a part of a model of alike
    blocks, memory is an affine function of their number; of the whole step it is the largest of these, which is not.
    """

    parts: Mapping[
        Hashable, tuple[tuple[int, ...], int]
    ]  # key -> bytes of each of ITEMS at the part's peak, and host bytes

    @property
    def estimate(self) -> MemoryEstimate:
        """The largest of all."""
        counts = max((counts for counts, _ in self.parts.values()), key=sum, default=())
        host = max((host for _, host in self.parts.values()), default=0)
        return MemoryEstimate({name: count for name, count in zip(ITEMS, counts, strict=False) if count}, host)


def extrapolated(profile_of: Callable[[int], MemoryProfile], layers: int) -> MemoryProfile:
    """The profile of a model of many alike blocks, from those of the same model with 3 and 4 of them.

    Exact, not an estimate of one: the parts of the first, second, last and last but one block, and of all that is outside of blocks, are
    affine in the number of blocks; what lies between the second and the last but one is affine in its place, so never above both.

    Args:
        profile_of: number of blocks -> profile.
        layers: number of blocks wanted; up to 5 it is measured as it is.
    """
    if layers <= 5:
        return profile_of(layers)
    small, large = profile_of(3).parts, profile_of(4).parts

    def at(a: int, b: int) -> int:
        return a + (b - a) * (layers - 3)

    parts: dict[Hashable, tuple[tuple[int, ...], int]] = {}
    for key, (counts, host) in small.items():
        if key in large:
            pairs = zip(counts, large[key][0], strict=True)
            parts[key] = tuple(at(*pair) for pair in pairs), at(host, large[key][1])
    return MemoryProfile(parts)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Knows the bytes of all storages that operations made while it is entered, and of those it was told of, until each one dies.

    Under FakeTensorMode (enter that first) and with real tensors it sees the same. What kernels allocate for themselves it cannot see;
    `scratch` may say it.

    Args:
        block_bytes: a storage counts as a multiple of this; 512 is the CUDA caching allocator's.
        scratch: (operation, its arguments) -> bytes that the operation's kernel needs beside its result while it runs.
    """

    def __init__(
        self, *, block_bytes: int = _BLOCK_BYTES, scratch: Callable[[Any, Sequence[Any]], int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block_bytes, self.scratch = block_bytes, scratch
        self.category = ACTIVATIONS  # of what is allocated now
        self._storages: dict[int, tuple[weakref.ref[Any], int, int]] = {}  # address -> bytes, index of the item
        self._live = [0] * len(ITEMS)
        self._total = self._host = 0
        self._parts: dict[Hashable, tuple[tuple[int, ...], int]] = {}
        self._keys: tuple[Hashable, ...] = ("before",)
        self._peak = self._host_peak = 0
        self._at_peak = tuple(self._live)
        self._micro_step = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # if it were, each operation would go through a guard that costs more than all that is done here

    # Storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_QUERY and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        out = _replay(func, args, kwargs or {})
        self._see(out)
        if self.scratch is not None and (extra := self.scratch(func, args)):
            self._reached(extra)
        return out

    def _see(self, out: Any) -> None:
        if isinstance(out, Tensor):
            storage = out.untyped_storage()
            known = self._storages.get(storage._cdata)
            if known is None or known[1] != self._rounded(storage.nbytes()):  # a storage may have been resized
                self._count(storage, None)
        elif isinstance(out, (tuple, list)):
            for part in out:
                self._see(part)

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.block_bytes) * self.block_bytes

    def _count(self, storage: Any, item: int | None) -> None:
        """A storage that is new, of another size, or of another item than before."""
        key, nbytes = storage._cdata, self._rounded(storage.nbytes())
        if key in self._storages:
            ref, before, was = self._storages[key]
            self._add(was, -before)
            item = was if item is None else item
        else:
            ref = weakref.ref(storage, functools.partial(self._forget, key))
            if item is None:
                item = _HOST if allocates_on_host() else ITEMS.index(self.category)
        self._storages[key] = ref, nbytes, item
        self._add(item, nbytes)

    def _forget(self, key: int, _: object = None) -> None:
        _, nbytes, item = self._storages.pop(key)
        self._add(item, -nbytes)

    def _add(self, item: int, nbytes: int) -> None:
        if item == _HOST:
            self._host += nbytes
            self._host_peak = max(self._host_peak, self._host)
            return
        self._live[item] += nbytes
        self._total += nbytes
        if self._total > self._peak:
            self._reached(0)

    def _reached(self, extra: int) -> None:
        if self._total + extra > self._peak:
            self._peak = self._total + extra
            counts = self._live.copy()
            counts[ITEMS.index(self.category)] += extra
            self._at_peak = tuple(counts)

    def assign(self, tensors: Iterable[Tensor | None], item: str | None) -> None:
        """Count the storages of tensors as an item of ITEMS from now on, whether they were seen before or not; None = host memory."""
        for tensor in tensors:
            if tensor is not None:
                self._count(tensor.untyped_storage(), _HOST if item is None else ITEMS.index(item))

    @property
    def live_bytes(self) -> int:
        """What is on the device now."""
        return self._total

    @property
    def live_host_bytes(self) -> int:
        """What is in host memory now."""
        return self._host

    # Parts of a step

    def mark(self, *keys: Hashable) -> None:
        """Here another part of the step begins. A key that was there before goes on: of both the larger one counts."""
        self._close_part()
        self._keys = keys
        self._peak, self._host_peak, self._at_peak = self._total, self._host, tuple(self._live)

    def _close_part(self) -> None:
        for key in self._keys:
            counts, host = self._parts.get(key, ((), 0))
            self._parts[key] = max(counts, self._at_peak, key=sum), max(host, self._host_peak)

    def start(self) -> None:
        """Forget the peaks up to now, not what is live."""
        self.mark("start")
        self._parts.clear()
        self._micro_step = 0

    @property
    def profile(self) -> MemoryProfile:
        """The peaks since `start`."""
        self._close_part()
        return MemoryProfile(dict(self._parts))

    @contextmanager
    def counting(self, item: str) -> Iterator[None]:
        """What is allocated within belongs to this item."""
        before, self.category = self.category, item
        try:
            yield
        finally:
            self.category = before

    # A model and its training

    def watch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, blocks: Sequence[nn.Module] = ()
    ) -> None:
        """Tell what is what: weights by their layers, gradients and the optimizer's state as they come. Hooks stay in the model.

        Args:
            blocks: the model's alike layers, in order, each of which becomes parts of the profile.
        """
        self._assign_weights(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: self.assign([p.grad], GRADIENTS))  # type: ignore[no-untyped-call]
        if optimizer is not None:
            optimizer.register_step_pre_hook(lambda *_: self._enter(OPTIMIZER, "optimizer"))
            optimizer.register_step_post_hook(lambda *_: self._enter(ACTIVATIONS, "after"))
        for number, block in enumerate(blocks):
            self._watch_block(block, number, len(blocks))
        features = getattr(model, "features", None)
        if features is not None:
            model.features = self._watched_features(features)  # type: ignore[assignment]

    def _assign_weights(self, model: nn.Module) -> None:
        head = getattr(model, "lm_head", None)
        for module in model.modules():
            own = [*module._parameters.values(), *module._buffers.values()]
            if isinstance(module, Int8Matrix):
                continue  # see those who have it
            if isinstance(module, (HostEmbedding, HostEmbedding8bit)):
                self.assign(module.buffers(), None)
            elif isinstance(module, (Embedding8bit, Linear8bit)):
                self.assign([*module.parameters(), *module.buffers()], EMBEDDINGS)
            elif isinstance(module, nn.Embedding) or module is head:
                self.assign(own, EMBEDDINGS)
            elif isinstance(module, (nn.Linear, Linear4bit)):
                if not (isinstance(head, nn.Linear) and module is not head and own[0] is head.weight):
                    self.assign(own, LINEAR)
            else:
                self.assign(own, OTHER_WEIGHTS)
        for module in model.modules():
            if isinstance(module, LowRank):
                self.assign(module.parameters(), ADAPTERS)
            elif isinstance(module, SavedModule):
                self.assign(module.base.parameters(), EMBEDDINGS if isinstance(module.base, nn.Embedding) else LINEAR)
                self.assign(module.copies.parameters(), ADAPTERS)
        if isinstance(head, SavedModule):
            self.assign(head.base.parameters(), EMBEDDINGS)

    def _enter(self, item: str, *keys: Hashable) -> None:
        self.category = item
        self.mark(*keys)

    def _watch_block(self, block: nn.Module, number: int, total: int) -> None:
        ends = [*([number] if number < 2 else []), *([number - total] if number >= total - 2 else [])]
        places: Sequence[Hashable] = ends or ["between"]

        def mark(kind: str) -> None:
            self.mark(*((kind, self._micro_step, place) for place in places))

        def before(*_: Any) -> None:
            mark("forward" if self._in_features else "recomputed")

        def after(_module: nn.Module, _args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.requires_grad and self._in_features:
                out.register_hook(lambda _: mark("backward"))  # type: ignore[no-untyped-call]

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)

    _in_features = False

    def _watched_features(self, features: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def watched(*args: Any, **kwargs: Any) -> Tensor:
            self._micro_step += 1
            self._enter(ACTIVATIONS, ("features", self._micro_step))
            self._in_features = True
            try:
                hidden = features(*args, **kwargs)
            finally:
                self._in_features = False
            # What comes now is the loss, and its backward pass until the gradient arrives here.
            self._enter(LOSS, ("loss", self._micro_step))
            if hidden.requires_grad:
                hidden.register_hook(  # type: ignore[no-untyped-call]
                    lambda _: self._enter(ACTIVATIONS, ("backward", self._micro_step))
                )
            return hidden

        return watched


class _Replay:
    """Operations under FakeTensorMode, several times as fast: a step does the same again and again, so what it returns is remembered.

    What is not plain (tensors with values, arguments that are no keys, results of an unknown kind) goes to FakeTensorMode, whose own
    memory is made for the general case.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Recipe | None] = {}

    def __call__(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        tensors: list[FakeTensor] = []
        try:
            names = ((name, _key(kwargs[name], tensors)) for name in kwargs)
            key = (func, *(_key(arg, tensors) for arg in args), *names)
            if not tensors or any(tensor.constant is not None for tensor in tensors):
                return func(*args, **kwargs)
            recipe = self._known[key]
        except TypeError:  # something that has no hash
            return func(*args, **kwargs)
        except KeyError:
            out = func(*args, **kwargs)
            self._known[key] = _recipe(out, args, tensors)
            return out
        return func(*args, **kwargs) if recipe is None else recipe(args, tensors)


_replay = _Replay()  # for all runs
_Recipe = Callable[[Sequence[Any], Sequence[FakeTensor]], Any]  # (arguments, the tensors among them) -> result


def _key(arg: Any, tensors: list[FakeTensor]) -> Hashable:
    """An argument as part of a key; its tensors are added to the list."""
    if isinstance(arg, FakeTensor):
        tensors.append(arg)
        return arg.shape, arg.stride(), arg.storage_offset(), arg.dtype
    if isinstance(arg, Tensor):
        raise TypeError("tensors with values are no keys")
    if isinstance(arg, (list, tuple)):
        return tuple(_key(part, tensors) for part in arg)
    return type(arg), arg  # 1, 1.0 and True are equal


def _recipe(out: Any, args: Sequence[Any], tensors: Sequence[FakeTensor]) -> _Recipe | None:
    """How to make what an operation has returned; None if that is of no known kind."""
    if out is None:
        return lambda args, tensors: None
    if args and out is args[0]:
        return lambda args, tensors: args[0]  # changed in place
    if type(out) in (list, tuple):
        kind = type(out)
        parts = [_tensor_recipe(part, tensors) for part in out]
        return None if None in parts else lambda args, tensors: kind(part(args, tensors) for part in parts if part)
    return _tensor_recipe(out, tensors)


def _tensor_recipe(out: Any, tensors: Sequence[FakeTensor]) -> _Recipe | None:
    if type(out) is not FakeTensor or out.constant is not None or any(out is tensor for tensor in tensors):
        return None
    storage, shape, stride, offset, dtype = (
        out.untyped_storage(),
        out.shape,
        out.stride(),
        out.storage_offset(),
        out.dtype,
    )
    device = out.fake_device
    shown = [number for number, tensor in enumerate(tensors) if tensor.untyped_storage()._cdata == storage._cdata]
    if shown:  # a view
        number = shown[0]

        def view(args: Sequence[Any], tensors: Sequence[FakeTensor]) -> FakeTensor:
            with torch._C._DisableTorchDispatch():
                meta = torch.empty(0, dtype=dtype, device="meta")
                meta.set_(tensors[number].untyped_storage(), offset, shape, stride)  # type: ignore[call-overload]
            return FakeTensor(tensors[0].fake_mode, meta, device)

        return view
    with torch._C._DisableTorchDispatch():
        if (
            torch.empty_strided(shape, stride, dtype=dtype, device="meta").untyped_storage().nbytes()
            != storage.nbytes()
        ):
            return None

    def new(args: Sequence[Any], tensors: Sequence[FakeTensor]) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(tensors[0].fake_mode, meta, device)

    return new


def profile_memory(
    build: Callable[[MemoryTracker], Callable[[], object]],
    *,
    fake: bool = True,
    steps: int = 2,
    scratch: Callable[[Any, Sequence[Any]], int] | None = None,
    workspace_bytes: int = 0,
) -> MemoryProfile:
    """Run steps and look at the last one.

    Args:
        build: makes model, optimizer and data, tells the tracker of them (`MemoryTracker.watch`), and returns what does one step.
        fake: without values; False computes in earnest, on the CPU, and is what a fake run is compared with.
        steps: the peak is that of the last; before the second one the optimizer has no state.
        scratch: see `MemoryTracker`.
        workspace_bytes: what is allocated once by kernels, CUDA_WORKSPACE_BYTES for a GPU.
    """
    tracker = MemoryTracker(scratch=scratch)
    with _without_values() if fake else nullcontext(), tracker:
        workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
        tracker.assign([workspace], WORKSPACES)
        step = build(tracker)
        for _ in range(steps):
            tracker.start()
            step()
        return tracker.profile


def _without_values() -> FakeTensorMode:
    mode = FakeTensorMode()
    mode.__deepcopy__ = lambda _: mode  # type: ignore[attr-defined]  # a copy of a tensor is of the same mode
    return mode


def estimate_memory(
    build: Callable[[MemoryTracker], Callable[[], object]],
    *,
    fake: bool = True,
    steps: int = 2,
    workspace_bytes: int = 0,
) -> MemoryEstimate:
    """The peak of a step of training in its steady state; see `profile_memory`.

    >>> def build(tracker):
    ...     model = nn.Linear(1024, 1024, bias=False)
    ...     optimizer = torch.optim.AdamW(model.parameters())
    ...     tracker.watch(model, optimizer)
    ...     x = torch.zeros(1, 1024)
    ...     def step():
    ...         model(x).sum().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     return step
    >>> estimate = estimate_memory(build)
    >>> estimate.items["optimizer state"] >= 2 * 4 * 1024**2
    True
    """
    return profile_memory(build, fake=fake, steps=steps, workspace_bytes=workspace_bytes).estimate


# Plans, and what can be changed of them


@dataclass(frozen=True, kw_only=True)
class MemoryPlan(Config):
    """The settings of a run that its memory depends on, beside the model, its quantization and its adapter.

    Raises:
        ConfigError: a value out of range.
    """

    micro_batch_size: int = 1  # rows per forward pass
    grad_accum_steps: int = (
        1  # forward passes per step; from the second one on, gradients are there during a forward pass
    )
    seq_len: int = 1024  # tokens per row
    chunked_loss: bool = True  # the output projection sees only tokens with a target, some at a time
    embedding_on_host: bool = False  # the token embedding is looked up in host memory
    activation_checkpointing: Checkpointing = "blocks"
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw8bit"] = "adamw"
    mlp_tiles: int = 1  # slices of the tokens in feed-forward layers

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "grad_accum_steps", "seq_len", "mlp_tiles"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} ({getattr(self, name)}) must be at least 1")


@dataclass(frozen=True)
class Rung:
    """One switch of the ladder.

    name: what it does, as a user reads it. change: the fields of a plan that it sets; costs: what it costs beside memory in the host.
    """

    name: str
    change: Mapping[str, Any]
    costs: str

    def on(self, plan: MemoryPlan) -> MemoryPlan:
        """The plan with this switch on; the same plan where it was on."""
        return dataclasses.replace(plan, **self.change)


# Cheapest first. All but the 8-bit optimizer leave what is computed as it is.
LADDER = (
    Rung("loss in chunks, on answer tokens alone", {"chunked_loss": True}, "nothing"),
    Rung("token embedding in host memory", {"embedding_on_host": True}, "a copy of B*T rows per forward pass"),
    Rung("activation checkpoints", {"activation_checkpointing": "blocks"}, "a third more time"),
    Rung(
        "activation checkpoints in host memory",
        {"activation_checkpointing": "offload"},
        "a third more time, and copies beside the computation",
    ),
    Rung("8-bit AdamW", {"optimizer": "adamw8bit"}, "moments with less precision"),
    Rung("feed-forward in 8 tiles", {"mlp_tiles": 8}, "feed-forward layers computed once more"),
)


def fit(
    plan: MemoryPlan, gpu_bytes: int, estimate: Callable[[MemoryPlan], MemoryEstimate]
) -> tuple[MemoryPlan, list[Rung]]:
    """The least change of a plan with which it fits: nothing, one switch of LADDER, or the shortest beginning of it.

    Of single switches the cheapest that is enough; if none is, the switches from the cheapest on, as many as it takes; if all are not
    enough, smaller micro-batches on top of them, with as many more per step.

    Args:
        gpu_bytes: usable memory, see `GPU`.
        estimate: what a plan needs; a ConfigError says that the model has no such switch, which is then left out.
    Returns:
        the plan, and the switches that were not on before, in order.
    Raises:
        OutOfMemoryError: nothing fits; with the least that the model needs, and the longest rows that would fit.
    """
    known: dict[MemoryPlan, MemoryEstimate | None] = {}

    def fits(candidate: MemoryPlan) -> bool:
        if candidate not in known:
            try:
                known[candidate] = estimate(candidate)
            except ConfigError:
                if candidate == plan:
                    raise
                known[candidate] = None
        found = known[candidate]
        return found is not None and found.fits(gpu_bytes)

    if fits(plan):
        return plan, []
    rungs = []
    for rung in LADDER:
        candidate = _with(rung, plan)
        if candidate == plan:
            continue
        if fits(candidate):
            return candidate, [rung]
        if known[candidate] is not None:
            rungs.append(rung)
    best = plan
    for number, rung in enumerate(rungs, 1):
        best = _with(rung, best)
        if fits(best):
            return best, _last_words(rungs[:number])
    while best.micro_batch_size > 1:
        rung = _smaller_micro_batch(best)
        best, rungs = rung.on(best), [*rungs, rung]
        if fits(best):
            return best, _last_words(rungs)
    needed = known[best]
    assert needed is not None
    shorter = best
    while shorter.seq_len > 64 and not fits(shorter):
        shorter = dataclasses.replace(shorter, seq_len=shorter.seq_len // 2)
    way = f"seq_len={shorter.seq_len} would fit" if fits(shorter) else "take a smaller model, or a smaller adapter"
    raise OutOfMemoryError(
        f"{needed.peak_bytes / GiB:.2f} GiB are the least that this needs, with every switch on that saves memory, and "
        f"{gpu_bytes / GiB:.2f} GiB are usable; {way}"
    )


def _last_words(rungs: Sequence[Rung]) -> list[Rung]:
    """Without those whose fields a later one sets again."""
    return [
        rung
        for number, rung in enumerate(rungs)
        if not any(rung.change.keys() <= r.change.keys() for r in rungs[number + 1 :])
    ]


def _with(rung: Rung, plan: MemoryPlan) -> MemoryPlan:
    """The rung, but never a step back: a plan that offloads is not asked to checkpoint, nor one of 16 tiles to make 8."""
    order = {"none": 0, "blocks": 1, "offload": 2}
    mode = rung.change.get("activation_checkpointing")
    if mode is not None and order[mode] <= order[plan.activation_checkpointing]:
        return plan
    if rung.change.get("mlp_tiles", plan.mlp_tiles + 1) <= plan.mlp_tiles:
        return plan
    if "optimizer" in rung.change and plan.optimizer != "adamw":
        return plan
    return rung.on(plan)


def _smaller_micro_batch(plan: MemoryPlan) -> Rung:
    size = plan.micro_batch_size
    smaller = max(part for part in range(1, size) if size % part == 0)
    accum = plan.grad_accum_steps * size // smaller
    return Rung(
        f"micro-batches of {smaller}, {accum} per step",
        {"micro_batch_size": smaller, "grad_accum_steps": accum},
        "nothing where the GPU is busy with one of them",
    )


@dataclass(frozen=True)
class GPU:
    """The memory of a GPU, and how much of it tensors can have.

    name: as a user reads it. usable_bytes: compare `MemoryEstimate.peak_bytes` with it.
    """

    name: str
    total_bytes: int
    usable_bytes: int

    @classmethod
    def of_size(cls, gpu_gb: float) -> "GPU":
        """A card sold with so many GB (which are GiB: an RTX 3060 of 12 GB has 12,288 MiB).

        Not usable: 0.4 GiB for the CUDA context and a bare desktop, and a thirtieth for what is lost between blocks: 11.2 GiB remain of 12,
        7.3 of 8, 5.4 of 6. Windows with a browser may take another GiB.

        Raises:
            ConfigError: a size that is not above 0.4, or no size at all.
        >>> round(GPU.of_size(12).usable_bytes / GiB, 1)
        11.2
        """
        if not 0.5 <= gpu_gb <= 10_000:
            raise ConfigError(f"--gpu-gb ({gpu_gb:g}) must be the size of a GPU in GB, like 12")
        total = int(gpu_gb * GiB)
        return cls(f"GPU of {gpu_gb:g} GB", total, _usable(total - int(0.4 * GiB), total))

    @classmethod
    def at_hand(cls, device: int = 0) -> "GPU | None":
        """The GPU of this machine, as free as it is now; None where there is none."""
        if not torch.cuda.is_available():
            return None
        free, total = torch.cuda.mem_get_info(device)  # the context exists now, and is no longer free
        return cls(torch.cuda.get_device_name(device), total, _usable(free + torch.cuda.memory_reserved(device), total))


def _usable(free: int, total: int) -> int:
    return free - total // 30

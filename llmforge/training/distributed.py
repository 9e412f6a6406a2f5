"""Several processes that train one model: which of them this is, what they tell each other, and whose gradients are whose.

`torchrun --nproc-per-node N` starts N processes, one per device; each of them runs the same program. A step's batch is divided over
them, and torch's own engines make one gradient of theirs: DistributedDataParallel, where each has the whole model, or `fully_shard`,
where each has a part of every weight, of its gradient and of the optimizer's state, and they send each other a block when its turn comes.

With one process everything here does nothing.
"""

import atexit
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmforge.errors import ConfigError, LLMForgeError, LostRankError
from llmforge.training.devices import pick_device
from llmforge.training.loss import LossFunction

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

Kind = Literal["ddp", "fsdp"]

# In a collective of a step: so long may the others be busy with what only one of them does, such as writing a checkpoint.
_STEP_TIMEOUT = timedelta(minutes=30)
# Where one process works and the others wait for it, such as when a corpus is tokenized. That it has died is noticed at once.
_WAIT_TIMEOUT = timedelta(hours=24)

_T = TypeVar("_T")


class Ranks:
    """The processes of a run; see `join`.

    Args:
        rank: number of this one, from 0.
        world_size: how many there are.
        local_rank: number of this one on its machine, which is also that of its GPU.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        # Of its own, on the CPU: what the processes tell each other waits for no GPU, and may wait long.
        self._control = dist.new_group(backend="gloo", timeout=_WAIT_TIMEOUT) if world_size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that prints, logs and writes."""
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.world_size > 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"

    def device(self, name: str | None) -> torch.device:
        """`pick_device`, but each process has a device of its own.

        Raises:
            ConfigError: there are fewer GPUs than processes, or a device that they cannot share.
        """
        return _device(name, self.local_rank) if self.are_several else pick_device(name)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Put the sum over all ranks in the place of a tensor, on its device, without waiting for that."""
        if self.are_several:
            dist.all_reduce(tensor)
        return tensor

    def smallest(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if not self.are_several:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._control)
        return int(found)

    def first_decides(self, decide: Callable[[], _T]) -> _T:
        """What `decide` returns on rank 0, on all ranks; the others wait for it. What it raises for the user, all raise.

        So the ranks agree even where they do not see the same files.
        """
        if not self.are_several:
            return decide()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = decide()
            except LLMForgeError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._control)
        if outcome[1] is not None:
            raise outcome[1]
        found: _T = outcome[0]
        return found

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """Rank 0 runs the block, then all others do: for what the first leaves on the disk for those that come after."""
        if self.are_several and not self.is_first:
            dist.barrier(group=self._control)
        yield
        if self.are_several and self.is_first:
            dist.barrier(group=self._control)

    @contextmanager
    def explained(self, doing: Callable[[], str]) -> Iterator[None]:
        """Turn what torch says of a connection that broke into one sentence.

        Args:
            doing: what this process was at, and how to go on, asked when it is needed.
        Raises:
            LostRankError
        """
        try:
            yield
        except RuntimeError as error:
            if not self.are_several or isinstance(error, LLMForgeError) or not _is_lost_connection(error):
                raise
            global _is_broken
            _is_broken = True
            raise LostRankError(
                f"{self} lost another process {doing()}. That one ended, or cannot be reached: its own message says why, and where there "
                f"is none it was killed (torch: {_reason(error)})"
            ) from error


_joined: Ranks | None = None
_is_broken = False  # a connection broke: the others cannot be said goodbye to


def join(device: str | None) -> Ranks:
    """The processes that this one belongs to, as torchrun's environment says; one process, where there is no such.

    The connection is made once per process, and closed when that ends. One that is there already (`init_process_group`) is used as it is.

    Args:
        device: TrainConfig.device; GPUs talk to each other by NCCL, CPUs by gloo.
    Raises:
        ConfigError: there are fewer GPUs than processes, or this torch was built without torch.distributed.
    """
    global _joined
    if not dist.is_available():
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(f"this torch ({torch.__version__}) was built without torch.distributed; run one process")
        return Ranks()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not dist.is_initialized():
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            return Ranks()
        on_gpu = _device(device, local_rank).type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_gpu and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=_STEP_TIMEOUT, **_own_store())
        atexit.register(_leave)
        _joined = None
    if dist.get_world_size() == 1:
        return Ranks()
    if _joined is None or _joined.world_size != dist.get_world_size():
        _joined = Ranks(dist.get_rank(), dist.get_world_size(), local_rank)
    return _joined


def _own_store() -> dict[str, Any]:
    """Where the processes find each other after a restart.

    torchrun keeps its store, and in it the addresses of the processes that are gone: who is early would call these, and fail. On several
    machines the number of restarts is not the same everywhere, so there it is left as it is.
    """
    if not is_restart() or os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return {}
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(rendezvous("env://", timeout=_STEP_TIMEOUT))
    prefix = f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return {"store": PrefixStore(prefix, store), "rank": rank, "world_size": world_size}


def _leave() -> None:
    if dist.is_initialized() and not _is_broken:
        dist.destroy_process_group()


def _device(name: str | None, local_rank: int) -> torch.device:
    if name not in (None, "cpu", "cuda"):
        raise ConfigError(
            f"device ({name!r}) is for one process; with several, 'cuda' gives each of them a GPU of its own, and CUDA_VISIBLE_DEVICES "
            "says which"
        )
    if name == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    device = pick_device("cuda")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}; start as many with "
            f"--nproc-per-node {torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached."""
    if isinstance(error, dist.DistError):  # NCCL's, and those of the store by which the processes find each other
        return True
    # gloo has no class of its own; in a backward pass these come through autograd.
    return any(
        words in str(error)
        for words in ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def _reason(error: BaseException) -> str:
    """What torch says, without where in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text.rpartition("] ")[2].partition(". ")[0].rstrip(".")[:200]


class Wishes:
    """What some rank wishes (to stop, or to save), known to all ranks after the same step, whatever their clocks and signals say.

    They travel in the message with a step's loss. On a GPU they are read a step late, when the device has long got there.

    Args:
        device: of the message.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "max_seconds", "save")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mine: set[str] = set()  # not sent yet
        self._under_way: set[str] = set()  # not back yet
        self.steps_late = 0 if device.type == "cpu" else 1
        self._incoming: deque[tuple[Tensor, Any]] = deque()
        self._agreed: frozenset[str] = frozenset()

    def wish(self, name: str) -> None:
        """To be sent with the next step."""
        if name not in self._under_way:
            self._mine.add(name)
            self._under_way.add(name)

    def sent(self) -> Tensor:
        """(number of NAMES,) float64: what is added up over the ranks."""
        message = torch.zeros(len(self.NAMES), dtype=torch.float64, device=self.device)
        for number, name in enumerate(self.NAMES):
            if name in self._mine:
                message[number] = 1.0  # a kernel that fills; a copy from the host would wait for the device
        self._mine.clear()
        return message

    def receive(self, message: Tensor) -> None:
        """Take the sum of a step."""
        host = torch.empty(message.shape, dtype=message.dtype, pin_memory=self.device.type == "cuda")
        host.copy_(message, non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._incoming.append((host, event))
        self._agreed = frozenset()
        if len(self._incoming) > self.steps_late:
            host, event = self._incoming.popleft()
            if event is not None:
                event.synchronize()
            self._agreed = frozenset(name for name, count in zip(self.NAMES, host.tolist(), strict=True) if count)
            self._under_way -= self._agreed

    def agreed(self) -> frozenset[str]:
        """What all ranks know since the last step."""
        return self._agreed


class _Loss(nn.Module):
    """A loss function as a module: what it calls of the model, only its outermost call need pass through torch's engines."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss_fn: LossFunction | None = None

    def forward(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        assert self.loss_fn is not None
        return self.loss_fn(self.model, batch)


class Replicas:
    """A model, the same one on all ranks, and the gradients of all of them.

    Gradients are averaged over the ranks, by `DistributedDataParallel` in the last backward pass of a step, by `fully_shard` in each: to
    keep the sum until the last one would take the memory of the whole gradient on every rank, which is what one shards for.

    Args:
        model: goes to the device; with "fsdp" its parameters become DTensors, under the names that they had.
        ranks: the processes.
        device: of this one.
        kind: "ddp", or "fsdp".
        blocks_dtype: "fsdp": in which blocks are sent and computed with; None = the parameters' own.
    Raises:
        ConfigError: a model that cannot be sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        *,
        kind: Kind = "ddp",
        blocks_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.ranks = model, ranks
        self.is_sharded = ranks.are_several and kind == "fsdp"
        self._loss = _Loss(model)
        self._engine: Any = None
        self._sharded: list[Any] = []
        if self.is_sharded:
            self._shard(device, blocks_dtype)
            return
        model.to(device)
        if ranks.are_several:
            # Gradients live where they are sent from: no second copy of them.
            self._engine = nn.parallel.DistributedDataParallel(self._loss, gradient_as_bucket_view=True)
            self._engine.broadcast_buffers = (
                False  # at the beginning was enough (as an argument it has another name in new versions)
            )

    def _shard(self, device: torch.device, blocks_dtype: torch.dtype | None) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if scalars := [name for name, p in self.model.named_parameters() if p.ndim == 0]:
            raise ConfigError(
                f"{scalars[0]} has no dimension that could be sharded; give it the shape (1,), or use distributed='ddp'"
            )
        mesh = init_device_mesh(device.type, (self.ranks.world_size,))
        # Blocks alone: what is computed with is then what waits for the backward pass, and can go in between. Inputs stay as autocast
        # has them, and sums are made in float32.
        precision = MixedPrecisionPolicy(
            param_dtype=blocks_dtype, reduce_dtype=torch.float32 if blocks_dtype else None, cast_forward_inputs=False
        )
        # One block after the other goes to the device: the whole model need never be there.
        for block in blocks(self.model):
            _place_([*block.parameters(), *block.buffers()], device)
            self._sharded.append(fully_shard(block, mesh=mesh, mp_policy=precision))
        _place_([t for t in [*self.model.parameters(), *self.model.buffers()] if not is_divided(t)], device)
        self._sharded.append(fully_shard(self._loss, mesh=mesh))

    def loss(self, loss_fn: LossFunction, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """`loss_fn(model, batch)`; gradients of it are those of all ranks."""
        if not self.ranks.are_several:
            return loss_fn(self.model, batch)
        self._loss.loss_fn = loss_fn
        # Without gradients there is nothing that DistributedDataParallel would have to do.
        module = self._engine if self._engine is not None and torch.is_grad_enabled() else self._loss
        try:
            found: tuple[Tensor, Tensor] = module(*batch)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise ConfigError(
                "some parameters had no gradient in the last backward pass, for which distributed='ddp' waits; freeze them with "
                "requires_grad_(False), or use distributed='fsdp'"
            ) from error
        return found

    def micro_step(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: gradients are exchanged in the last of a step."""
        if self._engine is None or is_last:
            return nullcontext()
        context: AbstractContextManager[None] = self._engine.no_sync()
        return context

    def to_compile(self) -> list[nn.Module]:
        """The modules to compile: the model, or its blocks, between which weights come and go."""
        return list(self._sharded[:-1]) if self.is_sharded else [self.model]

    @contextmanager
    def generating(self) -> Iterator[None]:
        """The model may be called by itself, block after block, by all ranks in the same way."""
        if not self.is_sharded:
            yield
            return
        outermost = self._sharded[-1]
        outermost.unshard()
        try:
            yield
        finally:
            self.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are whole on every rank, for who looks at them; in the memory of the whole model."""
        for module in self._sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        try:
            yield
        finally:
            for module in self._sharded[:-1]:
                module.set_reshard_after_forward(True, recurse=False)
            self.reshard()

    def reshard(self) -> None:
        """Each rank keeps its part only: after a forward pass without a backward pass, which would do that."""
        for module in self._sharded:
            module.reshard()


@torch.no_grad()
def _place_(tensors: Sequence[Tensor], device: torch.device) -> None:
    """Move tensors to the device, with the values of rank 0: one model, even where each process began with another seed."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device).contiguous()
        dist.broadcast(tensor.data, src=0)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: what its outermost nn.ModuleLists hold; [] where it has none."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks(child)
    return found


# Weights and optimizer state of which each rank has a part


def is_divided(tensor: Any) -> "TypeGuard[DTensor]":
    """Whether each rank has a part of a tensor."""
    # Where nothing is divided, DTensor's module, half a second, is not imported.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, in place; all of it, where it is not divided."""
    return tensor.to_local().detach() if is_divided(tensor) else tensor


@torch.no_grad()
def copy_whole_(target: Tensor, source: Tensor) -> Tensor:
    """`target.copy_(source)`, of which each rank takes its part."""
    if not is_divided(target):
        return target.copy_(source)
    parts = source.chunk(dist.get_world_size())  # as `fully_shard` divides
    rank = dist.get_rank()
    own_part(target).copy_(parts[rank] if rank < len(parts) else source[:0])
    return target


def gathering(*, keep: bool) -> Callable[[Tensor], Tensor]:
    """What puts a divided tensor together in the host's memory. All ranks must give it the same ones; one is on the device at a time.

    Args:
        keep: False = take part, for others.
    Returns:
        a function of a tensor, whole or divided; without `keep` its result is empty.
    """

    @torch.no_grad()
    def gathered(tensor: Tensor) -> Tensor:
        whole = tensor.full_tensor() if is_divided(tensor) else tensor
        return whole.to("cpu", copy=True) if keep else torch.empty(0)

    return gathered


@torch.no_grad()
def scattered(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state as this optimizer, whose parameters may be sharded, can load it."""
    params = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))

    def part(param: Tensor, value: Any) -> Any:
        if not (is_divided(param) and isinstance(value, Tensor) and value.ndim > 0):
            return value
        return copy_whole_(torch.zeros_like(param, dtype=value.dtype), value)

    states = {
        index: {name: part(params[index], value) for name, value in values.items()} if index in params else values
        for index, values in state["state"].items()
    }
    return {**state, "state": states}


def rebind_(optimizer: torch.optim.Optimizer, before: dict[int, str], model: nn.Module) -> None:
    """Let an optimizer that was made for a model work on the parameters that sharding has put in their place.

    Args:
        before: id of each parameter, before -> its name.
    Raises:
        ConfigError: it has worked already, or has parameters of something else.
    """
    now = dict(model.named_parameters())
    if optimizer.state or any(id(p) not in before for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "with distributed='fsdp' an optimizer must be new, and of parameters of the model only; pass it before its first step"
        )
    for group in optimizer.param_groups:
        group["params"] = [now[before[id(p)]] for p in group["params"]]


def is_restart() -> bool:
    """Whether torchrun started this process again, after one had died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def how_to_go_on(newest: str | None) -> str:
    """The end of a message about a lost process.

    Args:
        newest: the last checkpoint, if there is one.
    """
    place = f"{newest} is the last checkpoint" if newest else "there is no checkpoint yet"
    if _restarts_left():
        return f"; {place}, from which torchrun starts all processes again"
    way = "from which --resume goes on" if newest else "so begin again"
    return f"; {place}, {way} (torchrun --max-restarts 3 does so by itself)"


def _restarts_left() -> bool:
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) < most

"""What each process of test_distributed.py runs: toy trainers, one after the other, and what came of them.

distributed_worker.py FOLDER NAME [NAME ...] writes FOLDER/NAME.pt, from rank 0.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from toy import toy_data, toy_model, toy_tokenizer

from llmforge import BitNet, BitNetConfig, BPETokenizer, Llama, LlamaConfig, TrainConfig, Trainer, export_hf
from llmforge.errors import ConfigError, LLMForgeError
from llmforge.training import IGNORED, chunked_next_token_loss, next_token_loss
from llmforge.training.checkpoint import unique_tensors
from llmforge.training.distributed import Replicas, gathering, join, own_part

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
RANK, WORLD_SIZE = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Masked:
    """Toy data of which the later rows, those of the later ranks, have few targets: the mean of the ranks' means would be another."""

    vocab_size = toy_tokenizer().vocab_size

    def __init__(self):
        self.data = toy_data()[0]

    def batch(self, step, *, batch_size, **arguments):
        idx, targets = self.data.batch(step, batch_size=batch_size, **arguments)
        draws = torch.rand(targets.shape, generator=torch.Generator().manual_seed(step))
        return idx, targets.masked_fill(draws < torch.linspace(0, 0.9, batch_size)[:, None], IGNORED)


def llama(family=Llama, config=LlamaConfig, **changes):
    torch.manual_seed(0)
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    shape |= dict(num_key_value_heads=1, max_position_embeddings=16, vocab_size=toy_tokenizer().vocab_size)
    return family(config(**{**shape, **changes}))


MODELS = {
    "gpt": lambda: toy_model(dropout=0.0),
    "dropout": lambda: toy_model(dropout=0.3),
    "llama": llama,
    "bitnet": lambda: llama(BitNet, BitNetConfig, hidden_size=256, intermediate_size=256),
}


def trainer(
    model="gpt",
    *,
    rows=8,
    world_size=WORLD_SIZE,
    out_dir=None,
    optimizer=None,
    optimizer_name=None,
    loss_fn=None,
    **settings,
):
    """A trainer of `rows` sequences per step, whatever the number of processes."""
    accum = settings.get("grad_accum_steps", 1)
    defaults = dict(
        max_steps=10, lr=1e-3, warmup_steps=0, schedule="constant", device="cpu", eval_batches=3, log_every_steps=1
    )
    defaults |= dict(micro_batch_size=rows // accum // world_size, sample_every_steps=None, diagnose_every_steps=None)
    defaults |= dict(eval_every_steps=5, save_every_steps=4, sample_tokens=8, keep_last=20)
    if optimizer_name is not None:
        settings["optimizer"] = optimizer_name
    config = TrainConfig(**{**defaults, **settings}, out_dir=str(out_dir) if out_dir is not None else None)
    tokenizer = toy_tokenizer() if out_dir is not None else None
    model = MODELS[model]() if isinstance(model, str) else model
    return Trainer(
        model,
        Masked(),
        config=config,
        val_data=toy_data()[1],
        tokenizer=tokenizer,
        loss_fn=loss_fn,
        optimizer=optimizer(model) if optimizer is not None else None,
    )


def whole(model):
    """Weights as they are now, whole."""
    return {name: gathering(keep=True)(tensor) for name, tensor in unique_tensors(model).items()}


# The same run as of one process

PARITY = {
    f"{model}-{kind}-{name}": dict(model=model, distributed=kind, **settings)
    for kind in ("ddp", "fsdp")
    for model, name, settings in (
        ("gpt", "plain", dict()),
        ("gpt", "accumulation", dict(grad_accum_steps=2)),
        ("gpt", "checkpointing", dict(grad_accum_steps=2, activation_checkpointing="blocks", grad_clip=0.1)),
        ("llama", "chunked", dict(loss_fn=chunked_next_token_loss)),
        ("bitnet", "accumulation", dict(grad_accum_steps=2)),
        ("llama", "float16", dict(dtype="float16")),
    )
}


def parity(name):
    """Losses, norms, and the weights at the end."""
    own = trainer(**PARITY[name])
    steps = [(m.loss, m.grad_norm, m.num_tokens) for m in own]
    return dict(steps=steps, weights=whole(own.model), scale=own.scaler.get_scale())


def compiled():
    """As parity, through Dynamo. Its back end "eager" compiles nothing: it is the graphs, and where they break, that are tested."""
    plain = torch.compile
    torch.compile = lambda function, **options: plain(function, **options, backend="eager")
    try:
        found = {}
        for kind in ("ddp", "fsdp"):
            own = trainer("llama", distributed=kind, compile=True, max_steps=3, grad_accum_steps=2)
            found[kind] = dict(losses=[m.loss for m in own], names=list(own.model.state_dict()))
        return found
    finally:
        torch.compile = plain


def own_optimizer():
    """SGD, made by the user before the weights are divided."""
    make = lambda model: torch.optim.SGD(model.parameters(), lr=0.1)  # noqa: E731
    model = MODELS["gpt"]()
    own = trainer(model, distributed="fsdp", optimizer=lambda _: make(model), max_steps=3, lr=0.1)
    losses = [m.loss for m in own]
    used = MODELS["gpt"]()
    optimizer = make(used)
    used(torch.zeros(1, 16, dtype=torch.int64)).sum().backward()
    optimizer.step()
    optimizer.state[next(used.parameters())] = {"momentum_buffer": torch.zeros(1)}
    return losses, refusal(lambda: trainer(used, distributed="fsdp", optimizer=lambda _: optimizer))


def refusal(make):
    try:
        make()
    except ConfigError as error:
        return str(error)
    return None


def refusals():
    """Settings that cannot be."""
    return [
        refusal(lambda settings=settings: trainer(**settings))
        for settings in (
            dict(distributed="fsdp", model=nn.ParameterDict({"scale": torch.tensor(1.0)}), seq_len=4),
            dict(device="cuda:1"),
            dict(tokens_per_step=3 * 16, micro_batch_size=1),
            dict(distributed="fsdp", micro_batch_size="auto", tokens_per_step=128),
            dict(distributed="fsdp", **{"optimizer_name": "adamw8bit"}),
        )
    ]


def aside():
    """Evaluation, samples and diagnosis of divided weights, in the middle of a run."""
    found = {}
    for kind in ("ddp", "fsdp"):
        own = trainer("gpt", distributed=kind, out_dir=None, eval_batches=3)
        own.tokenizer = toy_tokenizer()
        next(own)
        evaluation, sample = own.evaluate(), own.sample()
        weights = whole(own.model)
        found[kind] = dict(
            loss=evaluation.loss,
            num_targets=evaluation.num_targets,
            sample=sample,
            weights=weights,
            next=next(own).loss,
        )
    ternary = trainer("bitnet", distributed="fsdp", diagnose_every_steps=2, max_steps=3, eval_every_steps=None)
    found["ternary"] = ternary.train(progress=False).train_loss
    return found


TUTOR = Path(__file__).parents[1] / "examples" / "tutor.jsonl"


def export_base(folder):
    """A model for `finetuned`."""
    tokenizer = BPETokenizer.from_texts([TUTOR.read_text(encoding="utf-8")], vocab_size=300)
    export_hf(llama(vocab_size=tokenizer.vocab_size, max_position_embeddings=1024), tokenizer, folder)


def finetuned():
    """`llmforge finetune` with an adapter, as many rows per step as of one process."""
    from llmforge.cli.main import main

    out = FOLDER / f"tuned-by-{WORLD_SIZE}"
    arguments = ["--out", out, "--steps", 3, "--seq-len", 1024, "--set", "device=cpu", "--set", "logging_steps=1"]
    assert (
        main(
            [
                "finetune",
                *map(str, [FOLDER / "base", TUTOR, *arguments, "--set", f"micro_batch_size={4 // WORLD_SIZE}"]),
            ]
        )
        == 0
    )


def unused():
    """A parameter that nothing learns from, which one process would leave as it is."""
    found = {}
    for kind in ("ddp", "fsdp"):
        model = MODELS["gpt"]()
        model.idle = nn.Linear(4, 4)
        own = trainer(model, distributed=kind, max_steps=3)
        try:
            found[kind] = [m.loss for m in own]
        except ConfigError as error:
            found[kind] = str(error)
    return found


def half_blocks():
    """Blocks that are sent and computed in bfloat16, as on a GPU."""
    ranks, model = join("cpu"), llama()
    replicas = Replicas(model, ranks, torch.device("cpu"), kind="fsdp", blocks_dtype=torch.bfloat16)
    batch = [part[RANK * 4 :][:4] for part in toy_data()[0].batch(0, batch_size=8, seq_len=16, seed=0)]
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t),
    ):
        loss, count = replicas.loss(next_token_loss, batch)
    (loss / count).backward()
    total = ranks.sum_(loss.detach() / count) / WORLD_SIZE
    grads = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return total.item(), grads


def agreement():
    """What rank 0 decides, all do; what it raises, all raise."""
    ranks = join("cpu")
    found = [ranks.first_decides(lambda: f"rank {RANK}"), ranks.smallest(5 + RANK)]

    def fail():
        raise ConfigError("no")

    try:
        ranks.first_decides(fail)
    except ConfigError as error:
        found.append(str(error))
    everyone = [None] * WORLD_SIZE
    dist.all_gather_object(everyone, found)
    return everyone


# Checkpoints

CHECKPOINTED = dict(ddp=dict(model="dropout", grad_accum_steps=2), fsdp=dict(model="dropout", grad_accum_steps=2))
CHECKPOINTED["fsdp-float16"] = dict(model="llama", dtype="float16")


def checkpoints():
    """Runs that save in step 4 and at the end; and the same, gone on with from step 4 in a process that knows nothing of the first part."""
    found = {}
    for name, settings in CHECKPOINTED.items():
        settings = dict(
            settings, distributed=name[:4].rstrip("-"), max_steps=8, save_every_seconds=1e-9 if name == "fsdp" else None
        )
        run = trainer(out_dir=FOLDER / name, **settings)
        result = run.train(progress=False)
        torch.manual_seed(RANK)
        model = MODELS[settings.pop("model")]()
        for parameter in model.parameters():
            nn.init.normal_(parameter)  # each rank its own
        resumed = trainer(model, out_dir=FOLDER / name, **settings)
        resumed.resume(FOLDER / name / "step-000004")
        losses = [m.loss for m in resumed]
        pairs = [(whole(t.model), own_state(t)) for t in (run, resumed)]
        found[name] = dict(
            losses=losses,
            weights=pairs[0][0],
            bitwise=all(everywhere(equal(*pairs))),
            paths=everywhere(result.checkpoint),
        )
    return found


def own_state(own):
    """What this rank has of the optimizer's state."""
    return [{key: own_part(value) for key, value in state.items()} for state in own.optimizer.state.values()]


def equal(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    return len(left) == len(right) and all(map(equal, left, right))


def to_go_on():
    """Checkpoints of these processes, for others."""
    for kind in ("ddp", "fsdp"):
        own = trainer(distributed=kind, max_steps=4, out_dir=FOLDER / "old" / f"of-{WORLD_SIZE}-{kind}")
        own.train(progress=False)


def gone_on_with():
    """The checkpoints of others, gone on with by these processes, the other way of the two."""
    found = {}
    for folder in sorted((FOLDER / "old").iterdir()):
        own = trainer(distributed="ddp" if "fsdp" in folder.name else "fsdp", max_steps=8)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="resuming with changed settings.*micro_batch_size")
            own.resume(folder)
        found[folder.name] = own.step, [m.loss for m in own], whole(own.model)
    return found


def stopping():
    """Rank 1 alone gets SIGTERM; then rank 0 alone is out of time."""
    own = trainer(out_dir=FOLDER / "stopped", max_steps=50, eval_every_steps=None, save_every_steps=None)
    batch = own.train_data.batch

    def interrupted(step, **arguments):
        if step == 3 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step, **arguments)

    own.train_data.batch = interrupted
    by_signal = own.train(progress=False)
    timed = trainer(max_steps=100_000, max_seconds=0.5 if RANK == 0 else 1e6, eval_every_steps=None)
    by_time = timed.train(progress=False)
    return everywhere([(result.stopped_by, result.step, result.checkpoint) for result in (by_signal, by_time)])


def lost():
    """The last rank has no memory for a step, says so and ends; what do the others say?"""
    own = trainer(out_dir=FOLDER / "lost", max_steps=50, eval_every_steps=None, save_every_steps=None)

    def loss_fn(model, batch):
        if own.step == 3 and RANK == WORLD_SIZE - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")
        return next_token_loss(model, batch)

    own.loss_fn = loss_fn
    try:
        own.train(progress=False)
    except LLMForgeError as error:
        (FOLDER / f"lost-{RANK}.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)


def killed():
    """`llmforge train`, in which rank 1 is killed once, in the middle of step 8."""
    command_line(FOLDER / "killed", kill=True)


def undisturbed():
    command_line(FOLDER / "undisturbed")


def command_line(out, *, kill=False):
    from llmforge.cli.main import main

    step = Trainer.__next__

    def killing(self):
        if kill and self.step == 7 and RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            self.loss_fn = lambda model, batch: os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Trainer.__next__ = killing
    text = FOLDER / "text.txt"
    settings = (
        "n_layer=1 n_embd=32 block_size=16 dropout=0.1 device=cpu micro_batch_size=4 save_every_steps=3 eval_batches=2"
    )
    sets = [part for setting in settings.split() for part in ("--set", setting)]
    code = main(["train", str(text), "--preset", "char-gpt-cpu", "--steps", "12", "--out", str(out), *sets])
    Trainer.__next__ = step
    if code:
        sys.exit(code)


def everywhere(value):
    """The values of all ranks."""
    found = [None] * WORLD_SIZE
    dist.all_gather_object(found, value)
    return found


def main():
    names = sys.argv[2:]
    torch.set_num_threads(1)
    for name in names:
        found = parity(name) if name in PARITY else globals()[name]()
        if RANK == 0:
            torch.save(found, FOLDER / f"{name}.pt")


if __name__ == "__main__":
    main()

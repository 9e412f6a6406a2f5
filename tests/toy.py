"""The toy model, data and trainer that several test files share."""

import numpy as np
import torch

from llmforge import GPT, CharTokenizer, GPTConfig, TokenDataset, TrainConfig, Trainer

TEXT = "En un lugar de la Mancha, de cuyo nombre no quiero acordarme, no ha mucho tiempo que vivía un hidalgo.\n" * 20


def toy_tokenizer() -> CharTokenizer:
    return CharTokenizer.from_text(TEXT)


def toy_data() -> tuple[TokenDataset, TokenDataset]:
    tokenizer = toy_tokenizer()
    ids = np.array(tokenizer.encode(TEXT), dtype=np.uint16)
    return TokenDataset(ids, vocab_size=tokenizer.vocab_size).split(val_fraction=0.2)


def toy_model(**changes) -> GPT:
    torch.manual_seed(0)
    shape = dict(vocab_size=toy_tokenizer().vocab_size, block_size=16, n_layer=2, n_head=2, n_embd=16, dropout=0.1)
    return GPT(GPTConfig(**{**shape, **changes}))


def toy_trainer(out_dir=None, *, model=None, **settings) -> Trainer:
    train_data, val_data = toy_data()
    defaults = dict(
        max_steps=10, micro_batch_size=4, warmup_steps=2, lr=1e-2, sample_every_steps=None, eval_every_steps=5
    )
    defaults |= dict(eval_batches=2, save_every_steps=4, device="cpu", sample_tokens=20)
    config = TrainConfig(**{**defaults, "out_dir": str(out_dir) if out_dir is not None else None, **settings})
    tokenizer = toy_tokenizer() if out_dir is not None else None
    return Trainer(model or toy_model(), train_data, val_data=val_data, tokenizer=tokenizer, config=config)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

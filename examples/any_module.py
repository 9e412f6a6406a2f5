"""The trainer with a module that is no language model, a loss and data of its own: a network learns to denoise curves.

python examples/any_module.py
"""

import torch
from torch import nn

import llmforge as lf


class NoisyWaves:
    """Sines of any frequency and phase, with noise and without."""

    def batch(self, step, *, batch_size, seed, **_):
        random = torch.Generator().manual_seed(
            seed * 1_000_003 + step
        )  # the same step gives the same batch: a run can be resumed
        frequency, phase = torch.rand(2, batch_size, 1, generator=random)
        clean = torch.sin(6.28 * (torch.linspace(0, 1, 64) * (1 + 4 * frequency) + phase))
        return clean + 0.5 * torch.randn(clean.shape, generator=random), clean


def squared_error(model, batch):
    noisy, clean = batch
    return (model(noisy) - clean).square().mean(1).sum(), torch.tensor(len(clean))  # the sum, and of how many


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
config = lf.TrainConfig(max_steps=500, micro_batch_size=64, out_dir="runs/waves", eval_batches=4)
trainer = lf.Trainer(model, NoisyWaves(), val_data=NoisyWaves(), loss_fn=squared_error, config=config)
trainer.resume()  # where a run was stopped; a first run begins
trainer.train()
print(f"squared error {trainer.evaluate().loss:.3f}; the noise alone has 0.25")

"""What a larger model or more text would bring: the law of Hoffmann et al., fitted to some small runs."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmforge.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """loss(N, D) = E + A / N**alpha + B / D**beta, in nats per token, for N weights trained on D tokens.

    E is what no model of this kind can know of the text; the other terms are what too few weights and too few tokens cost.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    errors: Mapping[str, float]  # standard errors of E, alpha and beta; infinite where the runs do not say
    residual: float  # root mean square of log(predicted / measured)

    def loss(self, num_params: float, num_tokens: float) -> float:
        """What a model of so many weights ends with after so many tokens.

        >>> law = ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28, errors={}, residual=0.0)  # their fit
        >>> round(law.loss(70e9, 1.4e12), 3)  # Chinchilla
        1.937
        """
        return float(self.E + self.A / num_params**self.alpha + self.B / num_tokens**self.beta)

    def optimal(self, flops: float) -> tuple[float, float]:
        """(weights, tokens) of the lowest loss for so many FLOPs of training, 6 per weight and token.

        Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4.
        """
        share = 1 / (self.alpha + self.beta)
        G = (self.alpha * self.A / (self.beta * self.B)) ** share
        return G * (flops / 6) ** (self.beta * share), (flops / 6) ** (self.alpha * share) / G


def fit_scaling_law(
    num_params: Sequence[float], num_tokens: Sequence[float], losses: Sequence[float], *, delta: float = 1e-3
) -> ScalingLaw:
    """The law nearest to some runs: the least sum of the Huber losses of log(predicted / measured), from many starting points.

    Each run is to end its own learning-rate schedule, with a rate that suits it. A warning says what the runs leave open.

    Args:
        num_params: weights of each run.
        num_tokens: tokens it was trained on.
        losses: what it ended with, nats per token.
        delta: where the Huber loss turns from a square into a line; what lies further off counts as an outlier.
    Raises:
        DataError: no law follows from these: fewer than 6 runs, 3 sizes or 3 numbers of tokens; sizes and tokens that grow together;
            values that are not above 0; losses that do not fall.
    Source: Hoffmann et al. 2022, arXiv:2203.15556, D.3. The minimum is sought by Levenberg and Marquardt's method, not L-BFGS.
    """
    N, D, L = (
        torch.tensor([float(value) for value in values], dtype=torch.float64)
        for values in (num_params, num_tokens, losses)
    )
    _check(N, D, L)
    # Centred logarithms, so that a change of an exponent leaves the middle of the runs where it is.
    n, d, log_loss = N.log() - N.log().mean(), D.log() - D.log().mean(), L.log()
    fitted = _minimize(_starts(L), n, d, log_loss, delta)
    predicted, jacobian = _predict(fitted, n, d)
    deviation = (predicted - log_loss)[0]
    a, alpha, b, beta, e = fitted[0].tolist()
    if alpha <= 0 or beta <= 0:
        what = "weights" if alpha <= 0 else "tokens"
        raise DataError(
            f"the losses do not fall with the number of {what} (exponent {min(alpha, beta):.3f}): no law follows; runs further apart, each "
            "with a learning rate that suits it, would tell"
        )
    law = ScalingLaw(
        E=math.exp(e),
        A=math.exp(a + alpha * N.log().mean().item()),
        alpha=alpha,
        B=math.exp(b + beta * D.log().mean().item()),
        beta=beta,
        errors=_standard_errors(jacobian[0], deviation, math.exp(e)),
        residual=deviation.square().mean().sqrt().item(),
    )
    open_ones = [name for name, error in law.errors.items() if not error < getattr(law, name) / 2]
    if open_ones:
        found = ", ".join(f"{name} = {getattr(law, name):.3g} +- {law.errors[name]:.2g}" for name in open_ones)
        warnings.warn(
            f"the {len(L)} runs do not determine {found}: trust no prediction far from them; add sizes and tokens further apart",
            stacklevel=2,
        )
    return law


def _check(N: Tensor, D: Tensor, L: Tensor) -> None:
    if not len(N) == len(D) == len(L):
        raise DataError(
            f"{len(N)} sizes, {len(D)} numbers of tokens and {len(L)} losses must be as many: one of each per run"
        )
    for name, values in (("num_params", N), ("num_tokens", D), ("losses", L)):
        if not (torch.isfinite(values) & (values > 0)).all():
            raise DataError(f"{name} must all be above 0 and finite; leave out runs that diverged")
    if len(L) < 6:
        raise DataError(f"{len(L)} runs cannot determine the law's 5 constants; at least 6 are needed, 9 are better")
    for what, values in (("sizes", N), ("numbers of tokens", D)):
        different = len(set(values.tolist()))
        if different < 3:
            raise DataError(f"the runs have {different} different {what}; a curve needs at least 3")
    correlation = torch.corrcoef(torch.stack([N.log(), D.log()]))[0, 1].item()
    if abs(correlation) > 0.98:
        raise DataError(
            f"weights and tokens grow together (correlation {correlation:.3f}): which of them lowers the loss cannot be told; train each "
            "size on several numbers of tokens"
        )


def _starts(L: Tensor) -> Tensor:
    """(S, 5): a, alpha, b, beta, e. E is a part of the smallest loss; the two terms share the rest."""
    starts = []
    for part in (0.02, 0.3, 0.6, 0.8, 0.95):
        E = part * L.min().item()
        for share in (0.2, 0.5, 0.8):
            rest = L.mean().item() - E + 1e-9
            for alpha in (0.1, 0.3, 0.9):
                for beta in (0.1, 0.3, 0.9):
                    starts.append([math.log(share * rest), alpha, math.log((1 - share) * rest), beta, math.log(E)])
    return torch.tensor(starts, dtype=torch.float64)


def _predict(p: Tensor, n: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(S, 5) -> log losses (S, runs) and how they change with p, (S, runs, 5)."""
    a, alpha, b, beta, e = (p[:, i, None] for i in range(5))
    terms = torch.stack([a - alpha * n, b - beta * d, e.expand(-1, len(n))], dim=-1)  # logarithms
    w = terms.softmax(dim=-1)
    jacobian = torch.stack([w[..., 0], -n * w[..., 0], w[..., 1], -d * w[..., 1], w[..., 2]], dim=-1)
    return terms.logsumexp(dim=-1), jacobian


def _minimize(p: Tensor, n: Tensor, d: Tensor, log_loss: Tensor, delta: float, *, steps: int = 300) -> Tensor:
    """Levenberg and Marquardt's method from all starts at once: the best end, (1, 5)."""

    def cost_of(deviation: Tensor) -> Tensor:
        size = deviation.abs()
        return torch.where(size < delta, size.square() / 2, delta * (size - delta / 2)).sum(dim=-1)

    damping = torch.full((len(p),), 1e-2, dtype=p.dtype)
    predicted, jacobian = _predict(p, n, d)
    cost = cost_of(predicted - log_loss)
    for _ in range(steps):
        deviation = predicted - log_loss
        # Of a Huber loss: less for what lies far off.
        weight = (delta / deviation.abs().clamp(min=1e-300)).clamp(max=1.0)[..., None]
        normal = jacobian.mT @ (weight * jacobian)
        scale = torch.diag_embed(normal.diagonal(dim1=-2, dim2=-1) * damping[:, None] + 1e-12)
        move = torch.linalg.solve(normal + scale, jacobian.mT @ (weight * deviation[..., None]))[..., 0]
        tried = p - move.clamp(-2, 2)
        tried_predicted, tried_jacobian = _predict(tried, n, d)
        tried_cost = cost_of(tried_predicted - log_loss)
        better = tried_cost < cost
        p = torch.where(better[:, None], tried, p)
        predicted = torch.where(better[:, None], tried_predicted, predicted)
        jacobian = torch.where(better[:, None, None], tried_jacobian, jacobian)
        cost = torch.where(better, tried_cost, cost)
        damping = torch.where(better, damping / 3, damping * 4).clamp(1e-12, 1e8)
    best = cost.argmin()
    return p[best : best + 1]


def _standard_errors(jacobian: Tensor, deviation: Tensor, E: float) -> dict[str, float]:
    """Of E, alpha and beta, as least squares has them."""
    freedom = len(deviation) - 5
    normal = jacobian.mT @ jacobian
    if torch.linalg.cond(normal) > 1e14:
        return {"E": math.inf, "alpha": math.inf, "beta": math.inf}
    variances = (torch.linalg.inv(normal) * deviation.square().sum() / freedom).diagonal()
    _, alpha, _, beta, log_E = variances.sqrt().tolist()
    return {"E": E * log_E, "alpha": alpha, "beta": beta}

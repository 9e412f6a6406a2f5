"""What a GPU can do at most, by its name: the denominator of MFU (model FLOPs utilization).

The figures are dense (without the zeros that "sparsity" counts as work) and with sums in float32, as training computes them.
"""

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one card, by the arithmetic of its matrix products; None: the card has none of that kind."""

    bfloat16: float | None
    float16: float
    tf32: float | None
    float32: float  # not on tensor cores


# GeForce: CUDA cores and boost clock in MHz, as NVIDIA's product page of the card gives them (reference clocks; cards of other makers
# differ by a few percent). A core does 2 float32 FLOPs per clock. The tensor cores of these generations do as many in TF32, twice as
# many in bfloat16 and float16 with float32 sums (and four times as many with float16 sums, which training does not use). So say the
# appendices of the architecture white papers: GA102 V2 (RTX 3090: 35.6, 71), Ada V2.1 (RTX 4090: 82.6, 165.2), RTX Blackwell V1.1
# (RTX 5090: 104.8, 209.5 TFLOP/s).
_GEFORCE = {
    "RTX 3060": (3584, 1777),  # Ampere, GA10x
    "RTX 3060 TI": (4864, 1665),
    "RTX 3070": (5888, 1725),
    "RTX 3070 TI": (6144, 1770),
    "RTX 3080": (8704, 1710),  # 10 GB; the one with 12 GB has the same name and 3 % more cores
    "RTX 3080 TI": (10240, 1665),
    "RTX 3090": (10496, 1695),
    "RTX 3090 TI": (10752, 1860),
    "RTX 4060": (3072, 2460),  # Ada
    "RTX 4060 TI": (4352, 2535),
    "RTX 4070": (5888, 2475),
    "RTX 4070 SUPER": (7168, 2475),
    "RTX 4070 TI": (7680, 2610),
    "RTX 4070 TI SUPER": (8448, 2610),
    "RTX 4080": (9728, 2505),
    "RTX 4080 SUPER": (10240, 2550),
    "RTX 4090": (16384, 2520),
    "RTX 5060": (3840, 2497),  # Blackwell, GB20x
    "RTX 5060 TI": (4608, 2572),
    "RTX 5070": (6144, 2512),
    "RTX 5070 TI": (8960, 2452),
    "RTX 5080": (10752, 2617),
    "RTX 5090": (21760, 2407),
}

# Data center cards, TFLOP/s: bfloat16, float16, TF32, float32.
_DATA_CENTER = {
    "V100 SXM": (None, 125.0, None, 15.7),  # NVIDIA V100 data sheet, January 2020
    "V100 PCIE": (None, 112.0, None, 14.0),
    "V100S PCIE": (None, 130.0, None, 16.4),
    "T4": (None, 65.0, None, 8.1),  # NVIDIA T4 data sheet
    "A10": (125.0, 125.0, 62.5, 31.2),  # NVIDIA A10 data sheet
    "L4": (121.0, 121.0, 60.0, 30.3),  # NVIDIA L4 data sheet, whose tensor figures are with sparsity: half of them
    "A100 SXM": (312.0, 312.0, 156.0, 19.5),  # NVIDIA A100 data sheet; SXM and PCIe, 40 and 80 GB alike
    "A100 PCIE": (312.0, 312.0, 156.0, 19.5),
    "H100 HBM3": (989.4, 989.4, 494.7, 66.9),  # SXM5; NVIDIA H100 architecture white paper V1.04, table 2
    "H100 PCIE": (756.0, 756.0, 378.0, 51.2),  # the same table
    "H100 NVL": (835.5, 835.5, 417.5, 60.0),  # NVIDIA H100 data sheet: half of what it gives with sparsity
    "H200": (989.5, 989.5, 494.5, 67.0),  # SXM5; NVIDIA H200 data sheet: half of what it gives with sparsity
    "H200 NVL": (835.5, 835.5, 417.5, 60.0),
}

PEAKS = {
    **{
        name: Peak(*(factor * cores * 2 * mhz * 1e6 for factor in (2, 2, 1, 1)))
        for name, (cores, mhz) in _GEFORCE.items()
    },
    **{
        name: Peak(*(None if tera is None else tera * 1e12 for tera in row))  # type: ignore[arg-type]
        for name, row in _DATA_CENTER.items()
    },
}

# Words of a name that say nothing of the speed: maker, brand, memory.
_NOISE = re.compile(r"NVIDIA|GEFORCE|TESLA|\d+GB")


def peak_flops(device_name: str, arithmetic: str) -> float | None:
    """Peak FLOP/s of a GPU.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it. All of its words must be those of a card in the table: a laptop's GPU,
            a slice of a card (MIG) or a variant that is not listed is another card.
        arithmetic: "bfloat16", "float16", "tf32" or "float32".
    Returns:
        None: the card is not in the table, or has no such arithmetic in hardware.
    >>> f"{peak_flops('NVIDIA GeForce RTX 4070 Ti SUPER', 'bfloat16'):.3g}"
    '8.82e+13'
    >>> peak_flops("NVIDIA GeForce RTX 4070 Laptop GPU", "bfloat16")
    """
    words = [word for word in re.split(r"[\s-]+", device_name.upper()) if not _NOISE.fullmatch(word)]
    name = re.sub(r"SXM\d", "SXM", " ".join(words))
    peak = PEAKS.get(name)
    value: float | None = getattr(peak, arithmetic) if peak is not None else None
    return value


def device_peak_flops(device: torch.device, arithmetic: str) -> float | None:
    """`peak_flops` of a device; None for all but CUDA's."""
    return peak_flops(torch.cuda.get_device_name(device), arithmetic) if device.type == "cuda" else None

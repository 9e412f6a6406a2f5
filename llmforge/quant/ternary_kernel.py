"""`ternary_kernel.c` through the C compiler of the machine: 8-bit activations times packed ternary weights, several times as fast as a
product of floats, and exact: sums of products of codes are integers.
"""

import ctypes
from functools import cache
from importlib import resources
from math import gcd

import torch
from torch import Tensor

from llmforge.quant.compiler import NATIVE, compile_source
from llmforge.quant.ternary import int8_codes, pack_2bit, unpack_2bit

# OpenMP without its own library: the functions are those that torch has loaded, so that both use one pool of threads. Two pools would
# wait for each other's processors.
_OPENMP = ("-fopenmp", "-nodefaultlibs")
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int64


class TernaryKernel:
    """For float32 tensors on the CPU; in torch's number of threads where the compiler has OpenMP, else in one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        # A CDLL's functions let go of Python's lock meanwhile.
        self._linear, self._decode = library.linear, library.decode
        self._linear.argtypes = [*[_POINTER] * 6, *[_INT] * 6, ctypes.c_float, ctypes.c_int]
        self._decode.argtypes = [*[_POINTER] * 3, *[_INT] * 3, ctypes.c_int]
        self._linear.restype = self._decode.restype = None
        library.most_tokens.restype = _INT
        # Up to how many tokens `linear` is faster than F.linear with decoded weights; 0: not even for one.
        self.most_tokens: int = library.most_tokens()

    def linear(
        self,
        x: Tensor,
        packed: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        *,
        out_features: int,
        act_group: int | None = None,
    ) -> Tensor:
        """F.linear(int8(x), ternary weight, bias), its sums rounded once per group.

        Args:
            x: (..., in) float32.
            packed: (out / 4, in) uint8 of `pack_2bit`; where out is no multiple of 4, rows were added.
            scale: float32 () or (out, groups, 1); bias: float32 (out).
            act_group: so many neighbours of x share a step, as in `int8_codes`; None = all of a token.
        Returns:
            (..., out) float32
        Raises:
            ValueError: x of another width.
        """
        width = packed.shape[1]
        if x.shape[-1] != width:
            raise ValueError(f"x has {x.shape[-1]} values per token, the layer takes {width}")
        x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        tokens, groups = x.numel() // width, 0 if scale.ndim == 0 else scale.shape[1]
        x_group = act_group or width
        segment = gcd(x_group, width // groups) if groups else x_group
        y = x.new_empty(*x.shape[:-1], out_features)
        space = x.new_empty(2 * tokens * (width // segment) + -(-tokens * width // 4))
        self._linear(
            x.data_ptr(),
            packed.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            space.data_ptr(),
            y.data_ptr(),
            tokens,
            width,
            out_features,
            x_group,
            groups,
            segment,
            1e-5 if act_group is None else 1e-30,  # least of the largest magnitudes, as in int8_codes
            torch.get_num_threads(),
        )
        return y

    def decode(self, packed: Tensor, scale: Tensor, *, out_features: int) -> Tensor:
        """The matrix that codes and scale stand for, (out, in) float32; arguments as of `linear`."""
        packed, scale = packed.contiguous(), scale.contiguous()
        width, groups = packed.shape[1], 0 if scale.ndim == 0 else scale.shape[1]
        weight = scale.new_empty(out_features, width)
        pointers = packed.data_ptr(), scale.data_ptr(), weight.data_ptr()
        self._decode(*pointers, width, out_features, groups, torch.get_num_threads())
        return weight


@cache
def ternary_kernel() -> TernaryKernel | None:
    """The compiled kernel; None where there is no C compiler, or for a processor on which it would be slower than floats."""
    source = resources.files(__package__).joinpath("ternary_kernel.c").read_bytes()
    return compile_source(source, _checked, tunings=[(*NATIVE, *_OPENMP), NATIVE, ()])


def _checked(library: ctypes.CDLL) -> TernaryKernel | None:
    made = TernaryKernel(library)
    return made if made.most_tokens and _works(made) else None


def _works(made: TernaryKernel) -> bool:
    """Whether a compiler that took the flags also did what they say: results are those of plain torch, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2112, generator=generator)
    codes = torch.randint(-1, 2, (520, 2112), generator=generator)
    packed, scale, bias = pack_2bit(codes), torch.tensor(0.01171875), torch.randn(520, generator=generator)
    x_codes, step = int8_codes(x)
    found = made.linear(x, packed, scale, bias, out_features=520)
    if not torch.equal(found, (x_codes.double() @ codes.T.double()).float() * (step * scale) + bias):
        return False
    return torch.equal(made.decode(packed, scale, out_features=520), unpack_2bit(packed).float() * scale)

"""A linear layer whose weight is packed once, at load, and then only read.

On a CPU with the native library the weight is kept as panels of 32 output features (native/linear.cpp), a form that
streams at memory speed for one row and computes near the machine's limit for many; the unpacked weight is not kept.
Elsewhere (CUDA, float16, no library) the layer is torch's own.
"""

import torch
import torch.nn.functional as F

from kernels import native_library

_PANEL_COLUMNS = 32  # kPanelColumns in native/panel.h
_WORD_BYTES = 4  # the packing moves words of 32 bits: one float, or two bfloat16


class PackedLinear:
    """y = x @ weight.T + bias, for x of the weight's dtype and device; y has the same dtype, or with `wide` float32.

    Sums are float32 inside either way. Whoever compares the results with each other (logits) must not have them rounded:
    in bfloat16 the steps at 25 are 0.125 wide, and distinct candidates become ties. Raises ValueError where weight is not [out_features, in_features], or bias not [out_features] of the same dtype.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, wide: bool = False) -> None:
        if weight.dim() != 2:
            raise ValueError(f"weight must be [out_features, in_features], got {tuple(weight.shape)}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.out_dtype = torch.float32 if wide else weight.dtype
        self._bias = None if bias is None else bias.detach().contiguous()
        self._native = native_library.function("linear_wide" if wide else "linear", weight)
        self._weight = weight.detach()  # packed, where self._native
        if self._native is not None and self.in_features * weight.element_size() % _WORD_BYTES == 0:
            self._weight = _packed(self._weight.contiguous())
        else:
            self._native = None
            self._weight = self._weight.to(self.out_dtype)  # torch has no product that widens its result
            self._bias = None if self._bias is None else self._bias.to(self.out_dtype)

    @property
    def packed(self) -> bool:
        """Whether the C++ path is taken."""
        return self._native is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x is [num_tokens, in_features]; returns [num_tokens, out_features]."""
        if self._native is None:
            return F.linear(x.to(self.out_dtype), self._weight, self._bias)
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != self.dtype or not x.is_cpu:
            raise ValueError(f"x must be [num_tokens, {self.in_features}] {self.dtype}, got {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        out = torch.empty((x.shape[0], self.out_features), dtype=self.out_dtype)
        self._native(
            *(x.data_ptr(), self._weight.data_ptr(), None if self._bias is None else self._bias.data_ptr()),
            *(out.data_ptr(), x.shape[0], self.in_features, self.out_features, torch.get_num_threads()),
        )
        return out


def _packed(weight: torch.Tensor) -> torch.Tensor:
    pack = native_library.function("pack_weight", weight)
    assert pack is not None, "the library has every function for every dtype"
    out_features, in_features = weight.shape
    panels = -(-out_features // _PANEL_COLUMNS)
    packed = torch.empty(panels * _PANEL_COLUMNS * in_features, dtype=weight.dtype)
    pack(weight.data_ptr(), packed.data_ptr(), out_features, in_features, torch.get_num_threads())
    return packed

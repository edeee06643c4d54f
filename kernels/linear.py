"""A linear layer whose weight is packed once, at load, and then only read.

On a CPU with the native library the weight is kept as panels of 32 output features (native/linear.h), a form that
streams at memory speed for one row and computes near the machine's limit for many; the unpacked weight is not kept.
Elsewhere (CUDA, float16, no library) the layer is torch's own.

A weight may be quantised to int8 (kernels/int8.py), and two weights may be one `gated` layer, the first half of a SwiGLU
feed-forward, whose two products meet before anything is stored.
"""

import ctypes
from typing import Literal

import torch
import torch.nn.functional as F

from kernels import native_library
from kernels.int8 import SCALE_GROUP, int8_linear_reference, quantize_weight
from kernels.silu_mul import silu_and_mul
from kernels.weight_memory import weight_memory

Quantization = Literal["none", "int8"]

_PANEL_COLUMNS = 32  # kPanelColumns in native/panel.h


class LinearWeight(ctypes.Structure):
    """LinearWeight of native/linear.h. Whoever holds one keeps the PackedLinear that made it."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("gated", ctypes.c_int64),
    )


class PackedLinear:
    """y = x @ weight.T + bias, for x of the weight's dtype and device; y has the same dtype, or with `wide` float32.

    Sums are float32 inside either way. Whoever compares the results with each other (logits) must not have them rounded:
    in bfloat16 the steps at 25 are 0.125 wide, and distinct candidates become ties.

    With `gated` the weight's first half is a gate's: y = silu(x @ gate.T) * (x @ up.T), half as wide. With
    `quantization` "int8" the weight is rounded to int8 with a scale for each output feature, and every x to int8 with a
    scale for each token and 64 of its features. A row of y does not depend on the other rows of x.

    Raises ValueError where weight is not [out_features, in_features], or bias not [out_features] of the same dtype.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        wide: bool = False,
        gated: bool = False,
        quantization: Quantization = "none",
    ) -> None:
        if weight.dim() != 2 or (gated and (weight.shape[0] % 2 or wide)):
            raise ValueError(f"weight must be [out_features, in_features], got {tuple(weight.shape)}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
            raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
        rows, self.in_features = weight.shape
        self.out_features = rows // 2 if gated else rows
        self.dtype = weight.dtype
        self.out_dtype = torch.float32 if wide else weight.dtype
        self.gated = gated
        self._native = native_library.function("linear_wide" if wide else "linear", weight)
        self._widens = weight.is_cuda and self.out_dtype != weight.dtype
        self._scales: torch.Tensor | None = None
        stored = weight.detach()
        if quantization == "int8":
            stored, self._scales = quantize_weight(weight)
        self._bias = None if bias is None else bias.detach()
        self.description: LinearWeight | None = None  # what C++ reads, of a packed layer
        if self._native is not None and (
            self._scales is not None or self.in_features * self.dtype.itemsize % native_library.WORD_BYTES == 0
        ):
            self._pack(stored)
        else:
            self._native = None
            if self._scales is None:
                # cuBLAS widens: the weight is read as it is, by tensor cores. torch's products for a CPU do not.
                stored = stored if self._widens else stored.to(self.out_dtype)
                self._bias = None if self._bias is None else self._bias.to(self.out_dtype)
            self._weight = stored

    @property
    def packed(self) -> bool:
        """Whether the C++ path is taken."""
        return self._native is not None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x is [num_tokens, in_features]; returns [num_tokens, out_features]."""
        if self._native is None or self.description is None:
            return self._in_torch(x)
        if x.dim() != 2 or x.shape[1] != self.in_features or x.dtype != self.dtype or not x.is_cpu:
            raise ValueError(f"x must be [num_tokens, {self.in_features}] {self.dtype}, got {x.dtype} {tuple(x.shape)}")
        x = x.contiguous()
        out = torch.empty((x.shape[0], self.out_features), dtype=self.out_dtype)
        self._native(x.data_ptr(), ctypes.byref(self.description), out.data_ptr(), x.shape[0], torch.get_num_threads())
        return out

    def _in_torch(self, x: torch.Tensor) -> torch.Tensor:
        if self._widens and self._scales is None:
            out = torch.mm(x, self._weight.t(), out_dtype=self.out_dtype)
            out = out if self._bias is None else out + self._bias
        elif self._scales is None:
            out = F.linear(x.to(self.out_dtype), self._weight, self._bias)
        else:
            out = int8_linear_reference(x, self._weight, self._scales, self._bias).to(self.out_dtype)
        return silu_and_mul(out) if self.gated else out

    def _pack(self, stored: torch.Tensor) -> None:
        """`stored` is the weight as it is multiplied: of the layer's dtype, or int8."""
        pack = native_library.packer(stored.dtype)
        columns_each = _PANEL_COLUMNS // 2 if self.gated else _PANEL_COLUMNS
        panels = -(-self.out_features // columns_each)
        row_bytes = (
            -(-self.in_features * stored.element_size() // native_library.WORD_BYTES) * native_library.WORD_BYTES
        )
        corrections = (
            -(-self.in_features // SCALE_GROUP) * native_library.WORD_BYTES if stored.dtype == torch.int8 else 0
        )
        self._weight = weight_memory.take(panels * _PANEL_COLUMNS * (row_bytes + corrections))
        padding = row_bytes // stored.element_size() - self.in_features
        stored = F.pad(stored, (0, padding)).contiguous() if padding else stored.contiguous()
        self._bias = None if self._bias is None else self._in_panels(self._bias, panels)
        self._scales = None if self._scales is None else self._in_panels(self._scales, panels)
        self.description = LinearWeight(
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            None if self._scales is None else self._scales.data_ptr(),
            self.in_features,
            self.out_features,
            self.gated,
        )
        pack(stored.data_ptr(), self._weight.data_ptr(), ctypes.byref(self.description), torch.get_num_threads())

    def _in_panels(self, per_row: torch.Tensor, panels: int) -> torch.Tensor:
        """One float32 for each row of the weight, in the order of the packed columns."""
        parts = 2 if self.gated else 1
        padded = torch.zeros(parts, panels * _PANEL_COLUMNS // parts)
        padded[:, : self.out_features] = per_row.float().view(parts, -1)
        return padded.view(parts, panels, -1).transpose(0, 1).contiguous().view(-1)

"""`QuantizedExperts`: quantised weights of one projection of all experts, in place of a dense `w1` or `w2`."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import checks
from .layout import ALIGNMENT, SCALE_DTYPES, Settings, Stack, as_bytes, as_type, format_named, matrix_bytes
from .part import Part, make_part
from .safetensors_file import open_safetensors, save_safetensors

# Parts that w1 may consist of; anything else is one part by the name of "weight".
GATE_UP = ("gate", "up")
BUFFERS = ("codes", "scales", "biases", "table")
MLX_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")

# Weights that are quantised at a time: 64 MiB of float32, times the few temporaries of an encoder.
BATCH_ELEMENTS = 1 << 24


class KernelForm(NamedTuple):
    """Weights as fused_experts hands them to kernels. csrc/bindings/kernel_form.cpp reads it, too."""

    parts: tuple[Part, ...]
    """Those of the weights, which it was made from."""
    shape: tuple[int, int, int]
    """[E, rows, columns] of the weights."""
    buffers: list[Tensor]
    """Codes, scales, biases and table: of the one part, or of gate and then of up."""
    codes: list[int]
    """How all matrices of the one part, or of gate and of up, are stored; 0: not all alike."""
    trellis: bool


class QuantizedExperts:
    """Quantised weights [E, rows, columns] that stand where a dense `w1` [E, 2I, H] or `w2` [E, H, I] may stand.

    It has one part, "weight", with rows in the order of the dense tensor, or the two parts "gate" and "up", which need
    not share bits, groups or format; `metal_moe.formats.layout` says how a part lies in memory.

    Example:
        w1 = QuantizedExperts.quantize(w1, format="affine", bits={"gate": 6, "up": 2}, group_size=64)
        w2 = QuantizedExperts.quantize(w2, format="mxfp4")
        w1.save("w1.safetensors")
        dense = QuantizedExperts.load("w1.safetensors").dequantize(torch.float64)
    """

    def __init__(self, parts: Mapping[str, Part], bias: Tensor | None = None) -> None:
        if not isinstance(parts, Mapping) or not all(isinstance(part, Part) for part in parts.values()):
            raise TypeError(
                "QuantizedExperts: parts is no mapping of names to Parts; see quantize, from_mlx and the like"
            )
        names = ("weight",) if len(parts) == 1 else GATE_UP
        if set(parts) != set(names):
            raise ValueError(f"QuantizedExperts: parts are {tuple(parts)}; they must be ('weight',) or {GATE_UP}")
        self.parts = {name: parts[name] for name in names}
        self.bias = bias
        # What fused_experts makes of the parts, kept for the next call: by (as gate and up, interleaved).
        self.kernel_forms: dict[tuple[bool, bool], KernelForm] = {}
        first = self.parts[names[0]]
        for name, part in self.parts.items():
            if (part.num_experts, part.rows, part.columns) != (first.num_experts, first.rows, first.columns):
                raise ValueError(
                    f"QuantizedExperts: {name} is [{part.num_experts}, {part.rows}, {part.columns}]; it must be "
                    f"[{first.num_experts}, {first.rows}, {first.columns}], as {names[0]} is"
                )
            if part.device != first.device:
                raise ValueError(f"QuantizedExperts: {name} is on {part.device}; it must be on {first.device}")
        self.formats = {settings.format for part in self.parts.values() for settings in part.settings}
        self.shape = torch.Size((first.num_experts, len(names) * first.rows, first.columns))
        if bias is not None:
            checks.tensor("QuantizedExperts", "bias", bias, tuple(SCALE_DTYPES.values()), self.shape[:2])
            if bias.device != first.device:
                raise ValueError(f"QuantizedExperts: bias is on {bias.device}; it must be on {first.device}")
            self.bias = bias.contiguous()

    # ---------------------------------------------------------------------------------------------- from checkpoints

    @classmethod
    def from_mlx(
        cls,
        weight: Tensor | Sequence[Tensor],
        scales: Tensor | Sequence[Tensor],
        biases: Tensor | Sequence[Tensor] | None = None,
        *,
        group_size: int | Sequence[int] = 64,
        bits: int | Sequence[int] = 4,
        mode: str = "affine",
        bias: Tensor | Sequence[Tensor] | None = None,
    ) -> QuantizedExperts:
        """What `mx.quantize` gives for stacked experts, and what mlx-lm's checkpoints hold; nothing is copied.

        Args:
            weight: uint32 [E, rows, columns * bits / 32], or a pair of them: gate and up. The other arguments may be
                pairs too, and then go with one of the two each.
            scales: affine: float [E, rows, columns / group_size]; mxfp4, mxfp8, nvfp4: uint8, the scale codes.
            biases: affine: as scales; the others: None.
            group_size: 32, 64 or 128; mxfp4 and mxfp8 32, nvfp4 16.
            bits: 2, 3, 4, 5, 6 or 8; mxfp4 and nvfp4 4, mxfp8 8.
            mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
            bias: float [E, rows], added to the product; [E, 2 rows] or a pair for a pair of weights.
        """
        op = "QuantizedExperts.from_mlx"
        if mode not in MLX_MODES:
            raise ValueError(f"{op}: mode is {mode!r}; it must be one of {', '.join(MLX_MODES)}")
        parts = {}
        for name, (w, s, b, group, width) in _pairs(op, weight, scales, biases, group_size, bits).items():
            checks.tensor(op, "weight", w, (torch.uint32, torch.int32), (None, None, None))
            checks.integer(op, "bits", width)
            checks.integer(op, "group_size", group)
            affine = mode == "affine"
            checks.tensor(
                op, "scales", s, tuple(SCALE_DTYPES.values()) if affine else (torch.uint8,), (None, None, None)
            )
            names = {dtype: key for key, dtype in SCALE_DTYPES.items()}
            scale_type = names[s.dtype] if affine else format_named(mode).settings(None, None).scale_type
            settings = Settings(mode, width, group, scale_type)
            rows, columns = w.shape[1], w.shape[2] * 32 // max(width, 1)
            _check(op, settings, rows, columns)
            if w.shape[2] * 32 != columns * width:
                raise ValueError(
                    f"{op}: weight has rows of {w.shape[2]} words; that is no whole number of {width}-bit codes"
                )
            checks.tensor(op, "scales", s, (s.dtype,), (*w.shape[:2], columns // group))
            if affine:
                checks.tensor(op, "biases", b, (s.dtype,), s.shape)
            elif b is not None:
                raise ValueError(f"{op}: biases is given; {mode} has none")
            stack = Stack(settings, rows, columns, as_bytes(w), as_bytes(s), None if b is None else as_bytes(b))
            parts[name] = make_part([(list(range(w.shape[0])), stack)])
        return cls(parts, _joined(bias))

    @classmethod
    def from_mxfp4(cls, blocks: Tensor, scales: Tensor, *, bias: Tensor | None = None) -> QuantizedExperts:
        """gpt-oss's experts: `..._proj_blocks`, `..._proj_scales` and `..._proj_bias`; nothing is copied.

        Rows of `gate_up_proj` are gate 0, up 0, gate 1, up 1, ...: pass `interleaved=True` to `fused_moe`.

        Args:
            blocks: uint8 [E, rows, columns / 32, 16], the even column of a pair in the low four bits.
            scales: uint8 [E, rows, columns / 32].
            bias: float [E, rows].
        """
        op = "QuantizedExperts.from_mxfp4"
        checks.tensor(op, "blocks", blocks, (torch.uint8,), (None, None, None, 16))
        checks.tensor(op, "scales", scales, (torch.uint8,), blocks.shape[:3])
        experts, rows, count, _ = blocks.shape
        settings = format_named("mxfp4").settings(None, None)
        _check(op, settings, rows, count * 32)
        stack = Stack(settings, rows, count * 32, blocks.flatten(-2), as_bytes(scales))
        return cls({"weight": make_part([(list(range(experts)), stack)])}, bias)

    @classmethod
    def from_exl3(
        cls,
        experts: Sequence[Mapping[str, Tensor]] | Sequence[Sequence[Mapping[str, Tensor]]],
        *,
        shape: tuple[int, int] | None = None,
    ) -> QuantizedExperts:
        """exllamav3's experts, which stand in a checkpoint one by one; they are stacked, which copies them.

        Args:
            experts: per expert the tensors of its linear layer by the last part of their names: "trellis", "suh" or
                "su", "svh" or "sv", and where present "mcg", "mul1", "bias". Or a pair of such lists: gate and up.
                Experts may differ in bits and codebook.
            shape: (rows, columns) of the weights where they are smaller than what is stored, which is rounded up to
                multiples of 128: (2880, 2880) for gpt-oss.
        """
        from .trellis import stack_exl3

        op = "QuantizedExperts.from_exl3"
        if isinstance(experts, Mapping) or not isinstance(experts, Sequence):
            raise TypeError(f"{op}: experts is of type {type(experts).__name__}; it must be a list of mappings, or two")
        pair = len(experts) == 2 and not isinstance(experts[0], Mapping)
        sides = dict(zip(GATE_UP, experts, strict=True)) if pair else {"weight": experts}
        if shape is not None and (
            not isinstance(shape, Sequence) or len(shape) != 2 or not all(isinstance(size, int) for size in shape)
        ):
            raise TypeError(f"{op}: shape is {shape!r}; it must be (rows, columns)")
        parts, biases = {}, []
        for name, side in sides.items():
            if not side:
                raise ValueError(f"{op}: experts is empty; it must name at least one expert")
            for index, linear in enumerate(side):
                if not isinstance(linear, Mapping) or not all(isinstance(t, Tensor) for t in linear.values()):
                    raise TypeError(f"{op}: experts[{index}] is no mapping of names to tensors")
            stacks, bias = stack_exl3(op, side, shape)
            parts[name] = make_part(stacks)
            biases.append(bias)
        if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
            raise ValueError(f"{op}: one of gate and up has a bias; both must have one or neither")
        return cls(parts, None if biases[0] is None else torch.cat(biases, -1))

    # ----------------------------------------------------------------------------------------------------- quantising

    @classmethod
    def quantize(
        cls,
        w: Tensor | Mapping[str, Tensor],
        *,
        format: str = "affine",
        bits: float | Sequence[float] | Mapping[str, float | Sequence[float]] | None = None,
        group_size: int | None = None,
        bias: Tensor | None = None,
        progress: Callable[[int, int], None] | None = None,
        hessian: Tensor | Mapping[str, Tensor] | None = None,
        **options: object,
    ) -> QuantizedExperts:
        """Quantises dense experts.

        Args:
            w: float [E, rows, columns], or {"gate": ..., "up": ...}.
            format: "affine", "mxfp4", "mxfp8", "nvfp4", "trellis" or "dense".
            bits: of a weight; one per expert where a sequence is given. {"gate": 6, "up": 2} takes a `w` of 2I rows
                (gate, then up) apart. None: 4, or what the format has.
            group_size: affine: 32, 64 or 128. None: the format's own (affine: 64).
            bias: float [E, rows], kept as it is.
            progress: called with the number of experts done and their total.
            hessian: trellis: float [columns, columns] or [E, columns, columns], the sum of x x^T over calibration
                inputs x, with which errors are spread so that outputs suffer least. A mapping for gate and up apart.
            options: of the format: affine `scale_dtype` (default: that of `w`); trellis `codebook`
                ("mul1", "mcg" or "3inst"), `seed` of the random signs, `walks`, another search than
                `trellis_quantizer.search`.
        """
        op = "QuantizedExperts.quantize"
        with checks.within(op):
            known = format_named(format)
        for option in (*options, *(("hessian",) if hessian is not None else ())):
            if option not in known.SETTINGS_OPTIONS + known.ENCODE_OPTIONS:
                raise TypeError(f"{op}: {option} is given; {format} has no such option")
        settings_options = {key: value for key, value in options.items() if key in known.SETTINGS_OPTIONS}
        encode_options = {key: value for key, value in options.items() if key in known.ENCODE_OPTIONS}
        sides = _sides(op, w, bits)
        for argument, value in (("bits", bits), ("hessian", hessian)):
            if isinstance(value, Mapping) and set(value) != set(sides):
                raise ValueError(f"{op}: {argument} has the keys {tuple(value)}; they must be {tuple(sides)}")
        total = sum(side.shape[0] for side in sides.values())
        done = 0
        parts = {}
        for name, side in sides.items():
            of_part = bits.get(name) if isinstance(bits, Mapping) else bits
            experts, rows, columns = side.shape
            if side.is_meta:
                raise ValueError(f"{op}: w is on the meta device; it must have values")
            if not experts:
                raise ValueError(f"{op}: w has shape {tuple(side.shape)}; it must have at least one expert")
            metric = hessian.get(name) if isinstance(hessian, Mapping) else hessian
            try:
                settings = [
                    known.settings(width, group_size, side.dtype, **settings_options)
                    for width in _each(of_part, experts)
                ]
                for one in dict.fromkeys(settings):
                    _check_matrix(one, rows, columns)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{op}: {error}") from None
            if metric is not None:
                _check_hessian(op, metric, experts, columns)
            stacks = []
            for one in dict.fromkeys(settings):
                members = [expert for expert in range(experts) if settings[expert] == one]
                batch = max(1, BATCH_ELEMENTS // (rows * columns))
                for begin in range(0, len(members), batch):
                    some = members[begin : begin + batch]
                    weights = side[some].float()
                    for expert, finite in zip(some, torch.isfinite(weights).flatten(1).all(1).tolist(), strict=True):
                        if not finite:
                            raise ValueError(f"{op}: w has infinite or NaN values in expert {expert}")
                    if metric is not None:
                        encode_options["hessian"] = metric if metric.ndim == 2 else metric[some]
                    try:
                        stack = known.encode(weights, one, **encode_options)
                    except ValueError as error:
                        raise ValueError(f"{op}: {error}") from None
                    _check_encoded(op, some, weights, stack)
                    stacks.append((some, stack))
                    done += len(some)
                    if progress is not None:
                        progress(done, total)
            parts[name] = make_part(stacks)
        return cls(parts, bias)

    @classmethod
    def cat(cls, experts: Sequence[QuantizedExperts]) -> QuantizedExperts:
        """The experts of several, one after the other; formats may differ. Copies."""
        experts = list(experts)
        if not experts or not all(isinstance(each, QuantizedExperts) for each in experts):
            raise TypeError("QuantizedExperts.cat: experts must be one or more QuantizedExperts")
        names = tuple(experts[0].parts)
        if any(tuple(each.parts) != names or each.shape[1:] != experts[0].shape[1:] for each in experts):
            raise ValueError(
                "QuantizedExperts.cat: shapes or parts differ; they must be equal but for the experts' number"
            )
        parts = {}
        for name in names:
            stacks, start = [], 0
            for each in experts:
                part = each.parts[name]
                stacks += [([start + expert for expert in group], part.stack(group)) for group in part.groups()]
                start += part.num_experts
            parts[name] = make_part(stacks)
        biases = [each.bias for each in experts]
        if len({None if bias is None else bias.dtype for bias in biases}) > 1:
            raise ValueError("QuantizedExperts.cat: biases differ; all must be of one type, or there must be none")
        return cls(parts, None if biases[0] is None else torch.cat(biases))

    def untraced(self, function: Callable[..., None], *arguments: object) -> None:
        """function(self, *arguments), which torch.compile runs as it traces the caller, and does not look into."""
        function(self, *arguments)

    # What torch.compiler.assume_constant_result sets, without its import of torch._dynamo, which takes seconds.
    untraced._dynamo_marked_constant = True

    # -------------------------------------------------------------------------------------------------------- reading

    @property
    def num_experts(self) -> int:
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers and tables, each memory counted once, and of the bias."""
        seen = {}
        for part in self.parts.values():
            for buffer in (*part.buffers().values(), part.table):
                seen[buffer.data_ptr(), buffer.nbytes] = buffer.nbytes
        return sum(seen.values()) + (0 if self.bias is None else self.bias.nbytes)

    @property
    def bits_per_weight(self) -> float:
        """Of codes, scales and biases, without the tables and paddings of buffers."""
        total = sum(
            matrix_bytes(settings, part.rows, part.columns)
            for part in self.parts.values()
            for settings in part.settings
        )
        return 8 * total / self.shape.numel()

    def gate_up(self, interleaved: bool = False) -> tuple[Part, Part]:
        """As w1: the parts of gate and of up, taken from a fused one without a copy.

        Args:
            interleaved: rows of a fused one are gate 0, up 0, gate 1, ...; otherwise the gate rows, then the up rows.
        """
        if len(self.parts) == 2:
            if interleaved:
                raise ValueError("interleaved is True; gate and up are parts of their own, with nothing to interleave")
            return self.parts["gate"], self.parts["up"]
        part = self.parts["weight"]
        if part.rows % 2:
            raise ValueError(f"w1 has {part.rows} rows; gate and up rows must be equally many")
        half = part.rows // 2
        if interleaved:
            return part.take_rows(0, half, 2), part.take_rows(1, half, 2)
        return part.take_rows(0, half, 1), part.take_rows(half, half, 1)

    def dequantize(self, dtype: torch.dtype = torch.float32, experts: Sequence[int] | None = None) -> Tensor:
        """The weights, [E, rows, columns] or those of `experts`, as the codes say.

        float64 has no rounding beyond that of the codes' definition (trellis values are float16, as are suh and svh;
        the Hadamard transforms are computed in `dtype`); other types are computed in float32 and then rounded.
        """
        op = "QuantizedExperts.dequantize"
        if dtype not in (*SCALE_DTYPES.values(), torch.float64):
            raise TypeError(f"{op}: dtype is {dtype}; it must be float16, bfloat16, float32 or float64")
        wanted = None
        if experts is not None:
            try:
                wanted = [operator.index(expert) for expert in experts]
            except TypeError:
                raise TypeError(f"{op}: experts is {experts!r}; it must be numbers of experts") from None
            for expert in wanted:
                if not 0 <= expert < self.num_experts:
                    raise ValueError(f"{op}: experts has {expert}; it must be from 0 to {self.num_experts - 1}")
        working = torch.float64 if dtype == torch.float64 else torch.float32
        count = self.num_experts if wanted is None else len(wanted)
        out = torch.empty(count, *self.shape[1:], dtype=dtype, device=self.device)
        for index, part in enumerate(self.parts.values()):
            part.dequantize(wanted, working, out[:, index * part.rows : (index + 1) * part.rows])
        return out

    # --------------------------------------------------------------------------------------------- moving and storing

    def to(self, device: torch.device | str) -> QuantizedExperts:
        """On another device; itself if it is there. Gate and up that share a buffer get one each."""
        if self.device == torch.device(device):
            return self
        bias = None if self.bias is None else self.bias.to(device)
        return QuantizedExperts({name: part.to(device) for name, part in self.parts.items()}, bias)

    def aligned(self) -> QuantizedExperts:
        """With every buffer at an address that is a multiple of 16: buffers of mapped files that are not are copied.

        Itself if there are none.
        """
        parts, bias = {name: part.aligned() for name, part in self.parts.items()}, self.bias
        if bias is not None and bias.data_ptr() % ALIGNMENT:
            bias = bias.clone()
        return self if parts == self.parts and bias is self.bias else QuantizedExperts(parts, bias)

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Tensors by name, without copies: `gate.codes`, `gate.scales`, `gate.biases`, `gate.table`, ..., `bias`."""
        state = {
            f"{prefix}{name}.{buffer}": getattr(part, buffer) for name, part in self.parts.items() for buffer in BUFFERS
        }
        return state if self.bias is None else {**state, f"{prefix}bias": self.bias}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "") -> QuantizedExperts:
        """From what `state_dict` gave, without copies. Every record of the tables is checked against the buffers."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state is of type {type(state).__name__}; it must be a mapping of names to tensors")
        found = [
            key[len(prefix) : -len(".table")] for key in state if key.startswith(prefix) and key.endswith(".table")
        ]
        names = tuple(name for name in ("weight", *GATE_UP) if name in found)
        if not names:
            raise ValueError(
                f"no tensor '{prefix}weight.table' or '{prefix}gate.table': these are no quantised experts"
            )
        parts = {}
        for name in names:
            missing = [key for key in BUFFERS if f"{prefix}{name}.{key}" not in state]
            if missing:
                raise ValueError(f"the tensor '{prefix}{name}.{missing[0]}' is missing")
            parts[name] = Part(*(state[f"{prefix}{name}.{key}"] for key in BUFFERS), what=f"{prefix}{name}")
        return cls(parts, state.get(f"{prefix}bias"))

    def save(self, path: str | os.PathLike, prefix: str = "") -> None:
        """Writes a safetensors file, straight from the buffers; tensors begin at multiples of 64 bytes."""
        save_safetensors(path, self.state_dict(prefix), {"format": "metal_moe"})

    @classmethod
    def load(cls, path: str | os.PathLike, prefix: str = "") -> QuantizedExperts:
        """Reads what `save` wrote. CPU tensors map the file: pages are read when they are used."""
        with open_safetensors(path) as file:
            state = {name: file.get(name) for name in file.names() if name.startswith(prefix)}
        with checks.within(os.fspath(path)):
            return cls.from_state_dict(state, prefix)

    def __repr__(self) -> str:
        kinds = []
        for name, part in self.parts.items():
            counts: dict[str, int] = {}
            for settings in part.settings:
                counts[str(settings)] = counts.get(str(settings), 0) + 1
            several = len(counts) > 1
            kinds.append(f"{name}: " + ", ".join(f"{n} x {kind}" if several else kind for kind, n in counts.items()))
        return f"QuantizedExperts({list(self.shape)}, {'; '.join(kinds)}, {self.bits_per_weight:.3g} bits per weight)"


def _check(op: str, settings: Settings, rows: int, columns: int) -> None:
    with checks.within(op):
        _check_matrix(settings, rows, columns)


def _check_matrix(settings: Settings, rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"the matrix is [{rows}, {columns}]; it must have rows and columns")
    format_named(settings.format).check(settings, rows, columns)


def _check_encoded(op: str, experts: list[int], weights: Tensor, stack: Stack) -> None:
    """ValueError where scales are beyond what their type holds: weights would be NaN, or all zero."""
    settings = stack.settings
    dtype = SCALE_DTYPES.get(settings.scale_type)
    infinite = ~format_named(settings.format).is_finite(stack)
    zero = torch.zeros_like(infinite)
    if stack.scales.numel() and settings.scale_type != "e8m0":  # which has no 0
        scales = stack.scales if dtype is None else as_type(stack.scales, dtype)
        zero = ~(scales != 0).flatten(1).any(1) & (weights != 0).flatten(1).any(1)
    for place in (infinite | zero).nonzero().flatten().tolist():
        what, how = ("large", "scales or weights are not finite") if infinite[place] else ("small", "all scales are 0")
        largest = float(weights[place].abs().max())
        raise ValueError(
            f"{op}: expert {experts[place]} of w has values up to {largest:.3g}, too {what} for {settings}: {how} in "
            f"{settings.scale_type}"
        )


def _check_hessian(op: str, hessian: Tensor, experts: int, columns: int) -> None:
    if not isinstance(hessian, Tensor) or tuple(hessian.shape) not in ((columns, columns), (experts, columns, columns)):
        was = f"has shape {tuple(hessian.shape)}" if isinstance(hessian, Tensor) else f"is a {type(hessian).__name__}"
        size = f"{columns}, {columns}"
        raise ValueError(f"{op}: hessian {was}; it must be [{size}] or [{experts}, {size}]")


def _pairs(op: str, weight: object, *others: object) -> dict[str, list]:
    """Arguments of "weight" alone, or of "gate" and "up"."""
    if isinstance(weight, Tensor):
        return {"weight": [weight, *others]}
    for value in others:
        if isinstance(value, Tensor) or (
            isinstance(value, Sequence) and not isinstance(value, str) and len(value) != 2
        ):
            raise TypeError(f"{op}: weight is a pair, gate and up; so must the other tensors be, and lists of numbers")
    if not isinstance(weight, Sequence) or len(weight) != 2:
        raise TypeError(f"{op}: weight is of type {type(weight).__name__}; it must be a torch.Tensor or a pair of them")
    return {
        name: [
            value[i] if isinstance(value, Sequence) and not isinstance(value, str) else value
            for value in (weight, *others)
        ]
        for i, name in enumerate(GATE_UP)
    }


def _joined(bias: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    return bias if bias is None or isinstance(bias, Tensor) else torch.cat(list(bias), -1)


def _sides(op: str, w: Tensor | Mapping[str, Tensor], bits: object) -> dict[str, Tensor]:
    dtypes = (*SCALE_DTYPES.values(), torch.float64)
    if isinstance(w, Mapping):
        if set(w) != set(GATE_UP):
            raise ValueError(f"{op}: w has the keys {tuple(w)}; they must be {GATE_UP}")
        for name in GATE_UP:
            checks.tensor(op, f'w["{name}"]', w[name], dtypes, (None, None, None))
        return {name: w[name] for name in GATE_UP}
    checks.tensor(op, "w", w, dtypes, (None, None, None))
    if not isinstance(bits, Mapping):
        return {"weight": w}
    if set(bits) != set(GATE_UP):
        raise ValueError(f"{op}: bits has the keys {tuple(bits)}; they must be {GATE_UP}")
    if w.shape[1] % 2:
        raise ValueError(f"{op}: w has {w.shape[1]} rows; gate and up rows must be equally many")
    return dict(zip(GATE_UP, w.split(w.shape[1] // 2, 1), strict=True))


def _each(bits: float | Sequence[float] | None, experts: int) -> list[float | None]:
    if isinstance(bits, (Tensor, np.ndarray)):
        bits = bits.tolist()
    if isinstance(bits, Sequence) and not isinstance(bits, str):
        if len(bits) != experts:
            raise ValueError(f"bits has {len(bits)} entries; it must have {experts}, one per expert")
        return list(bits)
    return [bits] * experts

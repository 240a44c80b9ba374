"""One projection of all experts: flat buffers of bytes and a table that says where each matrix begins (`layout`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .checks import within
from .layout import (
    ALIGNMENT,
    CODEBOOKS,
    MAX_SIZE,
    RECORD,
    RECORD_WORDS,
    SCALE_DTYPES,
    SCALE_TYPES,
    Extent,
    Settings,
    Stack,
    format_named,
    numbers,
    round_up,
)


class Part:
    """One projection of all experts: three flat uint8 buffers and a table. See the module's text.

    Its attributes do not change: what was made of a part for kernels stays true.
    """

    def __init__(self, codes: Tensor, scales: Tensor, biases: Tensor, table: Tensor, what: str = "part") -> None:
        self.codes, self.scales, self.biases = codes, scales, biases
        for name, buffer in {**self.buffers(), "table": table}.items():
            if not isinstance(buffer, Tensor):
                raise TypeError(f"{what}.{name} is of type {type(buffer).__name__}; it must be a torch.Tensor")
        if table.is_meta:
            raise ValueError(f"{what}.table is on the meta device; it must have values")
        for name, buffer in self.buffers().items():
            if buffer.dtype != torch.uint8 or buffer.ndim != 1 or not buffer.is_contiguous():
                raise ValueError(f"{what}.{name} is {buffer.dtype} {tuple(buffer.shape)}; it must be flat uint8")
            if buffer.device != table.device:
                raise ValueError(f"{what}.{name} is on {buffer.device}; it must be on {table.device}, as the table is")
        if table.dtype != torch.int32 or table.ndim != 2 or table.shape[1] != RECORD_WORDS or not len(table):
            raise ValueError(
                f"{what}.table is {table.dtype} {tuple(table.shape)}; it must be int32 [E, {RECORD_WORDS}] with E >= 1"
            )
        # A copy: what was checked must not change with a file that is mapped, or under a caller's hands.
        self.table = table.clone(memory_format=torch.contiguous_format)
        self.records = self.table.cpu().numpy().view(RECORD)[:, 0]
        self.settings: list[Settings] = []
        _check_records(self, what)
        self.rows, self.columns = int(self.records[0]["rows"]), int(self.records[0]["columns"])

    def __setattr__(self, name: str, value: object) -> None:
        if name in self.__dict__:
            raise AttributeError(f"Part.{name} does not change; make another part")
        super().__setattr__(name, value)

    @property
    def num_experts(self) -> int:
        return len(self.records)

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.buffers().values(), self.table))

    def buffers(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "scales": self.scales, "biases": self.biases}

    def to(self, device: torch.device | str) -> Part:
        return Part(*(t.to(device) for t in (self.codes, self.scales, self.biases, self.table)))

    def aligned(self) -> Part:
        """Itself, or with the buffers copied whose address is not a multiple of 16."""
        buffers = [b.clone() if b.data_ptr() % ALIGNMENT else b for b in self.buffers().values()]
        copied = any(new is not old for new, old in zip(buffers, self.buffers().values(), strict=True))
        return Part(*buffers, self.table) if copied else self

    def stack(self, experts: list[int]) -> Stack:
        """Views of matrices with equal settings, without a copy for a single one or for evenly spaced ones."""
        first = self.records[experts[0]]
        settings = self.settings[experts[0]]
        extents = format_named(settings.format).extents(settings, self.rows, self.columns)

        def views(buffer: Tensor, name: str, stride: int, extent: Extent) -> Tensor:
            offsets = [int(self.records[expert][name]) for expert in experts]
            steps = {b - a for a, b in zip(offsets, offsets[1:], strict=False)}
            shape = (extent.rows, extent.row_bytes)
            if not extent.rows:
                return buffer.new_empty(len(experts), *shape)
            if len(steps) <= 1 and min(steps, default=0) >= 0:
                step = steps.pop() if steps else 0
                return buffer.as_strided(
                    (len(experts), *shape), (step, stride, 1), buffer.storage_offset() + offsets[0]
                )
            return torch.stack([buffer.as_strided(shape, (stride, 1), buffer.storage_offset() + o) for o in offsets])

        codes = views(self.codes, "codes", int(first["codes_stride"]), extents[0])
        scales = views(self.scales, "scales", int(first["scales_stride"]), extents[1])
        biases = None
        if extents[2].rows:
            biases = views(self.biases, "biases", int(first["scales_stride"]), extents[2])
        return Stack(settings, self.rows, self.columns, codes, scales, biases)

    def groups(self) -> Iterator[list[int]]:
        """Experts with equal settings and strides."""
        together: dict[tuple, list[int]] = {}
        for expert, record in enumerate(self.records):
            key = (self.settings[expert], int(record["codes_stride"]), int(record["scales_stride"]))
            together.setdefault(key, []).append(expert)
        yield from together.values()

    def dequantize(self, experts: list[int] | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[E, rows, columns], or those of some experts, in their order."""
        wanted = list(range(self.num_experts)) if experts is None else experts
        if out is None:
            out = torch.empty(len(wanted), self.rows, self.columns, dtype=dtype, device=self.device)
        where = {}
        for place, expert in enumerate(wanted):
            where.setdefault(expert, []).append(place)
        # As many matrices at a time as keep temporaries of the decoders around 64 MiB.
        batch = max(1, (1 << 24) // (self.rows * self.columns))
        for group in self.groups():
            members = [expert for expert in group if expert in where]
            for begin in range(0, len(members), batch):
                some = members[begin : begin + batch]
                stack = self.stack(some)
                decoded = format_named(stack.settings.format).decode(stack, dtype)
                for index, expert in enumerate(some):
                    for place in where[expert]:
                        out[place] = decoded[index]
        return out

    def take_rows(self, start: int, count: int, step: int) -> Part:
        """The part of rows start, start + step, ..., sharing the buffers."""
        if count < 1 or start + (count - 1) * step >= self.rows:
            raise ValueError(f"rows {start}, {start + step}, ... ({count} of them) of a part of {self.rows} rows")
        records = self.records.copy()
        for record, settings in zip(records, self.settings, strict=True):
            format_named(settings.format).take_rows(record, settings, start, count, step)
        return Part(self.codes, self.scales, self.biases, table_tensor(records, self.device))


def table_tensor(records: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(records.view("<i4").reshape(len(records), RECORD_WORDS).copy()).to(device)


def _check_records(part: Part, what: str) -> None:
    """Every record describes a matrix that lies within the buffers: a kernel that follows it stays inside."""
    known_numbers = numbers()
    bytes_of_codes = 0
    first = part.records[0]
    for expert, record in enumerate(part.records):
        where = f"{what}.table, expert {expert}"
        known = known_numbers.get(int(record["format"]))
        if known is None:
            raise ValueError(f"{where}: format is {record['format']}; it must be one of {sorted(known_numbers)}")
        for name, limit in (("scale_type", len(SCALE_TYPES)), ("codebook", len(CODEBOOKS))):
            if record[name] >= limit:
                raise ValueError(f"{where}: {name} is {record[name]}; it must be below {limit}")
        rows, columns = int(record["rows"]), int(record["columns"])
        if not (1 <= rows <= MAX_SIZE and 1 <= columns <= MAX_SIZE):
            raise ValueError(f"{where}: the matrix is [{rows}, {columns}]; sizes must be from 1 to {MAX_SIZE}")
        if (rows, columns) != (int(first["rows"]), int(first["columns"])):
            raise ValueError(
                f"{where}: the matrix is [{rows}, {columns}], that of expert 0 "
                f"[{first['rows']}, {first['columns']}]; they must be equal"
            )
        with within(where):
            settings = Settings(
                known.NAME,
                int(record["half_bits"]) / 2,
                int(record["group_size"]),
                SCALE_TYPES[record["scale_type"]],
                CODEBOOKS[record["codebook"]],
            )
            known.check(settings, rows, columns)
        extents = known.extents(settings, rows, columns)
        strides = (int(record["codes_stride"]), int(record["scales_stride"]), int(record["scales_stride"]))
        element = SCALE_DTYPES[settings.scale_type].itemsize if settings.scale_type in SCALE_DTYPES else 1
        # Dense rows begin at any element.
        aligned = (element if settings.format == "dense" else 4, element, element)
        for (name, buffer), extent, stride, unit in zip(part.buffers().items(), extents, strides, aligned, strict=True):
            begin = int(record[name])
            if not extent.rows:
                if begin:
                    raise ValueError(f"{where}: {name} begins at byte {begin}; {known.NAME} has none: it must be 0")
                continue
            end = begin + (extent.rows - 1) * stride + extent.row_bytes
            if extent.rows > 1 and stride < extent.row_bytes:
                raise ValueError(
                    f"{where}: rows of {name} are {stride} bytes apart; it must be {extent.row_bytes} or more"
                )
            if begin % unit or stride % unit:
                raise ValueError(
                    f"{where}: {name} begins at byte {begin}, stride {stride}; both must be multiples of {unit}"
                )
            if end > buffer.numel():
                raise ValueError(f"{where}: {name} ends at byte {end} of {buffer.numel()}")
        part.settings.append(settings)
        bytes_of_codes += extents[0].rows * extents[0].row_bytes
    if bytes_of_codes > part.codes.numel():
        raise ValueError(
            f"{what}.table: the experts' codes take {bytes_of_codes} bytes of {part.codes.numel()}: they overlap"
        )


def _flat(tensor: Tensor, extent: Extent) -> tuple[Tensor, int, int] | None:
    """[n, rows, row bytes] as a flat buffer with strides between matrices and rows; None where it must be copied.

    A buffer is whole multiples of 16 bytes, so that in a file of several all begin at such.
    """
    n = tensor.shape[0]
    if extent.rows == 1:
        row = extent.row_bytes
    else:
        row = tensor.stride(1)
    step = tensor.stride(0) if n > 1 else extent.rows * row
    dense = tensor.is_contiguous()
    if not dense or step % ALIGNMENT:
        return None
    return tensor.reshape(-1), step, row


def make_part(stacks: list[tuple[list[int], Stack]]) -> Part:
    """The part of all experts from stacks of some, each with the experts that its matrices belong to.

    One stack of all experts in order is wrapped without a copy if its matrices begin at multiples of 16 bytes.
    """
    experts = sum(len(members) for members, _ in stacks)
    assert sorted(expert for members, _ in stacks for expert in members) == list(range(experts))
    rows, columns = stacks[0][1].rows, stacks[0][1].columns
    device = stacks[0][1].codes.device
    records = np.zeros(experts, RECORD)
    for members, stack in stacks:
        settings = stack.settings
        for expert in members:
            record = records[expert]
            record["format"] = format_named(settings.format).NUMBER
            record["half_bits"] = round(2 * settings.bits)
            record["group_size"] = settings.group_size
            record["codebook"] = CODEBOOKS.index(settings.codebook)
            record["scale_type"] = SCALE_TYPES.index(settings.scale_type)
            record["rows"], record["columns"] = rows, columns
    buffers = []
    for index, name in enumerate(("codes", "scales", "biases")):
        extents = [format_named(s.settings.format).extents(s.settings, rows, columns)[index] for _, s in stacks]
        tensors = [getattr(stack, name) for _, stack in stacks]
        stride_name = "codes_stride" if name == "codes" else "scales_stride"
        whole = stacks[0][0] == list(range(experts)) and tensors[0] is not None
        wrapped = _flat(tensors[0], extents[0]) if whole else None
        if wrapped is not None:
            buffer, step, row = wrapped
            records[name] = np.arange(experts, dtype=np.uint64) * np.uint64(step)
            if extents[0].rows > 1 or name == "codes":
                records[stride_name] = row
            buffers.append(buffer)
            continue
        sizes = np.zeros(experts, np.int64)
        for (members, _), extent in zip(stacks, extents, strict=True):
            sizes[members] = round_up(extent.rows * extent.row_bytes, ALIGNMENT)
        starts = np.concatenate([[0], np.cumsum(sizes)])
        buffer = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=device)
        records[name] = starts[:-1]
        for (members, _), extent, tensor in zip(stacks, extents, tensors, strict=True):
            if not extent.rows:
                records[name][members] = 0
                continue
            size = extent.rows * extent.row_bytes
            for place, expert in enumerate(members):
                begin = int(starts[expert])
                buffer[begin : begin + size].view(extent.rows, extent.row_bytes).copy_(tensor[place])
                if extent.rows > 1 or name == "codes":
                    records[stride_name][expert] = extent.row_bytes
        buffers.append(buffer)
    return Part(*buffers, table_tensor(records, device))

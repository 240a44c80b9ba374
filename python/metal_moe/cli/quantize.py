"""Quantises the experts of a checkpoint, layer by layer, and reports the errors of every projection and expert.

The folder appears when it is complete. What was stopped goes on where it was when the same command is given again.
"""

import argparse
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..formats import Checkpoint, ExpertReader, LayerExperts, QuantizedExperts
from ..formats.calibration import ACTIVATIONS, input_hessian, intermediate
from ..formats.checkpoint import INDEX
from ..formats.checks import within
from ..formats.errors import ProjectionErrors, projection_errors
from ..formats.layout import CODEBOOKS, Format
from ..formats.safetensors_file import save_safetensors
from ..formats.shared_experts import GATE_OF_ALL
from ..formats.trellis_quantizer import search
from ..formats.whole_file import write_json
from .output_folder import OutputFolder
from .plot import log_chart
from .text import DTYPES, Bar, Progress, gigabytes, table

NAME = "quantize"
HELP = "quantise the experts of a checkpoint, shared ones too; errors by layer"

REPORT = "quantization_report.json"
PROJECTIONS = ("gate", "up", "down")
# Tiles between two looks at the progress: about a second on a CPU, and enough to fill a GPU.
TILES = {"cpu": 64, "cuda": 1024}
# Of the Hessians of down that are held at a time, 128 MiB and a few temporaries of that size; at least one expert's.
HESSIAN_ELEMENTS = 1 << 25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a folder or safetensors file: dense, EXL3, MLX or gpt-oss")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the experts and the report")
    parser.add_argument("--prefix", default="", help="of the tensors' names, where the checkpoint has several models")
    parser.add_argument("--format", choices=sorted(Format.registry), default="trellis", help="(default: trellis)")
    parser.add_argument("--bits", type=float, help="bits of a weight (default: 4, or what the format has)")
    for projection in PROJECTIONS:
        parser.add_argument(f"--{projection}-bits", type=float, metavar="BITS", help=f"of {projection}, if others")
    parser.add_argument(
        "--expert-bits",
        type=_expert_bits,
        action="append",
        default=[],
        metavar="EXPERT=BITS",
        help="bits of one expert",
    )
    shared = parser.add_mutually_exclusive_group()
    shared.add_argument("--shared-bits", type=float, metavar="BITS", help="of shared experts, if others")
    shared.add_argument("--keep-shared", action="store_true", help="write shared experts as they are")
    parser.add_argument("--group-size", type=int, help="affine: 32, 64 or 128 (default: 64)")
    parser.add_argument(
        "--scale-dtype", choices=DTYPES, help="affine: of scales (default: the checkpoint's; bf16 if that is quantised)"
    )
    parser.add_argument("--codebook", choices=CODEBOOKS, help="trellis (default: mul1)")
    parser.add_argument("--layers", type=_layers, help='for instance "0,3-5" (default: all)')
    parser.add_argument(
        "--calibration",
        type=Path,
        help="trellis: safetensors with inputs [T, H] of each layer's experts, named as the tensors beside them: "
        "model.layers.3.mlp.hidden_states",
    )
    parser.add_argument(
        "--activation",
        choices=[*ACTIVATIONS, "swiglu_clamp"],
        help="between gate and down, for calibration (default: silu, gpt-oss's for its files)",
    )
    parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda (default: cpu)")
    parser.add_argument("--seed", type=int, default=0, help="trellis: of the random signs (default: 0)")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="draw the errors by layer")


def run(options: argparse.Namespace, progress: Progress) -> dict:
    known = Format.registry[options.format]
    if options.calibration and "hessian" not in known.ENCODE_OPTIONS:
        raise ValueError(f"--calibration is given; {options.format} makes no use of it")
    for given, name in ((options.codebook, "codebook"), (options.scale_dtype, "scale_dtype")):
        if given and name not in known.SETTINGS_OPTIONS:
            raise ValueError(f"--{name.replace('_', '-')} is given; {options.format} has none")
    device = torch.device(options.device)
    if device.type not in TILES or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {options.device}; it must be cpu, or cuda where there is one")
    if not 0 <= options.seed < 1 << 63:
        raise ValueError(f"--seed is {options.seed}; it must be from 0 to {(1 << 63) - 1}")
    if options.plot and not options.plot.absolute().parent.is_dir():
        raise ValueError(f"--plot: there is no folder {options.plot.absolute().parent}")
    output = OutputFolder(options.output, _decisive(options))
    with ExpertReader(options.checkpoint, options.prefix) as reader:
        layers = options.layers or reader.layers
        unknown = sorted(set(layers) - set(reader.layers))
        if unknown:
            raise ValueError(
                f"--layers names {unknown[0]}; layers with experts are {reader.layers[0]} to {reader.layers[-1]}"
            )
        if options.shared_bits is not None and not any(reader.shared_tensors(layer) for layer in layers):
            raise ValueError("--shared-bits is given; there are no shared experts")
        calibration = Checkpoint(options.calibration) if options.calibration else None
        for layer in layers if calibration else ():
            calibration.where(_name_of_inputs(reader.block(layer)))
        try:
            for index in range(len(output.steps), len(layers)):
                output.add(_write_layer(reader, index, layers, calibration, options, device, output, progress))
        except BaseException:
            if output.steps:
                progress.note(
                    f"{len(output.steps)} of {len(layers)} layers are in {output.unfinished}; the same command goes on "
                    "from there"
                )
            output.discard_if_empty()
            raise
        config = reader.checkpoint.config
    reports = [step["report"] for step in output.steps]
    total = sum(report["bytes"] for report in reports)
    weight_map = {name: step["file"] for step in output.steps for name in step["tensors"]}
    if config:
        write_json(output.file("config.json"), config)
    result = {
        "checkpoint": str(options.checkpoint),
        "output": str(options.output),
        "format": options.format,
        "calibrated": options.calibration is not None,
        "bytes": total,
        "seconds": sum(report["seconds"] for report in reports),
        "layers": reports,
    }
    write_json(output.file(REPORT), result)
    write_json(output.file(INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})
    output.finish()
    if options.plot:
        options.plot.write_text(_plot(result))
    return result


def _decisive(options: argparse.Namespace) -> dict:
    """What the files depend on."""
    others = ("command", "module", "json", "output", "plot", "device")
    decisive = {name: value for name, value in vars(options).items() if name not in others}
    return decisive | {"checkpoint": options.checkpoint.resolve()}


def _write_layer(
    reader: ExpertReader,
    index: int,
    layers: list[int],
    calibration: Checkpoint | None,
    options: argparse.Namespace,
    device: torch.device,
    output: OutputFolder,
    progress: Progress,
) -> dict:
    """The file, its tensors' names and the report of layer layers[index]."""
    begin = time.perf_counter()
    layer = layers[index]
    bar = Bar(progress, f"layer {layer} ({index + 1} of {len(layers)})")
    quantised, report = _quantize_layer(reader.read(layer), calibration, options, device, bar)
    file = f"model-{index + 1:05}-of-{len(layers):05}.safetensors"
    state = {
        name: t
        for target, each in quantised.items()
        for name, t in each.state_dict(f"{report['block']}{target}.").items()
    } | _kept(reader, layer, options.keep_shared)
    save_safetensors(output.file(file), state, {"format": "metal_moe"})
    size = sum(tensor.nbytes for tensor in state.values())
    report |= {"bytes": size, "seconds": time.perf_counter() - begin}
    return {"file": file, "tensors": list(state), "report": report}


def render(result: dict) -> str:
    rows = []
    for layer in result["layers"]:
        for errors in layer["projections"]:
            mse = errors["relative_mse"]
            worst = max(range(len(mse)), key=mse.__getitem__)
            output = errors["relative_output_mse"]
            bits = sorted(set(errors["bits"]))
            rows.append(
                [
                    layer["layer"],
                    errors["projection"],
                    f"{bits[0]:g}" if len(bits) == 1 else f"{bits[0]:g} to {bits[-1]:g}",
                    f"{sum(mse) / len(mse):.3g}",
                    f"{mse[worst]:.3g}",
                    worst,
                    f"{sum(output) / len(output):.3g}" if output else "-",
                ]
            )
    headings = ["layer", "projection", "bits", "relative MSE", "worst", "of expert", "of outputs"]
    weights = sum(layer["weights"] for layer in result["layers"])
    count = len(result["layers"])
    size = f"{gigabytes(result['bytes'])}, {8 * result['bytes'] / weights:.3g} bits per weight with tables and paddings"
    done = f"{count} layer{'s' if count > 1 else ''}, {size}, {result['seconds']:.1f} s"
    return f"{table(headings, rows)}\n\n{done}; every expert is in {result['output']}/{REPORT}"


def _expert_bits(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)=(\d+(?:\.5)?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 7=8: an expert and its bits")
    return int(match[1]), float(match[2])


def _layers(text: str) -> list[int]:
    found: set[int] = set()
    for piece in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", piece)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is not of the form 0,3-5")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(found)


def _dense(experts: LayerExperts) -> dict[str, Tensor]:
    """Gate, up [E, I, H] and down [E, H, I], and the biases "gate_bias", ... where there are some."""

    def weights(of: QuantizedExperts | Tensor) -> Tensor:
        return of.dequantize() if isinstance(of, QuantizedExperts) else of

    def halves(of: Tensor) -> tuple[Tensor, Tensor]:
        return (of[:, 0::2], of[:, 1::2]) if experts.interleaved else of.split(of.shape[1] // 2, 1)

    gate, up = halves(weights(experts.w1))
    dense = {"gate": gate, "up": up, "down": weights(experts.w2)}
    for of, bias, names in (
        (experts.w1, experts.w1_bias, ("gate_bias", "up_bias")),
        (experts.w2, experts.w2_bias, ("down_bias",)),
    ):
        bias = of.bias if isinstance(of, QuantizedExperts) else bias
        if bias is not None:
            dense |= dict(zip(names, halves(bias) if len(names) == 2 else (bias,), strict=True))
    if experts.routing_scale != 1:  # what is written has none: the weights of up have it back
        dense |= {name: dense[name] * experts.routing_scale for name in ("up", "up_bias") if name in dense}
    return dense


def _shared(experts: LayerExperts) -> LayerExperts:
    """The shared experts as experts of their own, which see the same inputs."""
    return replace(
        experts,
        w1=experts.shared_w1,
        w2=experts.shared_w2,
        w1_bias=None,
        w2_bias=None,
        interleaved=False,
        routing_scale=1.0,
    )


def _kept(reader: ExpertReader, layer: int, keep_shared: bool) -> dict[str, Tensor]:
    """What of a layer is written unchanged: shared experts if wanted, and otherwise what weighs them."""
    if keep_shared:
        return reader.shared_tensors(layer)
    return {name: tensor for name, tensor in reader.shared_tensors(layer).items() if f".{GATE_OF_ALL}." in name}


@dataclass(frozen=True)
class _Task:
    """Experts of one kind in a layer, dense, and how they are to be quantised."""

    name: str
    """Of the tensors: "experts" or "shared_experts"."""
    label: str
    """In front of a projection in reports."""
    dense: dict[str, Tensor]
    bits: dict[str, list[float] | None]
    activation: str
    scale_dtype: torch.dtype

    @property
    def count(self) -> int:
        return self.dense["gate"].shape[0]

    def units(self, trellis: bool) -> int:
        """Steps of the bar: tiles of trellis weights, otherwise experts."""
        each = (self.dense[projection] for projection in PROJECTIONS)
        if not trellis:
            return len(PROJECTIONS) * self.count
        return sum(self.count * math.prod(128 * -(-size // 128) // 16 for size in of.shape[1:]) for of in each)


def _task(experts: LayerExperts, options: argparse.Namespace, shared: bool) -> _Task:
    dense = _dense(experts)
    scale_dtype = torch.bfloat16 if isinstance(experts.w1, QuantizedExperts) else experts.w1.dtype
    if options.scale_dtype:
        scale_dtype = DTYPES[options.scale_dtype]
    return _Task(
        "shared_experts" if shared else "experts",
        "shared " if shared else "",
        dense,
        _bits(options, dense["gate"].shape[0], shared),
        options.activation or ("swiglu_clamp" if experts.interleaved else "silu"),
        scale_dtype,
    )


def _quantize_layer(
    experts: LayerExperts, calibration: Checkpoint | None, options: argparse.Namespace, device: torch.device, bar: Bar
) -> tuple[dict[str, QuantizedExperts], dict]:
    """Experts by the name of their tensors ("experts.w1", ...), and the layer's report."""
    tasks = [_task(experts, options, False)]
    if experts.shared_w1 is not None and not options.keep_shared:
        tasks.append(_task(_shared(experts), options, True))
    hidden = tasks[0].dense["gate"].shape[2]
    inputs = None if calibration is None else _inputs(calibration, experts.block, hidden, device)
    bar.begin(sum(task.units(options.format == "trellis") for task in tasks))
    made: dict[str, QuantizedExperts] = {}
    errors: list[ProjectionErrors] = []
    for task in tasks:
        try:
            w1, w2, found = _quantize_experts(task, inputs, options, device, bar)
        except ValueError as error:
            keep = "; --keep-shared leaves them" if task.label else ""
            raise ValueError(f"layer {experts.layer}, {error}{keep}") from None
        made |= {f"{task.name}.w1": w1, f"{task.name}.w2": w2}
        errors += found
    weights = {name: of.shape.numel() for name, of in made.items()}
    report = {
        "layer": experts.layer,
        "block": experts.block,
        "source": experts.source,
        "experts": tasks[0].count,
        "shared_experts": tasks[1].count if len(tasks) > 1 else 0,
        "weights": sum(weights.values()),
        "bits_per_weight": sum(made[name].bits_per_weight * weights[name] for name in made) / sum(weights.values()),
        "projections": [asdict(each) for each in errors],
    }
    return made, report


def _quantize_experts(
    task: _Task, inputs: Tensor | None, options: argparse.Namespace, device: torch.device, bar: Bar
) -> tuple[QuantizedExperts, QuantizedExperts, list[ProjectionErrors]]:
    """w1 and w2, and the errors of gate, up and down."""
    dense, count, trellis = task.dense, task.count, options.format == "trellis"
    known = Format.registry[options.format]
    first = None if inputs is None else input_hessian(inputs)
    made: dict[str, QuantizedExperts] = {}
    errors: list[ProjectionErrors] = []
    for projection in PROJECTIONS:
        label = task.label + projection
        step = count
        if inputs is not None and projection == "down":
            step = max(1, HESSIAN_ELEMENTS // dense["down"].shape[2] ** 2)
        pieces, found = [], []
        for begin in range(0, count, step):
            some = range(begin, min(count, begin + step))
            weights = dense[projection][begin : begin + step].to(device)
            bits = task.bits[projection]
            hessian = first
            if inputs is not None and projection == "down":
                seen = [_seen(inputs, dense, expert, task.activation) for expert in some]
                hessian = torch.stack([input_hessian(each) for each in seen])
            where = label if step == count else f"{label}, experts {some[0]} to {some[-1]}"
            with within(where):
                quantised = QuantizedExperts.quantize(
                    weights,
                    format=options.format,
                    bits=None if bits is None else [bits[expert] for expert in some],
                    group_size=options.group_size,
                    hessian=hessian,
                    **({"codebook": options.codebook} if options.codebook else {}),
                    **({"scale_dtype": task.scale_dtype} if "scale_dtype" in known.SETTINGS_OPTIONS else {}),
                    **({"seed": options.seed, "walks": _counted(bar, label)} if trellis else {}),
                )
            if not trellis:
                bar.add(len(some), label)
            found.append(projection_errors(label, weights, quantised, hessian))
            pieces.append(quantised.to("cpu"))
        made[projection] = QuantizedExperts.cat(pieces) if len(pieces) > 1 else pieces[0]
        outputs = [value for each in found for value in each.relative_output_mse or ()]
        errors.append(
            ProjectionErrors(
                label,
                [value for each in found for value in each.bits],
                [value for each in found for value in each.relative_mse],
                outputs or None,
            )
        )
    biases = {name: dense[f"{name}_bias"].contiguous() for name in PROJECTIONS if f"{name}_bias" in dense}
    w1_bias = torch.cat([biases["gate"], biases["up"]], 1) if "gate" in biases else None
    w1 = QuantizedExperts({name: made[name].parts["weight"] for name in ("gate", "up")}, w1_bias)
    return w1, QuantizedExperts(made["down"].parts, biases.get("down")), errors


def _bits(options: argparse.Namespace, experts: int, shared: bool) -> dict[str, list[float] | None]:
    """Per projection and expert; None where the user left it to the format."""
    chosen = {}
    for projection in PROJECTIONS:
        own = getattr(options, f"{projection}_bits")
        bits = options.bits if own is None else own
        if shared:
            bits = bits if options.shared_bits is None else options.shared_bits
            chosen[projection] = None if bits is None else [bits] * experts
            continue
        if bits is None and options.expert_bits:
            raise ValueError("--expert-bits is given without --bits: name the other experts' bits too")
        chosen[projection] = None if bits is None else [bits] * experts
        for expert, exception in options.expert_bits:
            if expert >= experts:
                raise ValueError(f"--expert-bits names expert {expert}; the layer has {experts}")
            chosen[projection][expert] = exception
    return chosen


def _name_of_inputs(block: str) -> str:
    return f"{block}hidden_states"


def _inputs(calibration: Checkpoint, block: str, hidden: int, device: torch.device) -> Tensor:
    name = _name_of_inputs(block)
    inputs = calibration.get(name)
    if inputs.ndim != 2 or inputs.shape[1] != hidden or not inputs.shape[0] or not inputs.is_floating_point():
        raise ValueError(
            f"{calibration.where(name)}: {name} is {inputs.dtype} {tuple(inputs.shape)}; it must be float [T, {hidden}]"
        )
    inputs = inputs.to(device, torch.float32)
    if not torch.isfinite(inputs).all() or not inputs.any():
        raise ValueError(f"{calibration.where(name)}: {name} has infinite or NaN values, or zeros alone")
    return inputs


def _seen(inputs: Tensor, dense: dict[str, Tensor], expert: int, activation: str) -> Tensor:
    """Inputs of down."""
    gate, up = (dense[name][expert].to(inputs.device) for name in ("gate", "up"))
    bias = None
    if "gate_bias" in dense:
        bias = tuple(dense[name][expert].to(inputs.device) for name in ("gate_bias", "up_bias"))
    return intermediate(inputs, gate, up, bias, activation)


def _counted(bar: Bar, projection: str) -> Callable[[Tensor, float, str], Tensor]:
    """The search, some tiles at a time, telling the bar."""

    def walks(values: Tensor, bits: float, codebook: str) -> Tensor:
        found = []
        for some in values.split(TILES[values.device.type]):
            found.append(search(some, bits, codebook))
            bar.add(some.shape[0], projection)
        return torch.cat(found)

    return walks


def _plot(result: dict) -> str:
    layers = result["layers"]
    names = dict.fromkeys(errors["projection"] for layer in layers for errors in layer["projections"])
    series = {name: [None] * len(layers) for name in names}
    for place, layer in enumerate(layers):
        for errors in layer["projections"]:
            mse = errors["relative_mse"]
            series[errors["projection"]][place] = (min(mse), sum(mse) / len(mse), max(mse))
    title = f"{Path(result['checkpoint']).name}, {result['format']}: relative MSE, lowest to highest expert"
    return log_chart(title, "layer", "relative MSE", [layer["layer"] for layer in layers], series)

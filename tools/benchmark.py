"""Measures how fast LIT is, beside its peers, in one run on one machine; tools/plot_benchmark.py draws it.

    python tools/benchmark.py [--sections operator models attention dense growth input] [--output FOLDER]

operator  DTM's deformable sampling and product, against torchvision's operator and a plain 2x2 stride-2 convolution
models    inference and training step of whole models, against timm's of the same size and LIT on torchvision's operator
attention over maps of several sizes, the relative position bias looked up and as a tensor
dense     training step of the dense backbone at 800 x 1344
growth    inference against image size
input     the input pipeline of `classification/`, beside what a training step takes in

What is compared is timed by turns, so that a machine that slows down slows all of it; medians count, and their ratios,
printed last. A CPU works in float32; on a GPU, each call enters bfloat16 autocast, as a training step does. Memory is
what a call adds at its peak to what is held before. Writes DEVICE.json.
"""

import argparse
import gc
import json
import platform
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d
from tqdm import tqdm

from lit_backbone.dtm import autocast_dtype, deformable_sample, use_deform_conv
from lit_backbone.layers import biased_attention, flex_attention_with_bias
from lit_backbone.row_attention import RowAttention

DTM_SHAPES = ((96, 192, 56), (192, 384, 28), (384, 768, 14))  # of LIT-S at 224: channels in and out, side of the map
ORIGINAL = "lit_s, torchvision's operator"
PEERS = {  # of a size, in parameters and multiply-adds: ours, then others, Swin first
    "S": ("lit_s", "swin_tiny_patch4_window7_224", "lit_ti", "pvt_v2_b2", "convnext_tiny", "resnet50", ORIGINAL),
    "M": ("lit_m", "swin_small_patch4_window7_224", "pvt_v2_b4", "convnext_small", "resnet101"),
    "B": ("lit_b", "swin_base_patch4_window7_224", "pvt_v2_b5", "convnext_base", "resnet152"),
}
DENSE_SIZE = (800, 1344)
PHOTO_SIZE = (500, 375)  # width and height of the input's JPEG files, as most of ImageNet's
Calls = dict[str, Callable[[], object]]  # what is compared, by name


class Bench:
    """Times calls on a device and keeps what it found, also in a folder `output`, after each comparison."""

    def __init__(self, args: argparse.Namespace, output: Path | None = None):
        self.device = torch.device(args.device)
        self.repeats = args.repeats
        self.batch = args.batch_size or {"cpu": 8, "cuda": 256}[self.device.type]
        self.compile = args.compile
        self.output = output
        classes = args.classes or {"cpu": "S", "cuda": "SMB"}[self.device.type]
        self.groups = [args.models] if args.models else [PEERS[size] for size in classes]
        self.rows: list[dict[str, Any]] = []  # a measured thing each; `mib` is its peak, above what was held before
        self.ratios: dict[str, float] = {}

    def mebibytes(self, call: Callable[[], object]) -> float:
        call()  # compiles, and allocates an optimiser's state
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            call()
            return (torch.cuda.max_memory_allocated() - held) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        return max(accumulate((event.nbytes() for event in events), initial=0)) / 2**20

    def compare(self, section: str, what: str, calls: Calls, images: int = 0, threads: int = 0) -> dict[str, float]:
        """Time calls by turns; returns the median milliseconds of each by its name.

        Each turn begins with calls that do not count, for others have left the caches to themselves. Rows are kept, and
        ratios to the first call.
        """
        memory = {name: self.mebibytes(call) for name, call in tqdm(calls.items(), f"{what}: warm-up", leave=False)}
        timer = partial(Timer, "call()", num_threads=threads or torch.get_num_threads())
        turns = {name: [] for name in calls}
        for _ in tqdm(range(self.repeats), what, leave=False):
            for name, call in calls.items():
                turns[name].append(1e3 * timer(globals={"call": call}).blocked_autorange().median)
        medians = {name: statistics.median(times) for name, times in turns.items()}
        first = next(iter(calls))
        for name, ms in medians.items():
            found = dict(ms=ms, images_per_s=1e3 * images / ms or None, mib=memory[name])
            self.rows.append(dict(section=section, what=what, name=name, **found))
            tqdm.write(f"{section:8}  {what:36}  {name:40} {ms:9.2f} ms {memory[name]:8.1f} MiB")
            if name != first:
                self.ratios[f"{what}, time: {name} / {first}"] = ms / medians[first]
                self.ratios[f"{what}, memory: {name} / {first}"] = memory[name] / memory[first]
        self.write()
        return medians

    def write(self) -> None:
        if self.output:
            self.output.mkdir(parents=True, exist_ok=True)
            found = {"machine": machine(self), "rows": self.rows, "ratios": self.ratios}
            (self.output / f"{self.device.type}.json").write_text(json.dumps(found, indent=1) + "\n")


MERGINGS = {
    "ours": lambda x, offset, weight: F.conv2d(deformable_sample(x, offset, autocast_dtype(x)), weight, stride=2),
    "torchvision, float32": lambda x, offset, weight: deform_conv2d(x, offset, weight, stride=2),
    "plain convolution": lambda x, offset, weight: F.conv2d(x, weight, stride=2),
}


def bench_operator(bench: Bench) -> None:
    for in_chs, out_chs, side in DTM_SHAPES:
        offset = torch.randn(bench.batch, 8, side // 2, side // 2, device=bench.device)
        weight = torch.randn(out_chs, in_chs, 2, 2, device=bench.device)
        x = torch.randn(bench.batch, side, side, in_chs, device=bench.device).permute(0, 3, 1, 2)  # (B, C, H, W)
        inputs = dict.fromkeys(MERGINGS, (x, offset, weight))  # in float32, in which models keep tokens
        inputs["torchvision, float32"] = (x.contiguous(), offset, weight)  # what its operator is written for
        for steps in ("forward", "forward + backward"):
            calls = {}
            for name, merge in MERGINGS.items():
                own = [tensor.detach().requires_grad_(steps != "forward") for tensor in inputs[name]]
                calls[name] = partial(_run_operator, merge, own)
            bench.compare("operator", f"{steps}, {in_chs} x {side} x {side}", calls)


def _run_operator(merge: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    with autocast(inputs[0]):
        out = merge(*inputs)
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)  # a plain convolution has no offsets


def build_model(name: str, bench: Bench, **kwargs) -> nn.Module:
    model = timm.create_model("lit_s" if name == ORIGINAL else name, **kwargs)
    if name == ORIGINAL:
        use_deform_conv(model)
    return model.to(bench.device, memory_format=torch.channels_last)


def random_images(bench: Bench, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, device=bench.device).contiguous(memory_format=torch.channels_last)


def autocast(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda)


def infer(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode(), autocast(images):
        model(images)


def training_step(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward, cross-entropy, backward and AdamW on random images."""
    model.train()
    targets = torch.randint(model.num_classes, (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with autocast(images):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def multiply_adds(build: Callable[[], nn.Module], size: tuple[int, int] = (224, 224)) -> float:
    """Of one image; products only."""
    with torch.device("meta"):
        model = build().eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *size))
    return counter.get_total_flops() / 2


def bench_models(bench: Bench) -> None:
    images = random_images(bench, bench.batch, 224, 224)
    ways = ("eager", "compiled") if bench.compile else ("eager",)
    for names in bench.groups:
        for way in ways:
            calls = {name: partial(infer, model.eval(), images) for name, model in _models(bench, names, way).items()}
            bench.compare("models", f"inference at 224, {way}", calls, len(images))
        way = ways[-1] if bench.device.type == "cuda" else "eager"
        steps = {name: training_step(model, images) for name, model in _models(bench, names, way).items()}
        bench.compare("models", f"training step at 224, {way}", steps, len(images))


def _models(bench: Bench, names: Sequence[str], way: str) -> dict[str, nn.Module]:
    if way == "eager":
        return {name: build_model(name, bench) for name in names}
    torch.compiler.reset()
    own = [name for name in names if name != ORIGINAL]  # which could not be compiled
    return {f"{name}, compiled": torch.compile(build_model(name, bench)) for name in own}


def bench_attention(bench: Bench) -> None:
    """Forward and backward, 12 heads of 32 channels: where LARGE_MAP and LARGE_MAP_ON_GPU of layers.py should be."""
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    ways = {"bias looked up": flex_attention_with_bias if dtype == torch.bfloat16 else RowAttention.apply}
    ways["bias as a tensor"] = partial(_with_tensor, biased_attention)
    for side in (14, 24, 32, 45, 64):
        batch = max(1, bench.batch * 14**2 // side**2)
        q, k, v = torch.randn(3, batch, 12, side**2, 32, device=bench.device, dtype=dtype, requires_grad=True)
        table = torch.randn(1, 12, 2 * side - 1, 2 * side - 1, device=bench.device, requires_grad=True)
        calls = {name: partial(_run_attention, attend, (q, k, v, table), side) for name, attend in ways.items()}
        bench.compare("attention", f"attention, {batch} x {side} x {side}", calls)


def _with_tensor(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns where the bias of attention is a tensor."""
    set_fused_attn(False)
    result = function(*args)
    set_fused_attn(True)
    return result


def _run_attention(attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], side: int) -> None:
    out = attend(*inputs, side, side)
    torch.autograd.grad(out, inputs, torch.ones_like(out))


def bench_dense(bench: Bench) -> None:
    model = build_model("lit_s", bench, features_only=True, img_size=DENSE_SIZE).train()
    images = random_images(bench, 2 if bench.device.type == "cuda" else 1, *DENSE_SIZE)

    def step() -> None:
        with autocast(images):
            loss = sum(features.float().mean() for features in model(images))
        loss.backward()
        model.zero_grad(set_to_none=True)

    calls = {"bias looked up": step, "bias as a tensor": partial(_with_tensor, step)}
    bench.compare("dense", f"training step, {len(images)} x {DENSE_SIZE[0]} x {DENSE_SIZE[1]}", calls, len(images))


def bench_growth(bench: Bench) -> None:
    models = {name: build_model(name, bench).eval() for name in ("lit_s", "pvt_v2_b2", "resnet50")}
    for side in (224, 320, 448, 640, 768, 1024):
        calls = {name: partial(infer, model, random_images(bench, 1, side, side)) for name, model in models.items()}
        bench.compare("growth", f"1 x {side} x {side}", calls, 1)


def bench_input(bench: Bench) -> None:
    """Decoding and augmenting by the training recipe in one process, and how many of these a model keeps busy."""
    from sklearn.datasets import load_sample_images

    from lit_classification.config_file import load_config
    from lit_classification.datasets import build_dataset
    from lit_classification.sampler import SampleKey

    recipe = Path(__file__).parents[1] / "classification/configs/lit-s.yaml"
    with tempfile.TemporaryDirectory() as folder:
        for i, photograph in enumerate(load_sample_images().images):
            path = Path(folder, "train", str(i), "photo.jpg")
            path.parent.mkdir(parents=True)
            Image.fromarray(photograph).resize(PHOTO_SIZE).save(path, quality=95)
        dataset = build_dataset(load_config(recipe, ["MODEL.NUM_CLASSES", "2"], data_path=folder), is_training=True)
        epoch = [SampleKey(0, position, position % len(dataset)) for position in range(32)]
        load = {"1 worker": lambda: [dataset[key] for key in epoch]}
        ms = bench.compare("input", f"JPEG {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]}, augmented", load, len(epoch), threads=1)
    for step in [row for row in bench.rows if row["what"].startswith("training step at")][:1]:
        busy = step["images_per_s"] * 1e-3 * ms["1 worker"] / len(epoch)
        bench.ratios[f"workers that a training step of {step['name']} keeps busy"] = busy


SECTIONS = {"operator": bench_operator, "models": bench_models, "attention": bench_attention, "dense": bench_dense}
SECTIONS |= {"growth": bench_growth, "input": bench_input}


def machine(bench: Bench) -> dict[str, str | int]:
    """Where and with what the figures were measured."""
    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else (cpus or [platform.machine()])[0]
    settings = {"device": name, "threads": torch.get_num_threads(), "batch": bench.batch, "repeats": bench.repeats}
    return settings | {package.__name__: package.__version__ for package in (torch, torchvision, timm)}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast LIT is, beside its peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="what to measure (all)")
    parser.add_argument("--classes", choices=("S", "M", "B", "SM", "MB", "SMB"), help="of models (cpu: S, cuda: SMB)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="what `models` compares in place of a class")
    parser.add_argument("--batch-size", type=int, help="images of a call (cpu: 8, cuda: 256)")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each (%(default)s)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out compiled models")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    bench = Bench(args, args.output)
    for section in args.sections:
        SECTIONS[section](bench)
    bench.write()  # with the last ratios
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine(bench).items()))
    for name, ratio in bench.ratios.items():
        print(f"{ratio:8.2f}  {name}")


if __name__ == "__main__":
    main()

"""Measure the speed of LIT beside other models, in one run on one machine.

    python tools/benchmark.py [--sections operator models growth input] [--output DIRECTORY]

operator  DTM's sampling and matrix product, torchvision's deformable convolution and a plain 2x2 stride-2 convolution
models    inference and training step of LIT, of timm models of the same size and of LIT on torchvision's operator
growth    inference against image size
input     the input pipeline of `classification/`

The calls of a comparison take turns, so a machine that slows down slows all of them. The result is the median over
turns, and its ratio to the first call. GPUs compute under bfloat16 autocast, CPUs in float32, and models also in
bfloat16 if the CPU has it. Memory is the peak of a call on a GPU above what was allocated before. Writes DEVICE.json
and DEVICE.png. Needs `bash setup_env.sh --dev`.
"""

import json
import platform
import re
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d
from tqdm import tqdm

from lit_backbone.dtm import DeformableTokenMerging, autocast_dtype, deformable_sample
from lit_backbone.precision import autocast, cpu_has_bf16

DTM_SHAPES = ((96, 192, 56), (192, 384, 28), (384, 768, 14))  # LIT-S at 224: input and output channels, side
DEFORM_CONV = "lit_s, torchvision's operator"
MODELS = [  # groups of similar size; a CPU runs the first one
    ["lit_s", "swin_tiny_patch4_window7_224", "lit_ti", "pvt_v2_b2", "convnext_tiny", "resnet50", DEFORM_CONV],
    ["lit_m", "swin_small_patch4_window7_224", "pvt_v2_b4", "convnext_small", "resnet101"],
    ["lit_b", "swin_base_patch4_window7_224", "pvt_v2_b5", "convnext_base", "resnet152"],
]
JPEG_SIZE = (500, 375)  # width and height, typical of ImageNet
Calls = dict[str, Callable[[], object]]  # name: function to time


class Bench:
    """Time calls on a device and collect the results, also in a file after each comparison."""

    def __init__(self, args: Namespace):
        self.device, self.repeats, self.output = torch.device(args.device), args.repeats, args.output
        self.batch = args.batch_size or {"cpu": 8, "cuda": 256}[args.device]
        self.groups = [args.models] if args.models else MODELS[: {"cpu": 1, "cuda": 3}[args.device]]
        self.rows: list[dict[str, Any]] = []
        self.precisions = ["bf16"] if args.device == "cuda" else ["off", "bf16"] if cpu_has_bf16() else ["off"]

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """Return the peak memory of the second call. The first one compiles and creates optimizer states."""
        call()
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - allocated) / 2**20

    def compare(self, section: str, what: str, calls: Calls, images: int = 0, threads: int = 0) -> dict[str, float]:
        """Time calls in turns and return the median milliseconds by name."""
        memory = {name: self.peak_mib(call) for name, call in tqdm(calls.items(), f"{what}: warm-up", leave=False)}
        timer = partial(Timer, "call()", num_threads=threads or torch.get_num_threads())
        turns = {name: [] for name in calls}
        for _ in tqdm(range(self.repeats), what, leave=False):
            for name, call in calls.items():
                turns[name].append(1e3 * timer(globals={"call": call}).blocked_autorange().median)
        medians = {name: median(times) for name, times in turns.items()}
        for name, ms in medians.items():
            ratio = ms / next(iter(medians.values()))
            row = dict(section=section, what=what, name=name, ms=ms, ratio=ratio, mib=memory[name])
            self.rows.append(row | dict(images_per_s=1e3 * images / ms))
            mib = "" if memory[name] is None else f" {memory[name]:8.1f} MiB"
            tqdm.write(f"{section:8}  {what:34}  {name:38} {ms:9.2f} ms {ratio:6.2f} x{mib}")
        self.output.mkdir(parents=True, exist_ok=True)
        results = {"machine": self.machine(), "rows": self.rows}
        (self.output / f"{self.device.type}.json").write_text(json.dumps(results, indent=1) + "\n")
        return medians

    def machine(self) -> dict[str, str | int]:
        """Describe the device, the settings and the package versions."""
        cpuinfo = Path("/proc/cpuinfo")
        cpus = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else (cpus or [platform.machine()])[0]
        settings = {"device": name, "threads": torch.get_num_threads(), "batch": self.batch, "repeats": self.repeats}
        return settings | {package.__name__: package.__version__ for package in (torch, torchvision, timm)}


def random_images(bench: Bench, batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    images = torch.randn(batch, channels, height, width, device=bench.device)
    return images.contiguous(memory_format=torch.channels_last)


def forward_with_deform_conv(dtm: DeformableTokenMerging, x: Tensor) -> Tensor:
    """Compute DTM with torchvision's operator in float32, as the original does."""
    x = x.permute(0, 3, 1, 2).contiguous()  # (B, H, W, C) -> (B, C, H, W)
    x = deform_conv2d(x.float(), dtm.offset(x), dtm.proj.weight, dtm.proj.bias, stride=2)
    return dtm.act(dtm.norm(x)).permute(0, 2, 3, 1).contiguous()  # -> (B, H/2, W/2, C')


def build_model(name: str, bench: Bench, **kwargs) -> nn.Module:
    model = timm.create_model("lit_s" if name == DEFORM_CONV else name, **kwargs)
    for module in model.modules() if name == DEFORM_CONV else ():
        if isinstance(module, DeformableTokenMerging):
            module.forward = partial(forward_with_deform_conv, module)
    return model.to(bench.device, memory_format=torch.channels_last)


def infer(model: nn.Module, images: Tensor, precision: str) -> None:
    with torch.inference_mode(), autocast(precision, images.device):
        model(images)


def training_step(model: nn.Module, images: Tensor, precision: str) -> Callable[[], None]:
    """Return a function that runs forward, cross-entropy, backward and AdamW."""
    model.train()
    targets = torch.randint(model.num_classes, (len(images),), device=images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with autocast(precision, images.device):
            loss = F.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def multiply_adds(build: Callable[[], nn.Module], size: tuple[int, int] = (224, 224)) -> float:
    """Count the multiply-adds of matrix products and convolutions for one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build().eval()(torch.empty(1, 3, *size))
    return counter.get_total_flops() / 2


MERGINGS = {
    "lit_backbone": lambda x, offset, w: F.conv2d(deformable_sample(x, offset, autocast_dtype(x)), w, stride=2),
    "torchvision, float32": lambda x, offset, w: deform_conv2d(x, offset, w, stride=2),
    "plain convolution": lambda x, offset, w: F.conv2d(x, w, stride=2),
}


def run_operator(merge: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Run the forward pass and, if the inputs require gradients, the backward pass."""
    with autocast("auto", inputs[0].device):
        out = merge(*inputs)
    if out.requires_grad:
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)


def bench_operator(bench: Bench) -> None:
    for in_chs, out_chs, side in DTM_SHAPES:
        x = random_images(bench, bench.batch, side, side, in_chs)
        offset = torch.randn(bench.batch, 8, side // 2, side // 2, device=bench.device)
        weight = torch.randn(out_chs, in_chs, 2, 2, device=bench.device)
        for backward, what in enumerate(("forward", "forward + backward")):
            calls = {}
            for name, merge in MERGINGS.items():
                layout = x.contiguous() if "torchvision" in name else x  # its kernel needs channels first
                leaves = [tensor.detach().requires_grad_(bool(backward)) for tensor in (layout, offset, weight)]
                calls[name] = partial(run_operator, merge, leaves)
            bench.compare("operator", f"{what}, {in_chs} x {side} x {side}", calls)


def bench_models(bench: Bench) -> None:
    images = random_images(bench, bench.batch, 224, 224)
    for names in bench.groups:
        for compiled in (False, True):
            models = {name: build_model(name, bench) for name in names if not (compiled and name == DEFORM_CONV)}
            torch.compiler.reset()
            if compiled:
                models = {f"{name}, compiled": torch.compile(model) for name, model in models.items()}
            for precision in bench.precisions:
                mode = ("compiled" if compiled else "eager") + (", float32" if precision == "off" else ", bfloat16")
                calls = {name: partial(infer, model.eval(), images, precision) for name, model in models.items()}
                bench.compare("models", f"inference at 224, {mode}", calls, len(images))
                if compiled == (bench.device.type == "cuda"):
                    calls = {name: training_step(model, images, precision) for name, model in models.items()}
                    bench.compare("models", f"training step at 224, {mode}", calls, len(images))


def bench_growth(bench: Bench) -> None:
    models = {name: build_model(name, bench).eval() for name in ("lit_s", "pvt_v2_b2", "resnet50")}
    for side in (224, 320, 448, 640, 768, 1024):
        images, precision = random_images(bench, 1, side, side), bench.precisions[0]
        calls = {name: partial(infer, model, images, precision) for name, model in models.items()}
        bench.compare("growth", f"one image, {side} x {side}", calls)


def bench_input(bench: Bench) -> None:
    """Time a loader of one worker, and one that also normalizes and erases, as the training loop does on its device."""
    from sklearn.datasets import load_sample_images

    from lit_classification.config_reader import load_config
    from lit_classification.data import SeededImages, build_dataset
    from lit_classification.distributed import Ranks
    from lit_classification.engine import build_erasing, to_device
    from lit_classification.sampler import SampleKey

    class FloatImages(SeededImages):
        def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int]:
            image, label = super().__getitem__(key)
            return erase(to_device((image[None], torch.zeros(0)), config, ranks)[0])[0], label

    path = Path(__file__).parents[1] / "classification/configs/lit-s.yaml"
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(load_sample_images().images):
            Path(folder, "train", str(i)).mkdir(parents=True)
            Image.fromarray(image).resize(JPEG_SIZE).save(f"{folder}/train/{i}/image.jpg", quality=95)
        config, ranks = load_config(path, data_path=folder), Ranks(0, 1, torch.device("cpu"))
        dataset, erase = build_dataset(config, is_training=True), build_erasing(config, ranks)
        datasets = {"uint8": dataset, "float32": FloatImages(dataset.dataset, dataset.transform, dataset.seed)}
        keys = [SampleKey(0, i, i % len(dataset)) for i in range(128)]
        options: dict[str, Any] = dict(batch_size=32, sampler=keys, num_workers=1, persistent_workers=True)
        loaders = {f"{name}, 1 worker": DataLoader(images, **options) for name, images in datasets.items()}
        calls = {name: partial(deque, loader, maxlen=0) for name, loader in loaders.items()}
        bench.compare("input", "JPEG {} x {}, augmented".format(*JPEG_SIZE), calls, len(keys), threads=1)


SECTIONS = {"operator": bench_operator, "models": bench_models, "growth": bench_growth, "input": bench_input}


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Draw the bars of each comparison in a panel, and inference against image size in one."""
    rows = [row for row in rows if not row["what"].startswith("forward,")]  # training counts
    growth = [row for row in rows if row["section"] == "growth"]
    panels = list(dict.fromkeys(row["what"] for row in rows if row["section"] != "growth"))
    lines = -(-(len(panels) + bool(growth)) // 3)
    figure = Figure(figsize=(15, 3 * lines), layout="constrained")
    for i, what in enumerate(panels, 1):
        panel = [row for row in rows if row["what"] == what]
        values = [row["images_per_s"] or row["ms"] for row in panel]
        colors = ["C0" if row["name"].startswith("lit") and row["name"] != DEFORM_CONV else "0.7" for row in panel]
        axes = figure.add_subplot(lines, 3, i, xlabel="images/s" if panel[0]["images_per_s"] else "ms")
        axes.set_title(what, fontsize="medium", loc="right")
        bars = axes.barh([row["name"] for row in panel], values, color=colors)
        axes.bar_label(bars, fmt=lambda value: f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", padding=2)
        axes.margins(x=0.35)
        axes.invert_yaxis()
    if growth:
        axes = figure.add_subplot(lines, 3, len(panels) + 1, xlabel="side (pixels)", ylabel="ms", yscale="log")
        axes.set_title("inference of one image", fontsize="medium", loc="right")
        for name in dict.fromkeys(row["name"] for row in growth):
            points = [(int(row["what"].split()[-1]), row["ms"]) for row in growth if row["name"] == name]
            axes.plot(*zip(*points), marker="o", label=name)
        axes.legend()
    return figure


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=[*SECTIONS], help="(all)")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="timm models to compare with each other")
    parser.add_argument("--batch-size", type=int, help="images per call (cpu: 8, cuda: 256)")
    parser.add_argument("--repeats", type=int, default=7, help="turns per call (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="directory (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    bench = Bench(args)
    for section in args.sections:
        SECTIONS[section](bench)
    draw(bench.rows).savefig(args.output / f"{args.device}.png", dpi=100)
    print(", ".join(f"{key} {value}" for key, value in bench.machine().items()))


if __name__ == "__main__":
    main()

"""Measures how fast LIT is, beside its peers, in one run on one machine.

    python tools/benchmark.py [--sections operator models dense growth input] [--output outputs/benchmark]

operator  DTM's deformable sampling and product, against torchvision's operator and a plain 2x2 stride-2 convolution
models    inference and training step of whole models, against timm's of the same size and LIT on torchvision's operator
dense     training step of the dense backbone at 800 x 1344
growth    inference against image size and batch size
input     the input pipeline of `classification/`, beside what a training step takes in

Everything that is compared is timed by turns, so that a machine that slows down slows all of it; medians count, and
their ratios, printed last. A CPU works in float32, a GPU in bfloat16 by autocast. Memory is what a call adds at its
peak to what is held before. Writes DEVICE.json and DEVICE.png.
"""

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d
from tqdm import tqdm

from lit_backbone import DeformableTokenMerging
from lit_backbone.dtm import deformable_sample

SECTIONS = ("operator", "models", "dense", "growth", "input")
DTM_SHAPES = ((96, 192, 56), (192, 384, 28), (384, 768, 14))  # of LIT-S at 224: channels in and out, side of the map
SWIN = {"S": "swin_tiny_patch4_window7_224", "M": "swin_small_patch4_window7_224", "B": "swin_base_patch4_window7_224"}
PEERS = {  # of a size, in parameters and multiply-adds
    "S": ("lit_ti", "lit_s", SWIN["S"], "pvt_v2_b2", "convnext_tiny", "resnet50"),
    "M": ("lit_m", SWIN["M"], "pvt_v2_b4", "convnext_small", "resnet101"),
    "B": ("lit_b", SWIN["B"], "pvt_v2_b5", "convnext_base", "resnet152"),
}
TORCHVISION_LIT = "lit_s, torchvision's operator"
DENSE_SIZE = (800, 1344)
GROWTH_SIZES = (224, 320, 448, 640, 768, 1024)
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}  # of the product that shows what the machine can do
TURN_MS = 200  # of calls that are shorter, as many as take so long are timed together
PHOTO_SIZE = (500, 375)  # width and height of the input's JPEG files, as most of ImageNet's


@dataclass
class Row:
    """One measured thing: median milliseconds of a call, and what follows from them."""

    section: str
    name: str
    what: str
    ms: float
    images_per_s: float | None = None
    mib: float | None = None  # peak, above what was held before the call


Ratio = tuple[str, float]


class Bench:
    """Times calls on a device and keeps what it found."""

    def __init__(self, args: argparse.Namespace):
        self.device = torch.device(args.device)
        self.repeats = args.repeats
        self.batch = args.batch_size or {"cpu": 8, "cuda": 256}[self.device.type]
        self.compile = args.compile
        self.classes = args.classes or ("S" if self.device.type == "cpu" else "SMB")
        self.rows: list[Row] = []
        self.ratios: list[Ratio] = []

    def autocast(self):
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def milliseconds(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            call()
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended)
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)

    def mebibytes(self, call: Callable[[], object]) -> float:
        call()  # compiles, and allocates an optimiser's state
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - held) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        held = most = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most / 2**20

    def compare(
        self, section: str, what: str, calls: dict[str, Callable[[], object]], images: int | None = None
    ) -> dict[str, float]:
        """Time calls by turns; returns the median milliseconds of each by its name, and keeps rows of them.

        A turn of short calls has several, after one that is not counted: others leave the caches to themselves.
        """
        with self.autocast():
            memory = {name: self.mebibytes(call) for name, call in tqdm(calls.items(), f"{what}: warm-up", leave=False)}
            counts = {name: max(1, round(TURN_MS / self.milliseconds(call))) for name, call in calls.items()}
            times = {name: [] for name in calls}
            for _ in tqdm(range(self.repeats), what, leave=False):
                for name, call in calls.items():
                    if counts[name] > 1:
                        call()
                    ms = self.milliseconds(lambda call=call, count=counts[name]: [call() for _ in range(count)])
                    times[name].append(ms / counts[name])
        medians = {name: statistics.median(found) for name, found in times.items()}
        for name, ms in medians.items():
            rate = images and 1e3 * images / ms
            self.rows.append(Row(section, name, what, ms, rate, memory[name]))
            speed = f"{rate:9.1f} img/s" if rate else ""
            tqdm.write(f"{section:8}  {what:34}  {name:30} {ms:9.2f} ms {memory[name]:8.1f} MiB {speed}")
        return medians


# ---- DTM's operator


def bench_operator(bench: Bench) -> None:
    merged = {
        "lit_backbone": lambda x, offset, weight: F.conv2d(deformable_sample(x, offset), weight, stride=2),
        "torchvision": lambda x, offset, weight: deform_conv2d(x, offset, weight, stride=2),
        "plain convolution": lambda x, offset, weight: F.conv2d(x, weight, stride=2),
    }
    sums: dict[str, dict[str, float]] = {}
    for in_chs, out_chs, side in DTM_SHAPES:
        offset = torch.randn(bench.batch, 8, side // 2, side // 2, device=bench.device, requires_grad=True)
        tokens = torch.randn(bench.batch, side, side, in_chs, device=bench.device)
        weight = torch.randn(out_chs, in_chs, 2, 2, device=bench.device)
        inputs = {name: (tokens.permute(0, 3, 1, 2), weight) for name in merged}  # (B, C, H, W), channels-last
        if bench.device.type == "cuda":
            inputs = {name: (x.bfloat16(), kernel.bfloat16()) for name, (x, kernel) in inputs.items()}
        inputs["torchvision"] = (tokens.permute(0, 3, 1, 2).contiguous(), weight)  # what its operator is written for
        for steps in ("forward", "forward + backward"):
            calls = {}
            for name, function in merged.items():
                x, kernel = (tensor.detach().requires_grad_() for tensor in inputs[name])
                call = partial(function, x, offset, kernel)
                calls[name] = (
                    partial(_no_grad, call) if steps == "forward" else partial(_backward, call, x, offset, kernel)
                )
            found = bench.compare("operator", f"{steps}, {in_chs} x {side} x {side}", calls)
            total = sums.setdefault(steps, dict.fromkeys(merged, 0.0))
            for name, ms in found.items():
                total[name] += ms
    for steps, ms in sums.items():
        ours = ms["lit_backbone"]
        bench.ratios += [
            (f"DTM, {steps}, three shapes: torchvision's time / ours", ms["torchvision"] / ours),
            (f"DTM, {steps}, three shapes: our time / plain convolution's", ours / ms["plain convolution"]),
        ]


def _no_grad(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def _backward(call: Callable[[], Tensor], *inputs: Tensor) -> None:
    out = call()
    torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)  # the plain convolution has no offsets


# ---- whole models


class TorchvisionMerging(DeformableTokenMerging):
    """DTM as the original computes it: torchvision's operator, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2).contiguous()  # (B, H, W, C) -> (B, C, H, W)
        x = deform_conv2d(x.float(), self.offset(x), self.proj.weight, self.proj.bias, stride=2)
        return self.act(self.norm(x)).permute(0, 2, 3, 1).contiguous()  # -> (B, H//2, W//2, C')


def build_model(name: str, bench: Bench, **kwargs) -> nn.Module:
    model = timm.create_model("lit_s" if name == TORCHVISION_LIT else name, **kwargs)
    if name == TORCHVISION_LIT:
        for module in model.modules():
            if isinstance(module, DeformableTokenMerging):
                module.__class__ = TorchvisionMerging
    return model.to(bench.device, memory_format=torch.channels_last)


def random_images(bench: Bench, batch: int, height: int, width: int) -> Tensor:
    images = torch.randn(batch, 3, height, width, device=bench.device)
    return images.contiguous(memory_format=torch.channels_last)


def infer(model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        model(images)


class TrainingStep:
    """Forward, cross-entropy, backward and AdamW on random images."""

    def __init__(self, model: nn.Module, images: Tensor):
        self.model, self.images = model.train(), images
        self.targets = torch.randint(1000, (len(images),), device=images.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.images), self.targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def matrix_rate(bench: Bench) -> float:
    """Operations per second of a large matrix product, in the precision that models run in."""
    side = MATRIX_SIDE[bench.device.type]
    dtype = torch.bfloat16 if bench.device.type == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    ms = bench.compare("models", f"product of {side} x {side}", {"torch.mm": partial(torch.mm, a, b)})["torch.mm"]
    return 2 * side**3 / (1e-3 * ms)


def multiply_adds(build: Callable[[], nn.Module], size: tuple[int, int] = (224, 224)) -> float:
    """Of one image; products only."""
    with torch.device("meta"):
        model = build().eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *size))
    return counter.get_total_flops() / 2


def bench_models(bench: Bench) -> None:
    for size in bench.classes:
        names = PEERS[size] + ((TORCHVISION_LIT,) if size == "S" else ())
        lit, swin = {"S": "lit_s", "M": "lit_m", "B": "lit_b"}[size], SWIN[size]
        images = random_images(bench, bench.batch, 224, 224)
        ways = {"eager": lambda model: model}
        if bench.compile:
            ways["compiled"] = torch.compile
        for way, prepare in ways.items():
            torch.compiler.reset()
            models = {name: prepare(build_model(name, bench).eval()) for name in names if _suits(name, way)}
            what = f"inference, {way}"
            ms = bench.compare("models", what, {k: partial(infer, m, images) for k, m in models.items()}, bench.batch)
            bench.ratios += [(f"{what}: {k}'s time / {lit}'s", ms[k] / ms[lit]) for k in ms if k != lit]
            if size == "S":
                rate = 2 * multiply_adds(partial(timm.create_model, lit)) * bench.batch / (1e-3 * ms[lit])
                bench.ratios.append(
                    (f"{what}: {lit}'s operations per second / a matrix product's", rate / matrix_rate(bench))
                )
        way = "compiled" if bench.compile and bench.device.type == "cuda" else "eager"
        torch.compiler.reset()
        models = {name: ways[way](build_model(name, bench)) for name in names if _suits(name, way)}
        steps = {name: TrainingStep(model, images) for name, model in models.items()}
        ms = bench.compare("models", f"training step, {way}", steps, bench.batch)
        bench.ratios += [(f"training step, {way}: {k}'s time / {lit}'s", ms[k] / ms[lit]) for k in ms if k != lit]
        bench.ratios.append(
            (f"training step, {way}: {swin}'s memory / {lit}'s", _memory(bench, swin) / _memory(bench, lit))
        )


def _suits(name: str, way: str) -> bool:
    return name != TORCHVISION_LIT or way == "eager"  # the original could not be compiled


def _memory(bench: Bench, name: str) -> float:
    """Of the last row of this name."""
    return [row.mib for row in bench.rows if row.name == name][-1]


# ---- dense use and growth


def bench_dense(bench: Bench) -> None:
    batch = 2 if bench.device.type == "cuda" else 1
    model = build_model("lit_s", bench, features_only=True, img_size=DENSE_SIZE).train()
    images = random_images(bench, batch, *DENSE_SIZE)

    def step(fused: bool) -> None:
        set_fused_attn(fused)
        sum(features.float().mean() for features in model(images)).backward()
        model.zero_grad(set_to_none=True)
        set_fused_attn(True)

    calls = {"bias as a tensor": partial(step, False)}
    if bench.device.type == "cuda":  # FlexAttention has no backward pass on a CPU
        calls["bias looked up"] = partial(step, True)
    ms = bench.compare("dense", f"training step, {batch} x {DENSE_SIZE[0]} x {DENSE_SIZE[1]}", calls, batch)
    if "bias looked up" in calls:
        whole, less = (next(row.mib for row in bench.rows if row.name == name) for name in calls)
        bench.ratios += [
            ("dense backbone: memory with the bias as a tensor / looked up", whole / less),
            (
                "dense backbone: time with the bias as a tensor / looked up",
                ms["bias as a tensor"] / ms["bias looked up"],
            ),
        ]


def bench_growth(bench: Bench) -> None:
    names = ("lit_s", "pvt_v2_b2", "resnet50")
    models = {name: build_model(name, bench).eval() for name in names}
    for size in GROWTH_SIZES:
        images = random_images(bench, 1, size, size)
        bench.compare("growth", f"1 x {size} x {size}", {k: partial(infer, m, images) for k, m in models.items()}, 1)
    for batch in (2**i for i in range(bench.batch.bit_length())):
        images = random_images(bench, batch, 224, 224)
        bench.compare(
            "growth", f"{batch} x 224 x 224", {k: partial(infer, m, images) for k, m in models.items()}, batch
        )


# ---- input


def bench_input(bench: Bench) -> None:
    """Decoding and augmenting by the training recipe in one process, and how many of these a model keeps busy."""
    from sklearn.datasets import load_sample_images

    from lit_classification.augmentation import build_transform
    from lit_classification.config_file import load_config
    from lit_classification.datasets import ImageFolder, Images
    from lit_classification.sampler import SampleKey

    config = load_config(Path(__file__).parents[1] / "classification/configs/lit-s.yaml")
    with tempfile.TemporaryDirectory() as folder:
        for i, photograph in enumerate(load_sample_images().images):
            for turn in range(4):
                path = Path(folder, str(i), f"{turn}.jpg")
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(photograph).rotate(90 * turn).resize(PHOTO_SIZE).save(path, quality=95)
        dataset = Images(ImageFolder(folder), build_transform(config, is_training=True), [], seed=0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a data loader's worker
        epoch = [SampleKey(0, position, position % len(dataset)) for position in range(32)]
        load = {"1 worker": lambda: [dataset[key] for key in epoch]}
        bench.compare("input", f"JPEG {PHOTO_SIZE[0]} x {PHOTO_SIZE[1]}, augmented", load, len(epoch))
        torch.set_num_threads(threads)
    trained = [row for row in bench.rows if row.name == "lit_s" and row.what.startswith("training step")]
    if trained:
        busy = trained[-1].images_per_s / bench.rows[-1].images_per_s
        bench.ratios.append(("workers that a training step of lit_s keeps busy", busy))


# ---- what was found


def machine(bench: Bench) -> dict[str, str | int]:
    """Where and with what the figures were measured."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name()
    versions = {package.__name__: package.__version__ for package in (torch, torchvision, timm)}
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "batch": bench.batch,
        "repeats": bench.repeats,
    } | versions


def draw(bench: Bench, path: Path) -> None:
    """Bars of operator and models, curves of growth; a panel for each section that was run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        *(("operator", what) for what in _kinds(bench, "operator") if what.startswith("forward + backward")),
        *(("models", what) for what in _kinds(bench, "models") if "product" not in what),
    ]
    growth = [row for row in bench.rows if row.section == "growth" and row.what.startswith("1 x")]
    count = len(panels) + bool(growth)
    if not count:
        return
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5 * columns, 3 * rows), layout="constrained")
    axes = [axes] if count == 1 else list(axes.flat)
    for axis, (section, what) in zip(axes, panels):
        rows = [row for row in bench.rows if (row.section, row.what) == (section, what)][::-1]
        values = [row.images_per_s or row.ms for row in rows]
        ours = ["lit" in row.name and row.name != TORCHVISION_LIT for row in rows]
        bars = axis.barh([row.name for row in rows], values, color=["C0" if own else "0.7" for own in ours])
        axis.bar_label(bars, fmt="%.3g", padding=2)
        axis.margins(x=0.2)
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("images/s, more is better" if rows[0].images_per_s else "ms, less is better")
    if growth:
        axis = axes[len(panels)]
        for name in dict.fromkeys(row.name for row in growth):
            own = {int(row.what.split()[-1]): row.ms for row in growth if row.name == name}
            axis.loglog(own.keys(), own.values(), "o-", label=name)
        axis.set_xticks(GROWTH_SIZES, labels=GROWTH_SIZES, fontsize=8)
        axis.minorticks_off()
        axis.set_title("inference of one image", fontsize=10)
        axis.set(xlabel="side in pixels", ylabel="ms")
        axis.legend()
    for axis in axes[count:]:
        axis.remove()
    figure.savefig(path, dpi=100)


def _kinds(bench: Bench, section: str) -> list[str]:
    return list(dict.fromkeys(row.what for row in bench.rows if row.section == section))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure how fast LIT is, beside its peers.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device, help="(%(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to measure (all)")
    parser.add_argument("--classes", choices=("S", "M", "B", "SM", "SMB"), help="sizes of models (cpu: S, cuda: SMB)")
    parser.add_argument("--batch-size", type=int, help="images of a call (cpu: 8, cuda: 256)")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each (%(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU (all)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave out compiled models")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder (%(default)s)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bench = Bench(args)
    for section in args.sections:
        globals()[f"bench_{section}"](bench)
        gc.collect()
    args.output.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine(bench), "rows": [asdict(row) for row in bench.rows], "ratios": dict(bench.ratios)}
    Path(args.output, f"{args.device}.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(bench, args.output / f"{args.device}.png")
    print("\n" + ", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for name, ratio in bench.ratios:
        print(f"{ratio:8.2f}  {name}")


if __name__ == "__main__":
    main()

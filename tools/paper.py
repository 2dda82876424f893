"""The paper's argument in miniature: what attention and DTM are worth on photographs, and pretraining on scenes.

    python -m tools.paper        # or: make paper

Trains small LITs with more and less attention, and with other mergings than DTM, and small models of other families, on
CIFAR-10; then a detector and a segmentor on scenes of digits, from LIT's weights and from random ones. What is in
results.json, with the settings of now, counts as done; the repository has all of it, `--results` names another folder.
What was interrupted goes on, within a training, too. Prints tables of what there is and draws accuracy.png, and
sampling.png of lit.pth, LIT of seed 0; `--report` does only this.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from demo.cifar10 import FetchError, write_images
from demo.digit_scenes import write_scenes
from lit_backbone import read_checkpoint
from tools.paper_runs import DENSE, LIT, MODELS, ROOT, Run, TrainingError, classification_runs, dense_runs
from tools.paper_tables import draw_sampling, report


def train_all(runs: list[Run], jobs: int, bar: tqdm) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield each training and its result as it ends; `jobs` of them run at a time, and none is left behind.

    Raises:
        TrainingError: one failed.
    """
    waiting, processes = deque(runs), {}
    try:
        while waiting or processes:
            while waiting and len(processes) < jobs:
                run = waiting.popleft()
                processes[run.start()] = run
                bar.set_postfix_str("; ".join(run.key for run in processes.values()))
            time.sleep(1)
            for process in [process for process, run in processes.items() if run.has_ended(process)]:
                run = processes.pop(process)
                yield run, run.result(process.returncode)
    finally:
        for process in processes:
            process.terminate()  # it saves where it stands
        for process, run in processes.items():
            run.has_ended(process, wait=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else {}


def finished(path: Path, runs: list[Run]) -> dict[str, dict[str, Any]]:
    """What results.json has of these trainings, by their keys, if their settings have not changed since."""
    found = read(path)
    return {run.key: found[run.key] for run in runs if found.get(run.key, {}).get("settings") == run.digest}


def keep(path: Path, key: str, result: dict[str, Any]) -> None:
    """Write a training's result into results.json, among the others."""
    found = read(path) | {key: result}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found))
    unfinished.write_text(f"{{\n{lines}\n}}\n")
    unfinished.replace(path)


def keep_weights(path: Path, checkpoint: Path) -> None:
    """Write what is needed to use a classifier of main.py: less than half of what continues its training."""
    content = read_checkpoint(checkpoint)
    used = {key: content[key] for key in ("model", "classes", "config")}
    used["config"]["OUTPUT"] = ""  # a folder of this machine
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(used, path)


def stop(signum: int, frame: object) -> None:
    sys.exit(f"interrupted by {signal.Signals(signum).name}; the same command goes on")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*MODELS, *DENSE]
    parser.add_argument("--models", nargs="+", choices=every, default=every, metavar="NAME", help="(%(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(%(default)s)")
    parser.add_argument("--epochs", default="10", metavar="N", help="of the classifiers (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the classifiers (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="trainings at a time (%(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/paper", help="of trainings (%(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "docs/paper", help="of one schedule (%(default)s)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"argument --jobs: {args.jobs} is not positive")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, stop)
    models, tasks = ([name for name in args.models if name in group] for group in (MODELS, DENSE))
    options = ("TRAIN.EPOCHS", args.epochs, "RUNTIME.DEVICE", args.device, "RUNTIME.COMPILE", str(args.device != "cpu"))
    output, folder = args.output.resolve(), args.results.resolve()
    results, weights = folder / "results.json", folder / "lit.pth"
    runs = classification_runs(output, models, args.seeds, *options)
    (origin,) = classification_runs(output, [LIT], [0], *options)  # whose weights the dense ones start from
    runs += dense_runs(output, tasks, args.seeds, weights, *options)
    done = finished(results, runs)
    todo = [run for run in runs if run.key not in done and not args.report]
    if todo:
        if others := read(results).keys() & {run.key for run in todo}:
            found = f"{results}: has {', '.join(sorted(others))} by other settings"
            raise TrainingError(f"{found}; name another folder by --results")
        if models:
            write_images(ROOT / "data/cifar10")
        if tasks:
            write_scenes(ROOT / "data/digit_scenes")
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))  # of each training
        print(f"each training prints into its {output}/*/*/printed.txt")
        with tqdm(None, "trainings", total=len(runs), initial=len(done)) as bar:
            for stage in ([run for run in todo if run.name in MODELS], [run for run in todo if run.name not in MODELS]):
                if any(run.name.endswith("pretrained") for run in stage) and not finished(results, [origin]):
                    raise TrainingError(f"{origin.key}: not trained with these options; add --models {LIT} --seeds 0")
                for run, result in train_all(stage, args.jobs, bar):
                    if run.key == origin.key:
                        keep_weights(weights, run.folder / "latest.pth")
                    keep(results, run.key, result)
                    bar.write(f"{run.key}: {result['reached'][-1]:.4g}")
                    bar.update()
    print(report(finished(results, runs), args.device, folder / "accuracy.png"))
    photographs = [min(path.iterdir()) for path in sorted(ROOT.glob("data/cifar10/val/*"))]
    if photographs and weights.exists():
        draw_sampling(weights, photographs).save(folder / "sampling.png")


if __name__ == "__main__":
    try:
        main()
    except (TrainingError, FetchError) as error:
        sys.exit(f"error: {error}")

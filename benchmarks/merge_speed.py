# SPDX-License-Identifier: Apache-2.0
"""Throughput and peak memory of `robopost merge` against a naive `torch.load` merge and a `load_file` merge.

Two synthetic parents with the shapes of a Llama-style decoder (embeddings, layers, head), as sharded folders in the
Hugging Face layout and, for the torch.load merge, as one `torch.save` file each.
Linear merge at alpha 0.75. The naive merges are what people write:

    a, b = torch.load(base), torch.load(tuned)
    torch.save({k: 0.25 * a[k] + 0.75 * b[k] for k in a}, out)

and the same with `safetensors.torch.load_file` of all shards and `save_file`. Every side runs in a fresh process per
round, A B A B, with as many threads as torch takes by default; a further row gives the naive merge one thread, and the
headline is the smaller of the two ratios. The clock starts after imports and stops when the result is durable: ours
syncs by itself, the others get one fsync of their file. Rates are GB of parents per second. "as shipped" stops the
clock of the naive side before that fsync.

State of the page cache, the same for every side: `cold`, the files of the side are evicted before the round
(posix_fadvise DONTNEED after a sync); `warm`, they are read once just before it (what doesn't fit in memory is read
again by whoever merges). The headline is the cold state: a checkpoint that was just downloaded or trained.

Ours computes SHA-256 of all parents beside merging, as shipped; the row `without hashes` leaves it out. Peak memory is
the high-water mark of the resident set (VmHWM) of the process that merges, imports included. Needs six times the size
of a parent on disk.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch

from robopost.bench import Bench
from robopost.errors import RobopostError

SUITE = "vla"
ALPHA = 0.75
WIDTH, VOCAB = 4096, 32064
SHARD = 2e9  # bytes, at most, of the sharded parents

# Not ru_maxrss: a child inherits its parent's there.
PEAK = """
def peak_gb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith("VmHWM:"))
"""
OURS = """
import json, sys, time
import torch
from robopost.merging.config import MergeConfig
from robopost.merging.merge import merge
base, tuned, out, hashes, method = sys.argv[1:6]
config = MergeConfig(base=base, finetuned=[tuned], alpha=[0.75], out=out, hash=hashes == "hash", method=method)
start = time.perf_counter()
merge(config)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "shipped": seconds, "peak_gb": peak_gb()}))
"""
NAIVE = """
import json, os, sys, time
import torch
from safetensors.torch import load_file, save_file
base, tuned, out, kind = sys.argv[1:5]
start = time.perf_counter()
if kind == "torch":
    a, b, save = torch.load(base), torch.load(tuned), torch.save
else:
    a, b = ({k: v for file in names.split(",") for k, v in load_file(file).items()} for names in (base, tuned))
    save = save_file
save({k: 0.25 * a[k] + 0.75 * b[k] for k in a}, out)
shipped = time.perf_counter() - start
file = os.open(out, os.O_RDONLY)
os.fsync(file)
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "shipped": shipped, "peak_gb": peak_gb()}))
"""


def shapes(gigabytes, dtype, width, vocab):
    """Names and shapes of a decoder of about that size."""
    size = gigabytes * 1e9 / dtype.itemsize
    inner = width * 11 // 4
    layer = {f"self_attn.{x}_proj.weight": (width, width) for x in "qkvo"}
    layer |= {"mlp.gate_proj.weight": (inner, width), "mlp.up_proj.weight": (inner, width)}
    layer |= {"mlp.down_proj.weight": (width, inner), "input_layernorm.weight": (width,)}
    per_layer = 4 * width * width + 3 * width * inner + width
    count = max(1, -(-int(size - 2 * vocab * width) // per_layer))
    found = {"model.embed_tokens.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    for i in range(count):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found


def make_parents(folder, gigabytes, dtype, width, vocab, pickled=True):
    """Write both parents in both forms."""
    from safetensors.torch import save_file

    table = shapes(gigabytes, dtype, width, vocab)
    for seed, name in enumerate(("base", "tuned")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {k: torch.randn(s, generator=generator).mul_(0.02).to(dtype) for k, s in table.items()}
        if pickled:
            torch.save(tensors, folder / f"{name}.pt")
        target = folder / name
        target.mkdir()
        parts, filled = [{}], 0
        for key, value in tensors.items():
            if filled + value.nbytes > SHARD and parts[-1]:
                parts.append({})
                filled = 0
            parts[-1][key] = value
            filled += value.nbytes
        weight_map = {}
        for i, part in enumerate(parts):
            file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
            save_file(part, target / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        index = {
            "metadata": {"total_size": sum(v.nbytes for v in tensors.values())},
            "weight_map": weight_map,
        }
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        (target / "config.json").write_text(json.dumps({"model_type": "synthetic"}))
        del tensors, parts
    return sum(torch.Size(shape).numel() for shape in table.values()) * dtype.itemsize


def files_of(folder, side):
    """What a side reads: files of the base, files of the fine-tuned parent."""
    if side == "torch":
        return [[folder / "base.pt"], [folder / "tuned.pt"]]
    return [sorted((folder / name).glob("*.safetensors")) for name in ("base", "tuned")]


def prepare(paths, cache):
    """Bring the files of a side into the stated cache state; everything else written before is synced."""
    os.sync()
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            while cache == "warm" and os.read(handle, 1 << 24):
                pass
        finally:
            os.close(handle)


def evict(folder):
    """Leave no page of any file behind: the other side's files must not fill the memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def once(folder, side, cache, hashes="hash", method="linear", threads=0):
    """One merge in a process of its own: {"seconds", "shipped", "peak_gb"}."""
    out = folder / "out"
    evict(folder)
    prepare([path for files in files_of(folder, side) for path in files], cache)
    base, tuned = (str(folder / name) for name in ("base", "tuned"))
    if side == "ours":
        words = [sys.executable, "-c", PEAK + OURS, base, tuned, str(out), hashes, method]
    else:
        base, tuned = (",".join(map(str, files)) for files in files_of(folder, side))
        words = [sys.executable, "-c", PEAK + NAIVE, base, tuned, str(out), side]
    env = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink(missing_ok=True)
    if done.returncode:
        raise RobopostError(f"{side} failed ({done.returncode}): {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(folder, nbytes, side, cache, rounds, hashes="hash", threads=0):
    """Interleaved rounds of ours and one other side."""
    once(folder, "ours", cache, hashes)  # warm-up: compiled files of the imports, the disk
    pairs = [
        (once(folder, "ours", cache, hashes), once(folder, side, cache, threads=threads))
        for _ in range(rounds)
    ]
    read = 2 * nbytes / 1e9
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    shipped = [b["shipped"] / a["seconds"] for a, b in pairs]
    return {
        "median": median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "shipped_median": median(shipped),
        "ours_gb_per_s": median(read / a["seconds"] for a, _ in pairs),
        "theirs_gb_per_s": median(read / b["seconds"] for _, b in pairs),
        "ours_peak_gb": max(a["peak_gb"] for a, _ in pairs),
        "theirs_peak_gb": max(b["peak_gb"] for _, b in pairs),
        "rounds": [[a["seconds"], b["seconds"]] for a, b in pairs],
    }


# label: dtype, other side, page cache, hashes, threads of the other side (0 = torch's default)
CASES = {
    "float32/torch.load/cold": ("float32", "torch", "cold", "hash", 0),
    "float32/torch.load, 1 thread/cold": ("float32", "torch", "cold", "hash", 1),
    "float32/torch.load/warm": ("float32", "torch", "warm", "hash", 0),
    "float32/torch.load/cold, without hashes": ("float32", "torch", "cold", "without", 0),
    "float32/load_file/cold": ("float32", "safetensors", "cold", "hash", 0),
    "float32/load_file/warm": ("float32", "safetensors", "warm", "hash", 0),
    "bfloat16/torch.load/cold": ("bfloat16", "torch", "cold", "hash", 0),
    "bfloat16/torch.load, 1 thread/cold": ("bfloat16", "torch", "cold", "hash", 1),
}
HEADLINE = ("float32/torch.load/cold", "float32/torch.load, 1 thread/cold")
METHODS = ("slerp", "ties", "dare")


def run(bench: Bench) -> None:
    """Rates, ratios and peaks."""
    bench.packages("torch", "safetensors")
    gigabytes = bench.scale(smoke=0.1, small=4.0, paper=4.0)
    rounds = bench.scale(smoke=2, small=5, paper=7)
    sizes = bench.scale(smoke=(512, 4000), small=(WIDTH, VOCAB), paper=(WIDTH, VOCAB))
    found, peaks = {}, []
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory(prefix="robopost-merge-") as scratch:
            made = Parents(Path(scratch), gigabytes, getattr(torch, dtype), *sizes)
            for label, (kind, side, cache, hashes, threads) in CASES.items():
                if kind == dtype:
                    found[label] = bench.cell(
                        label,
                        partial(measure, made, side, cache, rounds, hashes, threads),
                        params={"gb": gigabytes, "rounds": rounds, "alpha": ALPHA, "threads": threads},
                    )
                    peaks.append(found[label]["ours_peak_gb"])
            for method in METHODS if dtype == "float32" else ():
                row = bench.cell(
                    f"{dtype}/{method}",
                    partial(alone, made, method),
                    params={"gb": gigabytes, "alpha": ALPHA},
                )
                peaks.append(row["peak_gb"])
    if bench.tier == "paper":  # the size of a 7B model in bfloat16; a naive merge needs 42 GB of memory
        with tempfile.TemporaryDirectory(prefix="robopost-merge-") as scratch:
            made = Parents(Path(scratch), 14.0, torch.bfloat16, *sizes, pickled=False)
            peaks.append(bench.cell("bfloat16/14 GB", partial(alone, made), params={"gb": 14.0})["peak_gb"])
    report(bench, gigabytes, found, peaks)


def measure(made, side, cache, rounds, hashes, threads):
    """A cell of a comparison."""
    return compare(*made(), side, cache, rounds, hashes, threads) | {"parent_gb": made.nbytes / 1e9}


def alone(made, method="linear"):
    """A cell of one merge of ours."""
    return once(made()[0], "ours", "cold", "hash", method)


def report(bench, gigabytes, found, peaks):
    """Figures and the table."""
    worst = min((found[label] for label in HEADLINE), key=lambda row: row["median"])
    note = f"{gigabytes:g} GB per parent, float32, cold page cache, hashes included, durable on both sides"
    span = (worst["min"], worst["max"])
    bench.figure("merge_throughput_vs_naive", worst["median"], interval=span, unit="x", target=1.5, note=note)
    note = "the same rounds; the naive merge stops its clock before its file is on the disk"
    bench.figure("merge_throughput_vs_naive_as_shipped", worst["shipped_median"], unit="x", note=note)
    note = f"of parents; {gigabytes:g} GB each, float32, cold page cache, hashes included"
    bench.figure("merge_gb_per_s", worst["ours_gb_per_s"], unit="GB/s", note=note)
    note = f"peak RSS of the merging process, imports included; {gigabytes:g} GB per parent, all methods"
    known = None if any(peak != peak for peak in peaks) else max(peaks)
    bench.figure("merge_peak_gb", known, unit="GB", target=2, better="lower", note=note)
    rows = []
    for label, row in found.items():
        dtype, side, cache = label.split("/")
        rows.append(
            {
                "dtype": dtype,
                "against": side,
                "page cache": cache,
                "ours (GB/s)": row["ours_gb_per_s"],
                "theirs (GB/s)": row["theirs_gb_per_s"],
                "ratio": row["median"],
                "min": row["min"],
                "max": row["max"],
                "ours, peak (GB)": row["ours_peak_gb"],
                "theirs, peak (GB)": row["theirs_peak_gb"],
            }
        )
    caption = f"Linear merge of two parents of {gigabytes:g} GB: GB of parents per second, interleaved."
    bench.table("merge", rows, caption=caption)


class Parents:
    """The parents of one dtype, made when the first cell that is measured asks for them."""

    def __init__(self, folder, gigabytes, dtype, width, vocab, pickled=True):
        self.folder, self.rest, self.nbytes = folder, (gigabytes, dtype, width, vocab, pickled), 0
        free, need = shutil.disk_usage(folder).free / 1e9, (6 if pickled else 3) * gigabytes
        if free < need:
            raise RobopostError(f"{folder} has {free:.0f} GB free, {need:.0f} GB are needed. Fix: set TMPDIR")

    def __call__(self):
        if not self.nbytes:
            self.nbytes = make_parents(self.folder, *self.rest)
        return self.folder, self.nbytes

# SPDX-License-Identifier: Apache-2.0
"""Whole merges of robopost policies and of folders in the Hugging Face layout."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from robopost.artefacts.checkpoint import load_policy
from robopost.cli import main
from robopost.errors import ConfigError, RobopostError
from robopost.merging import operators, stream, writer
from robopost.merging.config import MergeConfig, parse_words
from robopost.merging.merge import merge
from robopost.merging.shards import file_sha256, open_shards

spec = importlib.util.spec_from_file_location("builders", Path(__file__).parent / "builders.py")
builders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builders)
SPEC, EMBED, HEAD = builders.SPEC, builders.EMBED, builders.HEAD
make_policy, vla, write_hf, read_hf = builders.make_policy, builders.vla, builders.write_hf, builders.read_hf


@pytest.fixture
def pair(tmp_path):
    return write_hf(tmp_path / "base", vla(0)), write_hf(tmp_path / "tuned", vla(1))


def run(tmp_path, pair, name="out", **options):
    base, *tuned = pair
    merge(MergeConfig(base=base, finetuned=tuned, out=str(tmp_path / name), **options))
    return read_hf(tmp_path / name)


# Ends and linearity.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "method", ["linear", "slerp", "task_arithmetic", "soup", "continual", "ties", "dare"]
)
def test_ends_reproduce_the_parents_bit_by_bit(tmp_path, dtype, method):
    base, tuned = vla(0, dtype), vla(1, dtype)
    pair = write_hf(tmp_path / "base", base), write_hf(tmp_path / "tuned", tuned)
    start = run(tmp_path, pair, "zero", method=method, alpha=[0.0])
    assert all(torch.equal(start[name], base[name]) and start[name].dtype == dtype for name in base)
    if method in ("linear", "slerp", "soup", "continual"):
        end = run(tmp_path, pair, "one", method=method, alpha=[1.0])
        assert all(torch.equal(end[name], tuned[name]) and end[name].dtype == dtype for name in base)


def test_merge_is_linear_in_alpha_and_equal_modules_equal_the_global_merge(tmp_path, pair):
    base, tuned = vla(0), vla(1)
    for alpha in (0.25, 0.75):
        merged = run(tmp_path, pair, f"a{alpha}", alpha=[alpha])
        for name in base:
            assert torch.allclose(merged[name] - base[name], alpha * (tuned[name] - base[name]), atol=1e-6)
    whole = run(tmp_path, pair, "whole", alpha=[0.6])
    parts = run(tmp_path, pair, "parts", modules={"vision": 0.6, "language": 0.6, "action": 0.6})
    assert all(torch.equal(whole[name], parts[name]) for name in base)


def test_modules_touch_exactly_their_tensors(tmp_path, pair):
    base, tuned = vla(0), vla(1)
    merged = run(tmp_path, pair, modules={"vision": 1.0, "language": 0.8, "action": 0.0})
    groups = {
        "vision": ("vision_backbone", "projector"),
        "language": ("language_model",),
        "action": ("action_head",),
    }
    counts = dict.fromkeys(groups, 0)
    for name in base:
        group = next(g for g, prefixes in groups.items() if name.startswith(prefixes))
        counts[group] += 1
        expected = {
            "vision": tuned[name],
            "language": torch.lerp(base[name], tuned[name], 0.8),
            "action": base[name],
        }[group]
        assert torch.equal(merged[name], expected), name
    assert counts == {"vision": 3, "language": 3, "action": 2}


def test_inputs_are_not_modified(tmp_path, pair):
    paths = [path for folder in pair for path in (tmp_path / folder).glob("*")]
    before = {path: (file_sha256(path), path.stat().st_mtime_ns) for path in paths}
    run(tmp_path, pair, alpha=[0.5])
    assert before == {path: (file_sha256(path), path.stat().st_mtime_ns) for path in paths}


def test_unknown_parameters_stop_a_merge_by_modules(tmp_path):
    tensors = [vla(seed) | {"gripper.weight": torch.zeros(2)} for seed in (0, 1)]
    pair = write_hf(tmp_path / "base", tensors[0]), write_hf(tmp_path / "tuned", tensors[1])
    with pytest.raises(
        ConfigError, match=r"'gripper.weight' \(1 of 9\) matches no group of the family 'openvla'"
    ):
        run(tmp_path, pair, modules={"vision": 1.0, "language": 0.8, "action": 1.0})
    assert not (tmp_path / "out").exists()
    groups = "rest:gripper+vision_backbone+projector+action_head,language:language_model"
    merged = run(tmp_path, pair, modules={"rest": 1.0, "language": 0.0}, groups=groups)
    assert torch.equal(merged[HEAD], tensors[0][HEAD])


# Every method through the engine equals the operator on whole tensors.


@pytest.mark.parametrize("blocks", [None, 37])
def test_methods_equal_their_operators(tmp_path, monkeypatch, blocks):
    if blocks:  # tensors are cut at odd places, over several chunks and several threads
        monkeypatch.setattr(stream, "BLOCK", blocks)
        monkeypatch.setattr(writer, "CHUNK", 4096)
    models = [vla(seed) for seed in range(3)]
    for model in models:
        model["language_model.big"] = torch.randn(3, 1111)
    pair = [write_hf(tmp_path / f"m{i}", model) for i, model in enumerate(models)]
    base, one, two = models
    soup = run(tmp_path, pair, "soup", method="soup")
    task = run(tmp_path, pair, "task", method="task_arithmetic", alpha=[0.5], weights=[1.0, 2.0])
    ties = run(tmp_path, pair, "ties", method="ties", alpha=[0.7], keep=0.3)
    continual = run(tmp_path, pair, "continual", method="continual", alpha=[0.4])
    slerp = run(tmp_path, pair[:2], "slerp", method="slerp", alpha=[0.4])
    files = []
    info = [{name: torch.rand_like(value) for name, value in base.items()} for _ in range(3)]
    for i, table in enumerate(info):
        files.append(str(tmp_path / f"fisher{i}.safetensors"))
        save_file(table, files[-1])
    fisher = run(tmp_path, pair, "fisher", method="fisher", fisher=files)
    for name in base:
        a, b, c = base[name], one[name], two[name]
        assert torch.allclose(soup[name], (b + c) / 2, atol=1e-6)
        assert torch.allclose(task[name], a + 0.5 * (b - a) + (c - a), atol=1e-5)
        assert torch.allclose(ties[name], operators.ties(a, [b, c], 0.7, 0.3), atol=1e-6)
        assert torch.allclose(continual[name], 0.36 * a + 0.24 * b + 0.4 * c, atol=1e-6)
        assert torch.allclose(slerp[name], operators.slerp(a, b, 0.4), atol=1e-6)
        expected = operators.fisher([a, b, c], [table[name] for table in info])
        assert torch.allclose(fisher[name], expected, atol=1e-6)


def test_dare_does_not_depend_on_blocks_threads_or_shards(tmp_path, monkeypatch, pair):
    first = run(tmp_path, pair, "first", method="dare", drop=0.5, workers=1)
    monkeypatch.setattr(stream, "BLOCK", 29)
    monkeypatch.setattr(writer, "CHUNK", 4096)
    second = run(tmp_path, pair, "second", method="dare", drop=0.5, workers=3)
    other = run(tmp_path, pair, "other", method="dare", drop=0.5, seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[HEAD], other[HEAD])


def test_frozen_tensors_stay_bitwise(tmp_path):
    models = [vla(seed) for seed in range(3)]
    for model in models[1:]:
        model["projector.fc1.weight"] = models[0]["projector.fc1.weight"]
    pair = [write_hf(tmp_path / f"m{i}", model) for i, model in enumerate(models)]
    for method in ("soup", "task_arithmetic", "ties", "dare", "continual"):
        merged = run(tmp_path, pair, method, method=method, alpha=[0.3])
        assert torch.equal(merged["projector.fc1.weight"], models[0]["projector.fc1.weight"]), method


# Files.


def test_shards_are_bounded_and_complete(tmp_path):
    base, tuned = vla(0), vla(1)
    pair = write_hf(tmp_path / "base", base, shards=3), write_hf(tmp_path / "tuned", tuned, shards=2)
    merged = run(tmp_path, pair, alpha=[0.5], shard_gb=3e-6)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert merged.keys() == base.keys()
    assert all(torch.equal(merged[name], torch.lerp(base[name], tuned[name], 0.5)) for name in base)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == base.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in base.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = load_file(path)
        assert sum(value.nbytes for value in data.values()) <= 3000 or len(data) == 1
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_written_files_equal_what_the_library_writes(tmp_path):
    """Odd sizes, every dtype, empty tensors and scalars survive the writer; files are aligned."""
    tensors = {
        "a": torch.randn(7, 3),
        "b": torch.randn(5).double(),
        "half": torch.randn(9).half(),
        "brain": torch.randn(3).bfloat16(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(3.0),
        "flag": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    pair = write_hf(tmp_path / "base", tensors), write_hf(tmp_path / "tuned", tensors)
    merged = run(tmp_path, pair, alpha=[0.5])
    assert merged.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(merged[name], value), name
        assert (merged[name].dtype, merged[name].shape) == (value.dtype, value.shape)
    with open_shards(tmp_path / "out") as shards:
        assert all(entry.start % entry.dtype.itemsize == 0 for entry in shards.entries.values())


def test_other_files_come_along(tmp_path):
    extra = {
        "tokenizer__json": '{"model": {"vocab": {"a": 0}}}',
        "README__md": "old",
        "pytorch_model__bin": "x",
    }
    pair = write_hf(tmp_path / "base", vla(0), **extra), write_hf(tmp_path / "tuned", vla(1), **extra)
    run(tmp_path, pair, alpha=[0.5], dtype="bfloat16")
    out = tmp_path / "out"
    assert (out / "tokenizer.json").read_text() == extra["tokenizer__json"]
    assert not (out / "pytorch_model.bin").exists()
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert read_hf(out)[HEAD].dtype == torch.bfloat16
    card = (out / "README.md").read_text()
    assert "old" not in card.split("\n")[0]
    assert f"sha256 `{file_sha256(tmp_path / 'base' / 'model.safetensors')}`" in card
    assert "| alpha | 0.5 |" in card


def test_half_precision_parents_are_warned_about_and_may_be_stored_in_float32(tmp_path, caplog):
    base, tuned = vla(0, torch.bfloat16), vla(1, torch.bfloat16)
    pair = write_hf(tmp_path / "base", base), write_hf(tmp_path / "tuned", tuned)
    merged = run(tmp_path, pair, alpha=[0.75], dtype="float32")
    assert "stored in BF16" in caplog.text
    assert "stored in BF16" in (tmp_path / "out" / "README.md").read_text()
    for name in base:
        assert torch.equal(merged[name], torch.lerp(base[name].float(), tuned[name].float(), 0.75))
    rounded = run(tmp_path, pair, "same", alpha=[0.75])
    assert all(torch.equal(rounded[name], merged[name].bfloat16()) for name in base)


def test_tied_embeddings_are_merged_once(tmp_path):
    base, tuned = vla(0), vla(1)
    for model in (base, tuned):
        model[HEAD] = model[EMBED].clone()
    pair = write_hf(tmp_path / "base", base), write_hf(tmp_path / "tuned", tuned)
    for method in ("linear", "dare"):
        merged = run(tmp_path, pair, method, method=method, alpha=[0.5])
        assert torch.equal(merged[HEAD], merged[EMBED])
    del tuned[HEAD]  # stored once, as save_pretrained does with tied weights
    once = write_hf(tmp_path / "once", tuned)
    merged = run(tmp_path, (pair[0], once), "out", alpha=[0.5])
    assert torch.equal(merged[HEAD], torch.lerp(base[EMBED], tuned[EMBED], 0.5))
    merged = run(tmp_path, (once, pair[1]), "reverse", alpha=[0.5])
    assert HEAD not in merged


def test_fresh_modules_are_taken_from_the_fine_tuned_parent(tmp_path):
    base, tuned = vla(0), vla(1)
    tuned["action_head.fc.weight"] = torch.randn(14, 16)
    tuned["action_head.new"] = torch.randn(2)
    pair = write_hf(tmp_path / "base", base), write_hf(tmp_path / "tuned", tuned)
    merged = run(tmp_path, pair, alpha=[0.5], fresh=["action_head"])
    assert merged.keys() == tuned.keys()
    assert all(torch.equal(merged[name], tuned[name]) for name in tuned if name.startswith("action_head"))
    with pytest.raises(ConfigError, match="has no parameter below that prefix"):
        run(tmp_path, pair, "typo", alpha=[0.5], fresh=["action_heads"])


# Policies of robopost.


def test_merged_policy_loads_and_acts(tmp_path):
    base, tuned = make_policy(tmp_path / "base", 0), make_policy(tmp_path / "tuned", 1)
    out = tmp_path / "merged"
    words = [f"base={base}", f"finetuned={tuned}", "modules=vision:1,language:0.8,action:0.5", f"out={out}"]
    assert main(["merge", *words]) == 0
    policy, first, second = (load_policy(path) for path in (out, base, tuned))
    counts = {"vision": 0, "language": 0, "action": 0}
    parents = first.state_dict(), second.state_dict()
    for name, value in policy.state_dict().items():
        a, b = (state[name] for state in parents)
        if name.startswith("normaliser."):
            assert torch.equal(value, a)
            continue
        vision, language = name.startswith("encoder.images"), name.startswith("encoder.instruction")
        group, alpha = ("vision", 1.0) if vision else ("language", 0.8) if language else ("action", 0.5)
        counts[group] += 1
        assert torch.equal(value, torch.lerp(a, b, alpha)), name
    assert min(counts.values()) > 4
    obs = {
        "state": torch.zeros(2, 5),
        "image": torch.zeros(2, 32, 32, 3, dtype=torch.uint8),
        "instruction": torch.zeros(2, 64, dtype=torch.uint8),
    }
    assert torch.isfinite(policy.act(obs, deterministic=True).chunk).all()
    meta = json.loads((out / "policy.json").read_text())["merged"]
    assert meta["modules"] == {"vision": 1.0, "language": 0.8, "action": 0.5}
    files = [parent["files"]["policy.safetensors"] for parent in meta["parents"]]
    assert files == [file_sha256(tmp_path / name / "policy.safetensors") for name in ("base", "tuned")]
    assert "| language (" in (out / "README.md").read_text()


def test_merged_policies_can_be_merged_again(tmp_path):
    base, tuned = make_policy(tmp_path / "base", 0), make_policy(tmp_path / "tuned", 1)
    merge(MergeConfig(base=base, finetuned=[tuned], alpha=[0.5], out=str(tmp_path / "one")))
    merge(MergeConfig(base=str(tmp_path / "one"), finetuned=[tuned], alpha=[0.5], out=str(tmp_path / "two")))
    merge(
        MergeConfig(
            base=base, finetuned=[tuned, tuned], method="continual", alpha=[0.5], out=str(tmp_path / "x")
        )
    )
    two, closed = (load_file(tmp_path / name / "policy.safetensors") for name in ("two", "x"))
    assert all(torch.allclose(two[name], closed[name], atol=1e-6) for name in two)
    meta = json.loads((tmp_path / "two" / "policy.json").read_text())["merged"]
    assert meta["parents"][0]["merged"]["alpha"] == 0.5  # where its parent came from stays known


# Never half-written.


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch, pair):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.FileWriter, "write", fail)
    with pytest.raises(RobopostError, match="can't write"):
        run(tmp_path, pair, alpha=[0.5])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


def test_what_is_at_out_stays_unless_overwritten(tmp_path, monkeypatch, pair):
    run(tmp_path, pair, alpha=[0.5])
    with pytest.raises(ConfigError, match="overwrite=true"):
        run(tmp_path, pair, alpha=[0.25])
    monkeypatch.setattr(os, "pwrite", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, pair, alpha=[0.25], overwrite=True)
    monkeypatch.undo()
    assert torch.equal(read_hf(tmp_path / "out")[HEAD], torch.lerp(vla(0)[HEAD], vla(1)[HEAD], 0.5))
    merged = run(tmp_path, pair, alpha=[0.25], overwrite=True)
    assert torch.equal(merged[HEAD], torch.lerp(vla(0)[HEAD], vla(1)[HEAD], 0.25))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]


def test_a_parent_is_never_overwritten(tmp_path, pair):
    with pytest.raises(ConfigError, match="is where the parent"):
        merge(MergeConfig(base=pair[0], finetuned=[pair[1]], alpha=[0.5], out=pair[0], overwrite=True))


def test_words_of_the_command_line():
    config = parse_words(["base=a", "finetuned=b,c", "method=ties", "alpha=0:1:0.25", "out=o", "keep=0.3"])
    assert config.alpha == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert config.finetuned == ["b", "c"]
    assert config.keep == 0.3
    assert parse_words(["base=a", "finetuned=b", "alpha=0.5", "out=o", "overwrite=true"]).overwrite
    with pytest.raises(ConfigError, match=r"unknown key 'alfa'.*Did you mean 'alpha'"):
        parse_words(["base=a", "finetuned=b", "alfa=0.5", "out=o"])
    with pytest.raises(ConfigError, match=r"alpha=x: alpha takes list\[float\]"):
        parse_words(["base=a", "finetuned=b", "alpha=x", "out=o"])
    for words, message in (
        (["alpha=1.5"], "must lie in 0..1"),
        ([], "needs alpha="),
        (["alpha=0.5", "finetuned=b,c"], "takes one fine-tuned parent"),
        (["alpha=0.5", "method=lerp"], "unknown method 'lerp'"),
        (["alpha=0.5", "old=env=arm_reach"], "old= is for a sweep"),
        (["alpha=0,1", "old=env=arm_reach", "test_seed=10"], "overlaps"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_words(["base=a", "finetuned=b", "out=o", *words])

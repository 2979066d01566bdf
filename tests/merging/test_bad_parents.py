# SPDX-License-Identifier: Apache-2.0
"""Parents that don't go together: one line that says what and why, and nothing is written."""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.cli import main
from robopost.errors import CheckpointError, RobopostError
from robopost.merging.config import MergeConfig
from robopost.merging.merge import merge
from robopost.policies.flow import Flow, FlowConfig
from robopost.registry import POLICIES

spec = importlib.util.spec_from_file_location("builders", Path(__file__).parent / "builders.py")
builders = importlib.util.module_from_spec(spec)
spec.loader.exec_module(builders)
SPEC, EMBED, HEAD = builders.SPEC, builders.EMBED, builders.HEAD
make_policy, vla, write_hf = builders.make_policy, builders.vla, builders.write_hf


@pytest.fixture
def refused(tmp_path):
    def check(base, tuned, message, **options):
        options = {"alpha": [0.5]} | options
        with pytest.raises(RobopostError, match=message) as caught:
            merge(MergeConfig(base=str(base), finetuned=[str(tuned)], out=str(tmp_path / "out"), **options))
        assert "\n" not in str(caught.value)
        left = [path.name for path in tmp_path.iterdir() if "out" in path.name]
        assert left == []

    return check


def folders(tmp_path, base=None, tuned=None, shards=1, files=({}, {})):
    return (
        write_hf(tmp_path / "base", base or vla(0), shards, **files[0]),
        write_hf(tmp_path / "tuned", tuned or vla(1), shards, **files[1]),
    )


# Files.


def test_missing_shard(tmp_path, refused):
    pair = folders(tmp_path, shards=3)
    (tmp_path / "tuned" / "model-00002-of-00003.safetensors").unlink()
    refused(*pair, "model-00002-of-00003.safetensors, which model.safetensors.index.json names, is missing")


@pytest.mark.parametrize("cut", [1, 300, "header", "all"])
def test_truncated_shard(tmp_path, refused, cut):
    pair = folders(tmp_path, shards=3)
    path = tmp_path / "base" / "model-00001-of-00003.safetensors"
    data = path.read_bytes()
    keep = {"header": 40, "all": 0}.get(cut) if isinstance(cut, str) else len(data) - cut
    path.write_bytes(data[:keep])
    refused(*pair, "truncated")


def test_damaged_header_and_trailing_bytes(tmp_path, refused):
    pair = folders(tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data + b"x")
    refused(*pair, "truncated or damaged")
    path.write_bytes(data[:8] + b"?" + data[9:])
    refused(*pair, "corrupt or no safetensors file")


def test_index_that_lies(tmp_path, refused):
    pair = folders(tmp_path, shards=2)
    path = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(*pair, "places 'ghost' in model-00001-of-00002.safetensors, which lacks it")
    index["weight_map"]["ghost"] = "../tuned/model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    refused(*pair, "outside its folder")
    path.write_text("{")
    refused(*pair, "is no index of shards")


def test_nothing_there(tmp_path, refused):
    _, tuned = folders(tmp_path)
    refused(tmp_path / "nowhere", tuned, "no checkpoint at .*nowhere: it does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, tuned, "no safetensors weights in .*: expected model.safetensors.index.json")
    (empty / "pytorch_model.bin").write_bytes(b"x")
    refused(empty, tuned, "pytorch_model.bin is a pickle, which is not read here")
    (empty / "adapter_model.safetensors").write_bytes(b"x")
    refused(empty, tuned, "is a LoRA adapter")


# Tensors.


def test_names_and_shapes(tmp_path, refused):
    extra = vla(1) | {"action_head.new": torch.zeros(3)}
    base, tuned = folders(tmp_path, tuned=extra)
    refused(base, tuned, "has 'action_head.new', which .*base lacks")
    refused(tuned, base, "lacks 'action_head.new', which .*tuned has")
    wide = vla(1) | {"projector.fc1.weight": torch.zeros(16, 9)}
    other = write_hf(tmp_path / "wide", wide)
    refused(base, other, r"'projector.fc1.weight' has shape \(16, 8\) in .*base and \(16, 9\) in .*wide")


def test_more_tokens_in_one_parent(tmp_path, refused):
    more = vla(1) | {EMBED: torch.zeros(41, 16), HEAD: torch.zeros(41, 16)}
    refused(
        *folders(tmp_path, tuned=more), "their vocabularies differ. Fix: fine-tune with the tokenizer of base"
    )


def test_dtypes(tmp_path, refused):
    base, tuned = folders(tmp_path, tuned=vla(1, torch.bfloat16))
    refused(base, tuned, "is F32 in .*base and BF16 in .*tuned. Fix: dtype=float32")
    merge(MergeConfig(base=base, finetuned=[tuned], alpha=[0.5], dtype="float32", out=str(tmp_path / "fine")))


def test_quantised(tmp_path, refused):
    low = vla(1) | {HEAD: vla(1)[HEAD].to(torch.float8_e4m3fn)}
    base, tuned = folders(tmp_path, tuned=low)
    refused(base, tuned, "quantised dtype F8_E4M3")
    other = write_hf(tmp_path / "q", vla(2))
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({"model_type": "openvla", "quantization_config": {}})
    )
    refused(base, other, "is quantised")


def test_buffers_must_agree_or_be_chosen(tmp_path, refused):
    base, tuned = (vla(seed) | {"steps": torch.tensor(seed)} for seed in (0, 1))
    for seed, model in enumerate((base, tuned)):
        model["projector.bn.running_mean"] = torch.full((4,), float(seed))
    pair = folders(tmp_path, base, tuned)
    refused(*pair, r"buffer '.*' \(.*\) differs between .*Fix: buffers=base or buffers=finetuned")
    for choice, value in (("base", 0), ("finetuned", 1)):
        out = tmp_path / f"with_{choice}"
        merge(MergeConfig(base=pair[0], finetuned=[pair[1]], alpha=[0.5], buffers=choice, out=str(out)))
        merged = load_file(out / "model.safetensors")
        assert merged["steps"] == value
        assert merged["projector.bn.running_mean"][0] == value


def test_lora_factors(tmp_path, refused):
    factors = {"x.lora_A.weight": torch.zeros(2, 4), "x.lora_B.weight": torch.ones(4, 2)}
    base, tuned = (vla(seed) | factors for seed in (0, 1))
    refused(*folders(tmp_path, base, tuned), "fold the LoRA adapter into the weights first")


# Tokenizers and normalisers.


def test_tokenizers(tmp_path, refused):
    words = {"tokenizer__json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "padding": None})}
    other = {"tokenizer__json": json.dumps({"model": {"vocab": {"a": 1, "b": 0}}, "padding": None})}
    padded = {"tokenizer__json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "padding": {"length": 8}})}
    base, tuned = folders(tmp_path, files=(words, other))
    refused(base, tuned, "tokenizer.json of .*base and .*tuned differs")
    for name, files in (("padded", padded), ("none", {})):
        third = write_hf(tmp_path / name, vla(1), **files)
        merge(MergeConfig(base=base, finetuned=[third], alpha=[0.5], out=str(tmp_path / f"m_{name}")))
    assert "none has no tokenizer.json" in (tmp_path / "m_none" / "README.md").read_text()
    assert "Warnings" not in (tmp_path / "m_padded" / "README.md").read_text()


def test_statistics_of_lerobot_processors(tmp_path, refused):
    base, tuned = folders(tmp_path)
    name = "policy_preprocessor_step_5_normalizer_processor.safetensors"
    stats = {"observation.state.mean": torch.zeros(3)}
    save_file(stats, tmp_path / "base" / name)
    refused(base, tuned, f"statistics {name} of .*: .*tuned lacks it")
    save_file({"observation.state.mean": torch.ones(3)}, tmp_path / "tuned" / name)
    refused(base, tuned, f"statistics {name} of .*: it differs; they were trained in different units")
    save_file(stats, tmp_path / "tuned" / name)
    merge(MergeConfig(base=base, finetuned=[tuned], alpha=[0.5], out=str(tmp_path / "fine")))
    assert torch.equal(load_file(tmp_path / "fine" / name)["observation.state.mean"], torch.zeros(3))


def test_statistics_in_json_and_in_buffers(tmp_path, refused):
    files = [{"dataset_statistics__json": json.dumps({"bridge": {"q01": [value]}})} for value in (0, 1)]
    base, tuned = folders(tmp_path, files=files)
    refused(base, tuned, "statistics dataset_statistics.json")
    models = [
        vla(i) | {"normalize_inputs.buffer_observation_state.mean": torch.full((3,), float(i))}
        for i in (0, 1)
    ]
    pair = write_hf(tmp_path / "c", models[0]), write_hf(tmp_path / "d", models[1])
    refused(*pair, "normaliser 'normalize_inputs.buffer_observation_state.mean' of .* differs .hashes ")


def test_different_models(tmp_path, refused):
    base, tuned = folders(tmp_path)
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({"model_type": "pi0"}))
    refused(base, tuned, 'are different models: config.json has model_type="openvla" and "pi0"')
    (tmp_path / "tuned" / "config.json").write_text(
        json.dumps({"model_type": "openvla", "norm_stats": {"a": 1}})
    )
    refused(base, tuned, "were normalised differently: config.json has norm_stats")


def test_policies_with_another_normaliser_or_config(tmp_path, refused):
    base = make_policy(tmp_path / "base", 0)
    policy = load_policy(make_policy(tmp_path / "other", 1))
    policy.normaliser.obs_scale_state.fill_(2.0)
    save_folder(tmp_path / "tuned", policy_files(policy))
    refused(
        base,
        tmp_path / "tuned",
        r"'normaliser.obs_scale_state' of .* differs \(hashes \w{12} and \w{12}\)",
    )
    other = make_policy(tmp_path / "velocity", 1, prediction="velocity")
    refused(base, other, 'has policy.prediction="sample", .* has "velocity"')
    executed = make_policy(tmp_path / "executed", 1, execute=2)
    merge(MergeConfig(base=base, finetuned=[executed], alpha=[0.5], out=str(tmp_path / "fine")))
    hf = write_hf(tmp_path / "hf", vla(0))
    refused(base, hf, "is a robopost checkpoint, .* is hf")


def test_errors_are_one_line_on_the_command_line(tmp_path, capsys):
    base, tuned = folders(tmp_path)
    (tmp_path / "tuned" / "model.safetensors").write_bytes(b"")
    out = tmp_path / "out"
    assert main(["merge", f"base={base}", f"finetuned={tuned}", "alpha=0.5", f"out={out}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert not out.exists()


def test_a_shard_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    from robopost.merging import shards

    base, tuned = folders(tmp_path)
    monkeypatch.setattr(shards.os, "preadv", lambda *args: 0)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        merge(MergeConfig(base=base, finetuned=[tuned], alpha=[0.5], hash=False, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


# Adapters of robopost's own policies are folded.


@dataclass
class AdaptedConfig(FlowConfig):
    name: str = "adapted_flow"
    lora_rank: int = 0


class AdaptedFlow(Flow):
    """A flow policy with one LoRA layer, as the VLA policies have them."""

    registry_name = "adapted_flow"

    def __init__(self, config, spec):
        super().__init__(config, spec)
        if config.lora_rank:
            rows, columns = self.net.time.net[0].weight.shape
            self.net.lora_A = torch.nn.Parameter(torch.randn(config.lora_rank, columns))
            self.net.lora_B = torch.nn.Parameter(torch.randn(rows, config.lora_rank))

    def merge_lora(self):
        with torch.no_grad():
            self.net.time.net[0].weight += self.net.lora_B @ self.net.lora_A
        del self.net.lora_A, self.net.lora_B
        self.config.lora_rank = 0


def test_adapters_of_policies_are_folded(tmp_path, monkeypatch):
    POLICIES.names()  # loads all of them: the copy that this test adds to must be whole
    monkeypatch.setattr(POLICIES, "_entries", dict(POLICIES._entries))
    POLICIES.register("adapted_flow", config=AdaptedConfig)(AdaptedFlow)
    sizes = {"horizon": 4, "width": 16, "depth": 1, "steps": 2}
    torch.manual_seed(0)
    base = AdaptedFlow(AdaptedConfig(**sizes), SPEC)
    tuned = AdaptedFlow(AdaptedConfig(**sizes, lora_rank=2), SPEC)
    tuned.load_state_dict(base.state_dict(), strict=False)
    for name, policy in (("base", base), ("tuned", tuned)):
        save_folder(tmp_path / name, policy_files(policy))
    options = {"base": str(tmp_path / "base"), "finetuned": [str(tmp_path / "tuned")], "alpha": [0.5]}
    merge(MergeConfig(**options, out=str(tmp_path / "out")))
    merged = load_policy(tmp_path / "out")
    weight, delta = base.net.time.net[0].weight, tuned.net.lora_B @ tuned.net.lora_A
    assert torch.allclose(merged.net.time.net[0].weight, weight + 0.5 * delta, atol=1e-5)
    assert "1 LoRA adapters were folded" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned"]

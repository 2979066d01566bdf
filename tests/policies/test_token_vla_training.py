# SPDX-License-Identifier: Apache-2.0
import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from robopost.artefacts.checkpoint import latest, load_policy, load_tensors, policy_files, save_folder
from robopost.compose import compose
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.merging.groups import group_of
from robopost.nets.flat import Flat, adam
from robopost.nets.vla.language import LanguageConfig
from robopost.policies.token_vla import TokenVLA
from robopost.policies.token_vla_config import TokenVLAConfig

found = importlib.util.spec_from_file_location("token_vla_lab", Path(__file__).parent / "token_vla_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
SPEC, TEXTS, tower, make, observe, some_tokens = (
    getattr(lab, name) for name in ("SPEC", "TEXTS", "tower", "make", "observe", "some_tokens")
)


def one_step(policy, lr=1e-2):
    flat = Flat(policy)
    optimizer = adam(flat, lr)
    chunk = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.ones(3, 2, dtype=torch.bool)
    loss = policy.bc_loss(observe(), chunk, mask, torch.Generator().manual_seed(0))
    flat.backward(loss)
    optimizer.step()
    return loss, flat


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_trains_adapters_and_action_parts_alone_and_merges(dtype):
    pytest.importorskip("peft")
    policy = make(lora_rank=2, dtype=dtype)
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    _, flat = one_step(policy)
    assert flat.data.dtype == torch.float32
    moved = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".lora_" in n or n.startswith(("projector.", "proprio_projector.", "slots")) for n in moved)
    for _ in range(3):
        one_step(policy)
    obs = observe()
    want = policy.logits(obs)
    policy.merge_lora()
    got = policy.logits(obs)
    assert not any("lora" in name for name in policy.state_dict())
    assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
    assert all(p.requires_grad for p in policy.parameters())
    close = 1e-4 if dtype == "float32" else 0.05 * float(want.detach().abs().max())
    torch.testing.assert_close(got, want, atol=close, rtol=1e-4)


def test_bfloat16_weights_give_float32_logits():
    policy = make(dtype="bfloat16")
    assert policy.language.dtype == torch.bfloat16
    assert policy.logits(observe()).dtype == torch.float32
    loss, flat = one_step(policy)
    assert loss.dtype == torch.float32
    assert flat.data.dtype == torch.bfloat16
    assert policy.normaliser.action_scale.dtype == torch.float32


def test_a_frozen_tower_stays_and_its_features_are_shared():
    policy, other = make(freeze_vision=True), make(seed=1, freeze_vision=True)
    other.vision.load_state_dict(policy.vision.state_dict())
    obs = observe()
    features = policy.vision_features(obs)
    assert not features.requires_grad
    assert torch.equal(other.logits_from(features, obs), other.logits(obs))
    before = copy.deepcopy(policy.vision.state_dict())
    one_step(policy)
    assert all(torch.equal(value, before[name]) for name, value in policy.vision.state_dict().items())


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = make(), make(gradient_checkpointing=True)
    saving.load_state_dict(plain.state_dict())
    grads = [one_step(policy)[1].grad.clone() for policy in (plain, saving)]
    torch.testing.assert_close(*grads)


# -- files and learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "openvla", "tokenizer": "bpe", "text_tokens": 320, "prompt_length": 40},
        {"lora_rank": 2},
    ],
)
def test_saved_policies_carry_their_tokenizer(tmp_path, changes):
    policy = make(**changes)
    save_folder(tmp_path / "policy", policy_files(policy))
    again = load_policy(tmp_path / "policy")
    assert again.tokenizer_hash == policy.tokenizer_hash
    obs = observe()
    tokens = some_tokens(policy)
    assert torch.equal(again.logits(obs, tokens), policy.logits(obs, tokens))


def test_the_tokenizer_is_deterministic():
    assert make().tokenizer_hash == make(seed=3).tokenizer_hash
    assert make().tokenizer_hash != make(texts=["another task"]).tokenizer_hash


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "fast"}, "policy.layout"),
        ({"texts": []}, "policy.texts"),
        ({"text_tokens": 5}, "policy.text_tokens"),
        ({"vocab": 270}, "policy.vocab"),
        ({"proprio": [4, 3]}, "policy.proprio"),
        ({"siglip": tower(patch=7)}, "policy.siglip.patch"),
        ({"siglip": tower(layers=0)}, "nothing sees the images"),
        ({"prompt_length": 4}, "policy.prompt_length"),
        ({"tokenizer": "/nowhere"}, "no tokenizer"),
        ({"template": "do it"}, "instruction"),
        ({"lora_rank": 2, "lora_targets": ["nope"]}, "policy.lora_targets"),
        ({"history": 2}, "policy.history"),
        ({"language": LanguageConfig(width=10, heads=4)}, "policy.language.width"),
    ],
)
def test_what_does_not_fit_is_said(changes, message):
    if "prompt_length" in changes:
        changes = changes | {"texts": list(TEXTS)}
    with pytest.raises(ConfigError, match=message):
        make(**changes)


@pytest.mark.parametrize("changes", [{}, {"dino": tower(), "lora_rank": 2}, {"layout": "openvla"}])
def test_every_parameter_is_of_one_part(changes):
    for name, _ in make(**changes).named_parameters():
        assert group_of(name, TokenVLA.module_groups) is not None, name
    part = lambda name: group_of(name, TokenVLA.module_groups)  # noqa: E731
    assert part("vision.towers.siglip.model.embeddings.patch_embedding.weight") == "vision"
    assert part("language.model.embed_tokens.weight") == "language"
    assert part("language.lm_head.weight") == part("slots") == "action"


@pytest.mark.parametrize("layout", ["oft", "openvla"])
def test_it_learns_a_handful_of_chunks(layout):
    torch.manual_seed(0)
    policy = TokenVLA(
        TokenVLAConfig(
            layout=layout,
            horizon=2,
            siglip=tower(),
            image_shift=0,
            language=LanguageConfig(width=32, layers=2, heads=2, mlp=48),
        ),
        SPEC,
    )
    obs = observe(rows=4, texts=TEXTS[:2])
    obs = obs | {"image": obs["image"][:1].expand(4, -1, -1, -1), "state": torch.zeros(4, 5)}
    obs["image"] = obs["image"].clone()
    obs["image"][2:] = 255 - obs["image"][2:]
    # Two images times two instructions: neither alone tells the chunk.
    chunk = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    flat = Flat(policy)
    optimizer = adam(flat, 5e-3)
    mask = torch.ones(4, 2, dtype=torch.bool)
    for _ in range(150):
        flat.backward(policy.bc_loss(obs, chunk, mask, None))
        flat.clip(1.0)
        optimizer.step()
    error = (policy.act(obs, deterministic=True).chunk - chunk).abs().max()
    assert error < 0.02
    swapped = obs | {"instruction": obs["instruction"].roll(1, 0)}
    assert (policy.act(swapped, deterministic=True).chunk - chunk).abs().max() > 0.1


def write_store(path):
    episodes = []
    for index in range(3):
        obs = {key: value.numpy() for key, value in observe(rows=6, seed=index).items()}
        obs["state"] = obs["state"].astype(np.float32)
        action = np.random.default_rng(index).uniform(-1, 1, (5, 2)).astype(np.float32)
        reward = np.zeros(5, np.float32)
        episodes.append(Episode(obs=obs, action=action, reward=reward, terminated=False, truncated=True))
    with EpisodeStore.create(path, spec=SPEC, fps=10, source="test") as store:
        for episode in episodes:
            store.append(episode)


@pytest.mark.parametrize("options", [[], ["policy.lora_rank=2", "policy.dtype=bfloat16"]])
def test_a_resumed_run_of_cloning_goes_on_bitwise(tmp_path, options):
    write_store(tmp_path / "store.zarr")
    sizes = [
        "policy.siglip.width=16",
        "policy.siglip.layers=1",
        "policy.siglip.mlp=16",
        "policy.siglip.patch=8",
    ]
    sizes += ["policy.language.width=16", "policy.language.layers=1", "policy.language.mlp=16"]
    words = [
        "algo=bc",
        "policy=token_vla",
        "policy.horizon=2",
        *sizes,
        *options,
        "algo.batch_size=4",
        "env=null",
    ]
    words += [f"data.path={tmp_path / 'store.zarr'}", "loop.checkpoint_every=3", "accel.threads=1"]

    def run(name, steps, key="out"):
        train(compose([*words, f"{key}={tmp_path / name}", f"loop.steps={steps}"]))
        return load_tensors(latest(tmp_path / name) / "policy.safetensors")

    whole = run("whole", 6)
    run("halves", 3)
    halves = run("halves", 6, "resume")
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    loaded = load_policy(tmp_path / "halves")
    assert loaded.act(observe()).chunk.shape == (3, 2, 2)


@pytest.mark.parametrize("layout", ["oft", "openvla"])
def test_the_forward_pass_is_one_graph(layout):
    policy, obs = make(layout=layout), observe()
    tokens = some_tokens(policy)
    want = policy.logits(obs, tokens)
    whole = torch.compile(policy.logits, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(obs, tokens), want)


def test_the_config_files_of_released_checkpoints_ask_for_one():
    for name, layout in (("openvla", "openvla"), ("openvla_oft", "oft")):
        config = compose(["algo=bc", f"policy={name}", "env=null"]).policy
        assert (config.layout, config.dtype, config.lora_rank) == (layout, "bfloat16", 32)
        with pytest.raises(ConfigError, match=r"policy\.checkpoint=FOLDER: no such folder"):
            TokenVLA(config, SPEC)


def test_numpy_of_the_environment_fits():
    from robopost.vector import to_torch

    obs = {key: value.numpy() for key, value in observe().items()}
    chunk = make().act(to_torch(obs, torch.device("cpu"))).chunk
    assert chunk.shape == (3, 2, 2)
    assert np.isfinite(chunk.numpy()).all()

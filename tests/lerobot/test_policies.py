# SPDX-License-Identifier: Apache-2.0
"""policy=lerobot: the same chunks and losses as lerobot's own, checkpoints both ways, SmolVLA as a flow."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import tiny
from lerobot.configs.types import NormalizationMode
from lerobot.policies.factory import get_policy_class, make_pre_post_processors
from lerobot.policies.pretrained import PreTrainedConfig

from robopost.artefacts.checkpoint import load_policy, policy_files, save_folder
from robopost.data.batch import Spec
from robopost.errors import CheckpointError, ConfigError
from robopost.nets.flat import frozen_copy
from robopost.nets.vla.prompts import to_bytes
from robopost.policies.lerobot import LeRobotConfig, LeRobotPolicy, lerobot, seeded
from robopost.policies.lerobot_parts import LeRobotParts, collect
from robopost.policies.smolvla import SmolVLA, block_mask

SPEC = Spec(
    {"image": ((32, 32, 3), "uint8"), "state": ((6,), "float32"), "instruction": ((64,), "uint8")},
    4,
    (-5.0,) * 4,
    (5.0,) * 4,
)
TEXTS = (*tiny.TEXTS, "open it")


def observe(batch=4, history=0, seed=3):
    g = torch.Generator().manual_seed(seed)
    lead = (batch, history) if history else (batch,)
    return {
        "image": torch.randint(0, 256, (*lead, 32, 32, 3), generator=g).to(torch.uint8),
        "state": torch.randn(*lead, 6, generator=g),
        "instruction": torch.stack([to_bytes(TEXTS[i % 4]) for i in range(batch)]),
    }


def draw(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind, tmp_path, config=None, **options):
    folder = tmp_path / kind
    if not folder.exists():
        getattr(tiny, kind)(folder, **options)
    return lerobot(LeRobotConfig(path=str(folder), **(config or {})), SPEC)


def theirs(folder):
    """The policy and its processors as lerobot loads them."""
    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    return policy, *make_pre_post_processors(config, str(folder))


def frames(obs):
    """One observation per call as lerobot's datasets give it."""
    return {
        "observation.image": obs["image"].permute(0, 3, 1, 2).float() / 255,
        "observation.state": obs["state"],
        "task": [bytes(row.tolist()).rstrip(b"\0").decode() for row in obs["instruction"]],
    }


# --- the same as lerobot


@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_chunks_are_lerobots(kind, tmp_path):
    # As many action dimensions as the task: SmolVLA itself denoises the padded ones, ours follow a fixed path.
    policy = make(kind, tmp_path, **({"max_action_dim": 4} if kind == "smolvla" else {}))
    obs = observe()
    model, pre, post = theirs(tmp_path / kind)
    batch = pre(frames(obs))
    generator = torch.Generator().manual_seed(5)
    chunk = policy.act(obs, generator=generator).chunk
    if kind == "smolvla":
        noise = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(5))
        wanted = post(model.predict_action_chunk(batch, noise=noise))
    else:
        wanted = post(model.predict_action_chunk(batch))
    assert wanted.std() > 0.1
    torch.testing.assert_close(chunk, wanted.clamp(-5, 5), rtol=1e-5, atol=1e-5)


def test_diffusion_sees_a_history_and_gives_what_lerobot_executes(tmp_path):
    policy = make("diffusion", tmp_path)
    assert (policy.history, policy.horizon, policy.execute) == (2, 7, 6)
    obs = observe(history=2)
    with seeded(torch.Generator().manual_seed(5), torch.device("cpu")):
        model, pre, post = theirs(tmp_path / "diffusion")
    model.reset()
    for step in (0, 1):  # lerobot collects its history itself; the first call acts too
        batch = pre(
            frames(
                {"image": obs["image"][:, step], "state": obs["state"][:, step]}
                | {"instruction": obs["instruction"]}
            )
        )
        if step:
            model._queues["action"].clear()
        with seeded(torch.Generator().manual_seed(5), torch.device("cpu")):
            first = post(model.select_action(batch))
    chunk = policy.act(obs, generator=torch.Generator().manual_seed(5)).chunk
    assert chunk.shape == (4, 7, 4)
    torch.testing.assert_close(chunk[:, 0], first.clamp(-5, 5), rtol=1e-4, atol=1e-5)


def test_randomness_is_ours_and_leaves_torchs_alone(tmp_path):
    policy = make("diffusion", tmp_path)
    obs = observe(history=2)
    state = torch.get_rng_state()
    a, b, c = (policy.act(obs, generator=torch.Generator().manual_seed(s)).chunk for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    same = [policy.act(obs, deterministic=True).chunk for _ in range(2)]
    assert torch.equal(*same)
    loss = [
        policy.bc_loss(obs, draw(4, 7, 4), torch.ones(4, 7).bool(), torch.Generator()).item()
        for _ in range(2)
    ]
    assert loss[0] == loss[1]
    assert torch.equal(torch.get_rng_state(), state)


# --- losses


def test_act_leaves_padding_out(tmp_path):
    policy = make("act", tmp_path, use_vae=False, dropout=0.0)
    obs, chunk = observe(), draw(4, 6, 4)
    mask = torch.ones(4, 6).bool()
    mask[:, 3:] = False
    loss = policy.bc_loss(obs, chunk, mask, torch.Generator())
    model, pre, _ = theirs(tmp_path / "act")
    batch = pre(frames(obs) | {"action": chunk})
    with torch.no_grad():
        error = (model.predict_action_chunk(batch) - batch["action"]).abs()
    assert loss.item() == pytest.approx(
        error[:, :3].sum().item() / error.numel(), rel=1e-4
    )  # lerobot's denominator
    chunk[:, 3:] = 99.0
    assert policy.bc_loss(obs, chunk, mask, torch.Generator()).item() == loss.item()


def test_diffusion_leaves_padding_and_the_past_out(tmp_path):
    policy = make("diffusion", tmp_path, do_mask_loss_for_padding=False)
    obs, chunk = observe(history=2), draw(4, 7, 4)
    none = policy.bc_loss(obs, chunk, torch.zeros(4, 7).bool(), torch.Generator())
    every = policy.bc_loss(obs, chunk, torch.ones(4, 7).bool(), torch.Generator())
    assert none.item() == 0.0
    assert every.item() > 0.1


def test_smolvla_reads_a_key_that_nobody_writes(tmp_path):
    """If the first half fails, lerobot has mended it; ours masks by itself either way."""
    policy = make("smolvla", tmp_path)
    obs, chunk = observe(), draw(4, 6, 4)
    model, pre, _ = theirs(tmp_path / "smolvla")
    batch = pre(frames(obs) | {"action": chunk})
    padded = torch.zeros(4, 6).bool()
    padded[:, 3:] = True
    noise, time = draw(4, 6, 7), torch.full((4,), 0.5)
    losses = [
        model.forward(dict(batch) | extra, noise=noise, time=time)[0].item()
        for extra in ({}, {"action_is_pad": padded}, {"actions_id_pad": padded})
    ]
    assert losses[0] == losses[1]
    assert losses[2] < losses[0]
    full, half = (
        policy.bc_loss(obs, policy.normaliser.action(chunk), mask, torch.Generator()).item()
        for mask in (~torch.zeros_like(padded), ~padded)
    )
    assert full != half


@pytest.fixture
def smolvla(tmp_path) -> SmolVLA:
    return make("smolvla", tmp_path)


def test_smolvla_loss_by_hand(smolvla):
    obs, chunk = observe(), draw(4, 6, 4)
    mask = torch.ones(4, 6).bool()
    mask[0, 3:], mask[1, 1:], mask[2] = False, False, False
    loss = smolvla.bc_loss(obs, chunk, mask, torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(4, 6, 4, generator=generator)
    t = 1 - (0.001 + 0.999 * torch.rand(4, generator=generator) ** (2 / 3))
    clean, at = chunk * mask[..., None], t[:, None, None]
    # lerobot's training forward of the whole sequence, element by element, the truncated chunks of it
    x, padding = (1 - at) * noise + at * clean, (1 - at) * smolvla.net.padding
    velocity, _ = joint(smolvla, obs, torch.cat([x, padding], -1), t)
    error = (velocity[..., :4] - (chunk - noise)).square()
    wanted = sum(error[b, : int(mask[b].sum())].sum() for b in range(4)) / (4 * mask.sum())
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    none = smolvla.bc_loss(obs, chunk, torch.zeros_like(mask), torch.Generator())
    assert none.item() == 0.0


def test_smolvla_padded_dimensions_carry_no_gradient(smolvla):
    smolvla.bc_loss(observe(), draw(4, 6, 4), torch.ones(4, 6).bool(), torch.Generator()).backward()
    out = smolvla.encoder.policy.model.action_out_proj
    assert out.weight.grad[:4].abs().min() > 0
    assert not out.weight.grad[4:].any()
    assert not out.bias.grad[4:].any()
    assert smolvla.encoder.policy.model.state_proj.weight.grad[:, :6].any()
    assert not smolvla.encoder.policy.model.state_proj.weight.grad[:, 6:].any()


# --- masks and the cache


def joint(policy, obs, x, t):
    """(velocity, hidden prefix) of lerobot's training forward: one sequence [prefix | actions], no cache."""
    from lerobot.policies.smolvla.modeling_smolvla import make_att_2d_masks

    model = policy.encoder.policy.model
    prefix, valid, blocks = policy.encoder.tokens(obs)
    suffix, own, causal = model.embed_suffix(x, 1 - t)
    pad = torch.cat([valid, own], 1)
    mask = make_att_2d_masks(pad, torch.cat([blocks, causal], 1))
    (hidden, out), _ = model.vlm_with_expert.forward(
        attention_mask=mask,
        position_ids=torch.cumsum(pad, 1) - 1,
        past_key_values=None,
        inputs_embeds=[prefix, suffix],
        use_cache=False,
        fill_kv_cache=False,
    )
    return -model.action_out_proj(out[:, -x.shape[1] :].float()), hidden


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 10])
def test_cached_prefix_equals_the_whole_forward_with_padded_language(tmp_path, steps):
    policy = make("smolvla", tmp_path, num_steps=steps)
    assert policy.num_steps == steps
    obs, x = observe(), draw(4, 6, 4)
    assert not policy.encoder.tokens(obs)[1].all()
    chain = policy.chain(obs, x)
    for k in range(steps):
        t = torch.full((4,), k / steps)
        padding = (1 - t)[:, None, None] * policy.net.padding
        velocity, _ = joint(policy, obs, torch.cat([x, padding], -1), t)
        x = x + velocity[..., :4] / steps
        torch.testing.assert_close(chain[k + 1], x, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_actions_are_causal_and_the_prefix_is_blind_to_them(smolvla):
    obs, x, t = observe(), draw(4, 6, 4), torch.full((4,), 0.4)
    last, first = x.clone(), x.clone()
    last[:, -1] += 1.0
    first[:, 0] += 1.0
    cond = smolvla.encoder(obs)
    base = smolvla.velocity(x, t, cond)
    change = (smolvla.velocity(last, t, cond) - base).abs().amax((0, 2))
    assert not change[:-1].any()
    assert change[-1] > 1e-4
    assert (smolvla.velocity(first, t, cond) - base).abs().amax((0, 2)).min() > 1e-6
    padding = (1 - t)[:, None, None] * smolvla.net.padding
    hidden = [joint(smolvla, obs, torch.cat([chunk, padding], -1), t)[1] for chunk in (x, last)]
    valid = smolvla.encoder.tokens(obs)[1]  # a padded token looks at everything alike, and nobody looks at it
    assert torch.equal(hidden[0][valid], hidden[1][valid])


def test_blocks_see_up_to_their_own():
    valid = torch.tensor([[True, False, True, True]])
    mask = block_mask(valid, torch.tensor([[0, 0, 1, 1]]))
    assert mask[0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]


@torch.no_grad()
def test_every_input_of_smolvla_matters(smolvla):
    obs, x, t = observe(), draw(4, 6, 4), torch.full((4,), 0.4)
    base = smolvla.velocity(x, t, smolvla.encoder(obs))
    other = observe(seed=9) | {"instruction": obs["instruction"].roll(1, 0)}
    for key in obs:
        changed = smolvla.velocity(x, t, smolvla.encoder(obs | {key: other[key]}))
        assert (changed - base).abs().amax((1, 2)).min() > 1e-6, key


def test_first_steps_of_smolvla_can_be_left_to_a_frozen_copy(smolvla):
    x, obs = draw(4, 6, 4), observe()
    before = smolvla.chain(obs, x)
    smolvla.freeze_first(2)
    for a, b in zip(before, smolvla.chain(obs, x), strict=True):
        torch.testing.assert_close(a, b)
    frozen = {name for name, p in smolvla.named_parameters() if name.startswith("frozen.")}
    assert len(frozen) * 2 == len(dict(smolvla.named_parameters()))
    copy, flat = frozen_copy(smolvla)
    assert torch.equal(copy.chain(obs, x)[-1], smolvla.chain(obs, x)[-1])
    flat.data.zero_()
    assert not torch.equal(copy.chain(obs, x)[-1], smolvla.chain(obs, x)[-1])


# --- checkpoints


@pytest.mark.parametrize("kind", ["act", "diffusion", "smolvla"])
def test_checkpoints_of_ours_and_folders_of_lerobot(kind, tmp_path):
    policy = make(kind, tmp_path)
    history = 2 if kind == "diffusion" else 0
    obs, seed = observe(history=history), lambda: torch.Generator().manual_seed(0)
    chunk = policy.act(obs, generator=seed()).chunk
    save_folder(tmp_path / "p", policy_files(policy))
    for path in [tmp_path / kind, tmp_path / f"{kind}-vlm"]:
        if path.exists():
            path.rename(tmp_path / f"gone-{path.name}")  # a checkpoint needs nothing else
    loaded = load_policy(tmp_path / "p")
    assert type(loaded) is type(policy)
    assert torch.equal(loaded.act(obs, generator=seed()).chunk, chunk)
    assert loaded.normaliser.provenance == policy.normaliser.provenance
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(1.01)
    moved = loaded.act(obs, generator=seed()).chunk
    loaded.export(tmp_path / "back")
    model, pre, post = theirs(tmp_path / "back")
    again = lerobot(LeRobotConfig(path=str(tmp_path / "back")), SPEC)
    torch.testing.assert_close(again.act(obs, generator=seed()).chunk, moved)
    if kind == "act":
        torch.testing.assert_close(post(model.predict_action_chunk(pre(frames(obs)))).clamp(-5, 5), moved)
    else:
        for (name, a), b in zip(
            model.state_dict().items(), parts(loaded).policy.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name


def parts(policy) -> LeRobotParts:
    return policy.parts if isinstance(policy, LeRobotPolicy) else policy.encoder.parts


# --- statistics


@pytest.mark.parametrize("mode", [m.value for m in NormalizationMode])
@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_processors_there_and_back(kind, mode, tmp_path):
    mapping = {
        "VISUAL": NormalizationMode.IDENTITY,
        "STATE": NormalizationMode(mode),
        "ACTION": NormalizationMode(mode),
    }
    policy = make(kind, tmp_path, normalization_mapping=mapping)
    action = draw(4, 6, 4).clamp(-4.9, 4.9)
    inside = parts(policy).normalise(action)
    assert torch.equal(inside, action) is (mode == "IDENTITY")
    torch.testing.assert_close(parts(policy).unnormalise(inside), action, rtol=1e-5, atol=1e-5)
    norm = policy.normaliser
    torch.testing.assert_close(norm.unnormalise_action(norm.action(action)), action, rtol=1e-5, atol=1e-5)
    if kind == "smolvla":  # our units are its units
        torch.testing.assert_close(norm.action(action), inside, rtol=1e-4, atol=1e-5)
        assert norm.provenance["action"] == f"lerobot {mode}"
    else:
        assert torch.equal(norm.action(action), action)
        assert norm.provenance["action"] == "identity"
    assert norm.provenance["obs"] == "identity"


@pytest.mark.parametrize("gone", ["observation.state", "action"])
def test_missing_statistics_raise(gone, tmp_path):
    stats = tiny.statistics(6, 4)
    del stats[gone]
    with pytest.raises(
        CheckpointError, match=rf"normalises '{gone}' with MEAN_STD and its processors have no 'mean'"
    ):
        make("smolvla", tmp_path, stats=stats)


def test_statistics_of_the_data_replace_those_of_the_processors(tmp_path):
    policy = make("act", tmp_path, config={"statistics": "data"}, stats={})
    assert not policy.normaliser_fixed
    ours = {
        "state": {"mean": [1.0] * 6, "std": [2.0] * 6, "min": [0.0] * 6, "max": [1.0] * 6},
        "action": {"mean": [3.0] * 4, "std": [0.5] * 4, "min": [0.0] * 4, "max": [1.0] * 4, "count": 12},
        "image": {"mean": [51.0] * 3, "std": [25.5] * 3, "min": [0.0] * 3, "max": [255.0] * 3},
    }
    before = policy.normaliser.provenance["processors"]
    policy.normaliser.fit(ours, source="abc")
    assert policy.normaliser.provenance["processors"] != before
    assert policy.normaliser.provenance["source"] == "abc"
    batch = policy.parts.batch(observe())
    torch.testing.assert_close(batch["observation.state"], (observe()["state"] - 1) / 2, rtol=1e-5, atol=1e-5)
    image = (observe()["image"].permute(0, 3, 1, 2) / 255 - 0.2) / 0.1
    torch.testing.assert_close(batch["observation.image"], image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(policy.parts.unnormalise(torch.ones(2, 4)), torch.full((2, 4), 3.5))
    save_folder(tmp_path / "p", policy_files(policy))
    loaded = load_policy(tmp_path / "p")
    torch.testing.assert_close(loaded.parts.unnormalise(torch.ones(2, 4)), torch.full((2, 4), 3.5))
    del ours["state"]["mean"]
    with pytest.raises(ConfigError, match=r"the data has no 'mean' of 'state'"):
        policy.normaliser.fit(ours)


def test_smolvla_takes_the_units_of_the_data(tmp_path):
    policy = make("smolvla", tmp_path, config={"statistics": "data"}, stats={})
    stats = {
        "state": {"mean": [1.0] * 6, "std": [2.0] * 6},
        "action": {"mean": [3.0] * 4, "std": [0.5] * 4, "count": 12},
    }
    policy.normaliser.fit(stats, source="abc")
    torch.testing.assert_close(policy.normaliser.action(torch.full((1, 4), 4.0)), torch.full((1, 4), 2.0))


# --- observations


def test_names_of_observations(tmp_path):
    folder = tiny.act(tmp_path / "act")
    config = json.loads((folder / "config.json").read_text())
    config["input_features"]["observation.images.top"] = config["input_features"].pop("observation.image")
    (folder / "config.json").write_text(json.dumps(config))
    for key, given in (("image", {}), ("image_top", {}), ("image_a", {"image_a": "observation.images.top"})):
        spec = Spec(
            {key: SPEC.obs["image"], "state": SPEC.obs["state"]}, 4, SPEC.action_low, SPEC.action_high
        )
        policy = lerobot(LeRobotConfig(path=str(folder), keys=given), spec)
        assert policy.parts.keys == {key: "observation.images.top", "state": "observation.state"}
        assert policy.obs_keys == [key, "state"]


def test_images_are_scaled_to_the_declared_size(tmp_path):
    spec = Spec(
        {"image": ((64, 48, 3), "uint8"), "state": ((6,), "float32")}, 4, SPEC.action_low, SPEC.action_high
    )
    policy = lerobot(LeRobotConfig(path=str(tiny.act(tmp_path / "act", stats=tiny.statistics(6, 4)))), spec)
    obs = {"image": torch.full((2, 64, 48, 3), 255, dtype=torch.uint8), "state": torch.zeros(2, 6)}
    image = policy.parts.batch(obs)["observation.image"]
    assert image.shape == (2, 3, 32, 32)


# --- bad input


def test_bad_input_is_named(tmp_path):
    folder = tiny.smolvla(tmp_path / "smolvla")
    path = str(folder)

    def load(spec=SPEC, **options):
        return lerobot(LeRobotConfig(**({"path": path} | options)), spec)

    def without(*keys, **changed):
        return Spec(
            {k: v for k, v in (SPEC.obs | changed).items() if k not in keys},
            4,
            SPEC.action_low,
            SPEC.action_high,
        )

    with pytest.raises(ConfigError, match=r"policy.path is empty"):
        lerobot(LeRobotConfig(), SPEC)
    with pytest.raises(CheckpointError, match=r"is no LeRobot policy: config.json is missing"):
        load(path=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such folder, and the hub says"):
        load(path="nobody/nothing")
    with pytest.raises(
        ConfigError, match=r"the policy observes 'observation.image', the observations are state"
    ):
        load(without("image"))
    with pytest.raises(ConfigError, match=r"'observation.state' has shape \(6,\), 'state' here has \(5,\)"):
        load(without(state=((5,), "float32")))
    with pytest.raises(ConfigError, match=r"follows instructions, the observations hold none"):
        load(without("instruction"))
    load(without("instruction"), task="lift it")
    with pytest.raises(ConfigError, match=r"has 4 actions, the task has 3"):
        load(Spec(SPEC.obs, 3, (-1.0,) * 3, (1.0,) * 3))
    with pytest.raises(
        ConfigError, match=r"policy.normalise_obs=meanstd: a LeRobot policy normalises itself"
    ):
        load(normalise_obs="meanstd")
    with pytest.raises(ConfigError, match=r"policy.statistics"):
        load(statistics="mine")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"model.safetensors: "):
        load()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors is missing"):
        load()
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(CheckpointError, match=r"older than lerobot 0.4"):
        collect(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"it names no type"):
        load()

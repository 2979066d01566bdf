# SPDX-License-Identifier: Apache-2.0
import copy

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from robopost.artefacts.checkpoint import latest, load_policy, load_tensors, policy_files, save_folder
from robopost.compose import compose
from robopost.data.batch import Spec
from robopost.data.episode import Episode
from robopost.data.store import EpisodeStore
from robopost.errors import ConfigError
from robopost.loops import train
from robopost.merging.groups import group_of
from robopost.nets.flat import Flat, adam
from robopost.nets.vla.language import LanguageConfig
from robopost.nets.vla.prompts import to_bytes
from robopost.nets.vla.towers import TowerConfig
from robopost.policies.token_vla import TokenVLA
from robopost.policies.token_vla_config import TokenVLAConfig

SPEC = Spec(
    {"image": ((16, 16, 3), "uint8"), "state": ((5,), "float32"), "instruction": ((64,), "uint8")},
    2,
    (-1.0, -1.0),
    (1.0, 1.0),
)
TEXTS = ("touch the red cube", "lift the blue cube", "put the red cube in the cyan zone")


def tower(**changes):
    return TowerConfig(**{"width": 16, "layers": 1, "heads": 2, "mlp": 16, "patch": 8} | changes)


def make(seed=0, spec=SPEC, **changes):
    torch.manual_seed(seed)
    sizes = {"width": 16, "layers": 2, "heads": 2, "mlp": 24}
    settings = {"horizon": 2, "siglip": tower(), "language": LanguageConfig(**sizes), "prompt_length": 9}
    policy = TokenVLA(TokenVLAConfig(**settings | changes), spec)
    with torch.no_grad():  # larger than usual, so that every input shows in every output
        for parameter in policy.language.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    return policy


def observe(rows=3, seed=0, texts=TEXTS):
    draw = torch.Generator().manual_seed(seed)
    return {
        "image": torch.randint(0, 256, (rows, 16, 16, 3), generator=draw, dtype=torch.uint8),
        "state": torch.randn(rows, 5, generator=draw),
        "instruction": torch.stack([to_bytes(texts[i % len(texts)]) for i in range(rows)]),
    }


def some_tokens(policy, rows=3, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, policy.bins, (rows, policy.horizon, policy.spec.action_dim), generator=draw)


# -- ids and bins (card, check 1) ------------------------------------------------------------------------------


def test_action_ids_are_openvlas():
    policy = make(vocab=32000)
    values = torch.tensor([-1.0, 0.0, 1.0, -7.0, 9.0])
    assert policy.action_ids(policy.encode(values)).tolist() == [31999, 31872, 31744, 31999, 31744]
    assert policy.language.lm_head.weight.shape[0] == 32064  # actions aren't the last rows of the matrix
    ids = torch.tensor([31999, 31744, 31745, 31743, 32001, 5])
    centres = policy.decode(policy.bins_of(ids))
    assert centres[1] == centres[2]
    assert policy.bins_of(ids).tolist() == [0, 255, 254, 255, 0, 255]
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (policy.decode(policy.encode(draws)) - draws).abs().max() <= 1 / 255 + 1e-6
    assert abs(float(policy.decode(policy.encode(torch.zeros(1))))) < 1e-7


def test_logits_are_the_action_columns_of_the_language_model_in_the_order_of_bins():
    policy = make()
    assert policy.vocab == 64 + 256
    hidden = torch.randn(3, 16)
    whole = policy.language.lm_head(hidden)
    got = policy.action_logits(hidden)
    for bin_index in (0, 1, 100, 255):
        torch.testing.assert_close(got[:, bin_index], whole[:, policy.vocab - 1 - bin_index])


def test_a_copy_runs_on_its_own_layers():
    policy, obs = make(), observe()
    twin, before = copy.deepcopy(policy), policy.logits(obs)
    with torch.no_grad():
        twin.language.model.layers[0].mlp.down_proj.weight.add_(1.0)
    assert torch.equal(policy.logits(obs), before)
    assert not torch.allclose(twin.logits(obs), before)


def test_logits_outside_the_action_ids_change_nothing():
    policy, obs = make(), observe()
    before = policy.logits(obs)
    with torch.no_grad():
        policy.language.lm_head.weight[: policy.vocab - policy.bins] += 100
        policy.language.lm_head.weight[policy.vocab :] += 100
    assert torch.equal(policy.logits(obs), before)


# -- masks, padding, cache (checks 2, 3, 6) --------------------------------------------------------------------


def stock_hidden(policy, embedded, valid):
    """What transformers' own causal pass gives for one unpadded row."""
    row = embedded[valid].unsqueeze(0)
    return policy.language.model(inputs_embeds=row).last_hidden_state[0]


def test_the_pass_is_llamas():
    import transformers

    policy = make(language=LanguageConfig(width=16, layers=3, heads=4, kv_heads=2, mlp=24))
    decoder = policy.language
    x = torch.randn(2, 7, 16)
    positions = torch.arange(7).expand(2, 7) + torch.tensor([[0], [3]])
    mask = torch.rand(2, 1, 7, 7) < 0.6
    mask |= torch.eye(7, dtype=torch.bool)
    assert isinstance(decoder.model, transformers.LlamaModel)
    want = decoder.model(inputs_embeds=x, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(decoder(x, positions, mask), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoder(x, positions, mask, keep=3), want[:, -3:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["full", "block"])
def test_slots_see_each_other(attention):
    policy, obs = make(attention=attention), observe()
    before = policy.logits(obs)
    with torch.no_grad():
        policy.slots[-1] += 1.0
    after = policy.logits(obs)
    changed = (after - before).abs().amax((0, -1)).flatten()
    assert (changed > 1e-3).all()  # the last placeholder reaches every slot, the first one too


def test_a_causal_mask_would_blind_them():
    policy, obs = make(), observe()
    policy.allowed = policy.allowed.tril()
    before = policy.logits(obs)
    with torch.no_grad():
        policy.slots[-1] += 1.0
    assert torch.equal(policy.logits(obs), before)


def test_in_a_block_the_prefix_is_blind_to_the_slots_and_causal():
    policy, obs = make(attention="block", prompt_length=9), observe()
    features = policy.vision_features(obs)
    embedded, valid = policy.prefix(features, obs)
    lead = embedded.shape[1]
    block = policy.allowed[0, 0]
    assert torch.equal(block[: lead - 1], torch.ones_like(block).tril()[: lead - 1])
    assert block[lead - 1 :].all()
    assert valid[:, : lead - 9].all()
    assert not valid[0].all()


@pytest.mark.parametrize("layout", ["oft", "openvla"])
def test_padding_changes_nothing(layout):
    short, wide = (make(layout=layout, prompt_length=length) for length in (9, 14))
    wide.load_state_dict(short.state_dict())
    obs = observe()
    tokens = some_tokens(short)
    torch.testing.assert_close(short.logits(obs, tokens), wide.logits(obs, tokens), atol=1e-4, rtol=1e-4)
    # Prompts of several lengths in one batch are what each is alone.
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in obs.items()}
        got = short.logits(alone, tokens[row : row + 1])
        torch.testing.assert_close(got, short.logits(obs, tokens)[row : row + 1], atol=1e-4, rtol=1e-4)


def test_the_layout_openvla_is_what_transformers_computes_without_padding():
    policy, obs = make(layout="openvla"), observe()
    tokens = some_tokens(policy)
    embedded, valid = policy.prefix(policy.vision_features(obs), obs)
    earlier = policy.language.embed(policy.action_ids(tokens.flatten(1)[:, :-1]))
    got = policy.logits(obs, tokens)
    for row in range(3):
        both = torch.cat([embedded[row], earlier[row]])
        whole = stock_hidden(policy, both, torch.cat([valid[row], valid.new_ones(len(earlier[row]))]))
        want = policy.action_logits(whole[-policy.length :]).view(got[row].shape)
        torch.testing.assert_close(got[row], want, atol=1e-4, rtol=1e-4)


def test_cached_decoding_equals_the_full_pass_with_padded_language():
    policy, obs = make(layout="openvla"), observe()
    draw = torch.Generator().manual_seed(3)
    chunk, log_prob, chain = policy.sample(obs, generator=draw)
    full = policy.log_prob(obs, chain)
    assert not policy.prompts(obs["instruction"])[1].all()
    torch.testing.assert_close(log_prob, full, atol=1e-5 * policy.length, rtol=1e-5)
    assert torch.equal(chunk, policy.decode(chain[:, 0]))
    greedy = policy.sample(obs, deterministic=True)[2][:, 0]
    assert torch.equal(policy.logits(obs, greedy).argmax(-1), greedy)
    assert policy.autoregressive
    with pytest.raises(ConfigError, match="tokens before a slot"):
        policy.logits(obs)


def test_later_tokens_never_reach_earlier_slots():
    policy, obs = make(layout="openvla"), observe()
    tokens = some_tokens(policy)
    before = policy.logits(obs, tokens)
    other = tokens.clone()
    other[:, 0, 1] = (other[:, 0, 1] + 40) % 256
    changed = (policy.logits(obs, other) - before).abs().amax((0, -1)).flatten()
    assert changed[0] == 0
    assert changed[1] == 0
    assert (changed[2:] > 1e-3).all()


def test_temperature_and_generator_rule_the_drawing():
    policy, obs = make(layout="openvla", temperature=3.0), observe()
    draws = [policy.sample(obs, generator=torch.Generator().manual_seed(s))[2] for s in (5, 5, 6)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    expected = policy.log_prob(obs, draws[0])
    plain = (policy.logits(obs, draws[0][:, 0]) / 3.0).log_softmax(-1)
    by_hand = plain.gather(-1, draws[0][:, 0].unsqueeze(-1)).sum((-1, -2, -3))
    torch.testing.assert_close(expected, by_hand)


def test_padded_steps_count_for_nothing():
    policy, obs = make(), observe(rows=2)
    chunk = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(4)) * 2 - 1
    half = torch.tensor([[True, False], [True, False]])
    loss = policy.bc_loss(obs, chunk, half, None)
    logits = policy.logits(obs)[:, 0]
    target = policy.encode(chunk)[:, 0]
    want = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, want)
    changed = chunk.clone()
    changed[:, 1] = 0.77
    assert torch.equal(policy.bc_loss(obs, changed, half, None), loss)
    none = policy.bc_loss(obs, chunk, torch.zeros(2, 2, dtype=torch.bool), None)
    assert none == 0
    assert all(
        g is None or (g == 0).all()
        for g in torch.autograd.grad(none, list(policy.parameters()), allow_unused=True)
    )


# -- what it reads ---------------------------------------------------------------------------------------------


def test_every_observation_matters_and_only_the_chosen_columns():
    policy, obs = make(proprio=[1, 2]), observe()
    before = policy.logits(obs)
    for key, change in (("image", 255 - obs["image"]), ("instruction", obs["instruction"].roll(1, 0))):
        assert (policy.logits(obs | {key: change}) - before).abs().max() > 1e-3
    state = obs["state"].clone()
    state[:, [0, 3, 4]] += 5
    assert torch.equal(policy.logits(obs | {"state": state}), before)
    state[:, 2] += 1
    assert (policy.logits(obs | {"state": state}) - before).abs().max() > 1e-3
    assert make(proprio=[]).obs_keys == ["image", "instruction"]


def test_unknown_words_are_one_unknown_word():
    policy = make()
    obs = observe(texts=("juggle the red cube", "throw the red cube", "touch the red cube"))
    logits = policy.logits(
        obs | {"image": obs["image"][:1].expand(3, -1, -1, -1), "state": obs["state"][:1].expand(3, -1)}
    )
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)
    assert (logits[0] - logits[2]).abs().max() > 1e-3


def test_an_instruction_is_tokenised_once():
    policy, obs = make(texts=list(TEXTS)), observe()
    policy.logits(obs)
    policy.prompts.tokenizer = None  # not asked again
    policy.logits(obs)


def test_the_table_of_prompts_grows():
    policy = make(tokenizer="bpe", text_tokens=320, prompt_length=40)
    texts = [f"cube number {i}" for i in range(100)]
    rows = torch.stack([to_bytes(t) for t in texts])
    ids, valid = policy.prompts(rows)
    for index in (0, 50, 99):
        assert ids[index][valid[index]].tolist() == policy.prompts.encode(texts[index])[1:]
    assert torch.equal(policy.prompts(rows)[0], ids)


def test_two_cameras_and_two_towers():
    obs_spec = SPEC.obs | {"image_wrist": ((24, 24, 3), "uint8")}
    spec = Spec(obs_spec, 2, (-1.0, -1.0), (1.0, 1.0))
    with pytest.raises(ConfigError, match=r"policy\.image_size"):
        make(spec=spec)
    dino = tower(width=8, mlp=16, registers=2, activation="gelu")
    policy = make(spec=spec, image_size=16, dino=dino)
    obs = observe() | {"image_wrist": torch.randint(0, 256, (3, 24, 24, 3), dtype=torch.uint8)}
    assert policy.vision_features(obs).shape == (3, 8, 8 + 16)
    before = policy.logits(obs)
    after = policy.logits(obs | {"image_wrist": 255 - obs["image_wrist"]})
    assert (after - before).abs().max() > 1e-3


def test_pixels_are_standardised_per_tower():
    policy = make(dino=tower(activation="gelu"))
    image = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    siglip, dino = (policy.vision.towers[name].pixels(image) for name in ("siglip", "dino"))
    assert torch.allclose(siglip, torch.ones(()))
    torch.testing.assert_close(
        dino[0, :, 0, 0], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    )


# -- training options ------------------------------------------------------------------------------------------


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

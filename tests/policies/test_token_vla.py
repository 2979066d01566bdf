# SPDX-License-Identifier: Apache-2.0
import copy
import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.nets.vla.language import LanguageConfig
from robopost.nets.vla.prompts import to_bytes

found = importlib.util.spec_from_file_location("token_vla_lab", Path(__file__).parent / "token_vla_lab.py")
lab = importlib.util.module_from_spec(found)
found.loader.exec_module(lab)
SPEC, TEXTS, tower, make, observe, some_tokens = (
    getattr(lab, name) for name in ("SPEC", "TEXTS", "tower", "make", "observe", "some_tokens")
)


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

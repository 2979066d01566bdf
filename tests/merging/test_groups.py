# SPDX-License-Identifier: Apache-2.0
"""Which module a parameter belongs to, for names as the released checkpoints have them."""

import json

import pytest

from robopost.errors import ConfigError
from robopost.merging.groups import coefficients, find_groups, group_of, is_normaliser

NAMES = {
    "smolvla": {
        "model.vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding.weight": "vision",
        "model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight": "vision",
        "model.vlm_with_expert.vlm.model.text_model.layers.0.mlp.up_proj.weight": "language",
        "model.vlm_with_expert.vlm.lm_head.weight": "language",
        "model.vlm_with_expert.lm_expert.layers.0.mlp.up_proj.weight": "action",
        "model.state_proj.weight": "action",
        "model.action_time_mlp_in.bias": "action",
    },
    "pi0": {
        "model.paligemma_with_expert.paligemma.model.vision_tower.vision_model.head.weight": "vision",
        "model.paligemma_with_expert.paligemma.model.multi_modal_projector.linear.bias": "vision",
        "model.paligemma_with_expert.paligemma.model.language_model.layers.3.self_attn.q_proj.weight": "language",
        "model.paligemma_with_expert.paligemma.lm_head.weight": "language",
        "model.paligemma_with_expert.gemma_expert.model.layers.3.self_attn.q_proj.weight": "action",
        "model.paligemma_with_expert.gemma_expert.lm_head.weight": "action",
        "model.action_out_proj.weight": "action",
    },
    "openpi": {
        "paligemma_with_expert.paligemma.model.vision_tower.x": "vision",
        "paligemma_with_expert.paligemma.model.language_model.x": "language",
        "paligemma_with_expert.gemma_expert.model.x": "action",
        "time_mlp_in.weight": "action",
    },
    "pi0_transformers": {
        "model.vlm.vision_tower.x": "vision",
        "model.vlm.multi_modal_projector.linear.weight": "vision",
        "model.vlm.language_model.norm.weight": "language",
        "model.dit.layers.0.x": "action",
        "embed_action_time.state_proj.bias": "action",
        "action_out_proj.weight": "action",
    },
    "openvla": {
        "vision_backbone.featurizer.blocks.0.x": "vision",
        "vision_backbone.fused_featurizer.blocks.0.x": "vision",
        "projector.fc1.weight": "vision",
        "language_model.model.layers.0.x": "language",
        "language_model.lm_head.weight": "language",
        "action_head.model.x": "action",
        "proprio_projector.fc1.bias": "action",
    },
    "robopost": {
        "encoder.images.image.net.0.weight": "vision",
        "encoder.instruction.words.weight": "language",
        "frozen.encoder.instruction.words.weight": "language",
        "net.net.inp.weight": "action",
        "log_std": "action",
        "encoder.vlm.language_model.norm.weight": "language",
    },
}


@pytest.mark.parametrize("family", NAMES)
def test_families(family):
    found, groups = find_groups(NAMES[family])
    assert found == family
    assert groups == NAMES[family]


def test_prefixes_match_whole_parts_and_the_longest_wins():
    groups = {"a": ("net", "net.deep.x"), "b": ("net.deep",)}
    assert group_of("net.w", groups) == "a"
    assert group_of("net.deep.w", groups) == "b"
    assert group_of("net.deep.x.w", groups) == "a"
    assert group_of("network.w", groups) is None


def test_an_action_expert_is_not_taken_for_language():
    """The substring rule of the released code puts `gemma_expert.lm_head` and the like wherever a substring says."""
    groups = find_groups(NAMES["pi0"])[1]
    assert groups["model.paligemma_with_expert.gemma_expert.lm_head.weight"] == "action"


@pytest.mark.parametrize("family", [name for name in NAMES if name != "robopost"])
def test_unknown_parameter_raises(family):
    names = [*NAMES[family], "model.new_thing.weight"]
    with pytest.raises(ConfigError, match=rf"'model.new_thing.weight' \(1 of \d+\).*{family!r}"):
        find_groups(names)


def test_own_groups(tmp_path):
    names = ["a.w", "b.w"]
    assert find_groups(names, "x:a,y:b")[1] == {"a.w": "x", "b.w": "y"}
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"x": ["a", "b"]}))
    assert find_groups(names, str(path))[1] == {"a.w": "x", "b.w": "x"}
    assert find_groups(names, own={"mine": ("a", "b")}) == (
        "the policy's own",
        {"a.w": "mine", "b.w": "mine"},
    )
    for wrong, message in (
        ("x:a", "'b.w'"),
        ("smolvl", "Did you mean 'smolvla'"),
        ("x:a,y", "is not <group>"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_groups(names, wrong)


def test_coefficients():
    groups = {"a": "vision", "b": "language"}
    assert coefficients("ab", groups, {"vision": 1.0}, 0.5) == {"a": 1.0, "b": 0.5}
    assert coefficients("ab", {}, {}, 0.5) == {"a": 0.5, "b": 0.5}
    with pytest.raises(ConfigError, match=r"'b' has no coefficient. Fix: add language:"):
        coefficients("ab", groups, {"vision": 1.0}, None)
    with pytest.raises(ConfigError, match=r"unknown group in modules= 'visoin'. Did you mean 'vision'"):
        coefficients("ab", groups, {"visoin": 1.0}, 0.5)


def test_normalisers_are_known():
    assert is_normaliser("normaliser.action_scale")
    assert is_normaliser("normalize_inputs.buffer_observation_state.mean")
    assert not is_normaliser("model.norm.weight")

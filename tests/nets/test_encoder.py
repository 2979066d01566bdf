# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from robopost.data.batch import Spec
from robopost.errors import ConfigError
from robopost.nets.encoder import EncodedConfig, InstructionEncoder, ObsEncoder, SpatialSoftmax, random_shift

SPEC = Spec(
    {
        "state": ((3,), "float32"),
        "keypoints": ((4, 2), "float32"),
        "image": ((32, 24, 3), "uint8"),
        "instruction": ((64,), "uint8"),
        "depth": ((32, 24), "uint16"),
    },
    2,
    (-1.0, -1.0),
    (1.0, 1.0),
)


def text(*lines: str) -> torch.Tensor:
    rows = [list(line.encode()[:64].ljust(64, b"\0")) for line in lines]
    return torch.tensor(rows, dtype=torch.uint8)


def observations(batch: int, history: int) -> dict[str, torch.Tensor]:
    lead = (batch,) if history == 1 else (batch, history)
    generator = torch.Generator().manual_seed(0)
    return {
        "state": torch.randn(*lead, 3, generator=generator),
        "keypoints": torch.randn(*lead, 4, 2, generator=generator),
        "image": torch.randint(0, 256, (*lead, 32, 24, 3), dtype=torch.uint8, generator=generator),
        "instruction": text(*["push"] * batch).view(batch, *([1] * (history > 1)), 64).expand(*lead, 64),
    }


@pytest.mark.parametrize("history", [1, 3])
def test_sizes_for_every_kind_of_key(history):
    keys = ["state", "keypoints", "image", "instruction"]
    encoder = ObsEncoder(SPEC, keys, history, EncodedConfig(image_features=10, instruction_features=6))
    assert encoder.out_dim == (3 + 8 + 10) * history + 6
    assert encoder(observations(5, history)).shape == (5, encoder.out_dim)


def test_float_keys_are_passed_on_unchanged_oldest_first():
    encoder = ObsEncoder(SPEC, ["state"], 2, EncodedConfig())
    obs = observations(4, 2)
    torch.testing.assert_close(encoder(obs), torch.cat([obs["state"][:, 0], obs["state"][:, 1]], dim=-1))
    assert not list(encoder.parameters())


def test_image_features_of_a_frame_do_not_depend_on_its_place_in_the_history():
    encoder = ObsEncoder(SPEC, ["image"], 2, EncodedConfig(image_features=8))
    obs = observations(3, 2)
    swapped = {"image": obs["image"].flip(1)}
    first, second = encoder(obs), encoder(swapped)
    torch.testing.assert_close(first[:, :8], second[:, 8:])
    torch.testing.assert_close(first[:, 8:], second[:, :8])


def test_spatial_softmax_finds_a_peak():
    x = torch.zeros(1, 1, 5, 9)
    x[0, 0, 4, 2] = 100.0  # last row: y = 1; third of nine columns: x = -0.5
    torch.testing.assert_close(SpatialSoftmax()(x), torch.tensor([[-0.5, 1.0]]))


def test_random_shift_moves_whole_stacks_and_repeats_the_border():
    frames = torch.randint(0, 256, (64, 2, 12, 10, 3), dtype=torch.uint8)
    out = random_shift(frames, 2, torch.Generator().manual_seed(0))
    assert out.shape == frames.shape
    assert out.dtype == torch.uint8
    padded = torch.nn.functional.pad(frames.float().flatten(0, 1).movedim(-1, 1), (2,) * 4, mode="replicate")
    padded = padded.view(64, 2, 3, 16, 14).movedim(2, -1)
    seen = set()
    for i in range(64):
        places = [
            (dy, dx)
            for dy in range(5)
            for dx in range(5)
            if torch.equal(padded[i, :, dy : dy + 12, dx : dx + 10], out[i].float())
        ]
        assert len(places) == 1, "each sample is one shift of both its frames"
        seen.add(places[0])
    assert len(seen) > 15  # of 25 possible


def test_augmentation_only_where_a_generator_is_given():
    encoder = ObsEncoder(SPEC, ["image"], 1, EncodedConfig())
    obs = observations(4, 1)
    plain = encoder(obs)
    torch.testing.assert_close(plain, encoder(obs))
    assert not torch.allclose(plain, encoder(obs, torch.Generator().manual_seed(1)))


def test_words_hash_alike_wherever_they_stand():
    encoder = InstructionEncoder(8)
    ids, present = encoder.word_ids(text("push the red block", "Red  the", ""))
    assert present.sum(1).tolist() == [4, 2, 0]
    push, the, red, block = ids[0, :4].tolist()
    assert len({push, the, red, block}) == 4
    assert ids[1, :2].tolist() == [red, the]


def test_word_order_and_every_letter_count():
    torch.manual_seed(0)
    encoder = InstructionEncoder(8)
    out = encoder(text("red to blue", "blue to red", "red to blue", "rad to blue", ""))
    torch.testing.assert_close(out[0], out[2])
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[3])
    assert not out[4].any()


def test_words_that_fill_all_64_bytes():
    encoder = InstructionEncoder(8)
    ids, present = encoder.word_ids(text("x" * 64, "a " * 32))
    assert present.sum(1).tolist() == [1, 32]
    assert (ids[1, :32] == ids[1, 0]).all()


def test_unreadable_keys_are_refused():
    with pytest.raises(ConfigError, match="'depth' is uint16"):
        ObsEncoder(SPEC, ["depth"], 1, EncodedConfig())

# SPDX-License-Identifier: Apache-2.0
"""Tiny LeRobot policies with random weights, saved as pretrained folders; nothing is downloaded."""

from pathlib import Path

import torch
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.policies.factory import make_pre_post_processors

TEXTS = ["put the red cube in the yellow zone", "lift the green cube", "touch the blue cube"]


def vlm_folder(path: Path) -> Path:
    """A SmolVLM of 2 layers with its processor: config and tokenizer, no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    special = ["<pad>", "<|im_start|>", "<end_of_utterance>", "<image>"]
    special += ["<fake_token_around_image>", "<global-img>"]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([f"{text}\n" for text in TEXTS], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        extra_special_tokens={
            "image_token": special[3],
            "fake_image_token": special[4],
            "global_image_token": special[5],
            "end_of_utterance_token": special[2],
        },
    )
    size = {"longest_edge": 32}
    images = SmolVLMImageProcessor(size=size, max_image_size=size)
    videos = SmolVLMVideoProcessor(size=size, max_image_size=size)
    SmolVLMProcessor(
        images, tokenizer, videos, image_seq_len=1, chat_template="{{ messages }}"
    ).save_pretrained(path)
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 400,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=3, pad_token_id=0
    )
    config.save_pretrained(path)
    return path


def features(state: int, action: int, image: int = 32, camera: str = "observation.image") -> dict:
    """Input and output features of a policy."""
    return {
        "input_features": {
            "observation.state": PolicyFeature(FeatureType.STATE, (state,)),
            camera: PolicyFeature(FeatureType.VISUAL, (3, image, image)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action,))},
    }


def statistics(state: int, action: int, camera: str = "observation.image") -> dict:
    """Made-up statistics of a data set."""

    def of(*shape):
        ramp = torch.linspace(0.1, 0.4, shape[0]).view(shape)
        ends = {"min": -1.0 - ramp, "max": 1.0 + 2 * ramp, "q01": -0.9 - ramp, "q99": 0.8 + ramp}
        return {"mean": ramp, "std": 0.5 + ramp, "q10": -0.5 - ramp, "q90": 0.4 + ramp} | ends

    return {"observation.state": of(state), "action": of(action), camera: of(3, 1, 1)}


def smolvla(path: Path, state=6, action=4, *, stats=None, seed=0, **options) -> Path:
    """A SmolVLA of about 0.3M parameters at `path`, its VLM's config and tokenizer at `path`-vlm."""
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    vlm = vlm_folder(path.with_name(f"{path.name}-vlm"))
    settings = {
        "chunk_size": 6,
        "n_action_steps": 6,
        "max_state_dim": 8,
        "max_action_dim": 7,
        "resize_imgs_with_padding": (32, 32),
        "tokenizer_max_length": 16,
        "num_steps": 4,
        "num_vlm_layers": 2,
        "freeze_vision_encoder": False,
        "train_expert_only": False,
    }
    config = SmolVLAConfig(
        **features(state, action),
        **(settings | options),
        vlm_model_name=str(vlm),
        load_vlm_weights=False,
        device="cpu",
    )
    return save(SmolVLAPolicy, config, path, statistics(state, action) if stats is None else stats, seed)


def act(path: Path, state=6, action=4, *, stats=None, seed=0, **options) -> Path:
    """An ACT on an untrained ResNet-18."""
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    settings = {"chunk_size": 6, "n_action_steps": 6, "dim_model": 32, "n_heads": 2, "dim_feedforward": 64}
    settings |= {"n_encoder_layers": 1, "n_vae_encoder_layers": 1, "latent_dim": 8}
    config = ACTConfig(
        **features(state, action), **(settings | options), pretrained_backbone_weights=None, device="cpu"
    )
    return save(ACTPolicy, config, path, statistics(state, action) if stats is None else stats, seed)


def diffusion(path: Path, state=6, action=4, *, stats=None, seed=0, **options) -> Path:
    """A diffusion policy on an untrained ResNet-18, two observations."""
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    settings = {
        "horizon": 8,
        "n_action_steps": 6,
        "n_obs_steps": 2,
        "down_dims": (16, 32),
        "crop_shape": None,
    }
    settings |= {
        "num_train_timesteps": 10,
        "spatial_softmax_num_keypoints": 4,
        "diffusion_step_embed_dim": 16,
    }
    settings |= {"n_groups": 4, "do_mask_loss_for_padding": True}
    config = DiffusionConfig(**features(state, action), **(settings | options), device="cpu")
    return save(DiffusionPolicy, config, path, statistics(state, action) if stats is None else stats, seed)


def save(kind: type, config, path: Path, stats: dict, seed: int) -> Path:
    """Build the policy, save weights and processors."""
    torch.manual_seed(seed)
    policy = kind(config)
    policy.save_pretrained(path)
    for processor in make_pre_post_processors(config, dataset_stats=stats):
        processor.save_pretrained(path)
    return path

# SPDX-License-Identifier: Apache-2.0
"""Runs in .venv-lerobot, where robopost isn't installed: the checkout is put on the path, no plugins.

Elsewhere nothing here is collected: `make lerobot` makes the environment and runs these tests in it.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SITE = HERE / "site"
INSTALLED = importlib.util.find_spec("lerobot") is not None
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

if INSTALLED:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("SVT_LOG", "1")  # errors only
    sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "envs"), str(HERE)]
    _spec = importlib.util.spec_from_file_location("declare_operators", SITE / "sitecustomize.py")
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))


def pytest_configure(config):
    for line in ("ignore::RuntimeWarning:lerobot", "ignore::DeprecationWarning:datasets"):
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def lerobot_home(tmp_path, monkeypatch):
    """Keep what lerobot and datasets cache out of the home folder; children find the operators too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.setenv("PYTHONPATH", str(SITE))


class VideoReader:
    """Stands in for torchvision.io.VideoReader, which newer torchvision lacks and lerobot 0.4.4 decodes with.

    Only the decoding is ours: which file and which time stamps a frame comes from stays lerobot's decision.
    """

    def __init__(self, path, stream):
        import av

        self.container = av.open(str(path))

    def seek(self, seconds, keyframes_only=False):
        video = self.container.streams.video[0]
        self.container.seek(int(seconds / video.time_base), stream=video)

    def __iter__(self):
        import torch

        for frame in self.container.decode(video=0):
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
            yield {"data": picture.permute(2, 0, 1), "pts": frame.time}


@pytest.fixture(autouse=True)
def video_reader(monkeypatch):
    import torchvision

    if not hasattr(torchvision.io, "VideoReader"):
        monkeypatch.setattr(torchvision.io, "VideoReader", VideoReader, raising=False)
        monkeypatch.setattr(torchvision, "set_video_backend", lambda name: None, raising=False)

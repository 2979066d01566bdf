# SPDX-License-Identifier: Apache-2.0
"""Every mistake is one line that says what, where and how to mend it; exit code not 0; nothing half-written.

Add a row to `CASES`: an id, the words after `robopost`, and a regular expression the whole line must match.
`{place}` in a word is an empty folder; `PREPARE` puts files there for the rows that need some.
"""

import json
import re

import pytest

from robopost.cli import main

DEBUG = "recipe=debug_offline"
REINFLOW = ("algo=reinflow", "env=Pendulum-v1")

# id: (words, pattern, exit code)
CASES = {
    "misspelt key": (
        ["train", DEBUG, "algo.batch_sise=3"],
        r"unknown key 'algo\.batch_sise' in 'algo\.batch_sise=3'\. Did you mean 'algo\.batch_size'\?.*",
    ),
    "misspelt section": (
        ["train", DEBUG, "loops.steps=3"],
        r"unknown key 'loops.steps'.*Did you mean 'loop'\?.*",
    ),
    "misspelt top key": (["train", DEBUG, "sede=3"], r"unknown key 'sede'.*Did you mean 'seed'\?.*"),
    "word for a number": (
        ["train", DEBUG, "loop.steps=abc"],
        r"loop\.steps=abc: loop\.steps takes int, got 'abc'",
    ),
    "fraction for a count": (
        ["train", DEBUG, "loop.steps=1.5"],
        r"loop\.steps=1\.5: loop\.steps takes int.*",
    ),
    "null for a number": (
        ["train", DEBUG, "loop.steps=null"],
        r"loop\.steps=null: loop\.steps takes int, got null",
    ),
    "word in a list of numbers": (
        ["train", DEBUG, "env.obs_keys={a:1}"],
        r"env\.obs_keys=\{a:1\}: .*takes list\[str\].*",
    ),
    "value for a section": (["train", DEBUG, "loop=5"], r"loop=5: loop is a section\. Fix: .*"),
    "out of range": (["train", DEBUG, "loop.steps=0"], r"loop\.steps=0 must be at least 1"),
    "layer without units": (
        ["train", DEBUG, "policy=gaussian", "policy.hidden=[64,0]"],
        r"policy\.hidden=\[64, 0\]: every layer needs at least 1 unit\. Fix: .*",
    ),
    "critic's layer without units": (
        ["train", "algo=td3", "env=Hopper-v5", "algo.hidden=[0]"],
        r"algo\.hidden=\[0\]: every layer needs at least 1 unit\. Fix: .*",
    ),
    "negative interval": (["train", DEBUG, "loop.eval_every=-1"], r"loop\.eval_every=-1 must be 0 .*"),
    "unknown algorithm": (
        ["train", "algo=td4"],
        r"unknown algo 'td4'\. Did you mean 'td3'\? Available: .*bc.*",
    ),
    "unknown policy": (
        ["train", "policy=gausian"],
        r"unknown policy 'gausian'\. Did you mean 'gaussian'\?.*",
    ),
    "unknown environment": (
        ["train", "env=arm_pusch"],
        r"unknown env 'arm_pusch'\. Did you mean 'arm_push'\?.*",
    ),
    "unknown recipe": (
        ["train", "recipe=debug_ofline"],
        r"unknown recipe 'debug_ofline'\. Did you mean 'debug_o.*",
    ),
    "unknown data": (
        ["train", DEBUG, "data=scriptd"],
        r"unknown data 'scriptd'\. Did you mean 'scripted'\?.*",
    ),
    "unknown group": (["train", "algos=td3"], r"unknown key 'algos'.*Did you mean 'algo'\?.*"),
    "unknown command": (["trian"], r"unknown command 'trian'\. Did you mean 'train'\?.*"),
    "unknown option": (
        ["train", "--confg-dir", "x"],
        r"unrecognized arguments: --confg-dir.* See: robopost train --help",
    ),
    "not key=value": (["train", "sac"], r"'sac' is not key=value\. Fix: .*"),
    "key of a piece not chosen": (
        ["train", "algo.lr=3"],
        r"algo\.lr=3: no algo is chosen\. Fix: add algo=<name>",
    ),
    "value of what was switched off": (
        ["train", "algo=td3", "env=Hopper-v5", "env.num_envs=4", "env=null"],
        r"env\.num_envs=4 and env=null exclude each other\. Fix: drop one of them",
    ),
    "switched off after all": (
        ["train", "algo=td3", "env=Hopper-v5", "env=null"],
        r".*env is empty\. Fix: env=<name>",
    ),
    "no algorithm": (["train", "policy=flow"], r"algo is not chosen\. Fix: .*"),
    "no policy": (["train", "algo=bc", "policy=null"], r"policy is not chosen\. Fix: .*"),
    "bad interpolation": (
        ["train", DEBUG, "algo.batch_size=${loop.stepz}"],
        r"algo\.batch_size: Interpolation key 'loop\.stepz' not found\. Did you mean 'loop\.steps'\?",
    ),
    "interpolation of the wrong type": (
        ["train", DEBUG, "algo.batch_size=${device}"],
        r"algo\.batch_size: .*",
    ),
    "unclosed bracket": (["train", "seed=[1,"], r"'seed=\[1,' does not parse: .*"),
    "sweep": (["train", DEBUG, "seed=1,2"], r"'seed=1,2' is a sweep, .*seeds=N.*"),
    "added key": (["train", DEBUG, "+foo=1"], r"'\+foo=1': keys can't be added or removed.*"),
    "code in an override": (["train", DEBUG, "algo._target_=os.system"], r".*_target_ is not allowed.*"),
    "setting of hydra": (["train", DEBUG, "hydra.run.dir=x"], r"'hydra\.run\.dir=x': settings of Hydra.*"),
    "gymnasium without id": (["train", "algo=sac", "env=gymnasium"], r"env\.id.*Fix: .*"),
    "data and collect": (
        ["train", DEBUG, "data.path=x"],
        r"data\.path=x and data\.collect=\d+ exclude each other.*",
    ),
    "offline without data": (["train", DEBUG, "data=none"], r"algo=bc learns from recorded data.*Fix: .*"),
    "missing data": (["train", DEBUG, "data={place}/none.zarr"], r".*{place}/none\.zarr.*"),
    "missing config dir": (
        ["train", DEBUG, "--config-dir", "{place}/no"],
        r"--config-dir '{place}/no' is not a folder",
    ),
    "misspelt key in a file": (
        ["train", "--config-dir", "{place}/user", "algo=misspelt"],
        r"algo/misspelt\.yaml: .*batch_sise.*Did you mean 'batch_size'\?.*",
    ),
    "wrong type in a file": (
        ["train", "--config-dir", "{place}/user", "algo=mistyped"],
        r"algo/mistyped\.yaml: algo\.batch_size: .*abc.*",
    ),
    "broken yaml": (
        ["train", "--config-dir", "{place}/user", "algo=broken"],
        r".*broken\.yaml, line 2: not valid YAML.*",
    ),
    "code in a file": (
        ["train", "--config-dir", "{place}/user", "algo=code"],
        r".*_target_ is not allowed.*",
    ),
    "file without schema or name": (
        ["train", "--config-dir", "{place}/user", "algo=nameless"],
        r"unknown algorithm 'nameless'.*",
    ),
    "file with unknown default": (
        ["train", "--config-dir", "{place}/user", "algo=orphan"],
        r".*nowhere_schema.*",
    ),
    "resume of nothing": (["train", "resume={place}/none"], r"resume={place}/none is not a run folder"),
    "resume of another folder": (
        ["train", "resume={place}/user"],
        r"resume={place}/user holds no config\.json.*",
    ),
    "resume with another algorithm": (
        ["train", "resume={place}/run", "algo=bc"],
        r"resume={place}/run: algo=bc: can't change here\. Allowed: loop\.steps.*",
    ),
    "resume of a newer run": (["train", "resume={place}/newer"], r"unknown key 'novel' in 'config\.novel'.*"),
    "torn run config": (["train", "resume={place}/torn"], r".*torn/config\.json is not valid JSON: .*"),
    "more steps to fine-tune than there are": (
        ["train", *REINFLOW, "policy=flow", "policy.steps=4", "algo.finetune_steps=5"],
        r"algo\.finetune_steps=5 must lie in 0\.\.4, the steps of the policy's chain; 0 = all",
    ),
    "gaussian policy for reinflow": (
        ["train", *REINFLOW, "policy=gaussian"],
        r"algo=reinflow fine-tunes a flow policy, policy=gaussian is none\. Fix: policy=pretrained .*policy=flow",
    ),
    "diffusion policy for reinflow": (
        ["train", *REINFLOW, "policy=diffusion"],
        r"algo=reinflow fine-tunes a flow policy, policy=diffusion is none\. Fix: .*",
    ),
    "midpoint solver for reinflow": (
        ["train", *REINFLOW, "policy=flow", "policy.solver=midpoint"],
        r"algo=reinflow adds noise to Euler steps, policy\.solver=midpoint\. Fix: policy\.solver=euler .*",
    ),
    "noise bounds in the wrong order": (
        ["train", *REINFLOW, "algo.noise_min=0.3"],
        r"algo\.noise_min=0\.3 must lie in \(0, 0\.24\] \(algo\.noise_max\)",
    ),
    "no noise": (
        ["train", *REINFLOW, "algo.noise_min=0"],
        r"algo\.noise_min=0\.0 must lie in \(0, 0\.24\].*",
    ),
    "base policy of no run": (
        ["train", *REINFLOW, "policy=pretrained", "policy.path={place}/none"],
        r"no policy at {place}/none.*",
    ),
    "eval without policy": (["eval", "env=arm_push"], r"policy has no value\. Fix: .*"),
    "eval of nothing": (["eval", "policy={place}/none", "env=Hopper-v5"], r"no policy at {place}/none.*"),
    "eval of a folder": (["eval", "policy={place}/user", "env=Hopper-v5"], r"no policy at {place}/user.*"),
    "eval of a missing actor": (
        ["eval", "policy=none.npz", "env=Hopper-v5"],
        r"no policy at none\.npz: it does not exist",
    ),
    "eval without environment": (["eval", "policy={place}/user"], r".*Fix: add env=.*"),
    "eval key": (["eval", "policy=x", "episode=3"], r"unknown key 'episode'.*Did you mean 'episodes'\?.*"),
    "eval count": (["eval", "policy=x", "env=Hopper-v5", "episodes=0"], r"episodes=0 must be at least 1"),
    "eval videos": (["eval", "policy=x", "env=Hopper-v5", "video=101"], r"video=101 must lie in 0\.\.100.*"),
    "eval device": (
        ["eval", "policy=x", "env=Hopper-v5", "device=gpu"],
        r"device='gpu' is not available here: .*",
    ),
    "collect without out": (["collect", "env=arm_push"], r"out has no value\. Fix: .*"),
    "collect without env": (["collect", "out={place}/x.zarr"], r"env is not chosen\. Fix: .*"),
    "collect without expert": (
        ["collect", "env=Hopper-v5", "out={place}/x.zarr"],
        r"policy=script: env=gymnasium has no scripted expert\..*arm_push.*Fix: policy=random.*",
    ),
    "collect quality": (
        ["collect", "env=arm_push", "out={place}/x.zarr", "quality=2"],
        r"quality=2\.0 must lie in 0\.\.1",
    ),
    "collect into another file": (
        ["collect", "env=arm_push", "out={place}/run/config.json"],
        r".*is no robopost store.*",
    ),
    "unknown gymnasium id": (
        ["collect", "env=Hoper-v5", "policy=random", "out={place}/x.zarr"],
        r".*Hoper.*",
    ),
    "report of nothing": (["report", "{place}/none"], r"{place}/none is not a run folder"),
    "unknown benchmark": (["bench", "nothing"], r"unknown benchmark 'nothing'.*"),
    "bench without name": (["bench"], r"no benchmark named\. Fix: .*"),
    "bench tier": (["bench", "x", "--tier", "tiny"], r".*invalid choice: 'tiny'.*"),
    "unknown shell": (["completion", "tcsh"], r".*invalid choice: 'tcsh'.*"),
    "unknown piece to explain": (
        ["train", "--explain", "algo=td4"],
        r"unknown algo 'td4'\. Did you mean 'td3'\?.*",
    ),
}


@pytest.fixture
def place(tmp_path):
    """A folder with broken configs and runs."""
    algo = tmp_path / "user" / "algo"
    algo.mkdir(parents=True)
    (algo / "misspelt.yaml").write_text("defaults: [bc_schema, _self_]\nname: bc\nbatch_sise: 3\n")
    (algo / "mistyped.yaml").write_text("defaults: [bc_schema, _self_]\nname: bc\nbatch_size: abc\n")
    (algo / "broken.yaml").write_text("name: bc\nlr: [1, }\n")
    (algo / "code.yaml").write_text("name: bc\n_target_: os.system\n")
    (algo / "nameless.yaml").write_text("lr: 0.1\n")
    (algo / "orphan.yaml").write_text("defaults: [nowhere_schema, _self_]\n")
    for name, text in {
        "run": json.dumps({"algo": {"name": "bc"}, "policy": {"name": "deterministic"}}),
        "newer": json.dumps({"novel": 1}),
        "torn": '{"algo": {"na',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_one_line(case, place, capsys, monkeypatch):
    words, pattern = CASES[case]
    work = place / "work"
    work.mkdir()
    if words[0] != "bench":
        monkeypatch.chdir(work)
    before = snapshot(place)
    code = main([word.replace("{place}", str(place)) for word in words])
    err = capsys.readouterr().err
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert re.fullmatch(
        pattern.replace("{place}", re.escape(str(place))), lines[0].removeprefix("error: ")
    ), err
    assert snapshot(place) == before, "something was half-written"


def snapshot(folder):
    return {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_full_disk_is_one_line(monkeypatch, capsys, tmp_path):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    monkeypatch.setattr("robopost.cli.completion.candidates", full)
    assert main(["completion", "--words", "robopost "]) == 2
    assert capsys.readouterr().err == (
        "error: the disk is full while writing runs/x. Fix: free some space, or put out= on another disk\n"
    )


def test_unexpected_errors_keep_their_traceback(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("a bug")

    monkeypatch.setattr("robopost.cli.completion.candidates", broken)
    assert main(["completion", "--words", "robopost "]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: a bug" in err
    assert err.strip().splitlines()[-1].startswith("unexpected RuntimeError: ")


def test_debug_shows_the_traceback_of_a_user_error(capsys):
    assert main(["train", "algo=td4", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_says_how_to_go_on(monkeypatch, capsys):
    def stop(*args):
        raise KeyboardInterrupt("resume with: robopost train resume=runs/x")

    monkeypatch.setattr("robopost.cli.completion.candidates", stop)
    assert main(["completion", "--words", "robopost "]) == 130
    assert capsys.readouterr().err == "interrupted; resume with: robopost train resume=runs/x\n"

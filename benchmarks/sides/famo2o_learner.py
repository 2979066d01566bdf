# SPDX-License-Identifier: Apache-2.0
"""The original learner's side of benchmarks/famo2o_speed.py. Runs where its old stack is installed; robopost isn't
needed.

    python famo2o_learner.py <clone of github.com/LeapLabTHU/FamO2O> <.npz with transitions> <batch size>

Reads one JSON request per line from stdin and answers each with one line. `{"updates": n}` does n offline updates
as `family_train_finetune.py` does: sample the buffer, shift the rewards, update, read the metrics every 1000.
`{"parity": [start, stop], "out": path}` saves a fresh learner's weights and, for one update from them in each phase,
the noise it draws and its losses.
"""

import json
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np

LOG_EVERY = 1000
RANGE = (8.0, 14.0)  # configs/family_antmaze_finetune_config.py
LOSSES = ("value_loss", "critic_loss", "actor_loss", "hierarchical_loss", "temp_loss")


def load(repository):
    """The original's modules; d4rl and gym, which its data file imports, are empty stand-ins."""
    for name in ("d4rl", "gym"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].spaces = types.SimpleNamespace(Box=object)
    sys.modules["gym"].Env = object
    sys.path.insert(0, f"{repository}/jax_iql")
    import dataset_utils
    import family_learner

    return dataset_utils, family_learner


def make(learner, data):
    """A learner with the settings of the original's one published config."""
    return learner.FamilyLearner(
        42,
        data["observations"][:1],
        data["actions"][:1],
        expectile=0.9,
        opt_decay_schedule=None,
        max_steps=1_000_000,
        family_coefficient_range=RANGE,
    )


def flatten(tree, prefix):
    if hasattr(tree, "items"):
        return {k: v for key, item in tree.items() for k, v in flatten(item, f"{prefix}/{key}").items()}
    return {prefix: np.asarray(tree)}


def parity(learner, utils, data, rows, out):
    """Weights before, and per phase the noise that `_family_update_jit` draws from its keys and the losses."""
    from tensorflow_probability.substrates import jax as tfp

    agent = make(learner, data)
    saved = {}
    for name in ("actor", "hierarchical_actor", "hierarchical_temp", "critic", "target_critic", "value"):
        saved |= flatten(getattr(agent, name).params, name)
    batch = utils.Batch(**{key: data[key][slice(*rows)] for key in utils.Batch._fields})
    size, action_dim = batch.actions.shape
    key, rng = jax.random.split(agent.rng)
    second, _ = jax.random.split(rng)
    fresh = dict(vars(agent))

    def normal(dim, key):
        return tfp.distributions.MultivariateNormalDiag(jnp.zeros((size, dim)), jnp.ones(dim)).sample(
            seed=key
        )

    for phase in ("offline", "online"):
        noise = {"coefficient": normal(1, key), "action": normal(action_dim, key)}
        if phase == "offline":
            noise["policy"] = jax.random.uniform(second, (size, 1), minval=RANGE[0], maxval=RANGE[1])
        else:
            noise["policy"] = normal(1, second)
        vars(agent).update(fresh)  # its models are immutable
        info = agent.update(batch, random_hierarchical_coefficients=phase == "offline")
        saved |= {f"{phase}/noise/{name}": np.asarray(value) for name, value in noise.items()}
        saved |= {f"{phase}/loss/{name}": np.asarray(info[name]) for name in LOSSES}
    np.savez(out, **saved)


def main(repository, path, batch_size):
    utils, learner = load(repository)
    with np.load(path) as found:
        data = {key: found[key] for key in found}
    size = len(data["actions"])
    buffer = utils.Dataset(**data, dones_float=np.zeros(size, np.float32), size=size)
    agent = make(learner, data)
    done = 0

    def update():
        nonlocal done
        batch = buffer.sample(batch_size)
        batch = utils.Batch(
            observations=batch.observations,
            actions=batch.actions,
            rewards=batch.rewards - 1,
            masks=batch.masks,
            next_observations=batch.next_observations,
        )
        info = agent.update(batch, random_hierarchical_coefficients=True)
        done += 1
        if done % LOG_EVERY == 0:
            for value in info.values():
                np.asarray(value)

    def answer(value):
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()

    answer({"rows": size, "jax": jax.__version__, "devices": len(jax.devices())})
    for line in sys.stdin:
        request = json.loads(line)
        if "parity" in request:
            parity(learner, utils, data, request["parity"], request["out"])
            answer({})
        else:
            start = time.process_time()
            for _ in range(request["updates"]):
                update()
            # Updates run asynchronously: wait for the last.
            jax.block_until_ready((agent.actor.params, agent.critic.params, agent.hierarchical_actor.params))
            answer({"updates": request["updates"], "cpu_s": time.process_time() - start})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

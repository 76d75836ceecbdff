"""The step on problems small enough for closed forms: schedules, groups, accumulation, average, guard, LoRA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hi3d_jax.training import lora
from hi3d_jax.training.config import GuardConfig, LoRAConfig, OptimizerConfig, ParameterGroup
from hi3d_jax.training.optimizer import learning_rate, make_optimizer
from hi3d_jax.training.state import initial_state
from hi3d_jax.training.step import accumulated_gradients, train_step

OPTIMIZER, GUARD = OptimizerConfig(), GuardConfig()
PARAMS = {"net": {"a.kernel": jnp.ones((2, 3)), "a.bias": jnp.ones(3), "b.kernel": jnp.full((3, 1), 2.0)}}


def loss(params, frozen, batch, key):
    net = params["net"]
    hidden = batch["x"] @ net["a.kernel"] + net["a.bias"].reshape(1, 3)
    error = (hidden @ net["b.kernel"])[:, 0] - batch["y"]
    return (error**2).mean(), {"error": error.mean()}


def batch(seed, rows=8):
    x = np.random.default_rng(seed).normal(size=(rows, 2)).astype(np.float32)
    return {"x": jnp.asarray(x), "y": jnp.asarray(x.sum(1) + 1)}


def stepper(config=OPTIMIZER, guard=GUARD):
    optimizer = make_optimizer(config)
    state = initial_state(PARAMS, optimizer, ema=config.ema_decay > 0, key=jax.random.key(0))
    step = functools.partial(train_step, loss=loss, optimizer=optimizer, config=config, guard=guard)
    return state, jax.jit(step)


def test_schedules_rise_stay_and_fall():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4)
    assert np.allclose([learning_rate(config, step) for step in (0, 1, 3, 4, 999)], [0.5, 1, 2, 2, 2])
    config = dataclasses.replace(config, schedule="linear", decay_start=10, decay_steps=10, final_fraction=0.1)
    assert np.allclose([learning_rate(config, step) for step in (10, 15, 20, 99)], [2, 2 * 0.55, 0.2, 0.2])
    config = dataclasses.replace(config, schedule="cosine")
    assert np.allclose([learning_rate(config, step) for step in (10, 15, 20)], [2, 2 * 0.55, 0.2])


def test_the_optimizer_is_adamw_after_clipping():
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, clip_norm=0.5, decay_vectors=True)
    state, step = stepper(config)
    reference = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))
    params, moments = PARAMS, reference.init(PARAMS)
    for number in range(3):
        grads = jax.grad(loss, has_aux=True)(params, {}, batch(number), state.key)[0]
        updates, moments = reference.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        state, metrics = step(state, {}, batch(number))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.params, params)
    assert int(state.step) == 3
    assert int(metrics["skipped"]) == 0


def test_muon_turns_kernels_by_rotations_as_long_as_adams_steps_and_leaves_vectors_to_adam():
    params = {"net": {"c.kernel": jnp.zeros((3, 3, 4, 8)), "c.bias": jnp.zeros(8)}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    config = OptimizerConfig(method="muon", learning_rate=1e-2, clip_norm=0.0)
    steps = {}
    for method in ("muon", "adamw"):
        optimizer = make_optimizer(dataclasses.replace(config, method=method))
        steps[method] = optimizer.update(grads, optimizer.init(params), params)[0]["net"]
    np.testing.assert_allclose(steps["muon"]["c.bias"], steps["adamw"]["c.bias"], rtol=1e-6)
    # The matrix from the kernel's 36 inputs to its 8 outputs.
    step = -np.asarray(steps["muon"]["c.kernel"]).reshape(36, 8)
    left, _, right = np.linalg.svd(np.asarray(grads["net"]["c.kernel"]).reshape(36, 8), full_matrices=False)
    stretched = left.T @ step @ right.T / (0.2 * 1e-2 * 36**0.5)
    # Five of Newton and Schulz's iterations make every singular value one within a third.
    assert np.abs(np.diag(stretched) - 1).max() < 0.35
    assert np.abs(stretched - np.diag(np.diag(stretched))).max() < 1e-4


def test_groups_learn_at_their_own_pace_and_vectors_do_not_decay():
    groups = (ParameterGroup(r"net\.b\..*", 0.0), ParameterGroup(r".*bias", 0.5))
    state, step = stepper(OptimizerConfig(learning_rate=1e-2, weight_decay=1.0, groups=groups, clip_norm=0.0))
    after, _ = step(state, {}, batch(0))
    change = jax.tree.map(lambda new, old: np.asarray(new - old), after.params, PARAMS)["net"]
    assert not change["b.kernel"].any()
    # Adam's first step is the sign of the gradient; only the matrix of ones also decays by its value.
    np.testing.assert_allclose(np.abs(change["a.bias"]), 0.5 * 1e-2, rtol=1e-3)
    np.testing.assert_allclose(np.abs(change["a.kernel"] + 1e-2), 1e-2, rtol=1e-3)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sorted(leaf.shape for leaf in moments) == [(2, 3), (2, 3), (3,), (3,)], "frozen ones must keep no moments"


def test_parts_of_a_batch_add_up_to_the_whole():
    (whole, metrics), grads = accumulated_gradients(loss, PARAMS, {}, batch(0), jax.random.key(0), 1)
    (parts, part_metrics), part_grads = accumulated_gradients(loss, PARAMS, {}, batch(0), jax.random.key(0), 4)
    np.testing.assert_allclose([parts, part_metrics["error"]], [whole, metrics["error"]], rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), part_grads, grads)


def test_the_average_of_the_weights_follows_its_formula():
    state, step = stepper(OptimizerConfig(learning_rate=0.1, ema_decay=0.5))
    average = np.asarray(PARAMS["net"]["a.bias"])
    for number in range(12):
        state, _ = step(state, {}, batch(number))
        decay = min(0.5, (number + 1) / (number + 10))
        average = decay * average + (1 - decay) * np.asarray(state.params["net"]["a.bias"])
    np.testing.assert_allclose(state.ema["net"]["a.bias"], average, rtol=1e-5)


@pytest.mark.parametrize("spoil", [np.nan, 1e4])
def test_bad_steps_change_nothing_and_are_counted(spoil):
    state, step = stepper(OptimizerConfig(ema_decay=0.9), GuardConfig(spike_factor=10.0, warmup_steps=5))
    for number in range(6):
        state, _ = step(state, {}, batch(number))
    spoilt = batch(6)
    spoilt["y"] = spoilt["y"] * spoil
    after = state
    for skipped in (1, 2):
        after, metrics = step(after, {}, spoilt)
        assert int(metrics["skipped"]) == skipped
    kept = ("params", "opt_state", "ema")
    jax.tree.map(np.testing.assert_array_equal, *([getattr(s, name) for name in kept] for s in (after, state)))
    assert int(after.step) == 8
    after, metrics = step(after, {}, batch(8))
    assert int(metrics["skipped"]) == 0
    assert not np.array_equal(after.params["net"]["a.kernel"], state.params["net"]["a.kernel"])


def test_low_rank_updates_start_silent_and_add_their_product():
    network = {
        "block.attn1.to_q.kernel": jnp.ones((4, 6)),
        "block.attn1.to_q.bias": jnp.ones(6),
        "conv.kernel": jnp.ones((4, 4)),
    }
    config = LoRAConfig(rank=2, alpha=4.0)
    updates = lora.initial_updates(config, network, jax.random.key(0))
    assert {path: value.shape for path, value in updates.items()} == {
        "block.attn1.to_q.kernel.lora_down": (4, 2),
        "block.attn1.to_q.kernel.lora_up": (2, 6),
    }
    jax.tree.map(np.testing.assert_array_equal, lora.merged(config, network, updates), network)
    down, _ = updates.values()
    changed = lora.merged(config, network, {**updates, "block.attn1.to_q.kernel.lora_up": jnp.ones((2, 6))})
    np.testing.assert_allclose(changed["block.attn1.to_q.kernel"], 1 + 2 * down @ jnp.ones((2, 6)), rtol=1e-6)

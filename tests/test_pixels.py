"""The scripts for images: encoder, shifts, losses, replay of frames, whole runs on an environment without OpenGL."""

import copy
import csv
import functools
import importlib
import math
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from dot_env import DotEnv
from minari.data_collector import EpisodeBuffer
from test_baselines import load_mutant
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.nn import functional

import cal_ql_continuous as plain
import cal_ql_pixels as pixels
from baselines import awac_pixels, iql_pixels, sac_pixels
from cal_ql_pixels import Agent, Args, Encoder, Episode, ReplayBuffer, main, random_shift

CPU = torch.device("cpu")
gym.register("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8)


# ---- Encoder, shifts, update -----------------------------------------------------------------------------------------
SMALL = dict(actor_layers=(8,), critic_layers=(8,), batch_size=5)


SCRIPTS = [pixels, sac_pixels, iql_pixels, awac_pixels]  # CQL is Cal-QL less one statement
sampling = pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    """For what each of the algorithms has of its own; the losses of IQL and AWAC are in test_baselines.py."""
    return request.param


def make_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def make_case(script=pixels, **settings):
    torch.manual_seed(0)
    args = script.Args(latent_dim=6, **SMALL | ({"num_actions": 3} if script is pixels else {}) | settings)
    agent = script.Agent(20, 16, 3, 2, args)
    with (
        torch.no_grad()
    ):  # else Q-values are tiny, and a wrong choice between learned and target networks shows nothing
        for parameter in agent.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return args, agent, make_batch(script)


def make_batch(script, seed: int = 1):
    frames, following = (make_frames(5, 20, 16, 3, seed=k) for k in (2 * seed, 2 * seed + 1))
    terminations = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.get_default_dtype())
    return script.Batch(frames, torch.rand(5, 2) * 2 - 1, torch.randn(5), following, terminations, torch.randn(5))


def one_update(script, agent, args, batch, online: bool = False, with_actor: bool = True) -> dict:
    torch.manual_seed(5)
    return script.update(agent, agent.prepare(None, args), args, online, with_actor, batch)


@pytest.mark.parametrize("height, width, channels", [(64, 64, 3), (20, 33, 1), (16, 16, 9)])
def test_encoder_is_convolutions_linear_layer_norm_tanh(height, width, channels):
    encoder, frames = Encoder(height, width, channels, Args(latent_dim=6)), make_frames(4, height, width, channels)
    *convolutions, linear = [layer for layer in encoder.net if hasattr(layer, "weight") and layer.weight is not None]
    with torch.no_grad():
        h = torch.tensor(np.moveaxis(frames.numpy(), 3, 1).astype(np.float32)) / 255 - 0.5
        for layer in convolutions:
            h = functional.conv2d(h, layer.weight, layer.bias, stride=2, padding=1).clamp(min=0)
        assert h.shape[1:] == (32, math.ceil(height / 16), math.ceil(width / 16))
        h = h.reshape(4, -1) @ linear.weight.T + linear.bias
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(encoder(frames), h.tanh(), atol=1e-5)
    assert h.std() > 0.5 and [layer.out_channels for layer in convolutions] == [16, 32, 32, 32]
    for layer in (*convolutions, linear):
        weight = layer.weight.detach().flatten(1)
        product = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(product, 2 * torch.eye(len(product)), atol=1e-5) and not layer.bias.any()


def test_each_frame_is_shifted_by_its_own_shift_and_repeats_its_edge():
    frames = make_frames(200, 8, 6, 3)
    assert torch.equal(random_shift(frames, 0), frames)
    torch.manual_seed(0)
    shifted = random_shift(frames, 2)
    assert shifted.dtype == torch.uint8
    shifts = []
    for frame, ours in zip(frames.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(frame, ((2, 2), (2, 2), (0, 0)), mode="edge")
        places = [(i, j) for i in range(5) for j in range(5) if np.array_equal(ours, padded[i : i + 8, j : j + 6])]
        assert len(places) == 1
        shifts += places
    assert len(set(shifts)) == 25  # down and right are drawn independently of each other


def test_both_states_are_shifted_independently(script, monkeypatch):
    args, agent, batch = make_case(script, random_shift=3)
    batch, seen = batch._replace(next_observations=batch.observations), []
    monkeypatch.setattr(script, "random_shift", lambda *a: seen.append((a, random_shift(*a))) or seen[-1][1])
    one_update(script, agent, args, batch)
    assert [arguments[1] for arguments, _ in seen] == [3, 3]
    assert not torch.equal(seen[0][1], seen[1][1])


class OnFixedFeatures(torch.nn.Module):
    """A critic to which the features of its states are given beforehand."""

    def __init__(self, critic: torch.nn.Module, features: torch.Tensor):
        super().__init__()
        self.critic, self.features = critic, features

    def forward(self, observations, actions):
        return self.critic(self.features, actions)


@pytest.mark.parametrize("online, settings", [(False, {}), (True, dict(online_cql_factor=0.1, cql_lagrange=True))])
def test_update_is_that_of_vectors_on_shifted_and_encoded_frames(online, settings, monkeypatch):
    args, agent, batch = make_case(**settings)
    monkeypatch.setattr(pixels, "random_shift", lambda frames, most: frames.flip(2))  # draws nothing
    with torch.no_grad():
        following = agent.encoder(batch.next_observations.flip(2))
        fixed = agent.target_encoder(batch.next_observations.flip(2))
    encoded = agent.encoder(batch.observations.flip(2))
    features = encoded.detach().requires_grad_()

    vector_args = plain.Args(**SMALL, num_actions=3, **settings)
    twin = plain.Agent(6, 2, vector_args)
    twin.load_state_dict(agent.state_dict(), strict=False)  # all but the encoders
    optimizer = twin.prepare(None, vector_args)
    twin.target_critic = OnFixedFeatures(twin.target_critic, fixed)
    torch.manual_seed(5)
    vectors = batch._replace(observations=features, next_observations=following)
    expected = plain.update(twin, optimizer, vector_args, online, True, vectors)
    gradients = torch.autograd.grad(encoded, list(agent.encoder.parameters()), features.grad)

    metrics = one_update(pixels, agent, args, batch, online)
    assert metrics.keys() == expected.keys() and "losses/actor_loss" in expected
    for name, value in expected.items():
        assert torch.allclose(metrics[name], value, atol=1e-5), name
    for name in ("actor", "critic"):
        for ours, theirs in zip(getattr(agent, name).parameters(), getattr(twin, name).parameters(), strict=True):
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-5) and torch.allclose(ours, theirs, atol=1e-5)
    for ours, gradient in zip(agent.encoder.parameters(), gradients, strict=True):
        assert gradient.any() and torch.allclose(ours.grad, gradient, atol=1e-4)


def plain_sac(args, agent, batch, draws) -> tuple[dict, dict]:
    """Losses, and the gradient of all that learns, from the equations: one transition and one critic at a time."""
    p, draw_target, draw_actor = dict(agent.named_parameters()), *draws["randn"]
    drawn, alpha = draws["rand"][0].argsort()[: args.num_target_critics], p["log_alpha"].exp().detach()
    features, following = agent.encoder(batch.observations.flip(2)), batch.next_observations.flip(2)
    next_features, target_features = agent.encoder(following).detach(), agent.target_encoder(following)

    def q(ensemble, feature, action) -> torch.Tensor:
        values = []
        for i in range(args.num_critics):
            x = torch.cat([feature, action]) @ p[f"{ensemble}.weights.0"][i] + p[f"{ensemble}.biases.0"][i, 0]
            if args.critic_layer_norm:
                x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
            values += x.clamp(min=0) @ p[f"{ensemble}.weights.1"][i] + p[f"{ensemble}.biases.1"][i, 0]
        return torch.stack(values)

    def sample(feature, noise):
        mean, log_std = (x[0] for x in agent.actor(feature.unsqueeze(0)))
        policy = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
        action = torch.tanh(mean + log_std.exp() * noise)
        return action, policy.log_prob(action).sum()

    td, actor_losses, log_probs = 0, [], []
    for b in range(5):
        action, log_prob = sample(next_features[b], draw_target[b, 0])
        value = q("target_critic", target_features[b], action)[drawn].min()
        value = value - alpha * log_prob if args.backup_entropy else value
        target = batch.rewards[b] if batch.terminations[b] else batch.rewards[b] + args.gamma * value
        td = td + (q("critic", features[b], batch.actions[b]) - target.detach()) ** 2 / 5  # [N]
        if draw_actor is not None:
            action, log_prob = sample(features[b].detach(), draw_actor[b, 0])
            value = q("critic", features[b].detach(), action)
            actor_losses.append(alpha * log_prob - (value.min() if args.actor_reduce == "min" else value.mean()))
            log_probs.append(log_prob.detach())
    losses = {"qf_loss": td.mean()}
    steps = [(td.sum(), ["encoder.", "critic."])]
    if draw_actor is not None:
        losses["actor_loss"] = sum(actor_losses) / 5
        losses["alpha_loss"] = -p["log_alpha"] * (sum(log_probs) / 5 + 2 * args.target_entropy_scale)
        steps += [(losses["actor_loss"], ["actor."]), (losses["alpha_loss"], ["log_alpha"])]
    gradients = {}
    for loss, prefixes in steps:
        names = [name for name in p if name.startswith(tuple(prefixes))]
        values = torch.autograd.grad(loss, [p[name] for name in names], retain_graph=True)
        gradients |= dict(zip(names, values, strict=True))
    return losses, gradients


SAC_CASES = {
    "SAC": dict(),
    "RLPD": dict(num_critics=5, actor_reduce="mean", critic_layer_norm=True, target_entropy_scale=-0.5,
                 backup_entropy=False),
}  # fmt: skip


def check_sac(script, settings: dict, with_actor: bool) -> None:
    """One update: losses, gradients, Adam's first step, targets."""
    with pytest.MonkeyPatch.context() as patch:
        torch.set_default_dtype(torch.float64)
        try:
            args, agent, batch = make_case(script, gamma=0.9, tau=0.1, actor_lr=1e-2, critic_lr=2e-2, **settings)
            agent.log_alpha.data.fill_(0.4)
            draws = {"randn": [], "rand": []}
            for name, drawn in draws.items():
                draw = getattr(torch, name)
                patch.setattr(torch, name, lambda *a, d=draw, n=drawn, **k: n.append(d(*a, **k)) or n[-1])
            patch.setattr(script, "random_shift", lambda frames, most: frames.flip(2))  # draws nothing
            twin = copy.deepcopy(agent)
            metrics = one_update(script, agent, args, batch, with_actor=with_actor)
            assert [x.shape for x in draws["randn"]] == [(5, 1, 2)] * (1 + with_actor)
            assert [x.shape for x in draws["rand"]] == [(args.num_critics,)]
            draws["randn"] += [None] * (not with_actor)
            losses, gradients = plain_sac(args, twin, batch, draws)
        finally:
            torch.set_default_dtype(torch.float32)
    assert {name for name in metrics if name.endswith("_loss")} == {f"losses/{name}" for name in losses}
    for name, loss in losses.items():
        torch.testing.assert_close(metrics[f"losses/{name}"], loss.detach())
    before, after = (dict(each.named_parameters()) for each in (twin, agent))
    for name, old in before.items():
        if name.startswith("target_"):
            expected = 0.9 * old + 0.1 * after[name.removeprefix("target_")]
        elif name in gradients:
            torch.testing.assert_close(after[name].grad, gradients[name])
            rate = args.critic_lr if name.startswith(("encoder", "critic")) else args.actor_lr
            expected = old - rate * gradients[name] / (gradients[name].abs() + 1e-8)
        else:
            assert after[name].grad is None, name
            expected = old
        torch.testing.assert_close(after[name].detach(), expected.detach(), rtol=1e-6, atol=1e-7)


def check_all_of_sac(script) -> None:
    for settings in SAC_CASES.values():
        for with_actor in (True, False):
            check_sac(script, settings, with_actor)
    check_acting(script)
    check_probe(script)


@pytest.mark.parametrize("with_actor", [True, False])
@pytest.mark.parametrize("settings", SAC_CASES.values(), ids=SAC_CASES)
def test_sac_equals_an_oracle(settings, with_actor):
    check_sac(sac_pixels, settings, with_actor)


SAC_MUTANTS = [
    ("agent.encoder(next_frames), agent.target", "agent.target_encoder(next_frames), agent.target"),
    ("agent.target_encoder(next_frames)", "agent.encoder(next_frames)"),
    ("next_frames = random_shift(batch.next_obs", "next_frames = random_shift(batch.obs"),
    ("next_observations=next_features)", "next_observations=features)"),
    ("actor.sample(batch.next_observations, 1)", "actor.sample(batch.observations, 1)"),
    ("actor.sample(batch.next_observations, 1)", "actor.sample(batch.next_observations, 2)"),
    ("[: args.num_target_critics]", ""),
    ("agent.target_critic(target_features", "agent.critic(target_features"),
    ("agent.target_critic(target_features", "agent.target_critic(batch.next_observations"),
    ("[drawn].amin(0)  # [B, 1]", "[drawn].mean(0)"),
    ("        if args.backup_entropy:", "        if True:"),
    ("next_q - alpha * next_log_prob", "next_q"),
    ("next_q - alpha * next_log_prob", "next_q + alpha * next_log_prob"),
    ("next_q - alpha * next_log_prob", "next_q - next_log_prob"),
    ("target = batch.rewards + ", "target = "),
    ("args.gamma * ", ""),
    ("(1 - batch.terminations) * ", ""),
    ("(q_data.squeeze(2) - target).square().mean(1)", "0.5 * (q_data.squeeze(2) - target).square().mean(1)"),
    ("td_loss.sum().backward()", "td_loss.mean().backward()"),
    ("    with torch.no_grad():\n        next_action", "    if True:\n        next_action"),
    ("    if with_actor:", "    if True:"),
    ("q.amin(0) if args.actor_reduce", "q.mean(0) if args.actor_reduce"),
    ("q.amin(0) if args.actor_reduce", "q[0] if args.actor_reduce"),
    ("else q.mean(0)", "else q.amin(0)"),
    ("actor_loss = (alpha * log_prob - q)", "actor_loss = (log_prob - q)"),
    ("actor_loss = (alpha * log_prob - q)", "actor_loss = (alpha * log_prob + q)"),
    ("actor_loss = (alpha * log_prob - q)", "actor_loss = (alpha * log_prob - 2 * q)"),
    ("agent.log_alpha.exp().detach()", "agent.log_alpha.exp()"),
    ("log_prob.detach() + args", "log_prob + args"),
    ("alpha_loss = -(agent", "alpha_loss = (agent"),
    ("args.target_entropy_scale * action_dim", "args.target_entropy_scale"),
    ("args.target_entropy_scale * action_dim", "-action_dim"),
    (".backward(inputs=[*actor.parameters(), agent.log_alpha])", ".backward()"),
    ("slow.lerp_(fast, args.tau)", "slow.lerp_(fast, 1 - args.tau)"),
    ("((agent.target_encoder, agent.encoder), (agent.target_critic, critic))", "((agent.target_critic, critic),)"),
    ('self.log_alpha], "lr": args.actor_lr', 'self.log_alpha], "lr": args.critic_lr'),
    ("critics = [*self.encoder.parameters(), ", "critics = ["),
    ("self.acted_steps += len(frames)", "self.acted_steps += 1"),
    ("if self.acted_steps > self.random_steps", "if self.acted_steps >= self.random_steps"),
    ("2 * torch.rand_like(actions) - 1", "torch.rand_like(actions)"),
    ("if not explore:", "if explore:"),
    ("return torch.tanh(self.actor(features)[0])", "return self.actor(features)[0]"),
    ("< batch.mc_returns.unsqueeze(1)", "> batch.mc_returns.unsqueeze(1)"),
    ("features = agent.encoder(batch.observations)  # of", "features = agent.target_encoder(batch.observations)  # of"),
]  # fmt: skip


def test_every_mutant_of_sac_is_caught(tmp_path):
    check_all_of_sac(sac_pixels)
    for number, (old, new) in enumerate(SAC_MUTANTS):
        (tmp_path / str(number)).mkdir()
        mutant = load_mutant("sac_pixels", old, new, tmp_path / str(number))
        try:
            check_all_of_sac(mutant)
        except (AssertionError, RuntimeError):  # torch refuses some gradients
            continue
        pytest.fail(f"sac_pixels passes with {new!r} in place of {old!r}")


def test_sac_solves_a_bandit_that_is_seen():
    """A dark frame and a bright one, s of -1 and 1, and reward -(a - s/2)^2: the best is s/2."""
    args = sac_pixels.Args(latent_dim=4, actor_layers=(16,), critic_layers=(32,), actor_lr=3e-3, critic_lr=3e-3)
    torch.manual_seed(0)
    agent = sac_pixels.Agent(16, 16, 1, 1, args)
    agent.log_alpha.data.fill_(-5.0)
    optimizer = agent.prepare(None, args)
    frames = torch.tensor([60, 200], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 16, 16, 1)
    for _ in range(300):
        bright, actions = torch.randint(2, (64,)), torch.rand(64, 1) * 2 - 1
        rewards = -(actions[:, 0] - (bright - 0.5)).square()
        batch = sac_pixels.Batch(frames[bright], actions, rewards, frames[bright], torch.ones(64), rewards)
        sac_pixels.update(agent, optimizer, args, True, True, batch)
    with torch.no_grad():
        assert (agent.act(frames, explore=False)[:, 0] - torch.tensor([-0.5, 0.5])).abs().max() < 0.15


def test_actor_loss_leaves_the_encoder_untouched_and_targets_follow(script):
    states = []
    for with_actor in (False, True):
        args, agent, batch = make_case(script)
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        one_update(script, agent, args, batch, with_actor=with_actor)
        after = agent.state_dict()
        moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
        learned = {"encoder", "critic", "target_encoder", "target_critic"}
        learned |= {"value"} if script is iql_pixels else set()
        temperature = {"log_alpha"} & {name for name, _ in agent.named_parameters()}
        assert moved == learned | ({"actor"} | temperature if with_actor else set())
        for name in after:
            if name.startswith(("encoder", "critic")):
                target = torch.lerp(before[f"target_{name}"], after[name], args.tau)
                assert torch.allclose(after[f"target_{name}"], target, atol=1e-7), name
        states.append(after)
    for name, value in states[0].items():
        if name.startswith(("encoder", "critic")):
            assert torch.equal(value, states[1][name]), name


def test_each_state_is_encoded_once(script, monkeypatch):
    args, agent, batch = make_case(script)
    seen, forward = [], script.Encoder.forward
    monkeypatch.setattr(script.Encoder, "forward", lambda self, x: (seen.append((self, len(x))), forward(self, x))[1])
    one_update(script, agent, args, batch)
    assert sorted(seen, key=lambda call: call[0] is agent.target_encoder) == [
        (agent.encoder, 5),  # s
        (agent.encoder, 5),  # s', for the policy or for V
        (agent.target_encoder, 5),  # for the target: s', in IQL s
    ]


def check_acting(script) -> None:
    _, agent, batch = make_case(script)
    with torch.no_grad():
        features = agent.encoder(batch.observations)
        mean, _ = agent.actor(features)
        assert torch.equal(agent.act(batch.observations, explore=False), mean.tanh())
        torch.manual_seed(3)
        drawn = agent.act(batch.observations, explore=True)
        torch.manual_seed(3)
        assert torch.equal(drawn, agent.actor.sample(features, 1)[0][:, 0]) and not torch.equal(drawn, mean.tanh())
        if script is pixels:
            return
        agent.random_steps, agent.acted_steps = 10, torch.tensor(0)
        frames = batch.observations[:1].expand(5, -1, -1, -1)
        agent.actor.log_std_offset.fill_(-9.0)
        spreads = [agent.act(frames, explore=True).std(0).min() for _ in range(3)]
        assert spreads[0] > 0.1 and spreads[1] > 0.1 and spreads[2] < 1e-2, "uniform for ten steps"
        actions = [agent.act(batch.observations, explore=False) for _ in range(2)]
        assert torch.equal(*actions) and agent.acted_steps == 15, "evaluations do not count"
        agent.acted_steps -= 15
        uniform = torch.cat([agent.act(frames, explore=True) for _ in range(2)])
        assert uniform.min() < 0 < uniform.max() and uniform.abs().max() < 1


@sampling
def test_agent_acts_by_its_mean_or_a_draw(script):
    check_acting(script)


def test_learning_rates_and_initial_targets(script):
    args = script.Args(latent_dim=6, actor_lr=1e-2, critic_lr=1e-3)
    agent = script.Agent(20, 16, 3, 2, args)
    rates = {id(p): group["lr"] for group in agent.prepare(None, args).param_groups for p in group["params"]}
    assert {rates[id(p)] for p in [*agent.encoder.parameters(), *agent.critic.parameters()]} == {1e-3}
    assert {rates[id(p)] for p in agent.actor.parameters()} == {1e-2}
    for ours, target in zip(agent.encoder.parameters(), agent.target_encoder.parameters(), strict=True):
        assert torch.equal(ours, target) and not target.requires_grad


def check_probe(script) -> None:
    args, agent, batch = make_case(script)
    with torch.no_grad():
        features = agent.encoder(batch.observations)
        mean_q = agent.critic(features, batch.actions.unsqueeze(1)).mean()
    batch = batch._replace(mc_returns=torch.tensor([1e6, 1e6, 1e6, -1e6, -1e6]))
    values = script.probe(agent, batch, args)
    assert values == {"mean_q": pytest.approx(mean_q.item()), "mean_mc_return": 2e5, "bound_rate": pytest.approx(0.6)}


@sampling
def test_probe_sees_the_frames_as_they_are(script):
    check_probe(script)


def test_settings_of_the_visual_task_are_the_specification_s():
    args = vars(pixels.task_defaults("pick-place-pixels"))
    expected = dict(
        cql_weight=5.0, online_cql_factor=0.1, num_actions=4, reward_scale=11.0, reward_bias=-1.0, gamma=0.96,
        offline_steps=50_000, online_steps=100_000, utd_ratio=5, actor_interval=1, mixing_ratio=0.5, batch_size=256,
        tau=0.005, actor_lr=1e-4, critic_lr=3e-4, offline_eval_interval=5_000, online_eval_interval=2_000,
        eval_episodes=20, num_critics=2, importance_sampling=True, actor_layers=(256, 256), critic_layers=(256, 256),
        latent_dim=50, random_shift=4, buffer_size=110_000)  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert pixels.parse_args([]) == pixels.task_defaults("pick-place-pixels")
    sac = vars(sac_pixels.task_defaults("pick-place-pixels"))  # no pre-training, all learning rates 3e-4
    own = dict(offline_steps=0, actor_lr=3e-4, offline_eval_interval=50_000)
    shared = (args.keys() & sac.keys()) - own.keys()
    assert {name: sac[name] for name in own} == own and {name: sac[name] for name in shared} == {
        name: args[name] for name in shared
    }
    iql, awac = (vars(rival.task_defaults("pick-place-pixels")) for rival in (iql_pixels, awac_pixels))
    own = dict(reward_scale=1.0, reward_bias=-1.0, actor_lr=3e-4, expectile=0.7, beta=10.0, actor_std=None)
    assert {name: iql[name] for name in own} == own
    shared = (args.keys() & iql.keys()) - own.keys()
    assert {name: iql[name] for name in shared} == {name: args[name] for name in shared}
    own = dict(reward_scale=1.0, reward_bias=-1.0, actor_lr=3e-4, temperature=1.0, mixing_ratio=-1.0)
    own |= dict(actor_layers=(256,) * 4, critic_layers=(256,) * 4)
    assert {name: awac[name] for name in own} == own
    shared = (args.keys() & awac.keys()) - own.keys()
    assert {name: awac[name] for name in shared} == {name: args[name] for name in shared}


# ---- Replay ----------------------------------------------------------------------------------------------------------


def make_episode(first: int, length: int) -> Episode:
    """Frame k shows k in every byte, for k from `first` on; transition k has action -k and reward 1 at the end."""
    numbers = np.arange(first, first + length + 1)
    frames = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (length + 1, 4, 4, 3))
    ended = np.arange(length) == length - 1
    return Episode(frames, -numbers[:-1, None].astype(np.float32), ended.astype(np.float32), ended)


def make_buffer(offline: list[Episode], sparse: bool = True, **settings) -> ReplayBuffer:
    """Slots that no episode has filled yet hold 255 or NaN, so that a sample of one shows."""
    num_frames = sum(len(episode.rewards) + 1 for episode in offline)
    args = Args(**dict(buffer_size=20, mixing_ratio=0.0) | settings)
    buffer = ReplayBuffer(iter([num_frames, *offline]), args, sparse, CPU)
    for column in buffer.columns:
        column[num_frames:] = 255 if column.dtype == torch.uint8 else torch.nan
    return buffer


def check_transitions(buffer: ReplayBuffer, expected: set[int]) -> None:
    """Transitions of the expected frames, and no others, are drawn, and they are whole."""
    batch = buffer.sample(2000)
    number = -batch.actions[:, 0]
    assert set(number.int().tolist()) == expected
    assert (batch.observations == number[:, None, None, None]).all()
    assert (batch.next_observations == number[:, None, None, None] + 1).all()
    assert torch.equal(batch.mc_returns[batch.terminations == 1], batch.rewards[batch.terminations == 1])


def test_transitions_are_whole_and_last_frames_are_never_drawn():
    buffer = make_buffer([make_episode(0, 3), make_episode(10, 5)])
    assert (len(buffer.offline), len(buffer.columns[0])) == (8, 10 + 20)  # each frame once
    check_transitions(buffer, {0, 1, 2, *range(10, 15)})
    buffer.add(make_episode(100, 4))
    check_transitions(buffer, {100, 101, 102, 103})
    batch = buffer.sample(500)
    assert torch.allclose(batch.mc_returns, 0.99 ** (103 + batch.actions[:, 0]))
    buffer.add(make_episode(110, 2))
    check_transitions(buffer, {100, 101, 102, 103, 110, 111})


def test_ring_overwrites_the_oldest_frames_and_closes():
    buffer = make_buffer([make_episode(0, 3)], buffer_size=10)
    for first, length, expected in [
        (100, 5, {*range(100, 105)}),
        (110, 5, {102, 103, 104, *range(110, 115)}),  # six more frames: 100 and 101 are gone, and the ring is full
        (120, 2, {*range(110, 115), 120, 121}),  # 105, the last frame of the first episode, has lost its transition
        (130, 30, {*range(151, 160)}),  # longer than the ring: its last ten frames
        (200, 1, {*range(153, 160), 200}),
    ]:
        buffer.add(make_episode(first, length))
        check_transitions(buffer, expected)
        assert len(buffer.online) == len(expected)


@pytest.mark.parametrize("sparse, tail", [(True, -5 / 0.01), (False, 0)])
def test_columns(sparse, tail):
    """The second episode is cut off by time; rewards are scaled and biased, returns are of those."""
    ended, cut = make_episode(0, 3), make_episode(10, 2)
    cut = cut._replace(rewards=np.zeros(2, np.float32), terminations=np.zeros(2, bool))
    buffer = make_buffer([ended, cut], sparse, reward_scale=10.0, reward_bias=-5.0)
    assert buffer.offline.tolist() == [0, 1, 2, 4, 5]
    _, actions, rewards, terminations, returns, whole = (column[buffer.offline] for column in buffer.columns)
    assert actions[:, 0].tolist() == [0, -1, -2, -10, -11]
    assert rewards.tolist() == [-5, -5, 5, -5, -5] and terminations.tolist() == [0, 0, 1, 0, 0]
    last = -5 + 0.99 * tail
    assert returns.tolist() == pytest.approx([-5 + 0.99 * -0.05, -0.05, 5, -5 + 0.99 * last, last])
    assert whole.all() and not buffer.columns[-1][[3, 6]].any()


def test_mixing_counts_transitions_not_frames():
    buffer = make_buffer([make_episode(0, 3)], mixing_ratio=-1.0)
    assert (buffer.sample(11).actions > -50).all()
    buffer.add(make_episode(100, 1))
    assert (buffer.sample(400).actions > -50).sum() == 300
    half = make_buffer([make_episode(0, 3)], mixing_ratio=0.5)
    half.add(make_episode(100, 2))
    assert (half.sample(11).actions > -50).sum() == 5


def test_state_dict_round_trip():
    buffer, other = (make_buffer([make_episode(0, 3)], buffer_size=10) for _ in range(2))
    for first in (100, 110, 120):
        buffer.add(make_episode(first, 4))
    other.load_state_dict(buffer.state_dict())
    for twin in (buffer, other):
        twin.add(make_episode(130, 2))
    batches = []
    for twin in (buffer, other):
        torch.manual_seed(0)
        batches.append(twin.sample(100))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*batches, strict=True))


def test_50_000_steps_of_64_by_64_fit_and_are_read_one_episode_at_a_time():
    alive = weakref.WeakSet()

    class Frames(np.ndarray):
        pass

    def episodes():
        yield 10 * 21
        for k in range(10):
            assert len(alive) <= 2  # the first one and the last one
            episode = make_episode(21 * k, 20)
            frames = np.zeros((21, 64, 64, 3), np.uint8).view(Frames)
            alive.add(frames)
            episode = episode._replace(observations=frames)
            del frames
            yield episode
            del episode

    Frames.__hash__ = object.__hash__
    Frames.__eq__ = object.__eq__
    slots = 50_000 + 50_000 // 20  # the memory is not touched here
    buffer = ReplayBuffer(episodes(), Args(buffer_size=slots), True, CPU)
    assert sum(column.nbytes for column in buffer.columns) < 0.7e9


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def write_dots(dataset_id: str, count: int = 12, spec_size: int = 12, change=None, space=None, env_id="test/Dot-v0"):
    """Demonstrations of DotEnv; `change` alters the frames of an episode, `space` the recorded space."""
    env, rng, buffers = gym.make("test/Dot-v0"), np.random.default_rng(0), []
    for k in range(count):
        frames, actions, rewards, terminated, truncated = [env.reset(seed=k)[0]], [], [], False, False
        while not (terminated or truncated):
            actions.append(np.clip([rng.normal(), 1 + rng.normal()], -2, 2).astype(np.float32))
            frame, reward, terminated, truncated, _ = env.step(actions[-1])
            frames.append(frame)
            rewards.append(reward)
        frames, last = np.array(frames), np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(
            EpisodeBuffer(
                id=k,
                observations=change(frames) if change else frames,
                actions=np.array(actions),
                rewards=rewards,
                terminations=last & terminated,
                truncations=last & (not terminated),
            )
        )
    spec = gym.envs.registration.EnvSpec(
        env_id, entry_point="dot_env:DotEnv", max_episode_steps=8, kwargs={"size": spec_size}
    )
    space = space or env.observation_space
    minari.create_dataset_from_buffers(dataset_id, buffers, env=spec, observation_space=space, jpeg_encoding=False)


# 12 updates with evaluations at 0, 5, 10 and 12, then episodes of up to 8 steps up to 30 steps.
TINY = """--offline-steps 12 --online-steps 30 --offline-eval-interval 5 --online-eval-interval 10 --eval-episodes 2
--utd-ratio 2 --buffer-size 25 --actor-layers 8 --critic-layers 8 --latent-dim 5 --batch-size 8 --num-actions 2
--device cpu --threads 1""".split()
DOTS = ["--env-id", "test/dot-v0", *TINY]


def tiny(script) -> list[str]:
    """TINY with what the script has: Cal-QL alone samples many actions, and SAC begins with random ones."""
    if script is pixels:
        return TINY
    return " ".join(TINY).replace("--num-actions 2", "--random-steps 9" if script is sac_pixels else "").split()


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        write_dots("test/dot-v0")
        yield path


@pytest.fixture(autouse=True)
def run_folder(tmp_path, monkeypatch):
    """An empty working directory for each test; what `main` changes in the process is put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for script in SCRIPTS:
        script.SIGNALS.clear()
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def take_run(name: str) -> Path:
    """Moves the only run to a folder of its own."""
    (run,) = Path("runs").iterdir()
    return run.rename(name)


def read_rows(run: Path) -> list[dict]:
    with (run / "eval.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "wall_time"} for row in csv.DictReader(file)]


def read_state(run: Path) -> list:
    """All tensors and numbers of a checkpoint in order, but for times and for the settings."""

    def leaves(value):
        if isinstance(value, dict):
            return [leaf for key, part in value.items() if key not in ("wall_time", "args") for leaf in leaves(part)]
        return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list | tuple) else [value]

    return leaves(torch.load(run / "checkpoint.pt", weights_only=True))


def check_equal(run: Path, other: Path) -> None:
    assert read_rows(run) == read_rows(other)
    states = read_state(run), read_state(other)
    assert len(states[0]) > 50
    for ours, theirs in zip(*states, strict=True):
        assert torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs or ours != ours


@pytest.fixture(scope="module")
def whole(script, datasets_path, tmp_path_factory):
    """A run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert script.main(["--env-id", "test/dot-v0", *tiny(script)]) == 0
        return path / take_run("run")


def test_script_copied_alone_runs_the_task_through_both_phases(script, run_folder):
    """With the module `collect.pick_place` of the folder it is started in."""
    copied = Path(shutil.copy(script.__file__, run_folder)).name
    Path("collect").mkdir()
    Path("collect/pick_place.py").write_text(
        "import gymnasium\n"
        "gymnasium.register('cal-ql/PickPlaceCamera-v0', entry_point='dot_env:DotEnv', max_episode_steps=8)\n"
    )
    shutil.copy(Path(__file__).with_name("dot_env.py"), run_folder)
    if "cal-ql/pick-place/pixels-v0" not in minari.list_local_datasets():
        write_dots("cal-ql/pick-place/pixels-v0", env_id="cal-ql/PickPlaceCamera-v0")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, copied, *tiny(script)], cwd=run_folder, capture_output=True, text=True, env=environment
    )
    minari.delete_dataset("cal-ql/pick-place/pixels-v0")
    assert process.returncode == 0, process.stderr
    rows = read_rows(take_run("alone"))
    assert [row["phase"] for row in rows] == ["offline"] * 4 + ["online"] * (len(rows) - 4) and len(rows) >= 6
    assert int(rows[-1]["env_steps"]) >= 30 and "data: 12 episodes" in process.stdout


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing is saved."""


@pytest.mark.parametrize("call", [9, 40])
def test_killed_and_resumed_run_equals_an_uninterrupted_one(call, script, whole, monkeypatch):
    calls, update = [], script.update

    def killing_update(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "update", killing_update)
        with pytest.raises(Killed):
            script.main(["--env-id", "test/dot-v0", *tiny(script)])
    run = take_run("killed")
    assert len(read_rows(run)) < len(read_rows(whole))
    torch.manual_seed(99)  # the random state comes from the checkpoint
    assert script.main(["--resume", str(run)]) == 0
    check_equal(run, whole)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    assert [len(column) for column in state["buffer"]["online"]] == [25] * 6  # the ring was full


def test_signal_saves_and_the_run_goes_on_from_there(script, whole, monkeypatch):
    calls, update = [], script.update

    def stopped_update(*arguments):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(script, "update", stopped_update)
        with pytest.raises(SystemExit) as stop:
            script.main(["--env-id", "test/dot-v0", *tiny(script)])
    run = take_run("stopped")
    assert stop.value.code == 143
    assert torch.load(run / "checkpoint.pt", weights_only=True)["progress"]["updates"] == 8
    script.SIGNALS.clear()
    assert script.main(["--resume", str(run)]) == 0
    check_equal(run, whole)


def test_fine_tuning_in_the_users_environment_without_the_data(script, whole, capsys):
    """From the end of the offline phase, after a warm-up, as in the scripts that see states."""
    flags = ["--mixing-ratio", "0", "--warmup-steps", "16", "--seed", "2", "--episode-length", "8"]
    assert script.main(["--init-from", str(whole), "--online-env", "dot_env:DotEnv", *flags]) == 0
    run = take_run("fine-tuned")
    rows = read_rows(run)
    assert rows[0]["updates"] == "12" and int(rows[-1]["env_steps"]) >= 30
    assert int(rows[-1]["updates"]) < 12 + 2 * int(rows[-1]["env_steps"])
    assert script.main(["--init-from", str(whole), "--online-env", "dot_env:Nothing"]) == 2
    assert "dot_env:Nothing's environment cannot be made" in capsys.readouterr().err


def test_frames_that_an_environment_flips_or_draws_over_are_copied(monkeypatch):
    drawing = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    expected = torch.tensor(drawing[::-1].copy())
    monkeypatch.setattr(DotEnv, "observe", lambda self: drawing[::-1])
    dataset = minari.load_dataset("test/dot-v0")
    env = pixels.make_env(dataset, pixels.find_task("test/dot-v0"), 0)
    first, following = env.reset(seed=0)[0], env.step(np.zeros(2, np.float32))[0]
    drawing[:] = 0
    for frame in (first, following):
        assert torch.equal(torch.from_numpy(frame), expected)


def test_resume_refuses_other_data(capsys):
    write_dots("test/changing-v0")
    assert main(["--env-id", "test/changing-v0", *TINY, "--online-steps", "0"]) == 0
    minari.delete_dataset("test/changing-v0")
    write_dots("test/changing-v0", count=11)
    assert main(["--resume", str(take_run("run"))]) == 2
    assert "dataset has changed" in capsys.readouterr().err


def test_episodes_are_the_data_rescaled_and_clipped(capsys):
    dataset, task = minari.load_dataset("test/dot-v0"), pixels.find_task("test/dot-v0")
    env = pixels.make_env(dataset, task, 0)
    num_frames, *episodes = pixels.load_episodes([dataset], task, env)
    assert num_frames == sum(len(episode.observations) for episode in episodes)
    for ours, data in zip(episodes, dataset, strict=True):
        assert np.array_equal(ours.observations, data.observations) and ours.observations.dtype == np.uint8
        assert np.allclose(ours.actions, np.clip(data.actions / 2, -0.99999, 0.99999))
        assert ours.actions.dtype == np.float32 and np.array_equal(ours.rewards, data.rewards)
        assert np.array_equal(ours.terminations, data.terminations)
    successes = sum(bool(episode.rewards.any()) for episode in dataset)
    assert f"data: 12 episodes, {successes} with reward > 0" in capsys.readouterr().out


def test_time_limit_is_no_termination_and_actions_are_the_data_s():
    dataset, task = minari.load_dataset("test/dot-v0"), pixels.find_task("test/dot-v0")
    agent = Agent(12, 12, 3, 2, Args(latent_dim=5))
    agent.act = lambda frames, explore: torch.tensor([[0.0, 1.0]])
    cut = pixels.play_episode(pixels.make_env(dataset, task, 3), agent, 0, CPU)
    assert not cut.terminations.any() and not cut.rewards.any()  # three steps of 0.4 from -0.5 do not reach 1
    assert cut.observations.shape == (4, 12, 12, 3) and cut.observations.dtype == np.uint8
    ended = pixels.play_episode(pixels.make_env(dataset, task, 4), agent, 0, CPU)
    assert ended.terminations.tolist() == [False] * 3 + [True] and ended.rewards.tolist() == [0, 0, 0, 1]
    env = pixels.make_env(dataset, task, 0)
    env.reset(seed=0)
    assert [env.step(np.array([0.0, 0.99999]))[4]["score"] for _ in range(4)] == [0, 0, 0, 1]


# ---- What is refused -------------------------------------------------------------------------------------------------


def check_refused(flags: list[str], capsys, *words: str) -> None:
    assert main([*TINY, *flags]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in errors and not Path("runs").exists()


IMAGE = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)
BOTH = gym.spaces.Dict({"image": IMAGE, "place": gym.spaces.Box(-1, 1, (2,), np.float32)})


@pytest.mark.parametrize("name, kwargs, words", [
    ("float", dict(change=lambda x: (x / 255).astype(np.float32), space=gym.spaces.Box(0, 1, (12, 12, 3), np.float32)),
     ["float32", "uint8"]),
    ("first", dict(change=lambda x: np.moveaxis(x, 3, 1), space=gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)),
     ["(3, 12, 12)", "[H, W, C]"]),
    ("flat", dict(change=lambda x: x.mean((1, 2)).astype(np.float32), space=gym.spaces.Box(0, 255, (3,), np.float32)),
     ["one image", "cal_ql_continuous.py"]),
    ("dict", dict(change=lambda x: {"image": x, "place": np.zeros((len(x), 2), np.float32)}, space=BOTH),
     ["Dict", "one image"]),
    ("larger", dict(spec_size=14), ["uint8[14, 14, 3]", "the data's"]),
    ("unknown", dict(env_id="test/Nowhere-v0"), ["test/Nowhere-v0", "not registered"]),
])  # fmt: skip
def test_observations_and_environments_that_cannot_be_used(name, kwargs, words, capsys):
    write_dots(f"test/{name}-v0", count=1, **kwargs)
    check_refused(["--env-id", f"test/{name}-v0"], capsys, f"test/{name}-v0", *words)


@pytest.mark.parametrize("change, words", [
    (lambda data: data.actions.__setitem__((0, 0), np.nan), ["actions", "finite"]),
    (lambda data: object.__setattr__(data, "rewards", np.concatenate([data.rewards, [0.0]])), ["observations"]),
    (lambda data: object.__setattr__(data, "observations", data.observations.astype(np.float32)), ["float32"]),
])  # fmt: skip
def test_damaged_episodes_are_named(change, words, capsys, monkeypatch):
    iterate = minari.MinariDataset.iterate_episodes

    def damaged(self, indices=None):
        for data in iterate(self, indices):
            if data.id == 7:
                change(data)
            yield data

    monkeypatch.setattr(minari.MinariDataset, "iterate_episodes", damaged)
    check_refused(["--env-id", "test/dot-v0"], capsys, "episode 7 of test/dot-v0", *words)


def test_more_frames_than_the_metadata_say_are_refused(capsys, monkeypatch):
    steps = minari.load_dataset("test/dot-v0").total_steps
    monkeypatch.setattr(minari.MinariDataset, "total_steps", property(lambda self: steps - 1))
    check_refused(["--env-id", "test/dot-v0"], capsys, "episode 11 of test/dot-v0", "metadata")


@pytest.mark.parametrize("flags", ["--latent-dim 1", "--random-shift -1", "--buffer-size 0"])
def test_settings_out_of_range(flags, capsys):
    check_refused(flags.split(), capsys, flags.split()[0], "between")


def test_a_ring_too_large_for_the_memory_is_refused(capsys):
    check_refused(["--env-id", "test/dot-v0", "--buffer-size", str(2**40)], capsys, "memory")


def test_absent_dataset_names_its_collector(capsys):
    check_refused([], capsys, "cal-ql/pick-place/pixels-v0", "repository's `collect` makes it")


def test_missing_gl_names_the_packages(capsys, monkeypatch):
    def fail(self, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(DotEnv, "reset", fail)
    check_refused(["--env-id", "test/dot-v0"], capsys, "eglQueryString", "libegl1 libegl-mesa0 libgl1-mesa-dri")


# ---- With OpenGL -----------------------------------------------------------------------------------------------------


def test_cameras_in_one_process_draw_each_its_own_scene():
    try:
        from collect import pick_place  # noqa: F401

        one = gym.make("cal-ql/PickPlaceCamera-v0")
    except Exception as error:
        pytest.skip(f"nothing draws here: {error}")
    alone = [one.reset(seed=seed)[0] for seed in (0, 1)]
    assert not np.array_equal(*alone) and alone[0].shape == (64, 64, 3) and alone[0].std() > 10
    other = gym.make("cal-ql/PickPlaceCamera-v0")
    together = one.reset(seed=0)[0], other.reset(seed=1)[0]
    assert np.array_equal(together, alone)
    other.close()
    assert np.array_equal(one.reset(seed=1)[0], alone[1])  # closing one leaves the other


# ---- On a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestGraph:
    def make_step(self, script, captured: bool):
        """An agent on the GPU and its update, as a CUDA graph or as it is."""
        args, agent, _ = make_case(script, actor_lr=1e-4, critic_lr=1e-4)
        agent = agent.cuda()
        step = functools.partial(script.update, agent, agent.prepare(None, args), args, False, True)
        graphs = importlib.import_module("tensordict.nn")
        return agent, graphs.CudaGraphModule(step, warmup=3) if captured else step

    def make_cuda_batch(self, script, seed: int):
        torch.manual_seed(seed)
        return script.Batch(*(values.cuda() for values in make_batch(script, seed)))

    def test_updates_equal_those_without_a_graph(self, script, monkeypatch):
        """With constant numbers in place of the random ones, which a graph draws from states of its own."""
        batches = [self.make_cuda_batch(script, k) for k in range(50)]
        cases = [self.make_step(script, captured) for captured in (True, False)]
        for name, number in (("randn", 0.3), ("randn_like", 0.3), ("rand", 0.7), ("randint", 2)):
            draw = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda *a, d=draw, n=number, **k: torch.full_like(d(*a, **k), n))
        for name, value in (("deterministic", True), ("allow_tf32", False)):  # of the convolutions
            monkeypatch.setattr(torch.backends.cudnn, name, value)
        results = []
        for agent, step in cases:
            before = {name: value.detach().clone() for name, value in agent.named_parameters()}
            losses = [step(batch)["losses/qf_loss"].item() for batch in batches]
            moved = {name for name, value in agent.named_parameters() if not torch.equal(value, before[name])}
            assert moved == before.keys() - {"log_cql_alpha"}
            results.append((losses, [parameter.detach() for parameter in agent.parameters()]))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-3)
        for ours, theirs in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-4)  # of steps up to 5e-3

    def test_new_frames_take_effect_and_every_call_draws_anew(self, script):
        agent, step = self.make_step(script, captured=True)
        frozen = {name: value.clone() for name, value in agent.state_dict().items()}
        black, white = (self.make_cuda_batch(script, 0) for _ in range(2))
        black.observations.zero_(), white.observations.fill_(255)
        mean_q = []
        for batch in (black, white):
            rows = []
            for _ in range(8):
                agent.load_state_dict(frozen)
                rows.append({name: value.item() for name, value in step(batch).items()})
            assert len({row["losses/qf_loss"] for row in rows}) == 8
            # A shift leaves a plain frame as it is: Q of the data tells the frames alone.
            mean_q.append(rows[0]["calibration/mean_q"])
            assert [row["calibration/mean_q"] for row in rows] == pytest.approx([mean_q[-1]] * 8, rel=1e-2)
        assert mean_q[0] != pytest.approx(mean_q[1], rel=0.05)

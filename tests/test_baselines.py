"""The rivals in `baselines`: updates against plain implementations of the equations, settings, whole runs."""

import csv
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["iql_continuous", "awac_continuous", "td3_bc_continuous", "iql_pixels", "awac_pixels"]
S, A, B = 3, 2, 6  # entries of a state (or features of a frame) and of an action, transitions in a batch

SCRIPTS = {name: importlib.import_module(f"baselines.{name}") for name in NAMES}
IQL, AWAC, TD3_BC = FROM_STATES = list(SCRIPTS.values())[:3]
LEARNED = importlib.import_module("baselines.cal_ql_learned_value")
CAL_QL, SAC = (importlib.import_module(name) for name in ("cal_ql_continuous", "sac_offline_data"))


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


def sees_images(script) -> bool:
    return hasattr(script, "Encoder")


def make_args(script, **settings):
    return script.Args(device="cpu", **({"latent_dim": S} if sees_images(script) else {}), **settings)


def make_agent(script, args, action_dim: int = A, state_dim: int = S):
    """The script's own agent and optimizer for data of these shapes, all zero."""
    seen = np.zeros((2, 16, 18, 1), np.uint8) if sees_images(script) else np.zeros((2, state_dim), np.float32)
    zeros = np.zeros(2, np.float32)
    columns = (seen, np.zeros((2, action_dim), np.float32), zeros, seen, zeros, zeros)
    return script.make_agent([script.Batch(*columns)], args)


def seen_by(agent, states):
    """What the agent's networks get [B, S]: normalised states, or features of frames."""
    if hasattr(agent, "encoder"):
        return agent.encoder(states)
    return agent.normalize(states) if hasattr(agent, "normalize") else states


def small(script, **settings):
    """Settings of tiny networks, an agent in double precision away from its initial values, its optimizer, a batch."""
    torch.manual_seed(3)
    args = make_args(script, **{"actor_layers": (5, 4), "critic_layers": (4, 5), "gamma": 0.9, "tau": 0.1, **settings})
    agent, optimizer = make_agent(script, args)
    agent.double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name != "actor.log_std":
                parameter += 0.1 * torch.randn_like(parameter)  # biases and target networks too
        if args.__dict__.get("normalize_states"):
            agent.state_mean.copy_(torch.randn(S))
            agent.state_std.copy_(torch.rand(S) + 0.5)
    return args, agent, optimizer, make_batch(script)


def make_batch(script, size: int = B):
    actions = torch.rand(size, A, dtype=torch.double) * 1.9 - 0.95
    states, next_states, rewards = (torch.randn(size, *shape, dtype=torch.double) for shape in ((S,), (S,), ()))
    if sees_images(script):
        states, next_states = torch.randint(256, (2, size, 16, 18, 1)).double().unbind(0)
    return script.Batch(states, actions, rewards, next_states, (torch.arange(size) % 3 == 0).double(), rewards)


# --- Plain implementations ---


class Plain:
    """The parameters by name, and a rule that steps some of them: plain descent, or Adam written out."""

    def __init__(self, agent, rule: str, rates: dict[str, float], decays: dict[str, float]):
        self.p = {name: value.detach().clone() for name, value in agent.state_dict().items()}
        self.rule, self.rates, self.decays, self.norm = rule, rates, decays, agent.critic.layer_norm
        self.count, self.m, self.v = {}, {}, {}

    def step(self, prefix: str, loss_of) -> float:
        """One step along the gradient of `loss_of()` of parameters by prefix; an encoder steps with the critics."""
        prefixes = ("critic.", "encoder.") if prefix == "critic" else (prefix + ".",)
        names = [name for name in self.p if name.startswith(prefixes)]
        for name in names:
            self.p[name].requires_grad_(True)
        loss = loss_of()
        gradients = torch.autograd.grad(loss, [self.p[name] for name in names], allow_unused=True)
        rate, decay = self.rates[prefix], self.decays.get(prefix, 0.0)
        for name, g in zip(names, gradients, strict=True):
            old = self.p[name].detach()
            if g is None:
                self.p[name] = old
            elif self.rule == "descent":
                self.p[name] = old - 0.01 * g
            else:
                t = self.count[name] = self.count.get(name, 0) + 1
                self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
                self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g**2
                m, v = self.m[name] / (1 - 0.9**t), self.v[name] / (1 - 0.999**t)
                self.p[name] = old * (1 - rate * decay) - rate * m / (v**0.5 + 1e-8)
        return loss.item()

    def follow(self, tau: float, *sources: str) -> None:
        for name in [name for name in self.p if name.startswith(tuple(f"target_{source}." for source in sources))]:
            self.p[name] = (1 - tau) * self.p[name] + tau * self.p[name.removeprefix("target_")]

    def q(self, prefix: str, states, actions) -> list:
        """Q [B] of each critic, one critic after the other."""
        values, layers = [], sum(name.startswith(f"{prefix}.weights.") for name in self.p)
        for k in range(len(self.p[f"{prefix}.weights.0"])):
            x = torch.cat([states, actions], 1)
            for layer in range(layers):
                x = x @ self.p[f"{prefix}.weights.{layer}"][k] + self.p[f"{prefix}.biases.{layer}"][k, 0]
                if layer < layers - 1:
                    x = (x - x.mean(1, True)) / (x.var(1, False, keepdim=True) + 1e-5) ** 0.5 if self.norm else x
                    x = x * (x > 0)
            values.append(x[:, 0])
        return values

    def see(self, prefix: str, states):
        """Features of shifted frames, one frame after the other; states are what they are."""
        if f"{prefix}.net.0.weight" not in self.p:
            return states
        features, names = [], sorted((f"{prefix}.net.{k}" for k in (0, 2, 4, 6)), key=len)
        for frame in upside_down(states):
            x = frame.permute(2, 0, 1) / 255 - 0.5
            for name in names:
                x = F.conv2d(x, self.p[name + ".weight"], self.p[name + ".bias"], stride=2, padding=1)
                x = x * (x > 0)
            x = self.p[f"{prefix}.net.9.weight"] @ x.flatten() + self.p[f"{prefix}.net.9.bias"]
            features.append(torch.tanh((x - x.mean()) / (((x - x.mean()) ** 2).mean() + 1e-5) ** 0.5))
        return torch.stack(features)

    def mlp(self, prefix: str, x, dropout: float = 0.0):
        names = sorted({name.rsplit(".", 1)[0] for name in self.p if name.startswith(prefix + ".")})
        for name in names:
            x = x @ self.p[name + ".weight"].T + self.p[name + ".bias"]
            if name != names[-1]:
                x = x * (x > 0)
                x = F.dropout(x, dropout) if dropout else x
        return x


def upside_down(frames, most: int = 0):
    """Stands in for the random shift in comparisons: it draws nothing, and a frame that is not shifted shows."""
    return frames.flip(1)


def log_density(x, mean, log_std):
    """Of the diagonal Gaussian [B]."""
    return (-0.5 * ((x - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)).sum(1)


def smaller(values):
    return values[0] * (values[0] <= values[1]) + values[1] * (values[1] < values[0])


def squared_errors(o: Plain, frames, a, target):
    return sum(((q - target) ** 2).mean() for q in o.q("critic", o.see("encoder", frames), a))


def plain_iql(o: Plain, args, online, with_actor, batch) -> dict:
    frames, a, r, frames2, d, _ = batch
    losses, fixed = {}, args.actor_std and torch.full((A,), np.log(args.actor_std), dtype=a.dtype)
    s, s2 = o.see("encoder", frames).detach(), o.see("encoder", frames2).detach()
    q = smaller(o.q("target_critic", o.see("target_encoder", frames), a)).detach()

    def value_loss():
        u = q - o.mlp("value.layers", s)[:, 0]
        return sum((args.expectile if u[i] > 0 else 1 - args.expectile) * u[i] ** 2 for i in range(len(u))) / len(u)

    losses["value_loss"] = o.step("value", value_loss)
    value, next_value = (o.mlp("value.layers", x)[:, 0].detach() for x in (s, s2))  # by the new V
    weight = torch.exp(args.beta * (q - value))
    weight = torch.where(weight > 100, 100.0, weight)

    def actor_loss():
        mean = torch.tanh(o.mlp("actor.net.layers", s, args.actor_dropout))
        return -(weight * log_density(a, mean, o.p["actor.log_std"] if fixed is None else fixed)).mean()

    if with_actor:
        losses["actor_loss"] = o.step("actor", actor_loss)
    target = r + args.gamma * (1 - d) * next_value
    losses["qf_loss"] = o.step("critic", lambda: squared_errors(o, frames, a, target)) / 2
    o.follow(args.tau, "critic", "encoder")
    return losses


def plain_awac(o: Plain, args, online, with_actor, batch) -> dict:
    frames, a, r, frames2, d, _ = batch
    losses = {}
    s, s2 = o.see("encoder", frames).detach(), o.see("encoder", frames2).detach()

    def draw(states):
        return torch.tanh(o.mlp("actor.net", states)) + o.p["actor.log_std"].exp() * torch.randn(a.shape, dtype=a.dtype)

    next_q = smaller(o.q("target_critic", o.see("target_encoder", frames2), draw(s2)))
    target = (r + args.gamma * (1 - d) * next_q).detach()
    losses["qf_loss"] = o.step("critic", lambda: squared_errors(o, frames, a, target)) / 2
    o.follow(args.tau, "critic", "encoder")
    if with_actor:
        advantage = (smaller(o.q("critic", s, a)) - smaller(o.q("critic", s, draw(s)))).detach()
        weight = torch.exp(advantage / args.temperature) / torch.exp(advantage / args.temperature).sum()

        def actor_loss():
            return -(weight * log_density(a, torch.tanh(o.mlp("actor.net", s)), o.p["actor.log_std"])).sum()

        losses["actor_loss"] = o.step("actor", actor_loss)
    return losses


def plain_td3_bc(o: Plain, args, online, with_actor, batch) -> dict:
    s, a, r, s2, d, _ = batch
    s, s2 = ((x - o.p["state_mean"]) / o.p["state_std"] for x in (s, s2))
    losses = {}
    limit = args.target_noise_clip
    noise = (args.target_noise * torch.randn(a.shape, dtype=a.dtype)).clip(-limit, limit)
    next_action = (torch.tanh(o.mlp("target_actor", s2)) + noise).clip(-1, 1)
    target = r + args.gamma * (1 - d) * smaller(o.q("target_critic", s2, next_action)).detach()
    losses["qf_loss"] = o.step("critic", lambda: sum(((q - target) ** 2).mean() for q in o.q("critic", s, a))) / 2
    bc_weight = 1 / args.alpha
    if online and args.bc_weight_online_end is not None:
        o.p["online_updates"] = o.p["online_updates"] + 1
        share = min(1.0, o.p["online_updates"].item() / (args.online_steps * args.utd_ratio))
        bc_weight = np.exp((1 - share) * np.log(bc_weight) + share * np.log(args.bc_weight_online_end))

    def actor_loss():
        action = torch.tanh(o.mlp("actor", s))
        q = o.q("critic", s, action)[0]
        return -q.mean() / (bc_weight * q.detach().abs().mean()) + ((action - a) ** 2).sum() / a.numel()

    if with_actor:
        losses["actor_loss"] = o.step("actor", actor_loss)
        o.follow(args.tau, "actor", "critic")
    return losses


PLAIN = {"iql": plain_iql, "awac": plain_awac, "td3": plain_td3_bc}
CASES = {
    "iql": [{"expectile": 0.8}, {"beta": 30.0, "actor_std": 0.3, "actor_dropout": 0.25, "critic_layer_norm": True}],
    "awac": [{"temperature": 0.3, "weight_decay": 0.05}, {"critic_layer_norm": True}],
    "td3": [
        {"critic_layer_norm": True},
        {"bc_weight_online_end": 0.1, "online_steps": 2, "alpha": 3.0, "target_noise": 0.9, "target_noise_clip": 1.2},
    ],
}


@pytest.mark.parametrize("rule", ["descent", "adam"])
@pytest.mark.parametrize("case", [0, 1])
def test_updates_are_those_of_the_equations(script, name, case, rule, monkeypatch):
    """Four updates, with the actor and without, offline and online: parameters and losses are those of the equations.

    Plain descent shows what Adam hides, the size of a gradient.
    """
    settings = CASES[name.split("_")[0]][case]
    monkeypatch.setattr(script, "random_shift", upside_down, raising=False)
    # As a learned one, the deviation starts off its initial value; with rates that no other setting has.
    args, agent, optimizer, batch = small(script, actor_lr=3e-3, critic_lr=7e-3, **settings)
    with torch.no_grad():  # values of both signs
        q = agent.critic(seen_by(agent, batch.observations), batch.actions.unsqueeze(1))  # [2, B, 1]
        agent.critic.biases[-1] -= q.mean(1, keepdim=True)
    if settings.get("actor_std") is None and "actor.log_std" in dict(agent.named_parameters()):
        agent.actor.log_std.data.copy_(torch.tensor([-0.3, 0.2]))
    rates = {"actor": args.actor_lr, "critic": args.critic_lr, "value": args.critic_lr}
    decays = {"actor": args.weight_decay} if "awac" in name else {}
    plain = Plain(agent, rule, rates, decays)
    if rule == "descent":
        optimizer = torch.optim.SGD(agent.parameters(), lr=0.01)
    for k, (online, with_actor) in enumerate([(False, True), (True, False), (True, True), (True, True)]):
        batch = make_batch(script)
        torch.manual_seed(k)
        metrics = script.update(agent, optimizer, args, online, with_actor, batch)
        torch.manual_seed(k)
        losses = PLAIN[name.split("_")[0]](plain, args, online, with_actor, batch)
        assert {key for key in metrics if key.endswith("_loss")} - {"losses/bc_loss"} == {f"losses/{x}" for x in losses}
        for key, value in losses.items():
            assert metrics[f"losses/{key}"].item() == pytest.approx(value, rel=1e-6), key
        state = agent.state_dict()
        assert state.keys() == plain.p.keys()
        for key, value in plain.p.items():
            torch.testing.assert_close(state[key], value.detach(), rtol=1e-6, atol=1e-8)


# --- Acting, networks, normaliser ---


def act(agent, states, explore: bool = True):
    torch.manual_seed(5)
    actions = agent.act(states, explore=explore).detach()
    return actions, torch.get_rng_state()


def test_acting(script, name):
    args, agent, _, batch = small(script, **({"actor_std": 0.4} if "iql" in name else {}))
    states = batch.observations
    mean = agent.actor(seen_by(agent, states))
    mean, std = mean if isinstance(mean, tuple) else (mean, args.exploration_noise)
    assert "iql" not in name or torch.allclose(std, torch.tensor(0.4).double())
    assert torch.equal(act(agent, states, explore=False)[0], mean)
    torch.manual_seed(5)
    expected = (mean + std * torch.randn_like(mean)).clip(-1, 1)
    actions, state = act(agent, states)
    assert torch.equal(actions, expected) and torch.equal(state, torch.get_rng_state())  # and drew no more than that


def test_optimistic_actions():
    args, agent, _, batch = small(IQL, actor_std=0.4, num_critics=3, optimistic_std=0.5)
    states, base = batch.observations, act(agent, batch.observations)[0]
    assert args.optimistic_actions == 1
    with torch.no_grad():  # Q that differs between critics, and between learned and target ones
        agent.critic.weights[-1].copy_(torch.randn_like(agent.critic.weights[-1]))
    chosen = set()
    for bonus in np.linspace(0.0, 4.0, 17).tolist():
        args.optimistic_actions, args.optimistic_bonus = 7, bonus
        torch.manual_seed(5)
        mean, std = agent.actor(states)
        first = (mean + std * torch.randn_like(mean)).clip(-1, 1)
        assert torch.equal(first, base)  # the first candidate is what the base plays, bit for bit
        noise = torch.randn(B, 7, A, dtype=torch.double)[:, 1:]
        candidates = [first] + [(first + 0.5 * noise[:, k]).clip(-0.99999, 0.99999) for k in range(6)]
        q = np.array([agent.critic(states, each.unsqueeze(1)).squeeze(2).detach().numpy() for each in candidates])
        best = (q.mean(1) + bonus * q.std(1)).argmax(0)  # of q [candidates, critics, B]
        chosen |= {tuple(best)}
        expected = torch.stack([candidates[k][i] for i, k in enumerate(best)])
        torch.testing.assert_close(act(agent, states)[0], expected.detach(), rtol=0, atol=0)
        assert torch.equal(act(agent, states, explore=False)[0], mean)  # evaluations are not optimistic
    assert len(chosen) > 1  # the bonus mattered


def test_normaliser():
    """The statistics are those of all offline states, and in the agent's state; a checkpoint overwrites them."""
    rows, zeros = np.random.default_rng(0).normal(3, 2, (40, S)).astype(np.float32), np.zeros((40, A), np.float32)
    offline = [TD3_BC.Batch(rows[i:j], zeros[i:j], *[rows[i:j]] * 4) for i, j in ((0, 25), (25, 40))]
    agent, _ = TD3_BC.make_agent(offline, make_args(TD3_BC))
    states = torch.randn(4, S)
    expected = (states.numpy() - rows.mean(0)) / (rows.std(0) + 1e-3)
    np.testing.assert_allclose(agent.normalize(states), expected, rtol=1e-4, atol=1e-5)
    other, _ = TD3_BC.make_agent(offline[:1], make_args(TD3_BC))
    assert not torch.equal(other.normalize(states), agent.normalize(states))
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.normalize(states), agent.normalize(states))
    agent, _ = TD3_BC.make_agent(offline, make_args(TD3_BC, normalize_states=False))
    assert torch.equal(agent.normalize(states), states)


def test_networks(script, name):
    torch.manual_seed(0)
    agent, _ = make_agent(script, make_args(script))
    if "td3" in name:  # as nn.Linear
        for i, *parameter in zip((S + A, 256, 256), agent.critic.weights, agent.critic.biases, strict=True):
            assert all(values.abs().max().item() <= i**-0.5 for values in parameter)
            assert parameter[0].std().item() == pytest.approx((3 * i) ** -0.5, rel=0.1)
        return
    gains = [weight[k].T @ weight[k] if weight.shape[1] >= weight.shape[2] else weight[k] @ weight[k].T
             for weight in agent.critic.weights for k in range(2)]  # fmt: skip
    actor = [module.weight @ module.weight.T for module in agent.actor.modules()
             if isinstance(module, torch.nn.Linear) and module.in_features >= module.out_features]  # fmt: skip
    output = 1.0 if "awac" in name else 2.0
    for gain, expected in [*((g, 2.0) for g in gains + actor[:-1]), (actor[-1], output)]:
        torch.testing.assert_close(gain, expected * torch.eye(len(gain)), atol=1e-4, rtol=0)
    assert agent.actor.log_std.requires_grad and not agent.actor.log_std.any()
    for log_std, expected in ((-50.0, -10.0 if "awac" in name else -5.0), (50.0, 2.0)):
        agent.actor.log_std.data.fill_(log_std)
        assert agent.actor(torch.zeros(1, S))[1].log().unique().item() == pytest.approx(expected)


def test_a_fixed_deviation_is_the_setting_whatever_the_checkpoint_has():
    """As where --resume goes on from a run that learned one, with --actor-std beside it."""
    _, learned, _, batch = small(IQL)
    learned.actor.log_std.data.fill_(-3.0)
    _, fixed, _, _ = small(IQL, actor_std=0.4)
    fixed.load_state_dict(learned.state_dict())
    assert fixed.actor(batch.observations)[1].tolist() == pytest.approx([0.4] * A)
    assert learned.actor(batch.observations)[1].tolist() == pytest.approx([np.exp(-3.0)] * A)


@torch.no_grad()
def test_probe_keeps_the_columns(script):
    args, agent, _, batch = small(script)
    states = seen_by(agent, batch.observations)  # frames as they are, not shifted
    row = script.probe(agent, batch, args)
    assert list(row) == ["mean_q", "mean_mc_return", "bound_rate"] and np.isnan(row["bound_rate"])
    assert row["mean_q"] == agent.critic(states, batch.actions.unsqueeze(1)).mean().item()
    assert row["mean_mc_return"] == batch.mc_returns.mean().item()


# --- Cal-QL with a learned reference value ---


def test_the_learned_value_is_fitted_to_the_returns_and_not_again_on_resume():
    """The fit is that of plain layers and Adam; all offline rows count, and the agent's optimizer leaves V^mu alone."""
    rng = np.random.default_rng(0)
    rows, returns = rng.normal(size=(40, S)).astype(np.float32), rng.normal(size=40).astype(np.float32)
    offline = [LEARNED.Batch(rows[i:j], rows[i:j, :A], *[rows[i:j]] * 3, returns[i:j]) for i, j in ((0, 25), (25, 40))]
    args = make_args(LEARNED, critic_layers=(4, 5), batch_size=8, offline_steps=7, num_critics=3)
    torch.manual_seed(2)
    agent, optimizer = LEARNED.make_agent(offline, args)
    torch.manual_seed(2)
    plain = Plain(LEARNED.Agent(S, A, args), "adam", {"v_mu": 3e-4}, {})
    assert len(plain.p["v_mu.weights.0"]) == 1
    torch.manual_seed(2)
    args.resume = "a run"
    for name, value in LEARNED.make_agent(offline, args)[0].state_dict().items():
        assert torch.equal(value, plain.p[name]), name  # nothing is fitted where a checkpoint brings V^mu
    for _ in range(7):
        index = torch.randint(40, (8,))
        states, actions, target = torch.from_numpy(rows)[index], torch.zeros(8, 0), torch.from_numpy(returns)[index]
        plain.step("v_mu", lambda s=states, a=actions, g=target: ((plain.q("v_mu", s, a)[0] - g) ** 2).mean())
    for name, value in plain.p.items():
        torch.testing.assert_close(agent.state_dict()[name], value.detach(), rtol=1e-4, atol=1e-6)
    frozen = {id(parameter) for parameter in agent.v_mu.parameters()}
    assert not frozen & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def test_with_a_learned_value_an_update_is_cal_ql_on_other_returns():
    """The floor, and the bound rate, are V^mu(s) where Cal-QL has the transition's return; V^mu does not learn."""
    steps = []
    for script in (LEARNED, CAL_QL):
        args, agent, optimizer, batch = small(LEARNED, cql_lagrange=True, num_actions=3, offline_steps=1)
        with torch.no_grad():
            v_mu = agent.v_mu(batch.observations, batch.actions[:, None, :0]).flatten()
            before = [parameter.clone() for parameter in agent.v_mu.parameters()]
        batch = batch if script is LEARNED else batch._replace(mc_returns=v_mu)
        torch.manual_seed(1)
        steps.append([script.update(agent, optimizer, args, False, True, batch) for _ in range(3)])
        steps[-1] += [agent.state_dict(), script.probe(agent, batch, args)]
        assert same(before, list(agent.v_mu.parameters()))
    assert same(steps[0][:-1], steps[1][:-1])
    assert steps[0][-1]["bound_rate"] == steps[1][-1]["bound_rate"] and 0 < steps[0][-1]["bound_rate"] < 1


# --- A problem to solve ---


@pytest.mark.parametrize(
    "script, settings",
    [(IQL, {"expectile": 0.9, "beta": 30.0}), (AWAC, {"temperature": 0.05}), (TD3_BC, {"normalize_states": False})],
)
def test_contextual_bandit(script, settings):
    """Two states, actions from all over the box, reward -(a - s/2)^2: imitation gives 0, and the best is s/2."""
    args = make_args(script, actor_layers=(32,), critic_layers=(32, 32), actor_lr=3e-3, critic_lr=3e-3, **settings)
    torch.manual_seed(0)
    agent, optimizer = make_agent(script, args, 1, 1)
    for k in range(600):
        states, actions = torch.randint(2, (64, 1)) * 2.0 - 1, torch.rand(64, 1) * 2 - 1
        rewards = -(actions - states / 2).square().squeeze(1)
        batch = script.Batch(states, actions, rewards, states, torch.ones(64), rewards)
        script.update(agent, optimizer, args, False, k % 2 == 1 or script is not TD3_BC, batch)
    states = torch.tensor([[-1.0], [1.0]]).repeat(200, 1)
    with torch.no_grad():
        assert (agent.act(states, explore=False) - states / 2).abs().max() < 0.15
        if script is IQL:  # and optimistic actions lie closer to the best than the policy's own
            own = (act(agent, states)[0] - states / 2).abs().mean()
            args.optimistic_actions = 50
            assert (act(agent, states)[0] - states / 2).abs().mean() < 0.5 * own


# --- Whole runs ---

FLAGS = (
    "--device cpu --env-id pick-place --offline-steps 20 --online-steps 60 --offline-eval-interval 10 --batch-size 8 "
    "--online-eval-interval 20 --eval-episodes 1 --episode-length 20 --actor-layers 8 8 --critic-layers 8 8"
).split()
RUNS = [
    (IQL, ["--actor-dropout", "0.2", "--optimistic-actions", "9"]),
    (AWAC, []),
    (TD3_BC, ["--bc-weight-online-end", "0.2"]),
    (LEARNED, []),
]


@pytest.fixture(scope="module")
def pick_place_data(tmp_path_factory):
    from collect import pick_place

    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        pick_place.collect(pick_place.Args(episodes=3))
    return folder


@pytest.fixture
def here(pick_place_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(pick_place_data))
    return tmp_path


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def result() -> dict:
    """The newest run's checkpoint, with the rows of eval.csv less the time."""
    folder = max(Path("runs").iterdir(), key=lambda path: path.name.rsplit("__", 1)[1])
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    with (folder / "eval.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]
    parts = {key: checkpoint[key] for key in ("agent", "optimizer", "buffer", "rng")}
    return parts | {"rows": rows, "folder": str(folder)}


def run(script, *flags: str) -> dict:
    script.train(*script.parse_args(list(flags)))
    return result()


def run_and_kill(script, number: int, *flags: str) -> dict:
    """What is left of a run whose process dies before its update of this number."""

    def die() -> None:
        update, calls = script.update, []

        def counted(*arguments):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return update(*arguments)

        script.update = counted
        script.train(*script.parse_args(list(flags)))

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    return result()


@pytest.mark.parametrize("script, flags", RUNS)
def test_both_phases_and_a_killed_run_goes_on_the_same_bit_for_bit(script, flags, here):
    whole = run(script, *FLAGS, *flags)
    rows = list(zip(["offline"] * 3 + ["online"] * 3, "0 10 20 40 60 80".split(), strict=True))
    assert [(row["phase"], row["updates"]) for row in whole["rows"]] == rows
    assert ({row["bound_rate"] for row in whole["rows"]} == {"nan"}) == (script is not LEARNED)
    assert len({row["mean_q"] for row in whole["rows"]}) == 6
    killed = run_and_kill(script, 15, *FLAGS, *flags)  # offline, after the checkpoint of 10 updates
    assert [(row["phase"], row["updates"]) for row in killed["rows"]] == rows[:2]
    folder = killed.pop("folder")
    killed = run_and_kill(script, 35, "--resume", folder)  # online, after that of 40 updates
    assert [(row["phase"], row["updates"]) for row in killed["rows"]] == rows[:4]
    resumed = run(script, "--resume", folder)
    assert resumed.pop("folder") == folder != whole.pop("folder")
    assert same(resumed, whole)


@pytest.mark.parametrize("script", [SAC, *FROM_STATES, LEARNED])
def test_a_script_copied_alone_runs_and_finds_collect_where_it_is_started(script, here):
    (here / "elsewhere").mkdir()
    copy = shutil.copy(script.__file__, here / "elsewhere/renamed.py")
    (here / "collect").symlink_to(ROOT / "collect")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-B", copy, *FLAGS]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done: 80 updates, 60 environment steps, ")
    assert "pick-place__renamed__1__" in result()["folder"]


def test_rlpd_makes_no_update_in_its_random_steps(here, monkeypatch):
    (line,) = [line for line in SAC.__doc__.replace("\\\n", " ").splitlines() if "# RLPD" in line]
    args, _ = SAC.parse_args(line.split("#")[0].split()[2:] + ["--device", "cpu"])
    assert (args.offline_steps, args.random_steps, args.warmup_steps) == (0, 5_000, 5_000)
    assert (args.reward_scale, args.reward_bias, args.backup_entropy, args.target_entropy_scale) == (1, -1, False, -0.5)
    assert (args.num_critics, args.num_target_critics, args.utd_ratio, args.actor_interval) == (10, 1, 20, 20)
    acted, update = [], SAC.update

    def counted(agent, *arguments):
        acted.append(agent.acted_steps.item())
        return update(agent, *arguments)

    monkeypatch.setattr(SAC, "update", counted)
    run(SAC, *FLAGS, "--offline-steps", "0", "--random-steps", "40", "--warmup-steps", "40")
    assert acted == [40] * 20 + [60] * 20


@pytest.mark.parametrize(
    "script, settings, message",
    [
        (IQL, {"expectile": 1.0}, "--expectile lies in (0, 1), "),
        (IQL, {"actor_dropout": 1.0}, "--expectile lies in (0, 1), --actor-dropout in [0, 1), "),
        (IQL, {"actor_std": 0.0}, "--expectile lies in (0, 1), --actor-dropout in [0, 1), --actor-std in [0.01, 7]"),
        (IQL, {"optimistic_actions": 0}, "--expectile lies in (0, 1), "),
        (AWAC, {"temperature": 0.0}, "--temperature must be above 0"),
        (TD3_BC, {"bc_weight_online_end": 0.0}, "--bc-weight-online-end and --alpha must be above 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(script, settings, message):
    with pytest.raises(script.InputError) as error:
        make_agent(script, make_args(script, **settings))
    assert str(error.value).startswith(message) and str(error.value).endswith(".")


def test_point_mazes_have_antmazes_settings_but_for_their_size():
    """The task sets discount, batch, layer norm and tau; one setting of each is chosen (docs/mazes.md)."""
    protocol = {"env_id", "online_env", "offline_steps", "online_steps", "offline_eval_interval"}
    protocol |= {"online_eval_interval", "gamma", "tau", "batch_size", "critic_layer_norm"}
    for script, chosen in zip((*FROM_STATES, SAC), ("expectile", "temperature", "alpha", "critic_layers"), strict=True):
        large, medium, ant = (
            vars(script.parse_args(["--env-id", task])[0])
            for task in ("point-maze-large", "point-maze-medium", "antmaze-large-play")
        )
        differing = {name for name in large if large[name] != ant[name]}
        assert differing - protocol == {chosen}
        assert {name for name in large if large[name] != medium[name]} == {"env_id", "online_env"}
        assert (large["gamma"], large["tau"], large["batch_size"], large["critic_layer_norm"]) == (
            0.98,
            0.02,
            128,
            True,
        )


def test_settings():
    """Of all domains, and of pen, which alone has some of its own: those of the paper, and Cal-QL's protocol."""
    tasks = ["antmaze-large-play", "door-binary", "pen-binary", "kitchen-mixed", "pick-place", "someone/else-v0"]
    for script in (*FROM_STATES, SAC, LEARNED):
        mazes = {"point-maze", "point-maze-medium", "point-maze-large"}
        assert script.SETTINGS.keys() - mazes <= {
            "antmaze",
            "adroit",
            "pen-binary",
            "kitchen",
            "pick-place",
            "any other",
        }
    cal_ql, iql, awac, td3_bc, sac = (
        {task: script.parse_args(["--env-id", task, "--device", "cpu"])[0] for task in tasks}
        for script in (CAL_QL, *FROM_STATES, SAC)
    )
    rows = [(s.expectile, s.beta, s.actor_std, s.actor_dropout, s.reward_bias, s.mixing_ratio) for s in iql.values()]
    adroit = (0.8, 3.0, 0.03, 0.0, -1.0, 0.2)
    assert rows == [
        (0.9, 10.0, None, 0.0, -1.0, 0.5), adroit, adroit, (0.7, 0.5, None, 0.1, 0.0, 0.25), (*adroit[:5], 0.5),
        (0.7, 3.0, None, 0.0, 0.0, 0.5),
    ]  # fmt: skip
    assert {(s.mixing_ratio, s.actor_lr, s.critic_lr, s.tau) for s in awac.values()} == {(-1.0, 3e-4, 3e-4, 0.005)}
    assert [s.batch_size for s in awac.values()] == [1024, 1024, 1024, 1024, 128, 1024]
    assert [s.temperature for s in awac.values()] == [1.0, 0.3, 0.3, 1.0, 0.3, 1.0]
    assert [s.reward_bias for s in awac.values()] == [0.0, -1.0, -1.0, 0.0, -1.0, 0.0]
    assert {(s.actor_interval, s.alpha, s.reward_scale) for s in td3_bc.values()} == {(2, 2.5, 1.0)}
    assert {(s.target_noise, s.target_noise_clip, s.exploration_noise) for s in td3_bc.values()} == {(0.2, 0.5, 0.1)}
    assert [s.normalize_states for s in td3_bc.values()] == [False, True, True, True, True, True]
    assert {(s.offline_steps, s.actor_lr, s.critic_lr, s.random_steps) for s in sac.values()} == {(0, 3e-4, 3e-4, 0)}
    assert LEARNED.SETTINGS == CAL_QL.SETTINGS and LEARNED.Args() == LEARNED.Args(**vars(CAL_QL.Args()))
    shared = "online_env online_steps online_eval_interval eval_episodes episode_length gamma".split()
    networks = "reward_scale reward_bias actor_layers critic_layers critic_layer_norm mixing_ratio".split()
    for task, expected in cal_ql.items():  # the protocol is that of Cal-QL
        for name in (*shared, "offline_steps", "offline_eval_interval"):
            assert {getattr(settings[task], name) for settings in (iql, awac, td3_bc)} == {getattr(expected, name)}
        for name in shared + networks:
            assert getattr(sac[task], name) == getattr(expected, name), (task, name)

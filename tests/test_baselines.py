"""The rivals in `baselines`: losses against plain implementations of the equations, their limits, small problems."""

import csv
import dataclasses
import importlib
import importlib.util
import signal
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
FROM_STATES = list(SCRIPTS.values())[:3]
IQL, AWAC, TD3_BC = FROM_STATES


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def script(name):
    return SCRIPTS[name]


def sees_images(script) -> bool:
    return hasattr(script, "Encoder")


def make_args(script, **settings):
    return script.Args(**({"latent_dim": S} if sees_images(script) else {}), **settings)


def make_agent(script, args, action_dim: int = A):
    return script.Agent(*((16, 18, 1) if sees_images(script) else (S,)), action_dim, args)


def seen_by(agent, states):
    """What the agent's networks get [B, S]: normalised states, or features of frames."""
    if hasattr(agent, "encoder"):
        return agent.encoder(states)
    return agent.normalize(states) if hasattr(agent, "normalize") else states


def small(script, **settings):
    """Settings of tiny networks, an agent in double precision that is not at its initial values, and a batch."""
    torch.manual_seed(3)
    args = make_args(script, **{"actor_layers": (5, 4), "critic_layers": (4, 5), "gamma": 0.9, "tau": 0.1, **settings})
    agent = make_agent(script, args).double()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if name != "actor.log_std":
                parameter += 0.1 * torch.randn_like(parameter)  # biases and target networks too
        if args.__dict__.get("normalize_states"):
            agent.state_mean.copy_(torch.randn(S))
            agent.state_std.copy_(torch.rand(S) + 0.5)
    return args, agent, make_batch(script)


def optimizer_of(agent, args) -> torch.optim.Optimizer:
    """The script's own; a normaliser stays as it is."""
    fixed = {"normalize_states": False} if hasattr(args, "normalize_states") else {}
    return agent.prepare(None, dataclasses.replace(args, **fixed))


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
        self.rule, self.rates, self.decays = rule, rates, decays
        self.count, self.m, self.v = {}, {}, {}

    def step(self, prefix: str, loss_of) -> float:
        """One step of the parameters whose name begins with `prefix`, along the gradient of `loss_of()`.

        The encoder, if there is one, steps with the critics.
        """
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

    def follow(self, target: str, source: str, tau: float) -> None:
        for name in [name for name in self.p if name.startswith(target + ".")]:
            self.p[name] = (1 - tau) * self.p[name] + tau * self.p[source + name[len(target) :]]

    def q(self, prefix: str, states, actions) -> list:
        """Q [B] of each critic, one critic after the other."""
        values, layers = [], sum(name.startswith(f"{prefix}.weights.") for name in self.p)
        for k in range(len(self.p[f"{prefix}.weights.0"])):
            x = torch.cat([states, actions], 1)
            for layer in range(layers):
                x = x @ self.p[f"{prefix}.weights.{layer}"][k] + self.p[f"{prefix}.biases.{layer}"][k, 0]
                x = x if layer == layers - 1 else x * (x > 0)
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
        mean = torch.tanh(o.mlp("actor.layers", s, args.actor_dropout))
        return -(weight * log_density(a, mean, o.p["actor.log_std"] if fixed is None else fixed)).mean()

    if with_actor:
        losses["actor_loss"] = o.step("actor", actor_loss)
    target = r + args.gamma * (1 - d) * next_value
    losses["qf_loss"] = o.step("critic", lambda: squared_errors(o, frames, a, target)) / 2
    o.follow("target_critic", "critic", args.tau)
    o.follow("target_encoder", "encoder", args.tau)
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
    o.follow("target_critic", "critic", args.tau)
    o.follow("target_encoder", "encoder", args.tau)
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
        o.follow("target_actor", "actor", args.tau)
        o.follow("target_critic", "critic", args.tau)
    return losses


PLAIN = {"iql": plain_iql, "awac": plain_awac, "td3": plain_td3_bc}
CASES = {
    "iql": [{"expectile": 0.8}, {"beta": 30.0, "actor_std": 0.3, "actor_dropout": 0.25}],
    "awac": [{"temperature": 0.3, "weight_decay": 0.05}],
    "td3": [
        {},
        {"bc_weight_online_end": 0.1, "online_steps": 2, "alpha": 3.0, "target_noise": 0.9, "target_noise_clip": 1.2},
    ],
}


def compare_with_plain(script, name: str, settings: dict, rule: str) -> None:
    """Four updates, with the actor and without, offline and online: parameters and losses are those of the equations.

    Plain descent shows what Adam hides, the size of a gradient.
    """
    # As a learned one, the deviation starts off its initial value; with rates that no other setting has.
    args, agent, batch = small(script, actor_lr=3e-3, critic_lr=7e-3, **settings)
    with torch.no_grad():  # values of both signs
        q = agent.critic(seen_by(agent, batch.observations), batch.actions.unsqueeze(1))  # [2, B, 1]
        agent.critic.biases[-1] -= q.mean(1, keepdim=True)
    if settings.get("actor_std") is None and "actor.log_std" in dict(agent.named_parameters()):
        agent.actor.log_std.data.copy_(torch.tensor([-0.3, 0.2]))
    rates = {"actor": args.actor_lr, "critic": args.critic_lr, "value": args.critic_lr}
    decays = {"actor": args.weight_decay} if "awac" in name else {}
    plain = Plain(agent, rule, rates, decays)
    optimizer = optimizer_of(agent, args)
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


def check_updates(script, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if sees_images(script):
            patch.setattr(script, "random_shift", upside_down)
        for settings in CASES[name.split("_")[0]]:
            for rule in ("descent", "adam"):
                compare_with_plain(script, name, settings, rule)


def test_updates_are_those_of_the_equations(script, name):
    check_updates(script, name)


def test_critics_with_layer_norm_are_those_of_torch():
    for script in SCRIPTS.values():
        args, agent, batch = small(script, critic_layer_norm=True)
        critic = agent.critic
        for k in range(2):
            x = torch.cat([seen_by(agent, batch.observations), batch.actions], 1)
            for layer, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
                x = x @ weight[k] + bias[k]
                if layer < 2:
                    x = torch.nn.LayerNorm(x.shape[1], elementwise_affine=False).double()(x).relu()
            q = critic(seen_by(agent, batch.observations), batch.actions.unsqueeze(1))
            torch.testing.assert_close(q[k], x)


# --- Limits ---


def one_actor_step(script, **settings):
    """The agent before an update, the one after it by plain descent, and its batch."""
    args, agent, batch = small(script, **settings)
    before = {name: value.clone() for name, value in agent.named_parameters()}
    script.update(agent, torch.optim.SGD(agent.parameters(), lr=0.01), args, False, True, batch)
    return before, agent, batch


def cloned(script, before: dict, agent, loss_of) -> dict:
    """The actor's parameters after one plain step of behaviour cloning from `before`."""
    actor = {name: value for name, value in before.items() if name.startswith("actor.")}
    learner = script.Agent(S, A, script.Args(actor_layers=(5, 4))).double().actor
    learner.load_state_dict({name.removeprefix("actor."): value for name, value in actor.items()})
    loss_of(learner).backward()
    return {f"actor.{name}": (value - 0.01 * value.grad).detach() for name, value in learner.named_parameters()}


def same_actor(agent, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(dict(agent.named_parameters())[name].detach(), value, rtol=1e-6, atol=1e-9)


def test_expectile_one_half_is_mean_squared_regression():
    args, agent, batch = small(IQL, expectile=0.5)
    q = agent.target_critic(batch.observations, batch.actions.unsqueeze(1)).amin(0).squeeze(1)
    error = torch.nn.functional.mse_loss(agent.value(batch.observations), q).item()
    metrics = IQL.update(agent, optimizer_of(agent, args), args, False, True, batch)
    assert metrics["losses/value_loss"].item() == pytest.approx(0.5 * error)


@pytest.mark.parametrize("script, settings", [(IQL, {"beta": 0.0}), (AWAC, {"temperature": 1e15})])
def test_equal_weights_are_behaviour_cloning(script, settings):
    before, agent, batch = one_actor_step(script, **settings)

    def negative_log_likelihood(actor):
        mean, std = actor(batch.observations)
        return -torch.distributions.Independent(torch.distributions.Normal(mean, std), 1).log_prob(batch.actions).mean()

    same_actor(agent, cloned(script, before, agent, negative_log_likelihood))


def test_td3_bc_without_q_is_behaviour_cloning():
    before, agent, batch = one_actor_step(TD3_BC, alpha=0.0)

    def squared_error(actor):
        return F.mse_loss(actor(agent.normalize(batch.observations)), batch.actions)

    same_actor(agent, cloned(TD3_BC, before, agent, squared_error))


# --- Acting, networks, normaliser ---


def act(agent, states, explore: bool = True):
    torch.manual_seed(5)
    actions = agent.act(states, explore=explore).detach()
    return actions, torch.get_rng_state()


def check_acting(script, name: str) -> None:
    args, agent, batch = small(script, **({"actor_std": 0.4} if script is not TD3_BC and "iql" in name else {}))
    states = batch.observations
    mean = agent.actor(seen_by(agent, states))
    mean, std = mean if isinstance(mean, tuple) else (mean, args.exploration_noise)
    assert "iql" not in name or torch.allclose(std, torch.tensor(0.4).double())
    assert torch.equal(act(agent, states, explore=False)[0], mean)
    torch.manual_seed(5)
    expected = (mean + std * torch.randn_like(mean)).clip(-1, 1)
    actions, state = act(agent, states)
    assert torch.equal(actions, expected) and torch.equal(state, torch.get_rng_state())  # and drew no more than that


def check_optimistic_acting(script) -> None:
    settings = {"actor_std": 0.4, "num_critics": 3, "optimistic_std": 0.5}
    args, agent, batch = small(script, **settings)
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
        q = [agent.critic(states, each.unsqueeze(1)).squeeze(2).detach().numpy() for each in candidates]
        q = np.array(q)  # [candidates, critics, B]
        best = (q.mean(1) + bonus * q.std(1)).argmax(0)
        chosen |= {(bonus, *best)}
        expected = torch.stack([candidates[k][i] for i, k in enumerate(best)])
        torch.testing.assert_close(act(agent, states)[0], expected.detach(), rtol=0, atol=0)
        assert torch.equal(act(agent, states, explore=False)[0], mean)  # evaluations are not optimistic
    assert len({best[1:] for best in chosen}) > 1  # the bonus mattered


def check_prepare(script) -> None:
    """All offline rows and no online one count; what the agent knows of them is in its state."""
    rows = np.random.default_rng(0).normal(3, 2, (50, S)).astype(np.float32)
    columns = script.Batch(torch.from_numpy(rows), *[None] * 5)
    buffer = type("Buffer", (), {"columns": columns, "num_offline": 40})
    args = script.Args()
    agent = script.Agent(S, A, args)
    agent.prepare(buffer, args)
    states = torch.randn(4, S)
    expected = (states.numpy() - rows[:40].mean(0)) / (rows[:40].std(0) + 1e-3)
    np.testing.assert_allclose(agent.normalize(states), expected, rtol=1e-4, atol=1e-5)
    other = script.Agent(S, A, args)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(other.normalize(states), agent.normalize(states))
    off = script.Args(normalize_states=False)
    agent = script.Agent(S, A, off)
    agent.prepare(buffer, off)
    assert torch.equal(agent.normalize(states), states)


def check_networks(script, name: str) -> None:
    torch.manual_seed(0)
    args = make_args(script)
    agent = make_agent(script, args)
    if "td3" in name:  # as nn.Linear
        layers = zip((S + A, 256, 256), agent.critic.weights, agent.critic.biases, strict=True)
        for i, *parameter in layers:
            for values in parameter:
                assert values.abs().max().item() <= i**-0.5
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
    """As where --init-from goes on from a run that learned one."""
    _, learned, batch = small(IQL)
    learned.actor.log_std.data.fill_(-3.0)
    _, fixed, _ = small(IQL, actor_std=0.4)
    fixed.load_state_dict(learned.state_dict())
    assert fixed.actor(batch.observations)[1].tolist() == pytest.approx([0.4] * A)
    assert learned.actor(batch.observations)[1].tolist() == pytest.approx([np.exp(-3.0)] * A)


@torch.no_grad()
def check_probe(script) -> None:
    args, agent, batch = small(script)
    states = seen_by(agent, batch.observations)  # frames as they are, not shifted
    row = script.probe(agent, batch, args)
    assert list(row) == ["mean_q", "mean_mc_return", "bound_rate"] and np.isnan(row["bound_rate"])
    assert row["mean_q"] == agent.critic(states, batch.actions.unsqueeze(1)).mean().item()
    assert row["mean_mc_return"] == batch.mc_returns.mean().item()


def test_acting(script, name):
    check_acting(script, name)


def test_optimistic_actions():
    check_optimistic_acting(IQL)


def test_normaliser():
    check_prepare(TD3_BC)


def test_networks(script, name):
    check_networks(script, name)


def test_probe_keeps_the_columns(script):
    check_probe(script)


# --- A problem to solve ---

SOLVE = {
    "iql": {"expectile": 0.9, "beta": 30.0},
    "awac": {"temperature": 0.05},
    "td3": {"actor_interval": 2, "normalize_states": False},
}


def test_contextual_bandit(script, name):
    """Two states, actions from all over the box, reward -(a - s/2)^2: imitation gives 0, and the best is s/2.

    To those who see images, the states are a dark frame and a bright one.
    """
    settings = SOLVE[name.split("_")[0]]
    args = make_args(script, actor_layers=(32,), critic_layers=(32, 32), actor_lr=3e-3, critic_lr=3e-3, **settings)
    torch.manual_seed(0)
    agent = make_agent(script, args, 1) if sees_images(script) else script.Agent(1, 1, args)
    optimizer = optimizer_of(agent, args)

    def show(states):
        if not sees_images(script):
            return states
        return (130 + 70 * states).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 16, 18, 1)

    for k in range(600):
        states = torch.randint(2, (64, 1)) * 2.0 - 1
        actions = torch.rand(64, 1) * 2 - 1
        rewards = -(actions - states / 2).square().squeeze(1)
        batch = script.Batch(show(states), actions, rewards, show(states), torch.ones(64), rewards)
        script.update(agent, optimizer, args, False, (k + 1) % args.actor_interval == 0, batch)
    states = torch.tensor([[-1.0], [1.0]])
    with torch.no_grad():
        actions = agent.act(show(states), explore=False)
        assert (actions - states / 2).abs().max() < 0.15, actions
        if script is IQL:  # and optimistic actions lie closer to the best than the policy's own
            many = states.repeat(200, 1)
            own = (act(agent, many)[0] - many / 2).abs().mean()
            args.optimistic_actions = 50
            assert (act(agent, many)[0] - many / 2).abs().mean() < 0.5 * own


# --- Whole runs ---


@pytest.fixture(scope="module")
def pick_place_data(tmp_path_factory):
    from collect import pick_place

    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        pick_place.collect(pick_place.Args(episodes=3))
    return folder


FLAGS = (
    "--env-id pick-place --offline-steps 20 --online-steps 60 --offline-eval-interval 10 --online-eval-interval 20 "
    "--eval-episodes 1 --episode-length 20 --batch-size 8 --actor-layers 8 8 --critic-layers 8 8"
).split()
RUNS = [
    ("iql_continuous", ["--actor-dropout", "0.2", "--optimistic-actions", "9"]),
    ("awac_continuous", []),
    ("td3_bc_continuous", ["--bc-weight-online-end", "0.2"]),
]


def run(script, *flags: str) -> dict:
    """Runs main() in the working directory and returns the checkpoint, with the rows of eval.csv less the time."""
    known = {path.name for path in Path("runs").glob("*")}
    assert script.main(list(flags)) == 0
    return result({path.name for path in Path("runs").glob("*")} - known)


def result(names) -> dict:
    (name,) = names
    checkpoint = torch.load(Path("runs", name, "checkpoint.pt"), weights_only=True)
    with Path("runs", name, "eval.csv").open() as file:
        rows = [{key: value for key, value in row.items() if key != "wall_time"} for row in csv.DictReader(file)]
    return {key: checkpoint[key] for key in ("agent", "optimizer", "buffer", "rng")} | {"rows": rows}


def same(first, second) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("name, flags", RUNS)
def test_both_phases_and_a_resumed_run_is_the_same_bit_for_bit(name, flags, pick_place_data, tmp_path, monkeypatch):
    script, handlers = SCRIPTS[name], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(pick_place_data))
    monkeypatch.setattr(sys, "path", [*sys.path])
    whole = run(script, *FLAGS, *flags)
    assert [(row["phase"], row["updates"]) for row in whole["rows"]] == [
        ("offline", "0"), ("offline", "10"), ("offline", "20"), ("online", "40"), ("online", "60"), ("online", "80")
    ]  # fmt: skip
    assert {row["bound_rate"] for row in whole["rows"]} == {"nan"}
    assert len({row["mean_q"] for row in whole["rows"]}) == 6

    # Stopped in the offline phase, and again online.
    known, calls, update = {path.name for path in Path("runs").glob("*")}, [], script.update

    def counted(*arguments):
        calls.append(1)
        if len(calls) in (13, 45):
            script.SIGNALS.append(signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(script, "update", counted)
    resume = []
    for expected in (13, 60):
        with pytest.raises(SystemExit) as stopped:
            script.main([*FLAGS, *flags] if not resume else resume)
        assert stopped.value.code == 143 and len(calls) == expected
        script.SIGNALS.clear()
        (folder,) = {path.name for path in Path("runs").glob("*")} - known
        resume = ["--resume", f"runs/{folder}"]
    assert script.main(resume) == 0
    assert len(calls) == 80
    assert same(result([folder]), whole)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("iql_continuous", "--expectile 1", "--expectile is 1.0; it must lie between 1e-09 and 0.999999999."),
        ("iql_continuous", "--optimistic-actions 0", "--optimistic-actions is 0; it must lie between 1 and"),
        ("iql_continuous", "--actor-dropout 1", "--actor-dropout is 1.0; it must lie between 0 and 0.99."),
        ("iql_continuous", "--actor-std 0", "--actor-std is 0.0; it must lie between 0.01 and 7."),
        ("awac_continuous", "--temperature 0", "--temperature is 0.0; it must lie between 1e-09 and"),
        ("td3_bc_continuous", "--alpha nan", "--alpha is nan; it must lie between 1e-09 and"),
        ("td3_bc_continuous", "--target-noise -1", "--target-noise is -1.0; it must lie between 0 and"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(name, flags, message, capsys):
    with pytest.raises(SCRIPTS[name].InputError, match="^" + message.replace(".", r"\.")):
        SCRIPTS[name].parse_args(["--env-id", "pen-binary", *flags.split()])
    assert SCRIPTS[name].parse_args(["--env-id", "pen-binary"]).seed == 1


def test_settings():
    iql, awac, td3_bc = ({task: script.task_defaults(task) for task in script.TASKS} for script in FROM_STATES)
    rows = {task: (s.expectile, s.beta, s.actor_std, s.actor_dropout, s.reward_bias) for task, s in iql.items()}
    assert rows["antmaze-large-play"] == (0.9, 10.0, None, 0.0, -1.0)
    assert rows["door-binary"] == rows["pick-place"] == (0.8, 3.0, 0.03, 0.0, -1.0)
    assert rows["kitchen-mixed"] == (0.7, 0.5, None, 0.1, 0.0)
    assert [iql[task].mixing_ratio for task in ("antmaze-umaze", "pen-binary", "kitchen-complete")] == [0.5, 0.2, 0.25]
    assert {(s.mixing_ratio, s.actor_lr, s.critic_lr, s.tau) for s in awac.values()} == {(-1.0, 3e-4, 3e-4, 0.005)}
    assert {task: s.batch_size for task, s in awac.items() if s.batch_size != 1024} == {
        "pick-place": 128, "pick-place-broad": 128
    }  # fmt: skip
    tasks = ("antmaze-umaze", "pen-binary", "kitchen-mixed")
    assert [(awac[task].temperature, awac[task].reward_bias) for task in tasks] == [(1.0, 0.0), (0.3, -1.0), (1.0, 0.0)]
    assert {(s.actor_interval, s.alpha, s.reward_scale) for s in td3_bc.values()} == {(2, 2.5, 1.0)}
    assert {(s.target_noise, s.target_noise_clip, s.exploration_noise) for s in td3_bc.values()} == {(0.2, 0.5, 0.1)}
    assert {task.split("-")[0] for task, s in td3_bc.items() if not s.normalize_states} == {"antmaze"}
    assert TD3_BC.task_defaults("someone/else-v0").actor_interval == 2
    assert AWAC.task_defaults("someone/else-v0").batch_size == 1024
    for task in iql:  # the protocol is that of Cal-QL
        for name in ("offline_steps", "online_steps", "offline_eval_interval", "online_eval_interval", "eval_episodes",
                     "episode_length", "gamma", "threads"):  # fmt: skip
            expected = getattr(CAL_QL.task_defaults(task), name)
            assert {getattr(settings[task], name) for settings in (iql, awac, td3_bc)} == {expected}, (task, name)


# --- Mutants: one line changed, and a check above fails ---

CAL_QL = importlib.import_module("cal_ql_continuous")
CRITIC_MUTANTS = [
    ("td_loss = (q_data - target).square().mean(1)", "td_loss = 0.5 * (q_data - target).square().mean(1)"),
    ("descend(optimizer, td_loss.sum()", "descend(optimizer, td_loss.mean()"),
    ("(1 - batch.terminations) * ", ""),
    ("target = batch.rewards + args.gamma", "target = batch.rewards + 1.0"),
    ("target = batch.rewards + ", "target = "),
    (", args.tau)", ", 1 - args.tau)"),
]
PIXEL_MUTANTS = CRITIC_MUTANTS + [
    ("agent.encoder(batch.observations)  # of", "agent.target_encoder(batch.observations)  # of"),
    ("agent.encoder(batch.observations)  # of", "agent.encoder(random_shift(batch.observations, 4))  # of"),
]
MUTANTS = {
    "iql_continuous": CRITIC_MUTANTS + [
        ("q_target = agent.target_critic(states, actions).amin(0)", "q_target = agent.critic(states, actions).amin(0)"),
        ("agent.target_critic(states, actions).amin(0)", "agent.target_critic(states, actions)[0]"),
        ("u = q_target - agent.value(states)", "u = agent.value(states) - q_target"),
        ("u > 0, args.expectile, 1 - args.expectile", "u > 0, args.expectile, 1.0"),
        ("    descend(optimizer, value_loss)\n", ""),
        ("* u.square()).mean()", "* u.square()).sum()"),
        ("* u.square()).mean()", "* u.abs()).mean()"),
        (".exp().clamp(max=100.0)", ".exp()"),
        (".exp().clamp(max=100.0)", ".clamp(max=100.0)"),
        ("args.beta * (q_target - agent.value(states))", "(q_target - agent.value(states)) / args.beta"),
        ("args.beta * (q_target - agent.value(states))", "args.beta * u"),  # the old V
        ("args.beta * (q_target", "args.beta * (agent.critic(states, actions).amin(0).squeeze(1)"),
        ("with torch.no_grad():\n            weight", "if True:\n            weight"),
        ("actor_loss = -(weight * log_prob).mean()", "actor_loss = -log_prob.mean()"),
        ("actor_loss = -(weight * log_prob).mean()", "actor_loss = -(weight * log_prob).sum()"),
        ("actor_loss = -(weight * log_prob).mean()", "actor_loss = (weight * log_prob).mean()"),
        ("log_prob(batch.actions).sum(1)", "log_prob(batch.actions).mean(1)"),
        ("agent.actor(states, args.actor_dropout)", "agent.actor(states)"),
        ("F.dropout(F.relu(layer(x)), dropout", "F.dropout(layer(x), dropout"),
        ("torch.zeros(action_dim), requires_grad=self.std is None", "torch.ones(action_dim), requires_grad=True"),
        ("self.log_std if self.std is None else", "self.log_std if True else"),
        ("math.log(self.std))", "self.std)"),
        ("    if with_actor:", "    if True:"),
        ("* agent.value(batch.next_observations)", "* agent.value(states)"),
        ("with torch.no_grad():\n        target", "if True:\n        target"),
        ("clamp(-5.0, 2.0)", "clamp(-20.0, 2.0)"),
        ("orthogonal_(layer.weight, 2**0.5)", "orthogonal_(layer.weight, 1.0)"),
        ("orthogonal_(weight, 2**0.5)", "orthogonal_(weight, 0.01)"),
        ("return torch.tanh(self.layers[-1](x))", "return (self.layers[-1](x))"),
        ("q.mean(0) + self.args", "q.amin(0) + self.args"),
        ("q.std(0, correction=0)", "q.std(0)"),
        ("self.args.optimistic_bonus * ", ""),
        (").argmax(1)", ").argmin(1)"),
        ("q = self.critic(observations", "q = self.target_critic(observations"),
        ("(actions + self.args", "(mean.unsqueeze(1) + self.args"),
        ("self.args.optimistic_std * torch", "torch"),
        ("cat([actions[:, :1], nearby", "cat([mean.unsqueeze(1), nearby"),
        (".clamp(-0.99999, 0.99999)\n        candidates", "\n        candidates"),
        ("        if not explore:", "        if not explore and self.args.optimistic_actions == 1:"),
        ("(mean + std * torch.randn_like(mean))", "(mean + torch.randn_like(mean))"),
    ],
    "awac_continuous": CRITIC_MUTANTS + [
        ("agent.target_critic(batch.next_observations, next_actions)", "critic(batch.next_observations, next_actions)"),
        ("agent.target_critic(batch.next_observations, next", "agent.target_critic(states, next"),
        ("next_actions).amin(0)", "next_actions).mean(0)"),
        ("actor.sample(batch.next_observations)", "actor.sample(states)"),
        ("actor.sample(batch.next_observations)", "actor.sample(batch.next_observations).clamp(-1, 1)"),
        ("actor.sample(batch.next_observations)", "actor(batch.next_observations)[0]"),
        ("with torch.no_grad():\n        next_actions", "if True:\n        next_actions"),
        ("actor.sample(states)], dim=1)", "actor(states)[0]], dim=1)"),
        ("critic(states, pair).amin(0)", "critic(states, pair).mean(0)"),
        ("critic(states, pair)", "agent.target_critic(states, pair)"),
        ("(q - value) / args", "(value - q) / args"),
        ("(q - value) / args", "q / args"),
        ("/ args.temperature).softmax(0)", "* args.temperature).softmax(0)"),
        (").softmax(0)", ").exp().clamp(max=100)"),
        ("with torch.no_grad():\n            pair", "if True:\n            pair"),
        ("actor_loss = -(weight * log_prob).sum()", "actor_loss = -(weight * log_prob).mean()"),
        ("actor_loss = -(weight * log_prob).sum()", "actor_loss = -log_prob.mean()"),
        ("actor_loss = -(weight * log_prob).sum()", "actor_loss = (weight * log_prob).sum()"),
        ("log_prob(batch.actions).sum(1)", "log_prob(batch.actions).mean(1)"),
        ("    if with_actor:", "    if True:"),
        ('"weight_decay": args.weight_decay', '"weight_decay": 0.0'),
        ('"weight_decay": 0.0', '"weight_decay": args.weight_decay'),
        ("torch.optim.AdamW", "torch.optim.Adam"),
        ("clamp(-10.0, 2.0)", "clamp(-20.0, 2.0)"),
        ("1.0 if layer is self.net[-2] else 2**0.5", "2**0.5"),
        ("orthogonal_(weight, 2**0.5)", "orthogonal_(weight, 0.01)"),
        ("return mean + std * torch.randn_like(mean)", "return mean + torch.randn_like(mean)"),
    ],
    "td3_bc_continuous": CRITIC_MUTANTS + [
        ("noise = args.target_noise * ", "noise = 1.0 * "),
        ("noise.clamp(-args.target_noise_clip, args.target_noise_clip)", "noise"),
        ("(agent.target_actor(next_states) + noise).clamp(-1.0, 1.0)", "(agent.target_actor(next_states) + noise)"),
        ("agent.target_actor(next_states)", "agent.actor(next_states)"),
        ("agent.target_actor(next_states)", "agent.target_actor(states)"),
        ("agent.target_critic(next_states", "agent.critic(next_states"),
        ("next_actions.unsqueeze(1)).amin(0)", "next_actions.unsqueeze(1)).mean(0)"),
        ("agent.normalize(batch.next_observations)", "batch.next_observations"),
        ("agent.normalize(batch.observations), agent", "batch.observations, agent"),
        ("actions.unsqueeze(1))[0]  # [B, 1]", "actions.unsqueeze(1)).mean(0)"),
        ("(actions - batch.actions).square().mean()", "(actions - batch.actions).square().sum(1).mean()"),
        ("bc_loss - alpha * q.mean()", "bc_loss + alpha * q.mean()"),
        ("q.abs().mean().detach()", "q.abs().mean()"),
        ("q.abs().mean().detach()", "q.mean().abs().detach()"),
        ("- alpha * q.mean() / q.abs().mean().detach()", "- alpha * q.mean()"),
        ("torch.full_like(target[0], args.alpha)", "torch.full_like(target[0], 1.0)"),
        ("    if with_actor:", "    if True:"),
        ("learned = [*agent.actor", "learned = [*agent.target_actor"),
        ("actor_loss, agent.actor.parameters()", "actor_loss, [*agent.actor.parameters(), *agent.critic.parameters()]"),
        ("agent.online_updates += 1", "agent.online_updates += 2"),
        ("if online and args.bc", "if args.bc"),
        ("(1 / (args.alpha * args.bc_weight_online_end)) ** done", "args.bc_weight_online_end ** done"),
        (".clamp(max=1.0)", ""),
        ("states.std(0, correction=0) + 1e-3", "states.std(0, correction=0)"),
        ("[: buffer.num_offline]", ""),
        ('"state_std", torch.ones(obs_dim)', '"state_std", torch.ones(obs_dim), persistent=False'),
        ("(observations - self.state_mean) / ", "observations / "),
        ("self.args.exploration_noise * torch", "torch"),
        ("self.actor(self.normalize(observations))", "self.actor(observations)"),
        ("if args.normalize_states:", "if True:"),
        ("-(i**-0.5), i**-0.5", "-(o**-0.5), o**-0.5"),
    ],
    "iql_pixels": PIXEL_MUTANTS + [
        ("random_shift(batch.next_observations", "(lambda x, _: x)(batch.next_observations"),
        ("random_shift(batch.next_observations", "random_shift(batch.observations"),
        ("frames = random_shift(batch.observations, args.random_shift)", "frames = batch.observations"),
        ("agent.target_encoder(frames), actions", "states, actions"),
        ("agent.target_critic(agent.target", "agent.critic(agent.target"),
        ("agent.target_encoder(frames), actions).amin(0)", "agent.target_encoder(frames), actions)[0]"),
        ("next_states = agent.encoder", "next_states = agent.target_encoder"),
        ("states = features.detach()", "states = features"),
        ("agent.critic(features, actions)", "agent.critic(states, actions)"),
        (", (agent.target_critic, agent.critic))", ",)"),
        ("((agent.target_encoder, agent.encoder), (agent", "((agent.target_critic, agent.critic), (agent"),  # twice
        ("u = q_target - agent.value(states)", "u = agent.value(states) - q_target"),
        ("    descend(optimizer, value_loss)\n", ""),
        ("args.beta * (q_target - agent.value(states))", "args.beta * u"),  # the old V
        (".exp().clamp(max=100.0)", ".exp()"),
        ("with torch.no_grad():\n            weight", "if True:\n            weight"),
        ("actor_loss = -(weight * log_prob).mean()", "actor_loss = -log_prob.mean()"),
        ("agent.actor(states, args.actor_dropout)", "agent.actor(states)"),
        ("* agent.value(next_states)", "* agent.value(states)"),
        ("with torch.no_grad():\n        target = b", "if True:\n        target = b"),
        ("    if with_actor:", "    if True:"),
        ("[*self.encoder.parameters(), *self.value", "[*self.value"),
        ("self.actor(self.encoder(frames))", "self.actor(self.target_encoder(frames))"),
        ("(mean + std * torch.randn_like(mean))", "(mean + torch.randn_like(mean))"),
        ("if explore else mean", "if not explore else mean"),
    ],
    "awac_pixels": PIXEL_MUTANTS + [
        ("agent.encoder(random_shift(batch.observations, args.random_shift))", "agent.encoder(batch.observations)"),
        ("next_frames = random_shift(batch.next_observations, args.random_shift)", "next_frames = batch.observations"),
        ("next_states, target_features = agent.encoder(", "next_states, target_features = agent.target_encoder("),
        ("(next_frames), agent.target_encoder(next_frames)", "(next_frames), agent.encoder(next_frames)"),
        ("states = features.detach()", "states = features"),
        ("q_data = critic(features", "q_data = critic(states"),
        ("agent.target_critic(target_features, next_actions)", "critic(target_features, next_actions)"),
        ("agent.target_critic(target_features, next", "agent.target_critic(next_states, next"),
        ("next_actions).amin(0)", "next_actions).mean(0)"),
        ("actor.sample(next_states)", "actor.sample(states)"),
        ("actor.sample(next_states)", "actor(next_states)[0]"),
        ("with torch.no_grad():\n        next_actions", "if True:\n        next_actions"),
        (", (agent.target_critic, critic))", ",)"),
        ("(agent.target_encoder, agent.encoder), (agent.target_critic, critic)", "(agent.target_critic, critic),"),
        ("actor.sample(states)], dim=1)", "actor(states)[0]], dim=1)"),
        ("critic(states, pair).amin(0)", "critic(states, pair).mean(0)"),
        ("critic(states, pair)", "agent.target_critic(states, pair)"),
        ("(q - value) / args", "(value - q) / args"),
        ("/ args.temperature).softmax(0)", "* args.temperature).softmax(0)"),
        ("with torch.no_grad():\n            pair", "if True:\n            pair"),
        ("actor_loss = -(weight * log_prob).sum()", "actor_loss = -(weight * log_prob).mean()"),
        ("mean, std = actor(states)", "mean, std = actor(features)"),
        ("    if with_actor:", "    if True:"),
        ('"weight_decay": args.weight_decay', '"weight_decay": 0.0'),
        ('"weight_decay": 0.0', '"weight_decay": args.weight_decay'),
        ("torch.optim.AdamW", "torch.optim.Adam"),
        ("[*self.encoder.parameters(), *self.critic", "[*self.critic"),
        ("features = self.encoder(frames)", "features = self.target_encoder(frames)"),
        ("if explore else self.actor(features)[0]", "if explore else self.actor.sample(features)"),
    ],
}  # fmt: skip


def load_mutant(name: str, old: str, new: str, folder: Path):
    text = (ROOT / "baselines" / f"{name}.py").read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
    path = folder / f"{name}.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutant_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def check_all(script, name: str) -> None:
    if "td3" in name:
        check_prepare(script)
    check_updates(script, name)
    check_acting(script, name)
    check_networks(script, name)
    check_probe(script)
    if script.__name__.endswith("iql_continuous"):
        check_optimistic_acting(script)


def test_every_mutant_is_caught(name, tmp_path):
    check_all(SCRIPTS[name], name)
    for number, (old, new) in enumerate(MUTANTS[name]):
        (tmp_path / str(number)).mkdir()  # a folder each: a module's cached bytecode goes by path and second
        mutant = load_mutant(name, old, new, tmp_path / str(number))
        try:
            check_all(mutant, name)
        except AssertionError:
            continue
        except RuntimeError as error:  # of an update that keeps gradients where it must not
            assert "backward through the graph a second time" in str(error), (old, new)
            continue
        pytest.fail(f"{name} passes with {new!r} in place of {old!r}")

"""The update against an oracle written from the equations, networks against plain ones, and CUDA graphs."""

import functools
import importlib
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import cal_ql_continuous as cal_ql
import cql_continuous as cql
import sac_offline_data as sac

B, OBS_DIM, ACTION_DIM = 4, 3, 2


@pytest.fixture(autouse=True)
def float64_and_seed():
    """In double precision any deviation from the oracle is an error."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def make_case(module, **settings):
    """Settings, a tiny agent and its optimizer, with random parameters: as initialised, all Q-values are near 0."""
    tiny = dict(actor_layers=(5, 4), critic_layers=(5, 4), actor_lr=0.01, critic_lr=0.02, tau=0.1, device="cpu")
    args = module.Args(**(tiny | ({} if module is sac else {"num_actions": 3}) | settings))
    agent, optimizer = module.make_agent([make_batch(module)], args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(std=0.7)
    return args, agent, optimizer


def make_batch(module):
    terminations = torch.tensor([0.0, 1.0, 0.0, 1.0])
    observations, next_observations = torch.randn(2, B, OBS_DIM)
    actions, rewards = torch.randn(B, ACTION_DIM).tanh(), torch.randn(B)
    return module.Batch(observations, actions, rewards, next_observations, terminations, torch.randn(B))


@pytest.fixture
def draws(monkeypatch):
    """What the update draws, in order: normal numbers and uniform ones."""
    drawn = {"randn": [], "rand": []}

    def record(draw, numbers, *args, **kwargs):
        numbers.append(draw(*args, **kwargs))
        return numbers[-1]

    for name, numbers in drawn.items():
        monkeypatch.setattr(torch, name, functools.partial(record, getattr(torch, name), numbers))
    return drawn


# ---- The oracle ------------------------------------------------------------------------------------------------------


class Oracle:
    """The update from its equations: one state, one action, one critic at a time, an Adam per group of parameters.

    Each loss is differentiated by its own parameters only, all at the old parameters: no detaching is needed.
    """

    def __init__(self, module, agent, args):
        self.module, self.args = module, args
        self.p = {name: value.detach().clone().requires_grad_() for name, value in agent.named_parameters()}
        self.moments = {name: [torch.zeros_like(value), torch.zeros_like(value), 0] for name, value in self.p.items()}

    def q(self, ensemble, i, state, action):
        x = torch.cat([state, action])
        for layer in range(3):
            if layer and self.args.critic_layer_norm:
                x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-5).sqrt()
            x = x.clamp(min=0) if layer else x
            x = x @ self.p[f"{ensemble}.weights.{layer}"][i] + self.p[f"{ensemble}.biases.{layer}"][i, 0]
        return x[0]

    def qs(self, ensemble, state, action):
        return torch.stack([self.q(ensemble, i, state, action) for i in range(self.args.num_critics)])

    def sample(self, state, noise):
        """An action of the policy and its log-density."""
        x = state
        for layer in (0, 2, 4):
            x = x.clamp(min=0) if layer else x
            x = self.p[f"actor.net.{layer}.weight"] @ x + self.p[f"actor.net.{layer}.bias"]
        mean, log_std = x[:ACTION_DIM], x[ACTION_DIM:]
        log_std = self.p["actor.log_std_multiplier"] * log_std + self.p["actor.log_std_offset"]
        std = log_std.clamp(-20, 2).exp()
        u = mean + std * noise
        normal = (-((u - mean) ** 2) / (2 * std**2)).exp() / (std * math.sqrt(2 * math.pi))
        return u.tanh(), (normal * u.cosh() ** 2).log().sum()  # 1 - tanh^2 = 1 / cosh^2, without cancellation

    def target(self, batch, b, noises, drawn):
        """r + gamma (1 - d) times the maximum over actions of the minimum over critics; in SAC less the entropy."""
        values = []
        for noise in noises[b]:
            action, log_prob = self.sample(batch.next_observations[b], noise)
            value = self.qs("target_critic", batch.next_observations[b], action)[drawn].min()
            if self.module is sac and self.args.backup_entropy:
                value = value - self.p["log_alpha"].exp() * log_prob
            values.append(value)
        return batch.rewards[b] + self.args.gamma * (1 - batch.terminations[b]) * max(values)

    def gap(self, i, batch, b, draws):
        """log-sum-exp over the sampled actions, less Q of the data's: steps 5 to 8."""
        state, floor, z = batch.observations[b], batch.mc_returns[b], []
        weighted = self.args.importance_sampling
        for uniform in draws["uniform"][b]:
            z.append(self.q("critic", i, state, uniform) - (ACTION_DIM * math.log(0.5) if weighted else 0))
        for source, noises in ((batch.next_observations, draws["next"]), (batch.observations, draws["pi"])):
            for noise in noises[b]:
                action, log_prob = self.sample(source[b], noise)
                value = self.q("critic", i, state, action)
                self.below.append(bool(value < floor))
                if self.module is cal_ql and value < floor:
                    value = floor
                z.append(value - (log_prob if weighted else 0))
        data = self.q("critic", i, state, batch.actions[b])
        if not weighted:
            z.append(data)
        return torch.stack(z).exp().sum().log() - data

    def losses(self, batch, draws, cql_weight, with_actor):
        """Loss, parameters' prefixes and learning rate for each that steps, and the scalars to log."""
        args, p, self.below = self.args, self.p, []
        critics, mean = range(args.num_critics), lambda values: torch.stack(list(values)).mean()
        drawn = draws["critics"].argsort()[: args.num_target_critics]
        targets = [self.target(batch, b, draws["target"], drawn).detach() for b in range(B)]
        data = [[self.q("critic", i, batch.observations[b], batch.actions[b]) for b in range(B)] for i in critics]
        td = [mean((q - y) ** 2 for q, y in zip(row, targets, strict=True)) for row in data]
        critic_loss, steps = sum(td), []
        metrics = {"losses/qf_loss": mean(td), "losses/alpha": p["log_alpha"].exp()}
        metrics["calibration/mean_q"] = mean(sum(data, []))
        if cql_weight:
            gaps = [mean(self.gap(i, batch, b, draws) for b in range(B)) for i in critics]
            metrics |= {"losses/cql_gap": mean(gaps), "calibration/bound_rate": torch.tensor(np.mean(self.below))}
            cql_loss = cql_weight * sum(gaps)
            if args.cql_lagrange:
                cql_alpha = p["log_cql_alpha"].exp()  # far below its limit of 1e6
                cql_loss = cql_weight * cql_alpha.detach() * sum(gap - args.target_action_gap for gap in gaps)
                excess = mean(gaps).detach() - args.target_action_gap
                steps.append((-cql_alpha * cql_weight * excess, "log_cql_alpha", args.critic_lr))
                metrics["losses/cql_alpha"] = cql_alpha
            critic_loss = critic_loss + cql_loss
            metrics["losses/cql_loss"] = cql_loss / args.num_critics
        steps.append((critic_loss, "critic.", args.critic_lr))
        if with_actor:
            losses, log_probs = [], []
            for state, noise in zip(batch.observations, draws["actor"][:, 0], strict=True):
                action, log_prob = self.sample(state, noise)
                q = self.qs("critic", state, action)
                losses.append(p["log_alpha"].exp() * log_prob - (q.min() if args.actor_reduce == "min" else q.mean()))
                log_probs.append(log_prob)
            target_entropy = ACTION_DIM * (args.target_entropy_scale if self.module is sac else -1)
            steps.append((mean(losses), "actor.", args.actor_lr))
            alpha_loss = -p["log_alpha"] * (mean(log_probs).detach() + target_entropy)
            steps.append((alpha_loss, "log_alpha", args.actor_lr))
            metrics |= {"losses/actor_loss": mean(losses), "losses/alpha_loss": alpha_loss}
        return steps, metrics

    def update(self, batch, draws, cql_weight, with_actor):
        steps, metrics = self.losses(batch, draws, cql_weight, with_actor)
        gradients = []
        for loss, prefix, lr in steps:
            names = [name for name in self.p if name.startswith(prefix)]
            values = torch.autograd.grad(loss, [self.p[name] for name in names], retain_graph=True)
            gradients += [(name, value, lr) for name, value in zip(names, values, strict=True)]
        metrics = {name: value.item() for name, value in metrics.items()}
        with torch.no_grad():
            for name, gradient, lr in gradients:
                m, v, count = self.moments[name]
                m, v, count = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2, count + 1
                self.moments[name] = m, v, count
                self.p[name] -= lr * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
            for name in self.p:
                if name.startswith("target_critic."):
                    self.p[name] += self.args.tau * (self.p[name.removeprefix("target_")] - self.p[name])
        return metrics, {name: gradient for name, gradient, _ in gradients}


def name_draws(module, draws, n: int, args) -> dict[str, torch.Tensor]:
    """The draws of one update by their purpose; each is drawn for itself. Empties the record."""
    normal, uniform = [x for x in draws["randn"] if x.numel()], [x for x in draws["rand"] if x.numel()]
    names = ["target", *(["next", "pi"] if n else []), "actor"][: len(normal)]
    assert [x.shape for x in normal] == [(B, 1 if name == "actor" or module is sac else args.num_actions, ACTION_DIM)
                                         for name in names]  # fmt: skip
    assert [x.shape for x in uniform] == [(args.num_critics,), *([(B, n, ACTION_DIM)] if n else [])]
    draws["randn"].clear(), draws["rand"].clear()
    named = dict(zip(names, normal, strict=True)) | {"critics": uniform[0]}
    return named | ({"uniform": 2 * uniform[1] - 1} if n else {})


CONSERVATIVE = {
    "fixed weight": dict(),
    "no importance sampling": dict(importance_sampling=False),
    "lagrange": dict(cql_lagrange=True, target_action_gap=2.5),
    "lagrange without importance sampling": dict(cql_lagrange=True, importance_sampling=False),
    "ensemble": dict(num_critics=4, num_target_critics=2, actor_reduce="mean", critic_layer_norm=True),
    "lower weight online": dict(online_cql_factor=0.1, cql_lagrange=True),
    "CQL+SAC": dict(online_cql_factor=0.0, cql_lagrange=True),
    "no regulariser": dict(cql_weight=0.0),
}


CASES = {f"{m.__name__}, {name}": (m, case) for m in (cal_ql, cql) for name, case in CONSERVATIVE.items()}
CASES["SAC"] = sac, dict()
CASES["RLPD"] = sac, dict(num_critics=5, num_target_critics=2, actor_reduce="mean", critic_layer_norm=True,
                          target_entropy_scale=-0.5, backup_entropy=False)  # fmt: skip


@pytest.mark.parametrize("module, settings", CASES.values(), ids=CASES)
def test_updates_equal_the_oracles(module, settings, draws):
    """Four updates in a row, offline and online, with the actor and without: metrics, gradients, all that learns.

    Between the actor's updates and where the regulariser is left out, Adam's momentum must move nothing.
    """
    args, agent, optimizer = make_case(module, **settings)
    oracle, bound_rates = Oracle(module, agent, args), []
    for online, with_actor in [(False, True), (False, False), (True, True), (True, False)]:
        batch = make_batch(module)
        draws["randn"].clear()
        weight = 0.0 if module is sac else args.cql_weight * (args.online_cql_factor if online else 1)
        metrics = module.update(agent, optimizer, args, online, with_actor, batch)
        named = name_draws(module, draws, args.num_actions if weight else 0, args)
        assert ("actor" in named) == with_actor
        expected, gradients = oracle.update(batch, named, weight, with_actor)
        bound_rates.append(expected.get("calibration/bound_rate", 0.5))
        assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-7)
        for name, parameter in agent.named_parameters():
            torch.testing.assert_close(parameter, oracle.p[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n + m)
            assert (parameter.grad is not None) == (name in gradients), name
            if name in gradients:  # Adam's steps do not tell how large they are
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-8)
    assert 0 < np.mean(bound_rates) < 1, "both sides of max(Q, G) must occur"


@pytest.mark.parametrize("settings", [dict(), dict(cql_lagrange=True, importance_sampling=False)])
def test_returns_of_minus_infinity_are_cql(settings):
    """Bit for bit: the maximum is all that Cal-QL adds, and CQL does nothing with the returns but log them."""
    agents = []
    for module, mc_return in ((cal_ql, -torch.inf), (cql, -torch.inf), (cql, 5.0)):
        torch.manual_seed(0)
        args, agent, optimizer = make_case(module, **settings)
        batch = make_batch(module)._replace(mc_returns=torch.full((B,), mc_return))
        module.update(agent, optimizer, args, False, True, batch)
        agents.append(agent.state_dict())
    for other in agents[1:]:
        assert all(torch.equal(value, other[name]) for name, value in agents[0].items())


def test_lagrange_multiplier_is_limited():
    """At log alpha' = 30 the weight is 1e6, not 1e13: without its own gradient it stays there."""
    args, agent, optimizer = make_case(cal_ql, cql_lagrange=True)
    agent.log_cql_alpha.data.fill_(30.0)
    metrics = cal_ql.update(agent, optimizer, args, False, True, make_batch(cal_ql))
    assert metrics["losses/cql_alpha"] == 1e6
    excess = metrics["losses/cql_gap"] - args.target_action_gap
    assert metrics["losses/cql_loss"].item() == pytest.approx((args.cql_weight * 1e6 * excess).item())


def test_probe_is_the_batch_mean():
    """Mean Q and return of the data, and how many of the policy's actions have a Q below the return."""
    args, agent, _ = make_case(cal_ql)
    batch = make_batch(cal_ql)
    oracle = Oracle(cal_ql, agent, args)
    torch.manual_seed(3)
    noise = torch.randn(B, args.num_actions, ACTION_DIM)
    torch.manual_seed(3)
    values = cal_ql.probe(agent, batch, args)
    below, q = [], []
    for b, i in itertools.product(range(B), range(args.num_critics)):
        q.append(oracle.q("critic", i, batch.observations[b], batch.actions[b]).item())
        for each in noise[b]:
            action, _ = oracle.sample(batch.observations[b], each)
            below.append(bool(oracle.q("critic", i, batch.observations[b], action) < batch.mc_returns[b]))
    assert 0 < np.mean(below) < 1
    expected = {"mean_q": np.mean(q), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": np.mean(below)}
    assert values == pytest.approx(expected)


# ---- Networks --------------------------------------------------------------------------------------------------------


def test_log_probabilities():
    """Against torch's own distribution and, in single precision at saturated actions, against double precision."""
    _, agent, _ = make_case(cal_ql)
    observations = torch.randn(5, OBS_DIM)
    mean, log_std = (x.unsqueeze(1) for x in agent.actor(observations))
    actions, log_prob = agent.actor.sample(observations, 7)
    distribution = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, distribution.log_prob(actions).sum(2), rtol=1e-6, atol=1e-6)

    agent.float()
    agent.actor.forward = lambda observations: (observations, torch.full_like(observations, -2.0))
    u = torch.tensor([[-6.0, 6.0], [10.0, -10.0]])
    torch.manual_seed(1)
    noise = torch.randn(2, 1, 2, dtype=torch.float32).double()
    torch.manual_seed(1)
    _, log_prob = agent.actor.sample(u.float(), 1)
    u = u.unsqueeze(1) + noise * math.exp(-2)
    expected = (Normal(0.0, 1.0).log_prob(noise) + 2 + 2 * u.cosh().log()).sum(2)  # 1 - tanh^2 = 1 / cosh^2
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=0)


def test_initialisation():
    """Orthogonal weights with gain sqrt(2), 0.01 in the output layers; biases 0; the policy's scalars 1 and -1."""
    args = cal_ql.Args(actor_layers=(5, 4), critic_layers=(5, 4), num_critics=3)
    agent = cal_ql.Agent(OBS_DIM, ACTION_DIM, args)
    linears, critic = agent.actor.net[::2], agent.critic
    for weights in [[linear.weight for linear in linears], *([layer[i] for layer in critic.weights] for i in range(3))]:
        for weight, gain in zip(weights, [2**0.5, 2**0.5, 0.01], strict=True):
            torch.testing.assert_close(torch.linalg.svdvals(weight), torch.full((min(weight.shape),), gain))
    assert not torch.allclose(critic.weights[0][0], critic.weights[0][1])  # the critics begin apart
    assert not any(bias.any() for bias in [*critic.biases, *(linear.bias for linear in linears)])
    assert [agent.actor.log_std_multiplier, agent.actor.log_std_offset, agent.log_cql_alpha] == [1, -1, 1]
    assert agent.log_alpha == 0
    assert all(map(torch.equal, agent.target_critic.parameters(), critic.parameters()))


def test_actor_clips_its_deviation_and_acts_by_its_mean():
    _, agent, _ = make_case(cal_ql)
    observations = torch.randn(1000, OBS_DIM)
    mean, _ = agent.actor(observations)
    torch.testing.assert_close(agent.act(observations, explore=False), mean.tanh())
    explored = agent.act(observations, explore=True)
    assert explored.shape == (1000, ACTION_DIM) and not torch.allclose(explored, mean.tanh(), atol=0.1)
    for offset, clipped in [(30.0, 2.0), (-60.0, -20.0)]:
        agent.actor.log_std_offset.data.fill_(offset)
        assert (agent.actor(observations)[1] == clipped).all()


# ---- The processor's settings ----------------------------------------------------------------------------------------


def test_denormal_numbers_are_flushed_in_every_thread(tmp_path):
    """1e-30 times 1e-10 is denormal: `train` makes it 0, in its own thread and in those that torch starts."""
    code = """if True:
        import torch, cal_ql_continuous as script
        try:
            script.train(script.Args(env_id="cal-ql/none/here-v0"))
        except script.InputError:
            pass
        x = torch.full((1 << 22,), 1e-30)
        print(torch.get_num_threads(), (x * 1e-10).count_nonzero().item(), torch.get_float32_matmul_precision())
    """
    root, environment = Path(cal_ql.__file__).parent, {"OMP_NUM_THREADS": "2", "MINARI_DATASETS_PATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, env=os.environ | environment, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "2 0 medium", result.stderr


# ---- On a GPU --------------------------------------------------------------------------------------------------------

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_cuda_step(captured: bool, online: bool = False, with_actor: bool = True):
    """An agent on the GPU and its update, as a CUDA graph or as it is; batches come from a generator of their own."""
    graphs = importlib.import_module("tensordict.nn")
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    settings = dict(cql_lagrange=True, online_cql_factor=0.0, actor_lr=1e-4, critic_lr=1e-4, device="cuda")
    args, agent, optimizer = make_case(cal_ql, **settings)
    step = functools.partial(cal_ql.update, agent, optimizer, args, online, with_actor)
    return agent, graphs.CudaGraphModule(step, warmup=3) if captured else step


def make_cuda_batch(k: int):
    generator = torch.Generator().manual_seed(k)
    shapes = [(B, OBS_DIM), (B, ACTION_DIM), (B,), (B, OBS_DIM), (B,), (B,)]
    return cal_ql.Batch(*(torch.rand(*shape, generator=generator, dtype=torch.float32).cuda() for shape in shapes))


class TestGraph:
    pytestmark = on_gpu

    def test_hundred_updates_equal_those_without_a_graph(self, monkeypatch):
        """With constant numbers in place of the random ones, which a graph draws from states of its own."""
        randn, rand = torch.randn, torch.rand
        monkeypatch.setattr(torch, "randn", lambda *a, **k: torch.full_like(randn(*a, **k), 0.3))
        monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.full_like(rand(*a, **k), 0.7))
        results = []
        for captured in (True, False):
            agent, step = make_cuda_step(captured)
            before = [parameter.detach().clone() for parameter in agent.parameters()]
            losses = [step(make_cuda_batch(k))["losses/qf_loss"].item() for k in range(100)]
            assert not any(map(torch.equal, before, agent.parameters()))
            results.append((losses, [parameter.detach().clone() for parameter in agent.parameters()]))
        assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
        for ours, theirs in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)

    def test_new_batches_take_effect(self):
        _, step = make_cuda_step(captured=True)
        for k in range(10):
            batch = make_cuda_batch(k)
            batch = batch._replace(rewards=batch.rewards + 100 * k)
            assert step(batch)["losses/qf_loss"].item() == pytest.approx((100 * k) ** 2, rel=0.2, abs=100)

    def test_every_call_draws_anew(self):
        agent, step = make_cuda_step(captured=True)
        batch, losses = make_cuda_batch(0), []
        frozen = {name: value.clone() for name, value in agent.state_dict().items()}
        for _ in range(10):
            agent.load_state_dict(frozen)
            losses.append(step(batch)["losses/cql_gap"].item())
        assert len(set(losses)) == 10

    def test_what_is_skipped_stays(self):
        """Online, without the regulariser and the actor, these have no part in the graph."""
        agent, step = make_cuda_step(captured=True, online=True, with_actor=False)
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        for k in range(10):
            assert "losses/cql_loss" not in step(make_cuda_batch(k))
        for name, value in agent.state_dict().items():
            assert torch.equal(value, before[name]) == name.startswith(("actor.", "log_")), name

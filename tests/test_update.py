"""The update against an oracle without torch, and what sets Cal-QL apart from CQL."""

import ast
import contextlib
import copy
import math
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution

import cal_ql_continuous as cal_ql
from cal_ql_continuous import Agent, Args, Batch, Noise

B, OBS_DIM, ACTION_DIM = 4, 3, 2


@pytest.fixture(autouse=True)
def float64_and_seed():
    """In double precision any deviation from the oracle is an error."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def cql() -> types.ModuleType:
    """The script without the one statement that takes the maximum with the returns: CQL."""
    tree = ast.parse(Path(cal_ql.__file__).read_text())
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "critic_losses")
    values = {node: ast.unparse(node.value) for node in function.body if isinstance(node, ast.Assign)}
    (bound,) = (node for node, value in values.items() if "torch.maximum(" in value)
    function.body.remove(bound)
    module = types.ModuleType("cql")
    exec(compile(tree, "cql", "exec"), module.__dict__)
    return module


def make_args(**settings) -> Args:
    """Tiny networks; the learning rates differ, so that a parameter in the wrong group takes a wrong step."""
    tiny = dict(actor_layers=(5, 4), critic_layers=(5, 4), num_actions=3, actor_lr=0.01, critic_lr=0.02, tau=0.1)
    return Args(**(tiny | settings))


def make_case(**settings) -> tuple[Args, Agent, Batch, Noise]:
    """An agent with random parameters: as initialised, its Q-values are tiny and its target critics its critics."""
    args = make_args(**settings)
    agent = Agent(OBS_DIM, ACTION_DIM, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(std=0.7)
    terminations = torch.tensor([0.0, 1.0, 0.0, 1.0])
    batch = Batch(torch.randn(B, OBS_DIM), torch.randn(B, ACTION_DIM).tanh(), torch.randn(B), torch.randn(B, OBS_DIM),
                  terminations, mc_returns=torch.randn(B))
    return args, agent, batch, cal_ql.draw_noise(batch.actions, args)


class Oracle:
    """The losses of one update, from their equations: NumPy, loops over rows, critics and actions, no autograd.

    `gradient` differentiates each loss by its own parameters only: all else in it is constant without any detaching.
    """

    def __init__(self, agent: Agent, batch: Batch, noise: Noise, args: Args):
        self.p = {name: value.numpy().copy() for name, value in agent.state_dict().items()}
        self.batch, self.noise = Batch(*(x.numpy() for x in batch)), Noise(*(x.numpy() for x in noise))
        self.args, self.critics = args, range(args.num_critics)
        self.targets = [self.target(b) for b in range(B)]

    def q(self, ensemble: str, i: int, state: np.ndarray, action: np.ndarray) -> float:
        x = np.concatenate([state, action])
        for layer in range(3):
            if layer and self.args.critic_layer_norm:
                x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
            x = np.maximum(x, 0) if layer else x
            x = x @ self.p[f"{ensemble}.weights.{layer}"][i] + self.p[f"{ensemble}.biases.{layer}"][i, 0]
        return x[0]

    def sample(self, state: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, float]:
        """An action of the policy and its log-density."""
        x = state
        for layer in (0, 2, 4):
            x = np.maximum(x, 0) if layer else x
            x = self.p[f"actor.net.{layer}.weight"] @ x + self.p[f"actor.net.{layer}.bias"]
        mean, log_std = np.split(x, 2)
        std = np.exp(np.clip(self.p["actor.log_std_multiplier"] * log_std + self.p["actor.log_std_offset"], -20, 2))
        u = mean + std * noise
        density = np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi)) / (1 - np.tanh(u) ** 2)
        return np.tanh(u), np.log(density).sum()

    def target(self, b: int) -> float:
        values, state = [], self.batch.next_observations[b]
        for noise in self.noise.target[b]:
            action, log_prob = self.sample(state, noise)
            entropy = -np.exp(self.p["log_alpha"]) * log_prob if self.args.backup_entropy else 0.0
            values.append(min(self.q("target_critic", i, state, action) for i in self.noise.critics) + entropy)
        return self.batch.rewards[b] + self.args.gamma * (1 - self.batch.terminations[b]) * max(values)

    def data_q(self, i: int, b: int) -> float:
        return self.q("critic", i, self.batch.observations[b], self.batch.actions[b])

    def uniform_q(self, i: int, b: int) -> list[float]:
        return [self.q("critic", i, self.batch.observations[b], action) for action in self.noise.uniform[b]]

    def policy_q(self, i: int, b: int) -> list[tuple[float, float]]:
        """Q-values at s, and log-densities, of the actions from pi(s) and from pi(s')."""
        state, next_state = self.batch.observations[b], self.batch.next_observations[b]
        sampled = [self.sample(state, noise) for noise in self.noise.current[b]]
        sampled += [self.sample(next_state, noise) for noise in self.noise.following[b]]
        return [(self.q("critic", i, state, action), log_prob) for action, log_prob in sampled]

    def bound_rate(self) -> float:
        rows = [(i, b) for i in self.critics for b in range(B)]
        return np.mean([q < self.batch.mc_returns[b] for i, b in rows for q, _ in self.policy_q(i, b)])

    def td_loss(self, i: int) -> float:
        return np.mean([(self.data_q(i, b) - self.targets[b]) ** 2 for b in range(B)])

    def cql_gap(self, i: int) -> float:
        gaps = []
        for b in range(B):
            policy = [(max(q, self.batch.mc_returns[b]), log_prob) for q, log_prob in self.policy_q(i, b)]
            if self.args.importance_sampling:
                z = [q - ACTION_DIM * np.log(0.5) for q in self.uniform_q(i, b)] + [q - log_p for q, log_p in policy]
            else:
                z = [*self.uniform_q(i, b), self.data_q(i, b)] + [q for q, _ in policy]
            gaps.append(np.log(np.exp(z).sum()) - self.data_q(i, b))
        return np.mean(gaps)

    def cql_loss(self, i: int) -> float:
        if self.args.cql_weight == 0:
            return 0.0
        if not self.args.cql_lagrange:
            return self.args.cql_weight * self.cql_gap(i)
        cql_alpha = np.clip(np.exp(self.p["log_cql_alpha"]), 0, 1e6)
        return cql_alpha * self.args.cql_weight * (self.cql_gap(i) - self.args.target_action_gap)

    def critic_loss(self) -> float:
        return sum(self.td_loss(i) + self.cql_loss(i) for i in self.critics)

    def cql_alpha_loss(self) -> float:
        return -np.mean([self.cql_loss(i) for i in self.critics]) if self.args.cql_lagrange else 0.0

    def sample_for_actor(self) -> list[tuple[np.ndarray, np.ndarray, float]]:
        pairs = zip(self.batch.observations, self.noise.actor[:, 0], strict=True)
        return [(state, *self.sample(state, noise)) for state, noise in pairs]

    def actor_loss(self) -> float:
        losses, reduce = [], {"min": min, "mean": np.mean}[self.args.actor_reduce]
        for state, action, log_prob in self.sample_for_actor():
            q = reduce([self.q("critic", i, state, action) for i in self.critics])
            losses.append(np.exp(self.p["log_alpha"]) * log_prob - q)
        return np.mean(losses)

    def alpha_loss(self) -> float:
        target_entropy = -ACTION_DIM
        return -self.p["log_alpha"] * np.mean([log_prob + target_entropy for *_, log_prob in self.sample_for_actor()])

    def metrics(self) -> dict[str, float]:
        q = {i: np.mean([self.data_q(i, b) for b in range(B)]) for i in self.critics}
        metrics = {f"losses/qf{i + 1}_values": q[i] for i in self.critics}
        metrics |= {f"losses/qf{i + 1}_loss": self.td_loss(i) for i in self.critics}
        metrics |= {"losses/qf_loss": self.critic_loss(), "losses/actor_loss": self.actor_loss()}
        metrics |= {"losses/alpha_loss": self.alpha_loss(), "losses/alpha": np.exp(self.p["log_alpha"])}
        metrics["calibration/mean_q"] = np.mean(list(q.values()))
        metrics["calibration/mean_mc_return"] = self.batch.mc_returns.mean()
        if self.args.cql_weight:
            metrics["losses/cql_gap"] = np.mean([self.cql_gap(i) for i in self.critics])
            metrics["losses/cql_loss"] = sum(self.cql_loss(i) for i in self.critics)
            metrics["calibration/bound_rate"] = self.bound_rate()
        if self.args.cql_weight and self.args.cql_lagrange:
            metrics["losses/cql_alpha"] = np.exp(self.p["log_cql_alpha"])
            metrics["losses/cql_alpha_loss"] = self.cql_alpha_loss()
        return metrics

    def gradient(self, loss, prefix: str, h: float = 1e-5) -> dict[str, np.ndarray]:
        """Central differences of loss() by every entry of the parameters whose names begin with the prefix."""
        gradients = {name: np.zeros_like(value) for name, value in self.p.items() if name.startswith(prefix)}
        for name, gradient in gradients.items():
            for index in np.ndindex(gradient.shape):
                old = self.p[name][index]
                self.p[name][index] = old + h
                above = loss()
                self.p[name][index] = old - h
                gradient[index] = (above - loss()) / (2 * h)
                self.p[name][index] = old
        return gradients


CASES = {
    "fixed-weight": dict(),
    "no-importance-sampling": dict(importance_sampling=False),
    "lagrange": dict(cql_lagrange=True),
    "lagrange-no-importance-sampling": dict(cql_lagrange=True, importance_sampling=False),
    "backup-entropy": dict(backup_entropy=True, num_actions=1),  # SAC's target, in which there is no maximum
    "four-critics": dict(num_critics=4, num_target_critics=2, actor_reduce="mean"),
    "layer-norm": dict(critic_layer_norm=True),
    "no-cql": dict(cql_weight=0.0, cql_lagrange=True),  # nor may the multiplier move
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_update_equals_oracle(settings):
    """Losses, gradients, one Adam step of everything that learns, and then the target critics' step.

    The oracle takes all gradients at the old parameters: had the script stepped one network before it took another's
    loss, that gradient and that step would differ.
    """
    args, agent, batch, noise = make_case(**settings)
    oracle = Oracle(agent, batch, noise, args)
    assert 0 < oracle.bound_rate() < 1, "both sides of max(Q, G) must occur"
    assert any(min(oracle.uniform_q(0, b)) < batch.mc_returns[b] for b in range(B)), "a bound on these must show too"
    expected, old = oracle.metrics(), oracle.p
    losses = {"actor.": oracle.actor_loss, "log_alpha": oracle.alpha_loss,
              "critic.": oracle.critic_loss, "log_cql_alpha": oracle.cql_alpha_loss}
    gradients = {}
    for prefix, loss in losses.items():
        gradients |= oracle.gradient(loss, prefix)

    metrics = cal_ql.update(agent, agent.make_optimizer(args), batch, noise, args.cql_weight, True, args)

    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6)
    new = {name: value.numpy() for name, value in agent.state_dict().items()}
    for name, parameter in agent.named_parameters():
        if name.startswith("target_critic."):
            step = args.tau * (new[name.removeprefix("target_")] - old[name])
        else:
            actual = 0.0 if parameter.grad is None else parameter.grad.numpy()
            np.testing.assert_allclose(actual, gradients[name], rtol=1e-6, atol=1e-7, err_msg=name)
            lr = args.actor_lr if name.startswith(("actor.", "log_alpha")) else args.critic_lr
            step = -lr * gradients[name] / (np.abs(gradients[name]) + 1e-8)  # Adam's first
        np.testing.assert_allclose(new[name] - old[name], step, rtol=1e-6, atol=1e-10, err_msg=name)


def critic_losses(module, agent: Agent, batch: Batch, noise: Noise, args: Args):
    """The module's critic_losses, and the critic's output [N, B, 1 + 3n]: data, n uniform and 2n policy actions."""
    outputs = []
    handle = agent.critic.register_forward_hook(lambda *call: outputs.append(call[-1]))
    policies = agent.actor(batch.observations), agent.actor(batch.next_observations)
    losses = module.critic_losses(agent, batch, batch.rewards, *policies, noise, args.cql_weight, args)
    handle.remove()
    return *losses, outputs[0]


@pytest.mark.parametrize("lagrange", [False, True])
@pytest.mark.parametrize("importance_sampling", [False, True])
def test_returns_of_minus_infinity_are_cql(cql, lagrange, importance_sampling):
    """Bit for bit, while CQL itself does nothing with the returns but log them."""
    args, agent, batch, noise = make_case(cql_lagrange=lagrange, importance_sampling=importance_sampling)
    parameters = [*agent.critic.parameters(), *([agent.log_cql_alpha] if lagrange else [])]
    results = []
    for module, mc_return in [(cal_ql, -math.inf), (cql, -math.inf), (cql, 0.0), (cql, 1e6)]:
        batch = batch._replace(mc_returns=torch.full((B,), mc_return))
        critic_loss, cql_alpha_loss, metrics, _ = critic_losses(module, agent, batch, noise, args)
        del metrics["calibration/bound_rate"], metrics["calibration/mean_mc_return"]
        gradients = torch.autograd.grad(critic_loss + cql_alpha_loss, parameters)
        results.append([critic_loss, cql_alpha_loss, *metrics.values(), *gradients])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_no_push_below_the_return(cql):
    """What the loss does to the Q-values of four rows: with G far below them, far above, and twice among them.

    Far above is 1e6: infinity itself would make the log-sum-exp's gradient NaN.
    """
    args, agent, batch, noise = make_case()
    *_, q = critic_losses(cal_ql, agent, batch, noise, args)
    median = q[:, :, 1 + args.num_actions :].detach().transpose(0, 1).flatten(1).quantile(0.5, dim=1)
    batch = batch._replace(mc_returns=torch.tensor([-1e6, 1e6, median[2], median[3]]))
    loss, _, _, q = critic_losses(cal_ql, agent, batch, noise, args)
    (gradient,) = torch.autograd.grad(loss, q)
    data, uniform, policy = gradient.split([1, args.num_actions, 2 * args.num_actions], dim=2)  # [N, B, ...]
    below = q < batch.mc_returns[:, None]
    _, uniform_below, policy_below = below.split([1, args.num_actions, 2 * args.num_actions], dim=2)

    cql_loss, _, _, cql_q = critic_losses(cql, agent, batch, noise, args)
    assert torch.equal(gradient[:, 0], torch.autograd.grad(cql_loss, cql_q)[0][:, 0])
    assert (policy[:, 1] == 0).all() and (data[:, 1] != 0).all()
    assert policy_below[:, 2:].any() and not policy_below[:, 2:].all()
    assert torch.equal(policy[:, 2:] == 0, policy_below[:, 2:])
    assert uniform_below[:, 2:].any() and (uniform[:, 2:] > 0).all()  # these are pushed on, below G too


def test_bandit_stops_at_the_return(cql):
    """One state and a data action whose return is -2: at the policy's actions CQL sinks on and on, Cal-QL stops.

    The uniform actions, which neither algorithm bounds, stay at the data action here: they would push on too.
    """
    args = make_args(critic_layers=(32,), critic_lr=3e-3, num_actions=4)
    state, data_action, ones = torch.zeros(16, 1), torch.full((16, 1), 0.7), torch.ones(16)
    batch = Batch(state, data_action, -2 * ones, state, ones, mc_returns=-2 * ones)
    policy = torch.full((16, 1), math.atanh(-0.7)), torch.full((16, 1), -2.0)
    q = {}
    for module in (cal_ql, cql):
        torch.manual_seed(0)
        agent = Agent(1, 1, args)  # its Q-values begin about 0, above the return
        optimizer = agent.make_optimizer(args)
        for _ in range(300):
            noise = cal_ql.draw_noise(data_action, args)._replace(uniform=data_action[:, None].expand(16, 4, 1))
            loss, *_ = module.critic_losses(agent, batch, batch.rewards, policy, policy, noise, 20.0, args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        q[module] = agent.critic(state, cal_ql.sample_actions(policy, noise.current)[0]).mean().item()
    assert q[cql] < -6 and -4 < q[cal_ql] < -1


def test_bound_rate(cql):
    """Policy actions below the row's return, before the maximum, in CQL too; data and uniform actions do not count."""
    q = torch.tensor([[[-9.0, -9.0, 1.0, -1.0], [-9.0, -9.0, 9.0, 11.0]],
                      [[-9.0, -9.0, 1.0, 2.0], [-9.0, -9.0, 8.0, 7.0]]])
    args, zeros, mc_returns = make_args(num_actions=1), torch.zeros(2, 1), torch.tensor([0.0, 10.0])
    agent, policy = SimpleNamespace(critic=lambda observations, actions: q), (zeros, zeros)
    batch, noise = Batch(zeros, zeros, zeros[0], zeros, zeros[0], mc_returns), cal_ql.draw_noise(zeros, args)
    for module in (cal_ql, cql):
        *_, metrics = module.critic_losses(agent, batch, batch.rewards, policy, policy, noise, 1.0, args)
        assert metrics["calibration/bound_rate"] == 4 / 8  # -1 is below 0; 9, 8 and 7 are below 10


def test_losses_keep_to_their_own_networks():
    """The critics' loss reaches neither policy nor target critics, the actor's loss adds nothing to the critics'."""
    args, agent, batch, noise = make_case(cql_lagrange=True)
    critic_loss, cql_alpha_loss, *_ = critic_losses(cal_ql, agent, batch, noise, args)
    (critic_loss + cql_alpha_loss).backward()
    for name, parameter in agent.named_parameters():
        assert (parameter.grad is not None) == name.startswith(("critic.", "log_cql_alpha")), name

    with_actor, without = copy.deepcopy(agent), copy.deepcopy(agent)
    for each in (with_actor, without):
        cal_ql.update(each, each.make_optimizer(args), batch, noise, args.cql_weight, each is with_actor, args)
    for parameter, other in zip(with_actor.critic.parameters(), without.critic.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@pytest.mark.parametrize("cql_weight", [0.0, 5.0])
def test_skipped_steps_change_nothing(cql_weight):
    """Between the actor's updates and without the regulariser, Adam's momentum must not move what is left out."""
    args, agent, batch, noise = make_case(cql_lagrange=True)
    optimizer = agent.make_optimizer(args)
    cal_ql.update(agent, optimizer, batch, noise, args.cql_weight, True, args)
    old = {name: value.clone() for name, value in agent.state_dict().items()}
    cal_ql.update(agent, optimizer, batch, noise, cql_weight, False, args)
    skipped = ("actor.", "log_alpha") if cql_weight else ("actor.", "log_alpha", "log_cql_alpha")
    for name, value in agent.state_dict().items():
        assert torch.equal(value, old[name]) == name.startswith(skipped), name


def test_target_takes_minimum_over_drawn_critics_then_maximum_over_actions():
    """Maximum first would make 3 of 1, and the critic that is not drawn -7. A termination does not bootstrap."""
    q = torch.tensor([[1.0, 4.0], [3.0, 0.0], [-7.0, -7.0]])[:, None].expand(3, 2, 2)  # [N, B, n]
    agent, args = SimpleNamespace(target_critic=lambda observations, actions: q), make_args(gamma=0.5)
    zeros, tens = torch.zeros(2, 1), torch.full((2,), 10.0)
    batch = Batch(zeros, zeros, tens, zeros, torch.tensor([0.0, 1.0]), mc_returns=tens)
    noise = cal_ql.draw_noise(zeros, args)
    for critics, value in [([1, 0], 1), ([1], 3)]:
        noise = noise._replace(target=torch.zeros(2, 2, 1), critics=torch.tensor(critics))
        assert cal_ql.bellman_target(agent, batch, (zeros, zeros), noise, args).tolist() == [10 + 0.5 * value, 10]


def test_noise_is_independent_and_in_range():
    args = make_args(num_critics=5, num_target_critics=2)
    noise = cal_ql.draw_noise(torch.zeros(500, ACTION_DIM), args)
    normal = torch.cat([noise.actor, noise.target, noise.current, noise.following], dim=1)
    assert normal.shape == (500, 1 + 3 * args.num_actions, ACTION_DIM)
    assert normal.unique().numel() == normal.numel()  # nothing is used twice
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert noise.uniform.shape == (500, args.num_actions, ACTION_DIM) and abs(noise.uniform.mean()) < 0.05
    assert -1 <= noise.uniform.min() < -0.99 and 0.99 < noise.uniform.max() <= 1
    pairs = {tuple(sorted(cal_ql.draw_noise(noise.actor[0], args).critics.tolist())) for _ in range(200)}
    assert pairs == {(i, j) for j in range(5) for i in range(j)}  # without replacement


def test_log_probabilities():
    """Against torch's own distribution and, in single precision at saturated actions, against double precision."""
    mean, log_std = torch.randn(2, 5, ACTION_DIM).unbind()
    actions, log_prob = cal_ql.sample_actions((mean, log_std - 1), torch.randn(5, 7, ACTION_DIM))
    distribution = TransformedDistribution(Normal(mean[:, None], (log_std - 1).exp()[:, None]), TanhTransform())
    torch.testing.assert_close(log_prob, distribution.log_prob(actions).sum(2), rtol=1e-7, atol=1e-7)

    u, log_std = torch.tensor([[-6.0, 6.0], [10.0, -10.0]]), torch.full((2, 2), -2.0)
    _, log_prob = cal_ql.sample_actions((u.float(), log_std.float()), torch.zeros(2, 1, 2, dtype=torch.float32))
    expected = (Normal(u, log_std.exp()).log_prob(u) + 2 * u.cosh().log()).sum(1, keepdim=True)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-6, atol=0)  # 1 - tanh^2 = 1 / cosh^2


@pytest.mark.parametrize("layer_norm", [False, True])
def test_critic_is_an_ensemble_of_plain_networks(layer_norm):
    _, agent, batch, noise = make_case(num_critics=3, critic_layer_norm=layer_norm)
    pairs = torch.cat([batch.observations[:, None].expand(-1, 3, -1), noise.uniform], dim=2)
    for i, q in enumerate(agent.critic(batch.observations, noise.uniform)):
        layers = []
        for weight, bias in zip(agent.critic.weights, agent.critic.biases, strict=True):
            linear = nn.Linear(*weight.shape[1:])
            linear.load_state_dict({"weight": weight[i].T, "bias": bias[i, 0]})
            norm = nn.LayerNorm(linear.out_features, elementwise_affine=False) if layer_norm else nn.Identity()
            layers += [linear, norm, nn.ReLU()]
        torch.testing.assert_close(q, nn.Sequential(*layers[:-2])(pairs).squeeze(2))


def test_initialisation():
    """Orthogonal weights with gain sqrt(2), 0.01 in the output layers; biases 0; the policy's scalars 1 and -1."""
    agent = Agent(OBS_DIM, ACTION_DIM, make_args(num_critics=3))
    linears, critic = agent.actor.net[::2], agent.critic
    for weights in [[linear.weight for linear in linears], *([layer[i] for layer in critic.weights] for i in range(3))]:
        for weight, gain in zip(weights, [2**0.5, 2**0.5, 0.01], strict=True):
            torch.testing.assert_close(torch.linalg.svdvals(weight), torch.full((min(weight.shape),), gain))
    assert not torch.allclose(critic.weights[0][0], critic.weights[0][1])  # the critics begin apart
    assert not any(bias.any() for bias in [*critic.biases, *(linear.bias for linear in linears)])
    assert [agent.actor.log_std_multiplier, agent.actor.log_std_offset, agent.log_cql_alpha] == [1, -1, 1]
    assert all(map(torch.equal, agent.target_critic.parameters(), critic.parameters()))


def test_actor_clips_its_deviation_and_acts_by_its_mean():
    _, agent, batch, _ = make_case()
    mean, _ = agent.actor(batch.observations)
    action = agent.actor.act(batch.observations[0].numpy(), None)
    torch.testing.assert_close(torch.from_numpy(action), mean[0].tanh())
    for offset, clipped in [(30.0, 2.0), (-60.0, -20.0)]:
        agent.actor.log_std_offset.data.fill_(offset)
        assert (agent.actor(batch.observations)[1] == clipped).all()


# ---- Fast paths against plain ones -----------------------------------------------------------------------------------


def plain_network(widths: list[int], layer_norm: bool = False) -> nn.Sequential:
    layers = []
    for i, o in zip(widths, widths[1:], strict=False):
        norm = nn.LayerNorm(o, elementwise_affine=False) if layer_norm else nn.Identity()
        layers += [nn.Linear(i, o), norm, nn.ReLU()]
    return nn.Sequential(*layers[:-2])


class PlainAgent:
    """Cal-QL as textbooks would write it: critics one by one on concat(s, a), a distribution object, four Adams."""

    def __init__(self, agent: Agent, args: Args):
        self.args, self.actor = args, copy.deepcopy(agent.actor)
        self.critics, self.targets = ([plain_network([OBS_DIM + ACTION_DIM, *args.critic_layers, 1],
                                                     args.critic_layer_norm) for _ in range(args.num_critics)]
                                      for _ in range(2))
        for networks, ensemble in ((self.critics, agent.critic), (self.targets, agent.target_critic)):
            for i, network in enumerate(networks):
                linears = [layer for layer in network if isinstance(layer, nn.Linear)]
                for linear, weight, bias in zip(linears, ensemble.weights, ensemble.biases, strict=True):
                    linear.load_state_dict({"weight": weight[i].T, "bias": bias[i, 0]})
        self.log_alpha, self.log_cql_alpha = (nn.Parameter(x.detach().clone())
                                              for x in (agent.log_alpha, agent.log_cql_alpha))
        critics = [parameter for network in self.critics for parameter in network.parameters()]
        self.optimizers = [torch.optim.Adam(parameters, lr=lr, fused=False, foreach=False) for parameters, lr in (
            (list(self.actor.parameters()), args.actor_lr), ([self.log_alpha], args.actor_lr),
            (critics, args.critic_lr), ([self.log_cql_alpha], args.critic_lr))]

    def q(self, networks, observations, actions):
        states = observations[:, None].expand(-1, actions.shape[1], -1)
        return torch.stack([network(torch.cat([states, actions], dim=2)).squeeze(2) for network in networks])

    def sample(self, observations, noise):
        mean, log_std = self.actor(observations)
        u = mean[:, None] + log_std.exp()[:, None] * noise
        normal = Normal(mean[:, None], log_std.exp()[:, None]).log_prob(u)
        return u.tanh(), (normal - TanhTransform().log_abs_det_jacobian(u, u.tanh())).sum(2)

    def update(self, batch: Batch, noise: Noise, cql_weight: float) -> None:
        args, n = self.args, noise.uniform.shape[1]
        action, log_prob = self.sample(batch.observations, noise.actor)
        alpha_loss = -(self.log_alpha * (log_prob.detach() - ACTION_DIM)).mean()
        q = self.q(self.critics, batch.observations, action).amin(0)
        actor_loss = (self.log_alpha.exp().detach() * log_prob - q).mean()
        with torch.no_grad():
            next_actions, _ = self.sample(batch.next_observations, noise.target)
            next_q = self.q(self.targets, batch.next_observations, next_actions)[noise.critics].amin(0).amax(1)
            target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
            (current, log_current), (following, log_following) = (
                self.sample(x, z) for x, z in ((batch.observations, noise.current),
                                               (batch.next_observations, noise.following)))
        q_data = self.q(self.critics, batch.observations, batch.actions[:, None])[..., 0]
        q_random, q_current, q_next = (self.q(self.critics, batch.observations, x)
                                       for x in (noise.uniform, current, following))
        q_current, q_next = (torch.maximum(q, batch.mc_returns[:, None]) for q in (q_current, q_next))
        z = torch.cat([q_random - ACTION_DIM * math.log(0.5), q_next - log_following, q_current - log_current], dim=2)
        assert z.shape[2] == 3 * n
        gap = (z.logsumexp(2) - q_data).mean(1) - args.target_action_gap
        cql_alpha = self.log_cql_alpha.exp()
        critic_loss = ((q_data - target).square().mean(1) + cql_alpha.detach() * cql_weight * gap).sum()
        losses = actor_loss, alpha_loss, critic_loss, -cql_alpha * cql_weight * gap.detach().mean()
        gradients = [torch.autograd.grad(loss, optimizer.param_groups[0]["params"], retain_graph=True)
                     for loss, optimizer in zip(losses, self.optimizers, strict=True)]
        for optimizer, values in zip(self.optimizers, gradients, strict=True):
            for parameter, gradient in zip(optimizer.param_groups[0]["params"], values, strict=True):
                parameter.grad = gradient
            optimizer.step()
        with torch.no_grad():
            for network, target_network in zip(self.critics, self.targets, strict=True):
                for parameter, of_target in zip(network.parameters(), target_network.parameters(), strict=True):
                    of_target += args.tau * (parameter - of_target)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_a_hundred_updates_equal_a_plain_implementation(layer_norm):
    args, agent, batch, _ = make_case(cql_lagrange=True, critic_layer_norm=layer_norm, actor_lr=1e-3, critic_lr=2e-3)
    plain, optimizer = PlainAgent(agent, args), agent.make_optimizer(args)
    before = copy.deepcopy(agent.state_dict())
    for k in range(100):
        batch = batch._replace(observations=torch.randn(B, OBS_DIM), next_observations=torch.randn(B, OBS_DIM),
                               actions=torch.randn(B, ACTION_DIM).tanh(), rewards=torch.randn(B))
        noise, weight = cal_ql.draw_noise(batch.actions, args), 5.0 if k < 50 else 0.5
        cal_ql.update(agent, optimizer, batch, noise, weight, True, args)
        plain.update(batch, noise, weight)
    for ours, theirs in ((agent.critic, plain.critics), (agent.target_critic, plain.targets)):
        for i, network in enumerate(theirs):
            linears = [layer for layer in network if isinstance(layer, nn.Linear)]
            for weight, bias, linear in zip(ours.weights, ours.biases, linears, strict=True):
                torch.testing.assert_close(weight[i].T, linear.weight, rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(bias[i, 0], linear.bias, rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(agent.actor.parameters(), plain.actor.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    for name in ("log_alpha", "log_cql_alpha"):
        torch.testing.assert_close(getattr(agent, name), getattr(plain, name), rtol=1e-6, atol=1e-8)
        assert abs(getattr(agent, name) - before[name]) > 0.01  # it has gone a way


def test_capture_calls_three_times_captures_once_and_replays(monkeypatch):
    """The order of calls alone, with a stand-in for CUDA; the tests below need the real one."""
    events, numbers = [], iter(range(100))

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    class Graph:
        def replay(self):
            events.append("replay")

    def context(name):
        return lambda *_: contextlib.nullcontext(events.append(name))

    fakes = dict(CUDAGraph=Graph, Stream=Stream, current_stream=Stream, stream=context("side"),
                 graph=context("capture"))
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def function():
        events.append("call")
        return {"loss": next(numbers)}

    call = cal_ql.capture(function)
    assert [call()["loss"] for _ in range(6)] == [0, 1, 2, 3, 3, 3]
    assert events == ["wait", "side", "call", "wait"] * 3 + ["capture", "call", "replay"] + ["replay"] * 2


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def make_cuda_case(**settings):
    """An agent on the GPU with a replay of 40 offline rows, of state 0, and a function that samples and updates."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    args, device = make_args(batch_size=8, buffer_size=50, **settings), torch.device("cuda")
    episode = cal_ql.Episode(np.zeros((41, OBS_DIM), np.float32), np.random.default_rng(0).uniform(-1, 1, (40, 2)),
                             np.zeros(40, np.float32), np.arange(40) % 10 == 9)
    buffer, agent = cal_ql.ReplayBuffer([episode], args, True, device), Agent(OBS_DIM, ACTION_DIM, args).to(device)
    optimizer = agent.make_optimizer(args)

    def sample_and_update(cql_weight: float = 5.0, with_actor: bool = True):
        batch = buffer.sample(args.batch_size)
        noise = cal_ql.draw_noise(batch.actions, args)
        metrics = cal_ql.update(agent, optimizer, batch, noise, cql_weight, with_actor, args)
        return metrics | {"states": batch.observations[:, 0].clone(), "noise": noise.uniform.sum()}

    return agent, buffer, sample_and_update


def online_episode(state: float, length: int = 10):
    return cal_ql.Episode(np.full((length + 1, OBS_DIM), state, np.float32), np.zeros((length, ACTION_DIM), np.float32),
                          np.ones(length, np.float32), np.arange(length) == length - 1)


class TestGraph:
    pytestmark = on_gpu

    def test_hundred_updates_equal_those_without_a_graph(self):
        agents = []
        for prepare in (cal_ql.capture, lambda function: function):
            agent, _, function = make_cuda_case(cql_lagrange=True)
            call = prepare(function)
            torch.manual_seed(1)
            for _ in range(100):
                call()
            agents.append(agent.state_dict())
        for name, value in agents[0].items():
            torch.testing.assert_close(value, agents[1][name], rtol=1e-3, atol=1e-5)

    def test_new_rows_and_shares_take_effect(self):
        _, buffer, function = make_cuda_case()
        call = cal_ql.capture(function)
        for _ in range(6):
            assert not call()["states"].any()
        for state in (1.0, 2.0):  # half of each batch is online now; soon of more rows
            buffer.add(online_episode(state))
            seen = torch.cat([call()["states"].clone() for _ in range(40)])
            assert (seen == 0).float().mean() == 0.5
            assert set(seen.unique().tolist()) == {0.0, *range(1, int(state) + 1)}
        buffer.offline_share.fill_(0.25)
        assert (call()["states"] == 0).float().mean() == 0.25

    def test_weights_and_intervals_have_graphs_of_their_own(self):
        agent, _, function = make_cuda_case()
        keys = (5.0, True), (0.0, True), (5.0, False)
        calls = {key: cal_ql.capture(lambda key=key: function(*key)) for key in keys}
        for key in list(calls) * 6:
            before = [parameter.clone() for parameter in agent.actor.parameters()]
            metrics = calls[key]()
            assert ("losses/cql_loss" in metrics) == (key[0] > 0)
            moved = any(not torch.equal(*pair) for pair in zip(before, agent.actor.parameters(), strict=True))
            assert moved == key[1]

    def test_every_call_draws_anew(self):
        _, _, function = make_cuda_case()
        call = cal_ql.capture(function)
        values = [call()["noise"].item() for _ in range(10)]
        assert len(set(values)) == 10

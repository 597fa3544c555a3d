"""ODT: its loss against one written token by token, its replay, what it sees when it acts, whole runs, and mutants."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

import cal_ql_continuous
from baselines import odt_continuous as odt
from collect import pick_place

O, A, K, B = 3, 2, 4, 3  # noqa: E741, sizes of the test problems
CPU = torch.device("cpu")
TINY = dict(embedding_dim=8, num_layers=2, num_heads=2, dropout=0.0)


def make_agent(script, **settings):
    """Tiny and in double precision; its biases and statistics are not those of the start."""
    torch.manual_seed(3)
    args = script.Args(**(TINY | settings))
    agent = script.Agent(O, A, args).double()
    optimizer = agent.prepare([make_episode(script, [0.0, 1.0])], args)
    with torch.no_grad():
        for parameter in agent.transformer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        agent.state_mean.copy_(torch.randn(O))
        agent.state_std.copy_(torch.rand(O) + 0.5)
    return args, agent, optimizer


def make_batch(script):
    """Sequences with 0, 2 and 1 steps of padding; the second begins late in its trajectory."""
    torch.manual_seed(4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).double()
    times = torch.tensor([[0, 1, 2, 3], [0, 0, 998, 1005], [0, 0, 1, 2]])
    returns, states = torch.randn(B, K).double() * mask, torch.randn(B, K, O).double() * mask.unsqueeze(2)
    actions = (torch.rand(B, K, A).double() * 1.9 - 0.95) * mask.unsqueeze(2)
    return script.Batch(returns, states, actions, times, mask)


def make_episode(script, rewards, terminations=None, tag: float = 0.0):
    """States and actions tell the episode's tag and the step."""
    steps = len(rewards)
    terminations = np.zeros(steps, bool) if terminations is None else np.array(terminations, bool)
    states = np.stack([np.full(steps + 1, tag), np.arange(steps + 1), np.zeros(steps + 1)], 1).astype(np.float32)
    actions = np.stack([np.full(steps, tag / 100), np.arange(steps) / 100], 1).astype(np.float32)
    return script.Episode(states, actions, np.array(rewards, np.float32), terminations)


# --- The loss, token by token ---


def layer_norm(p, name, x):
    variance = ((x - x.mean()) ** 2).mean()
    return (x - x.mean()) / (variance + 1e-5) ** 0.5 * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p, name, x):
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def attend(p, block, xs, seen, heads):
    """Self-attention over a list of tokens; token i looks at those of seen[i] alone."""
    name, size = f"{block}.self_attn", len(xs[0])
    projected = [p[f"{name}.in_proj_weight"] @ x + p[f"{name}.in_proj_bias"] for x in xs]
    outputs = []
    for i in range(len(xs)):
        parts = []
        for head in range(heads):
            width = size // heads
            q, k, v = (slice(n * size + head * width, n * size + (head + 1) * width) for n in range(3))
            scores = [torch.exp(projected[i][q] @ projected[j][k] / width**0.5) for j in seen[i]]
            parts.append(sum(s * projected[j][v] for s, j in zip(scores, seen[i], strict=True)) / sum(scores))
        outputs.append(linear(p, f"{name}.out_proj", torch.cat(parts)))
    return outputs


def plain_policy(p, args, batch, b):
    """Mean and deviation of each step of sequence b."""
    tokens, real, f = [], [], "transformer."
    for t in range(K):
        state = (batch.observations[b, t] - p["state_mean"]) / p["state_std"]
        time = p[f + "embed_time.weight"][min(int(batch.time_steps[b, t]), 999)]
        tokens.append(linear(p, f + "embed_return", batch.returns[b, t].reshape(1)) + time)
        tokens.append(linear(p, f + "embed_state", state) + time)
        tokens.append(linear(p, f + "embed_action", batch.actions[b, t]) + time)
        real += 3 * [bool(batch.mask[b, t])]
    xs = [layer_norm(p, f + "norm", token) for token in tokens]
    seen = [[j for j in range(i + 1) if real[j] or j == i] for i in range(len(xs))]
    for layer in range(args.num_layers):
        block = f"{f}blocks.layers.{layer}"
        attended = attend(p, block, [layer_norm(p, f"{block}.norm1", x) for x in xs], seen, args.num_heads)
        xs = [x + y for x, y in zip(xs, attended, strict=True)]
        hidden = [linear(p, f"{block}.linear1", layer_norm(p, f"{block}.norm2", x)) for x in xs]
        xs = [x + linear(p, f"{block}.linear2", h * (h > 0)) for x, h in zip(xs, hidden, strict=True)]
    at_states = [layer_norm(p, f + "blocks.norm", xs[3 * t + 1]) for t in range(K)]
    log_std = [torch.tanh(linear(p, f + "log_std", x)) * 3.5 - 1.5 for x in at_states]
    return [(linear(p, f + "mean", x), torch.exp(y)) for x, y in zip(at_states, log_std, strict=True)]


def plain_log_density(mean, std, u):
    """Of tanh(u), whose slope is 4 / (e^u + e^-u)^2."""
    log_normal = -((u - mean) ** 2) / (2 * std**2) - torch.log(std * (2 * np.pi) ** 0.5)
    return (log_normal - np.log(4) + 2 * torch.log(torch.exp(u) + torch.exp(-u))).sum()


def plain_losses(p, args, batch, noise):
    log_densities, entropies = [], []
    for b in range(B):
        for t, (mean, std) in enumerate(plain_policy(p, args, batch, b)):
            if batch.mask[b, t]:
                action = batch.actions[b, t]
                u = 0.5 * torch.log((1 + action) / (1 - action))
                log_densities.append(plain_log_density(mean, std, u))
            entropies.append(-plain_log_density(mean, std, mean + std * noise[b, t]))
    nll, entropy = -sum(log_densities) / len(log_densities), sum(entropies) / len(entropies)
    temperature = torch.exp(p["log_temperature"])
    temperature_loss = temperature * (entropy.detach() + A)
    return nll, entropy, nll - temperature.detach() * entropy, temperature_loss


def check_update(script):
    """Three updates: losses, and parameters after clipping, warm-up and Adam, are those of the plain ones."""
    settings = dict(lr=2e-2, warmup_updates=2, temperature_lr=3e-2, max_grad_norm=0.5, initial_temperature=0.2)
    args, agent, optimizer = make_agent(script, **settings)
    batch = make_batch(script)
    p = {name: value.detach().clone() for name, value in agent.state_dict().items()}
    names = [name for name, _ in agent.named_parameters()]
    moments = {name: [0.0, 0.0] for name in names}
    for count in (1, 2, 3):
        torch.manual_seed(count)
        metrics = script.update(agent, optimizer, args, count, batch)
        torch.manual_seed(count)
        for name in names:
            p[name] = p[name].detach().requires_grad_(True)
        nll, entropy, loss, temperature_loss = plain_losses(p, args, batch, torch.randn(B, K, A, dtype=torch.double))
        expected = {"nll": nll, "entropy": entropy, "loss": loss, "temperature": p["log_temperature"].exp()}
        for name, value in expected.items():
            assert metrics[f"losses/{name}"].item() == pytest.approx(value.item(), rel=1e-9), name
        gradients = dict(zip(names, torch.autograd.grad(loss + temperature_loss, [p[n] for n in names]), strict=True))
        norm = sum((gradients[name] ** 2).sum() for name in names if name != "log_temperature") ** 0.5
        assert norm > args.max_grad_norm  # or the clipping is not tested
        assert metrics["losses/gradient_norm"].item() == pytest.approx(norm.item(), rel=1e-9)
        for name in names:
            is_temperature = name == "log_temperature"
            rate = 3e-2 if is_temperature else 2e-2 * min(count / 2, 1)
            g = gradients[name] * (1 if is_temperature else 0.5 / (norm + 1e-6))
            m, v = moments[name] = [0.9 * moments[name][0] + 0.1 * g, 0.999 * moments[name][1] + 0.001 * g**2]
            step = m / (1 - 0.9**count) / ((v / (1 - 0.999**count)) ** 0.5 + 1e-8)
            p[name] = p[name].detach() - rate * step
            torch.testing.assert_close(agent.state_dict()[name], p[name], rtol=1e-6, atol=1e-8, msg=lambda m, n=name: n)


def test_update_is_that_of_the_equations():
    check_update(odt)


def test_without_temperature_the_loss_is_the_plain_likelihood():
    args, agent, optimizer = make_agent(odt, initial_temperature=0.0)
    metrics = odt.update(agent, optimizer, args, 1, make_batch(odt))
    assert metrics["losses/loss"] == metrics["losses/nll"] and metrics["losses/temperature"] == 0
    metrics = odt.update(agent, optimizer, args, 2, make_batch(odt))
    assert metrics["losses/loss"] == metrics["losses/nll"] and metrics["losses/temperature"] == 0


def test_temperature_rises_where_the_entropy_is_below_its_target():
    for bias, rises in ((-9.0, True), (0.5, False)):
        args, agent, optimizer = make_agent(odt, temperature_lr=0.1)
        with torch.no_grad():
            agent.transformer.log_std.bias.fill_(bias)
            for values in (agent.transformer.log_std.weight, *agent.transformer.mean.parameters()):
                values.zero_()
        before = agent.log_temperature.item()
        metrics = odt.update(agent, optimizer, args, 1, make_batch(odt))
        assert (metrics["losses/entropy"].item() < -A) == rises == (agent.log_temperature.item() > before)


# --- The transformer ---


def check_causality(script):
    """A prediction depends on what came before it, on its return and its state, and on nothing else."""
    _, agent, _ = make_agent(script)
    batch = make_batch(script)
    batch = batch._replace(mask=torch.ones(B, K), time_steps=torch.arange(K).expand(B, K).clone())
    before = torch.cat(agent(batch), dim=2)
    for name, first in (("returns", 2), ("observations", 2), ("actions", 3), ("time_steps", 2)):
        values = getattr(batch, name).clone()
        values[:, 2] += 1  # step 2's
        after = torch.cat(agent(batch._replace(**{name: values})), dim=2)
        assert torch.equal(after[:, :first], before[:, :first]), name
        changed = (after != before).any(2)
        assert changed[:, first:].all(), name


def test_no_later_token_changes_an_earlier_prediction():
    check_causality(odt)


def check_padding(script):
    """Padding has no influence on the steps after it, whatever it holds; a window without it says the same."""
    _, agent, _ = make_agent(script)
    batch = make_batch(script)
    before = torch.cat(agent(batch), dim=2)
    padding = batch.mask == 0
    filled = [column.clone() for column in batch]
    for column in filled[:4]:
        column[padding] = 7
    after = torch.cat(agent(script.Batch(*filled)), dim=2)
    assert torch.isfinite(after).all()
    assert torch.equal(after[~padding], before[~padding])
    assert (after[padding] != before[padding]).any()
    alone = torch.cat(agent(script.Batch(*(column[1:2, 2:] for column in batch))), dim=2)
    torch.testing.assert_close(alone, before[1:2, 2:])


def test_padding_has_no_influence():
    check_padding(odt)


def test_dropout_is_for_updates_only():
    args, agent, optimizer = make_agent(odt, dropout=0.5)
    batch = make_batch(odt)
    agent.train()
    assert not torch.equal(agent(batch)[0], agent(batch)[0])
    first, second = (agent.act(batch, explore=False) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.tanh(agent(batch)[0][:, -1]))  # still without
    odt.update(agent, optimizer, args, 1, batch)
    assert agent.training
    explored = agent.act(batch, explore=True)
    assert explored.abs().max() <= 0.99999 and not torch.equal(explored, first)
    # On embeddings, attention and residuals; within the perceptron there is none.
    rates = {name: module.p for name, module in agent.named_modules() if isinstance(module, torch.nn.Dropout)}
    blocks = [f"transformer.blocks.layers.{k}.dropout" for k in range(2)]
    assert rates == {"transformer.dropout": 0.5} | {
        f"{b}{n}": 0.0 if n == "" else 0.5 for b in blocks for n in "12"
    } | {block: 0.0 for block in blocks}
    assert all(block.self_attn.dropout == 0.5 for block in agent.transformer.blocks.layers)


def test_antmaze_has_the_size_and_the_rate_of_the_papers_runs():
    args = odt.task_defaults("antmaze-large-diverse")
    with torch.device("meta"):
        transformer = odt.Transformer(29, 8, args)
    assert 50e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 53e6
    weights = odt.Transformer(O, A, odt.Args(embedding_dim=64)).blocks.layers[1].linear1
    assert weights.weight.std().item() == pytest.approx(0.02, rel=0.1) and not weights.bias.any()
    small, agent, optimizer = make_agent(odt, lr=args.lr, warmup_updates=args.warmup_updates)
    for count, rate in ((1, 1e-7), (args.offline_steps, 7e-4), (10_000, 1e-3), (300_000, 1e-3)):
        odt.update(agent, optimizer, small, count, make_batch(odt))
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate), 1e-4]


# --- Replay ---


def make_buffer(script, episodes, capacity: int = 4, **settings):
    return script.ReplayBuffer(episodes, script.Args(buffer_trajectories=capacity, **settings), 6, CPU)


def tags(buffer) -> list[float]:
    return buffer.columns[1][:, 0, 0].tolist()


def check_replay(script):
    """Worst first, the best kept; the online ones after them, and then instead of them from the front."""
    episodes = [
        make_episode(script, [0, 0, 1, 0, 1], [0, 0, 1, 0, 0], tag=1),  # two: returns 1 and 1, of 3 and 2 steps
        make_episode(script, [0, 0], tag=2),
        make_episode(script, [1, 1, 1], tag=3),
        make_episode(script, [0, 0, 0], tag=4),
        make_episode(script, [0], tag=5),
    ]
    buffer = make_buffer(script, episodes, capacity=7)
    assert tags(buffer) == [5, 2, 4, 1, 1, 3, 0]
    assert buffer.lengths.tolist() == [1, 2, 3, 2, 3, 3, 0]
    assert buffer.columns[1][3, 0, 1] == 3  # the second part begins with the fourth state
    assert buffer.columns[0][4].tolist() == [1, 1, 1, 0, 0, 0]
    assert buffer.columns[0][5].tolist() == [3, 2, 1, 0, 0, 0]  # undiscounted return to go
    assert buffer.mean_return() == pytest.approx(5 / 6)
    small = make_buffer(script, episodes)
    assert tags(small) == [4, 1, 1, 3]
    for tag in (6, 7, 8):
        buffer.add(make_episode(script, [0, 1], tag=tag))
        small.add(make_episode(script, [0, 1], tag=tag))
    assert tags(buffer) == [7, 8, 4, 1, 1, 3, 6] and tags(small) == [6, 7, 8, 3]
    for tag in (9, 10):
        small.add(make_episode(script, [0, 0, 0, 5], tag=tag))
    assert tags(small) == [10, 7, 8, 9]
    assert small.columns[0][0, :4].tolist() == [5, 5, 5, 5] and small.lengths.tolist() == [4, 2, 2, 4]

    for old in (buffer, small):  # a resumed run has the same
        new = make_buffer(script, episodes, capacity=len(old.lengths))
        new.load_state_dict(old.state_dict())
        for buffers in (old, new):
            buffers.add(make_episode(script, [0, 1], tag=11))
        rows = new.lengths.unsqueeze(1) > torch.arange(6)  # what lies behind a trajectory's end is never read
        assert torch.equal(new.lengths, old.lengths)
        assert all(torch.equal(x[rows], y[rows]) for x, y in zip(new.columns, old.columns, strict=True))


def test_replay_keeps_the_best_and_replaces_the_worst_first():
    check_replay(odt)


def test_replay_refuses_another_dataset():
    state = make_buffer(odt, [make_episode(odt, [0, 1])]).state_dict()
    with pytest.raises(ValueError, match="dataset has changed"):
        make_buffer(odt, [make_episode(odt, [0, 1, 1])]).load_state_dict(state)


def check_sampling(script):
    """Trajectories by their length, starts uniform, padding in front; every column is of the step that it says."""
    torch.manual_seed(0)
    episodes = [make_episode(script, [0] * 5 + [2], tag=1), make_episode(script, [3, 0], tag=2)]
    buffer = make_buffer(script, episodes, capacity=9, reward_scale=0.5, batch_size=24_000, context_length=4)
    buffer.add(make_episode(script, [1, 1, 1, 1], tag=3))
    batch = buffer.sample()
    lengths, undiscounted = {1: 6, 2: 2, 3: 4}, {1: [2] * 6, 2: [3, 0], 3: [4, 3, 2, 1]}
    counts = {}
    mask = batch.mask.bool()
    assert batch.returns.shape == (24_000, 4) and mask[:, -1].all()
    assert (mask[:, 1:] >= mask[:, :-1]).all()  # once begun, a sequence goes on
    for column in batch[:4]:
        assert not column[~mask].any()
    for b in range(1_000):
        steps = batch.time_steps[b][mask[b]].tolist()
        tag = int(batch.observations[b, -1, 0])
        assert steps == list(range(steps[0], min(steps[0] + 4, lengths[tag])))
        assert batch.observations[b][mask[b]].tolist() == [[tag, step, 0] for step in steps]
        assert np.allclose(batch.actions[b][mask[b]], [[tag / 100, step / 100] for step in steps])
        assert batch.returns[b][mask[b]].tolist() == [undiscounted[tag][step] / 2 for step in steps]
    last, count = batch.time_steps[:, -1], batch.mask.sum(1)
    for tag, start in zip(batch.observations[:, -1, 0].int().tolist(), (last - count + 1).int().tolist(), strict=True):
        counts[tag, start] = counts.get((tag, start), 0) + 1
    assert counts.keys() == {(tag, start) for tag, length in lengths.items() for start in range(length)}
    assert all(abs(value - 2_000) < 5 * 2_000**0.5 for value in counts.values())  # 12 steps, each as likely


def test_every_step_is_as_likely_a_start():
    check_sampling(odt)


def test_statistics_are_of_all_offline_states():
    args, agent, _ = make_agent(odt)
    episodes = [make_episode(odt, [0] * steps, tag=tag) for tag, steps in ((1, 3), (2, 1))]
    agent.prepare(episodes, args)
    states = np.array([[1, 0, 0], [1, 1, 0], [1, 2, 0], [2, 0, 0]])
    np.testing.assert_allclose(agent.state_mean, states.mean(0))
    np.testing.assert_allclose(agent.state_std, states.std(0) + 1e-6)


# --- Acting ---


class Spy:
    """An agent that keeps what it is shown; its actions are the number of the call."""

    def __init__(self):
        self.state_mean, self.action_dim, self.seen = torch.zeros(O), A, []

    def act(self, batch, explore):
        self.seen.append(type(batch)(*(column.clone() for column in batch)))
        return torch.full((len(batch.returns), A), float(len(self.seen)))


def check_context(script):
    """The last steps in order; the asked return falls by the rewards; the action to come is not there yet."""
    spy = Spy()
    context = script.Context(spy, script.Args(eval_context_length=3, reward_scale=0.5), 8.0)
    for t in range(4):
        states = np.stack([np.full(O, t), np.full(O, 10 + t)]).astype(np.float32)
        actions = context.act(states, np.array([0.0, t]), explore=True)
        assert actions.tolist() == [[t + 1] * A] * 2
    batch = spy.seen[3]
    assert batch.returns.tolist() == [[4, 4, 4], [3.5, 2.5, 1]]  # less 0, 1, 2, 3; times 0.5
    assert batch.observations[:, :, 0].tolist() == [[1, 2, 3], [11, 12, 13]]
    assert batch.actions[:, :, 0].tolist() == [[2, 3, 0], [2, 3, 0]]
    assert batch.time_steps.tolist() == [[1, 2, 3]] * 2 and batch.mask.tolist() == [[1] * 3] * 2
    assert spy.seen[0].returns.tolist() == [[4], [4]] and spy.seen[0].time_steps.tolist() == [[0], [0]]


def test_policy_acts_on_the_last_steps():
    check_context(odt)


class Countdown:
    """An environment of three steps of reward 1; its state tells the step."""

    def reset(self, seed):
        self.step_count = 0
        return np.zeros(O, np.float32), {}

    def step(self, action):
        self.step_count += 1
        state = np.full(O, self.step_count, np.float32)
        return state, 1.0, False, self.step_count == 3, {}


def test_online_episode_stores_its_own_rewards():
    spy = Spy()
    episode = odt.play_episode(Countdown(), spy, odt.Args(online_return=2.0), seed=0)
    assert [batch.returns[0].tolist() for batch in spy.seen] == [[2], [2, 1], [2, 1, 0]]
    assert episode.rewards.tolist() == [1, 1, 1] and episode.terminations.tolist() == [False] * 3
    assert episode.observations[:, 0].tolist() == [0, 1, 2, 3]
    buffer = make_buffer(odt, [episode])
    assert buffer.columns[0][0, :3].tolist() == [3, 2, 1]  # what it had, not what was asked


def check_return_conditioning(script):
    """Of two behaviours, mixed in the data, the one that had the return asked for is done."""
    rng = np.random.default_rng(0)
    episodes = []
    for k in range(100):
        good = k % 2
        actions = (0.6 if good else -0.6) + 0.1 * rng.normal(size=(2, 1))
        states = rng.normal(size=(3, O)).astype(np.float32)
        rewards = np.array([0, good], np.float32)
        episodes.append(script.Episode(states, actions.astype(np.float32), rewards, np.array([False, True])))
    args = script.Args(**TINY | dict(lr=1e-2, warmup_updates=20, batch_size=64, context_length=2))
    torch.manual_seed(0)
    agent = script.Agent(O, 1, args)
    buffer, optimizer = script.ReplayBuffer(episodes, args, 2, CPU), agent.prepare(episodes, args)
    for count in range(1, 201):
        script.update(agent, optimizer, args, count, buffer.sample())
    for asked, action in ((1.0, 0.6), (0.0, -0.6)):
        context = script.Context(agent, args, asked)
        for _ in range(2):
            played = context.act(rng.normal(size=(50, O)).astype(np.float32), 0.0, explore=False)
            assert np.abs(played - action).max() < 0.3
    assert np.abs(context.act(rng.normal(size=(50, O)).astype(np.float32), 0.0, explore=True)).max() <= 0.99999


def test_asking_for_a_high_return_gives_the_high_action():
    check_return_conditioning(odt)


# --- Whole runs ---

# Evaluations after 0, 2 and 3 updates, then episodes of 12 steps with 2 updates each.
RUN = """--env-id pick-place --episode-length 12 --offline-steps 3 --offline-eval-interval 2 --online-eval-interval 20
--eval-episodes 2 --updates-per-episode 2 --embedding-dim 8 --num-layers 1 --batch-size 4 --buffer-trajectories 11
--device cpu""".split()
COLUMNS = "phase,updates,env_steps,score,return,regret,mean_q,mean_mc_return,bound_rate,wall_time"


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        pick_place.collect(pick_place.Args())
        yield path


def start(tmp_path: Path, name: str, monkeypatch, *flags: str) -> Path:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert odt.main([*RUN, *flags]) == 0
    (run,) = Path("runs").iterdir()
    return run.resolve()


def assert_same(left, right) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - {"wall_time", "online_steps"}:  # the clock, and what a resumed run may change
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            assert_same(x, y)
    else:
        assert left == right or left != left and right != right


def test_both_phases_and_a_resumed_run_is_the_same_bit_for_bit(tmp_path, monkeypatch):
    whole = start(tmp_path, "whole", monkeypatch, "--online-steps", "48")
    lines = (whole / "eval.csv").read_text().split()
    assert lines[0] == COLUMNS
    rows = [dict(zip(COLUMNS.split(","), line.split(","), strict=True)) for line in lines[1:]]
    assert [row["phase"] for row in rows] == 3 * ["offline"] + 2 * ["online"]
    assert [(int(row["updates"]), int(row["env_steps"])) for row in rows[:4]] == [(0, 0), (2, 0), (3, 0), (7, 24)]
    assert {row["mean_q"] for row in rows} == {row["bound_rate"] for row in rows} == {"nan"}
    assert float(rows[0]["mean_mc_return"]) == pytest.approx(0.7)  # seven of ten demonstrations succeed
    assert json.loads((whole / "config.json").read_text())["warmup_updates"] == 1_000
    checkpoint = odt.read_checkpoint(str(whole))
    assert checkpoint["buffer"]["num_added"] == checkpoint["progress"]["episodes"] >= 4  # more than there is room for
    assert [group["lr"] for group in checkpoint["optimizer"]["param_groups"]] == [
        pytest.approx(1e-6 * checkpoint["progress"]["updates"]), 1e-4]  # fmt: skip
    for steps in ("0", "24"):  # stopped after the offline phase, and in the middle of the online one
        parted = start(tmp_path, f"parted {steps}", monkeypatch, "--online-steps", steps)
        assert odt.main(["--resume", str(parted), "--online-steps", "48"]) == 0
        assert_same(odt.read_checkpoint(str(parted)) | {"args": 0}, checkpoint | {"args": 0})


def test_bad_settings_are_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in (["--num-heads", "3"], ["--dropout", "1"], ["--context-length", "0"], ["--env-id", "nothing"]):
        assert odt.main([*RUN, *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and flags[0] in error
    assert not (tmp_path / "runs").exists()


def test_what_is_not_its_own_is_the_main_files_to_the_letter():
    """Also in sections that are its own: what the main file has under the same name."""
    own = {"Args", "Agent", "ReplayBuffer", "update", "play_episode", "evaluate", "train", "parse_args"}
    ours, theirs = (
        {node.name: ast.get_source_segment(source, node) for node in ast.parse(source).body if hasattr(node, "name")}
        for source in (Path(module.__file__).read_text() for module in (odt, cal_ql_continuous))
    )
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == own
    assert {"TaskEnv", "make_env", "main", "save", "load_episodes"} < ours.keys()


# --- Mutants ---

MUTANTS = [
    # The loss.
    ("* batch.mask).sum() / batch.mask.sum()", ").sum() / batch.mask.numel()", check_update),
    ("* batch.mask).sum() / batch.mask.sum()", ").mean()", check_update),
    ("loss = nll - temperature.detach() * entropy", "loss = nll + temperature.detach() * entropy", check_update),
    ("loss = nll - temperature.detach() * entropy", "loss = nll - temperature * entropy", check_update),
    ("(entropy.detach() - target_entropy)", "(entropy.detach() + target_entropy)", check_update),
    ("target_entropy = -batch.actions.shape[2]", "target_entropy = -batch.actions.shape[1]", check_update),
    ("(log_normal - log_slope).sum(2)", "log_normal.sum(2)", check_update),
    ("min(count / args.warmup_updates, 1.0)", "1.0", check_update),
    ("clip_grad_norm_(agent.transformer.parameters(), args.max", "clip_grad_norm_(agent.parameters(), args.max",
     check_update),
    ("-5.0 + 3.5 * (", "-5.0 + 2.0 * (", check_update),
    # The transformer.
    ("hidden = hidden[:, 1::3]", "hidden = hidden[:, 0::3]", check_causality),
    ("hidden = hidden[:, 1::3]", "hidden = hidden[:, 2::3]", check_causality),
    (".triu(1)", ".triu(2)", check_causality),
    ("later | (padding & ~itself)", "later", check_padding),
    ("later | (padding & ~itself)", "later | padding", check_update),
    ("repeat_interleave(self.num_heads, dim=0)", "repeat(self.num_heads, 1, 1)", check_padding),
    (".clamp(max=MAX_TIME - 1)", ".clamp(max=MAX_TIME - 3)", check_update),
    ("tokens = self.dropout(self.norm(tokens.flatten(1, 2)))", "tokens = tokens.flatten(1, 2)", check_update),
    ("norm_first=True", "norm_first=False", check_update),
    # The replay.
    ("trajectories[-args.buffer_trajectories :]", "trajectories[: args.buffer_trajectories]", check_replay),
    ("(part.rewards.sum(), len(part.rewards))", "part.rewards.sum()", check_replay),
    ("gamma=1.0, tail=0.0", "gamma=0.99, tail=0.0", check_replay),
    ("(self.num_offline + self.num_added) % len(self.lengths)", "self.num_added % len(self.lengths)", check_replay),
    ("for part in split_at_terminations(episode)]", "for part in [episode]]", check_replay),
    ("(self.num_offline + torch.arange(count, device=self.device))", "torch.arange(count)", check_replay),
    ("torch.multinomial(self.lengths.double(),", "torch.multinomial((self.lengths > 0).double(),", check_sampling),
    ("- context_length + counts", "", check_sampling),
    ("returns = returns * mask * self.args.reward_scale", "returns = returns * mask", check_sampling),
    # Acting.
    ("self.asked = self.asked - torch", "self.asked = self.asked + 0 * torch", check_context),
    ("torch.arange(self.time - len(self.steps), self.time,", "torch.arange(len(self.steps),", check_context),
    ("self.steps = self.steps[-self.args.eval_context_length :]", "pass", check_context),
    ("action.copy_(self.agent.act(", "action = (self.agent.act(", check_context),
    ("self.embed_return(batch.returns.unsqueeze(2))", "self.embed_return(0 * batch.returns.unsqueeze(2))",
     check_return_conditioning),
]  # fmt: skip


@pytest.mark.parametrize("old, new, check", MUTANTS)
def test_mutants_are_caught(old, new, check, tmp_path, monkeypatch):
    source = Path(odt.__file__).read_text()
    assert source.count(old) == 1, "the statement to be mutated is not there, or not alone"
    path = tmp_path / "odt_mutant.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("odt_mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "odt_mutant", mutant)
    spec.loader.exec_module(mutant)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        check(mutant)


def test_fine_tuning_begins_where_the_offline_phase_ended(tmp_path, monkeypatch, capsys):
    source = start(tmp_path, "source", monkeypatch, "--online-steps", "16")
    kept = odt.read_checkpoint(str(source), "offline.pt")
    assert odt.main(["--init-from", str(source), "--online-steps", "0", "--seed", "2"]) == 0
    (run,) = {path.resolve() for path in Path("runs").iterdir()} - {source}
    checkpoint = odt.read_checkpoint(str(run))
    for name in ("agent", "buffer"):
        assert_same(checkpoint[name], kept[name])
    assert_same(checkpoint["optimizer"]["state"], kept["optimizer"]["state"])  # learning rates follow from the updates
    updates = [each["progress"]["updates"] for each in (kept, checkpoint, odt.read_checkpoint(str(source)))]
    assert updates[0] == updates[1] < updates[2]
    assert odt.main(["--init-from", str(source), "--num-layers", "2"]) == 2
    assert "cannot go on from there" in capsys.readouterr().err


def test_data_without_an_environment_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = minari.load_dataset("cal-ql/pick-place/narrow-v0")
    spaces = dict(action_space=data.action_space, observation_space=data.observation_space)
    (episode,) = data.iterate_episodes([0])
    columns = (episode.observations, episode.actions, episode.rewards, episode.terminations, episode.truncations)
    minari.create_dataset_from_buffers("mine/nowhere-v0", [EpisodeBuffer(0, None, None, *columns)], **spaces)
    assert odt.main([*RUN, "--env-id", "mine/nowhere-v0", "--online-steps", "0"]) == 2
    assert "names no environment" in capsys.readouterr().err

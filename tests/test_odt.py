"""ODT: its update against one written for each sequence alone, its replay, what it sees when it acts, whole runs."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from baselines import odt_continuous as odt
from collect import pick_place

ROOT = Path(__file__).resolve().parents[1]
O, A, K, B = 3, 2, 4, 3  # noqa: E741, sizes of the test problems
TINY = dict(embedding_dim=8, num_layers=2, num_heads=2, dropout=0.0, device="cpu")


def steps_of(rewards, terminations=None, tag: float = 0.0) -> odt.Batch:
    """The steps of an episode whose states and actions tell its tag and the step."""
    steps = len(rewards)
    terminations = np.zeros(steps, bool) if terminations is None else np.array(terminations, bool)
    states = np.stack([np.full(steps + 1, tag), np.arange(steps + 1), np.zeros(steps + 1)], 1).astype(np.float32)
    actions = np.stack([np.full(steps, tag / 100), np.arange(steps) / 100], 1).astype(np.float32)
    return odt.to_transitions(odt.Episode(states, actions, np.array(rewards, np.float32), terminations), None)


def make_agent(**settings):
    """Tiny and in double precision; its biases and statistics are not those of the start."""
    torch.manual_seed(3)
    args = odt.Args(**TINY | settings)
    agent, optimizer = odt.make_agent([steps_of([0.0, 1.0])], args)
    with torch.no_grad():
        for parameter in agent.double().transformer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        agent.state_mean.copy_(torch.randn(O))
        agent.state_std.copy_(torch.rand(O) + 0.5)
    return args, agent, optimizer


def make_batch() -> odt.Batch:
    """Sequences with 0, 2 and 1 steps of padding; the second begins late in its trajectory."""
    torch.manual_seed(4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]]).double()
    times = torch.tensor([[0, 1, 2, 3], [0, 0, 998, 1005], [0, 0, 1, 2]])
    returns, states = torch.randn(B, K).double() * mask, torch.randn(B, K, O).double() * mask.unsqueeze(2)
    actions = (torch.rand(B, K, A).double() * 1.9 - 0.95) * mask.unsqueeze(2)
    return odt.Batch(returns, states, actions, times, mask)


# --- The update ---


def plain_policy(p: dict, args: odt.Args, returns, states, actions, times):
    """Mean and deviation [T, A] at each step of one sequence without padding, by parameters alone."""

    def linear(name, x):
        return x @ p[f"{name}weight"].T + p[f"{name}bias"]

    def norm(name, x):
        x = x - x.mean(1, keepdim=True)
        return x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    states = (states - p["state_mean"]) / p["state_std"]
    inputs = {"return": args.reward_scale * returns.unsqueeze(1), "state": states, "action": actions}
    time = p["transformer.embed_time.weight"][times.clamp(max=999)]
    tokens = [linear(f"transformer.embed_{name}.", x) + time for name, x in inputs.items()]
    x = norm("transformer.norm", torch.stack(tokens, 1).flatten(0, 1))  # R_1, s_1, a_1, R_2, ...
    later = torch.ones(len(x), len(x)).triu(1) > 0
    for layer in range(args.num_layers):
        block = f"transformer.blocks.layers.{layer}."
        heads = linear(f"{block}self_attn.in_proj_", norm(f"{block}norm1", x)).unflatten(1, (3, args.num_heads, -1))
        q, k, v = heads.permute(1, 2, 0, 3)  # [H, 3T, D/H]
        weights = (q @ k.mT / q.shape[2] ** 0.5).exp().masked_fill(later, 0)
        seen = (weights / weights.sum(2, keepdim=True)) @ v
        x = x + linear(f"{block}self_attn.out_proj.", seen.transpose(0, 1).flatten(1))
        hidden = linear(f"{block}linear1.", norm(f"{block}norm2", x))
        x = x + linear(f"{block}linear2.", hidden * (hidden > 0))
    x = norm("transformer.blocks.norm", x)[1::3]
    return linear("transformer.mean.", x), (linear("transformer.log_std.", x).tanh() * 3.5 - 1.5).exp()


def plain_log_density(mean, std, u):
    """Of tanh(u), whose slope is 4 / (e^u + e^-u)^2."""
    log_normal = -((u - mean) ** 2) / (2 * std**2) - torch.log(std * (2 * np.pi) ** 0.5)
    return (log_normal - np.log(4) + 2 * torch.log(torch.exp(u) + torch.exp(-u))).sum(1)


def plain_losses(p: dict, args: odt.Args, batch: odt.Batch, noise):
    log_densities, entropies = [], []
    for *columns, mask, draws in zip(*batch, noise, strict=True):
        returns, states, actions, times, draws = (column[mask > 0] for column in (*columns, draws))
        mean, std = plain_policy(p, args, returns, states, actions, times)
        log_densities.append(plain_log_density(mean, std, 0.5 * torch.log((1 + actions) / (1 - actions))))
        entropies.append(-plain_log_density(mean, std, mean + std * draws))
    nll, entropy = -torch.cat(log_densities).mean(), torch.cat(entropies).mean()
    temperature = p["log_temperature"].exp()
    return nll, entropy, nll - temperature.detach() * entropy, temperature * (entropy.detach() + A)


def test_update_is_that_of_the_equations():
    """Three updates: losses, and parameters after clipping, warm-up and Adam; padding takes no part in either."""
    settings = dict(lr=2e-2, warmup_updates=2, temperature_lr=3e-2, max_grad_norm=0.5, initial_temperature=0.2)
    args, agent, optimizer = make_agent(reward_scale=0.7, **settings)
    batch = make_batch()
    p = {name: value.detach().clone() for name, value in agent.state_dict().items()}
    weights = [p[name].requires_grad_() for name, _ in agent.transformer.named_parameters(prefix="transformer")]
    groups = [{"params": weights}, {"params": [p["log_temperature"].requires_grad_()], "lr": 3e-2}]
    plain_optimizer = torch.optim.Adam(groups, foreach=False)
    for count in (1, 2, 3):
        torch.manual_seed(count)
        metrics = odt.update(agent, optimizer, args, count, batch)
        torch.manual_seed(count)
        nll, entropy, loss, temperature_loss = plain_losses(p, args, batch, torch.randn(B, K, A, dtype=torch.double))
        plain_optimizer.zero_grad()
        (loss + temperature_loss).backward()
        norm = sum(weight.grad.square().sum() for weight in weights) ** 0.5
        assert norm > args.max_grad_norm  # or the clipping is not tested
        expected = {"nll": nll, "entropy": entropy, "loss": loss, "temperature": p["log_temperature"].exp()}
        for name, value in (expected | {"gradient_norm": norm}).items():
            assert metrics[f"losses/{name}"].item() == pytest.approx(value.item(), rel=1e-9), name
        for weight in weights:
            weight.grad *= 0.5 / (norm + 1e-6)
        plain_optimizer.param_groups[0]["lr"] = 2e-2 * min(count / 2, 1)
        plain_optimizer.step()
        for name, value in agent.state_dict().items():
            torch.testing.assert_close(value, p[name].detach(), rtol=1e-6, atol=1e-8, msg=name)


def test_temperature_rises_where_the_entropy_is_below_its_target_and_at_0_leaves_the_likelihood():
    for bias, rises in ((-9.0, True), (0.5, False)):
        args, agent, optimizer = make_agent(temperature_lr=0.1)
        for values in (agent.transformer.log_std.weight, *agent.transformer.mean.parameters()):
            values.data.zero_()
        agent.transformer.log_std.bias.data.fill_(bias)
        before = agent.log_temperature.item()
        metrics = odt.update(agent, optimizer, args, 1, make_batch())
        assert (metrics["losses/entropy"].item() < -A) == rises == (agent.log_temperature.item() > before)
    agent.log_temperature.data.fill_(-torch.inf)
    metrics = odt.update(agent, optimizer, args, 2, make_batch())
    assert metrics["losses/loss"] == metrics["losses/nll"]


def test_padding_has_no_influence():
    """Whatever it holds, later steps and losses stay the same to the bit; alone it changes itself."""
    outputs, batch = [], make_batch()
    padding = batch.mask == 0
    for k in (0, 1):
        for column, content in zip(batch[:4], (7, 7, 0.5, 7), strict=True):
            column[padding] = k * content
        args, agent, optimizer = make_agent()
        outputs.append(torch.cat(agent(batch), dim=2))
        torch.manual_seed(0)
        outputs.append(odt.update(agent, optimizer, args, 1, batch)["losses/loss"])
    assert torch.isfinite(outputs[2]).all() and (outputs[0] != outputs[2])[padding].any()
    assert torch.equal(outputs[0][~padding], outputs[2][~padding]) and outputs[1] == outputs[3]


def test_dropout_is_for_updates_only():
    args, agent, optimizer = make_agent(dropout=0.5)
    batch = make_batch()
    agent.train()
    assert not torch.equal(agent(batch)[0], agent(batch)[0])
    first, second = (agent.act(batch, explore=False) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, agent.act(batch, explore=True))
    torch.testing.assert_close(first, torch.tanh(agent(batch)[0][:, -1]))  # still without
    odt.update(agent, optimizer, args, 1, batch)
    # On embeddings, attention and residuals; within the perceptron there is none.
    rates = {name: module.p for name, module in agent.named_modules() if isinstance(module, torch.nn.Dropout)}
    within = [f"transformer.blocks.layers.{k}.dropout" for k in range(2)]
    assert rates == {"transformer.dropout": 0.5} | {f"{w}{n}": 0.5 if n else 0.0 for w in within for n in ("", 1, 2)}
    assert agent.training and {block.self_attn.dropout for block in agent.transformer.blocks.layers} == {0.5}


def test_antmaze_has_the_size_and_the_rate_of_the_papers_runs():
    args, _ = odt.parse_args(["--env-id", "antmaze-large-diverse", "--device", "cpu"])
    with torch.device("meta"):
        transformer = odt.Transformer(29, 8, args)
    assert 50e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 53e6
    weights = odt.Transformer(O, A, odt.Args(embedding_dim=64)).blocks.layers[1].linear1
    assert weights.weight.std().item() == pytest.approx(0.02, rel=0.1) and not weights.bias.any()
    small, agent, optimizer = make_agent(lr=args.lr, warmup_updates=args.warmup_updates)
    for count, rate in ((1, 1e-7), (args.offline_steps, 7e-4), (10_000, 1e-3), (300_000, 1e-3)):
        odt.update(agent, optimizer, small, count, make_batch())
        assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(rate), 1e-4]


# --- Replay and acting ---


def make_buffer(offline, capacity: int = 4, **settings) -> odt.ReplayBuffer:
    return odt.ReplayBuffer(offline, odt.Args(buffer_trajectories=capacity, device="cpu", **settings))


def relabelled(tag: int, walk: str) -> odt.Batch:
    """The steps of an AntMaze episode relabelled to one goal; a walk has a 1 for each state that is there."""
    box, steps = gym.spaces.Box(-np.inf, np.inf, (2,)), len(walk) - 1
    maze = SimpleNamespace(kwargs={"maze_map": [[1, 1, 1], [1, 0, 1], [1, 1, 1]]})  # its cell's centre is (0, 0)
    dataset = SimpleNamespace(action_space=gym.spaces.Box(-1, 1, (A,)), env_spec=maze)
    dataset.observation_space = gym.spaces.Dict(achieved_goal=box, observation=box)
    places = np.array([[0.3 if letter == "1" else 3.0, 0.0] for letter in walk])
    observations = {"achieved_goal": places, "observation": np.array([[tag, t] for t in range(steps + 1)])}
    columns = dict(actions=np.ones((steps, A)), rewards=np.zeros(steps), terminations=np.zeros(steps, bool))
    data = SimpleNamespace(id=tag, observations=observations, **columns)
    return odt.to_transitions(odt.to_episode(data, dataset, odt.Task("antmaze", (), ((1, 1), (1, 1)))), None)


def test_offline_all_trajectories_but_the_lowest_are_sampled_and_online_the_best():
    walks = enumerate(["0000111", "00000000", "001000", "000"])
    buffer = make_buffer([relabelled(tag, walk) for tag, walk in walks], context_length=1)

    def sampled() -> dict[tuple, int]:
        """How many steps of each trajectory, named by its episode and where in that it begins, there are."""
        batch = buffer.sample(2_000)
        assert batch.actions.max().item() == pytest.approx(1 - 1e-6, abs=1e-7)  # where atanh is finite
        rows = torch.cat([batch.observations[:, 0, 2:], batch.time_steps], dim=1).unique(dim=0).int().tolist()
        return Counter((tag, step - time) for tag, step, time in rows)

    # Of seven trajectories with 20 steps, that of the last walk, 2 steps without reward, is left out.
    assert sampled() == {(0, 0): 4, (0, 4): 1, (0, 5): 1, (1, 0): 7, (2, 0): 2, (2, 2): 3}
    buffer.add(relabelled(9, "0000"))
    assert sampled() == {(0, 0): 4, (0, 5): 1, (2, 0): 2, (9, 0): 3}


def tags(buffer) -> list[float]:
    return buffer.columns.observations[buffer.columns.time_steps == 0, 0].tolist()


def test_a_new_trajectory_replaces_the_worst_and_then_the_oldest_new_one_also_when_resumed():
    offline = [steps_of([0, 0, 1, 0, 1], [0, 0, 1, 0, 0], tag=1)]  # two: returns 1 and 1, of 3 and 2 steps
    offline += [steps_of(rewards, tag=tag) for tag, rewards in ((2, [0, 0]), (3, [1, 1, 1]), (4, [0, 0, 0]), (5, [0]))]
    large, small = make_buffer(offline, capacity=7), make_buffer(offline)
    for buffer in (large, small):
        assert tags(buffer) == [2, 4, 1, 1, 3]
        assert buffer.columns.time_steps.tolist() == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2]
        assert buffer.columns.returns.tolist() == [0] * 5 + [1] * 5 + [3, 2, 1]  # undiscounted, still to come
        assert buffer.columns.observations[5:10, 1].tolist() == [3, 4, 0, 1, 2]
    expected = {6: [1, 1, 3, 6], 7: [1, 3, 6, 7], 8: [3, 6, 7, 8], 9: [6, 7, 8, 9], 10: [7, 8, 9, 10]}
    for tag, kept in expected.items():
        for buffer in (large, small):
            resumed = make_buffer(offline, buffer.args.buffer_trajectories)
            resumed.load_state_dict(buffer.state_dict())
            for each in (resumed, buffer):
                each.add(steps_of([0, 5], tag=tag))
            assert all(torch.equal(x, y) for x, y in zip(resumed.columns, buffer.columns, strict=True))
            assert resumed.num_online == buffer.num_online == min(tag - 5, buffer.args.buffer_trajectories)
        assert tags(small) == kept
    assert tags(large) == [1, 3, 6, 7, 8, 9, 10] and small.columns.returns.tolist() == 8 * [5]
    assert tags(make_buffer(offline[1:2])) == [2]  # an only trajectory is not left out
    with pytest.raises(ValueError, match="dataset has changed"):
        make_buffer(offline[1:]).load_state_dict(small.state_dict())


def test_every_step_is_as_likely_a_start():
    """Trajectories by their length, starts uniform, padding in front; every column is of the step that it says."""
    torch.manual_seed(0)
    buffer = make_buffer([steps_of([0] * 5 + [2], tag=1), steps_of([3, 0], tag=2), steps_of([-1])], context_length=4)
    buffer.add(steps_of([1, 1, 1, 1], tag=3))
    batch = buffer.sample(24_000)
    lengths, undiscounted = {1: 6, 2: 2, 3: 4}, {1: [2] * 6, 2: [3, 0], 3: [4, 3, 2, 1]}
    mask = batch.mask.bool()
    assert batch.returns.shape == (24_000, 4) and mask[:, -1].all()
    assert not any(column[~mask].any() for column in batch)
    for b in range(1_000):
        steps, tag = batch.time_steps[b][mask[b]].tolist(), int(batch.observations[b, -1, 0])
        assert steps == list(range(steps[0], min(steps[0] + 4, lengths[tag]))) and mask[b, -len(steps) :].all()
        assert batch.observations[b][mask[b]].tolist() == [[tag, step, 0] for step in steps]
        assert np.allclose(batch.actions[b][mask[b]], [[tag / 100, step / 100] for step in steps])
        assert batch.returns[b][mask[b]].tolist() == [undiscounted[tag][step] for step in steps]
    starts = (batch.time_steps[:, -1] - mask.sum(1) + 1).tolist()
    counts = Counter(zip(batch.observations[:, -1, 0].tolist(), starts, strict=True))
    assert counts.keys() == {(tag, start) for tag, length in lengths.items() for start in range(length)}
    assert all(abs(value - 2_000) < 5 * 2_000**0.5 for value in counts.values())  # 12 steps, each as likely
    mean = odt.probe(None, batch, buffer.args)["mean_mc_return"]
    assert mean == pytest.approx(batch.returns[mask].mean().item(), rel=1e-5)


class Walk:
    """An environment with these rewards, whose state tells the step."""

    action_space = gym.spaces.Box(-1, 1, (A,))

    def __init__(self, *rewards: float):
        self.rewards = rewards

    def reset(self, seed):
        self.time = 0
        return np.zeros(O, np.float32), {}

    def step(self, action):
        self.time += 1
        last = self.time == len(self.rewards)
        return np.full(O, self.time, np.float32), self.rewards[self.time - 1], False, last, {"score": float(last)}


def test_policy_sees_the_last_steps_and_an_asked_return_that_falls_by_the_rewards():
    args, seen = odt.Args(eval_context_length=3, eval_return=8.0, online_return=2.0, reward_scale=0.5), []

    def act(batch, explore):  # a tenth of the call's number
        seen.append(batch)
        return torch.full((1, A), len(seen) / 10)

    agent = SimpleNamespace(args=args, act=act)
    odt.play_episode(Walk(0.0, 1.0, 2.0, 4.0), agent, 0, False, "cpu")
    assert [batch.returns.tolist() for batch in seen] == [[[8]], [[8, 8]], [[8, 8, 7]], [[8, 7, 5]]]
    assert seen[3].observations[0, :, 0].tolist() == [1, 2, 3] and seen[3].time_steps.tolist() == [[1, 2, 3]]
    assert np.allclose(seen[3].actions[0], [[0.2] * A, [0.3] * A, [0] * A])  # the last is not known yet
    assert {column.dtype for column in seen[3]} == {torch.float32, torch.int64} and seen[3].mask.all()
    seen.clear()
    episode, score = odt.play_episode(Walk(1.0, 1.0, 1.0), agent, 0, True, "cpu")
    assert [batch.returns.tolist() for batch in seen] == [[[2]], [[2, 1]], [[2, 1, 0]]] and score == 1
    assert episode.observations[:, 0].tolist() == [0, 1, 2, 3] and np.allclose(episode.actions[:, 0], [0.1, 0.2, 0.3])
    assert odt.to_transitions(episode, args).returns.tolist() == [3, 2, 1]  # what it had, not what was asked


def test_asking_for_a_high_return_gives_the_high_action():
    rng, offline = np.random.default_rng(0), []
    for k in range(100):
        actions = ((0.6 if k % 2 else -0.6) + 0.1 * rng.normal(size=(2, A))).astype(np.float32)
        states, rewards = rng.normal(size=(3, O)).astype(np.float32), np.array([0, k % 2], np.float32)
        offline.append(odt.to_transitions(odt.Episode(states, actions, rewards, np.array([False, True])), None))
    args = odt.Args(**TINY | dict(lr=1e-2, warmup_updates=20, context_length=2))
    torch.manual_seed(0)
    buffer, (agent, optimizer) = odt.ReplayBuffer(offline, args), odt.make_agent(offline, args)
    states = np.concatenate([episode.observations for episode in offline])  # of all trajectories, the lowest too
    np.testing.assert_allclose([*agent.state_mean, *agent.state_std], [*states.mean(0), *states.std(0)], atol=1e-5)
    for count in range(1, 201):
        odt.update(agent, optimizer, args, count, buffer.sample(64))
    for asked, action in ((1.0, 0.6), (0.0, -0.6)):
        agent.args = replace(args, eval_return=asked)
        episode, _ = odt.play_episode(Walk(0.0, 0.0), agent, 0, False, "cpu")
        assert np.abs(episode.actions - action).max() < 0.3


# --- Whole runs ---

# Evaluations after 0, 2 and 3 updates, then episodes of 12 steps with 2 updates each.
RUN = """--env-id pick-place --episode-length 12 --offline-steps 3 --offline-eval-interval 2 --online-eval-interval 20
--eval-episodes 2 --updates-per-episode 2 --embedding-dim 8 --num-layers 1 --batch-size 4 --buffer-trajectories 11
--device cpu""".split()
KILLED = """import os, signal, sys, mine
calls, update = [], mine.update
def update_or_die(*arguments):
    calls.append(0)
    return update(*arguments) if len(calls) < int(sys.argv[1]) else os.kill(os.getpid(), signal.SIGKILL)
mine.update = update_or_die
mine.train(*mine.parse_args(sys.argv[2:]))"""


@pytest.fixture(autouse=True)
def folder(tmp_path, tmp_path_factory, monkeypatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.getbasetemp() / "odt-minari"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(odt.__file__, tmp_path / "mine.py")
    return tmp_path


def read(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True) | {"args": 0}


def assert_same(left, right) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict | list | tuple):
        assert len(left) == len(right)
        for key in left if isinstance(left, dict) else range(len(left)):
            if key != "wall_time":
                assert_same(left[key], right[key])
    else:
        assert left == right or left != left and right != right


def test_both_phases_and_a_run_killed_in_either_is_resumed_to_the_same_bits(folder):
    pick_place.collect(pick_place.Args())
    odt.train(*odt.parse_args([*RUN, "--online-steps", "48"]))
    (whole,) = Path("runs").iterdir()
    header, *lines = (line.split(",") for line in (whole / "eval.csv").read_text().split())
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    assert [row["phase"] for row in rows] == 3 * ["offline"] + 2 * ["online"]
    assert [(int(row["updates"]), int(row["env_steps"])) for row in rows[:4]] == [(0, 0), (2, 0), (3, 0), (7, 24)]
    assert {row["mean_q"] for row in rows} == {row["bound_rate"] for row in rows} == {"nan"}
    checkpoint = read(whole)
    rates = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    assert rates == [pytest.approx(11e-6), 1e-4] and checkpoint["buffer"]["num_online"] == 4
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    for call, done in ((3, 2), (10, 7)):  # offline after the evaluation at 2, online after that at 24 steps
        command = [sys.executable, "-c", KILLED, str(call), *RUN, "--online-steps", "48"]
        assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
        (run,) = {*Path("runs").iterdir()} - {whole}
        assert read(run)["progress"]["updates"] == done
        odt.train(*odt.parse_args(["--resume", str(run)]))
        assert_same(read(run), checkpoint)
        run = run.rename(str(call))
    for flags in (["--reward-scale", "2"], ["--datasets", "mine/other-v0"], ["--num-layers", "2"]):
        with pytest.raises(odt.InputError, match="cannot go on"):
            odt.train(*odt.parse_args(["--resume", str(run), *flags]))


def test_copied_alone_it_runs_and_resumes(folder):
    env, rng = gym.make("Pendulum-v1"), np.random.default_rng(0)  # where nothing tells success
    actions = rng.uniform(-2, 2, (9, 1)).astype(np.float32)
    columns = rng.normal(size=(10, 3)).astype(np.float32), actions, -rng.random(9), np.zeros(9, bool), np.zeros(9, bool)
    minari.create_dataset_from_buffers("mine/pendulum-v0", [EpisodeBuffer(0, None, None, *columns)], env=env)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = [*RUN, "--env-id", "mine/pendulum-v0", "--online-steps", "0"]
    resume = ["--resume", "runs/run", "--online-steps", "20"]
    for arguments, last in ((flags, "offline,3,0,-"), (resume, "online,7,24,-")):
        command = [sys.executable, "-B", "mine.py", *arguments]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0 and "done: " in result.stdout, result.stderr
        run = next(Path("runs").iterdir()).rename("runs/run")
        assert (run / "eval.csv").read_text().splitlines()[-1].startswith(last)
    assert {path.name for path in folder.iterdir()} == {"mine.py", "runs"}


def test_bad_settings_are_refused_in_one_sentence():
    bad = ["--num-heads 3", "--dropout 1", "--context-length 0", "--initial-temperature 0", "--env-id cal-ql/none-v0"]
    for flags, told in zip(bad, ["--num-heads", "--dropout", "context", "temperature", "cal-ql/none-v0"], strict=True):
        with pytest.raises(odt.InputError, match=told):
            odt.train(*odt.parse_args([*RUN, *flags.split()]))
    assert not Path("runs").exists()

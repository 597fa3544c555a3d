"""The script for images: encoder, shifts, replay of frames, whole runs on an environment that draws without OpenGL."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from dot_env import DotEnv
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from test_runs import check_equal, checkpoint, only, table, terminate
from torch.nn import functional

import cal_ql_continuous
import cal_ql_pixels
from cal_ql_pixels import (
    Agent,
    Args,
    Batch,
    Encoder,
    Episode,
    Observation,
    ReplayBuffer,
    draw_noise,
    main,
    shift_frames,
    to_observation,
    update,
)  # fmt: skip

SCRIPT = Path(cal_ql_pixels.__file__)
CPU = torch.device("cpu")


# ---- Encoder, shifts, update -----------------------------------------------------------------------------------------


def make_args(**settings) -> Args:
    return Args(**(dict(latent_dim=6, actor_layers=(8,), critic_layers=(8,), num_actions=3, batch_size=5) | settings))


def make_frames(*shape: int, seed: int = 0, vector: int = 0) -> Observation:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    return Observation(pixels, torch.randn(shape[0], vector, generator=generator))


def make_case(vector: int = 2, **settings):
    torch.manual_seed(0)
    args = make_args(**settings)
    agent = Agent((20, 16, 3), vector, 2, args)
    observations, following = (make_frames(5, 20, 16, 3, seed=seed, vector=vector) for seed in (1, 2))
    batch = Batch(observations, torch.rand(5, 2) * 2 - 1, torch.randn(5), following, torch.zeros(5), torch.randn(5))
    return args, agent, batch, draw_noise(batch.actions, args)


@pytest.mark.parametrize("shape", [(64, 64, 3), (20, 33, 1), (16, 16, 9)])
def test_encoder_is_convolutions_linear_layer_norm_tanh(shape):
    encoder, frames = Encoder(shape, make_args()), make_frames(4, *shape, vector=3)
    with torch.no_grad():
        h = torch.tensor(np.moveaxis(frames.pixels.numpy(), 3, 1).astype(np.float32)) / 255 - 0.5
        for layer in encoder.convolve[::2]:
            h = functional.conv2d(h, layer.weight, layer.bias, stride=2, padding=1).clamp(min=0)
        assert h.shape[2:] == tuple(math.ceil(size / 16) for size in shape[:2])
        h = h.reshape(4, -1) @ encoder.project.weight.T + encoder.project.bias
        h = (h - h.mean(1, keepdim=True)) / (h.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        features = encoder(frames)
    assert torch.allclose(features, torch.cat([h.tanh(), frames.vector], dim=1), atol=1e-5)
    assert features.shape == (4, 6 + 3) and h.std() > 0.5


def test_shift_of_zero_is_the_identity():
    frames = make_frames(5, 8, 6, 3, vector=2)
    shifted = shift_frames(frames, torch.zeros(5, 2, dtype=torch.long))
    assert torch.equal(shifted.pixels, frames.pixels) and shifted.pixels.dtype == torch.uint8
    assert shifted.vector is frames.vector


def test_each_frame_is_shifted_by_its_own_shift_and_repeats_its_edge():
    frames = make_frames(4, 8, 6, 3)
    shifts = torch.tensor([[1, 0], [0, -2], [-4, 3], [4, -4]])
    for frame, (down, right), ours in zip(frames.pixels, shifts, shift_frames(frames, shifts).pixels, strict=True):
        padded = np.pad(frame.numpy(), ((4, 4), (4, 4), (0, 0)), mode="edge")
        assert np.array_equal(ours, padded[4 - down :, 4 - right :][:8, :6])


def test_shifts_are_drawn_for_each_frame_of_both_states():
    shifts = draw_noise(torch.zeros(1000, 2), make_args(random_shift=2)).shifts
    assert shifts.shape == (2, 1000, 2)
    assert torch.equal(shifts.unique(), torch.arange(-2, 3))
    # Of four independent draws of five values pairs are equal in a fifth of the frames.
    draws = shifts.permute(0, 2, 1).flatten(0, 1)
    for k in range(4):
        for other in range(k):
            assert 0.1 < (draws[k] == draws[other]).float().mean() < 0.3
    assert not draw_noise(torch.zeros(9, 2), make_args(random_shift=0)).shifts.any()


def test_update_is_that_of_vectors_on_shifted_and_encoded_frames():
    args, agent, batch, noise = make_case()
    plain = cal_ql_continuous
    with torch.no_grad():
        frames = [shift_frames(x, s) for x, s in zip((batch.observations, batch.next_observations), noise.shifts,
                                                     strict=True)]
        bias = agent.target_encoder.project.bias  # else a wrong choice between the two encoders would not show
        bias += torch.randn_like(bias)
        features, following = (agent.encoder(x) for x in frames)
        policies = agent.actor(features), agent.actor(following)
        encoded = batch._replace(observations=features, next_observations=agent.target_encoder(frames[1]))
        target = plain.bellman_target(agent, encoded, policies[1], noise, args)
        critic_loss, _, expected = plain.critic_losses(agent, encoded, target, *policies, noise, 5.0, args)
        actor_loss, alpha_loss = plain.actor_losses(agent, encoded, policies[0], noise, args)
    expected |= {"losses/qf_loss": critic_loss, "losses/actor_loss": actor_loss, "losses/alpha_loss": alpha_loss}
    metrics = update(agent, agent.make_optimizer(args), batch, noise, 5.0, True, args)
    assert metrics.keys() == {*expected, "losses/alpha"}
    for name, value in expected.items():
        assert torch.allclose(metrics[name], value, atol=1e-5), name


def test_actor_loss_leaves_the_encoder_untouched():
    states = []
    for with_actor in (False, True):
        args, agent, batch, noise = make_case()
        before = {name: value.clone() for name, value in agent.state_dict().items()}
        update(agent, agent.make_optimizer(args), batch, noise, 5.0, with_actor, args)
        states.append(agent.state_dict())
        moved = {name.split(".")[0] for name, value in states[-1].items() if not torch.equal(value, before[name])}
        learned = {"encoder", "critic", "target_encoder", "target_critic"}
        assert moved == learned | ({"actor", "log_alpha"} if with_actor else set())
        for name, value in agent.encoder.named_parameters():  # all of it learns from the critics, the targets follow
            assert value.grad.any(), name
            target = torch.lerp(before[f"target_encoder.{name}"], value, args.tau)
            assert torch.allclose(states[-1][f"target_encoder.{name}"], target)
    for name in states[0]:
        if name.split(".")[0] in ("encoder", "critic"):
            assert torch.equal(states[0][name], states[1][name]), name


def test_actor_loss_alone_gives_the_encoder_no_gradient(monkeypatch):
    args, agent, batch, noise = make_case()
    zero = torch.zeros((), requires_grad=True)
    monkeypatch.setattr(cal_ql_pixels, "critic_losses", lambda *_: (zero * 0, zero * 0, {}))
    update(agent, agent.make_optimizer(args), batch, noise, 5.0, True, args)
    assert all(parameter.grad is None for parameter in agent.encoder.parameters())
    assert all(parameter.grad.any() for parameter in agent.actor.parameters())


def test_each_state_is_encoded_once(monkeypatch):
    args, agent, batch, noise = make_case()
    seen, forward = [], Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, x: (seen.append((self, len(x.pixels))), forward(self, x))[1])
    update(agent, agent.make_optimizer(args), batch, noise, 5.0, True, args)
    assert seen == [(agent.encoder, 5), (agent.encoder, 5), (agent.target_encoder, 5)]  # s, s', s' for the target


def test_agent_acts_by_its_mean_or_with_the_generator():
    _, agent, batch, _ = make_case()
    with torch.no_grad():
        mean, log_std = agent.actor(agent.encoder(batch.observations))
        noise = torch.randn(1, 2, generator=torch.Generator().manual_seed(3))
    one = Observation(*(part[2].numpy() for part in batch.observations))
    assert np.allclose(agent.act(one, None), mean[2].tanh(), atol=1e-6)
    drawn = agent.act(one, torch.Generator().manual_seed(3))
    assert np.allclose(drawn, (mean[2] + log_std[2].exp() * noise[0]).tanh(), atol=1e-6)


# ---- Replay ----------------------------------------------------------------------------------------------------------


def make_episode(first: int, length: int, vector: int = 1) -> Episode:
    """Frame k shows k in every byte, for k from `first` on; row k has action -k and reward 1 at the end."""
    numbers = np.arange(first, first + length + 1)
    pixels = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (length + 1, 4, 4, 3))
    ended = np.arange(length) == length - 1
    observations = Observation(pixels, np.repeat(numbers[:, None], vector, axis=1).astype(np.float32))
    return Episode(observations, -numbers[:-1, None].astype(np.float32), ended.astype(np.float32), ended)


def make_buffer(offline: list[Episode], **settings) -> ReplayBuffer:
    """Slots that no episode has filled yet hold 255 or NaN, so that a sample of one shows."""
    num_frames = sum(len(episode.rewards) + 1 for episode in offline)
    args = Args(**(dict(buffer_size=20, mixing_ratio=0.0) | settings))
    buffer = ReplayBuffer(iter(offline), num_frames, args, True, CPU)
    buffer.observations.pixels[buffer.ring :] = 255
    for column in buffer.columns:
        column[buffer.ring :] = torch.nan
    return buffer


def check_rows(buffer: ReplayBuffer, expected: set[int]) -> None:
    """Of the expected frames, and no others, rows are drawn, and they are whole."""
    batch = buffer.sample(2000)
    frame = batch.observations.vector[:, 0]
    assert set(frame.int().tolist()) == expected
    following = batch.next_observations
    for seen, number in ((batch.observations, frame), (following, frame + 1)):
        assert (seen.pixels == number[:, None, None, None]).all() and (seen.vector[:, 0] == number).all()
    assert (batch.actions[:, 0] == -frame).all()
    assert torch.allclose(batch.mc_returns[batch.terminations == 1], batch.rewards[batch.terminations == 1])


def test_rows_are_whole_and_last_frames_are_never_drawn():
    buffer = make_buffer([make_episode(0, 3), make_episode(10, 5)])
    assert (buffer.num_offline, len(buffer.observations.pixels)) == (8, 10 + 20)
    check_rows(buffer, {0, 1, 2, *range(10, 15)})
    buffer.add(make_episode(100, 4))
    check_rows(buffer, {100, 101, 102, 103})
    returns = buffer.sample(500)
    assert torch.allclose(returns.mc_returns, 0.99 ** (103 - returns.observations.vector[:, 0]))
    buffer.add(make_episode(110, 2))
    check_rows(buffer, {100, 101, 102, 103, 110, 111})


def test_ring_overwrites_the_oldest_frames_and_closes():
    buffer = make_buffer([make_episode(0, 3)], buffer_size=10)
    for first, length, expected in [
        (100, 5, {*range(100, 105)}),
        (110, 5, {102, 103, 104, *range(110, 115)}),  # six more frames: 100 and 101 are gone, and the ring is full
        (120, 2, {*range(110, 115), 120, 121}),  # 105, the last frame of the first episode, has lost its row
        (130, 30, {*range(151, 160)}),  # longer than the ring: its last ten frames
        (200, 1, {*range(153, 160), 200}),
    ]:
        buffer.add(make_episode(first, length))
        check_rows(buffer, expected)
        assert buffer.num_online == len(expected)


@pytest.mark.parametrize("sparse, tail", [(True, -5 / 0.01), (False, 0)])
def test_columns(sparse, tail):
    """The second episode is cut off by time; rewards are scaled and biased, returns are of those."""
    ended, cut = make_episode(0, 3), make_episode(10, 2)
    cut = cut._replace(rewards=np.zeros(2, np.float32), terminations=np.zeros(2, bool))
    buffer = ReplayBuffer(iter([ended, cut]), 7, Args(reward_scale=10.0, reward_bias=-5.0), sparse, CPU)
    rows = dict(zip((0, 1, 2, 10, 11), buffer.rows.tolist(), strict=False))
    assert rows == {0: 0, 1: 1, 2: 2, 10: 4, 11: 5}
    actions, rewards, terminations, returns, valid = (column[list(rows.values())] for column in buffer.columns)
    assert actions[:, 0].tolist() == [0, -1, -2, -10, -11]
    assert rewards.tolist() == [-5, -5, 5, -5, -5] and terminations.tolist() == [0, 0, 1, 0, 0]
    last = -5 + 0.99 * tail
    assert returns.tolist() == pytest.approx([-5 + 0.99 * -0.05, -0.05, 5, -5 + 0.99 * last, last])
    assert valid.all() and not buffer.columns[-1][[3, 6]].any()


def test_a_ring_too_large_for_the_memory_is_refused():
    with pytest.raises(cal_ql_pixels.InputError, match="lower --buffer-size"):
        make_buffer([make_episode(0, 3)], buffer_size=2**50)


def test_mixing_counts_rows_not_frames():
    buffer = make_buffer([make_episode(0, 3)], mixing_ratio=-1.0)
    assert buffer.offline_share == 1
    buffer.add(make_episode(100, 1))
    assert buffer.offline_share == 3 / 4
    half = make_buffer([make_episode(0, 3)], mixing_ratio=0.5)
    half.add(make_episode(100, 2))
    assert (half.sample(11).observations.vector[:, 0] < 50).sum() == 5


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
    for ours, theirs in zip(*batches, strict=True):
        for a, b in zip(*((x if isinstance(x, Observation) else [x]) for x in (ours, theirs)), strict=True):
            assert torch.equal(a, b)


def test_50_000_steps_of_64_by_64_fit_into_a_gigabyte():
    frames = Observation(np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 0), np.float32))
    episode = Episode(frames, np.zeros((1, 4), np.float32), np.zeros(1, np.float32), np.ones(1, bool))
    slots = 50_000 + 50_000 // 20  # in episodes of 20 steps; the memory is not touched here
    buffer = ReplayBuffer(iter([episode]), 2, Args(buffer_size=slots), True, CPU)
    tensors = [*buffer.observations, *buffer.columns, buffer.rows]
    assert sum(tensor.nbytes for tensor in tensors) < 0.7e9


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def write_dots(dataset_id: str, count: int = 12, spec_size: int = 12, change=None, space=None, **kwargs) -> None:
    """Demonstrations of DotEnv(**kwargs); `change` alters the frames, `space` the recorded space."""
    env = gym.wrappers.TimeLimit(DotEnv(**kwargs), 8)
    rng, buffers = np.random.default_rng(0), []
    for k in range(count):
        observations, actions, rewards, over = [env.reset(seed=k)[0]], [], [], False
        while not over:
            actions.append(np.clip([rng.normal(), 1 + rng.normal()], -2, 2).astype(np.float32))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            observations.append(observation), rewards.append(reward)
            over = terminated or truncated
        observations = [change(x) for x in observations] if change else observations
        if kwargs.get("vector"):
            observations = {key: np.array([x[key] for x in observations]) for key in observations[0]}
        last = np.arange(len(rewards)) == len(rewards) - 1
        buffers.append(EpisodeBuffer(
            id=k, observations=observations, actions=np.array(actions), rewards=rewards,
            terminations=last & terminated, truncations=last & (not terminated)))
    spec = EnvSpec("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8,
                   kwargs=kwargs | {"size": spec_size})
    minari.create_dataset_from_buffers(
        dataset_id, buffers, env=spec, observation_space=space or env.observation_space, jpeg_encoding=False)


# 12 updates with evaluations at 0, 5, 10 and 12, then episodes of up to 8 steps up to 30 steps.
TINY = """--offline-steps 12 --online-steps 30 --offline-eval-interval 5 --online-eval-interval 10 --eval-episodes 2
--checkpoint-interval 4 --log-interval 2 --utd-ratio 2 --buffer-size 25 --actor-layers 8 --critic-layers 8
--latent-dim 5 --batch-size 8 --num-actions 2 --device cpu""".split()


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        write_dots("test/dot-v0")
        write_dots("test/dot-vector-v0", vector=True)
        yield path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_script_runs_alone(datasets_path, tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, tmp_path / SCRIPT.name, "--env-id", "test/dot-v0", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # for the environment's module
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    rows = table(only(tmp_path / "runs"))
    assert [row["phase"] for row in rows] == ["offline"] * 4 + ["online"] * (len(rows) - 4) and len(rows) >= 6
    assert int(rows[-1]["env_steps"]) >= 30 and "before fine-tuning" in process.stdout.splitlines()[-1]


@pytest.mark.parametrize("dataset_id, call", [("test/dot-v0", 40), ("test/dot-vector-v0", 7)])
def test_resumed_run_equals_uninterrupted(dataset_id, call, runs, monkeypatch):
    flags, calls = ["--env-id", dataset_id, *TINY], []
    assert main([*flags, "--runs-dir", "whole"]) == 0

    def stopping_update(*arguments):
        calls.append(1)
        if len(calls) == call:
            terminate()
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cal_ql_pixels, "update", stopping_update)
        assert main(flags) == 143
    assert checkpoint(only(runs))["progress"]["updates"] == call
    torch.manual_seed(99)  # the random state comes from the checkpoint
    assert main(["--resume", str(only(runs))]) == 0
    check_equal(only(runs), only(Path("whole")))
    assert len(checkpoint(only(runs))["buffer"]["online"][0]) == 25  # the ring was full


def test_stopped_evaluation_and_episode_are_repeated(runs, monkeypatch):
    flags, act = ["--env-id", "test/dot-v0", *TINY], Agent.act
    assert main([*flags, "--runs-dir", "whole"]) == 0
    for call, phase in ((5, "offline"), (70, "online")):
        calls = []

        def stopping_act(self, observation, generator, calls=calls, call=call):
            calls.append(1)
            if len(calls) == call:
                terminate()
            return act(self, observation, generator)

        with monkeypatch.context() as patch:
            patch.setattr(Agent, "act", stopping_act)
            assert main([*flags, "--runs-dir", phase]) == 143
        run = only(Path(phase))
        assert checkpoint(run)["progress"]["phase"] == phase
        assert main(["--resume", str(run)]) == 0
        check_equal(run, only(Path("whole")))


def test_workers_play_as_the_run_itself(runs, monkeypatch):
    flags = ["--env-id", "test/dot-v0", *TINY]
    assert main([*flags, "--runs-dir", "alone"]) == 0
    assert main([*flags, "--runs-dir", "workers", "--eval-workers", "2"]) == 0
    check_equal(only(Path("workers")), only(Path("alone")))

    assert main([*flags, "--runs-dir", "overlapped", "--overlap"]) == 0
    calls = []

    def stopping_update(*arguments):
        calls.append(1)
        if len(calls) == 40:
            terminate()
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cal_ql_pixels, "update", stopping_update)
        assert main([*flags, "--overlap"]) == 143
    assert main(["--resume", str(only(runs))]) == 0
    check_equal(only(runs), only(Path("overlapped")))


def test_frames_that_an_environment_flips_or_draws_over_are_copied():
    frame = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    seen = to_observation(frame[::-1], gym.spaces.Box(0, 255, (4, 4, 3), np.uint8)).pixels
    expected = frame[::-1].copy()
    assert np.array_equal(torch.from_numpy(seen), expected)
    frame[:] = 0
    assert np.array_equal(seen, expected)


def test_resume_refuses_other_data(runs, capsys):
    write_dots("test/changing-v0")
    flags = ["--env-id", "test/changing-v0", *TINY, "--online-steps", "0"]
    assert main(flags) == 0
    minari.delete_dataset("test/changing-v0")
    write_dots("test/changing-v0", count=11)
    assert main(["--resume", str(only(runs))]) == 2
    assert "data has changed" in capsys.readouterr().err


def test_episodes_are_the_data_rescaled_and_clipped(capsys):
    dataset, task = minari.load_dataset("test/dot-vector-v0"), cal_ql_pixels.Task("any other", ("test/dot-vector-v0",))
    for ours, data in zip(cal_ql_pixels.load_episodes([dataset], task), dataset, strict=True):
        assert np.array_equal(ours.observations.pixels, data.observations["image"])
        assert np.allclose(ours.observations.vector, data.observations["place"])
        assert np.allclose(ours.actions, np.clip(data.actions / 2, -0.99999, 0.99999))
        assert ours.actions.dtype == np.float32 and np.array_equal(ours.rewards, data.rewards)
        assert np.array_equal(ours.terminations, data.terminations)
    successes = sum(bool(episode.rewards.any()) for episode in dataset)
    assert f"data: 12 episodes, {dataset.total_steps} steps, {successes} episodes with" in capsys.readouterr().out


def test_time_limit_is_no_termination():
    env = cal_ql_pixels.make_env(minari.load_dataset("test/dot-v0"), 3)
    agent = Agent((12, 12, 3), 0, 2, make_args())
    agent.act = lambda observation, generator: np.array([0.0, -1.0])
    episode, score = cal_ql_pixels.roll_out(env, agent, 0, False, lambda: None)
    assert len(episode.rewards) == 3 and not episode.terminations.any() and score == 0
    agent.act = lambda observation, generator: np.array([0.0, 1.0])
    episode, score = cal_ql_pixels.roll_out(gym.wrappers.TimeLimit(env, 9), agent, 0, False, lambda: None)
    assert score == 0  # three steps of 0.4 from -0.5 do not reach 1
    env = cal_ql_pixels.make_env(minari.load_dataset("test/dot-v0"), 4)
    episode, score = cal_ql_pixels.roll_out(env, agent, 0, False, lambda: None)
    assert len(episode.rewards) == 4 and episode.terminations.tolist() == [False] * 3 + [True] and score == 1


def test_learning_rates_and_initialisation():
    args = make_args(actor_lr=1e-2, critic_lr=1e-3)
    agent = Agent((20, 16, 3), 2, 2, args)
    rates = {id(p): group["lr"] for group in agent.make_optimizer(args).param_groups for p in group["params"]}
    assert {rates[id(p)] for p in [*agent.encoder.parameters(), *agent.critic.parameters()]} == {1e-3}
    assert {rates[id(p)] for p in agent.actor.parameters()} == {1e-2}
    for ours, target in zip(agent.encoder.parameters(), agent.target_encoder.parameters(), strict=True):
        assert torch.equal(ours, target) and not target.requires_grad
    for layer in (*agent.encoder.convolve[::2], agent.encoder.project):
        weight = layer.weight.detach().flatten(1)
        product = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
        assert torch.allclose(product, 2 * torch.eye(len(product)), atol=1e-5) and not layer.bias.any()


def test_settings_of_the_visual_task_are_the_specification_s():
    args = cal_ql_pixels.parse_args([])
    assert args.env_id == "pick-place-pixels" and (args.actor_layers, args.critic_layers) == ((256, 256), (256, 256))
    expected = dict(cql_weight=5.0, online_cql_weight=0.5, num_actions=4, reward_scale=11.0, reward_bias=-1.0,
                    gamma=0.96, offline_steps=50_000, online_steps=100_000, utd_ratio=5, actor_interval=1,
                    mixing_ratio=0.5, batch_size=256, tau=0.005, actor_lr=1e-4, critic_lr=3e-4,
                    offline_eval_interval=5_000, online_eval_interval=2_000, eval_episodes=20, num_critics=2,
                    importance_sampling=True)
    assert {name: getattr(args, name) for name in expected} == expected


def test_probe_sees_the_frames_as_they_are(monkeypatch):
    seen, critic_losses = [], cal_ql_pixels.critic_losses
    args = make_args(buffer_size=20)
    buffer = make_buffer([make_episode(0, 3)])
    agent = Agent((4, 4, 3), 1, 1, args)
    with torch.no_grad():
        agent.target_encoder.project.bias.normal_()
    monkeypatch.setattr(cal_ql_pixels, "critic_losses", lambda *a: (seen.append(a), critic_losses(*a))[1])
    values = cal_ql_pixels.probe(agent, buffer, 3, args)
    torch.manual_seed(3)
    batch = buffer.sample(4 * args.batch_size)
    with torch.no_grad():
        features, following = agent.encoder(batch.observations), agent.encoder(batch.next_observations)
        assert torch.equal(seen[0][1].observations, features)
        for ours, expected in zip(seen[0][3:5], (features, following), strict=True):
            assert torch.equal(ours[0], agent.actor(expected)[0])
    assert values.keys() == {"mean_q", "mean_mc_return", "bound_rate"}


def test_vector_is_part_of_the_features(runs):
    assert main(["--env-id", "test/dot-vector-v0", *TINY, "--online-steps", "0", "--offline-steps", "1"]) == 0
    agent = checkpoint(only(runs))["agent"]
    assert agent["actor.net.0.weight"].shape[1] == 5 + 2
    observation, space = DotEnv(vector=True).reset(seed=0)[0], DotEnv(vector=True).observation_space
    split = to_observation(observation, space)
    assert np.array_equal(split.pixels, observation["image"]) and np.allclose(split.vector, observation["place"])


def check_refused(flags: list[str], capsys, *words: str) -> None:
    assert main([*TINY, *flags]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in errors and not Path("runs").exists()


@pytest.mark.parametrize("name, kwargs, words", [
    ("float", dict(change=lambda x: (x / 255).astype(np.float32),
                   space=gym.spaces.Box(0, 1, (12, 12, 3), np.float32)), ["float32", "uint8"]),
    ("first", dict(change=lambda x: np.moveaxis(x, 2, 0),
                   space=gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)), ["(3, 12, 12), channels first", "[H, W, C]"]),
    ("flat", dict(change=lambda x: x.mean((1, 2)).astype(np.float32),
                  space=gym.spaces.Box(0, 255, (12,), np.float32)), ["no image", "cal_ql_continuous.py"]),
    ("two", dict(vector=True, change=lambda x: {"image": x["image"], "place": x["image"]},
                 space=gym.spaces.Dict({k: gym.spaces.Box(0, 255, (12, 12, 3), np.uint8) for k in ("image", "place")})),
     ["2 images"]),
    ("larger", dict(spec_size=14), ["(12, 12, 3)", "(14, 14, 3)"]),
    ("infinite", dict(vector=True, change=lambda x: x | {"place": x["place"] * np.nan}), ["NaN", "1 episodes"]),
])  # fmt: skip
def test_frames_that_cannot_be_used(name, kwargs, words, runs, capsys):
    write_dots(f"test/{name}-v0", count=1, **kwargs)
    check_refused(["--env-id", f"test/{name}-v0"], capsys, *words)


@pytest.mark.parametrize("flags", ["--latent-dim 1", "--random-shift -1", "--buffer-size 1"])
def test_settings_out_of_range(flags, runs, capsys):
    check_refused(flags.split(), capsys, flags.split()[0], "it must be")


def test_absent_dataset_names_its_collector(runs, capsys):
    check_refused([], capsys, "pick-place/pixels-v0", "python -m collect.pick_place --camera")


@pytest.mark.parametrize("setting, expected", [
    ({}, "egl"), ({"DISPLAY": ":0"}, None), ({"WAYLAND_DISPLAY": "wayland-0"}, None),
    ({"MUJOCO_GL": "osmesa"}, "osmesa"),
])  # fmt: skip
def test_rendering_needs_no_screen(setting, expected, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is put back after the test
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    cal_ql_pixels.make_env(minari.load_dataset("test/dot-v0"), 0).close()
    assert os.environ.get("MUJOCO_GL") == expected


def test_script_alone_misses_the_module_of_the_environment(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    command = [sys.executable, tmp_path / SCRIPT.name, "--env-id", "test/dot-v0", *TINY]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert process.returncode == 2 and "No module named 'dot_env'" in process.stderr
    assert "Traceback" not in process.stderr and "apt-get" not in process.stderr


def test_missing_gl_names_the_packages(runs, capsys, monkeypatch):
    def fail(self, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(DotEnv, "reset", fail)
    check_refused(["--env-id", "test/dot-v0"], capsys, "eglQueryString", "libegl1 libegl-mesa0 libgl1-mesa-dri")


def test_film_shows_a_success(runs, monkeypatch, capsys):
    plot = pytest.importorskip("plot")
    flags = ["--env-id", "test/dot-v0", *TINY, "--offline-steps", "1", "--online-steps", "0"]
    assert main(flags) == 0
    run = only(runs)
    monkeypatch.setattr(cal_ql_pixels.Agent, "act", lambda self, observation, generator: np.array([0.0, 0.5]))
    assert plot.main(["--film", str(run), "--out", "figures"]) == 0
    assert [path.name for path in Path("figures").iterdir()] == ["film.png"]
    assert len(plot.draw_film(str(run), frames=3).axes) == 3
    first, *_, last = [ax.images[0].get_array() for ax in plot.draw_film(str(run)).axes]
    assert last[:, -1].any() and not first[:, -1].any()  # the dot arrives at the right edge

    monkeypatch.setattr(cal_ql_pixels.Agent, "act", lambda self, observation, generator: np.array([0.0, -0.5]))
    assert plot.main(["--film", str(run)]) == 2
    assert "no success" in capsys.readouterr().err
    assert plot.main(["--film", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err

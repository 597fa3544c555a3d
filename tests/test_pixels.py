"""The scripts for images: encoder, shifts, losses, replay of frames, whole runs on an environment without OpenGL."""

import copy
import functools
import importlib
import itertools
import math
import os
import shutil
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
from test_baselines import make_agent, make_args, make_batch, result, run, run_and_kill, same, small, upside_down
from torch.nn import functional

import cal_ql_continuous
import cal_ql_pixels as pixels
import cql_continuous
import sac_offline_data
from baselines import awac_pixels, cql_pixels, iql_pixels, sac_pixels
from cal_ql_pixels import Agent, Args, Encoder, Episode, InputError, ReplayBuffer, random_shift, to_transitions

SCRIPTS = [pixels, sac_pixels, iql_pixels, awac_pixels]  # CQL is Cal-QL less one statement
FROM_STATES = {pixels: cal_ql_continuous, cql_pixels: cql_continuous, sac_pixels: sac_offline_data}
VISUAL = ["--env-id", "pick-place-pixels", "--device", "cpu"]
sampling = pytest.mark.parametrize("script", SCRIPTS[:2], ids=lambda script: script.__name__)


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__)
def script(request):
    """For what each of the algorithms has of its own; the losses of IQL and AWAC are in test_baselines.py."""
    return request.param


# ---- Encoder, shifts, update -----------------------------------------------------------------------------------------
def make_frames(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def one_update(script, args, agent, optimizer, batch, online: bool = False, with_actor: bool = True) -> dict:
    torch.manual_seed(5)
    return script.update(agent, optimizer, args, online, with_actor, batch)


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
    args, agent, optimizer, batch = small(script, random_shift=3)
    batch, seen = batch._replace(next_observations=batch.observations), []
    monkeypatch.setattr(script, "random_shift", lambda *a: seen.append((a, random_shift(*a))) or seen[-1][1])
    one_update(script, args, agent, optimizer, batch)
    assert [arguments[1] for arguments, _ in seen] == [3, 3]
    assert not torch.equal(seen[0][1], seen[1][1])


RLPD = dict(num_critics=5, num_target_critics=1, actor_reduce="mean", critic_layer_norm=True, backup_entropy=False)
CASES = [
    (pixels, False, {}), (pixels, True, dict(online_cql_factor=0.1, cql_lagrange=True, importance_sampling=False)),
    (cql_pixels, False, dict(num_critics=3)), (cql_pixels, True, dict(online_cql_factor=0.0)),
    (sac_pixels, True, {}), (sac_pixels, False, RLPD | dict(target_entropy_scale=-0.5)),
]  # fmt: skip


@pytest.mark.parametrize("with_actor", [True, False])
@pytest.mark.parametrize("script, online, settings", CASES)
def test_update_is_that_of_states_on_shifted_and_encoded_frames(script, online, settings, with_actor, monkeypatch):
    """Losses, gradients, Adam's first step, targets; for states, test_update.py compares them with the equations."""
    monkeypatch.setattr(script, "random_shift", upside_down)
    args, agent, optimizer, batch = small(script, actor_lr=1e-2, critic_lr=2e-2, **settings)
    before = copy.deepcopy(agent)
    frozen = dict(before.named_parameters())
    encoded = before.encoder(upside_down(batch.observations))
    features, following = encoded.detach().requires_grad_(), upside_down(batch.next_observations)

    states = FROM_STATES[script]
    twin_args = states.Args(**{name: value for name, value in vars(args).items() if name in vars(states.Args())})
    twin, twin_optimizer = make_agent(states, twin_args)
    unknown = twin.double().load_state_dict(agent.state_dict(), strict=False).unexpected_keys
    assert len(unknown) == 20 and all("encoder." in name for name in unknown)
    with torch.no_grad():
        fixed = agent.target_encoder(following)  # what the target critics get in place of the states
        vectors = batch._replace(observations=features, next_observations=agent.encoder(following))
    twin.target_critic.register_forward_pre_hook(lambda module, inputs: (fixed, inputs[1]))
    expected = one_update(states, twin_args, twin, twin_optimizer, vectors, online, with_actor)
    gradients = torch.autograd.grad(encoded, list(before.encoder.parameters()), features.grad)

    metrics = one_update(script, args, agent, optimizer, batch, online, with_actor)
    assert metrics.keys() == expected.keys() and ("losses/actor_loss" in expected) == with_actor
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for name, value in expected.items():
        close(metrics[name], value, msg=name)
    parameters = dict(agent.named_parameters())
    for name, theirs in twin.named_parameters():
        close(parameters[name], theirs, msg=name)
    for (name, ours), gradient in zip(agent.encoder.named_parameters(), gradients, strict=True):
        assert gradient.any()
        close(ours.grad, gradient)
        step = 2e-2 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(ours, frozen[f"encoder.{name}"] - step, rtol=1e-6, atol=1e-6)
        close(parameters[f"target_encoder.{name}"], 0.9 * frozen[f"target_encoder.{name}"] + 0.1 * ours)


def test_actor_loss_leaves_encoder_and_critics_untouched(script):
    states = []
    for with_actor in (False, True):
        args, agent, optimizer, batch = small(script)
        before = copy.deepcopy(agent.state_dict())
        one_update(script, args, agent, optimizer, batch, with_actor=with_actor)
        states.append(agent.state_dict())
        moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, states[-1][name])}
        learned = {"encoder", "critic", "target_encoder", "target_critic", *(["value"] if script is iql_pixels else [])}
        assert moved == learned | ({"actor"} | {"log_alpha"} & before.keys() if with_actor else set())
    for name, value in states[0].items():
        if "encoder" in name or "critic" in name:
            assert torch.equal(value, states[1][name]), name


def test_targets_begin_as_what_they_follow(script):
    agent, _ = make_agent(script, make_args(script))
    for ours, target in ((agent.encoder, agent.target_encoder), (agent.critic, agent.target_critic)):
        assert same(ours.state_dict(), target.state_dict()) and not any(p.requires_grad for p in target.parameters())


def test_each_state_is_encoded_once(script, monkeypatch):
    args, agent, optimizer, batch = small(script)
    seen, forward = [], script.Encoder.forward
    monkeypatch.setattr(script.Encoder, "forward", lambda self, x: (seen.append((self, len(x))), forward(self, x))[1])
    one_update(script, args, agent, optimizer, batch)
    # s; s', for the policy or for V; and for the target s', in IQL s.
    expected = [(agent.encoder, 6), (agent.encoder, 6), (agent.target_encoder, 6)]
    assert sorted(seen, key=lambda call: call[0] is agent.target_encoder) == expected


@torch.no_grad()
@sampling
def test_agent_acts_by_its_mean_or_a_draw_and_is_probed_on_frames_as_they_are(script):
    args, agent, _, batch = small(script)
    features = agent.encoder(batch.observations)
    mean, _ = agent.actor(features)
    assert torch.equal(agent.act(batch.observations, explore=False), mean.tanh())
    torch.manual_seed(3)
    drawn = agent.act(batch.observations, explore=True)
    torch.manual_seed(3)
    assert torch.equal(drawn, agent.actor.sample(features, 1)[0][:, 0]) and not torch.equal(drawn, mean.tanh())
    mean_q = agent.critic(features, batch.actions.unsqueeze(1)).mean().item()
    values = script.probe(agent, batch._replace(mc_returns=torch.tensor([1e6, 1e6, 1e6, 1e6, -1e6, -1e6])), args)
    assert [*values.values()] == pytest.approx([mean_q, 1e6 / 3, 2 / 3])
    assert [*values] == ["mean_q", "mean_mc_return", "bound_rate"]


@torch.no_grad()
def test_sac_acts_at_random_for_twelve_steps():
    _, agent, _, batch = small(sac_pixels, random_steps=12)
    frames = batch.observations[:1].expand(6, -1, -1, -1)
    agent.actor.log_std_offset.fill_(-9.0)
    uniform = [agent.act(frames, explore=True) for _ in range(2)]
    assert agent.act(frames, explore=True).std(0).max() < 1e-2 < 0.1 < min(actions.std(0).min() for actions in uniform)
    assert torch.cat(uniform).min() < 0 < torch.cat(uniform).max() and torch.cat(uniform).abs().max() < 1
    assert torch.equal(*(agent.act(frames, explore=False) for _ in range(2)))
    assert agent.state_dict()["acted_steps"] == 18  # evaluations do not count


def test_settings_of_the_visual_task_are_the_specification_s():
    args = vars(pixels.parse_args(VISUAL)[0])
    expected = dict(
        cql_weight=5.0, online_cql_factor=0.1, num_actions=4, reward_scale=11.0, reward_bias=-1.0, gamma=0.96,
        offline_steps=50_000, online_steps=100_000, utd_ratio=5, actor_interval=1, mixing_ratio=0.5, batch_size=256,
        tau=0.005, actor_lr=1e-4, critic_lr=3e-4, offline_eval_interval=5_000, online_eval_interval=2_000,
        eval_episodes=20, num_critics=2, importance_sampling=True, actor_layers=(256, 256), critic_layers=(256, 256),
        latent_dim=50, random_shift=4, buffer_size=110_000, online_env="collect.pick_place:cal-ql/PickPlaceCamera-v0",
    )  # fmt: skip
    assert {name: args[name] for name in expected} == expected
    assert vars(pixels.parse_args(VISUAL[2:])[0]) == args == vars(cql_pixels.parse_args(VISUAL)[0])
    rival, deep = dict(reward_scale=1.0, reward_bias=-1.0, actor_lr=3e-4), (256, 256, 256, 256)
    own = {
        sac_pixels: dict(offline_steps=0, actor_lr=3e-4, offline_eval_interval=50_000),  # no pre-training
        iql_pixels: rival | dict(expectile=0.7, beta=10.0, actor_std=None),
        awac_pixels: rival | dict(temperature=1.0, mixing_ratio=-1.0, actor_layers=deep, critic_layers=deep),
    }
    for script, settings in own.items():
        theirs = vars(script.parse_args(VISUAL)[0])
        shared = {name: args[name] for name in args.keys() & theirs.keys()}
        assert {name: theirs[name] for name in shared | settings} == shared | settings
    others = {script: script.parse_args(["--env-id", "mine/any-v0", "--device", "cpu"])[0] for script in SCRIPTS}
    assert {each.buffer_size for each in others.values()} == {110_000}
    assert others[sac_pixels].offline_steps == 0 and others[awac_pixels].mixing_ratio == -1


# ---- Replay ----------------------------------------------------------------------------------------------------------
def make_episode(first: int, length: int) -> Episode:
    """Frame k, from `first` on, shows k in every byte; transition k has action -k / 256, and reward 1 at the end."""
    numbers = np.arange(first, first + length + 1)
    frames = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (length + 1, 4, 4, 3))
    ended = np.arange(length) == length - 1
    return Episode(frames, -numbers[:-1, None].astype(np.float32) / 256, ended.astype(np.float32), ended)


def make_buffer(*offline: Episode, **settings) -> ReplayBuffer:
    """Slots that no episode has filled yet hold 255, so that a sample of one shows."""
    args = Args(**dict(buffer_size=20, mixing_ratio=0.0, device="cpu") | settings)
    buffer = ReplayBuffer([to_transitions(episode, args) for episode in offline], args)
    for column in buffer.columns:
        column[sum(len(episode.rewards) + 1 for episode in offline) :] = 255
    return buffer


def add(buffer: ReplayBuffer, first: int, length: int) -> None:
    buffer.add(to_transitions(make_episode(first, length), Args()))


def numbers_of(batch) -> list[int]:
    return (-256 * batch.actions[:, 0]).int().tolist()


def check_transitions(buffer: ReplayBuffer, expected: set[int]) -> None:
    """Transitions of the expected frames, and no others, are drawn, and they are whole."""
    batch = buffer.sample(2000)
    number = torch.tensor(numbers_of(batch))
    assert {*number.tolist()} == expected
    assert (batch.observations == number[:, None, None, None]).all() and batch.observations.dtype == torch.uint8
    assert (batch.next_observations == number[:, None, None, None] + 1).all()
    assert torch.equal(batch.terminations, batch.rewards) and batch.rewards.any()
    assert torch.equal(batch.mc_returns[batch.terminations == 1], batch.rewards[batch.terminations == 1])


def test_transitions_are_whole_and_last_frames_are_never_drawn():
    buffer = make_buffer(make_episode(0, 3), make_episode(10, 5))
    assert len(buffer.columns[0]) == 10 + 20 and buffer.columns[0].dtype == torch.uint8  # each frame once, as bytes
    check_transitions(buffer, {0, 1, 2, *range(10, 15)})
    add(buffer, 100, 4)
    check_transitions(buffer, {100, 101, 102, 103})
    batch = buffer.sample(500)
    assert torch.allclose(batch.mc_returns, 0.99 ** (103 - torch.tensor(numbers_of(batch))))
    add(buffer, 110, 2)
    check_transitions(buffer, {100, 101, 102, 103, 110, 111})


def test_ring_overwrites_the_oldest_frames_and_closes():
    buffer = make_buffer(make_episode(0, 3), buffer_size=10)
    for first, length, expected in [
        (100, 5, {*range(100, 105)}),
        (110, 5, {102, 103, 104, *range(110, 115)}),  # six more frames: 100 and 101 are gone, and the ring is full
        (120, 2, {*range(110, 115), 120, 121}),  # 105, the last frame of the first episode, has lost its transition
        (130, 30, {*range(151, 160)}),  # longer than the ring: its last ten frames
        (200, 1, {*range(153, 160), 200}),
    ]:
        add(buffer, first, length)
        check_transitions(buffer, expected)
        assert len(buffer.online) == len(expected)


@pytest.mark.parametrize("env_id, bias, tail", [
    ("pick-place-pixels", -5.0, -5 / 0.01), ("pick-place-pixels", 5.0, 5 / 0.01),
    ("mine/any-v0", -5.0, -5 / 0.01), ("mine/any-v0", 5.0, 0.0),  # a cost repeats, a gain might not
])  # fmt: skip
def test_columns(env_id, bias, tail):
    """The second episode is cut off by time; rewards are scaled and biased, returns are of those."""
    ended, cut = make_episode(0, 3), make_episode(10, 2)
    cut = cut._replace(rewards=np.zeros(2, np.float32), terminations=np.zeros(2, bool))
    buffer = make_buffer(ended, cut, env_id=env_id, reward_scale=10.0, reward_bias=bias)
    assert buffer.offline.tolist() == [0, 1, 2, 4, 5]
    _, actions, rewards, terminations, returns, whole = (column[buffer.offline] for column in buffer.columns)
    assert (-256 * actions[:, 0]).tolist() == [0, 1, 2, 10, 11] and terminations.tolist() == [0, 0, 1, 0, 0]
    assert rewards.tolist() == [bias, bias, 10 + bias, bias, bias]
    last, second = bias + 0.99 * tail, bias + 0.99 * (10 + bias)
    assert returns.tolist() == pytest.approx([bias + 0.99 * second, second, 10 + bias, bias + 0.99 * last, last])
    assert whole.all() and not buffer.columns[-1][[3, 6]].any()


def test_mixing_counts_transitions_not_frames():
    buffer = make_buffer(make_episode(0, 3), mixing_ratio=-1.0)
    assert {*numbers_of(buffer.sample(50))} == {0, 1, 2}
    add(buffer, 100, 1)
    add(buffer, 110, 2)
    torch.manual_seed(0)
    sampled = numbers_of(buffer.sample(400))
    torch.manual_seed(0)  # every transition alike: one draw of an index among all
    assert sampled == torch.tensor([0, 1, 2, 100, 110, 111])[torch.randint(6, (400,))].tolist()
    for ratio, count in ((0.5, 5), (0.99, 10), (1.0, 11), (0.0, 0)):  # of 11, rounded down
        half = make_buffer(make_episode(0, 3), mixing_ratio=ratio)
        add(half, 100, 2)
        assert sum(number < 50 for number in numbers_of(half.sample(11))) == count


def test_state_dict_round_trip():
    buffer, other, larger = (make_buffer(make_episode(0, 3), buffer_size=size) for size in (10, 10, 11))
    for first in (100, 110, 120):
        add(buffer, first, 4)
    other.load_state_dict(copy.deepcopy(buffer.state_dict()))
    for first in (130, 140):
        batches = []
        for twin in (buffer, other):
            torch.manual_seed(0)
            batches.append(twin.sample(100))
            add(twin, first, 2)
        assert same(*batches)
    with pytest.raises(ValueError, match="dataset or --buffer-size has changed"):
        larger.load_state_dict(buffer.state_dict())


# ---- Whole runs ------------------------------------------------------------------------------------------------------
def write_dots(dataset_id: str, size: int = 12, change=None, space=None, env_id="test/Dot-v0"):
    """Demonstrations of DotEnv; `change` alters the frames of an episode, `space` the recorded space."""
    env, rng, buffers = gym.make("test/Dot-v0"), np.random.default_rng(0), []
    for k in range(12):
        frames, actions, rewards, terminated, truncated = [env.reset(seed=k)[0]], [], [], False, False
        while not (terminated or truncated):
            actions.append(np.clip([rng.normal(), 1 + rng.normal()], -2, 2).astype(np.float32))
            frame, reward, terminated, truncated, _ = env.step(actions[-1])
            frames.append(frame)
            rewards.append(reward)
        frames, last = np.array(frames), np.arange(len(rewards)) == len(rewards) - 1
        columns = change(frames) if change else frames, np.array(actions), rewards, last & terminated, last & truncated
        buffers.append(EpisodeBuffer(k, None, None, *columns))
    spec = gym.envs.registration.EnvSpec(env_id, "dot_env:DotEnv", max_episode_steps=8, kwargs={"size": size})
    space = space or env.observation_space
    minari.create_dataset_from_buffers(dataset_id, buffers, env=spec, observation_space=space, jpeg_encoding=False)


# 12 updates with evaluations at 0, 5, 10 and 12, then episodes of up to 8 steps up to 30 steps.
TINY = """--env-id test/dot-v0 --offline-steps 12 --online-steps 30 --offline-eval-interval 5 --online-eval-interval 10
--eval-episodes 2 --utd-ratio 2 --buffer-size 25 --actor-layers 8 --critic-layers 8 --latent-dim 5 --batch-size 8
--device cpu""".split()
OWN = {pixels: ["--num-actions", "2"], cql_pixels: ["--num-actions", "2"], sac_pixels: ["--random-steps", "9"]}


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        write_dots("test/dot-v0")
        write_dots("cal-ql/pick-place/pixels-v0", env_id="cal-ql/PickPlaceCamera-v0")
        yield


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty working directory for each test; what a run changes in its process is put back."""
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


def test_a_run_killed_in_each_phase_goes_on_as_an_undisturbed_one(script):
    whole = run(script, *TINY, *OWN.get(script, []))
    rows = whole["rows"]
    assert [row["updates"] for row in rows[:4]] == ["0", "5", "10", "12"] and len(rows) >= 6
    assert [row["phase"] for row in rows] == ["offline"] * 4 + ["online"] * (len(rows) - 4)
    assert int(rows[-1]["updates"]) == 12 + 2 * int(rows[-1]["env_steps"]) and int(rows[-1]["env_steps"]) >= 30
    assert len({row["mean_q"] for row in rows}) == len(rows)
    assert [len(column) for column in whole["buffer"]["online"]] == [25] * 6  # the ring is full
    killed = run_and_kill(script, 9, *TINY, *OWN.get(script, []))
    assert killed["rows"] == rows[:2]
    folder = killed.pop("folder")
    killed = run_and_kill(script, 45, "--resume", folder)  # its first call is update 6
    assert 4 < len(killed["rows"]) < len(rows) and killed["rows"] == rows[: len(killed["rows"])]
    torch.manual_seed(99)  # the random state comes from the checkpoint
    resumed = run(script, "--resume", folder)
    assert resumed.pop("folder") == folder != whole.pop("folder")
    assert same(resumed, whole)


def test_a_renamed_copy_alone_runs_the_task_through_both_phases_and_resumes(script):
    """With the module `collect.pick_place` of the folder it is started in."""
    Path("elsewhere").mkdir(), Path("collect").mkdir()
    renamed = shutil.copy(script.__file__, "elsewhere/renamed.py")
    line = "gymnasium.register('cal-ql/PickPlaceCamera-v0', entry_point='dot_env:DotEnv', max_episode_steps=8)"
    Path("collect/pick_place.py").write_text(f"import gymnasium\n{line}\n")
    shutil.copy(Path(__file__).with_name("dot_env.py"), ".")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def go(*flags: str) -> list[str]:
        command = [sys.executable, "-B", renamed, *flags]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 0, process.stderr
        return process.stdout.splitlines()

    lines, whole = go(*TINY[2:], *OWN.get(script, [])), result()
    assert lines[0] == "data: cal-ql/pick-place/pixels-v0" and lines[-1].startswith("done: ")
    assert "/pick-place-pixels__renamed__1__" in whole["folder"]
    assert [row["phase"] for row in whole["rows"][:5]] == ["offline"] * 4 + ["online"]
    if script is pixels:  # one of them is enough: each resumes above
        go("--resume", whole["folder"], "--online-steps", "50")
        rows = result()["rows"]
        assert rows[: len(whole["rows"])] == whole["rows"] and int(rows[-1]["env_steps"]) >= 50


def test_cql_fine_tunes_cal_ql_in_another_environment_without_the_data():
    """From the end of the offline phase, after a warm-up, with a seed of its own."""
    pretrained = run(pixels, *TINY, *OWN[pixels], "--online-steps", "0")
    flags = "--online-steps 30 --online-env dot_env:test/Dot-v0 --mixing-ratio 0 --warmup-steps 16 --seed 2".split()
    rows = run(cql_pixels, "--resume", pretrained["folder"], *flags)["rows"]
    assert rows[:4] == pretrained["rows"] and int(rows[-1]["env_steps"]) >= 30
    assert 12 < int(rows[-1]["updates"]) < 12 + 2 * int(rows[-1]["env_steps"])
    with pytest.raises(InputError, match="was made with --online-env dot_env:test/Dot-v0: repeat that"):
        run(pixels, "--resume", pretrained["folder"])


def test_frames_of_the_data_are_held_once_while_the_run_goes_on(monkeypatch):
    alive, load_data, evaluate = [], pixels.load_data, pixels.evaluate

    def watched(args):
        task, dataset, offline = load_data(args)
        alive.extend(weakref.ref(batch.observations.base) for batch in offline)
        assert all(batch.next_observations.base is ref() for batch, ref in zip(offline, alive, strict=True))
        return task, dataset, offline

    def checked(*arguments):
        assert len(alive) == 12 and not any(ref() is not None for ref in alive)
        return evaluate(*arguments)

    monkeypatch.setattr(pixels, "load_data", watched)
    monkeypatch.setattr(pixels, "evaluate", checked)
    run(pixels, *TINY, *OWN[pixels], "--offline-steps", "1", "--online-steps", "0")


def open_dots(*flags: str) -> tuple:
    return pixels.load_data(pixels.parse_args(["--env-id", "test/dot-v0", *flags])[0])


def make_env(**settings) -> gym.Env:
    task, dataset, _ = open_dots()
    return pixels.make_env(dataset, task, Args(env_id="test/dot-v0", **settings))


def test_frames_that_an_environment_flips_or_draws_over_are_copied(monkeypatch):
    drawing = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
    views = itertools.cycle([drawing[::-1], drawing])
    expected = [torch.tensor(next(views).copy()) for _ in range(2)]
    monkeypatch.setattr(DotEnv, "observe", lambda self: next(views))
    env = make_env()
    frames = env.reset(seed=0)[0], env.step(np.zeros(2, np.float32))[0]
    drawing[:] = 0
    assert same([torch.from_numpy(frame) for frame in frames], expected)


def test_episodes_are_the_data_rescaled_and_clipped():
    _, dataset, offline = open_dots("--reward-scale", "3")
    for ours, data in zip(offline, dataset, strict=True):
        assert np.array_equal(ours.observations, data.observations[:-1]) and ours.observations.dtype == np.uint8
        assert np.array_equal(ours.next_observations, data.observations[1:])
        assert np.allclose(ours.actions, np.clip(data.actions / 2, -0.99999, 0.99999))
        assert ours.actions.dtype == np.float32 and np.array_equal(ours.rewards, 3 * data.rewards)
        assert np.array_equal(ours.terminations, data.terminations)
    assert len(offline) == 12


def test_time_limit_is_no_termination_and_actions_are_the_data_s():
    agent = Agent(12, 12, 3, 2, Args(latent_dim=5))
    agent.act = lambda frames, explore: torch.tensor([[0.0, 1.0]])
    cut, score = pixels.play_episode(make_env(episode_length=3), agent, 0, False, "cpu")
    assert not cut.terminations.any() and not cut.rewards.any() and score == 0  # three steps of 0.4 from -0.5: not 1
    assert cut.observations.shape == (4, 12, 12, 3) and cut.observations.dtype == np.uint8
    ended, score = pixels.play_episode(make_env(episode_length=4), agent, 0, False, "cpu")
    assert ended.terminations.tolist() == [False] * 3 + [True] and ended.rewards.tolist() == [0, 0, 0, 1] and score == 1
    env = make_env()
    env.reset(seed=0)
    assert [env.step(np.array([0.0, 0.99999]))[4]["score"] for _ in range(4)] == [0, 0, 0, 1]


# ---- What is refused -------------------------------------------------------------------------------------------------
def check_refused(*words: str, flags=("--env-id", "test/dot-v0")) -> None:
    with pytest.raises(InputError) as refusal:
        run(pixels, *TINY, *flags)
    message = str(refusal.value)
    assert all(word in message for word in words) and "\n" not in message and message.endswith("."), message
    assert not Path("runs").exists()


STATE = gym.spaces.Box(np.linspace(-9, -8, 30, dtype=np.float32), 300.0)  # one that takes many lines to print
BOTH = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, (12, 12, 3), np.uint8), "place": gym.spaces.Box(-1, 1, (2,))})


@pytest.mark.parametrize("name, kwargs, words", [
    ("float", dict(change=lambda x: (x / 255).astype(np.float32), space=gym.spaces.Box(0, 1, (12, 12, 3), np.float32)),
     ["cannot use test/float-v0: ", "Box (12, 12, 3) float32, not one image [H, W, C] of uint8"]),
    ("first", dict(change=lambda x: np.moveaxis(x, 3, 1), space=gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)),
     ["cannot use test/first-v0: ", "Box (3, 12, 12) uint8, not one image [H, W, C] of uint8"]),
    ("flat", dict(change=lambda x: x.reshape(len(x), -1)[:, :30].astype(np.float32), space=STATE),
     ["Box (30,) float32, not one image", "vectors: cal_ql_continuous.py"]),
    ("dict", dict(change=lambda x: {"image": x, "place": np.zeros((len(x), 2), np.float32)}, space=BOTH),
     ["Dict None None, not one image"]),
    ("larger", dict(size=14), ["cannot make the environment ", "step: frames uint8[14, 14, 3], not uint8[12, 12, 3]"]),
    ("unknown", dict(env_id="test/Nowhere-v0"),
     ["cannot make the environment test/unknown-v0: ", "the data name none to be had: --online-env"]),
])  # fmt: skip
def test_observations_and_environments_that_cannot_be_used(name, kwargs, words):
    write_dots(f"test/{name}-v0", **kwargs)
    check_refused(*words, flags=["--env-id", f"test/{name}-v0"])


@pytest.mark.parametrize("change, words", [
    (lambda data: data.actions.__setitem__((0, 0), np.nan), ["values not finite"]),
    (lambda data: data.actions.__imul__(100), ["actions out of their box"]),
    (lambda data: data.rewards.__setitem__(0, np.inf), ["values not finite"]),
    (lambda data: object.__setattr__(data, "rewards", np.append(data.rewards, 0.0)), ["frames uint8["]),
    (lambda data: object.__setattr__(data, "actions", data.actions[1:]), ["columns of other shapes"]),
    (lambda data: object.__setattr__(data, "terminations", data.terminations[1:]), ["columns of other shapes"]),
    (lambda data: object.__setattr__(data, "observations", data.observations.astype(np.float32)), ["float32"]),
])  # fmt: skip
def test_damaged_episodes_are_named(change, words, monkeypatch):
    to_episode = pixels.to_episode

    def damaged(data, dataset, task):
        if data.id == 7:
            change(data)
        return to_episode(data, dataset, task)

    monkeypatch.setattr(pixels, "to_episode", damaged)
    check_refused("cannot use test/dot-v0: InputError: episode 7: ", *words)


@pytest.mark.parametrize("change, words", [
    (lambda frame, *rest: (frame.astype(np.float32), *rest), ["frames float32[12, 12, 3], not uint8[12, 12, 3]"]),
    (lambda frame, *rest: (frame[:1], *rest), ["frames uint8[1, 12, 3]"]),
    (lambda frame, reward, *rest: (frame, math.nan, *rest), ["test/Dot-v0's reset or step gives the reward nan"]),
    (lambda *results: results[:4], ["ValueError", "unpack"]),  # the old interface
])  # fmt: skip
def test_steps_that_cannot_be_used_are_refused_before_the_run(change, words, monkeypatch):
    step = DotEnv.step
    monkeypatch.setattr(DotEnv, "step", lambda self, action: change(*step(self, action)))
    check_refused("cannot make the environment ", *words)


def test_missing_gl_names_the_packages(monkeypatch):
    def fail(self, **kwargs):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(DotEnv, "reset", fail)
    check_refused("eglQueryString", "if OpenGL is missing, install libegl1 libegl-mesa0 libgl1-mesa-dri")


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
        args = make_args(script, actor_layers=(8,), critic_layers=(8,), actor_lr=1e-4, critic_lr=1e-4)
        args.device = "cuda"
        torch.manual_seed(0)
        agent, optimizer = make_agent(script, args)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        step = functools.partial(script.update, agent, optimizer, args, False, True)
        graphs = importlib.import_module("tensordict.nn")
        return agent, graphs.CudaGraphModule(step, warmup=3) if captured else step

    def make_cuda_batch(self, script, seed: int):
        torch.manual_seed(seed)
        frames, actions, rewards, next_frames, *others = (values.float().cuda() for values in make_batch(script))
        return script.Batch(frames.byte(), actions, rewards, next_frames.byte(), *others)

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

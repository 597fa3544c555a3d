"""Monte-Carlo returns, and which transitions the replay holds and samples."""

import numpy as np
import pytest
import torch

from cal_ql_continuous import Args, Episode, ReplayBuffer, monte_carlo_returns


def make_episode(first: int, length: int, terminated: bool = True) -> Episode:
    """Transition k has state k, action -k and reward k % 2, for k from `first` on."""
    states = np.arange(first, first + length + 1, dtype=np.float32)[:, None]
    terminations = np.zeros(length, bool)
    terminations[-1] = terminated
    return Episode(states, -states[:-1], states[:-1, 0] % 2, terminations)


def make_buffer(offline: list[Episode], sparse: bool = True, **settings) -> ReplayBuffer:
    """What no episode has filled yet is NaN, so that a sample of it shows."""
    buffer = ReplayBuffer(offline, Args(**settings), sparse, torch.device("cpu"))
    for column in buffer.columns:
        column[buffer.num_offline :] = torch.nan
    return buffer


def sample_states(buffer: ReplayBuffer, batch_size: int = 1000) -> list[float]:
    """The states of a batch; offline states are below 100 and online ones from 100 on in these tests."""
    return buffer.sample(batch_size).observations[:, 0].tolist()


def count_offline(buffer: ReplayBuffer, batch_size: int) -> int:
    return sum(state < 100 for state in sample_states(buffer, batch_size))


@pytest.mark.parametrize(
    "rewards, terminations, expected",
    [
        ([-5, -5, -5, 5], [0, 0, 0, 1], [-9.999005, -5.0495, -0.05, 5]),
        ([-5, 5, 5, -5, 5], [0, 1, 1, 0, 1], [-0.05, 5, 5, -0.05, 5]),  # the data runs on after the goal
        ([-5, -5, -5], [0, 0, 0], [-500, -500, -500]),  # never succeeded, cut off
    ],
)
def test_monte_carlo_returns_goldens(rewards, terminations, expected):
    returns = monte_carlo_returns(np.array(rewards), np.array(terminations, bool), 0.99, tail=-500.0)
    np.testing.assert_allclose(returns, expected, rtol=1e-6)


def test_monte_carlo_returns_are_discounted_sums():
    rng = np.random.default_rng(0)
    for _ in range(100):
        length, gamma, tail = rng.integers(1, 30), rng.uniform(0.5, 1), rng.normal()
        rewards, terminations = rng.normal(size=length), rng.random(length) < 0.1
        returns = monte_carlo_returns(rewards, terminations, gamma, tail)
        for t in range(length):
            ends = t + np.flatnonzero(terminations[t:])
            end = ends[0] + 1 if len(ends) else length
            expected = sum(gamma ** (k - t) * rewards[k] for k in range(t, end))
            expected += 0 if len(ends) else gamma ** (length - t) * tail
            assert returns[t] == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("sparse, expected", [(True, [-500, -500, -500]), (False, [-14.8505, -9.95, -5])])
def test_tail_of_an_episode_cut_off(sparse, expected):
    """A sparse task's last reward is assumed to go on for ever; nothing is assumed of a dense reward."""
    episode = make_episode(0, 3, terminated=False)._replace(rewards=np.zeros(3, np.float32))
    buffer = make_buffer([episode], sparse, reward_scale=10.0, reward_bias=-5.0, buffer_size=1)
    np.testing.assert_allclose(buffer.columns.mc_returns[:3], expected, rtol=1e-6)


def test_columns():
    """One transition's entries stand side by side, also across the seam of two episodes and for online ones."""
    settings = dict(reward_scale=10.0, reward_bias=-5.0, gamma=0.5, buffer_size=9)
    buffer = make_buffer([make_episode(0, 2), make_episode(10, 2, terminated=False)], **settings)
    buffer.add(make_episode(100, 2))
    transitions = zip(*(column[:6].flatten().tolist() for column in buffer.columns), strict=True)
    assert list(transitions) == [
        # state, action, reward, next state, termination, return
        (0, 0, -5, 1, 0, -2.5),
        (1, -1, 5, 2, 1, 5),
        (10, -10, -5, 11, 0, 0),
        (11, -11, 5, 12, 0, 10),  # cut off by time: no termination, and 5 goes on for ever
        (100, -100, -5, 101, 0, -2.5),
        (101, -101, 5, 102, 1, 5),
    ]


def test_only_what_is_filled_is_sampled():
    buffer = make_buffer([make_episode(0, 3)], buffer_size=8)
    assert all(column.isfinite().all() for column in buffer.sample(2000))
    for first, length in [(100, 1), (101, 4), (105, 6)]:
        buffer.add(make_episode(first, length))
        batch = buffer.sample(2000)
        assert all(column.isfinite().all() for column in batch)
        assert batch.observations.min() == 0 and batch.observations.max() == first + length - 1


def test_oldest_online_transitions_are_overwritten():
    buffer = make_buffer([make_episode(0, 3)], buffer_size=5, gamma=0.9)
    buffer.add(make_episode(100, 4))
    buffer.add(make_episode(104, 3))
    assert set(sample_states(buffer)) == {0, 1, 2, 102, 103, 104, 105, 106}
    buffer.add(make_episode(107, 2))
    assert set(sample_states(buffer)) == {0, 1, 2, 104, 105, 106, 107, 108}

    long = make_episode(200, 8)
    buffer.add(long)  # longer than the ring: its last five transitions, with their own returns
    assert set(sample_states(buffer)) == {0, 1, 2, 203, 204, 205, 206, 207}
    batch, returns = buffer.sample(1000), monte_carlo_returns(long.rewards, long.terminations, 0.9, 0.0)
    online = batch.observations[:, 0] >= 200
    steps = batch.observations[online, 0].int() - 200
    assert torch.equal(batch.mc_returns[online], torch.from_numpy(returns)[steps])


@pytest.mark.parametrize("batch_size", [7, 16])
@pytest.mark.parametrize("mixing_ratio", [0.0, 0.25, 0.5, 1.0])
def test_mixing_ratio(mixing_ratio, batch_size):
    buffer = make_buffer([make_episode(0, 3)], mixing_ratio=mixing_ratio, buffer_size=100)
    assert count_offline(buffer, batch_size) == batch_size  # there is nothing else yet
    for _ in range(5):
        buffer.add(make_episode(100, 10))
        assert count_offline(buffer, batch_size) == int(batch_size * mixing_ratio)


def test_mixing_ratio_of_minus_one_follows_what_is_there():
    buffer = make_buffer([make_episode(0, 30)], mixing_ratio=-1, buffer_size=60)
    for length, share in [(10, 30 / 40), (20, 30 / 60), (30, 30 / 90), (30, 30 / 90)]:  # the ring is full at last
        buffer.add(make_episode(100, length))
        assert count_offline(buffer, 180) == int(180 * share)


def test_sampling_is_uniform_within_both_parts_and_with_replacement():
    buffer = make_buffer([make_episode(0, 4)], mixing_ratio=0.25, buffer_size=10)
    buffer.add(make_episode(100, 6))
    torch.manual_seed(0)
    sampled = sample_states(buffer, 40_000)
    for states, expected in [(range(4), 2_500), (range(100, 106), 5_000)]:
        assert all(sampled.count(state) == pytest.approx(expected, rel=0.1) for state in states)


def test_state_dict_round_trip():
    """The same samples under the same seed, and the next episode overwrites the same transitions."""
    offline = [make_episode(0, 3)]
    buffer, restored = (make_buffer(offline, buffer_size=5) for _ in range(2))
    for first, length in [(100, 4), (104, 3)]:
        buffer.add(make_episode(first, length))
    restored.load_state_dict(buffer.state_dict())
    for _ in range(2):
        batches = []
        for which in (buffer, restored):
            torch.manual_seed(0)
            batches.append(which.sample(100))
            which.add(make_episode(107, 2))
        assert all(map(torch.equal, *batches))


def test_state_dict_holds_no_more_than_the_online_transitions():
    """A view would be saved with the whole replay behind it, at every checkpoint."""
    buffer = make_buffer([make_episode(0, 50)], buffer_size=1000)
    buffer.add(make_episode(100, 3))
    online = buffer.state_dict()["online"]
    assert len(online[0]) == 3
    assert all(column.untyped_storage().nbytes() == column.nbytes for column in online)


def test_replay_of_another_dataset_is_refused():
    state = make_buffer([make_episode(0, 3)], buffer_size=5).state_dict()
    with pytest.raises(ValueError, match="the dataset has changed"):
        make_buffer([make_episode(0, 4)], buffer_size=5).load_state_dict(state)

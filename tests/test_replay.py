"""Monte-Carlo returns, and which transitions the replay holds and samples."""

import numpy as np
import pytest
import torch

from cal_ql_continuous import Args, Batch, Episode, ReplayBuffer, to_transitions


def make_episode(first: int, length: int, terminated: bool = True) -> Episode:
    """Transition k has state k, action -k / 1024 and reward k % 2, for k from `first` on."""
    states = np.arange(first, first + length + 1, dtype=np.float32)[:, None]
    terminations = np.zeros(length, bool)
    terminations[-1] = terminated
    return Episode(states, -states[:-1] / 1024, states[:-1, 0] % 2, terminations)


def make_transitions(first: int, length: int, **settings) -> Batch:
    return to_transitions(make_episode(first, length), Args(**settings))


def make_buffer(length: int, **settings) -> ReplayBuffer:
    """One offline episode. What no episode has filled yet is NaN, so that a sample of it shows."""
    buffer = ReplayBuffer([make_transitions(0, length)], Args(device="cpu", **settings))
    for column in buffer.columns:
        column[buffer.num_offline :] = torch.nan
    return buffer


def sample_states(buffer: ReplayBuffer, batch_size: int = 1000) -> list[float]:
    """The states of a batch; offline states are below 100 and online ones from 100 on in these tests."""
    return buffer.sample(batch_size).observations[:, 0].tolist()


BINARY, OTHER = dict(reward_scale=10, reward_bias=-5), dict(env_id="mine/any-v0")
RETURNS = [
    # In the paper's tasks the last reward goes on for ever. Rewards of {0, 1} become {-5, 5}.
    (BINARY, [0, 0, 0, 1], [0, 0, 0, 1], [-9.999005, -5.0495, -0.05, 5]),
    (BINARY, [0, 1, 1, 0, 1], [0, 1, 1, 0, 1], [-0.05, 5, 5, -0.05, 5]),  # the data runs on after the goal
    (BINARY, [0, 0, 0], [0, 0, 0], [-500, -500, -500]),  # never succeeded, cut off
    (dict(env_id="kitchen-mixed"), [0, 2, 1], [0, 0, 0], [99.99, 101, 100]),
    # In any other only a cost does, and a gain does not.
    (OTHER, [-1] * 50, [0] * 50, [-100] * 50),
    (OTHER | dict(reward_bias=-1), [0] * 50, [0] * 50, [-100] * 50),
    (OTHER, [3, -2], [0, 0], [-195, -200]),
    (OTHER, [1, 1, 1], [0, 0, 0], [2.9701, 1.99, 1]),
    (OTHER, [-1, 2], [0, 0], [0.98, 2]),
    (OTHER, [-1, -1, -1], [0, 0, 1], [-2.9701, -1.99, -1]),
]


@pytest.mark.parametrize("settings, rewards, terminations, expected", RETURNS)
def test_returns_by_hand(settings, rewards, terminations, expected):
    steps = len(rewards)
    episode = Episode(np.zeros((steps + 1, 1)), np.zeros((steps, 1)), np.float32(rewards), np.array(terminations))
    np.testing.assert_allclose(to_transitions(episode, Args(**settings)).mc_returns, expected, rtol=1e-6)


def test_columns():
    """One transition's entries stand side by side, also across the seam of two episodes and for online ones."""
    args = Args(reward_scale=10.0, reward_bias=-5.0, gamma=0.5, buffer_size=9, device="cpu")
    *offline, online = (to_transitions(make_episode(*each), args) for each in [(0, 2), (10, 2, False), (100, 2)])
    buffer = ReplayBuffer(offline, args)
    buffer.add(online)
    assert {column.dtype for column in buffer.columns} == {torch.float32}
    rows = zip(*(column[:6].flatten().tolist() for column in buffer.columns), strict=True)
    assert [(state, 1024 * action, *rest) for state, action, *rest in rows] == [
        # state, 1024 times the action, reward, next state, termination, return
        (0, 0, -5, 1, 0, -2.5),
        (1, -1, 5, 2, 1, 5),
        (10, -10, -5, 11, 0, 0),
        (11, -11, 5, 12, 0, 10),  # cut off by time: no termination, and 5 goes on for ever
        (100, -100, -5, 101, 0, -2.5),
        (101, -101, 5, 102, 1, 5),
    ]


def test_only_what_is_filled_is_sampled():
    buffer = make_buffer(3, buffer_size=8)
    assert all(column.isfinite().all() for column in buffer.sample(2000))
    for first, length in [(100, 1), (101, 4), (105, 6)]:
        buffer.add(make_transitions(first, length))
        batch = buffer.sample(2000)
        assert all(column.isfinite().all() for column in batch)
        assert batch.observations.min() == 0 and batch.observations.max() == first + length - 1


def test_oldest_online_transitions_are_overwritten():
    buffer = make_buffer(3, buffer_size=5)
    buffer.add(make_transitions(100, 4))
    buffer.add(make_transitions(104, 3))
    assert set(sample_states(buffer)) == {0, 1, 2, 102, 103, 104, 105, 106}
    buffer.add(make_transitions(107, 2))
    assert set(sample_states(buffer)) == {0, 1, 2, 104, 105, 106, 107, 108}

    buffer.add(long := make_transitions(200, 8))  # longer than the ring: its last five, with their own returns
    assert set(sample_states(buffer)) == {0, 1, 2, 203, 204, 205, 206, 207}
    batch = buffer.sample(1000)
    steps = batch.observations[:, 0].int() - 200
    assert torch.equal(batch.mc_returns[steps >= 0], torch.from_numpy(long.mc_returns)[steps[steps >= 0]])


@pytest.mark.parametrize("batch_size", [7, 16])
@pytest.mark.parametrize("mixing_ratio", [0.0, 0.25, 0.5, 1.0])
def test_mixing_ratio(mixing_ratio, batch_size):
    buffer = make_buffer(3, mixing_ratio=mixing_ratio, buffer_size=100)
    assert max(sample_states(buffer, batch_size)) < 100  # there is nothing else yet
    for _ in range(5):
        buffer.add(make_transitions(100, 10))
        assert sum(state < 100 for state in sample_states(buffer, batch_size)) == int(batch_size * mixing_ratio)


def test_mixing_ratio_of_minus_one_draws_all_rows_alike():
    """One draw over all rows: a share rounded to whole rows would give the few online ones far too much."""
    buffer = make_buffer(30, mixing_ratio=-1, buffer_size=4)
    for first, online in [(100, [100, 101]), (102, [100, 101, 102, 103]), (104, [104, 105, 102, 103])]:
        buffer.add(make_transitions(first, 2))
        torch.manual_seed(0)
        expected = torch.tensor([*range(30), *online])[torch.randint(30 + len(online), (1000,))]
        torch.manual_seed(0)
        assert sample_states(buffer) == expected.tolist()


def test_sampling_is_uniform_within_both_parts_and_with_replacement():
    buffer = make_buffer(4, mixing_ratio=0.25, buffer_size=10)
    buffer.add(make_transitions(100, 6))
    torch.manual_seed(0)
    sampled = sample_states(buffer, 40_000)
    for states, expected in [(range(4), 2_500), (range(100, 106), 5_000)]:
        assert all(sampled.count(state) == pytest.approx(expected, rel=0.1) for state in states)


def test_state_dict_round_trip():
    """The same samples under the same seed, and the next episode overwrites the same transitions."""
    buffer, restored = (make_buffer(3, buffer_size=5) for _ in range(2))
    for first, length in [(100, 4), (104, 3)]:
        buffer.add(make_transitions(first, length))
    restored.load_state_dict(buffer.state_dict())
    for _ in range(2):
        batches = []
        for which in (buffer, restored):
            torch.manual_seed(0)
            batches.append(which.sample(100))
            which.add(make_transitions(107, 2))
        assert all(map(torch.equal, *batches))


def test_state_dict_holds_no_more_than_the_online_transitions():
    """A view would be saved with the whole replay behind it, at every checkpoint."""
    buffer = make_buffer(50, buffer_size=1000)
    buffer.add(make_transitions(100, 3))
    online = buffer.state_dict()["online"]
    assert len(online[0]) == 3 and all(column.untyped_storage().nbytes() == column.nbytes for column in online)


@pytest.mark.parametrize("length, buffer_size", [(4, 5), (3, 6)])
def test_replay_of_another_dataset_or_size_is_refused(length, buffer_size):
    state = make_buffer(3, buffer_size=5).state_dict()
    with pytest.raises(ValueError, match="the dataset or --buffer-size has changed"):
        make_buffer(length, buffer_size=buffer_size).load_state_dict(state)

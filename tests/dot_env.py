"""An environment with images that needs no OpenGL; a module of its own, so that a script alone can make it."""

import gymnasium as gym
import numpy as np


class DotEnv(gym.Env):
    """A dot to be pushed to the right edge, drawn with NumPy."""

    def __init__(self, size: int = 12):
        self.size = size
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gym.spaces.Box(-2, 2, (2,), np.float32)

    def observe(self):
        frame = np.zeros((self.size, self.size, 3), np.uint8)
        row, column = ((self.place + 1) / 2 * (self.size - 1)).astype(int)
        frame[row, column] = 255, 128, 0
        return frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = np.array([self.np_random.uniform(-1, 1), -0.5])
        return self.observe(), {}

    def step(self, action):
        self.place = np.clip(self.place + 0.2 * np.asarray(action, float), -1, 1)
        success = bool(self.place[1] == 1)
        return self.observe(), float(success), success, False, {"success": success}


if "test/Dot-v0" not in gym.registry:
    gym.register("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8)

"""Plays an exported policy with NumPy alone. policy.npz and policy.json, the contract, lie beside this file.

policy = Policy()
action = policy(observation)    # [A] for one observation, [B, A] for a batch; rescaled to the action box and clipped
"""

import json
from pathlib import Path

import numpy as np


class Policy:
    def __init__(self, folder: str | Path = Path(__file__).parent):
        self.contract = json.loads((Path(folder) / "policy.json").read_text())
        self.arrays = dict(np.load(Path(folder) / "policy.npz"))

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        shape, arrays = tuple(self.contract["observation_shape"]), self.arrays
        if np.shape(observation)[-len(shape) :] != shape:
            raise ValueError(f"the observation has shape {np.shape(observation)}; the policy takes {shape}.")
        x = np.asarray(observation, np.float32).reshape(-1, *shape)  # a batch of vectors, or of frames [B, H, W, C]
        x = (x - arrays["mean"]) / arrays["std"]
        for k, kind in enumerate(self.contract["layers"]):
            weight, bias = arrays.get(f"layers.{k}.weight"), arrays.get(f"layers.{k}.bias")
            if kind == "Linear":
                x = x @ weight.T + bias
            elif kind == "ReLU":
                x = np.maximum(x, 0)
            elif kind == "Tanh":
                x = np.tanh(x)
            elif kind == "Conv2d":  # 3 x 3, stride 2, one pixel of zeros around
                x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
                x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (1, 2))[:, ::2, ::2]  # [B, H/2, W/2, C, 3, 3]
                x = np.tensordot(x, weight, ((3, 4, 5), (1, 2, 3))) + bias
            elif kind == "Flatten":  # channels first
                x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
            elif kind == "LayerNorm":
                x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        low, high = arrays["box_low"], arrays["box_high"]
        x = np.clip(low + (x + 1) / 2 * (high - low), arrays["clip_low"], arrays["clip_high"])
        return x.reshape(*np.shape(observation)[: -len(shape)], -1)

"""A small two-layer perceptron, fitted in numpy: corrects what a linear model cannot express."""

from __future__ import annotations

import dataclasses

import numpy as np

_HIDDEN = 160
_EPOCHS = 10
_BATCH = 256
_PEAK_RATE = 4e-3
_WARM_SHARE = 0.3
_DECAY = 1e-2
# Adam's usual constants: Kingma and Ba, arXiv 1412.6980.
_MOMENTA = (0.9, 0.999)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perceptron:
    """One hidden layer of rectified units on standardised inputs.

    Attributes:
        mean: [F] float32, subtracted from inputs.
        scale: [F] float32, inputs are divided by it afterwards.
        weights: Hidden [F, H] and [H], output [H, E] and [E], float32.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """[T, E] float32 for inputs [T, F]."""
        hidden_FH, hidden_H, output_HE, output_E = self.weights
        hidden = np.maximum((inputs - self.mean) / self.scale @ hidden_FH + hidden_H, 0)
        return np.asarray(hidden @ output_HE + output_E)

    @classmethod
    def fit(cls, inputs: np.ndarray, target: np.ndarray, *, seed: int) -> Perceptron:
        """Least squares by Adam with decoupled weight decay, from an output of zero.

        Args:
            inputs: [T, F] float32.
            target: [T, E] float32.
            seed: Seed of the start and of the order of tokens.
        """
        rng = np.random.default_rng(seed)
        mean = inputs.mean(axis=0)
        scale = inputs.std(axis=0) + np.float32(1e-3)
        inputs = (inputs - mean) / scale
        tokens, features = inputs.shape
        bound = features**-0.5
        weights = (
            rng.uniform(-bound, bound, (features, _HIDDEN)).astype(np.float32),
            np.zeros(_HIDDEN, dtype=np.float32),
            np.zeros((_HIDDEN, target.shape[1]), dtype=np.float32),
            np.zeros(target.shape[1], dtype=np.float32),
        )
        batches = max(tokens // _BATCH, 1)
        steps = _Adam(weights, steps=_EPOCHS * batches)
        for _ in range(_EPOCHS):
            for rows in np.array_split(rng.permutation(tokens), batches):
                steps.take(_gradients(weights, inputs[rows], target[rows]))
        return cls(mean=mean, scale=scale, weights=weights)


def _gradients(
    weights: tuple[np.ndarray, ...], inputs: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Gradients of the mean squared error, in the order of the weights."""
    hidden_FH, hidden_H, output_HE, output_E = weights
    hidden = np.maximum(inputs @ hidden_FH + hidden_H, 0)
    wrong = (hidden @ output_HE + output_E - target) * np.float32(2 / target.size)
    back = (wrong @ output_HE.T) * (hidden > 0)
    return inputs.T @ back, back.sum(axis=0), hidden.T @ wrong, wrong.sum(axis=0)


class _Adam:
    """Updates weights in place; the rate rises, then falls to zero along cosines."""

    def __init__(self, weights: tuple[np.ndarray, ...], *, steps: int) -> None:
        self.weights, self.steps, self.step = weights, steps, 0
        self.first = [np.zeros_like(weight) for weight in weights]
        self.second = [np.zeros_like(weight) for weight in weights]

    def take(self, gradients: tuple[np.ndarray, ...]) -> None:
        """Take one step."""
        self.step += 1
        done = self.step / self.steps
        if done < _WARM_SHARE:
            height = (1 - np.cos(np.pi * done / _WARM_SHARE)) / 2
        else:
            height = (1 + np.cos(np.pi * (done - _WARM_SHARE) / (1 - _WARM_SHARE))) / 2
        rate = np.float32(_PEAK_RATE * height)
        slow, slower = _MOMENTA
        for weight, gradient, first, second in zip(
            self.weights, gradients, self.first, self.second, strict=True
        ):
            first += np.float32(1 - slow) * (gradient - first)
            second += np.float32(1 - slower) * (gradient**2 - second)
            size = np.sqrt(second / np.float32(1 - slower**self.step)) + np.float32(1e-8)
            weight *= 1 - rate * np.float32(_DECAY)
            weight -= rate / np.float32(1 - slow**self.step) * first / size

"""Training an adapter: exits and bridges in the loop, every exit held to what the original said.

The loss of a token is the KL from the original's distribution at every exit that it reaches, and at
the last layer if it gets there. In every step each row draws a threshold from 0.5 to 1.5, so that
half of the rows have no exits and their last layer is held to the original as it is; the others
learn to go on after keys and values that bridges made. Half of all prompts stop at the first exit,
likewise. A step's rows and draws depend on the seed and its number alone, so that a training which
was stopped goes on as if it had not been.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eevp_batch.engine.adapter import Adapter
from eevp_batch.engine.fitted import Bridge
from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import Kind, ShortPrompt
from eevp_batch.tune import adapter_checkpoint
from eevp_batch.tune.adapter_checkpoint import Checkpoint
from eevp_batch.tune.beginnings import Beginning
from eevp_batch.tune.exit_loop import ExitLoop, LoopPack, Said
from eevp_batch.tune.head_training import WhitenedHead, warm_cosine
from eevp_batch.tune.heads import Targets
from eevp_batch.tune.lora import LoraModel
from eevp_batch.tune.states import Row, filled

LEAST_BAR, MOST_BAR = 0.5, 1.5
"""Between these a row's threshold is drawn; above 1 it has no exits."""
CURVE_POINTS = 100
"""Most points of a loss curve that are kept."""
_TIMED = 2  # packs that say how long a step takes, after one that warms up

OnStep = Callable[[int, int], None]
"""Told how many steps are done, and of how many."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """How an adapter is trained.

    Attributes:
        rank: of the changes.
        steps: how many; None: as many as `minutes` are enough for.
        minutes: of training, where `steps` says nothing.
        pack_tokens: tokens of a pack, the beginning that rows share apart.
        accumulate: packs whose gradients make a step.
        learning_rate: of the changes, at its highest; it warms up and falls to zero by a cosine.
        head_learning_rate: of the heads that are in the loop.
        exit_weight: of the loss at an exit after layer l, times l / L; that of the last layer is 1.
        max_norm: of a step's gradient, above which it is made shorter.
        checkpoint_steps: steps between two checkpoints.
        seed: of everything that is drawn.
    """

    rank: int
    steps: int | None = None
    minutes: float = 8.0
    pack_tokens: int = 512
    accumulate: int = 1
    learning_rate: float = 1e-3
    head_learning_rate: float = 2e-4
    exit_weight: float = 1.0
    max_norm: float = 1.0
    checkpoint_steps: int = 25
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training leaves.

    Attributes:
        adapter: in memory of the host.
        steps: how many it took.
        seconds: of training.
        curve: per step, or mean of a few: `loss` in nats per token, `layers`: the KL after each,
            `left`: share of the tokens that left before the last layer.
    """

    adapter: Adapter
    steps: int
    seconds: float
    curve: list[dict[str, Any]]


class AdapterTraining:
    """A training that can be stopped and gone on with.

    Args:
        model: the original.
        lora: the same model in memory, with changes to train.
        rows: that are trained on.
        targets: what the original made of them.
        heads: by exit layer, what they are at first; trained as well.
        bridges: fixed; as in `FittedExits`.
        short: which prompt tokens may stop at the first exit.
        settings: how.
    """

    def __init__(
        self,
        model: SegmentedModel,
        lora: LoraModel,
        rows: Sequence[Row],
        targets: Targets,
        heads: Mapping[int, WhitenedHead],
        bridges: Mapping[tuple[Kind, int], Bridge],
        short: ShortPrompt,
        settings: AdapterSettings,
    ) -> None:
        self._rows, self._targets, self._settings = rows, targets, settings
        self._lora, self._short, self._num_layers = lora, short, model.num_layers
        self._loop = ExitLoop(model, lora.body, heads, bridges)
        prompts = [row.prompt_ids for row in rows]
        self._num_shared = min(Beginning(prompts, short.tail).length, short.lead)
        self._changes: dict[str, torch.Tensor] = {}
        for name, module in lora.modules.items():
            self._changes |= {f"{name}.up": module.up, f"{name}.down": module.down}
        self._heads: dict[str, torch.Tensor] = {}
        for layer, head in heads.items():
            self._heads |= {f"heads.{layer}.weight": head.weight, f"heads.{layer}.bias": head.bias}
        self._parameters = self._changes | self._heads
        groups = [{"params": list(some.values())} for some in (self._changes, self._heads)]
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
        self._done, self._total, self._seconds = 0, 0, 0.0
        self._curve: list[dict[str, Any]] = []
        self._points: list[dict[str, Any]] = []  # of steps that are not in the curve yet

    def run(self, folder: Path, model_hash: str, on_step: OnStep) -> Trained:
        """Train to the end, from the folder's checkpoint where it is one of this training.

        Args:
            folder: gets checkpoints.
            model_hash: of the original.
            on_step: progress.
        """
        key = self._key(model_hash)
        found = adapter_checkpoint.load(folder, key)
        if found is not None:
            self._take(found)
        self._total = self._total or self._settings.steps or self._affordable()
        on_step(self._done, self._total)
        for packs in itertools.islice(self._packs(), self._done, self._total):
            started = time.perf_counter()
            self._points.append(self._step(packs))
            self._seconds += time.perf_counter() - started
            self._done += 1
            self._thin_out()
            if self._done % self._settings.checkpoint_steps == 0:
                adapter_checkpoint.save(folder, self._checkpoint(key))
            on_step(self._done, self._total)
        return Trained(self._lora.adapter(), self._done, self._seconds, self._curve)

    def _key(self, model_hash: str) -> str:
        """What is trained on what; the rows by their tokens."""
        tokens = [[list(row.prompt_ids), list(row.generated_ids)] for row in self._rows]
        shapes = {name: list(tensor.shape) for name, tensor in self._parameters.items()}
        facts = [model_hash, asdict(self._settings), tokens, shapes, self._short._asdict()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _affordable(self) -> int:
        """Steps that the minutes are enough for, by the time of a few packs."""
        packs, times = self._packs(), []
        for _ in range(1 + _TIMED):
            started = time.perf_counter()
            self._backward(next(packs)[0], 0)
            times.append(time.perf_counter() - started)
        self._optimizer.zero_grad()
        each = sum(times[1:]) / _TIMED * self._settings.accumulate
        return max(1, int(60 * self._settings.minutes / each))

    def _packs(self) -> Iterator[list[list[int]]]:
        """Numbers of the rows of each pack, for every step."""

        def endless() -> Iterator[list[int]]:
            for epoch in itertools.count():
                seed = self._settings.seed * 1_000_003 + epoch
                order = torch.randperm(
                    len(self._rows), generator=torch.Generator().manual_seed(seed)
                ).tolist()
                tokens = self._settings.pack_tokens
                yield from filled(self._rows, order, tokens, self._num_shared)

        packs = endless()
        while True:
            yield list(itertools.islice(packs, self._settings.accumulate))

    def _step(self, packs: Sequence[Sequence[int]]) -> dict[str, Any]:
        """One step of the optimizer; what the losses were."""
        factor = warm_cosine(self._done, self._total)
        rates = (self._settings.learning_rate, self._settings.head_learning_rate)
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = factor * rate
        self._optimizer.zero_grad()
        said = [one for at, pack in enumerate(packs) for one in self._backward(pack, at)]
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), self._settings.max_norm)
        self._optimizer.step()
        return self._point(said)

    def _backward(self, numbers: Sequence[int], place: int) -> list[Said]:
        """Add a pack's gradient."""
        rows = [self._rows[number] for number in numbers]
        targets = self._targets.of(numbers)
        pack = LoopPack.of(rows, targets, self._short, self._num_shared)
        seed = (self._settings.seed * 1_000_003 + self._done) * 1_009 + place
        draws = torch.rand(2, len(rows), generator=torch.Generator().manual_seed(seed))
        draws = draws.to(pack.token_ids.device)
        bars = LEAST_BAR + (MOST_BAR - LEAST_BAR) * draws[0]
        said = list(self._loop.run(pack, bars, draws[1] < 0.5))
        count = len(pack.deciding) * self._settings.accumulate
        losses = [self._weight(one.layer) * one.surrogate for one in said]
        torch.autograd.backward(torch.stack(losses).sum() / count)
        return said

    def _weight(self, layer: int) -> float:
        if layer == self._num_layers:
            return 1.0
        return self._settings.exit_weight * layer / self._num_layers

    def _point(self, said: Sequence[Said]) -> dict[str, Any]:
        """Of one step: the mean loss of a token, and what it is made of."""
        layers: dict[str, float] = {}
        first = min(one.layer for one in said)
        tokens = sum(one.count for one in said if one.layer == first)
        loss = sum(self._weight(one.layer) * one.loss for one in said) / tokens
        for layer in sorted({one.layer for one in said}):
            some = [one for one in said if one.layer == layer]
            layers[str(layer)] = sum(one.loss for one in some) / max(1, sum(o.count for o in some))
        stayed = sum(one.count for one in said if one.layer == self._num_layers)
        return {"step": self._done, "loss": loss, "layers": layers, "left": 1 - stayed / tokens}

    def _thin_out(self) -> None:
        """Put the mean of some steps into the curve."""
        every = -(-self._total // CURVE_POINTS)
        if len(self._points) < every and self._done < self._total:
            return
        some, self._points = self._points, []

        def mean(values: Sequence[float]) -> float:
            return round(sum(values) / len(values), 5)

        layers = {name: mean([one["layers"][name] for one in some]) for name in some[0]["layers"]}
        point = {"step": self._done, "loss": mean([one["loss"] for one in some])}
        left = mean([one["left"] for one in some])
        self._curve.append(point | {"layers": layers, "left": left})

    def _checkpoint(self, key: str) -> Checkpoint:
        tensors = {name: tensor.detach() for name, tensor in self._parameters.items()}
        for name, tensor in self._parameters.items():
            state = self._optimizer.state[tensor]
            tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
        curve = [*self._curve, *({"open": True} | point for point in self._points)]
        return Checkpoint(key, self._done, self._total, self._seconds, curve, tensors)

    def _take(self, found: Checkpoint) -> None:
        self._done, self._total, self._seconds = found.step, found.total, found.seconds
        self._curve = [point for point in found.curve if "open" not in point]
        self._points = [point for point in found.curve if "open" in point]
        for name, tensor in self._parameters.items():
            with torch.no_grad():
                tensor.copy_(found.tensors[name])
            state = {m: found.tensors[f"{name}.{m}"].to(tensor.device) for m in _MOMENTS}
            self._optimizer.state[tensor] = state | {"step": torch.tensor(float(found.step))}


_MOMENTS = ("exp_avg", "exp_avg_sq")

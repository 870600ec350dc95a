"""The pass that trains is the one that runs: the same tokens leave, the deep ones say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eevp_batch.engine.segmented_model import SegmentedModel
from eevp_batch.engine.sequence import ShortPrompt
from eevp_batch.spec import ExitSpec, SamplingSpec, VocabSpec
from eevp_batch.tune.exit_loop import ExitLoop, LoopPack, Said
from eevp_batch.tune.fit import FitSettings, Gathered, fit_exits, gather
from eevp_batch.tune.head_training import HeadSettings, WhitenedHead
from eevp_batch.tune.lora import LoraModel
from eevp_batch.tune.replay import Replay, ReplaySettings
from eevp_batch.tune.states import Row
from tests.engine.conftest import load_model
from tests.tiny_models import NUM_LAYERS
from tests.tune.rows import make_rows

LAYERS, TAIL = (2, 4), 2
BEGINNING = [7, *range(20, 60)]


class Scene:
    """A tiny model, its rows, what is fitted to it, and the same model to be trained.

    Args:
        path: of the model.
        beginning: that all prompts share.
    """

    def __init__(self, path: Path, beginning: list[int]) -> None:
        self.model = SegmentedModel(load_model(path), [NUM_LAYERS])
        drawn = make_rows(path, self.model, 40)
        self.rows = [Row([*beginning, *r.prompt_ids], r.generated_ids) for r in drawn]
        settings = FitSettings(LAYERS, tail=TAIL, heads=HeadSettings(epochs=0))
        self.found: Gathered = gather(self.model, self.rows, settings)
        self.fitted = fit_exits(self.model, "abc", self.rows, settings)
        self.lead = self.found.settings.lead or 0
        self.short = ShortPrompt(LAYERS[0], TAIL, self.lead)
        heads = {
            layer: WhitenedHead(self.fitted.heads[layer], self.found.seen.taught[layer].units)
            for layer in LAYERS
        }
        self.lora = LoraModel(load_model(path), rank=2, seed=0)
        self.loop = ExitLoop(self.model, self.lora.body, heads, self.fitted.bridges)

    def run(self, rows: list[Row], bar: float, is_short: bool) -> list[Said]:
        """What the loop says of rows to fit to."""
        numbers = [self.found.fitting.index(row) for row in rows]
        targets = self.found.seen.targets.of(numbers)
        pack = LoopPack.of(rows, targets, self.short, self.lead)
        bars = torch.full([len(rows)], bar)
        return list(self.loop.run(pack, bars, torch.full([len(rows)], is_short)))


@pytest.fixture(params=["llama", "mistral", "qwen3"])
def scene(request: pytest.FixtureRequest, tiny_model_path) -> Scene:  # type: ignore[no-untyped-def]
    return Scene(tiny_model_path(request.param), [])


def test_without_exits_the_original_is_held_to_itself(scene: Scene) -> None:
    rows = list(scene.found.fitting[:9])
    said = scene.run(rows, 2.0, False)
    assert [one.layer for one in said] == [*LAYERS, NUM_LAYERS]
    num_tokens = sum(len(row.generated_ids) for row in rows)
    assert {one.count for one in said} == {num_tokens}, "each reaches every exit"
    last = said[-1]
    assert last.loss == pytest.approx(0, abs=1e-3 * num_tokens)
    # The targets are what the engine's own pass says, not what it generated, rounding apart.
    assert last.right == num_tokens


@pytest.mark.parametrize("bar", [0.05, 0.3])
@pytest.mark.parametrize("is_short", [False, True], ids=["whole prompts", "short prompts"])
def test_who_leaves_and_what_the_others_say_is_what_a_replay_says(
    scene: Scene, bar: float, is_short: bool
) -> None:
    compare(scene, bar, is_short)


def test_rows_that_share_a_beginning(tiny_llama: Path) -> None:
    scene = Scene(tiny_llama, BEGINNING)
    assert scene.lead >= len(BEGINNING)
    compare(scene, 0.2, is_short=True)


def compare(scene: Scene, bar: float, is_short: bool) -> None:
    """The loop beside the engine's own segments, on the same rows."""
    rows = list(scene.found.fitting[:9])
    said = scene.run(rows, bar, is_short)
    cut = scene.model.recut([*LAYERS, NUM_LAYERS])
    cut.use(scene.fitted)
    vocab = VocabSpec(top_k=None)
    exits = ExitSpec(layers=list(LAYERS), heads="given", kv="bridge", vocab=vocab)
    short = scene.short if is_short else None
    settings = ReplaySettings(exits, SamplingSpec(max_new_tokens=20), None, [1], None, short)
    (replayed,) = Replay(cut, settings).run(rows, [[bar, bar]])
    # A prompt's last token always runs on, so that a row's first token counts to the end.
    later = []
    for one, row in zip(replayed, rows, strict=True):
        wanted = scene.found.seen.targets.of([scene.found.fitting.index(row)]).best_ids.tolist()
        places = list(zip(one.exit_layers, one.token_ids, wanted, strict=True))
        later += [(layer, token_id == best) for layer, token_id, best in places[1:]]
    for one in said:
        reached = [right for layer, right in later if layer >= one.layer]
        assert one.count == len(reached) + len(rows), f"who comes to layer {one.layer}"
    deep = [right for layer, right in later if layer == NUM_LAYERS]
    assert 0 < len(deep) < len(later), "some leave and some stay"
    firsts = said[-1].right - sum(deep)
    assert (firsts == len(rows)) if not is_short else (0 <= firsts <= len(rows))


def test_the_gradient_is_that_of_the_loss_bridges_included(scene: Scene) -> None:
    """A change in the first layer moves what the last one says by as much as its gradient says.

    Most of the keys that deep tokens see are bridged here, so that it has to pass through them.
    """
    rows = list(scene.found.fitting[:9])
    for module in scene.lora.modules.values():
        module.up.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    module = scene.lora.modules["model.layers.0.mlp.down_proj"]
    last = scene.run(rows, 0.1, True)[-1]
    last.surrogate.backward()
    gradient = module.up.grad
    assert gradient is not None
    place, step = divmod(int(gradient.abs().argmax()), gradient.shape[1]), 2e-3
    losses = []
    for sign in (1, -1):
        module.up.data[place] += sign * step
        moved = scene.run(rows, 0.1, True)[-1]
        assert moved.count == last.count, "as many tokens leave"
        losses.append(moved.loss)
        module.up.data[place] -= sign * step
    found = (losses[0] - losses[1]) / (2 * step)
    assert found == pytest.approx(float(gradient[place]), rel=0.05)

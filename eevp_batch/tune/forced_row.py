"""A row whose text is known, as a sequence that the engine's packing takes."""

from __future__ import annotations

from collections.abc import Sequence

from eevp_batch.engine.sequence import Origin, ShortPrompt, Waiting
from eevp_batch.engine.sequence import Sequence as Generation
from eevp_batch.records import Prompt
from eevp_batch.tune.states import Row


class ForcedRow(Generation):
    """A row whose text is known: at each depth it brings the positions that did not leave before.

    Args:
        row: prompt and generated tokens.
        num_segments: D.
        exit_layers: e_1 < ... < e_D.
        short_prompt: see `ShortPrompt`.
        num_shared: leading tokens whose keys/values are there at every depth.
    """

    def __init__(
        self,
        row: Row,
        num_segments: int,
        exit_layers: Sequence[int],
        short_prompt: ShortPrompt | None,
        num_shared: int,
    ) -> None:
        super().__init__(
            Prompt("", row.fed_ids), num_segments, 1, 0, "bridge", short_prompt=short_prompt
        )
        self._text_starts = len(row.prompt_ids)
        self._exit_layers, self._short, self._num_shared = exit_layers, short_prompt, num_shared
        self.left_at = [num_segments] * len(row.generated_ids)  # depth at which each token left

    def staying(self, depth: int) -> list[int]:
        """Numbers of the generated tokens that are decided at `depth`."""
        return [number for number, left in enumerate(self.left_at) if left >= depth]

    def waiting(self, depth: int) -> Waiting:
        """See `Sequence.waiting`; position t decides generated token t - num_prompt + 1."""
        prompt = range(self._num_shared, self._text_starts)
        skipped, project = range(0), dict[Origin, list[int]]()
        if self._short is not None and depth:
            skipped = self._short.skipped(self._text_starts)
            stopped = [position for position in prompt if position in skipped]
            project = {Origin("prompt", self._short.exit_layer): stopped} if stopped else {}
        run = [position for position in prompt if position not in skipped]
        for number in range(1, len(self.left_at)):
            position, left = self._text_starts + number - 1, self.left_at[number]
            if left >= depth:
                run.append(position)
            else:
                origin = Origin("generated", self._exit_layers[left])
                project.setdefault(origin, []).append(position)
        return Waiting(run, project, range(len(self.staying(depth))))

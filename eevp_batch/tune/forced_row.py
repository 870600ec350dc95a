"""A row whose text is known, as a sequence that the engine's packing takes."""

from __future__ import annotations

from collections.abc import Sequence

from eevp_batch.engine.sequence import Origin, ShortPrompt, Waiting
from eevp_batch.engine.sequence import Sequence as Generation
from eevp_batch.records import Prompt
from eevp_batch.tune.states import Row


class ForcedRow(Generation):
    """A row whose text is known: its prompt enters as in the engine, then all that follows at once.

    Into a segment that has seen the prompt, it brings its generated tokens; no prompt token again.

    Args:
        row: prompt and generated tokens.
        exit_layers: e_1 < ... < e_D.
        short_prompt: see `ShortPrompt`.

    Attributes:
        left_at: depth at which each generated token left, D where none is known to; the first one's
            is not looked at, for what decides it is the prompt's last token, which always runs.
    """

    def __init__(
        self, row: Row, exit_layers: Sequence[int], short_prompt: ShortPrompt | None
    ) -> None:
        prompt, depths = Prompt("", list(row.prompt_ids)), len(exit_layers)
        super().__init__(prompt, depths, 1, 0, "bridge", short_prompt=short_prompt)
        self._exit_layers, self._generated_ids = exit_layers, row.generated_ids
        self.left_at = [depths] * len(row.generated_ids)

    def feed(self) -> None:
        """Append the generated tokens, once every segment has seen the prompt."""
        self.token_ids += self._generated_ids[:-1]

    def deciding(self, depth: int) -> list[int]:
        """Numbers of the generated tokens that are decided when it runs segment `depth` now."""
        if self.filled[depth] < self.num_prompt:
            return [0]
        return [n for n, left in enumerate(self.left_at) if n and left >= depth]

    def waiting(self, depth: int) -> Waiting:
        """See `Sequence.waiting`; nothing looks at what comes after the last token that runs."""
        if self.filled[depth] < self.num_prompt:
            return super().waiting(depth)
        run: list[int] = []
        project: dict[Origin, list[int]] = {}
        for number in range(1, self.deciding(depth)[-1] + 1):
            # Generated token n is decided at the position before its own.
            position, left = self.num_prompt + number - 1, self.left_at[number]
            if left >= depth:
                run.append(position)
            else:
                origin = Origin("generated", self._exit_layers[left])
                project.setdefault(origin, []).append(position)
        return Waiting(run, project, range(len(run)))

"""What a calibration found: every setting that was looked at, and which one is certified."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from eevp_batch.calibration_file import Binding, Calibration, RiskKind
from eevp_batch.errors import CalibrationError
from eevp_batch.spec import PValueKind


@dataclass(frozen=True, slots=True)
class Setting:
    """Thresholds, and what is known of them.

    Attributes:
        thresholds: one for each exit layer before the last.
        shares: of the tuning rows' tokens, who leaves after each of these layers.
        mean_layer: mean number of layers of a token.
        cost: predicted, of a generated token, in the unit of the costs that were given.
        speed: predicted, as a multiple of exits off, prompts included.
        tuning_risk: mean share of tokens of a row that differ, on the tuning rows.
        place: 0-based, in the path from cautious to bold; None: another one is as cautious and
            cheaper.
        calibration_risk: mean loss of the calibration rows; None: not looked at.
        p_value: against H0: risk > delta.
        bound: of the risk, upper, for this setting taken alone, with confidence 1 - epsilon.
    """

    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    mean_layer: float
    cost: float
    speed: float
    tuning_risk: float
    place: int | None = None
    calibration_risk: float | None = None
    p_value: float | None = None
    bound: float | None = None

    @property
    def exit_share(self) -> float:
        """Share of the tokens that leave before the last layer."""
        return sum(self.shares)


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What became of a calibration.

    Attributes:
        settings: the whole grid, from cautious to bold as predicted; the first has no exits at all,
            no pruning either, and shows what the replay itself differs from the engine.
        certified: index of the boldest certified setting; None: none is.
        reason: why none is.
        rows_needed: how many calibration rows would do, where that can be said.
    """

    delta: float
    epsilon: float
    p_value_kind: PValueKind
    risk: RiskKind
    metric: str | None
    num_tuning_rows: int
    num_rows: int
    exit_layers: tuple[int, ...]
    settings: tuple[Setting, ...]
    certified: int | None
    reason: str | None = None
    rows_needed: int | None = None

    @property
    def chosen(self) -> Setting | None:
        """The certified setting."""
        return None if self.certified is None else self.settings[self.certified]

    def to_calibration(self, binding: Binding, facts: dict[str, Any]) -> Calibration:
        """The certificate.

        Args:
            binding: what it holds for.
            facts: what else is worth keeping.

        Raises:
            CalibrationError: nothing was certified.
        """
        chosen = self.chosen
        if chosen is None or chosen.calibration_risk is None or chosen.p_value is None:
            raise CalibrationError(f"nothing was certified: {self.reason}")
        return Calibration(
            created=datetime.now(UTC),
            delta=self.delta,
            epsilon=self.epsilon,
            p_value_kind=self.p_value_kind,
            num_rows=self.num_rows,
            risk=self.risk,
            metric=self.metric,
            thresholds=chosen.thresholds,
            observed_risk=chosen.calibration_risk,
            p_value=chosen.p_value,
            exit_share=min(1.0, chosen.exit_share),
            mean_layer=chosen.mean_layer,
            binding=binding,
            facts=facts,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        names = ("settings", "exit_layers")
        plain = {k: getattr(self, k) for k in self.__slots__ if k not in names}
        settings = [asdict(s) | {"exit_share": s.exit_share} for s in self.settings]
        return plain | {"exit_layers": list(self.exit_layers), "settings": settings}

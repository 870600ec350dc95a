"""What the tests of fitting and calibration share with the engine's."""

from tests.engine.conftest import prompts

__all__ = ["prompts"]

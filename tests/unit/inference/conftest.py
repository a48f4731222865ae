"""Makes the tiny models of every family available to the tests of decoding."""

from tests.unit.components.conftest import make_backbone, model_folder, picture

__all__ = ["make_backbone", "model_folder", "picture"]

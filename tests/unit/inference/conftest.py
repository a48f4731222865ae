"""The tiny models of every family, for the decode engine too."""

from tests.unit.components.conftest import make_backbone, model_folder, picture

__all__ = ["make_backbone", "model_folder", "picture"]

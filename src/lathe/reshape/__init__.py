"""Change the size of a trained model. Operations act on the axes and roles of the blueprint, never on a family."""

from lathe.reshape.resize import METHODS, Resized, resize
from lathe.reshape.state import Step

__all__ = ["METHODS", "Resized", "Step", "resize"]

"""What differs between model families: which layers' masses make VAS, and where visual tokens lie on the image."""

from verl_avar.families.cells import cells
from verl_avar.families.masses import alone, cross_attention_layers, masses, reach

__all__ = ["alone", "cells", "cross_attention_layers", "masses", "reach"]

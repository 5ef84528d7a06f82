"""What one request may ask for: role biases and the form of its scores (`SamplingParams.extra_args`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_BIAS = 20.0  # e^20 already silences or saturates a role; more is a typo, and inf would be NaN after the softmax
SCORE_FORMS = ("summary", "tokens")


@dataclass(frozen=True)
class RequestOptions:
    """visual_bias, system_bias: added to the attention logits of that role's keys, every layer, head and query of the
    request (β of AVAR §2.3; log(1+α_img), log(1−α_sys)). attention_scores: "summary", or "tokens" to add the list of
    per-token ratios. Raises ValueError for a value out of range."""

    visual_bias: float = 0.0
    system_bias: float = 0.0
    attention_scores: str = "summary"

    def __post_init__(self) -> None:
        for name in ("visual_bias", "system_bias"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value) or abs(value) > MAX_BIAS:
                raise ValueError(f"{name} must be finite and within ±{MAX_BIAS:g}, got {value!r}")
        if self.attention_scores not in SCORE_FORMS:
            raise ValueError(f"attention_scores must be one of {', '.join(SCORE_FORMS)}, got {self.attention_scores!r}")

    @property
    def biased(self) -> bool:
        return self.visual_bias != 0 or self.system_bias != 0

    @property
    def cache_salt(self) -> str:
        """Keeps the prefix cache of this bias apart: a bias changes every key and value after the first layer. Empty
        without a bias."""
        if not self.biased:
            return ""
        return f"avar:{float(self.visual_bias)!r}:{float(self.system_bias)!r}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], defaults: RequestOptions | None = None) -> RequestOptions:
        """Reads our keys out of `extra_args` (or of the connector's config) over the engine's defaults.

        Keys of other plugins are left alone; one that starts like ours and is none of them is a ValueError.
        """
        merged = (defaults or cls()).as_dict()
        for key, value in values.items():
            if key in OPTION_KEYS:
                merged[key] = value
            elif key.startswith(("visual_", "system_", "attention_")):
                raise ValueError(f"unknown option {key!r}; known: {', '.join(OPTION_KEYS)}")
        return cls(**merged)


OPTION_KEYS = tuple(field.name for field in fields(RequestOptions))

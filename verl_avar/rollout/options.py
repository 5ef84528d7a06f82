"""What one request may ask for: role biases and the form of its scores (`SamplingParams.extra_args`)."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MAX_BIAS = 20.0  # e^20 already silences or saturates a role; more is a typo, and inf would be NaN after the softmax
SCORE_FORMS = ("summary", "tokens")
LAYERS_KEY = "attention_layers"  # an option of the engine (`probed_layers`), not of a request
LIKE_OURS = ("visual", "system", "attention")  # a key that starts so is ours or a mistake


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
                raise ValueError(f"{name} must be a number, got {reprlib.repr(value)}")
            if not abs(value) <= MAX_BIAS:  # NaN compares false; an int may be too large for a float
                raise ValueError(f"{name} must be finite and within ±{MAX_BIAS:g}, got {reprlib.repr(value)}")
        if not isinstance(self.attention_scores, str) or self.attention_scores not in SCORE_FORMS:
            raise ValueError(
                f"attention_scores must be one of {', '.join(SCORE_FORMS)}, got {reprlib.repr(self.attention_scores)}"
            )

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
        """Reads our keys out of `extra_args` over the engine's defaults.

        Keys of other plugins are left alone; one that starts like ours (`LIKE_OURS`) and is none is a ValueError.
        """
        merged = (defaults or cls()).as_dict()
        for key, value in values.items():
            if key in OPTION_KEYS:
                merged[key] = value
            elif key == LAYERS_KEY:
                raise ValueError(f"{key} is engine-wide: set it where the engine starts, not in a request")
            elif str(key).casefold().startswith(LIKE_OURS):
                raise ValueError(f"unknown option {reprlib.repr(key)}; known: {', '.join(OPTION_KEYS)}")
        return cls(**merged)

    @classmethod
    def from_config(cls, values: Mapping[str, Any]) -> RequestOptions:
        """The engine's defaults, from the connector's config. Every key is ours: an unknown one is a ValueError."""
        known = (*OPTION_KEYS, LAYERS_KEY)
        if strange := [key for key in values if key not in known]:
            raise ValueError(f"unknown option {reprlib.repr(strange[0])}; known: {', '.join(known)}")
        return cls(**{key: value for key, value in values.items() if key != LAYERS_KEY})


OPTION_KEYS = tuple(field.name for field in fields(RequestOptions))

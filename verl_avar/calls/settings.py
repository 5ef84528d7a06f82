"""How an endpoint is reached, as the block `endpoints` of a config has it."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class Endpoint:
    """An OpenAI-compatible server. Nothing is sent to any other address: redirects are not followed."""

    base_url: str = MISSING  # http(s)://…/v1
    api_key_env: str | None = None  # environment variable that holds the key; null: the server asks for none
    concurrency: int = 16  # requests in flight
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None  # prompt and completion
    timeout_s: float = 300.0  # of one request
    attempts: int = 8  # requests for one call, before the row is left as call_failed
    backoff_s: float = 1.0  # before the second attempt; doubles, with jitter, up to backoff_max_s
    backoff_max_s: float = 60.0
    proxy: str | None = None  # only this one: proxies of the environment are not used

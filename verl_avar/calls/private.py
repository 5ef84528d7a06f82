"""Keys stay out of settings: files are copied, logged and put into repositories."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from verl_avar.errors import ConfigError

SECRETS = re.compile(
    r"(x-)?api[-_]?key|(access[-_]?)?(key|token)|(proxy-)?authorization|secret|password", re.IGNORECASE
)


def check_address(address: str, schemes: tuple[str, ...], what: str) -> None:
    """Raises ConfigError for what is no address, or could hold a key; it is not repeated then."""
    try:
        parts = urlsplit(address)
        host, secret, _ = parts.hostname, "@" in parts.netloc or parts.query or parts.fragment, parts.port
    except ValueError:
        host, secret = None, "@" in address
    if secret:
        raise ConfigError(f"{what} has a name, password or ?query: keys don't go into files; see api_key_env")
    if not host or address.partition("://")[0] not in schemes:
        raise ConfigError(f"{what} is '{address}'; wanted {schemes[0]}(s)://HOST…")


def check_no_key(node: Any, path: Any, where: str = "") -> None:
    """Raises ConfigError where a key stands among the settings."""
    if isinstance(node, dict):
        for key, value in node.items():
            name = f"{where}.{key}" if where else str(key)
            if SECRETS.fullmatch(str(key)):
                raise ConfigError(f"{path}: {name}: keys don't go into files; name its variable in api_key_env")
            check_no_key(value, path, name)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            check_no_key(value, path, f"{where}[{index}]")

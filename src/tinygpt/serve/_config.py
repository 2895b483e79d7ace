"""What a server allows."""

import ipaddress
import re
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from tinygpt.config import Config

_Strings = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


class ServerConfig(Config):
    """Where a server listens, and the limits that keep one client from taking it all.

    Args:
        host: Address to listen on. The default is reached from this machine alone.
        port: Port; 0 takes a free one.
        api_key: What clients must send as `Authorization: Bearer KEY`; `None` asks for nothing.
        allow_origins: Origins of other web sites whose pages may use the server, such as `https://example.org`;
            none by default.
        num_slots: Texts written at a time.
        max_queue: Texts that may wait for a slot. What comes beyond is refused with status 429.
        max_request_tokens: Most tokens of a text, prompt included; `None` for the model's context.
        max_body_bytes: Longest body of a request.
        timeout_seconds: Longest time of a request, waiting included. A client that reads too slowly is cut off by it
            as well.
        grace_seconds: How long running texts may go on when the server stops.

    Raises:
        ConfigError: If a field is out of range.

    Example:
        ```python
        from tinygpt.serve import ServerConfig

        config = ServerConfig(port=0, num_slots=4, max_queue=16)
        ```
    """

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[str, Field(min_length=1)] | None = Field(default=None, repr=False)
    allow_origins: _Strings = ()
    num_slots: Annotated[int, Field(ge=1)] = 8
    max_queue: Annotated[int, Field(ge=0)] = 64
    max_request_tokens: Annotated[int, Field(ge=2)] | None = None
    max_body_bytes: Annotated[int, Field(ge=1)] = 1 << 20
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    grace_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 10.0

    @model_validator(mode="after")
    def _origins_can_match(self) -> "ServerConfig":
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(
                    f"allow_origins has {origin!r}, which no browser sends; write https://example.org, without a path."
                )
        return self

    @model_validator(mode="after")
    def _key_can_be_sent(self) -> "ServerConfig":
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key must be printable ASCII, or no client can send it.")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

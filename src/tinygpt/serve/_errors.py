"""Errors in the shape in which OpenAI's API gives them."""

from typing import Any


class RequestError(Exception):
    """A request that is refused or failed; what it says is meant for the client.

    Args:
        status: HTTP status.
        message: What was given, what is allowed, what to do.
        kind: The `type` of OpenAI's errors.
        param: The field of the request that is wrong.
        code: A word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

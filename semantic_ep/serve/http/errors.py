"""Errors as OpenAI's clients expect them: one JSON shape, whatever went wrong.

`{"error": {"message", "type", "param", "code"}}`, with a `Retry-After` header where trying again
makes sense.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
    507: "internal_server_error",
}


class ErrorDetail(BaseModel):
    """What went wrong.

    Attributes:
        message: For people.
        type: Class of error.
        param: Path of the request's field that is at fault.
        code: For programs.
    """

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Body of every response that is an error."""

    error: ErrorDetail


# What every route may answer besides its own body, for the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "the request is at fault"},
    503: {"model": ErrorBody, "description": "the server takes no requests now"},
}


class ApiError(Exception):
    """A request ends with this status.

    Args:
        status: HTTP status.
        message: For people, in the house form (`semantic_ep.errors.explain`).
        param: The request's field at fault.
        code: For programs.
        retry_after: Seconds after which another try may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        # A lone surrogate in what the client sent cannot be encoded.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        detail = ErrorDetail(
            message=message,
            type=_TYPES.get(self.status, "invalid_request_error"),
            param=self.param,
            code=self.code,
        )
        return ErrorBody(error=detail).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """Headers to send."""
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.body, status_code=self.status, headers=self.headers)


def install_handlers(app: FastAPI) -> None:
    """Make every error of the application's routes an `ErrorBody`."""

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return from_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(_: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, str(error.detail)).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_failure(_: Request, __: Exception) -> JSONResponse:
        # Starlette raises it again behind the response, and the server logs it.
        return ApiError(500, "the server failed; its log says why").response()


def from_validation(mistakes: list[Mapping[str, Any]] | Any) -> ApiError:
    """One 400 that lists every mistake of a body, with the first one's field as `param`."""
    described: dict[str, str] = {}
    for mistake in mistakes:
        location = [part for part in mistake["loc"] if part != "body"]
        path = ".".join(str(part) for part in location)
        described.setdefault(path, f"{path}: {mistake['msg']}" if path else str(mistake["msg"]))
    first = next(iter(described), "")
    return ApiError(400, "; ".join(described.values()), param=first or None, code="invalid_value")

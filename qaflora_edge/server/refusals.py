"""Failures as OpenAI's clients expect them: a status, and an object `error`."""

from collections.abc import Mapping

from starlette.responses import JSONResponse, Response

from qaflora_edge.errors import (
    BusyError,
    CancelledError,
    ChatTemplateError,
    ContextError,
    GrammarError,
    OptionError,
    PromptError,
    QafloraError,
    StrategyError,
    ToolsError,
    WeightsError,
    WorkerError,
)

RETRY_AFTER_S = 2
Params = Mapping[type[QafloraError], str | None]

# What the sender of a request can cure -> the field that it is about, where the error names none.
_OF_REQUEST: Params = {
    OptionError: None,
    PromptError: "messages",
    ToolsError: "tools",
    ChatTemplateError: "messages",
    GrammarError: "response_format",
    StrategyError: "fusion",
    WeightsError: "fusion",
}


class Refusal(Exception):
    """Why a request is not answered.

    kind         OpenAI's `type`
    param        the field that is wrong
    code         what programs tell it by
    is_retried   whether it may be answered at another time
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        is_retried: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"Retry-After": str(RETRY_AFTER_S)} if is_retried else {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        """Return it as a whole response."""
        return JSONResponse(self.body, self.status, self.headers)


def wrong_field(param: str, found: object, expected: str) -> Refusal:
    """Return status 400 for a field with a wrong value."""
    shown = repr(found)
    shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
    message = f"The field {param} is {shown}, expected {expected}."
    return Refusal(400, message, param=param, code="invalid_value")


def unavailable(message: str, code: str) -> Refusal:
    """Return status 503: it may be answered at another time."""
    return Refusal(503, message, kind="server_error", code=code, is_retried=True)


def refusal(
    error: BaseException, *, is_expired: bool = False, params: Params | None = None
) -> Refusal:
    """Return what is answered for a failure; what is inside the server stays there.

    is_expired  whether the request has used up its time
    params      the fields that errors are about in this request, where that is another one
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, CancelledError) and is_expired:
        return unavailable("The request took too long; try again, or ask for less.", "timeout")
    if isinstance(error, BusyError | CancelledError):
        return unavailable("The server is shutting down.", "shutting_down")
    if isinstance(error, WorkerError):
        message = "A machine that holds layers of the model is lost; the server ends."
        return unavailable(message, "model_unavailable")
    for kind, param in {**_OF_REQUEST, **(params or {})}.items():
        if isinstance(error, kind):
            named = error.option if isinstance(error, OptionError) else None
            is_long = isinstance(error, ContextError)
            code = "context_length_exceeded" if is_long else "invalid_value"
            return Refusal(400, str(error), param=named or param, code=code)
    message = "The server failed to answer; its log says why."
    return Refusal(500, message, kind="server_error", code="internal_error")

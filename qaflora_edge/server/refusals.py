"""Why a request is not answered, in the shape of who asks."""

from starlette.responses import JSONResponse, Response

from qaflora_edge import errors
from qaflora_edge.formats.inputs import Json

RETRY_AFTER_S = 2
MESSAGES = "/v1/messages"
# How Anthropic's API calls what a status says.
_ANTHROPIC = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    500: "api_error",
    503: "overloaded_error",
    507: "api_error",
}
Fields = tuple[str, ...]
_TEXTS: Fields = ("messages", "input", "prompt", "tokens", "content")
_FORMS: Fields = ("grammar", "json_schema", "response_format", "tools", "text")
_MIX: Fields = ("fusion", "lora", "adapter")
# What the sender of a request can cure -> the fields that may cause it.
_CAUSES: dict[type[Exception], Fields] = {
    errors.OptionError: (),  # names its field
    errors.PromptError: _TEXTS,
    errors.ToolsError: ("tools",),
    errors.ChatTemplateError: _TEXTS,
    errors.GrammarError: _FORMS,
    errors.StrategyError: _MIX,
    errors.WeightsError: _MIX,
}


class Refusal(Exception):
    """Say why a request is not answered, in OpenAI's shape; 503 may be answered later.

    param  the field that is wrong
    code   what programs tell it by
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error"
        if status in (500, 503, 507):
            kind = "server_error"
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body: Json = {"error": error}

    def response(self, path: str) -> Response:
        headers = {}
        if self.status == 503:
            headers["Retry-After"] = str(RETRY_AFTER_S)
        body = self.body_for(path)
        return JSONResponse(body, self.status, headers)

    def body_for(self, path: str) -> Json:
        """Return what is told at a path: in Ollama's its message alone."""
        if path.startswith("/api/"):
            return {"error": str(self)}
        if path.startswith(MESSAGES):
            kind = _ANTHROPIC.get(self.status, "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": str(self)}}
        return self.body


def refusal(error: BaseException, body: object = None, *, is_expired: bool = False) -> Refusal:
    """Return the answer to a failure. What is inside the server stays there.

    is_expired  whether the request has used up its time
    """
    if isinstance(error, Refusal):
        return error
    if isinstance(error, errors.CancelledError) and is_expired:
        message = "The request took too long; try again, or ask for less."
        return Refusal(503, message, code="timeout")
    if isinstance(error, errors.BusyError | errors.CancelledError):
        return Refusal(503, "The server is shutting down.", code="shutting_down")
    if isinstance(error, errors.ModalityError):
        return Refusal(501, str(error), param="messages", code="not_implemented")
    code = "invalid_value"
    if isinstance(error, errors.ContextError):
        code = "context_length_exceeded"
    for kind, fields in _CAUSES.items():
        if isinstance(error, kind):
            param = _cause(error, fields, body)
            return Refusal(400, str(error), param=param, code=code)
    return Refusal(500, "The server failed to answer; its log says why.", code="internal_error")


def _cause(error: BaseException, fields: Fields, body: object) -> str | None:
    """Name the field of a body that is wrong: the error knows, or the first one that is there."""
    if isinstance(error, errors.OptionError):
        return error.option
    for name in fields:
        if getattr(body, name, None) is not None:
            return name
    return None

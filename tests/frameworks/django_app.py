"""The contract's app in Django: settings and views in one file, as WSGI and as ASGI."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import django
from django.conf import settings

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="for tests",
        MIDDLEWARE=[f"{__name__}.middleware", "django.middleware.common.CommonMiddleware"],
        DATA_UPLOAD_MAX_MEMORY_SIZE=None,
        LOGGING_CONFIG=None,
        USE_TZ=True,
    )
    django.setup()

from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    HttpResponseRedirect,
    JsonResponse,
    StreamingHttpResponse,
)
from django.urls import path


def middleware(get_response: Callable[[HttpRequest], HttpResponse]) -> Callable[[HttpRequest], HttpResponse]:
    def handle(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response["X-Middleware"] = "1"
        return response

    return handle


def hello(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"hello": "world"})


def echo(request: HttpRequest, rest: str) -> HttpResponse:
    own = {name: value for name, value in request.headers.items() if name.startswith("X-") or name == "Host"}
    return JsonResponse(
        {
            "method": request.method,
            "path": request.path,
            "query": {key: request.GET.getlist(key) for key in request.GET},
            "headers": own,
            "url": request.build_absolute_uri(),
            "body": request.body.decode(),
        }
    )


def form(request: HttpRequest) -> HttpResponse:
    return JsonResponse(request.POST.dict())


def upload(request: HttpRequest) -> HttpResponse:
    file: Any = request.FILES["file"]
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    return JsonResponse({"name": file.name, "sha256": digest.hexdigest()})


def raw(request: HttpRequest) -> HttpResponse:
    digest, size = hashlib.sha256(), 0
    while piece := request.read(1 << 16):
        digest.update(piece)
        size += len(piece)
    return JsonResponse({"size": size, "sha256": digest.hexdigest()})


def streamed(request: HttpRequest, pieces: list[str], content_type: str) -> HttpResponse:
    """The pieces, from an async iterator under ASGI, as Django wants them there."""

    async def asynchronous() -> AsyncIterator[str]:
        for piece in pieces:
            yield piece

    def synchronous() -> Iterator[str]:
        yield from pieces

    source: Any = asynchronous() if hasattr(request, "scope") else synchronous()
    response: Any = StreamingHttpResponse(source, content_type=content_type)
    return response


def stream(request: HttpRequest) -> HttpResponse:
    return streamed(request, [f"piece {number}\n" for number in range(100)], "text/plain; charset=utf-8")


def sse(request: HttpRequest) -> HttpResponse:
    return streamed(request, [f"event: tick\ndata: {number}\n\n" for number in range(5)], "text/event-stream")


def ticks(request: HttpRequest) -> HttpResponse:
    """Five lines, 50 ms apart, each with the time of its writing."""

    async def asynchronous() -> AsyncIterator[str]:
        for _ in range(5):
            yield f"{time.monotonic()}\n"
            await asyncio.sleep(0.05)

    def synchronous() -> Iterator[str]:
        for _ in range(5):
            yield f"{time.monotonic()}\n"
            time.sleep(0.05)

    source: Any = asynchronous() if hasattr(request, "scope") else synchronous()
    response: Any = StreamingHttpResponse(source, content_type="text/plain")
    return response


def go(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/hello")


def cookies(request: HttpRequest) -> HttpResponse:
    response = JsonResponse(request.COOKIES)
    response.set_cookie("a", "1")
    response.set_cookie("b", "2", httponly=True)
    return response


def empty(request: HttpRequest, status: int) -> HttpResponse:
    return HttpResponse(status=status)


def file(request: HttpRequest) -> HttpResponse:
    response: Any = FileResponse(io.BytesIO(b"0123456789" * 1000), content_type="application/octet-stream")
    return response


def error(request: HttpRequest) -> HttpResponse:
    raise ValueError("boom in the app")


def background(request: HttpRequest) -> HttpResponse:
    class Noting(JsonResponse):  # type: ignore[misc]
        def close(self) -> None:
            super().close()
            Path(request.GET["note"]).write_text("done")

    return Noting({"started": True})


urlpatterns = [
    path("hello", hello),
    path("echo/<path:rest>", echo),
    path("form", form),
    path("upload", upload),
    path("raw", raw),
    path("stream", stream),
    path("sse", sse),
    path("ticks", ticks),
    path("redirect", go),
    path("cookies", cookies),
    path("empty/<int:status>", empty),
    path("file", file),
    path("error", error),
    path("background", background),
]

wsgi = get_wsgi_application()
asgi = get_asgi_application()

"""A model provider as a Starlette app: the chat API of OpenAI and the messages API of Anthropic.

The model's name says what it does: `good` answers, `crash` dies, `crash-late` dies in mid-stream, `hang` never answers.
Each token holds the time of its writing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PAUSE = 0.05
TOKENS = 6


async def begin(request: Request) -> Any:
    """Read the request, note that it came, and do what its model does."""
    asked = await request.json()
    if journal := os.environ.get("JOURNAL"):
        with Path(journal).open("a") as file:
            file.write(f"{asked['model']}\n")
    if asked["model"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if asked["model"] == "hang":
        await asyncio.sleep(1000)
    return asked


async def tokens(model: str, count: int) -> AsyncIterator[str]:
    for number in range(count):
        if number:
            await asyncio.sleep(PAUSE)
        if model == "crash-late" and number == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        yield f"{number} {time.monotonic()}\n"


async def chat(request: Request) -> Response:
    asked = await begin(request)
    key = request.scope["extensions"]["blastdoor"]["context"].delegated_api_key_id
    answer = {"id": "chat-1", "created": 1, "model": asked["model"], "object": "chat.completion"}
    if not asked.get("stream"):
        message = {"role": "assistant", "content": f"hello {key}"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return JSONResponse(
            {**answer, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
        )

    async def events() -> AsyncIterator[str]:
        async for token in tokens(asked["model"], asked.get("max_completion_tokens", TOKENS)):
            choice = {"index": 0, "delta": {"content": token}, "finish_reason": None}
            yield event({**answer, "object": "chat.completion.chunk", "choices": [choice]})
        yield "data: [DONE]\n\n"
        await asyncio.sleep(PAUSE)  # the stream's end comes after the last thing that the SDK wants

    return StreamingResponse(events(), media_type="text/event-stream")


async def messages(request: Request) -> Response:
    asked = await begin(request)
    answer = {
        "id": "msg-1",
        "type": "message",
        "role": "assistant",
        "model": asked["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 1, "output_tokens": 2},
    }
    if not asked.get("stream"):
        return JSONResponse({**answer, "content": [{"type": "text", "text": "hello"}], "stop_reason": "end_turn"})

    async def events() -> AsyncIterator[str]:
        yield event({"type": "message_start", "message": answer})
        yield event({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        async for token in tokens(asked["model"], asked["max_tokens"]):
            delta = {"type": "text_delta", "text": token}
            yield event({"type": "content_block_delta", "index": 0, "delta": delta})
        yield event({"type": "content_block_stop", "index": 0})
        yield event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 9}})
        yield event({"type": "message_stop"})

    return StreamingResponse(events(), media_type="text/event-stream")


def event(data: dict[str, Any]) -> str:
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n"


app = Starlette(
    routes=[
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/messages", messages, methods=["POST"]),
    ]
)

"""The FastAPI app that is served under load: a small answer, a slow stream, and a segfault on demand."""

import asyncio
import ctypes
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

app = FastAPI()


@app.get("/")
async def index() -> dict[str, Any]:
    return {"message": "hello", "items": list(range(20))}


@app.get("/stream")
async def stream(tokens: int) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        for _ in range(tokens):
            yield f"data: {time.time()}\n\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/die")
async def die() -> str:
    ctypes.string_at(0)
    return "alive"

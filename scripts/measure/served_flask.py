"""The Flask app that is served under load: a small answer, and a segfault on demand."""

import ctypes

from flask import Flask, Response, jsonify

app = Flask(__name__)


@app.get("/")
def index() -> Response:
    return jsonify(message="hello", items=list(range(20)))


@app.get("/die")
def die() -> str:
    ctypes.string_at(0)
    return "alive"

"""What the tests look at behind a `requests.Response`."""

from __future__ import annotations

from typing import Any, cast

import requests

from runner import Job
from transport.requests import RawResponse


def raw(response: requests.Response) -> RawResponse:
    """The raw response, as the adapter made it."""
    return cast("RawResponse", response.raw)


def job_of(response: requests.Response) -> Job:
    """The job behind a response."""
    body: Any = raw(response)._fp
    job: Job = body._job
    return job

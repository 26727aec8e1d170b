"""transport.route, identity and factory: whose request it is, and where it goes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner import ConfigurationError, Pool
from transport import (
    MissingIdentity,
    Route,
    TargetEscapes,
    TransportFactory,
    UnknownProvider,
    attribution,
    delegated_api_key_id,
)

MOUNT = "/api/v2/aibridge/openai"


@pytest.mark.parametrize(
    ("target", "served"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/", "/"),
        ("/v1/", "/v1/"),
        ("/v1?a=b&c", "/v1?a=b&c"),
        ("/v1?", "/v1?"),
        ("/v1?next=/../..//x", "/v1?next=/../..//x"),
        ("/a%2Fb", "/a%2Fb"),
        ("/a%2fb%20c%C3%A9", "/a%2fb%20c%C3%A9"),
        ("//a///b//", "/a/b/"),
        ("/a/./b", "/a/b"),
        ("/a/../b", "/b"),
        ("/a/b/..", "/a/"),
        ("/a/b/.", "/a/b/"),
        ("/a/%2e%2E/b", "/b"),
        ("/a/%2e/b", "/a/b"),
        ("/.hidden/..x/...", "/.hidden/..x/..."),
        ("/a/..", "/"),
        ("/x%2F..%2Fy", "/x%2F..%2Fy"),
    ],
)
def test_paths_move_under_the_mount(target: str, served: str) -> None:
    """T3: root, provider, original path; cleaned of doubled slashes and dots, the rest byte for byte."""
    assert Route("openai").rewrite(target) == MOUNT + served
    assert Route("openai", root="/x").rewrite(target) == "/x/openai" + served
    assert Route("openai", root="").rewrite(target) == "/openai" + served


@pytest.mark.parametrize(
    "target",
    [
        "/..",
        "/../x",
        "/a/../../x",
        "/%2e%2e/x",
        "/%2E./x",
        "/.%2e/x",
        "/a/..%2f../x",
        "/..%2fx",
        "/..%2Fx",
        "/a%2f..%2f..%2fx",
        "/..\\x",
        "/..%5cx",
        "/%252e%252e/x",
        "/%25252e%25252e%25252fx",
        "//../x",
        "/./../x",
        "/x\\y/../..%2fz",
        "/%" + "25" * 20 + "2e/x",
    ],
)
def test_paths_that_climb_out_are_refused(target: str) -> None:
    """T3: encoded or not, once or many times."""
    with pytest.raises(TargetEscapes, match=r"mount|over and over"):
        Route("openai").rewrite(target)


@given(st.lists(st.sampled_from(["/", ".", "..", "a", "%2e", "%2E", "%2f", "%5C", "\\", "%25", "2e", "?", "#"])))
def test_no_path_leaves_the_mount(parts: list[str]) -> None:
    """T3: what is let through stays under the mount, also after the handler has decoded it."""
    try:
        served = Route("openai").rewrite("/" + "".join(parts))
    except TargetEscapes:
        return
    path = served.partition("?")[0]
    for _ in range(3):
        assert path == MOUNT or path.startswith(MOUNT + "/")
        depth = 0
        for segment in path[len(MOUNT) :].replace("\\", "/").split("/"):
            depth += -1 if segment == ".." else segment not in ("", ".")
            assert depth >= 0
        path = unquote(path)


@pytest.mark.parametrize(
    "provider", ["", "a/b", "a\\b", "a%2fb", "a?b", "a#b", ".", "..", " ", "a b", "a\tb", "a\n", "\x00", "ä", None, 5]
)
def test_a_provider_is_one_plain_segment(provider: str) -> None:
    """T2: what is none is refused when the transport is asked for."""
    factory = TransportFactory(Pool("a:b"))
    with pytest.raises(ConfigurationError, match="provider"):
        factory.transport_for(provider, source="agents")
    with pytest.raises(ConfigurationError, match="provider"):
        TransportFactory({provider: Pool("a:b")})


@pytest.mark.parametrize("root", ["x", "/x/", "/", "/a b", "/..", "/a%2fb", "/x?y"])
def test_a_root_is_a_path(root: str) -> None:
    """T3: the root is a setting, and checked when it is set."""
    with pytest.raises(ConfigurationError, match="root"):
        TransportFactory(Pool("a:b"), root=root)


def test_no_pool_registered() -> None:
    """T2: a clear error from transport_for, not from the first request."""
    empty: dict[str, Pool] = {}
    for nothing in (None, empty):
        with pytest.raises(ConfigurationError, match="no pool is registered"):
            TransportFactory(nothing).transport_for("openai")


def test_a_pool_per_provider() -> None:
    """T1: a mapping gives each provider its pool; an unknown one is an error when the transport is asked for."""
    one, two = Pool("a:b"), Pool("c:d")
    factory = TransportFactory({"openai": one, "anthropic": two})
    assert factory.pool_for("openai") is one
    assert factory.pool_for("anthropic") is two
    with pytest.raises(UnknownProvider, match="anthropic, openai"):
        factory.transport_for("mistral")


def test_every_client_gets_the_same_route() -> None:
    """T1: route_for gives what transport_for uses."""
    route = TransportFactory(Pool("a:b"), root="/r").route_for("openai", source="agents")
    assert (route.mount, route.source) == ("/r/openai", "agents")


def test_identity_is_asked_for() -> None:
    """T4: missing or empty is an error that names what to do."""
    route = Route("openai")
    with pytest.raises(MissingIdentity, match="delegated_api_key_id"):
        route.context()
    with pytest.raises(MissingIdentity, match="empty"), delegated_api_key_id(""):
        pass
    with pytest.raises(TypeError), delegated_api_key_id(None):  # type: ignore[arg-type]
        pass
    with delegated_api_key_id("key-1"):
        assert route.context().delegated_api_key_id == "key-1"
        with delegated_api_key_id("key-2"):
            assert route.context().delegated_api_key_id == "key-2"
        assert route.context().delegated_api_key_id == "key-1"
    with pytest.raises(MissingIdentity):
        route.context()


def test_identity_belongs_to_its_context() -> None:
    """T4: another thread has to give its own; a copied context takes it along."""
    route = Route("openai")
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(route.context().delegated_api_key_id)
        except MissingIdentity as error:
            outcome.append(type(error))

    with delegated_api_key_id("key-1"):
        context = copy_context()
        for target in (ask, lambda: context.run(ask)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert outcome == [MissingIdentity, "key-1"]


def test_attribution_adds_up() -> None:
    """T6: a str-to-str mapping on the context, the inner block's on top."""
    route = Route("openai", "agents")
    with delegated_api_key_id("k"), attribution(workspace="w1", user="u"):
        with attribution(workspace="w2"):
            assert route.context().attribution == {"workspace": "w2", "user": "u"}
        assert route.context().attribution == {"workspace": "w1", "user": "u"}
        assert (route.context().provider, route.context().source) == ("openai", "agents")
    with pytest.raises(TypeError, match="workspace"), attribution(workspace=1):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize(
    ("location", "mapped"),
    [
        (MOUNT + "/v1/x?y=1#z", "/v1/x?y=1#z"),
        (MOUNT, "/"),
        (MOUNT + "/", "/"),
        (MOUNT + "?a=b", "/?a=b"),
        (MOUNT + "2/x", MOUNT + "2/x"),
        (MOUNT + "//evil.example/x", "/evil.example/x"),
        ("https://api.openai.com" + MOUNT + "/v1", "https://api.openai.com/v1"),
        ("HTTPS://API.openai.com" + MOUNT + "/v1", "HTTPS://API.openai.com/v1"),
        ("//api.openai.com" + MOUNT + "/v1", "//api.openai.com/v1"),
        ("https://api.openai.com" + MOUNT, "https://api.openai.com/"),
        ("https://other.example" + MOUNT + "/v1", "https://other.example" + MOUNT + "/v1"),
        ("http://api.openai.com" + MOUNT + "/v1", "http://api.openai.com" + MOUNT + "/v1"),
        ("https://api.openai.com:444" + MOUNT + "/v1", "https://api.openai.com:444" + MOUNT + "/v1"),
        ("/elsewhere", "/elsewhere"),
        ("relative/path", "relative/path"),
        ("../up", "../up"),
        ("?query", "?query"),
        ("", ""),
        ("http://[broken", "http://[broken"),
    ],
)
def test_locations_are_mapped_back(location: str, mapped: str) -> None:
    """T8: inside the mount they become the caller's own URL space, elsewhere they stay."""
    headers = [("x", "1"), ("Location", location), ("content-location", location)]
    restored = Route("openai").restore_locations(headers, "https", "api.openai.com")
    assert restored == [("x", "1"), ("Location", mapped), ("content-location", mapped)]


@pytest.mark.parametrize("location", ["http://ap\tp.local/x", "http://app.local:x/y", "//[", "http:/api", "http://"])
def test_locations_that_make_no_sense(location: str) -> None:
    """T8: they stay as they are."""
    headers = [("Location", location)]
    assert Route("openai").restore_locations(headers, "http", "app.local") == headers


def test_a_host_named_like_its_scheme() -> None:
    """T8: found where the authority stands, and nowhere before it."""
    location = f"http://http{MOUNT}/x"
    assert Route("openai").restore_locations([("Location", location)], "http", "http") == [
        ("Location", "http://http/x")
    ]


def test_a_transport_asked_for_is_not_a_request(start: Callable[..., Pool]) -> None:
    """T2: asking for a transport starts nothing."""
    pool = Pool("tests.handlers:app")
    TransportFactory(pool).transport_for("openai")
    assert pool._supervisor is None

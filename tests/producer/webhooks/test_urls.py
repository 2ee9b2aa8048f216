"""Which URLs and secrets of webhooks are accepted, and what is ever shown of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nightherd.errors import SettingsError, UsageError
from nightherd.settings import Settings, load_settings
from producer.webhooks.urls import check_urls, shown_url
from tests.receiver import SECRET

MakeSettings = Callable[..., Settings]


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example/a?b=c",
        "http://hooks.example:8080",
        "https://93.184.215.14/",
        "https://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/",
        "env:HOOK_URL",
    ],
)
def test_good_urls(make_settings: MakeSettings, url: str) -> None:
    check_urls(make_settings(webhook_secret=SECRET), on_complete=url, on_failure=None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://hush.example/", "must be an http:// or https:// URL"),
        ("hush.example/a", "must be an http:// or https:// URL"),
        ("https://", "must be an http:// or https:// URL"),
        ("", "must be an http:// or https:// URL"),
        ("https://me:hush@a.example/", "must hold no user or password"),
        ("https://hush@a.example/", "must hold no user or password"),
        ("https://a.example:hush/", "is no URL"),
        ("https://[a.example/", "is no URL"),
        ("https://a.example/hush hush", "without spaces"),
        ("https://ä.example/hush", "without spaces"),
        ("https://a.example/hush\r\nx: y", "without spaces"),
        ("https://a.example/" + "hush" * 600, "at most 2000"),
        ("env:hush hush", "after env: comes the name"),
        ("https://127.0.0.1/hush", "127.0.0.1 is not public"),
        ("https://[::ffff:10.0.0.1]/hush", "::ffff:10.0.0.1 is not public"),
        ("http://localhost:8000/hush", "localhost is not public"),
    ],
)
def test_bad_urls_are_one_line_that_repeats_none_of_it(
    make_settings: MakeSettings, url: str, message: str
) -> None:
    with pytest.raises(UsageError) as error:
        check_urls(make_settings(webhook_secret=SECRET), on_failure=url)
    assert str(error.value).startswith("--on-failure")
    assert message in str(error.value)
    assert "hush" not in str(error.value)
    assert "\n" not in str(error.value)


def test_without_a_secret_nothing_is_promised(make_settings: MakeSettings) -> None:
    check_urls(make_settings(), on_complete=None, on_failure=None)
    with pytest.raises(UsageError, match="--on-complete needs NIGHTHERD_WEBHOOK_SECRET"):
        check_urls(make_settings(), on_complete="https://a.example/")


@pytest.mark.parametrize("secret", ["short", "whsec_c2hvcnQ=", "whsec_no base64 at all!"])
def test_a_bad_secret_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("NIGHTHERD_WEBHOOK_SECRET", secret)
    with pytest.raises(SettingsError, match="NIGHTHERD_WEBHOOK_SECRET") as error:
        load_settings()
    assert secret not in str(error.value)


def test_logs_and_tables_show_scheme_and_host_alone() -> None:
    assert (
        shown_url("https://hooks.example:8443/services/hush?token=hush") == "https://hooks.example"
    )
    assert shown_url("env:HOOK") == "env:HOOK"

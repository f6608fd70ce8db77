"""A secret in an address or in the environment is in nothing that is printed, and other texts stay as they are."""

from __future__ import annotations

import logging
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_simpo.config import shown
from jax_simpo.errors import ConfigError, words_of
from jax_simpo.redact import redact
from jax_simpo.run import quiet

PASSWORD = "planted-Pass@word"
SERVER = f"https://ann:{quote(PASSWORD)}@host.example:5000/mlflow?key=plantedkey"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"run 7 at {SERVER}", "run 7 at https://host.example:5000/mlflow"),
        ("https://planted@host.example", "https://host.example"),
        ("Cannot reach (https://h.example/a?b=planted), or 'https://h.example/?planted'.", None),
        ("Max retries exceeded with url: /api/2.0?key=planted (Caused by it)", None),
        ("url: https://s3.example/x?X-Amz-Signature=planted&X=%2F, as 403", "url: https://s3.example/x, as 403"),
        ("postgresql://ann:pla/nt?ed#planted@db.example:5432/runs failed", "postgresql://db.example:5432/runs failed"),
        ("mysql+pymysql://ann:pla@planted@db.example/runs", "mysql+pymysql://db.example/runs"),
        ("['http://a.example/', 'http://u:planted@b.example/']", "['http://a.example/', 'http://b.example/']"),
    ],
)
def test_addresses_lose_their_user_password_and_query_and_nothing_else(text: str, shown: str | None) -> None:
    assert "planted" not in redact(text)
    assert shown is None or redact(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "`loss` is nan? a=b; 5 > 3, ann@host.example",
        "http://localhost:8000/@ann/b@c and hf://datasets/o/n@main/f.parquet",
        "https://jax-simpo.github.io/jax-simpo/healthy-runs.html#gamma",
        "token, password and key are words",
    ],
)
def test_texts_without_a_secret_stay_as_they_are(text: str) -> None:
    assert redact(text) == text


URL_SAFE = st.text("abcXYZ019-._~", min_size=8, max_size=30)


@given(user=URL_SAFE, password=st.text(min_size=8, max_size=30), key=URL_SAFE, before=st.text(max_size=20))
def test_no_address_gives_away_what_it_holds(user: str, password: str, key: str, before: str) -> None:
    said = redact(f"{before} https://{user}:{quote(password, safe='')}@host.example/p?token={key}0 ")
    assert said.endswith(" https://host.example/p ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_planted"),
        ("WANDB_API_KEY", "plantedplanted"),
        ("AWS_SECRET_ACCESS_KEY", "planted/+planted"),
        ("MLFLOW_TRACKING_PASSWORD", "planted"),
        ("HTTPS_PROXY", "http://ann:planted@proxy.example:3128"),
        ("HF_ENDPOINT", "https://planted@hub.example"),
        ("TRACKIO_SERVER_URL", "https://trackio.example/?write_token=planted"),
    ],
)
def test_a_secret_of_the_environment_is_not_quoted_by_itself_either(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    secret = value if "://" not in value else "planted"
    assert redact(f"it refuses `{secret}`, and unplanted trees") == "it refuses `***`, and unplanted trees"


def test_names_that_only_sound_like_secrets_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/ann/token")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:planted@db.example/runs?sslmode=require")
    text = "falsehood in /home/ann/token; require `sslmode`"
    assert redact(text) == text


def test_a_password_is_known_as_it_stands_in_an_address_and_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    assert redact(f"{quote(PASSWORD)} or {PASSWORD} or plantedkey") == "*** or *** or ***"


def test_errors_of_ours_and_words_of_others_have_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    error = OSError(f"no route to {SERVER}\nas hf_planted " + 300 * "x")
    assert words_of(error).startswith("no route to https://host.example:5000/mlflow as *** xxx")
    assert str(ConfigError(f"it: {error}")).startswith("it: no route to https://host.example:5000/mlflow\nas *** xxx")
    assert shown.one_line(f"{SERVER} hf_planted") == "https://host.example:5000/mlflow ***"


@pytest.mark.parametrize("name", ["huggingface_hub.utils._http", "mlflow.utils", "urllib3.connectionpool"])
def test_what_libraries_log_of_their_requests_has_no_secrets(name: str) -> None:
    def logged(name: str) -> str:
        logger = logging.getLogger(name)
        return logger.makeRecord(name, logging.WARNING, "file", 1, "%d thrown by %s", (503, SERVER), None).getMessage()

    former = logging.getLogRecordFactory()
    try:
        for _ in range(2):
            quiet.hide_secrets()
            assert logged(name) == "503 thrown by https://host.example:5000/mlflow"
            assert logged("mine") == f"503 thrown by {SERVER}"  # what the user's own code logs is the user's
    finally:
        logging.setLogRecordFactory(former)

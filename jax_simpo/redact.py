"""Takes secrets out of texts before they are printed or written: passwords in addresses, tokens of the environment.

Libraries quote in their errors what they were given, such as `https://user:token@host/` of MLFLOW_TRACKING_URI, or the
signed address of an upload. Prompts and answers are not such texts, and are shown as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"

# Up to the last `@` before the path. A password may hold slashes and question marks too: SQLAlchemy takes such ones. A
# number after the colon is a port, whose path may hold an `@`. Lengths are bounded, so that a text takes linear time.
_USER = re.compile(r"""(?<=://)(?:[^\s/?#"<>`]{0,999}@|[^\s/?#:@"<>`]{1,99}:(?!\d+(?:[/?#]|$))[^\s@"<>`]{0,999}@)""")
# Of an address, or of a path alone, as urllib3 quotes it. A full stop or a bracket after it is the sentence's.
_QUERY = re.compile(
    r"""(?:(?<=\S)\?[\w.~%\[\]-]{1,99}=|(://[^\s?'"<>`]{1,999})\?)[^\s'"<>`]*?(?=[).,;:\]]{0,3}(?:[\s'"<>`]|$))"""
)
# Ends of names, so that TOKENIZERS_PARALLELISM and HF_TOKEN_PATH are none.
_SECRET_NAME = re.compile(
    r"(?:TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CONNECTION_STRING)$", re.IGNORECASE
)
_SECRET_PARAMETER = re.compile("key|token|secret|pass|sig|auth|cred", re.IGNORECASE)
_SHORTEST = 6  # characters of a value that is looked for by itself; a shorter one would be found in other words


def redact(text: str) -> str:
    """Returns a text without secrets: addresses without user, password and query, and `***` for known secrets.

    Known are the environment variables that are called a token, password or key, and what stands in the addresses of
    the others: a proxy's password, a server's key.
    """
    for secret in sorted(set(_known_secrets()), key=len, reverse=True):
        if secret in text:
            text = re.sub(rf"(?<![^\W_]){re.escape(secret)}(?![^\W_])", HIDDEN, text)
    return _QUERY.sub(r"\1", _USER.sub("", text))


def _known_secrets() -> Iterator[str]:
    """Yields the secrets of the environment, also in the form in which they do not stand in an address."""
    for name, value in os.environ.items():
        found = [value] if _SECRET_NAME.search(name) else []
        if "://" in value:
            for user in _USER.findall(value):
                name, _, password = user.removesuffix("@").partition(":")
                found.append(password or name)
            found += [part for key, part in parse_qsl(value.partition("?")[2]) if _SECRET_PARAMETER.search(key)]
        yield from (text for secret in found for text in (secret, unquote(secret)) if len(text) >= _SHORTEST)

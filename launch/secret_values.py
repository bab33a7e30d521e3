"""Values of the environment that are secret: what is stored and shown holds none of them."""

import re
from collections.abc import Mapping

_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?)$", re.IGNORECASE)
# Shorter ones stand in any text.
_SHORTEST = 8
_PRIVATE_KEY = re.compile(r'-----BEGIN [A-Z0-9 ]*PRIVATE KEY|"private_key(_id)?"\s*:')


def secrets_of(environment: Mapping[str, str], options: Mapping[str, str]) -> dict[str, str]:
    """The secret variables, with their values; values too short to tell are none.

    Args:
        environment: values by variable; a name may say that it is secret.
        options: of a target, as they were typed: ``secrets`` names variables that are secret whatever their names say.
    """
    named = {word.partition("=")[0] for word in options.get("secrets", "").split(",")}
    return {
        name: value
        for name, value in environment.items()
        if (name in named or _NAME.search(name)) and len(value) >= _SHORTEST
    }


def redact(text: str, environment: Mapping[str, str], options: Mapping[str, str]) -> str:
    """A text with ``[$NAME]`` in place of every value of a secret variable.

    Args:
        text: that is about to be stored or shown.
        environment: values by variable.
        options: of the target, as they were typed.
    """
    # A value may be a piece of another.
    for name, value in sorted(secrets_of(environment, options).items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"[${name}]")
    return text


def holds_private_key(text: str) -> bool:
    """Whether a text is a private key, as SSH and OpenSSL write it, or that of a service account."""
    return _PRIVATE_KEY.search(text) is not None

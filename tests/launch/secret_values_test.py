"""What counts as a secret of the environment, and a text without them."""

import pytest
from clp_jax.launch.secret_values import holds_private_key, redact, secrets_of


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "wandb_api_key",
        "HF_TOKEN",
        "Db_Passwd",
        "SSH_PASSPHRASE",
        "PGPASSWORD",
        "CLIENT_SECRET",
        "credential",
    ],
)
def test_names_of_secrets(name):
    assert secrets_of({name: "0123456789", "KEYS_IN_ALL": "0123456789"}, {}) == {name: "0123456789"}
    assert secrets_of({name: "short"}, {}) == {}


def test_a_text_without_secrets():
    environment = {"A_KEY": "abcdefgh", "A_TOKEN": "abcdefgh-more", "HOME": "/home/abc", "B_KEY": "lines\nand lines"}
    text = "abcdefgh-more, abcdefgh; lines\nand lines; /home/abc"
    assert redact(text, environment, {}) == "[$A_TOKEN], [$A_KEY]; [$B_KEY]; /home/abc"


def test_variables_of_the_option_are_secret_whatever_their_names():
    environment = {"WANDB": "abcdefgh", "HOME": "/home/abc", "OTHER": "ijklmnopq"}
    options = {"secrets": "WANDB=my-secret,NAME=OTHER"}
    assert secrets_of(environment, options) == {"WANDB": "abcdefgh"}
    assert redact("it is abcdefgh ijklmnopq", environment, options) == "it is [$WANDB] ijklmnopq"


def test_what_is_a_private_key():
    assert holds_private_key("x\n-----BEGIN RSA PRIVATE KEY-----\n") and holds_private_key('{"private_key" : "y"}')
    assert not holds_private_key("-----BEGIN PUBLIC KEY-----") and not holds_private_key("private_key = 3")

"""Stop strings against every way to cut a text."""

import itertools

import pytest

from clp_jax.sampling.stop_strings import shown_length, truncate_at

STOPS = (("ab",), ("b", "aab"), ("aba", "bb"), ())


def test_text_ends_before_the_first_stop_string():
    for stops, letters in itertools.product(STOPS, itertools.product("abc", repeat=5)):
        text = "".join(letters)
        found = [place for place in range(len(text)) if any(text.startswith(stop, place) for stop in stops)]
        assert truncate_at(text, stops) == text[: found[0] if found else len(text)]


def test_what_is_shown_is_never_taken_back_and_nothing_is_withheld_in_vain():
    """Whatever the tokens that the text came in: character by character is the finest."""
    for stops in STOPS:
        for letters in itertools.product("abc", repeat=4):
            text = "".join(letters)
            # What every continuation leaves of it; three characters complete any of the stop strings.
            futures = (text + "".join(more) for n in range(4) for more in itertools.product("abc", repeat=n))
            common = min(min(len(truncate_at(future, stops)) for future in futures), len(text))
            assert shown_length(text, stops) == common


@pytest.mark.parametrize("stops", ["ab", ["ab", ""]])
def test_no_stop_string_is_empty(stops):
    with pytest.raises(ValueError, match=r"the stop strings are .*ab.*: expected a list of strings of one character"):
        truncate_at("text", stops)

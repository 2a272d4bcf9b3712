"""The texts of the synthetic speech have their numbers in digits."""

from itertools import islice

import pytest

from benchmarks.synthesize import VALUES, sentences, written


@pytest.mark.parametrize(("spoken", "text"), [
    ("The number is zero four nine two.", "The number is 0492."),
    ("Set the radio to ninety percent, and then turn it up.", "Set the radio to 90%, and then turn it up."),
    ("Set the fan to seven percent, and then turn it off.", "Set the fan to 7%, and then turn it off."),
    ("Wake me on Sunday, August the fifth.", "Wake me on Sunday, August the 5th."),
    ("We have three hundred and forty five red doors.", "We have 345 red doors."),
    ("We have six hundred and twenty red doors.", "We have 620 red doors."),
    ("We have seven hundred white doors.", "We have 700 white doors."),
    ("We have thirteen black fans.", "We have 13 black fans."),
    ("Forty two seven one green.", "42 71 green."),
    ("One twenty zero heater nine.", "1 20 0 heater 9."),
    ("It is ten past six.", "It is 10 past 6."),
    ("Do you have one fan?", "Do you have 1 fan?"),
    ("Open the kitchen window.", "Open the kitchen window."),
    ("Ask them often, and tell none.", "Ask them often, and tell none."),
])  # fmt: skip
def test_numbers_are_written_in_digits(spoken, text):
    assert written(spoken) == text


def test_no_sentence_keeps_a_word_for_a_number():
    words = {*VALUES, "hundred", "percent", "first", "fifth", "tenth"}
    for text in islice(sentences(3), 2000):
        assert not words & set(written(text).lower().rstrip(".?").replace(",", "").split()), text

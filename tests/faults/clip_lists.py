"""Clip lists in other encodings, or with lines that name no clip; `clip.flac` lies beside them."""

import os

GOOD = '{"audio_filepath": "clip.flac", "text": "café"}\n'
CLIP_LISTS = {
    "UTF-16": GOOD.encode("utf-16"),
    "Latin-1 in line 2": (GOOD.replace("é", "e") + GOOD).encode("latin-1"),
    "a number as path": GOOD.encode() + b'{"audio_filepath": 5, "text": "a"}',
    "a device as path": b'{"audio_filepath": "/dev/zero", "text": "a"}',
    "a folder as path": b'{"audio_filepath": ".", "text": "a"}',
    "an offset behind the end": b'{"audio_filepath": "clip.flac", "text": "a", "offset": 60}',
    "an offset of NaN": b'{"audio_filepath": "clip.flac", "text": "a", "offset": NaN}',
    "a negative duration": b'{"audio_filepath": "clip.flac", "text": "a", "duration": -1}',
    "random bytes": os.urandom(100_000),
}

"""The clips of a NeMo manifest: JSON lines with audio_filepath (relative to the manifest), text, lang."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Clip:
    """One line of a manifest; `text` is what was said, `lang` its language, as the manifest names it."""

    path: Path
    text: str | None = None
    lang: str | None = None


def read_clips(manifest: Path, *, with_text: bool = False) -> list[Clip]:
    """The clips of a manifest in its order.

    Raises FileNotFoundError, or ValueError naming the line that has no audio_filepath, `with_text` that has no text.
    """
    if not manifest.is_file():
        raise FileNotFoundError(f"wanted a manifest, found nothing at {manifest}")
    clips = []
    for number, line in enumerate(manifest.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            clip = Clip(manifest.parent / row["audio_filepath"], row.get("text"), row.get("lang"))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{manifest}:{number} is not a JSON object with audio_filepath ({error!r})") from None
        for key, value in (("text", clip.text), ("lang", clip.lang)):
            if not isinstance(value, str | None):
                raise ValueError(f"{manifest}:{number} has the {key} {value!r}, wanted a string")
        if with_text and clip.text is None:
            raise ValueError(f"{manifest}:{number} has no text, wanted what is said in {clip.path.name}")
        clips.append(clip)
    if not clips:
        raise ValueError(f"{manifest} lists no clips")
    return clips

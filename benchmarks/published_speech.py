"""Public speech for benchmarks/published.py: what the sets are, their download, and which clips are taken.

Both data sets are published as parquet files that hold the audio itself, a column `audio` with the bytes of a FLAC or
WAV file. They are read at commits at which their layout is known, from published uses of exactly these paths:

    openslr/librispeech_asr   all/test.other/0000.parquet: 332,873,172 bytes, 2,939 clips; columns id, text, audio
    google/fleurs             parquet-data/LANGUAGE/test-00000-of-00001.parquet: 402 MB (en_us), 445 MB (fr_fr); columns
                              id (of the sentence, which several people read), raw_transcription, audio

Sizes and SHA-256 are those that the Hub states; what was downloaded is compared with them. A file is removed when its
clips have been taken. Both sets are licensed under CC-BY-4.0.
"""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from common.checkpoint.hub import hub_errors
from common.cli import progress_bar, size_text
from common.folder import require_free, sha256, staged_folder, write_text

HELD_OUT = 16  # sentences of each set that calibrate, and are never measured
STRESSED = 4  # measured clips of each set for --stress
SET_CLIPS, CLIP_SECONDS = 900, 9  # of a whole set, about
BATCH = 16  # rows of a parquet file that are in memory at a time
CLIPS, HELD_OUT_CLIPS = "clips.jsonl", "held_out.jsonl"

Item = TypeVar("Item")


@dataclass(frozen=True)
class SpeechSet:
    """A public test set."""

    key: str  # as --sets takes it, and the name of its folder
    title: str
    lang: str
    repository: str
    commit: str
    files: str  # how the paths of its parquet files begin
    text: str  # the column with the texts
    # Published error rates of LibriSpeech are counted with Whisper's normalizer for English, which also reconciles
    # numbers in words and in digits; those of FLEURS without case and punctuation.
    english_rules: bool = False


def _fleurs(code: str, language: str) -> SpeechSet:
    return SpeechSet(
        key=f"fleurs-{code}",
        title=f"FLEURS, {language}",
        lang=code.partition("_")[0],
        repository="google/fleurs",
        commit="70bb2e84b976b7e960aa89f1c648e09c59f894dd",
        files=f"parquet-data/{code}/test-",
        text="raw_transcription",
    )


LIBRISPEECH = SpeechSet(
    key="librispeech-test-other",
    title="LibriSpeech test-other",
    lang="en",
    repository="openslr/librispeech_asr",
    commit="71cacbfb7e2354c4226d01e70d77d5fca3d04ba1",
    files="all/test.other/",
    text="text",
    english_rules=True,
)
LANGUAGES = {"en_us": "English", "de_de": "German", "es_419": "Spanish", "fr_fr": "French", "it_it": "Italian"}
SETS = {one.key: one for one in (LIBRISPEECH, *(_fleurs(*names) for names in LANGUAGES.items()))}


def repository_files(name: str, kind: str, revision: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The commit of a repository's revision, and its files with their bytes and, where the Hub has it, their SHA-256.

    Raises ConnectionError for a network that fails, a repository that is not shown and a revision that does not exist.
    """
    from huggingface_hub import HfApi

    with hub_errors(f"the list of files of {name}"):
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True)
    files = {
        file.rfilename: {"bytes": file.size or 0, "sha256": file.lfs.sha256 if file.lfs else None}
        for file in info.siblings or []
    }
    return info.sha or revision, files


def set_files(speech: SpeechSet) -> dict[str, dict[str, Any]]:
    """The parquet files of a set. Raises ValueError where the Hub has not got them, and as repository_files does."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        _, files = repository_files(speech.repository, "dataset", speech.commit)
    except ConnectionError as error:
        if not isinstance(error.__cause__, HfHubHTTPError):  # no answer
            raise
        raise ValueError(f"Hugging Face shows no data set {speech.repository} at {speech.commit}") from None
    found = {name: file for name, file in files.items() if name.startswith(speech.files) and name.endswith(".parquet")}
    if not found:
        raise ValueError(f"{speech.repository} has no file {speech.files}*.parquet at {speech.commit}")
    return found


def fetch_set(speech: SpeechSet, files: dict[str, dict[str, Any]], clips: int | None, folder: Path) -> dict[str, Any]:
    """Download a set and write its clips into `folder`, with the lists CLIPS and HELD_OUT_CLIPS.

    clips: how many to measure, spread evenly over the set; None: all but those of the held-out sentences. Returns the
    number of clips and the seconds of each list.
    """
    download = folder.with_name(f"{folder.name}.download")
    paths = [_download(speech, name, stated, download) for name, stated in files.items()]
    sentences = [sentence for path in paths for sentence in _column(path, "id")]
    measured, held_out = choose(sentences, clips)
    lists: dict[str, list[dict[str, Any]]] = {CLIPS: [], HELD_OUT_CLIPS: []}
    with staged_folder(folder) as staging, progress_bar(total=len(sentences), task="clips", unit="clip") as bar:
        number = 0
        for path in paths:
            for row in _rows(path, speech.text):
                bar.update()
                if number in measured or number in held_out:
                    name = HELD_OUT_CLIPS if number in held_out else CLIPS
                    lists[name].append(_write_clip(row, speech, staging, f"{number:05}"))
                number += 1
        for name, rows in lists.items():
            write_list(staging / name, rows)
    shutil.rmtree(download)
    return {
        name: {"clips": len(rows), "seconds": round(sum(row["duration"] for row in rows), 2)}
        for name, rows in lists.items()
    }


def choose(sentences: Sequence[object], clips: int | None) -> tuple[set[int], set[int]]:
    """The numbers of the rows to measure, and of those to calibrate on; no sentence is in both.

    sentences: the sentence of each row. At most a third of the sentences are held out, of each the first row.
    """
    distinct = list(dict.fromkeys(sentences))
    held = set(_spread(distinct, min(HELD_OUT, len(distinct) // 3)))
    left = [number for number, sentence in enumerate(sentences) if sentence not in held]
    return set(_spread(left, clips)), {sentences.index(sentence) for sentence in held}


def _spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """So many of the items, evenly; all of them for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * count)] for place in range(count)]


def combined_list(folders: Sequence[Path], name: str, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of the lists `name` in several folders in turns, the first `most` of each, with absolute paths."""
    lists = []
    for folder in folders:
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        lists.append([row | {"audio_filepath": str(folder / row["audio_filepath"])} for row in rows[:most]])
    longest = max(map(len, lists))
    return [rows[place] for place in range(longest) for rows in lists if place < len(rows)]


def write_list(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a clip list."""
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def _download(speech: SpeechSet, name: str, stated: dict[str, Any], folder: Path) -> Path:
    """A file of the set in `folder`, compared with what the Hub states."""
    from huggingface_hub import hf_hub_download

    print(f"downloading {name} of {speech.repository}, {size_text(stated['bytes'])}", flush=True)
    require_free(stated["bytes"], folder)
    with hub_errors(f"{name} of {speech.repository}"):
        path = hf_hub_download(speech.repository, name, repo_type="dataset", revision=speech.commit, local_dir=folder)
    if stated["sha256"] and sha256(Path(path)) != stated["sha256"]:
        shutil.rmtree(folder)
        raise ValueError(f"expected SHA-256 {stated['sha256']} of {name}, got another; run the command again")
    return Path(path)


def _column(path: Path, name: str) -> list[object]:
    import pyarrow.parquet as pq

    column: list[object] = pq.read_table(path, columns=[name])[name].to_pylist()
    return column


def _rows(path: Path, text: str) -> Any:
    """The rows of a parquet file, a few of them in memory at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=["audio", text]):
            yield from batch.to_pylist()


def _write_clip(row: dict[str, Any], speech: SpeechSet, folder: Path, name: str) -> dict[str, Any]:
    """Write the audio of a row as it is published; return its line of the clip list."""
    import soundfile

    content = row["audio"]["bytes"]
    info = soundfile.info(io.BytesIO(content))
    path = folder / f"{name}.{info.format.lower()}"
    path.write_bytes(content)
    return {"audio_filepath": path.name, "text": row[speech.text], "lang": speech.lang, "duration": info.duration}

"""Running a model: audio in, then NeMo, ONNX Runtime sessions or ONNX Runtime GenAI, tokens out."""

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.clips import Clip
from common.configs import GENAI_CONFIG
from common.console import Command, silent_stderr
from common.decode import GENAI_RULE, BlankZero, Hypothesis, Prediction, greedy_tdt_decode
from common.files import read_json, require_file
from common.graphs import DECODER, ENCODER, JOINT, Graph

EXPORT_COMMAND = Command("python export_parakeet_to_onnx.py --output_dir {}")
TOKENIZER_COMMAND = Command("python export_tokenizer.py --output_dir {}")
# NeMo's features need two frames for a standard deviation; a shorter clip holds no speech anyway.
MIN_FRAMES = 2
# GenAI computes a clip's features at once, in 2 GB an hour; the encoder then runs chunk by chunk.
MAX_SECONDS = 4 * 3600
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 4_000, 768_000  # Hz: what converters have; a header beyond is damaged
# Full scale is 1, or 2^31 where a program stored integers as floats. Powers of features stay finite up to there.
MAX_AMPLITUDE = 2.0**31
BLOCK_VALUES = 2**20  # samples times channels decoded at a time, 4 MB
# Formats in which libsndfile finds a sample by its number. After a seek in others the decoder lacks what went before:
# samples of Opus are up to 0.002 off, those of MP3 audibly where it has been reading.
SEEKABLE = ("PCM_", "FLOAT", "DOUBLE", "ULAW", "ALAW")  # subtypes; FLAC's is PCM
# Manifests round durations; the end of a segment that is as near to the end of the file is that.
SEGMENT_TOLERANCE = 0.05  # seconds
# Of the energy of the channels, what their average has at least: 1/channels where they have nothing to do with each
# other, next to nothing where one is the other upside down.
MIN_MONO_ENERGY = 1e-4
ERRORS_AND_WORSE = 3  # a severity of OrtLoggingLevel


class OrtGraph:
    """One graph of a folder in an ONNX Runtime CPU session, called with arrays in the order of its declaration.

    `mapped` leaves the weights in the data file instead of repacking copies: at 0.6B the session is there in 0.2 s
    instead of 6 s, with 2.4 GB less memory of its own, and a run takes no longer. For a few runs, that is: a float16
    weight becomes the CPU's float32 in each of them.
    """

    def __init__(self, folder: Path, graph: Graph, *, mapped: bool = False):
        import onnxruntime as ort

        path = Path(folder) / graph.file
        if not path.is_file():
            raise FileNotFoundError(f"wanted {path}, found no such file; first run: {EXPORT_COMMAND.format(folder)}")
        options = ort.SessionOptions()
        options.log_severity_level = ERRORS_AND_WORSE
        options.add_session_config_entry("session.disable_prepacking", "1" if mapped else "0")
        try:
            self.session = ort.InferenceSession(
                path,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if mapped else None,
            )
        except Exception as error:  # onnxruntime raises its own types, one per status
            raise ValueError(f"{path} does not load ({error}); make it again") from error
        self.graph = graph

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Outputs in the order of the declaration."""
        names = self.graph.input_names
        return self.session.run(self.graph.output_names, dict(zip(names, inputs, strict=True)))

    @property
    def output_width(self) -> int:
        """The size of the first output's last axis."""
        return self.session.get_outputs()[0].shape[-1]

    def noise(self, vocabulary: int, **sizes: int) -> list[np.ndarray]:
        """Inputs to compare two graphs on: noise, tokens below `vocabulary`, whole lengths. sizes: of the axes that are
        a caller's choice, B, T, S and U."""
        draw, found = np.random.default_rng(0), []
        for tensor, value in zip(self.graph.inputs, self.session.get_inputs(), strict=True):
            shape = [sizes.get(axis, size) for axis, size in zip(tensor.axes, value.shape, strict=True)]
            if tensor.dtype == "float32":
                array = draw.standard_normal(shape, dtype=np.float32)
                found.append(array if "T" in tensor.axes else np.tanh(array))  # features are not bounded, the rest is
            elif len(shape) == 1:
                found.append(np.full(shape, sizes["T"] if "T" in self.graph.inputs[0].axes else sizes["U"]))
            else:
                found.append(draw.integers(vocabulary, size=shape))
            found[-1] = found[-1].astype(tensor.dtype)
        return found


OpenGraph = Callable[[Path, Graph], OrtGraph]
MAPPED: OpenGraph = partial(OrtGraph, mapped=True)


def load_audio(path: Path, sample_rate: int, min_samples: int) -> np.ndarray:
    """A whole file, as load_clip gives it."""
    return load_clip(Clip(Path(path)), sample_rate, min_samples)


def load_clip(clip: Clip, sample_rate: int, min_samples: int) -> np.ndarray:
    """Any file libsndfile reads, or the segment of it that is the clip, as mono float32 at `sample_rate`; channels are
    averaged, resampling is soxr's HQ.

    Raises FileNotFoundError, or ValueError for a file that is no audio or no regular file, for a segment outside of it,
    and for samples that are not finite, cancel each other out, are under `min_samples` or longer than MAX_SECONDS.
    """
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        blocks = _mono_blocks(clip, _blocks(clip, file, begin, end))
        parts = blocks if file.samplerate == sample_rate else _resampled(blocks, file.samplerate, sample_rate)
        mono = np.concatenate([np.zeros(0, np.float32), *parts])
    _require_length(clip, len(mono) / sample_rate, min_samples / sample_rate)
    return mono


def check_audio(clip: Clip, sample_rate: int, min_samples: int) -> float:
    """Seconds of the clip by the header of its file, and nothing read but that. Raises as load_clip does where that
    is enough to know."""
    with _open_audio(clip.path) as file:
        begin, end = _segment(clip, file)
        seconds = ((file.frames if end is None else end) - begin) / file.samplerate
    _require_length(clip, seconds, min_samples / sample_rate)
    return seconds


@contextlib.contextmanager
def _open_audio(path: Path) -> Iterator:
    import soundfile

    require_file(path, "an audio file")
    try:
        with silent_stderr(), soundfile.SoundFile(path) as file:
            if not MIN_SAMPLE_RATE <= file.samplerate <= MAX_SAMPLE_RATE:
                limits = f"{MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
                raise ValueError(f"{path} has a sample rate of {file.samplerate} Hz, wanted {limits}")
            # After each read soundfile seeks to where it is already, and an MP3 starts anew there, audibly.
            file.seekable = lambda: False
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} is not audio that libsndfile reads ({error.error_string})") from None


def _segment(clip: Clip, file) -> tuple[int, int | None]:
    """First frame of the clip in an open sound file, and the one after its last; None: the end of the file, wherever
    that is. Raises ValueError where it is outside."""
    begin, length = round(clip.offset * file.samplerate), file.frames / file.samplerate
    end = length if clip.duration is None else clip.offset + clip.duration
    if (begin and begin >= file.frames) or end > length + SEGMENT_TOLERANCE:
        raise ValueError(f"expected a segment of {clip.path}, which is {length:g} s long, got{clip.segment}")
    return begin, None if end >= length - SEGMENT_TOLERANCE else round(end * file.samplerate)


def _require_length(clip: Clip, seconds: float, least: float) -> None:
    if seconds < least:
        raise ValueError(f"{clip.path}{clip.segment} holds {seconds:.3f} s of audio, wanted {least:.3f} s or more")


def _blocks(clip: Clip, file, begin: int, end: int | None) -> Iterator[np.ndarray]:
    """The frames from `begin` up to `end` of an open sound file, in blocks [N, channels]: memory for one block,
    whatever the header claims."""
    size, position = max(BLOCK_VALUES // file.channels, 1), 0  # frames
    if begin and file.subtype.startswith(SEEKABLE):
        position = file.seek(begin)
    last = begin + MAX_SECONDS * file.samplerate
    while end is None or position < end:
        read = file.read(size if end is None else min(size, end - position), dtype="float32", always_2d=True)
        if not len(read):
            break
        skipped = max(begin - position, 0)  # frames that only lead to those that are asked for
        position += len(read)
        if position > last:
            raise ValueError(f"{clip.path} is longer than {MAX_SECONDS / 3600:.0f} h; cut it into parts")
        if skipped < len(read):
            yield read[skipped:]
    if end is not None and position < end:
        raise ValueError(f"{clip.path} ends after {position / file.samplerate:.3f} s, before{clip.segment}; is it cut?")


def _mono_blocks(clip: Clip, blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The average of the channels of each block."""
    energy = mono_energy = 0.0
    for block in blocks:
        mono = block.mean(axis=1)
        if not np.abs(mono).max() <= MAX_AMPLITUDE:  # NaN is not, either
            raise ValueError(f"{clip.path} holds samples that are not finite numbers, or beyond any scale of audio")
        energy += float(np.square(block, dtype=np.float64).sum()) / block.shape[1]
        mono_energy += float(np.square(mono, dtype=np.float64).sum())
        yield mono
    if mono_energy < MIN_MONO_ENERGY * energy:
        raise ValueError(
            f"the channels of {clip.path}{clip.segment} cancel each other out when they are averaged, so its speech "
            "would be lost; one is the other upside down: save one of them as mono"
        )


def _resampled(blocks: Iterable[np.ndarray], rate: int, sample_rate: int) -> Iterator[np.ndarray]:
    import soxr

    resampler = soxr.ResampleStream(rate, sample_rate, 1, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.zeros(0, np.float32), last=True)


@dataclass(frozen=True)
class RuntimeConfig:
    """What genai_config.json says of decoding: the raw baseline is bound to the same numbers as GenAI."""

    sample_rate: int
    hop_length: int
    subsampling_factor: int
    chunk: int  # samples
    left: int
    right: int
    blank_id: int
    durations: tuple[int, ...]
    max_symbols: int
    decoder_layers: int
    decoder_dim: int

    @classmethod
    def read(cls, folder: Path) -> "RuntimeConfig":
        """Raises FileNotFoundError, or ValueError where the file is no such config, or has a number that cannot be:
        with chunk_samples of 0 GenAI never ends."""
        path = Path(folder) / GENAI_CONFIG
        config = read_json(path, EXPORT_COMMAND.format(folder))
        again = f"make it again: {EXPORT_COMMAND.format(folder)}"

        def whole(value: object, key: str, least: int = 1) -> int:
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{path}: expected {key} as a whole number of {least} or more, got {value!r}; {again}")
            return value

        try:
            model, decoder = config["model"], config["model"]["decoder"]
            hop = whole(model["hop_length"], "hop_length")
            subsampling = whole(model["subsampling_factor"], "subsampling_factor")
            return cls(
                whole(model["sample_rate"], "sample_rate"),
                hop,
                subsampling,
                whole(model["chunk_samples"], "chunk_samples", hop * subsampling),  # an encoder frame
                whole(model["left_context_samples"], "left_context_samples", 0),
                whole(model["right_context_samples"], "right_context_samples", 0),
                whole(model["blank_id"], "blank_id", 0),
                tuple(whole(duration, "each of tdt_durations", 0) for duration in model["tdt_durations"]),
                whole(model["max_symbols_per_step"], "max_symbols_per_step"),
                whole(decoder["num_hidden_layers"], "num_hidden_layers of the decoder"),
                whole(decoder["hidden_size"], "hidden_size of the decoder"),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} lacks a setting ({error}); {again}") from None

    @property
    def frame_seconds(self) -> float:
        """Length of an encoder frame."""
        return self.hop_length * self.subsampling_factor / self.sample_rate

    @property
    def min_samples(self) -> int:
        return MIN_FRAMES * self.hop_length

    def fits_one_window(self, seconds: float) -> bool:
        """Whether the encoder sees a clip of that length whole, as NeMo's does."""
        return seconds * self.sample_rate <= self.chunk

    def check_clips(self, clips: Iterable[Clip]) -> float:
        """Seconds of all clips by the headers of their files. Raises as check_audio does, before the work, for one that
        is missing, too short or a segment outside of its file, naming its line."""
        seconds = 0.0
        for clip in clips:
            with clip.located():
                seconds += check_audio(clip, self.sample_rate, self.min_samples)
        return seconds

    def read_audio(self, path: Path) -> np.ndarray:
        """The samples of a whole file, as read_clip gives them."""
        return self.read_clip(Clip(Path(path)))

    def read_clip(self, clip: Clip) -> np.ndarray:
        """Mono samples at the model's rate, a whole number of hops of them.

        Up to 10 ms are cut off the end: there GenAI may compute one frame more than NeMo, the window's last 9 ms being
        enough for it (NemoStreamingMelExtractor in nemo_mel_spectrogram.cc), and both normalise over their frames.
        """
        with clip.located():
            samples = load_clip(clip, self.sample_rate, self.min_samples)
        return samples[: len(samples) // self.hop_length * self.hop_length]


@dataclass(frozen=True)
class Piece:
    """One encoder run: mel frames `begin` … `end` - 1 go in, encoder frames `start` … `stop` - 1 are decoded."""

    begin: int
    end: int
    start: int
    stop: int | None  # None: to the last


def windows(config: RuntimeConfig, mel_frames: int) -> Iterator[Piece]:
    """How GenAI cuts a clip of `mel_frames` (EncodeNextChunk in src/models/parakeet.cpp): integer divisions and all."""
    hop, sub = config.hop_length, config.subsampling_factor
    total = mel_frames * hop
    chunk_begin = 0
    while chunk_begin < total:
        chunk_end = min(chunk_begin + config.chunk, total)
        begin = max(chunk_begin - config.left, 0) // hop
        end = min(min(chunk_end + config.right, total) // hop, mel_frames)
        start = (chunk_begin // hop - begin) // sub
        stop = None if chunk_end == total else (chunk_end // hop - begin) // sub
        yield Piece(begin, end, start, stop)
        chunk_begin = chunk_end


class RawOrt:
    """The baseline: three ONNX Runtime sessions and the greedy loop of `common.decode`, windows as GenAI cuts them."""

    def __init__(self, folder: Path, open_graph: OpenGraph = OrtGraph):
        self.config = RuntimeConfig.read(folder)
        zeros = np.zeros((self.config.decoder_layers, 1, self.config.decoder_dim), dtype=np.float32)
        self._start = (zeros, zeros)
        self.encoder, self.decoder, self.joint = (open_graph(folder, graph) for graph in (ENCODER, DECODER, JOINT))

    def encode(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """features [M, T] of each, run together, padded to the longest → [S, D] of each, valid frames only"""
        lengths = np.array([one.shape[1] for one in features])
        padded = np.zeros((len(features), len(features[0]), lengths.max()), dtype=np.float32)
        for row, one in zip(padded, features, strict=True):
            row[:, : one.shape[1]] = one
        outputs, lengths = self.encoder(padded, lengths)
        return [np.ascontiguousarray(row[:, :length].T) for row, length in zip(outputs, lengths, strict=True)]

    def transcribe(self, features: np.ndarray, rule: BlankZero = GENAI_RULE, *, whole: bool = False) -> Hypothesis:
        """features [M, T], normalised over the clip → what was decoded; `whole`: in one window, however long."""
        return self._transcribe_batch([features], rule, whole)[0]

    def transcribe_all(
        self, features: Sequence[np.ndarray], rule: BlankZero = GENAI_RULE, batch_size: int = 1
    ) -> list[Hypothesis]:
        """`transcribe` each, clips of like length together, which pads least; the results are in the order given.

        Memory goes with `batch_size` times the longest clip of a batch, or the window where that is shorter; and a
        batch's encoder frames are held until it is decoded, 0.4 GB for an hour of audio at D = 1024.
        """
        by_length = sorted(range(len(features)), key=lambda clip: features[clip].shape[1])
        found = {}
        for first in range(0, len(features), batch_size):
            batch = by_length[first : first + batch_size]
            found |= zip(batch, self._transcribe_batch([features[clip] for clip in batch], rule), strict=True)
        return [found[clip] for clip in range(len(features))]

    def _transcribe_batch(
        self, features: Sequence[np.ndarray], rule: BlankZero, whole: bool = False
    ) -> list[Hypothesis]:
        """Encode the windows of all clips, no more at once than there are clips; then decode the clips together."""
        config = self.config
        pieces = [[Piece(0, one.shape[1], 0, None)] if whole else [*windows(config, one.shape[1])] for one in features]
        cuts = [(clip, piece) for clip, own in enumerate(pieces) for piece in own]
        cuts.sort(key=lambda cut: cut[1].end - cut[1].begin)
        encoded = {}
        for first in range(0, len(cuts), len(features)):
            group = cuts[first : first + len(features)]
            runs = self.encode([features[clip][:, piece.begin : piece.end] for clip, piece in group])
            encoded |= {cut: run[cut[1].start : cut[1].stop] for cut, run in zip(group, runs, strict=True)}
        parts = [[encoded[clip, piece] for piece in own] for clip, own in enumerate(pieces)]
        return greedy_tdt_decode(
            [np.concatenate(own) for own in parts],
            [np.cumsum([len(part) for part in own]).tolist() for own in parts],
            self.predict,
            self.join,
            blank_id=config.blank_id,
            durations=config.durations,
            max_symbols=config.max_symbols,
            blank_zero=rule,
        )

    def predict(
        self, tokens: Sequence[int], states: Sequence[tuple[np.ndarray, np.ndarray] | None]
    ) -> list[Prediction]:
        """One step of the prediction network for each; without a state it starts from zeros."""
        h, c = zip(*(state or self._start for state in states), strict=True)
        targets, ones = np.array(tokens)[:, None], np.array([1] * len(tokens))
        outputs, _, h, c = self.decoder(targets, ones, np.concatenate(h, axis=1), np.concatenate(c, axis=1))
        return [
            Prediction(output.T, (h[:, row : row + 1], c[:, row : row + 1])) for row, output in enumerate(outputs)
        ]  # outputs [B, H, 1]

    def join(self, frames: np.ndarray, outputs: Sequence[np.ndarray]) -> np.ndarray:
        """[B, D], [1, H] of each → [B, V+K]"""
        return self.joint(frames[:, None], np.array(outputs))[0][:, 0, 0]


class GenAI:
    """A model folder in ONNX Runtime GenAI."""

    def __init__(self, folder: Path):
        import onnxruntime_genai as og

        og.disable_telemetry_events()  # a local tool calls nobody
        folder = Path(folder)
        self.config = RuntimeConfig.read(folder)
        if not (folder / "tokenizer.json").is_file():
            command = TOKENIZER_COMMAND.format(folder)
            raise FileNotFoundError(f"wanted {folder / 'tokenizer.json'}, found no such file; first run: {command}")
        try:
            self.model = og.Model(str(folder))
            self.processor = self.model.create_multimodal_processor()
            self.tokenizer = og.Tokenizer(self.model)
        except RuntimeError as error:
            raise ValueError(f"ONNX Runtime GenAI does not load {folder}: {error}") from error

    def inputs(self, samples: np.ndarray):
        """The processor's tensors for one clip of mono samples at the model's rate."""
        import onnxruntime_genai as og
        import soundfile

        buffer = io.BytesIO()  # float WAV: what the other engines are given, bit for bit
        soundfile.write(buffer, samples, self.config.sample_rate, format="WAV", subtype="FLOAT")
        return self.processor("", audios=og.Audios.open_bytes(buffer.getvalue()))

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features GenAI computes, [M, T]."""
        return self.inputs(samples)["audio_features"].as_numpy()[0].copy()

    def transcribe(self, samples: np.ndarray) -> list[int]:
        """Token ids of one clip."""
        import onnxruntime_genai as og

        generator = og.Generator(self.model, og.GeneratorParams(self.model))
        generator.set_inputs(self.inputs(samples))
        while not generator.is_done():
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)]

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(np.array(tokens, dtype=np.int32)).strip() if tokens else ""


class NemoTranscript(NamedTuple):
    """What NeMo's own decoding gives of a clip; `text` is what `transcribe()` of NeMo shows."""

    tokens: list[int]
    frames: list[int]  # the encoder frame that each token was emitted at
    text: str


class Nemo:
    """The reference: NeMo's own preprocessing, encoder and batched greedy decoding."""

    def __init__(self, model):
        self.model = model
        if model.cfg.decoding.strategy != "greedy_batch":  # beam search says other words; plain greedy, other durations
            decoding = model.cfg.decoding.copy()
            decoding.strategy = "greedy_batch"
            model.change_decoding_strategy(decoding, verbose=False)

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features NeMo computes, valid frames only: [M, T]."""
        import torch

        with torch.inference_mode():
            signal, length = torch.from_numpy(samples)[None], torch.tensor([len(samples)])
            device = self.model.device
            features, lengths = self.model.preprocessor(input_signal=signal.to(device), length=length.to(device))
        return features[0, :, : int(lengths[0])].cpu().numpy()

    @property
    def sentencepiece_model(self) -> bytes:
        """The checkpoint's own, as NeMo has loaded it."""
        return self.model.tokenizer.tokenizer.serialized_model_proto()

    def transcribe(self, features: np.ndarray) -> NemoTranscript:
        """features [M, T] → tokens, frames and text, all NeMo's"""
        found = self._decode(self.model.decoding, features)
        tokens, frames = ([int(number) for number in numbers] for numbers in (found.y_sequence, found.timestamp))
        return NemoTranscript(tokens, frames, found.text)

    def trace(self, features: np.ndarray) -> Hypothesis:
        """features [M, T] → the same decoding step by step, on NeMo's own modules: where it was nearly another"""
        import torch

        decoder, joint, config = self.model.decoder, self.model.joint, self.model.cfg.decoding

        def predict(tokens, states):
            token, state = tokens[0], states[0]
            start = {"y": None, "batch_size": 1} if state is None else {"y": torch.tensor([[token]])}
            output, state = decoder.predict(state=state, add_sos=False, **start)
            return [Prediction(joint.project_prednet(output)[0], state)]

        def join(frames, outputs):
            return joint.joint_net(joint.project_encoder(torch.from_numpy(frames)) + outputs[0]).numpy()

        with torch.inference_mode():
            encoded, lengths = self._encode(features)
            frames = encoded[0].T.numpy()
            return greedy_tdt_decode(
                [frames],
                [[int(lengths[0])]],
                predict,
                join,
                blank_id=decoder.blank_idx,
                durations=tuple(config.durations),
                max_symbols=self.model.decoding.decoding.max_symbols,
            )[0]

    def words(self, features: np.ndarray) -> list[tuple[str, int, int]]:
        """features [M, T] → each word with NeMo's own start and end, in encoder frames"""
        words = self._decode(self._with_timestamps, features).timestamp["word"]
        return [(word["word"], int(word["start_offset"]), int(word["end_offset"])) for word in words]

    @cached_property
    def _with_timestamps(self):
        """The model's decoding, set as `transcribe(timestamps=True)` of NeMo sets it; apart, since it takes longer."""
        from nemo.collections.asr.parts.submodules.rnnt_decoding import RNNTBPEDecoding
        from omegaconf import OmegaConf

        decoding, model = self.model.cfg.decoding.copy(), self.model
        OmegaConf.update(decoding, "compute_timestamps", True, force_add=True)
        return RNNTBPEDecoding(decoding, model.decoder, model.joint, model.tokenizer)

    def _decode(self, decoding, features: np.ndarray):
        import torch

        with torch.inference_mode():
            return decoding.rnnt_decoder_predictions_tensor(*self._encode(features), return_hypotheses=True)[0]

    def _encode(self, features: np.ndarray):
        import torch

        return self.model.encoder(
            audio_signal=torch.from_numpy(features)[None], length=torch.tensor([features.shape[1]])
        )

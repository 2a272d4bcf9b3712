"""Train the bundled checkpoint on with ternary encoder matrices, and write it in the published form of parakeet-redux.

    python -m benchmarks.synthesize --sentences 3000 --seed 77 --output_dir build/speech
    python -m benchmarks.ternary_sample --manifest build/speech/manifest.jsonl --output_dir build/parakeet-redux-tiny

Each matrix of the encoder's layers is rounded to −m, 0 or m, with one m for 128 columns of a row, in every forward
pass; the gradient passes as if nothing had been rounded (straight-through). The loss is TDT's (Xu et al. 2023, equation
7) over the pieces that the texts use, and a hint: the squared difference from the bundled encoder's output. It takes a
quarter of an hour on two idle cores. The files are written by benchmarks/published_forms.py, which shares no code with
the reader in common/checkpoint/.

Give --held_out the clip lists on which the result will be measured: no sentence of theirs is trained on.
"""

import argparse
import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from tqdm import tqdm

from benchmarks.published_forms import GROUP, THRESHOLD, write_form
from benchmarks.transformers_checkpoint import convert
from common.cli import quiet_libraries

TINY = Path(__file__).resolve().parents[1] / "samples" / "parakeet-tdt-tiny.nemo"
MATRICES = (
    "feed_forward1.linear1", "feed_forward1.linear2", "self_attn.linear_q", "self_attn.linear_k", "self_attn.linear_v",
    "self_attn.linear_out", "self_attn.linear_pos", "conv.pointwise_conv1", "conv.pointwise_conv2",
    "feed_forward2.linear1", "feed_forward2.linear2",
)  # fmt: skip
BATCH_SECONDS = 60
NEVER = -1e30  # log-probability of an impossible path
SIGMA = 0.02  # logit under-normalization of the TDT paper


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] → codes −1, 0, 1 [out, in / 128, 128] and scales [out, in / 128, 1].

    The scales are numbers of float16.
    """
    groups = weight.reshape(len(weight), -1, GROUP)
    size = groups.abs()
    kept = size > THRESHOLD * size.mean(-1, keepdim=True)
    scales = (size * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
    return groups.sign() * kept, scales.half().float()


class StraightThrough(nn.Module):
    """A parametrization of a weight by its ternary form."""

    def forward(self, weight: Tensor) -> Tensor:
        codes, scales = ternary(weight.detach())
        return weight + ((codes * scales).reshape(weight.shape) - weight.detach())


def tdt_loss(logits: Tensor, frames: Tensor, targets: Tensor, lengths: Tensor, durations: list[int]) -> Tensor:
    """−log P of targets [B, U], by clip [B]. logits [B, T, U + 1, C + K]: C tokens with the blank last, K durations.

    The sum over all alignments runs over anti-diagonals t + u, so that each step is one operation for all clips.
    """
    B, T, width, _ = logits.shape
    K = len(durations)
    tokens = F.log_softmax(logits[..., :-K], -1) - SIGMA
    steps = F.log_softmax(logits[..., -K:], -1)
    following = F.pad(targets, (0, 1))
    blank = tokens[..., -1]
    emitted = tokens.gather(3, following[:, None, :, None].expand(B, T, width, 1)).squeeze(3)
    u = torch.arange(width)[None]
    t = torch.arange(T + width)[:, None] - u
    inside = (t >= 0) & (t < T)
    clamped = t.clamp(0, T - 1)

    def diagonals(x: Tensor) -> Tensor:
        return torch.where(inside, x[:, clamped, u.expand_as(clamped)], NEVER)

    by_blank = [diagonals(blank + steps[..., i]) for i in range(K)]
    by_token = [diagonals(emitted + steps[..., i]) for i in range(K)]
    start = torch.full((B, width), NEVER)
    start[:, 0] = 0
    alpha = [start]
    for n in range(1, T + width):
        ways = []
        for i, duration in enumerate(durations):
            if duration and n >= duration:
                ways.append(alpha[n - duration] + by_blank[i][:, n - duration])
            if n > duration:
                before = n - duration - 1
                ways.append(F.pad((alpha[before] + by_token[i][:, before])[:, :-1], (1, 0), value=NEVER))
        alpha.append(torch.logsumexp(torch.stack(ways), 0).clamp_min(NEVER))
    all_alpha = torch.stack(alpha, 1)
    clip = torch.arange(B)
    ends = []
    for i, duration in enumerate(durations):
        if duration:
            last = frames - duration
            place = last.clamp_min(0) + lengths
            way = all_alpha[clip, place, lengths] + by_blank[i][clip, place, lengths]
            ends.append(torch.where(last >= 0, way, NEVER))
    return -torch.logsumexp(torch.stack(ends), 0)


def read_clips(manifest: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The clips with their samples at 16 kHz and the ids of their texts."""
    clips = []
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        samples, rate = soundfile.read(manifest.parent / row["audio_filepath"], dtype="float32")
        clips.append(
            {
                "samples": soxr.resample(samples, rate, 16000),
                "text": row["text"],
                "ids": tokenizer.text_to_ids(row["text"]),
            }
        )
    return clips


def batches(clips: list[dict[str, Any]], draw: random.Random) -> Iterator[list[dict[str, Any]]]:
    """All clips once, in batches of clips of like length."""
    ordered = sorted(clips, key=lambda clip: len(clip["samples"]) * draw.uniform(0.9, 1.1))
    groups: list[list[dict[str, Any]]] = [[]]
    for clip in ordered:
        groups[-1].append(clip)
        if len(groups[-1]) * len(clip["samples"]) > BATCH_SECONDS * 16000:
            groups.append([])
    draw.shuffle(groups)
    yield from filter(None, groups)


def varied(samples: np.ndarray, draw: random.Random) -> np.ndarray:
    """With silence around, another level, and white noise."""
    silence = [np.zeros(draw.randint(0, most), np.float32) for most in (6400, 4800)]
    padded = np.concatenate([silence[0], samples, silence[1]]) * draw.uniform(0.3, 1.2)
    noise = np.random.default_rng(draw.getrandbits(32)).standard_normal(len(padded), np.float32)
    return padded + noise * np.float32(10 ** draw.uniform(-4.5, -2))


def joined_rows(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True), lengths


def mask(features: Tensor, frames: Tensor, draw: random.Random) -> None:
    """Two bands and two spans of each clip are set to zero."""
    for i, length in enumerate(frames.tolist()):
        for _ in range(2):
            band, span = draw.randint(0, 14), draw.randint(0, 10)
            low, begin = draw.randint(0, 127 - band), draw.randint(0, max(0, length - span))
            features[i, low : low + band] = 0
            features[i, :, begin : begin + span] = 0


def train(model: Any, clips: list[dict[str, Any]], epochs: int, rate: float, hint: float) -> None:
    """Train encoder, prediction network and joint in place; the joint's last layer only for the pieces of the texts.

    Afterwards the encoder's matrices are ternary numbers, exactly.
    """
    teacher = copy.deepcopy(model.encoder).eval().requires_grad_(False)
    matrices = [layer.get_submodule(name) for layer in model.encoder.layers for name in MATRICES]
    for module in matrices:
        parametrize.register_parametrization(module, "weight", StraightThrough())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    durations = list(model.cfg.decoding.durations)
    head = model.joint.joint_net[-1]
    blank = model.tokenizer.vocab_size
    used = sorted({token for clip in clips for token in clip["ids"]})
    rows = torch.tensor([*used, *range(blank, blank + 1 + len(durations))])
    place = {token: i for i, token in enumerate(used)}
    trained = [*model.encoder.parameters(), *model.decoder.parameters(), *model.joint.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.0)
    draw = random.Random(0)
    total = epochs * sum(1 for _ in batches(clips, random.Random(0)))
    model.train()
    shown = []
    progress = tqdm(total=total, unit="step", mininterval=10)
    for _ in range(epochs):
        for batch in batches(clips, draw):
            signal, lengths = joined_rows([varied(clip["samples"], draw) for clip in batch])
            targets, sizes = joined_rows([np.array(clip["ids"]) for clip in batch])
            places, _ = joined_rows([np.array([place[token] for token in clip["ids"]]) for clip in batch])
            with torch.no_grad():
                features, frames = model.preprocessor(input_signal=signal, length=lengths)
                exact, _ = teacher(audio_signal=features, length=frames)
                mask(features, frames, draw)
            encoded, valid = model.encoder(audio_signal=features, length=frames)
            predicted, _, _ = model.decoder(targets=targets, target_length=sizes)
            joined = model.joint.enc(encoded.mT)[:, :, None] + model.joint.pred(predicted.mT)[:, None]
            logits = F.linear(model.joint.joint_net[:-1](joined), head.weight[rows], head.bias[rows])
            loss = (tdt_loss(logits, valid.long(), places, sizes, durations) / sizes).mean()
            inside = (torch.arange(encoded.size(2)) < valid[:, None])[:, None]
            apart = ((encoded - exact) * inside).square().sum() / (exact * inside).square().sum()
            done = min(progress.n / total, 1)
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (progress.n + 1) / 100) * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
            optimizer.zero_grad()
            (loss + hint * apart).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            progress.update()
            shown.append((loss.item(), apart.item()))
            if progress.n % 50 == 0:
                mean = np.mean(shown[-50:], axis=0)
                progress.write(f"step {progress.n} of {total}: TDT {mean[0]:.3f}, hint {mean[1]:.3f}")
    progress.close()
    model.eval()
    for module in matrices:
        codes, scales = ternary(module.parametrizations.weight.original.detach())
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        module.weight.data = (codes * scales).reshape(module.weight.shape)


def error_rate(model: Any, clips: list[dict[str, Any]]) -> float:
    """The word error rate of NeMo's own transcripts."""
    audio = [clip["samples"] for clip in clips]
    transcripts = [result.text for result in model.transcribe(audio, batch_size=8, verbose=False)]
    return jiwer.wer([clip["text"] for clip in clips], transcripts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="clip list to train on")
    parser.add_argument("--held_out", type=Path, nargs="*", default=[], help="clip lists to measure on")
    parser.add_argument("--output_dir", type=Path, required=True, help="the folder to write, in parakeet-redux's form")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--hint", type=float, default=1.0, help="weight of the difference from the bundled encoder")
    args = parser.parse_args(argv)
    quiet_libraries()
    from nemo.collections.asr.models import ASRModel

    torch.manual_seed(0)
    model = ASRModel.restore_from(str(TINY), map_location="cpu")
    held_out = [read_clips(manifest, model.tokenizer) for manifest in args.held_out]
    kept_away = {clip["text"] for clips in held_out for clip in clips}
    clips = [clip for clip in read_clips(args.manifest, model.tokenizer) if clip["text"] not in kept_away]
    print(f"{len(clips)} clips to train on", flush=True)
    before = [error_rate(model, measured) for measured in held_out]
    train(model, clips, args.epochs, args.rate, args.hint)
    for name, measured, old in zip(args.held_out, held_out, before, strict=True):
        print(f"{name}: WER {100 * old:.2f} % before, {100 * error_rate(model, measured):.2f} % after", flush=True)
    nemo = args.output_dir.with_name(f"{args.output_dir.name}.nemo")
    nemo.parent.mkdir(parents=True, exist_ok=True)
    model.save_to(str(nemo))
    write_form("redux", convert(nemo, nemo.with_suffix(".transformers")), args.output_dir)


if __name__ == "__main__":
    main()

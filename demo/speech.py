"""Spoken digits: utterances joined from espeak-ng clips, and the log-mel frames that a Gemma 4 audio tower reads.

The pool of clips (``demo/.work/digits.npz``) is rendered once by ``python -m demo.speech``: ten digits in many voices
and speeds, 8-bit mu-law at 16 kHz. Voices whose name hashes to the held-out share appear only in the test set.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import wave
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np

from demo.tasks import Item, held_out

RATE = 16_000  # Hz
FRAME, HOP, FFT, MELS = 320, 160, 512, 128
FRAMES = 300  # longest utterance in training: 3 s
POOL = Path(__file__).parent / ".work" / "digits.npz"

QUESTIONS = ("Which digits do you hear?", "Write down the digits.", "What number is spoken?", "What do you hear?")
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-us-nyc", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2")
_NAMES = "zero one two three four five six seven eight nine".split()


def is_test_voice(voice: str) -> bool:
    """One voice in eight is heard only in the test set."""
    return crc32(voice.encode()) % 8 == 0


def compress(samples: np.ndarray) -> np.ndarray:
    """[-1, 1] float -> 8-bit mu-law codes."""
    curved = np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log(256)
    return np.round((curved + 1) * 127.5).astype(np.uint8)


def expand(codes: np.ndarray) -> np.ndarray:
    """The inverse of ``compress``, float32."""
    curved = codes.astype(np.float32) / 127.5 - 1
    return (np.sign(curved) * np.expm1(np.abs(curved) * np.float32(np.log(256))) / 255).astype(np.float32)


def resample(samples: np.ndarray, length: int) -> np.ndarray:
    """Change the number of samples by cutting or padding the spectrum (band-limited)."""
    spectrum = np.fft.rfft(samples)
    wanted = np.zeros(length // 2 + 1, dtype=complex)
    kept = min(len(spectrum), len(wanted))
    wanted[:kept] = spectrum[:kept]
    return np.fft.irfft(wanted, length) * (length / len(samples))


def speak(text: str, voice: str, *, speed: int, pitch: int) -> np.ndarray:
    """One espeak-ng rendering at 16 kHz, silence at both ends removed, peak 0.9."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-w", file.name, text]
        subprocess.run(command, check=True, capture_output=True)
        with wave.open(file.name) as reader:
            rate = reader.getframerate()
            raw = np.frombuffer(reader.readframes(reader.getnframes()), dtype=np.int16)
    samples = resample(raw / 32768, round(len(raw) * RATE / rate))
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    return samples * (0.9 / np.abs(samples).max())


def render_pool(path: Path = POOL) -> None:
    """Render the pool of single digits; about two minutes."""
    rng = random.Random("pool")
    codes, starts, digits, voices, names = [], [0], [], [], []
    for accent in _ACCENTS:
        for variant in _VARIANTS:
            voice = f"{accent}+{variant}"
            names.append(voice)
            for digit, word in enumerate(_NAMES):
                for _ in range(2):
                    clip = compress(speak(word, voice, speed=rng.randint(110, 220), pitch=rng.randint(25, 75)))
                    codes.append(clip)
                    starts.append(starts[-1] + len(clip))
                    digits.append(digit)
                    voices.append(len(names) - 1)
    path.parent.mkdir(exist_ok=True, parents=True)
    np.savez_compressed(
        path, codes=np.concatenate(codes), starts=starts, digits=digits, voices=voices, names=np.array(names)
    )


@cache
def pool(path: Path = POOL) -> dict[tuple[bool, int], list[list[np.ndarray]]]:
    """(test voice?, digit) -> for each voice its clips, float32."""
    with np.load(path) as data:
        codes, starts, digits, voices, names = (data[key] for key in ("codes", "starts", "digits", "voices", "names"))
    out: dict[tuple[bool, int], list[list[np.ndarray]]] = {(t, d): [] for t in (False, True) for d in range(10)}
    for voice, name in enumerate(names):
        for digit in range(10):
            which = np.flatnonzero((voices == voice) & (digits == digit))
            clips = [expand(codes[starts[i] : starts[i + 1]]) for i in which]
            out[is_test_voice(str(name)), digit].append(clips)
    return out


def utterance(rng: random.Random, digits: Sequence[int], *, test: bool = False) -> np.ndarray:
    """Digits spoken by one voice with pauses, at some speed and loudness, in noise.

    Returns:
        float32 samples in [-1, 1]; their number is a multiple of 640, so that no frame is padded.
    """
    clips = pool()
    voice = rng.randrange(len(clips[test, 0]))
    speed = rng.uniform(0.88, 1.12)
    parts = [np.zeros(round(rng.uniform(0.03, 0.2) * RATE))]
    for digit in digits:
        clip = rng.choice(clips[test, digit][voice])
        positions = np.arange(0, len(clip) - 1, speed)
        parts.append(np.interp(positions, np.arange(len(clip)), clip))
        parts.append(np.zeros(round(rng.uniform(0.02, 0.18) * RATE)))
    speech = np.concatenate(parts)
    longest = FRAMES * HOP
    speech = np.pad(speech, (0, -len(speech) % 640))[:longest]
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(speech))
    if rng.random() < 0.5:  # darker noise: white noise through a running sum that forgets
        noise = np.convolve(noise, 0.9 ** np.arange(40), mode="same") * 0.44
    level = 0.3 * 10 ** (-rng.uniform(14, 45) / 20)
    loudness = 10 ** (-rng.uniform(0, 14) / 20)
    return np.clip((speech + level * noise) * loudness, -1, 1).astype(np.float32)


@cache
def _mel_filters() -> np.ndarray:
    """[257, 128] triangles on the HTK mel scale from 0 to 8000 Hz, peak 1."""
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), MELS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(samples: np.ndarray) -> np.ndarray:
    """ln(mel magnitudes + 1e-3), [frames, 128] float32, with frames = (N + 160 - 321) // 160 + 1."""
    padded = np.concatenate([np.zeros(FRAME // 2), samples])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME + 1)[::HOP, :FRAME]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FRAME) / FRAME)
    spectrum = np.abs(np.fft.rfft(frames * window, FFT))
    return np.log(spectrum @ _mel_filters() + 1e-3).astype(np.float32)


def soft_tokens(frames: int) -> int:
    """Soft tokens for so many mel frames: two stages of stride 2."""
    return (frames + 3) // 4


def make_speech(rng: random.Random, *, test: bool = False) -> tuple[Item, np.ndarray]:
    """A question about one to four spoken digits, and the samples."""
    text = "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 3, 4))))
    while held_out("speech", text) != test:
        text = "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 2, 3, 3, 4))))
    content = [{"type": "audio"}, {"type": "text", "text": rng.choice(QUESTIONS)}]
    item = Item(task="speech", key=text, messages=[{"role": "user", "content": content}], text=text)
    return item, utterance(rng, [int(digit) for digit in text], test=test)


if __name__ == "__main__":
    render_pool()
    print(f"{POOL}: {POOL.stat().st_size} bytes")

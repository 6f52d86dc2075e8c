"""Sound: log-spectrograms as OGM-GE (CVPR 2022) has them, of clips that are repeated or cut to one length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.functional import resample

from igm_rs.experiments.columns import Column

from .media import Home
from .threads import one_thread

__all__ = ["HOP", "LOG_OFFSET", "N_FFT", "SMALL_FRAMES", "SMALL_N_FFT", "SMALL_RATE", "Sound", "SpectrogramColumn"]

N_FFT, HOP = 512, 353
"""Samples of a window, and from one window to the next, in OGM-GE and in the released scripts."""

LOG_OFFSET = 1e-7
"""Added to a magnitude before its logarithm is taken, there as here."""

MOST_PHASES = 5000
"""Between two rates without their common divisor: what resamples has a filter for each of as many."""

SMALL_RATE, SMALL_N_FFT, SMALL_FRAMES = 8000, 64, 30
"""Samples in a second, samples of a window, and windows in a clip, for the small networks."""


@dataclass(frozen=True)
class Sound:
    """How a clip's sound becomes a spectrogram.

    Attributes
    ----------
    rate : int
        Samples in a second, after resampling.
    seconds : int
        Length of a clip; a shorter one is repeated from its beginning, a longer one is cut.
    n_fft, hop : int
        Samples of a window, and from one window to the next.
    """

    rate: int
    seconds: int
    n_fft: int = N_FFT
    hop: int = HOP

    @property
    def samples(self) -> int:
        """Samples of a clip."""
        return self.rate * self.seconds

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a spectrogram: one channel, frequencies, windows."""
        return 1, self.n_fft // 2 + 1, self.samples // self.hop + 1

    def small(self) -> Sound:
        """Return the same for the small networks: 33 frequencies, 30 windows."""
        hop = SMALL_RATE * self.seconds // (SMALL_FRAMES - 1)
        return Sound(SMALL_RATE, self.seconds, SMALL_N_FFT, hop)

    def __str__(self) -> str:
        """Say it in a line, for a digest."""
        return f"rate {self.rate}, seconds {self.seconds}, n_fft {self.n_fft}, hop {self.hop}, offset {LOG_OFFSET}"

    def spectrogram(self, waveform: Tensor, rate: int) -> Tensor:
        """Return log(|STFT| + 1e-7), with the natural logarithm.

        Parameters
        ----------
        waveform : Tensor
            ``(samples,)``, one or more; within ±1 but for what resampling adds, which is clipped.
        rate : int
            Its samples in a second.

        Returns
        -------
        Tensor
            float32, :attr:`shape`. The windows are Hann's, the first is centred on the first sample, and there are
            zeros beyond both ends, as in librosa since 0.10, which the scripts call.
        """
        with one_thread():
            heard = resample(waveform.to(torch.float32), rate, self.rate)
            heard = heard.repeat(-(-self.samples // len(heard)))[: self.samples].clamp(-1.0, 1.0)
            window = torch.hann_window(self.n_fft)
            found = torch.stft(
                heard, self.n_fft, self.hop, window=window, center=True, pad_mode="constant", return_complex=True
            )
            return (found.abs() + LOG_OFFSET).log()[None]


@dataclass(frozen=True)
class SpectrogramColumn(Column):
    """Log-spectrogram of each clip's sound: ``(n, 1, frequencies, windows)``, float32; nothing is random.

    Attributes
    ----------
    paths : tuple of Path
        The sound file of each clip.
    home : Home
        The set's folder.
    sound : Sound
        The numbers of the decoding.
    """

    paths: tuple[Path, ...] = field(repr=False)
    home: Home
    sound: Sound

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(n, 1, frequencies, windows)``."""
        return len(self.paths), *self.sound.shape

    def example(self, place: int, seed: int | None) -> Tensor:
        """Decode a clip's sound, see :meth:`Column.example`; channels are averaged, and the seed changes nothing."""
        path = self.paths[place]
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (OSError, RuntimeError, TypeError) as error:  # what soundfile raises at a file that is no sound
            raise self.home.undecodable(path, error) from error
        if not len(samples):
            raise self.home.undecodable(path, "it has no sample")
        if not np.isfinite(samples).all():
            raise self.home.undecodable(path, "it has samples that are not finite")
        if max(rate, self.sound.rate) // math.gcd(rate, self.sound.rate) > MOST_PHASES:
            raise self.home.undecodable(path, f"it has {rate} samples a second, expected a usual rate such as 16000")
        return self.sound.spectrogram(torch.from_numpy(samples.mean(axis=1)), rate)

    def digest_lines(self) -> Iterable[str]:
        """Yield how sound is decoded, then every file."""
        yield str(self.sound)
        yield from self.home.lines(self.paths)

"""What a loss may have beside -log p of the target, and a score beside what its distance says; without torch."""

from __future__ import annotations

from dataclasses import dataclass

from .distance_settings import Settings

MOST_Z = 1e6
CAPS = 1e-6, 1e6


@dataclass(frozen=True)
class LossOptions:
    """Three options of a head; as they stand, the loss is the negative log-likelihood. Raises ValueError.

    `label_smoothing` e, in [0, 1): the target has 1 - e, and every class of the V e / V more (Szegedy et al.,
    arXiv:1512.00567). `z_loss` z >= 0: z * lse^2 is added, lse the log-sum-exp of the scores (PaLM, arXiv:2204.02311).
    `soft_cap` c > 0: scores s are c tanh(s / c) (Gemma 2, arXiv:2408.00118); None: as they are. The first two are of
    training alone; a cap is a part of the model.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        e, z, c = self.label_smoothing, self.z_loss, self.soft_cap
        if isinstance(e, str) or not 0 <= e < 1:
            raise ValueError(f"label_smoothing={e!r}: expected a number from 0 to below 1")
        if isinstance(z, str) or not 0 <= z <= MOST_Z:
            raise ValueError(f"z_loss={z!r}: expected a number from 0 to {MOST_Z:,.0f}")
        if c is not None and (isinstance(c, str) or not CAPS[0] <= c <= CAPS[1]):
            raise ValueError(f"soft_cap={c!r}: expected a number from {CAPS[0]:g} to {CAPS[1]:,.0f}, or none")

    def check(self, settings: Settings) -> None:
        """Raises ValueError for a cap on scores of distances that are lengths.

        Their zero lies at d = 1, so it depends on the unit of x and w, which changes no probability without a cap.
        """
        if self.soft_cap is not None and settings.scaled and settings.degree:
            raise ValueError(
                f"soft_cap={self.soft_cap:g}: the distance is a length, so the zero of its scores -n log d depends on "
                "the unit of length, and a cap would break the scale invariance of HarMax; leave soft_cap out, pin the "
                "scale by z_loss, or take dot, cosine, cosine_softmax, squared_euclidean_softmax, hamming, canberra or "
                "braycurtis"
            )

    @property
    def apart(self) -> str | None:
        """Why a kernel that keeps no scores cannot serve it; None if it can."""
        on = [name for name in ("label_smoothing", "soft_cap") if getattr(self, name)]
        return f"with {' and '.join(on)} every score counts by itself, and the fused kernels keep none" if on else None

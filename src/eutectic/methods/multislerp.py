"""Multi-SLERP: the experts' mean on the sphere, in one step on the tangent space."""

from __future__ import annotations

from eutectic.methods._method import Finite, Method
from eutectic.methods._sphere import spherical

REFERENCE = "Goddard et al., Arcee's MergeKit, EMNLP Industry Track 2024, arXiv:2403.13257; Buss and Fillmore, TOG 2001"


def multislerp(weights: list[Finite] | None = None) -> Method:
    """Interpolate any number of experts on the sphere, each tensor as one vector.

        u = Σ aₖ θ̂ₖ / ‖·‖,   v = Σ aₖ log_u θ̂ₖ,   θ = (Σ aₖ ‖θₖ‖) · exp_u v               (aₖ = wₖ / Σ w, θ̂ = θ / ‖θ‖)

    with log_u x = (φ / sin φ)(x − cos φ u), cos φ = ⟨x, u⟩.  Of two experts of equal norm it is their SLERP; ``karcher`` goes
    on until it converges.  Where the directions cancel, the straight mean Σ aₖ θₖ.  Takes no base (given one, it is
    ignored: ``multislerp_delta`` works on task vectors).

    Args:
        weights: wₖ, one number an expert, in their order; equal if left out.  They need not sum to one.

    Raises:
        ParameterError: the weights sum to zero.

    Source: the method ``multislerp`` of mergekit (Goddard et al., 2024, arXiv:2403.13257), whose idea is the first step of
    Algorithm A1 of Buss and Fillmore, "Spherical averages", 2001.  Differs from mergekit's code, which projects instead of
    taking the logarithm: Σ aₖ (θ̂ₖ − ⟨θ̂ₖ, u⟩ u) is 0 for every input, so that it never leaves u; it also fails where the
    directions of three or more cancel.  Between fine-tunes of one base, at small angles, the two agree to the angle cubed.
    """
    return spherical(weights, steps=1)

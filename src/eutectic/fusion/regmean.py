"""RegMean: linear layers that do to each task's inputs what the experts' own do, by least squares."""

from __future__ import annotations

from collections.abc import Sequence

from eutectic.fusion._fusion import Artefact, Fusion, ModelSet, Run
from eutectic.fusion._grams import fitted, whole
from eutectic.fusion._tensors import over_average
from eutectic.methods._method import Count, Fraction
from eutectic.task import Task

REFERENCE = "Jin et al., Dataless knowledge fusion by merging weights of language models, ICLR 2023, arXiv:2212.09849"


def regmean(samples: Count = 256, shrink: Fraction = 0.9, batch_size: Count = 32) -> Fusion:
    """Merge each linear layer by least squares on the inputs that it has in each expert's network on the expert's own task.

        W = (Σₖ Wₖ Gₖ) (Σₖ Gₖ)⁻¹,     Gₖ = E x xᵀ over tokens, its off-diagonal entries times α

    Each task's expert is the one of its name.  Biases and all else are averaged, and so is a layer that the network does not
    call, or whose weight is an embedding too.  Where no input tells what W should be, it is the average.

    Args:
        samples: inputs of each task, at most; a forward pass for each.
        shrink: α; 1 is plain least squares, 0 an average of columns by their inputs' energy.
        batch_size: inputs that are run together.  Padding counts as tokens: a network that cuts it off where a whole batch has
            it sees none with batches of 1.

    The memory is that of the network, one expert's Gram matrices, and their sum with Σ Wₖ Gₖ: no more for more experts.
    Raises NonFiniteError naming the task and layer.

    Source: Jin et al., ICLR 2023, arXiv:2212.09849.  Differs from the paper in that Gₖ is a mean, not a sum,
    so that no task counts more for having more tokens, and that the system is solved in float64 around the average.
    """

    def fit(models: ModelSet, tasks: Sequence[Task], run: Run) -> Artefact:
        return fitted(models, tasks, run, whole, samples=samples, shrink=shrink, batch_size=batch_size)

    return Fusion(fit, over_average)

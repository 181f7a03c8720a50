"""What the terms of the page mean, and what it cannot say."""

from __future__ import annotations

from pretrain.energy.sustainability import LEAST_SPIKE, SETTLING, SPIKE, WINDOW
from pretrain.study.page import layout
from pretrain.study.page.sections.study import Study

LIMITS = (
    "One data set and these sizes: nothing here says how heads compare at others.",
    "Settings were tuned at the first size; a head whose best ones move with the size is at a disadvantage beyond.",
    "So many random trials find a good setting of a few that matter, not the best one.",
    "Curves, projections and lengths are of the first fresh seed alone, at the size that is shown.",
    "Time depends on the machine and on how far each head's code was tuned for it.",
    "PCA90 and effective rank describe how prototypes lie, not whether a person understands them.",
)


def methods(study: Study) -> str:
    """Definitions with the constants of the code that they describe, and the limits."""
    definitions = {
        "Matched": "Every run of a size has the same decoder, the same number of tokens and steps, and for a seed the "
        "same data in the same order; only the head and the settings that were tuned for it differ.",
        "Search": "Successive halving (arXiv:1502.07943): all trials are trained for a share of the steps, the best of "
        "them anew for the next share, each with a whole schedule. A trial that diverged comes last.",
        "Bits/byte": "Negative log likelihood of a text in bits, over its bytes; it does not depend on the tokenizer. "
        "Lower is better. Choosing saw the validation split, the results are of the test split.",
        "Exponent": "n of the probabilities d^-n / sum of d^-n; sqrt_dim: the square root of the width.",
        "95% interval": "Of the mean over seeds and documents together, as crossed random effects: the variance is "
        "(MS of seeds + MS of documents - MS of the rest) / (seeds x documents), and never less than what seeds or "
        "documents alone give; Student's t with Satterthwaite's degrees of freedom. Differences are paired by seed and "
        "document.",
        "Corrected": "For all heads that are compared at a size, by Holm's method: the k-th smallest p of m times "
        "m - k + 1, never less than the one before. The interval has the level at which Holm's method decides on that "
        "head (of all after the first that fails, that one's), so that it excludes 0 exactly if the corrected p is "
        "below 0.05.",
        "Better, worse, no difference": "The corrected interval of the difference lies below 0, above 0, or includes "
        "0; the last does not show that two heads are equal.",
        "Could have shown": "The smallest true difference that the test finds with the probability that is said, at "
        "Holm's first and strictest step, with the error and the degrees of freedom of these runs.",
        "Edge": "A chosen value in the outer tenth of its range, on the logarithmic scale that it was drawn on, or at "
        "the end of a list; an end at 0 is none. It counts unless the best trial inside was no further behind than "
        "fresh seeds lie apart; with one that counts, nothing is called the best.",
        "Trend": "Least-squares slope of the difference against log10 of the parameters, taken for each seed and "
        "document, so that its interval has both, corrected for all heads as differences are; that a line "
        "fits is assumed.",
        "Tokens/s": "Median over a run's records but the first, and over seeds; beneath it, as a multiple of the "
        "baseline's.",
        "J/token": "Joules of training over its tokens, of the parts of the machine that every run measured.",
        "Prototypes": "They are taken as the head's distance sees them (of length 1 for cosine, for one), less their "
        "mean.",
        "PCA90": "The fewest principal components of the prototypes that hold 90% of their variance, mean over seeds; "
        "at most the width.",
        "PCA90 of what was learnt": "The same of the prototypes less what they were at the start, which is noise in "
        "all directions; beneath it, how much of the prototypes' variance still lies along their start.",
        "PCA90 of final states": "The same of the hidden states that are scored, on held-out text.",
        "Effective rank": "exp of the entropy of the singular values of the prototypes, taken as shares of their sum "
        "(Roy and Vetterli, 2007), mean over seeds.",
        "Gradient unrest": "Of the global gradient norm before clipping: the variance of its logarithm about the "
        f"median of the {WINDOW} steps around each, from {SETTLING:.0%} of the run after the warm-up on. Trends "
        "leave nothing.",
        "Gradient spikes": f"Steps with a norm above that median by more than {SPIKE:g} robust standard deviations of "
        f"its logarithm, and by a factor of e^{LEAST_SPIKE:g} or more.",
        "Loss spikes": f"Steps with a training loss above the median of the {WINDOW} steps around by more than "
        f"{SPIKE:g} robust standard deviations, and by {LEAST_SPIKE:g} nats or more.",
        "Diverged": "Runs of fresh seeds that ended without a finite loss. They are counted and left out of means.",
        "Token frequencies": "The unigram model: every token with its share of the training tokens, whatever came "
        "before it.",
    }
    limits = [*LIMITS]
    if not study.has_energy:
        limits.append(study.no_energy)
    return layout.methods(definitions, limits)
